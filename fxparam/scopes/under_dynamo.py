"""``cached()`` in code that is being compiled: marks on the nodes in place of a dictionary.

A dictionary would be a side effect, which the bodies of higher-order ops may not have, and values
kept in it would break the graph. Traced for fxparam's own backend, a region marks the nodes traced
in it and each evaluation marks its own; the backend then shares marked evaluations as the
dictionary would have (``graph/passes/share_regions.py``). Other backends would ignore the marks, so
that a region stays what it is in eager code for them.

The functions here run while Dynamo traces and give it constants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch.fx import Node
from torch.nn import Module

from fxparam import marks
from fxparam._torch.dynamo import (
    compilation,
    held_as,
    is_in_traced_generator,
    restart_trace,
    trace_marks,
    trace_number,
    traced_assignments,
    traced_changes,
    traced_code,
    traced_for,
    traced_module,
    traces_function_modes,
)
from fxparam._torch.fx import written_argument
from fxparam._torch.names import inside_functorch
from fxparam.scopes.modes import ambient_mark

__all__ = [
    "UNTRACEABLE",
    "assignments",
    "chain_of",
    "changes",
    "constant",
    "evaluation_of",
    "forget_models",
    "is_innermost",
    "is_open",
    "is_shared",
    "keep_out_of_graphs",
    "mark_of",
    "region",
    "region_around",
    "retrace_without",
]

F = TypeVar("F", bound=Callable[..., object])
_numbers = itertools.count()

# Parametrization lists that were read in a region around a graph.
_chains: WeakValueDictionary[int, Module] = WeakValueDictionary()

# By the code of a frame, one list of each model for which it was compiled with a region's values.
_models: WeakKeyDictionary[CodeType, WeakSet[Module]] = WeakKeyDictionary()
_MODELS = 4
_PACKAGE = Path(__file__).parents[1]


@dataclass
class _Compilation:
    """The attempts to compile one frame.

    Attributes:
        number: Dynamo's.
        shared: whether reads leave the graph, in code that serves several models.
        first: the first list that was read in the graph.
        chains, kinds: lists that are not to be, and what such lists consist of.
    """

    number: object
    shared: bool
    first: int | None = None
    chains: set[int] = field(default_factory=set)
    kinds: set[tuple[type, ...]] = field(default_factory=set)


_latest = _Compilation(None, True)


def _present_compilation() -> _Compilation:
    global _latest
    number = compilation()
    if number != _latest.number:
        _latest = _Compilation(number, _serves_several_models(traced_code()))
    return _latest


#: In place of a mark: this evaluation cannot be told from others by one.
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
    return _present(marks.REGION) or marks.region(trace_number(), next(_numbers))


def _is_traced_for_ours() -> bool:
    """Check whether the code is traced for a backend that reads marks, which it says of itself."""
    return bool(getattr(traced_for(), "reads_marks", False))


@constant
def is_shared() -> bool:
    """Check whether the frame's code already serves several models, as a layer's may, and ours
    does.

    Compiled with a value of the region it serves one model alone.
    """
    return _present_compilation().shared


def forget_models() -> None:
    """Forget what was compiled, as Dynamo does."""
    _models.clear()


@constant
def region_around(chain: int) -> str:
    """Return the mark of the eager region in which the graph will run; empty where marks do not do.

    Args:
        chain: the identity of a ``ParametrizationList``.
    """
    module = traced_module(chain)
    if module is None and trace_number():
        module = _chains.get(chain)  # Dynamo forgets between two bodies what it has seen in one
    now = _present_compilation()
    if (
        module is None
        or chain in now.chains
        or _kinds(module) in now.kinds
        or not _is_traced_for_ours()
        or inside_functorch()
        or traces_function_modes()
    ):
        return ""
    _chains[chain] = module
    code = traced_code()
    if code is not None and now.first is None:
        now.first = chain
        _models.setdefault(code, WeakSet()).add(module)
    return marks.region_around(trace_number())


def chain_of(identity: int) -> Module | None:
    """Return a parametrization list that was read in a region around its graph."""
    return _chains.get(identity)


def keep_out_of_graphs(*chains: int) -> None:
    """Let reads of parametrization lists leave the graph when the present frame is traced anew."""
    _present_compilation().chains.update(chains)


def _serves_several_models(code: CodeType | None) -> bool:
    if code is None or _PACKAGE in Path(code.co_filename).parents:
        return True
    return len(_models.get(code, ())) >= _MODELS


def _kinds(chain: Module) -> tuple[type, ...]:
    return tuple(map(type, chain.modules()))


@constant
def is_open() -> bool:
    """Check whether a region is around what is being traced."""
    return bool(_present(marks.REGION))


@constant
def is_innermost(mark: str) -> bool:
    """Check whether the region of ``mark`` may end now: it, or one in it, began last."""
    return _present(marks.REGION) == mark


@constant
def evaluation_of(chain: int, training: str) -> str:
    """Return the mark of one evaluation of a chain, with those it is a part of; empty outside a
    region.

    Modes are those of the code that reads: Dynamo has entered them here. In the graph they can not
    be told from those that an evaluation begins with, since it drops pairs of switches.

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
    return marks.evaluation(around, mark_of(chain), training, ambient_mark(), next(_numbers))


@constant
def mark_of(chain: int) -> str:
    """What marks the value of a chain."""
    return marks.value(trace_number(), chain)


@constant
def retrace_without(chain: int) -> None:
    """Trace the present frame anew, with reads of a parametrization list outside of its graphs.

    And of all of its kind: Dynamo traces a frame a hundred times at most.
    """
    _present_compilation().kinds.add(_kinds(_chains[chain]))
    restart_trace("a parametrized tensor is read outside of the graph")


@constant
def assignments(chain: int) -> str:
    """What has been assigned so far to attributes of a chain's modules, other than tensors.

    Args:
        chain: the identity of a ``ParametrizationList``.
    """
    return " ".join(traced_assignments(chain))


@constant
def changes() -> str:
    """What has been changed so far of what was there before, other than by writing to tensors.

    The graph is given values that are read before all this.
    """
    return " ".join(
        f"{type(owner).__name__}.{name}"
        for owner, name, node in traced_changes()
        if not _is_put_back(owner, name, node)
    )


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
