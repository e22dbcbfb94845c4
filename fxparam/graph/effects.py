"""What each node of a graph reads, writes in place and draws at random, and under which modes.

No list of op names: a node's op is run on fresh fake tensors under a dispatch mode that reads
the schema of every ATen op below it. What the op does depends on its target and the metadata of
its arguments alone, so the answer is remembered under that key and the run is done once.

Aliasing is by storage. A storage is an integer token: inputs that share memory share a token, a
view has the token of its base, and an op that allocates gets a token of its own.

*Unknown means unsafe.* An op that cannot be run on fakes is taken to write all its arguments; a
Python function that is not torch's may reach anything and is taken to write everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxparam._private import HigherOrderOperator
from fxparam.graph.modes import ModeStack
from fxparam.graph.nodes import attribute_of, body_of, tensors_in, value_of
from fxparam.graph.ops import UNKNOWN, OpEffects, Ops, is_torch, storage_of

__all__ = ["EffectTable", "Effects", "analyze"]

# Higher-order ops that do no more than run their bodies. Others may do anything to their
# operands: register_hook hangs a hook on the very tensor it is given.
_RUNS_BODIES = {
    "associative_scan",
    "autograd_function_apply",
    "checkpoint",
    "cond",
    "invoke_subgraph",
    "map_impl",
    "scan",
    "tag_activation_checkpoint",
    "while_loop",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
}


@dataclass(frozen=True, slots=True)
class Effects:
    """What one node does.

    Attributes:
        reads: storages of its tensor arguments.
        writes: storages it writes in place; ``writes_all`` when it may write any.
        random: it draws random numbers.
        known: its effects were observed; if not, they are assumed to be the worst.
        modes: the grad, autocast and functorch modes in force, as an opaque key.
        values: for each tensor in its value, the storages that tensor may live in.
    """

    reads: frozenset[int]
    writes: frozenset[int]
    random: bool
    known: bool
    writes_all: bool
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
    """The effects of every node of one graph, and who writes which storage when."""

    of: dict[Node, Effects]
    position: dict[Node, int]
    writers: dict[int, list[int]] = field(default_factory=dict)
    barriers: list[int] = field(default_factory=list)
    escaping: frozenset[int] = frozenset()

    def written(self, storages: frozenset[int], after: int, before: float = float("inf")) -> bool:
        """Whether a node at a position in the open interval writes one of the storages."""
        positions = itertools.chain(self.barriers, *(self.writers.get(s, ()) for s in storages))
        return any(after < p < before for p in positions)


def analyze(gm: GraphModule, *, grad_enabled: bool | None = None) -> EffectTable:
    """The effects of every node.

    Args:
        gm: a graph whose nodes carry ``meta["example_value"]`` (Dynamo) or ``meta["val"]``
            (export); nodes without are taken to do the worst.
        grad_enabled: the grad mode in which the graph starts; None when that is not known.
    """
    return _Analysis(gm, grad_enabled).run()


class _Analysis:
    def __init__(self, gm: GraphModule, grad_enabled: bool | None) -> None:
        self.gm = gm
        self.modes = ModeStack(grad_enabled)
        self.fresh = itertools.count()
        self.memory: dict[Hashable, int] = {}  # address of a storage -> token
        self.ops = Ops()
        self.of: dict[Node, Effects] = {}

    def run(self) -> EffectTable:
        position = {node: i for i, node in enumerate(self.gm.graph.nodes)}
        table = EffectTable(self.of, position, escaping=frozenset())
        for node in self.gm.graph.nodes:
            effects = self.of[node] = self._node(node)
            if effects.writes_all:
                table.barriers.append(position[node])
            for storage in effects.writes:
                table.writers.setdefault(storage, []).append(position[node])
        return EffectTable(
            self.of, position, table.writers, table.barriers, _escaping(self.gm.graph, self.of)
        )

    def _node(self, node: Node) -> Effects:
        reads = [leaf for arg in node.all_input_nodes for leaf in self.of[arg].values]
        flat = frozenset().union(*reads)
        if node.op in ("placeholder", "get_attr"):
            return self._input(node)
        if node.op == "output":
            return Effects(flat, frozenset(), False, True, False, self.modes.key, ())
        if self.modes.enter(node):
            opaque = not is_torch(node)
            return Effects(flat, frozenset(), False, False, opaque, self.modes.key, ())
        count = len(tensors_in(value_of(node)))
        every = (flat | {next(self.fresh)},) * max(1, count)
        if not is_torch(node):
            return Effects(flat, flat, True, False, True, self.modes.key, every)
        op = self._op(node)
        leaves = [leaf for arg in node.all_input_nodes for leaf in self.of[arg].values]
        if not op.known or len(op.outputs) != count:
            return Effects(flat, flat, True, False, False, self.modes.key, every)
        tokens: dict[int | None, int] = {}
        values = []
        for aliases, fresh in op.outputs:
            if fresh is not None and fresh not in tokens:
                tokens[fresh] = next(self.fresh)
            own = {tokens[fresh]} if fresh is not None else set()
            values.append(frozenset().union(own, *(leaves[i] for i in aliases)))
        writes = frozenset().union(*(leaves[i] for i in op.writes))
        return Effects(flat, writes, op.random, True, False, self.modes.key, tuple(values))

    def _input(self, node: Node) -> Effects:
        value: Any = value_of(node)
        if node.op == "get_attr":
            value = attribute_of(self.gm, node)
        values = tuple(frozenset({self._token(t)}) for t in tensors_in(value))
        if not values and value is None:  # a placeholder of which nothing is known
            values = (frozenset({next(self.fresh)}),)
        return Effects(frozenset(), frozenset(), False, True, False, self.modes.key, values)

    def _token(self, tensor: torch.Tensor) -> int:
        try:
            address: Hashable = storage_of(tensor)
        except (RuntimeError, NotImplementedError):  # subclasses and layouts without a storage
            address = ("tensor", id(tensor))
        if address not in self.memory:
            self.memory[address] = next(self.fresh)
        return self.memory[address]

    def _op(self, node: Node) -> OpEffects:
        if isinstance(node.target, HigherOrderOperator):
            return self._higher_order(node)
        return self.ops.effects(node)

    def _higher_order(self, node: Node) -> OpEffects:
        """The effects of the bodies; which operand a body's input is, is not asked."""
        bodies = [m for m in (body_of(self.gm, a) for a in node.all_input_nodes) if m is not None]
        name = getattr(node.target, "__name__", "")
        if name not in _RUNS_BODIES or not bodies or value_of(node) is None:
            return UNKNOWN
        tables = [analyze(body) for body in bodies]
        effects = [e for table in tables for e in table.of.values()]
        if any(t.barriers or any(not e.known and e.writes for e in t.of.values()) for t in tables):
            return UNKNOWN
        leaves = sum(len(self.of[arg].values) for arg in node.all_input_nodes)
        every = frozenset(range(leaves))
        inputs = [e.storages for t in tables for n, e in t.of.items() if n.op == "placeholder"]
        writes = any(e.writes & s for e in effects for s in inputs)
        passes = any(t.escaping & s for t in tables for s in inputs)
        outputs = tuple(
            (every if passes or writes else frozenset(), k)
            for k in range(len(tensors_in(value_of(node))))
        )
        return OpEffects(every if writes else frozenset(), any(e.random for e in effects), outputs)


def _escaping(graph: Graph, of: dict[Node, Effects]) -> frozenset[int]:
    outputs = [node for node in graph.nodes if node.op == "output"]
    return frozenset().union(*(of[node].reads for node in outputs))
