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
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.names import HigherOrderOperator, tree_flatten
from fxparam._torch.tensors import storage_of
from fxparam.graph.analysis.bodies import Call, call_of
from fxparam.graph.analysis.modes import ModeStack
from fxparam.graph.analysis.nodes import attribute_of, body_of, tensors_in, value_of
from fxparam.graph.analysis.op_effects import UNKNOWN, OpEffects, Ops, is_torch
from fxparam.graph.analysis.schemas import is_confined, may_alias, writes_nothing

__all__ = ["EffectTable", "Effects", "analyze"]

# Higher-order ops that do no more than run their bodies, beside those of graph/bodies.py, whose
# operands are followed into the bodies. Others may do anything to their operands: register_hook
# hangs a hook on the very tensor it is given.
_RUNS_BODIES = {
    "autograd_function_apply",
    "wrap_activation_checkpoint",
}


@dataclass(frozen=True, slots=True)
class Effects:
    """What one node does.

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


def analyze(
    gm: GraphModule, *, grad_enabled: bool | None = None, autocast_now: bool = False
) -> EffectTable:
    """Return the effects of every node, and those of the bodies that nodes run.

    Args:
        gm: a graph whose nodes carry ``meta["example_value"]`` (Dynamo) or ``meta["val"]``
            (export); nodes without are taken to do the worst.
        grad_enabled: the grad mode in which the graph starts; None when that is not known.
        autocast_now: autocast is then as it is now; else that is not known.
    """
    return _Analysis(gm, ModeStack(grad_enabled, autocast_now), _Numbers(), None).run()


class _Numbers:
    """What the analyses of a graph and of its bodies share: one numbering of storages."""

    def __init__(self) -> None:
        self.fresh = itertools.count()
        self.memory: dict[Hashable, int] = {}  # address of a storage -> number
        self.named: set[int] = set()  # the numbers in it
        self.anywhere = next(self.fresh)  # memory of which nothing is known: it may be any other
        self.ops = Ops()

    def of(self, tensor: torch.Tensor) -> int:
        address: Hashable = storage_of(tensor)
        if address is None:  # subclasses and layouts without a storage
            address = ("tensor", id(tensor))
        if address not in self.memory:
            self.memory[address] = next(self.fresh)
            self.named.add(self.memory[address])
        return self.memory[address]


class _Analysis:
    """One graph; ``inputs`` are the storages of its placeholders, None for the outermost graph."""

    def __init__(
        self,
        gm: GraphModule,
        modes: ModeStack,
        numbers: _Numbers,
        inputs: list[frozenset[int]] | None,
    ) -> None:
        self.gm, self.modes, self.numbers = gm, modes, numbers
        self.inputs = iter(inputs) if inputs is not None else None
        self.table = EffectTable()
        self.of = self.table.of

    def run(self) -> EffectTable:
        table = self.table
        for i, node in enumerate(self.gm.graph.nodes):
            table.position[node] = i
            effects = self.of[node] = self._node(node)
            if effects.writes_all:
                table.barriers.append(i)
            if _takes_gradients(node):
                table.takes_gradients.append(node)
            for storage in effects.writes:
                table.writers.setdefault(storage, []).append(i)
        return table

    def _node(self, node: Node) -> Effects:
        if node.op in ("placeholder", "get_attr"):
            return self._input(node)
        leaves = [leaf for arg in node.all_input_nodes for leaf in self.of[arg].values]
        flat = frozenset().union(*leaves)
        if node.op == "output":
            self.table.outputs.extend(self._returned(node))
            return self._effects(flat)
        if self.modes.enter(node):
            return self._effects(flat, known=False, writes_all=not is_torch(node))
        count = len(tensors_in(value_of(node)))
        every = (flat | {next(self.numbers.fresh)},) * max(1, count)
        if node.op == "call_module" and is_confined(self.gm, node):
            return self._module(node, flat)
        if not is_torch(node):
            found = tuple(value | {self.numbers.anywhere} for value in every)
            return self._effects(
                flat, found, writes=flat, random=True, known=False, writes_all=True
            )
        call = call_of(self.gm, node)
        if call is not None and value_of(node) is not None:
            return self._call(call, flat, count)
        op = self._op(node)
        if not op.known and writes_nothing(node):
            values = every if may_alias(node) else (every[0] - flat,) * len(every)
            return self._effects(flat, values, random=True, known=False, raises=True)
        if op.moves_memory:
            for arg in node.all_input_nodes:
                values = tuple(value | flat for value in self.of[arg].values)
                self.of[arg] = replace(self.of[arg], values=values)
        if not op.known or len(op.outputs) != count:
            return self._effects(flat, every, writes=flat, random=True, known=False, raises=True)
        tokens: dict[int | None, int] = {}
        owned = []
        for aliases, fresh in op.outputs:
            if fresh is not None and fresh not in tokens:
                tokens[fresh] = next(self.numbers.fresh)
            own = {tokens[fresh]} if fresh is not None else set()
            owned.append(frozenset().union(own, *(leaves[i] for i in aliases)))
        writes = frozenset().union(*(leaves[i] for i in op.writes))
        return self._effects(flat, tuple(owned), writes, random=op.random, raises=op.raises)

    def _module(self, node: Node, flat: frozenset[int]) -> Effects:
        """Return the worst that a module of torch's can do: to its arguments and to its own
        tensors.
        """
        module: Any = attribute_of(self.gm, node)
        own = frozenset(map(self.numbers.of, (*module.parameters(), *module.buffers())))
        values = (flat | own | {next(self.numbers.fresh)},) * max(
            1, len(tensors_in(value_of(node)))
        )
        return self._effects(
            flat | own, values, writes=flat | own, random=True, known=False, raises=True
        )

    def _effects(
        self,
        reads: frozenset[int],
        values: tuple[frozenset[int], ...] = (),
        writes: frozenset[int] = frozenset(),
        *,
        random: bool = False,
        known: bool = True,
        writes_all: bool = False,
        raises: bool = False,
    ) -> Effects:
        everything = writes_all or self.numbers.anywhere in writes
        return Effects(reads, writes, random, known, everything, raises, self.modes.key, values)

    def _input(self, node: Node) -> Effects:
        value: Any = value_of(node)
        if node.op == "get_attr":
            # An input may be the same tensor, and is known by the fake of it.
            pairs = zip_longest(*map(tensors_in, (attribute_of(self.gm, node), value)))
            known = ([t for t in pair if t is not None] for pair in pairs)
            return self._effects(
                frozenset(), tuple(frozenset(map(self.numbers.of, pair)) for pair in known)
            )
        elif self.inputs is not None:
            count = len(tensors_in(value)) if value is not None else 1
            return self._effects(frozenset(), (next(self.inputs),) * count)
        values = tuple(frozenset({self.numbers.of(t)}) for t in tensors_in(value))
        if not values and value is None:  # a placeholder of which nothing is known
            values = (frozenset({next(self.numbers.fresh), self.numbers.anywhere}),)
        return self._effects(frozenset(), values)

    def _returned(self, output: Node) -> Iterator[frozenset[int]]:
        for leaf in tree_flatten(output.args[0])[0]:
            if isinstance(leaf, Node):
                yield from self.of[leaf].values

    def _op(self, node: Node) -> OpEffects:
        if isinstance(node.target, HigherOrderOperator):
            return self._higher_order(node)
        return self.numbers.ops.effects(node)

    def _call(self, call: Call, flat: frozenset[int], count: int) -> Effects:
        """Return the effects of the bodies, on the operands they are given."""
        first_inside = next(self.numbers.fresh)
        tables = []
        for body in call.bodies:
            varying = [self._storages(v) | {next(self.numbers.fresh)} for v in call.varying]
            inputs = varying + [self._storages(v) for v in call.operands]
            modes = self.modes.fork()
            if call.op == "wrap_with_set_grad_enabled":
                modes.set_grad(call.node.args[0])
            elif call.op == "wrap_with_autocast":
                modes.set_autocast(*call.node.args[:3])
            tables.append(_Analysis(body.module, modes, self.numbers, inputs).run())
        self.table.calls[call.node] = (call, tuple(tables))
        inside = [e for table in tables for e in table.of.values()]

        def outside(storages: Iterable[int]) -> frozenset[int]:
            """Storages that are not allocated in the bodies."""
            named = self.numbers.named  # tensors that a body's module holds
            return frozenset(s for s in storages if s < first_inside or s in named)

        values: tuple[frozenset[int], ...]
        if all(len(table.outputs) == count for table in tables):
            values = tuple(
                frozenset().union(*v) for v in zip(*(t.outputs for t in tables), strict=True)
            )
        else:
            values = (frozenset().union(*(t.escaping for t in tables)),) * count
        own = [frozenset({next(self.numbers.fresh)}) for _ in range(count)]
        return self._effects(
            flat | outside(s for e in inside for s in e.reads),
            tuple(v | o for v, o in zip(values, own, strict=True)),
            outside(s for e in inside for s in e.writes),
            random=any(e.random for e in inside),
            known=not any(_is_unknown(e) for e in inside),
            writes_all=any(table.barriers for table in tables),
            raises=any(e.raises for e in inside),
        )

    def _storages(self, operand: Any) -> frozenset[int]:
        return self.of[operand].storages if isinstance(operand, Node) else frozenset()

    def _higher_order(self, node: Node) -> OpEffects:
        """Return the effects of the bodies; which operand a body's input is, is not asked."""
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
        count = len(tensors_in(value_of(node)))
        # After its results a Function's forward returns what it saves, and its backward is not run.
        results = (
            [tables[0].outputs[:count]]
            if name == "autograd_function_apply"
            else [t.outputs for t in tables]
        )
        passes = any(storages & s for found in results for storages in found for s in inputs)
        # Results that are views of each other are written together.
        own = [
            next((j for j in range(k) if any(r[j] & r[k] for r in results if len(r) > k)), k)
            for k in range(count)
        ]
        outputs = tuple((every if passes or writes else frozenset(), k) for k in own)
        return OpEffects(
            every if writes else frozenset(),
            any(e.random for e in effects),
            outputs,
            raises=any(e.raises for e in effects),
        )


def _takes_gradients(node: Node) -> bool:
    if node.op == "call_method":
        return node.target == "backward"
    return node.target in (torch.autograd.grad, torch.autograd.backward)


def _is_unknown(effects: Effects) -> bool:
    """Return an operation of which nothing is known, rather than a mode switch."""
    return not effects.known and (effects.random or effects.writes_all)
