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
import operator
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxparam._private import (
    FakeTensorMode,
    HigherOrderOperator,
    ShapeEnv,
    TorchDispatchMode,
    is_wrapper_subclass,
    tree_flatten,
    tree_map,
)
from fxparam.graph.literals import literal_key
from fxparam.graph.modes import ModeStack

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


@dataclass(frozen=True, slots=True)
class _OpEffects:
    """Effects of an op, in terms of its argument leaves: what is remembered between nodes."""

    writes: frozenset[int]
    random: bool
    # per tensor of the value: argument leaves it aliases, and the fresh storage it lives in
    outputs: tuple[tuple[frozenset[int], int | None], ...]
    known: bool = True


class _Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Collects the storages written and whether anything random ran."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.random = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # c10d.allreduce_ and its kin write although their schemas say that they do not.
        lies = func.namespace == "c10d"
        for i, argument in enumerate(func._schema.arguments):
            if lies or (argument.alias_info is not None and argument.alias_info.is_write):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                self.written.update(map(_storage, _tensors(value)))
            self.random |= str(argument.type).startswith("Optional[Generator") and (
                kwargs.get(argument.name) is not None
            )
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs)


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
        self.ops: dict[Hashable, _OpEffects] = {}
        self.fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
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
            opaque = not _is_torch(node)
            return Effects(flat, frozenset(), False, False, opaque, self.modes.key, ())
        count = max(1, len(_tensors(_value(node))))
        every = (flat | {next(self.fresh)},) * count
        if not _is_torch(node):
            return Effects(flat, flat, True, False, True, self.modes.key, every)
        op = self._op(node)
        leaves = [leaf for arg in node.all_input_nodes for leaf in self.of[arg].values]
        if not op.known or (op.outputs and len(op.outputs) != count):
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
        value: Any = _value(node)
        if node.op == "get_attr":
            value = _attribute(self.gm, str(node.target))
        values = tuple(frozenset({self._token(t)}) for t in _tensors(value))
        if not values and value is None:  # a placeholder of which nothing is known
            values = (frozenset({next(self.fresh)}),)
        return Effects(frozenset(), frozenset(), False, True, False, self.modes.key, values)

    def _token(self, tensor: torch.Tensor) -> int:
        try:
            address: Hashable = _storage(tensor)
        except (RuntimeError, NotImplementedError):  # subclasses and layouts without a storage
            address = ("tensor", id(tensor))
        if address not in self.memory:
            self.memory[address] = next(self.fresh)
        return self.memory[address]

    def _op(self, node: Node) -> _OpEffects:
        if isinstance(node.target, HigherOrderOperator):
            return self._higher_order(node)
        try:
            seat = {arg: i for i, arg in enumerate(node.all_input_nodes)}
            key: Hashable = (node.op, node.target, _spec(node.args, seat), _spec(node.kwargs, seat))
            if key not in self.ops:
                self.ops[key] = self._observe(node)
            return self.ops[key]
        except Exception:  # whatever cannot run on fakes: data-dependent ops, wrapped values, ...
            return _unknown()

    def _observe(self, node: Node) -> _OpEffects:
        """Run the op on fresh fakes and see what it did."""
        recorder = _Recorder()
        with torch.no_grad(), self.fake_mode:
            fakes = {arg: tree_map(_fake, _value(arg)) for arg in node.all_input_nodes}
            leaves = [t for arg in fakes for t in _tensors(fakes[arg])]
            before = [_metadata(t) for t in leaves]
            args, kwargs = _substitute(node, fakes)
            with recorder:
                result = _call(node, args, kwargs)
            if [_metadata(t) for t in leaves] != before:  # t_(), set_(), requires_grad_()
                return _unknown()
        outputs = _tensors(result)
        if not outputs and not _is_scalar(result):
            return _unknown()  # register_hook, retain_grad, backward: there for their effect
        owners: dict[int, set[int]] = {}
        for i, leaf in enumerate(leaves):
            owners.setdefault(_storage(leaf), set()).add(i)
        fresh = {_storage(t): k for k, t in enumerate(outputs) if _storage(t) not in owners}
        return _OpEffects(
            frozenset(i for s in recorder.written for i in owners.get(s, ())),
            recorder.random,
            tuple(
                (frozenset(owners.get(_storage(t), ())), fresh.get(_storage(t))) for t in outputs
            ),
        )

    def _higher_order(self, node: Node) -> _OpEffects:
        """The effects of the bodies; which operand a body's input is, is not asked."""
        bodies = [m for m in (_body(self.gm, a) for a in node.all_input_nodes) if m is not None]
        name = getattr(node.target, "__name__", "")
        if name not in _RUNS_BODIES or not bodies or _value(node) is None:
            return _unknown()
        tables = [analyze(body) for body in bodies]
        effects = [e for table in tables for e in table.of.values()]
        if any(t.barriers or any(not e.known and e.writes for e in t.of.values()) for t in tables):
            return _unknown()
        leaves = sum(len(self.of[arg].values) for arg in node.all_input_nodes)
        every = frozenset(range(leaves))
        inputs = [e.storages for t in tables for n, e in t.of.items() if n.op == "placeholder"]
        writes = any(e.writes & s for e in effects for s in inputs)
        passes = any(t.escaping & s for t in tables for s in inputs)
        outputs = tuple(
            (every if passes or writes else frozenset(), k)
            for k in range(len(_tensors(_value(node))))
        )
        return _OpEffects(every if writes else frozenset(), any(e.random for e in effects), outputs)


def _unknown() -> _OpEffects:
    return _OpEffects(frozenset(), True, (), known=False)


def _escaping(graph: Graph, of: dict[Node, Effects]) -> frozenset[int]:
    outputs = [node for node in graph.nodes if node.op == "output"]
    return frozenset().union(*(of[node].reads for node in outputs))


def _is_torch(node: Node) -> bool:
    """Whether the target is torch's or Python's own: safe to run again on fakes."""
    target = node.target
    if node.op == "call_method":
        return hasattr(torch.Tensor, str(target))
    if node.op != "call_function":
        return False
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    if isinstance(target, HigherOrderOperator):
        return True
    module = getattr(target, "__module__", None)
    if module is None:  # torch.matrix_exp and its like: methods of a type of torch._C
        owner = getattr(target, "__self__", None)
        module = getattr(owner, "__module__", None) or getattr(owner, "__name__", None) or ""
    if module == "builtins":
        return target is getattr or isinstance(target, type)
    return (
        module.split(".")[0] in ("torch", "_operator", "operator", "math")
        and isinstance(
            target, (types.BuiltinFunctionType, types.FunctionType, types.BuiltinMethodType)
        )
        or _is_operator(target)
    )


def _is_operator(target: object) -> bool:
    return getattr(operator, getattr(target, "__name__", ""), None) is target


def _call(node: Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


def _value(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _attribute(gm: torch.nn.Module, target: str) -> Any:
    return operator.attrgetter(target)(gm)


def _body(gm: GraphModule, node: Node) -> GraphModule | None:
    if node.op != "get_attr":
        return None
    value = _attribute(gm, str(node.target))
    return value if isinstance(value, GraphModule) else None


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _is_scalar(value: Any) -> bool:
    leaves = tree_flatten(value)[0]
    plain = (bool, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool)
    described = (torch.dtype, torch.device, torch.layout, torch.memory_format)
    return bool(leaves) and all(isinstance(leaf, (*plain, *described)) for leaf in leaves)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _metadata(tensor: torch.Tensor) -> Hashable:
    shape = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    return (*shape, tensor.dtype, tensor.requires_grad, _storage(tensor))


def _hint(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        size = size.node.hint
        if size is None:
            raise NotImplementedError(size)
    return int(size)


def _describe(leaf: Any) -> Hashable:
    """What an op can know of an argument without reading data."""
    if not isinstance(leaf, torch.Tensor):
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return ("sym", str(leaf), leaf.node.hint)
        return literal_key(leaf)
    if leaf.layout is not torch.strided or is_wrapper_subclass(leaf):
        raise NotImplementedError(type(leaf))
    shape = tuple(map(_hint, leaf.shape)), tuple(map(_hint, leaf.stride()))
    return ("tensor", *shape, leaf.dtype, leaf.device, leaf.requires_grad)


def _spec(value: Any, seat: dict[Node, int]) -> Hashable:
    """Arguments as a key: nodes by the metadata of their values, literals by type and value.

    ``seat`` numbers the argument nodes: x.add_(x) is not x.add_(y).
    """
    if isinstance(value, Node):
        if _value(value) is None:
            raise NotImplementedError(f"no metadata for {value}")
        leaves, tree = tree_flatten(_value(value))
        return ("node", seat[value], str(tree), tuple(map(_describe, leaves)))
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_spec(v, seat) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((k, _spec(v, seat)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", *(_spec(v, seat) for v in (value.start, value.stop, value.step)))
    return literal_key(value)


def _fake(leaf: Any) -> Any:
    if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return leaf.node.hint
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape, stride = tuple(map(_hint, leaf.shape)), tuple(map(_hint, leaf.stride()))
    fake = torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device)
    return fake.requires_grad_(leaf.requires_grad)


def _substitute(node: Node, fakes: dict[Node, Any]) -> tuple[Any, Any]:
    def fake(arg: Node) -> Any:
        return fakes[arg]

    return torch.fx.map_arg(node.args, fake), torch.fx.map_arg(node.kwargs, fake)
