"""What each node of a graph reads, writes in place and draws at random, and under which modes.

No list of op names: a node's op is run on fresh fake tensors under a dispatch mode that reads
the schema of every ATen op below it. What the op does depends on its target and the metadata of
its arguments alone, so the answer is remembered under that key and the run is done once.

*Unknown means unsafe.* An op that cannot be run on fakes is taken to write all its arguments; a
Python function that is not torch's may reach anything and is taken to write everything.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.fx import is_torch
from fxparam._torch.names import HigherOrderOperator, tree_flatten
from fxparam._torch.tensors import storage_of
from fxparam.graph.analysis.bodies import Body, Call, call_of
from fxparam.graph.analysis.effect_table import Effects, EffectTable
from fxparam.graph.analysis.modes import ModeStack
from fxparam.graph.analysis.nodes import attribute_of, body_of, tensors_in, value_of
from fxparam.graph.analysis.op_effects import UNKNOWN, OpEffects, Ops
from fxparam.graph.analysis.schemas import is_confined, may_alias, writes_nothing

__all__ = ["analyze"]

# Higher-order ops that do no more than run their bodies, beside those of graph/bodies.py, whose
# operands are followed into the bodies. Others may do anything to their operands: register_hook
# hangs a hook on the very tensor it is given.
_RUNS_BODIES = {
    "autograd_function_apply",
    "wrap_activation_checkpoint",
}


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
    """One numbering of storages, for the analyses of a graph and of its bodies."""

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


class _Kind(enum.Enum):
    """Kinds of nodes, by how their effects are found."""

    INPUT = enum.auto()  # a placeholder or an attribute
    OUTPUT = enum.auto()
    SWITCH = enum.auto()  # of a mode
    MODULE = enum.auto()  # a call of one of torch's own modules
    FOREIGN = enum.auto()  # code that is not torch's
    CALL = enum.auto()  # a higher-order op whose operands are followed into its bodies
    OP = enum.auto()


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
        return _HANDLERS[self._kind(node)](self, node)

    def _kind(self, node: Node) -> _Kind:
        """Tell by what rules the effects of a node are found."""
        if node.op in ("placeholder", "get_attr"):
            return _Kind.INPUT
        if node.op == "output":
            return _Kind.OUTPUT
        if self.modes.is_switch(node):
            return _Kind.SWITCH
        if node.op == "call_module" and is_confined(self.gm, node):
            return _Kind.MODULE
        if not is_torch(node):
            return _Kind.FOREIGN
        understood = call_of(self.gm, node) is not None and value_of(node) is not None
        return _Kind.CALL if understood else _Kind.OP

    def _reads(self, node: Node) -> frozenset[int]:
        """Return the storages of a node's arguments."""
        return frozenset().union(*(s for a in node.all_input_nodes for s in self.of[a].values))

    def _any_of(self, node: Node, storages: frozenset[int]) -> tuple[frozenset[int], ...]:
        """Say of each tensor in a node's value that it lives in new memory or in some storages."""
        count = max(1, len(tensors_in(value_of(node))))
        return (storages | {next(self.numbers.fresh)},) * count

    def _output(self, node: Node) -> Effects:
        self.table.outputs.extend(self._returned(node))
        return self._effects(self._reads(node))

    def _switch(self, node: Node) -> Effects:
        self.modes.enter(node)
        return self._effects(self._reads(node), known=False, writes_all=not is_torch(node))

    def _foreign(self, node: Node) -> Effects:
        """Return the worst: code that is not torch's may reach any memory."""
        reads = self._reads(node)
        values = self._any_of(node, reads | {self.numbers.anywhere})
        return self._effects(reads, values, writes=reads, random=True, known=False, writes_all=True)

    def _module(self, node: Node) -> Effects:
        """Return the worst a module of torch's can do: to its arguments and its own tensors."""
        module: Any = attribute_of(self.gm, node)
        own = frozenset(map(self.numbers.of, (*module.parameters(), *module.buffers())))
        reach = self._reads(node) | own
        values = self._any_of(node, reach)
        return self._effects(reach, values, writes=reach, random=True, known=False, raises=True)

    def _op(self, node: Node) -> Effects:
        """Return what a run on fake tensors showed, or the worst that is not ruled out."""
        reads, op = self._reads(node), self._observed(node)
        every = self._any_of(node, reads)
        if not op.known and writes_nothing(node):
            values = every if may_alias(node) else (every[0] - reads,) * len(every)
            return self._effects(reads, values, random=True, known=False, raises=True)
        if op.moves_memory:
            for arg in node.all_input_nodes:
                values = tuple(value | reads for value in self.of[arg].values)
                self.of[arg] = replace(self.of[arg], values=values)
        if not op.known or len(op.outputs) != len(tensors_in(value_of(node))):
            return self._effects(reads, every, writes=reads, random=True, known=False, raises=True)
        leaves = [leaf for arg in node.all_input_nodes for leaf in self.of[arg].values]
        writes = frozenset().union(*(leaves[i] for i in op.writes))
        values = self._values(op, leaves)
        return self._effects(reads, values, writes, random=op.random, raises=op.raises)

    def _values(self, op: OpEffects, leaves: list[frozenset[int]]) -> tuple[frozenset[int], ...]:
        """Return where the results of an op live, whose arguments live in ``leaves``."""
        tokens: dict[int | None, int] = {}
        owned = []
        for aliases, fresh in op.outputs:
            if fresh is not None and fresh not in tokens:
                tokens[fresh] = next(self.numbers.fresh)
            own = {tokens[fresh]} if fresh is not None else set()
            owned.append(frozenset().union(own, *(leaves[i] for i in aliases)))
        return tuple(owned)

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

    def _observed(self, node: Node) -> OpEffects:
        if isinstance(node.target, HigherOrderOperator):
            return self._higher_order(node)
        return self.numbers.ops.effects(node)

    def _call(self, node: Node) -> Effects:
        """Return the effects of the bodies, on the operands they are given."""
        call = call_of(self.gm, node)
        assert call is not None  # or it is of another kind
        first_inside, count = next(self.numbers.fresh), len(tensors_in(value_of(node)))
        tables = [self._body(call, body) for body in call.bodies]
        self.table.calls[node] = (call, tuple(tables))
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
            self._reads(node) | outside(s for e in inside for s in e.reads),
            tuple(v | o for v, o in zip(values, own, strict=True)),
            outside(s for e in inside for s in e.writes),
            random=any(e.random for e in inside),
            known=not any(_is_unknown(e) for e in inside),
            writes_all=any(table.barriers for table in tables),
            raises=any(e.raises for e in inside),
        )

    def _body(self, call: Call, body: Body) -> EffectTable:
        """Return the effects in a body of a call."""
        varying = [self._storages(v) | {next(self.numbers.fresh)} for v in call.varying]
        inputs = varying + [self._storages(v) for v in call.operands]
        modes = self.modes.fork()
        if call.op == "wrap_with_set_grad_enabled":
            modes.set_grad(call.node.args[0])
        elif call.op == "wrap_with_autocast":
            modes.set_autocast(*call.node.args[:3])
        return _Analysis(body.module, modes, self.numbers, inputs).run()

    def _storages(self, operand: Any) -> frozenset[int]:
        return self.of[operand].storages if isinstance(operand, Node) else frozenset()

    def _higher_order(self, node: Node) -> OpEffects:
        """Return the effects of the bodies, each of whose inputs may be any of the operands."""
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


_HANDLERS: dict[_Kind, Callable[[_Analysis, Node], Effects]] = {
    _Kind.INPUT: _Analysis._input,
    _Kind.OUTPUT: _Analysis._output,
    _Kind.SWITCH: _Analysis._switch,
    _Kind.MODULE: _Analysis._module,
    _Kind.FOREIGN: _Analysis._foreign,
    _Kind.CALL: _Analysis._call,
    _Kind.OP: _Analysis._op,
}


def _takes_gradients(node: Node) -> bool:
    if node.op == "call_method":
        return node.target == "backward"
    return node.target in (torch.autograd.grad, torch.autograd.backward)


def _is_unknown(effects: Effects) -> bool:
    """Check whether effects are those of an unknown operation, rather than of a mode switch."""
    return not effects.known and (effects.random or effects.writes_all)
