"""The ``cached()`` region that the running code is in, and the values it holds.

The present region is a context variable, so that it belongs to one thread of execution: a thread
starts outside every region, an asyncio task inherits the region of the code that started it. A
thread that was handed a copy of a context, region included, is outside it all the same: two threads
never share a region. So is a checkpointed function that is called in a region: it runs again in
backward, maybe after the region, has to evaluate and save as much as it did then, and finds what it
had saved by counting.

A block of torch's own ``cached()`` is a region as well, for the parametrized tensors that are ours.

Dynamo cannot trace a context variable (https://github.com/pytorch/pytorch/issues/186449), and a
guard on a ``threading.local`` compares the wrong dictionary. It does guard an attribute of a
module, by reading it again at each call. ``active`` is therefore a property of *this module*: eager
code and Dynamo's guards both get the answer for the context they run in
(``test_compiled_code_knows_the_region_of_its_thread``).
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from fxparam._torch.names import (
    behind_proxy,
    checkpoint_around,
    inside_functorch,
    torch_region,
    tracing_state,
)
from fxparam.eager.reading import evaluated
from fxparam.scopes.held import Values, state_of
from fxparam.scopes.modes import present
from fxparam.scopes.state import State

__all__ = [
    "Evaluation",
    "Region",
    "active",
    "current",
    "enter",
    "forget",
    "inside",
    "leave",
    "outside_regions",
    "read",
    "read_untraced",
    "step_of",
    "stepping",
    "untraced",
]

F = TypeVar("F", bound=Callable[..., object])


def untraced(function: F) -> F:
    """Break the graph of compiled code at each call of ``function``, which Dynamo cannot trace."""
    reason = "the values of a fxparam.cached() region are kept outside compiled graphs"
    return cast("F", torch.compiler.disable(function, reason=reason))  # type: ignore[no-untyped-call]


class Evaluation(NamedTuple):
    """An evaluation that is to be made.

    Attributes:
        chain: the ``ParametrizationList``.
        name: the name of the tensor.
        modes: those that it is made under.
        run: makes it.
    """

    chain: Module
    name: str
    modes: tuple[object, ...]
    run: Callable[[], Tensor]


class Region:
    """The values that one ``cached()`` region shares."""

    #: Whether values outlive calls, so that they have one address in all of them.
    outlives_calls = False

    def __init__(self) -> None:
        self.thread = get_ident()
        self.checkpoint = checkpoint_around()
        self.depth = 0
        self.values = Values()

    def enter(self) -> None:
        """Begin a block in the region."""
        self.depth += 1

    def leave(self) -> None:
        """End a block; the values are dropped with the outermost."""
        self.depth -= 1
        if self.depth == 0:
            self.values.clear()

    @property
    def shared(self) -> Values | None:
        """The values that a block in this region shares with it."""
        return self.values

    def for_block(self) -> Region:
        """Return the region for a ``cached()`` block in this one."""
        return self

    def evaluate(self, chain: Module, name: str) -> Tensor:
        """Return what the region is to hold of a new evaluation.

        Args:
            chain: a ``ParametrizationList``.
            name: the name of the tensor, for a warning; empty for none.
        """
        return evaluated(chain, name)

    def hand_out(self, value: Tensor) -> Tensor:
        """Return what one reader gets of a value that the region holds."""
        return value

    def forget(self, chain: Module) -> None:
        """Drop the values of a list, whose originals are about to be assigned."""
        self.values.forget(chain)

    def read(
        self, chain: Module, name: str, evaluate: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Return the value of a parametrization list: one that is still right, or a new one.

        Args:
            chain: a ``ParametrizationList``.
            name: the name of the tensor, for a warning; empty for none.
            evaluate: what evaluates it, if that is not to be eager code.

        Raises:
            RuntimeError: while ``torch.jit.trace`` runs, whose graph would hold the value as a
            constant.
        """
        if tracing_state() is not None:
            _refuse_trace()
        modes = present()
        value = self.find(chain, modes)
        if value is None:
            run = evaluate or partial(self.evaluate, chain, name)
            value = self._new_value(Evaluation(behind_proxy(chain), name, modes, run))
        return self.hand_out(value)

    @untraced
    def _new_value(self, evaluation: Evaluation) -> Tensor:
        """Return a new value; Dynamo compiles none of it."""
        value = self.find(evaluation.chain, evaluation.modes)  # found not before by its proxy
        return self.keep(evaluation) if value is None else value

    def find(self, chain: Module, modes: tuple[object, ...]) -> Tensor | None:
        """Return the value that a new evaluation would give, or None."""
        held = self.values.find(chain, modes)
        return None if held is None else held.value

    def keep(self, evaluation: Evaluation) -> Tensor:
        """Return a new value, and hold it for as long as it is right."""
        chain, _, modes, run = evaluation
        before = state_of(chain)
        value = run()
        # What the evaluation wrote itself (spectral norm's vectors) does not make its value stale.
        state = before if before.compare(chain) is State.SAME else state_of(chain)
        self.values.keep(chain, value, modes, state)
        return value

    @property
    def usable(self) -> bool:
        """Check whether the region is open, in this thread and this call of a checkpoint."""
        return (
            self.depth > 0 and self.thread == get_ident() and self.checkpoint is checkpoint_around()
        )


_region: ContextVar[Region | None] = ContextVar("fxparam_region", default=None)
# Is not usable, and stands for being outside torch's own regions too.
_OUTSIDE = Region()

# The open ``accumulate()`` block of a parametrization list, in whatever thread.
_steps: WeakKeyDictionary[Module, Region] = WeakKeyDictionary()


def current() -> Region | None:
    """Return the region the running code is in, or None."""
    region = _region.get()
    if region is not None and region.usable:
        return region
    return None if region is _OUTSIDE else _region_of_torch()


def _region_of_torch() -> Region | None:
    """Return the present thread's region in the block of torch's own ``cached()``, if one is open.

    torch keeps it with the values of that block, and drops it with them. In a checkpointed function
    it is not known whether the block is around the function or in it: hence none.
    """
    kept = torch_region()
    if kept is None or checkpoint_around() is not None:
        return None
    key = (get_ident(), "fxparam")
    region: Region | None = kept.get(key)
    if region is None:
        region = kept[key] = Region()
        region.enter()
    return region


def step_of(chain: Module) -> Region | None:
    """Return the open ``accumulate()`` block that evaluates a parametrization list, or None.

    None where regions around are left, and inside a transform of ``torch.func``, which may
    differentiate with respect to originals.
    """
    step = _steps.get(behind_proxy(chain))
    if step is None or not step.usable or inside_functorch() or _region.get() is _OUTSIDE:
        return None
    return step


@contextmanager
def stepping(step: Region, chains: Iterable[Module]) -> Iterator[None]:
    """Let a block hold the values of parametrization lists, in whatever thread they are read."""
    step.enter()
    for chain in chains:
        _steps[chain] = step
        # Dynamo can neither trace nor guard the dictionary: for traced code.
        chain.in_step = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for chain in chains:
            _steps.pop(chain, None)
            chain.__dict__.pop("in_step", None)
        step.leave()


class _ContextModule(types.ModuleType):
    """The class of this module, whose ``active`` is computed each time that it is read."""

    @property
    def active(self) -> bool:
        """Check whether the running code is in a region."""
        return current() is not None


if TYPE_CHECKING:
    active: bool
else:
    sys.modules[__name__].__class__ = _ContextModule


@contextmanager
def inside(region: Region) -> Iterator[None]:
    """Let the code of the block be in a region, instead of in the present one."""
    region.enter()
    token = _region.set(region)
    try:
        yield
    finally:
        region.leave()
        with suppress(ValueError):  # as in :func:`leave`
            _region.reset(token)


@untraced
def enter() -> tuple[Region, Token[Region | None] | None]:
    """Begin a region, or one inside the present region; :func:`leave` ends it."""
    around = current()
    region = Region() if around is None else around.for_block()
    token = None if region is around else _region.set(region)
    region.enter()
    return region, token


@untraced
def leave(entered: tuple[Region, Token[Region | None] | None]) -> None:
    """End what ``enter`` began."""
    region, token = entered
    region.leave()
    if token is not None:
        # A generator may be closed in another context than it ran in. That context never saw this
        # region, and the region, left, is not usable any more.
        with suppress(ValueError):
            _region.reset(token)


@contextmanager
def outside_regions() -> Iterator[None]:
    """Leave the regions around the block, for the block."""
    token = _region.set(_OUTSIDE)
    try:
        yield
    finally:
        _region.reset(token)


def _refuse_trace() -> NoReturn:
    raise RuntimeError(
        "Cannot trace a model while caching parametrizations: a traced graph would hold the "
        "cached value as a constant.\n"
        "required: torch.jit.trace outside of fxparam.cached()\n"
        "found: torch.jit.trace inside of it"
    )


def read(chain: Module, name: str = "", evaluate: Callable[[], Tensor] | None = None) -> Tensor:
    """Return the value of ``chain`` in the current region: one that is still right, or a new one.

    Args:
        chain: a ``ParametrizationList``.
        name: the name of the tensor, for a warning; empty for none.
        evaluate: what evaluates it, if that is not to be eager code.
    """
    region = step_of(chain) or current()
    if region is None:
        return chain()  # type: ignore[no-any-return]
    return region.read(chain, name, evaluate)


read_untraced = untraced(read)


@untraced
def forget(chain: Module) -> None:
    """Drop the current region's values of ``chain``, whose originals are about to be assigned."""
    region = step_of(chain) or current()
    if region is not None:
        region.forget(behind_proxy(chain))
