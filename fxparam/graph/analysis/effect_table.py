"""The effects of a graph's nodes as facts to be asked: who writes which storage, and when.

Aliasing is by storage. A storage is an integer token: inputs that share memory share a token, a
view has the token of its base, and an op that allocates gets a token of its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from torch.fx import Node

from fxparam.graph.analysis.bodies import Call

__all__ = ["EffectTable", "Effects"]


@dataclass(frozen=True, slots=True)
class Effects:
    """The effects of one node.

    Attributes:
        reads: storages of its tensor arguments.
        writes: storages it writes in place; ``writes_all`` when it may write any.
        random: it draws random numbers.
        known: its effects were observed; if not, they are assumed to be the worst.
        raises: it may raise, depending on the data.
        modes: the grad, autocast and functorch modes in force, as an opaque key.
        values: for each tensor in its value, the storages that tensor may live in.
    """

    reads: frozenset[int]
    writes: frozenset[int]
    random: bool
    known: bool
    writes_all: bool
    raises: bool
    modes: Hashable
    values: tuple[frozenset[int], ...]

    @property
    def storages(self) -> frozenset[int]:
        """Every storage the node's value may live in."""
        return frozenset().union(*self.values)

    @property
    def pure(self) -> bool:
        """The node's value is all it leaves behind, and the same each time."""
        return self.known and not (self.writes or self.writes_all or self.random)


@dataclass(frozen=True)
class EffectTable:
    """The effects of every node of one graph, and who writes which storage when.

    Attributes:
        of: each node's effects.
        position: each node's place in the graph.
        writers: for each storage, the places of the nodes that write it, in order.
        barriers: the places of the nodes that may write any.
        outputs: for each tensor that the graph returns, the storages it may live in.
        calls: the nodes that run bodies, with each body's own table.
        takes_gradients: nodes that run autograd, as ``torch.autograd.grad`` does.
    """

    of: dict[Node, Effects] = field(default_factory=dict)
    position: dict[Node, int] = field(default_factory=dict)
    writers: dict[int, list[int]] = field(default_factory=dict)
    barriers: list[int] = field(default_factory=list)
    outputs: list[frozenset[int]] = field(default_factory=list)
    calls: dict[Node, tuple[Call, tuple[EffectTable, ...]]] = field(default_factory=dict)
    takes_gradients: list[Node] = field(default_factory=list)

    @property
    def escaping(self) -> frozenset[int]:
        """Storages that leave the graph."""
        return frozenset().union(*self.outputs)

    def forget(self, nodes: Iterable[Node]) -> None:
        """Drop nodes that were erased from what was written."""
        gone = {self.position[node] for node in nodes}
        for positions in (self.barriers, *self.writers.values()):
            positions[:] = [p for p in positions if p not in gone]

    def written(
        self, storages: frozenset[int], after: float = -1, before: float = float("inf")
    ) -> bool:
        """Check whether a node at a position in the open interval writes one of the storages."""
        return self.writes(storages, after, before) > 0

    def writes(
        self, storages: frozenset[int], after: float = -1, before: float = float("inf")
    ) -> int:
        """How often nodes at positions in the open interval write the storages."""
        ordered = (self.barriers, *(self.writers.get(s, ()) for s in storages))
        return sum(max(0, bisect_left(p, before) - bisect_right(p, after)) for p in ordered)
