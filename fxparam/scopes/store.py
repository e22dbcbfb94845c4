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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from fxparam._torch.dtensors import is_dtensor
from fxparam._torch.names import (
    behind_proxy,
    checkpoint_around,
    inside_functorch,
    torch_region,
    tracing_state,
)
from fxparam._torch.tensors import version_of
from fxparam.eager.reading import evaluated
from fxparam.scopes.held import Saved, Values, state_of
from fxparam.scopes.modes import present
from fxparam.scopes.partial_gradients import keep_gradients_apart
from fxparam.scopes.state import State

__all__ = [
    "Evaluate",
    "Evaluations",
    "Reader",
    "Region",
    "active",
    "begin",
    "begin_in",
    "current",
    "end",
    "enter",
    "forget",
    "inside",
    "known_for",
    "leave",
    "outside_regions",
    "read",
    "read_all",
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


class Evaluations(NamedTuple):
    """Evaluations that are to be made.

    Attributes:
        chains: the ``ParametrizationList`` of each.
        names: the names of the tensors, for warnings; empty for none.
        modes: those that they are made under.
        compiled: returns the values; None for eager code.
        additive: whether the backward of what is compiled is known to be additive in the gradient.
        saved: what it may save for backward.
    """

    chains: Sequence[Module]
    names: Sequence[str]
    modes: tuple[object, ...]
    compiled: Callable[[], Sequence[Tensor]] | None = None
    additive: bool = False
    saved: Saved = ()
    together: bool = False


class Evaluate(NamedTuple):
    """Evaluations that were compiled as one graph.

    Attributes:
        run: returns the values.
        reads: the tensors that each is computed from.
        additive: whether the backward of each is known to be additive in the gradient.
        together: whether they wait for other ranks.
    """

    run: Callable[[], Sequence[Tensor]]
    reads: Sequence[Sequence[Tensor]]
    additive: bool
    together: bool = False

    def versions(self) -> Saved:
        """Return what several evaluations may save for their backward."""
        if len(self.reads) < 2:
            return ()
        versions = ((t, version_of(t)) for read in self.reads for t in read)
        return [(t, version) for t, version in versions if version is not None]

    def values(self, wanted: Sequence[int]) -> list[Tensor]:
        """Evaluate, and return some of the values."""
        made = self.run()
        keep_gradients_apart(made, self.reads)  # those that nobody reads have no gradient
        return [made[i] for i in wanted]


class Reader:
    """A compiled graph that reads values.

    Attributes:
        hidden: for each value, whether the graph does not return it.
    """

    __slots__ = ("hidden",)

    def __init__(self, hidden: Sequence[bool]) -> None:
        self.hidden = hidden


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

    def evaluate(self, new: Evaluations) -> Sequence[Tensor]:
        """Return what the region is to hold of new evaluations."""
        if new.compiled is not None:
            return new.compiled()
        return list(map(evaluated, new.chains, new.names))

    def hand_out(self, value: Tensor, hidden: bool = False) -> Tensor:
        """Return what one reader gets of a value that the region holds.

        Args:
            value: the value.
            hidden: whether the reader is a compiled graph that does not return the value.
        """
        return value

    def forget(self, chain: Module) -> None:
        """Drop the values of a list, whose originals are about to be assigned."""
        self.values.forget(chain)

    def read(self, chain: Module, name: str) -> Tensor:
        """Return the value of a parametrization list: one that is still right, or a new one.

        Args:
            chain: a ``ParametrizationList``.
            name: the name of the tensor, for a warning; empty for none.

        Raises:
            RuntimeError: while ``torch.jit.trace`` runs, whose graph would hold the value as a
            constant.
        """
        if tracing_state() is not None:
            _refuse_trace()
        modes = present()
        value = self.find(chain, modes)
        if value is None:
            value = self._new_value(behind_proxy(chain), name, modes)
        return self.hand_out(value)

    @untraced
    def _new_value(self, chain: Module, name: str, modes: tuple[object, ...]) -> Tensor:
        """Return a new value; Dynamo compiles none of it."""
        value = self.find(chain, modes)  # found not before by its proxy
        if value is None:
            together = any(map(is_dtensor, chain.parameters()))
            (value,) = self.keep(Evaluations([chain], [name], modes, together=together))
        return value

    def read_all(
        self,
        graph: Reader,
        parts: Sequence[tuple[list[Module], Evaluate | None]],
        reads: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the values of the lists that a compiled graph reads, and note them.

        Args:
            graph: the graph.
            reads: what the values are computed from, as the graph was given it.
            parts: lists, and what evaluates them together. It has no effects if they are several.
        """
        modes = present()
        values = [v for part, evaluate in parts for v in self._together(part, evaluate, modes)]
        noting = self.noting
        if noting is not None:
            chains = [chain for part, _ in parts for chain in part]
            noting.note_all(graph, chains, values, modes, _blocks, reads)
        return list(map(self.hand_out, values, graph.hidden))

    def known_for(self, graph: Reader, reads: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the values for a graph that was given some before, if these are right still."""
        noting = self.noting
        known = None if noting is None else noting.find_all(graph, present(), _blocks, reads)
        return None if known is None else list(map(self.hand_out, known, graph.hidden))

    @property
    def noting(self) -> Values | None:
        """What holds the values of present modes; None where nothing does."""
        return self.values

    def _together(
        self, chains: list[Module], compiled: Evaluate | None, modes: tuple[object, ...]
    ) -> list[Tensor]:
        found = [self.find(chain, modes) for chain in chains]
        missing = [i for i, value in enumerate(found) if value is None]
        if missing:
            new = Evaluations([chains[i] for i in missing], [""] * len(missing), modes)
            # A few are not worth evaluating all.
            if compiled is not None and 2 * len(missing) >= len(chains):
                run = partial(compiled.values, missing)
                new = new._replace(
                    compiled=run, additive=compiled.additive, saved=compiled.versions()
                )
            together = compiled is not None and compiled.together
            together |= any(is_dtensor(p) for c in new.chains for p in c.parameters())
            new = new._replace(together=together)
            for i, value in zip(missing, self.keep(new), strict=True):
                found[i] = value
        return [value for value in found if value is not None]

    def find(self, chain: Module, modes: tuple[object, ...]) -> Tensor | None:
        """Return the value that a new evaluation would give, or None."""
        held = self.values.find(chain, modes)
        return None if held is None else held.value

    def keep(self, new: Evaluations) -> Sequence[Tensor]:
        """Return new values, and hold them for as long as they are right."""
        before = list(map(state_of, new.chains))
        values = self.evaluate(new)
        for chain, was, value in zip(new.chains, before, values, strict=True):
            # What an evaluation wrote itself (spectral norm's vectors) does not make it stale.
            state = was if was.compare(chain) is State.SAME else state_of(chain)
            self.values.keep(chain, value, new.modes, state, new.saved, new.together)
        return values

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
# Another object after each begin and end of such a block.
_blocks = object()


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
    global _blocks
    step.enter()
    for chain in chains:
        _steps[chain] = step
        # Dynamo can neither trace nor guard the dictionary: for traced code.
        chain.in_step = True  # type: ignore[assignment]
    _blocks = object()
    try:
        yield
    finally:
        for chain in chains:
            _steps.pop(chain, None)
            chain.__dict__.pop("in_step", None)
        _blocks = object()
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


Entered = tuple["Region", "Token[Region | None] | None"]


def begin() -> Entered:
    """Begin a region, or a block in the present region; :func:`end` ends it."""
    around = current()
    return begin_in(Region() if around is None else around.for_block(), around)


def begin_in(region: Region, around: Region | None = None) -> Entered:
    """Let what follows be in a region, instead of in the one around it; :func:`end` ends it."""
    token = None if region is around else _region.set(region)
    region.enter()
    return region, token


def end(begun: Entered) -> None:
    """End what has begun."""
    region, token = begun
    region.leave()
    if token is not None:
        # A generator may be closed in another context than it ran in. That context never saw this
        # region, and the region, left, is not usable any more.
        with suppress(ValueError):
            _region.reset(token)


enter, leave = untraced(begin), untraced(end)


@contextmanager
def inside(region: Region) -> Iterator[None]:
    """Let the code of the block be in a region, instead of in the present one."""
    begun = begin_in(region)
    try:
        yield
    finally:
        end(begun)


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


def read(chain: Module, name: str = "") -> Tensor:
    """Return the value of ``chain`` in the current region: one that is still right, or a new one.

    Args:
        chain: a ``ParametrizationList``.
        name: the name of the tensor, for a warning; empty for none.
    """
    region = step_of(chain) or current()
    if region is None:
        return chain()  # type: ignore[no-any-return]
    return region.read(chain, name)


def known_for(
    graph: Reader, chains: Sequence[Module], reads: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return the values of a compiled graph's lists, if it was given some and these are right.

    Quicker than :func:`read_all`, which notes them.
    """
    region = step_of(chains[0]) or current()
    return None if region is None else region.known_for(graph, reads)


def read_all(
    graph: Reader,
    parts: Sequence[tuple[list[Module], Evaluate | None]],
    reads: Sequence[Tensor],
) -> list[Tensor]:
    """Return the values of the lists that a compiled graph reads, as :meth:`Region.read_all`."""
    chains = [chain for part, _ in parts for chain in part]
    regions = {step_of(chain) or current() for chain in chains}
    region = regions.pop()
    if regions or region is None:  # some are in an `accumulate()` block
        return list(map(read, chains))
    return region.read_all(graph, parts, reads)


read_untraced = untraced(read)


@untraced
def forget(chain: Module) -> None:
    """Drop the current region's values of ``chain``, whose originals are about to be assigned."""
    region = step_of(chain) or current()
    if region is not None:
        region.forget(behind_proxy(chain))
