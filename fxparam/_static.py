"""``cached()`` in code that is being compiled: marks on the nodes in place of a dictionary.

A dictionary would be a side effect, which the bodies of higher-order ops may not have, and values
kept in it would break the graph. Traced for fxparam's own backend, a region marks the nodes traced
in it and each evaluation marks its own; the backend then shares marked evaluations as the
dictionary would have (``graph/regions.py``). Other backends would ignore the marks, so for them a
region stays what it is in eager code.

The functions here run while Dynamo traces and give it constants.
"""

from __future__ import annotations

import inspect
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

from fxparam import _private
from fxparam._ambient import ambient_mark
from fxparam._inplace import written_argument
from fxparam.graph.marks import AROUND, EVALUATION, REGION, within

__all__ = [
    "UNTRACEABLE",
    "assignments",
    "chain_of",
    "changes",
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
    number = _private.compilation()
    if number != _latest.number:
        _latest = _Compilation(number, _serves_several_models(_private.traced_code()))
    return _latest


#: In place of a mark: this evaluation cannot be told from others by one.
UNTRACEABLE = "untraceable"


def _constant(function: F) -> F:
    return cast("F", torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]


@_constant
def region() -> str:
    """The mark of a region that begins here: that of the one around it, if there is one.

    Empty where marks do not do: for other backends, and in generators, which may be left at any
    time, with their regions, and which Dynamo does not close when they are.
    """
    from fxparam import scopes
    from fxparam.backend import Backend

    own = inspect.unwrap(scopes.cached).__code__
    if not isinstance(_private.traced_for(), Backend) or _private.is_in_traced_generator(own):
        return ""
    return _present(REGION) or f"{_private.trace_number()}.{next(_numbers)}"


@_constant
def is_shared() -> bool:
    """Whether the frame's code already serves several models, as a layer's may, and ours does.

    Compiled with a value of the region it serves one model alone.
    """
    return _present_compilation().shared


def forget_models() -> None:
    """Forget what was compiled, as Dynamo does."""
    _models.clear()


@_constant
def region_around(chain: int) -> str:
    """The mark of the eager region in which the graph will run; empty where marks do not do.

    Args:
        chain: the identity of a ``ParametrizationList``.
    """
    from fxparam.backend import Backend

    module = _private.traced_module(chain)
    if module is None and _private.trace_number():
        module = _chains.get(chain)  # Dynamo forgets between two bodies what it has seen in one
    now = _present_compilation()
    if (
        module is None
        or chain in now.chains
        or _kinds(module) in now.kinds
        or not isinstance(_private.traced_for(), Backend)
        or _private.inside_functorch()
        or _private.traces_function_modes()
    ):
        return ""
    _chains[chain] = module
    code = _private.traced_code()
    if code is not None and now.first is None:
        now.first = chain
        _models.setdefault(code, WeakSet()).add(module)
    return f"{_private.trace_number()}{AROUND}"


def chain_of(identity: int) -> Module | None:
    """A parametrization list that was read in a region around its graph."""
    return _chains.get(identity)


def keep_out_of_graphs(*chains: int) -> None:
    """Let reads of parametrization lists leave the graph when the present frame is traced anew."""
    _present_compilation().chains.update(chains)


def _serves_several_models(code: CodeType | None) -> bool:
    if code is None or Path(code.co_filename).parent == Path(__file__).parent:
        return True
    return len(_models.get(code, ())) >= _MODELS


def _kinds(chain: Module) -> tuple[type, ...]:
    return tuple(map(type, chain.modules()))


@_constant
def is_open() -> bool:
    """Whether a region is around what is being traced."""
    return bool(_present(REGION))


@_constant
def is_innermost(mark: str) -> bool:
    """Whether the region of ``mark`` may end now: it, or one in it, began last."""
    return _present(REGION) == mark


@_constant
def evaluation_of(chain: int, training: str) -> str:
    """The mark of one evaluation of a chain, with those it is a part of; empty outside a region.

    Modes are those of the code that reads: Dynamo has entered them here. In the graph they can not
    be told from those that an evaluation begins with, since it drops pairs of switches.

    Args:
        chain: the identity of a ``ParametrizationList``; torch 2.11 takes no module here.
        training: the training modes of its modules, which Dynamo follows and only traced code
            sees as they are.

    Inside a transform of ``torch.func`` the eager region hands out values of the code around it,
    which code on another level of the transform cannot be shown to do.
    """
    if not _present(REGION):
        return ""
    around = _present(EVALUATION)
    if _private.inside_functorch():
        return "" if around else UNTRACEABLE
    own = f"{mark_of(chain)} {training} {ambient_mark()} {next(_numbers)}"
    return within(around, own)


@_constant
def mark_of(chain: int) -> str:
    """What marks the value of a chain."""
    return f"{_private.trace_number()}.{chain}"


@_constant
def retrace_without(chain: int) -> None:
    """Trace the present frame anew, with reads of a parametrization list outside of its graphs.

    And of all of its kind: Dynamo traces a frame a hundred times at most.
    """
    _present_compilation().kinds.add(_kinds(_chains[chain]))
    _private.restart_trace("a parametrized tensor is read outside of the graph")


@_constant
def assignments(chain: int) -> str:
    """What has been assigned so far to attributes of a chain's modules, other than tensors.

    Args:
        chain: the identity of a ``ParametrizationList``.
    """
    return " ".join(_private.traced_assignments(chain))


@_constant
def changes() -> str:
    """What has been changed so far of what was there before, other than by writing to tensors.

    The graph is given values that are read before all this.
    """
    return " ".join(
        f"{type(owner).__name__}.{name}"
        for owner, name, node in _private.traced_changes()
        if not _is_put_back(owner, name, node)
    )


def _is_put_back(owner: object, name: str, node: Node | None) -> bool:
    """Whether an attribute was assigned the tensor that it had, written in place."""
    while node is not None and node.op != "placeholder":
        node = written_argument(node)
    argument = node.meta.get("grapharg") if node is not None else None
    return argument is not None and argument.example is _private.held_as(owner, name)


def _present(key: str) -> str:
    """A mark of the present trace; earlier ones may have left theirs behind."""
    mark: str = _private.trace_marks().get(key, "")
    return mark if mark.startswith(f"{_private.trace_number()}.") else ""
