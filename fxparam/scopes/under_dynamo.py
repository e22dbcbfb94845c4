"""``cached()`` in code that Dynamo traces: marks on the nodes in place of a dictionary.

A dictionary would be a side effect, which the bodies of higher-order ops may not have, and values
kept in it would break the graph. Traced for fxparam's own backend, a region marks the nodes traced
in it and each evaluation marks its own; the backend then shares marked evaluations as the
dictionary would have (``graph/passes/share_regions.py``). Other backends would ignore the marks, so
that a region stays what it is in eager code for them.

The functions here run while Dynamo traces and give it constants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch.fx import Node
from torch.nn import Module
from torch.nn.utils import parametrize

from fxparam import marks
from fxparam._torch.dynamo import (
    compilation,
    is_in_traced_generator,
    restart_trace,
    trace_marks,
    trace_number,
    traced_code,
    traced_for,
    traced_module,
    traced_torch_region,
    traces_function_modes,
)
from fxparam._torch.fx import written_argument
from fxparam._torch.names import inside_functorch
from fxparam._torch.side_effects import held_as, traced_assignments, traced_changes
from fxparam.scopes.modes import ambient_mark

__all__ = [
    "UNTRACEABLE",
    "assignments",
    "chain_of",
    "changes",
    "constant",
    "evaluation_of",
    "forget_models",
    "is_in_transform",
    "is_innermost",
    "is_open",
    "is_shared",
    "keep_out_of_graphs",
    "mark_of",
    "present_changes",
    "region",
    "region_around",
    "retrace_without",
    "torch_region",
]

F = TypeVar("F", bound=Callable[..., object])

# For so many models a frame is compiled with a region's values; for further ones its reads leave
# the graph.
_MODELS = 4
_PACKAGE = Path(__file__).parents[1]


@dataclass
class _Compilation:
    """Facts that one attempt to compile a frame leaves for the next.

    Attributes:
        number: tells the frame's compilation from others; Dynamo's.
        shared: whether the frame's code serves several models, so that reads leave the graph.
        first: the first parametrization list that was read in the graph, by its ``id()``.
        chains: the lists whose reads leave the graph, by their ``id()``.
        kinds: the classes of the modules of lists whose reads leave the graph.
    """

    number: object
    shared: bool
    first: int | None = None
    chains: set[int] = field(default_factory=set)
    kinds: set[tuple[type, ...]] = field(default_factory=set)


@dataclass
class _Memory:
    """Facts that one trace leaves for later ones, since Dynamo itself hands nothing along.

    Attributes:
        numbers: gives each region and each evaluation a number of its own.
        chains: the parametrization lists that were read in a region around a graph, by ``id()``.
        models: by the code of a frame, one parametrization list of each model for which the frame
            was compiled with values of a region.
        latest: the compilation that is going on, or was the last.
        torch_regions: what stands for blocks of torch's own ``cached()`` in a trace, with marks.
    """

    numbers: Iterator[int] = field(default_factory=itertools.count)
    chains: WeakValueDictionary[int, Module] = field(default_factory=WeakValueDictionary)
    models: WeakKeyDictionary[CodeType, WeakSet[Module]] = field(default_factory=WeakKeyDictionary)
    latest: _Compilation = field(default_factory=lambda: _Compilation(None, True))
    torch_regions: list[tuple[object, str]] = field(default_factory=list)

    def present_compilation(self) -> _Compilation:
        """Return the compilation that is going on; a new one if Dynamo has begun another frame."""
        number = compilation()
        if number != self.latest.number:
            self.latest = _Compilation(number, _serves_several_models(traced_code()))
        return self.latest


_memory = _Memory()

#: Stands in place of a mark: no mark tells this evaluation from others.
UNTRACEABLE = "untraceable"


def constant(function: F) -> F:
    """Run ``function`` while Dynamo traces its call, and trace what it returns as a constant."""
    return cast("F", torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]


def region(own: CodeType) -> str:
    """Return the mark of a region that begins here: that of the one around it, if there is one.

    Empty where marks do not do: for other backends, and in generators, which may be left at any
    time, with their regions, and which Dynamo does not close when they are.

    Args:
        own: the code of the generator that the region itself is.
    """
    if not _is_traced_for_ours() or is_in_traced_generator(own):
        return ""
    return _present(marks.REGION) or torch_region() or _new_mark()


def _new_mark() -> str:
    return marks.region(trace_number(), next(_memory.numbers))


@constant
def torch_region() -> str:
    """Return the mark of the block of torch's own ``cached()`` that the traced code has entered.

    Empty outside, :data:`UNTRACEABLE` where marks do not do.
    """
    block = traced_torch_region()
    if block is None:
        return ""
    if not _is_traced_for_ours():
        return UNTRACEABLE
    trace = trace_number()
    # Of this trace alone; kept, so that no other block gets the same identity.
    known = [each for each in _memory.torch_regions if marks.is_of_trace(each[1], trace)]
    mark = next((mark for other, mark in known if other is block), None)
    if mark is None:
        mark = _new_mark()
        _memory.torch_regions = [*known, (block, mark)]
    return mark


def _is_traced_for_ours() -> bool:
    """Check whether the code is traced for a backend that reads marks, which it says of itself."""
    return bool(getattr(traced_for(), "reads_marks", False))


@constant
def is_shared() -> bool:
    """Check whether the frame's code serves several models, as a layer's ``forward`` may.

    Compiled with a value of the region it would serve one model alone.
    """
    return _memory.present_compilation().shared


def forget_models() -> None:
    """Forget which models frames were compiled for, as Dynamo does in ``torch.compiler.reset``."""
    _memory.models.clear()


@constant
def region_around(chain: int) -> str:
    """Return the mark of the eager region in which the graph will run; empty where marks do not do.

    Args:
        chain: the identity of a ``ParametrizationList``.
    """
    module = traced_module(chain)
    if module is None and trace_number():
        module = _memory.chains.get(
            chain
        )  # Dynamo forgets between two bodies what it has seen in one
    now = _memory.present_compilation()
    if (
        module is None
        or chain in now.chains
        or _kinds(module) in now.kinds
        or not _is_traced_for_ours()
        or inside_functorch()
        or traces_function_modes()
    ):
        return ""
    _memory.chains[chain] = module
    code = traced_code()
    if code is not None and now.first is None:
        now.first = chain
        _memory.models.setdefault(code, WeakSet()).add(module)
    return marks.region_around(trace_number())


def chain_of(identity: int) -> Module | None:
    """Return a parametrization list that was read in a region around its graph."""
    return _memory.chains.get(identity)


def keep_out_of_graphs(*chains: int) -> None:
    """Let reads of parametrization lists leave the graph when the present frame is traced anew."""
    _memory.present_compilation().chains.update(chains)


def _serves_several_models(code: CodeType | None) -> bool:
    if code is None or _PACKAGE in Path(code.co_filename).parents:
        return True
    return len(_memory.models.get(code, ())) >= _MODELS


def _kinds(chain: Module) -> tuple[type, ...]:
    return tuple(map(type, chain.modules()))


@constant
def is_open() -> bool:
    """Check whether a region is around what is being traced."""
    return bool(_present(marks.REGION))


@constant
def is_in_transform() -> bool:
    """Check whether what is being traced is inside of a transform of ``torch.func``."""
    return inside_functorch()


@constant
def is_innermost(mark: str) -> bool:
    """Check whether the region of ``mark`` may end now: it, or one in it, began last."""
    return _present(marks.REGION) == mark


@constant
def evaluation_of(chain: int, training: str) -> str:
    """Return the mark of one evaluation of a chain, with the marks of those it is a part of.

    Empty outside every region. The modes in the mark are those of the code that reads, which Dynamo
    has entered here. The graph does not show them, since Dynamo drops pairs of switches between
    which there is no node.

    Args:
        chain: the identity of a ``ParametrizationList``; torch 2.11 takes no module here.
        training: the training modes of its modules, which Dynamo follows and only traced code
            sees as they are.

    Inside a transform of ``torch.func`` the eager region hands out values of the code around it,
    which code on another level of the transform cannot be shown to do.
    """
    if not _present(marks.REGION):
        return ""
    around = _present(marks.EVALUATION)
    if inside_functorch():
        return "" if around else UNTRACEABLE
    return marks.evaluation(around, mark_of(chain), training, ambient_mark(), next(_memory.numbers))


@constant
def mark_of(chain: int) -> str:
    """Return the mark of the value of a chain, given by its ``id()``, in the present trace."""
    return marks.value(trace_number(), chain)


@constant
def retrace_without(chain: int) -> None:
    """Trace the present frame anew, with the reads of a parametrization list outside its graphs.

    The reads of all lists of its kind leave the graphs with it, since Dynamo gives up a frame after
    a hundred restarts.
    """
    _memory.present_compilation().kinds.add(_kinds(_memory.chains[chain]))
    restart_trace("a parametrized tensor is read outside of the graph")


@constant
def assignments(chain: int) -> str:
    """Return a text of what traced code has assigned to attributes of a chain's modules.

    Assigned tensors are not in it. It is compared with the text of another moment.

    Args:
        chain: the identity of a ``ParametrizationList``.
    """
    return " ".join(traced_assignments(chain))


def present_changes() -> str:
    """Return a text of what traced code has changed of objects from before; empty if nothing.

    Writes to tensors are not in it, and blocks of torch's own ``cached()``. The values of a region
    are read before the graph runs, and with it before these changes.
    """
    return " ".join(
        f"{type(owner).__name__}.{name}"
        for owner, name, node in traced_changes()
        if owner is not parametrize and not _is_put_back(owner, name, node)
    )


changes = constant(present_changes)


def _is_put_back(owner: object, name: str, node: Node | None) -> bool:
    """Check whether an attribute was assigned the tensor that it had, written in place."""
    while node is not None and node.op != "placeholder":
        node = written_argument(node)
    argument = node.meta.get("grapharg") if node is not None else None
    return argument is not None and argument.example is held_as(owner, name)


def _present(key: str) -> str:
    """Return a mark of the present trace; earlier ones may have left theirs behind."""
    mark: str = trace_marks().get(key, "")
    return mark if marks.is_of_trace(mark, trace_number()) else ""
