"""Values that a scope may hand out again, and the conditions under which it may."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import NamedTuple
from weakref import ref

from torch import Tensor
from torch.nn import Module

from fxparam._torch.names import inside_functorch
from fxparam._torch.tensors import functorch_level, version_of, was_written
from fxparam.eager.lost_writes import say_if_lost
from fxparam.scopes.snapshot import Snapshot
from fxparam.scopes.state import State
from fxparam.scopes.unchanged import Unchanged

__all__ = ["HeldValue", "Saved", "Values", "state_of"]

#: Tensors, and the version that each had.
Saved = Sequence[tuple[Tensor, int]]

_ALONE = (
    "A value that ranks compute together was evaluated in a region, and would have to be again.\n"
    "required: a change of parameters, which optimizers make on all ranks\n"
    "found: only a buffer was written; if other ranks have not written it, all would wait for each "
    "other\nWrite it outside of the region."
)


def _versions(tensors: Iterable[Tensor]) -> Saved:
    versions = ((tensor, version_of(tensor)) for tensor in tensors)
    return [(tensor, version) for tensor, version in versions if version is not None]


def state_of(chain: Module) -> Unchanged | Snapshot:
    """Return the present state of what evaluations of a list read; the quick kind where it does."""
    listed = None if inside_functorch() else Unchanged.of(chain)
    return Snapshot(chain) if listed is None else listed


class HeldValue:
    """A value, the modes that it was computed under, and the state of what it was computed from.

    Attributes:
        value: the value.
        version: that of the value; None for an inference tensor, which has none.
        state: compares what is there now with what was there then.
        saved: what one graph of autograd may have saved for this value and others, with versions.
        modes: from :func:`~fxparam.scopes.modes.present`.
        together: if ranks evaluate together, the parameters and the buffers of the list, with
            versions; else None.
    """

    __slots__ = ("modes", "saved", "state", "together", "value", "version")

    def __init__(
        self,
        value: Tensor,
        state: Unchanged | Snapshot,
        modes: tuple[object, ...],
        saved: Saved = (),
    ) -> None:
        self.value, self.state, self.modes = value, state, modes
        self.version = version_of(value)
        self.saved = saved if value.requires_grad else ()
        self.together: tuple[Saved, Saved] | None = None

    def is_written(self) -> bool:
        """Check whether the value itself was written."""
        return self.version is not None and was_written(self.value, self.version)

    def is_without_backward(self) -> bool:
        """Check whether something was written that backward of this value or others needs.

        The others were computed in the same graph of autograd, which has one backward for all.
        """
        return any(was_written(tensor, version) for tensor, version in self.saved)

    def is_stale_here_alone(self, chain: Module) -> bool:
        """Check whether this rank would evaluate anew where other ranks may not.

        Optimizers and assignments change parameters on all ranks, and modes are switched on all. A
        buffer one rank may have written by itself.
        """
        if self.together is None:
            return False
        parameters, buffers = self.together
        same = list(map(id, chain.parameters())) == [id(p) for p, _ in parameters]
        if not same or any(was_written(p, version) for p, version in parameters):
            return False
        return any(was_written(buffer, version) for buffer, version in buffers)

    @classmethod
    def of(
        cls,
        value: Tensor,
        modes: tuple[object, ...],
        state: Unchanged | Snapshot,
        saved: Saved = (),
    ) -> HeldValue | None:
        """Return an entry for a new value; None when it must not outlive this read.

        Args:
            value: what an evaluation has just given.
            modes: those of the evaluation.
            state: that of what it has read.
            saved: as the attribute.
        """
        if not isinstance(value, Tensor):
            return None
        if isinstance(state, Snapshot):
            if not state.tracked:
                return None
            if inside_functorch() and functorch_level(value) > state.level:
                # Wrapped by a transform that no original knows: nothing would tell when it ends.
                return None
        return cls(value, state, modes, saved)


class _Noted(NamedTuple):
    """What was held for a graph, when that changed last, and when it is asked for."""

    change: object
    modes: tuple[object, ...]
    blocks: object
    reads: Sequence[Tensor]
    held: list[HeldValue]
    graphs: list[HeldValue]  # one for each graph of autograd that made several


class Values:
    """The values that a scope holds, of any parametrization lists.

    Lists are held weakly, so that a long scope does not keep a model alive that its owner has
    dropped.

    Args:
        kept: how many values of one tensor are held, for other modes and for other originals, which
            ``functional_call`` may put in place without end. The oldest goes first.
    """

    def __init__(self, kept: int = 8) -> None:
        self._kept = kept
        # By the identity of the list. What belongs to one is replaced, never changed: other threads
        # may be reading it.
        self._of: dict[int, tuple[ref[Module], tuple[HeldValue, ...]]] = {}
        self._noted: dict[object, _Noted] = {}  # by graph
        self._change: object = object()  # another one whenever what is held changes

    def find(self, chain: Module, modes: tuple[object, ...]) -> HeldValue | None:
        """Return the value that a new evaluation would give, or None; drop what is stale."""
        found = self._of.get(id(chain))  # of no other list: it goes when its own does
        if found is None:
            return None
        for held in found[1]:
            if held.modes == modes:
                written = held.is_written() or held.is_without_backward()
                state = State.WRITTEN if written else held.state.compare(chain)
                if state is State.SAME:
                    return held
                if state is State.WRITTEN:
                    say_if_lost(held.value)
                    self._drop(chain, held)
                    if held.is_stale_here_alone(chain):
                        raise RuntimeError(_ALONE)
        return None

    def keep(
        self,
        chain: Module,
        value: Tensor,
        modes: tuple[object, ...],
        state: Unchanged | Snapshot,
        saved: Saved = (),
        together: bool = False,
    ) -> None:
        """Hold a new value, if it may outlive this read; see :meth:`HeldValue.of`.

        Args:
            together: whether the evaluation waits for other ranks.
        """
        held = HeldValue.of(value, modes, state, saved)
        if held is not None:
            if together:
                held.together = _versions(chain.parameters()), _versions(chain.buffers())
            identity = id(chain)
            known, others = self._of.get(identity, (ref(chain, self._died(identity)), ()))
            self._of[identity] = known, (*others, held)[-self._kept :]
            self._changed()

    def find_all(
        self,
        graph: object,
        modes: tuple[object, ...],
        blocks: object,
        reads: Sequence[Tensor],
    ) -> list[Tensor] | None:
        """Return the values of a graph, if they are those noted for it and all right; quickly.

        Args:
            graph, modes, blocks, reads: as for :meth:`note_all`, at present.
        """
        noted = self._noted.get(graph)
        if noted is None or noted.change is not self._change:
            return None
        if noted.modes != modes or noted.blocks is not blocks:
            return None
        if len(reads) != len(noted.reads) or not all(map(is_, reads, noted.reads)):
            return None
        for held in noted.held:
            if held.is_written() or not held.state.is_same():  # type: ignore[union-attr]
                return None
        if any(held.is_without_backward() for held in noted.graphs):
            return None
        return [held.value for held in noted.held]

    def note_all(
        self,
        graph: object,
        chains: list[Module],
        values: list[Tensor],
        modes: tuple[object, ...],
        blocks: object,
        reads: Sequence[Tensor],
    ) -> None:
        """Note the values of a graph, for :meth:`find_all`, if all are held.

        Args:
            graph: stands for the graph.
            chains: the parametrization lists that it reads.
            values: theirs, from here.
            modes: those of the values.
            blocks: another object where the values are not asked for here.
            reads: what the values are computed from, as the graph's caller has found it. Another
                thread may exchange a module between Dynamo's guards and this.
        """
        change = self._change  # before they are looked up: another thread may drop one meanwhile
        held = []
        for chain, value in zip(chains, values, strict=True):
            known = self._of.get(id(chain), (None, ()))[1]
            found = next((h for h in known if h.value is value and h.modes == modes), None)
            if found is None or isinstance(found.state, Snapshot):
                return
            held.append(found)
        graphs = list({id(each.saved): each for each in held if each.saved}.values())
        self._noted[graph] = _Noted(change, modes, blocks, reads, held, graphs)

    def forget(self, chain: Module) -> None:
        """Drop the values of a list."""
        self._of.pop(id(chain), None)
        self._changed()

    def clear(self) -> None:
        """Drop all values."""
        self._of.clear()
        self._changed()

    def _changed(self) -> None:
        """Let nothing that was noted count any more."""
        self._change = object()
        self._noted = {}

    def _drop(self, chain: Module, stale: HeldValue) -> None:
        found = self._of.get(id(chain))
        if found is not None:
            self._of[id(chain)] = found[0], tuple(h for h in found[1] if h is not stale)
            self._changed()

    def _died(self, identity: int) -> Callable[[object], None]:
        weak = ref(self)  # no cycle: what is held is dropped with the scope

        def died(_: object) -> None:
            values = weak()
            if values is not None:
                values._of.pop(identity, None)
                values._changed()

        return died
