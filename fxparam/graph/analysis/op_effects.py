"""What one op does to its arguments, seen by running it on fresh fake tensors.

The dispatch mode below reads the schema of every ATen op that the run reaches: what it writes, and
whether it draws random numbers. Aliasing is what the run shows: which output lives in which
argument's storage. Data is never touched.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fxparam._torch.fx import is_named_in_place, op_name
from fxparam._torch.names import (
    FakeTensorMode,
    ShapeEnv,
    TorchDispatchMode,
    qualified_name,
    schema_of,
    tree_flatten,
    tree_map,
)
from fxparam._torch.tensors import geometry, is_wrapper_subclass, storage_of
from fxparam.graph.analysis.nodes import tensors_in, value_of
from fxparam.graph.analysis.numbering import literal_key

__all__ = [
    "POINT_TO_POINT",
    "RETURNS_ITS_ARGUMENT",
    "UNKNOWN",
    "OpEffects",
    "Ops",
    "call",
]


@dataclass(frozen=True, slots=True)
class OpEffects:
    """Effects of an op, in terms of its argument leaves: what is remembered between nodes."""

    writes: frozenset[int]
    random: bool
    # per tensor of the value: argument leaves it aliases, and the fresh storage it lives in
    outputs: tuple[tuple[frozenset[int], int | None], ...] = ()
    known: bool = True
    raises: bool = False  # depending on the data
    moves_memory: bool = False  # an argument shows another one's memory afterwards


class _Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Collects the storages written and whether anything random ran."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[object] = set()
        self.random = False
        self.raises = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(schema_of(func).arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if declared or _writes_undeclared(func, argument.name, args, kwargs):
                self.written.update(map(_storage, tensors_in(value)))
            self.random |= str(argument.type).startswith("Optional[Generator") and (
                kwargs.get(argument.name) is not None
            )
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        self.raises |= _may_raise(func, args, kwargs)
        result = func(*args, **kwargs)
        return args[0] if qualified_name(func) in RETURNS_ITS_ARGUMENT else result


#: Ops that return the memory of their first argument, where neither the schema nor a run on fakes
#: says so.
RETURNS_ITS_ARGUMENT = {f"_c10d_functional::{n}" for n in ("wait_tensor", "wait_tensors", "irecv")}
#: Messages between two ranks: to receive writes a tensor, and to send happens as often as written.
POINT_TO_POINT = {f"_c10d_functional::{n}" for n in ("isend", "irecv", "batch_p2p_ops")}

#: What cannot be seen is taken to do the worst.
UNKNOWN = OpEffects(frozenset(), True, known=False, raises=True)

# They return a view or a copy, as the strides of their first argument are. Fake tensors may have
# other strides than the tensors they stand for: batch norm of a transposed matrix on the CPU.
_COPIES_BY_STRIDES = {"contiguous", "flatten", "ravel", "reshape", "reshape_as"}

# Linear algebra that is defined for every matrix; the rest may find one singular, indefinite or
# without convergence.
_TOTAL = {
    "linalg_cross",
    "linalg_diagonal",
    "linalg_householder_product",
    "linalg_matrix_exp",
    "linalg_matrix_norm",
    "linalg_matrix_power",
    "linalg_norm",
    "linalg_qr",
    "linalg_vecdot",
    "linalg_vector_norm",
}
_PARTIAL = ("linalg_", "_linalg_", "cholesky", "inverse", "lu_", "_lu_", "lstsq", "svd", "eig")


class Ops:
    """Answers for ops, each observed once per target and argument metadata."""

    def __init__(self) -> None:
        self._fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._seen: dict[Hashable, OpEffects] = {}

    def effects(self, node: Node) -> OpEffects:
        """Return the effects of a node's op; ``UNKNOWN`` if it cannot run on fakes."""
        try:
            picked = _picked(node)
            if picked is not None:
                return picked
            seat = {arg: i for i, arg in enumerate(node.all_input_nodes)}
            key: Hashable = (node.op, node.target, _spec(node.args, seat), _spec(node.kwargs, seat))
            if key not in self._seen:
                self._seen[key] = _observe(node, self._fake_mode)
            return self._seen[key]
        except Exception:  # data-dependent ops, wrapped values, whatever else fakes cannot do
            return UNKNOWN


def _picked(node: Node) -> OpEffects | None:
    """Return the effects of taking one of several results, without a run on fakes of them all.

    A loop over the rows of ``x.unbind()`` takes as many as there are.
    """
    if node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return None
    several, place = value_of(node.args[0]), node.args[1]
    if not isinstance(several, (tuple, list)) or not isinstance(place, int):
        return None
    place = range(len(several))[place]
    count, before = len(tensors_in(several[place])), len(tensors_in(several[:place]))
    if not count:
        return None
    aliases = tuple((frozenset({before + i}), None) for i in range(count))
    return OpEffects(frozenset(), False, aliases)


def _may_raise(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Check whether data decide if an op raises: factorizations, indices, integer division."""
    name = qualified_name(func).partition("::")[2]
    if name.startswith("_assert") or name in ("_linalg_check_errors", "is_nonzero"):
        return True
    if name.startswith(_PARTIAL) and name not in _TOTAL:
        return True
    tensors = tensors_in((args, kwargs))
    whole = [not (t.dtype.is_floating_point or t.dtype.is_complex) for t in tensors]
    if name.startswith(("div", "floor_div", "remainder", "fmod")):
        return all(whole)
    return any(whole) and name.startswith(
        ("index", "gather", "scatter", "embedding", "take", "put")
    )


def _writes_undeclared(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Where schemas lie: they name no write, and the kernel writes.

    c10d.allreduce_ and its kin write their tensors, and so do messages. The batch norms update
    their running statistics, unless an argument says that they do not train.
    """
    if func.namespace == "c10d" or qualified_name(func) in POINT_TO_POINT:
        return True
    if not name.startswith("running_"):
        return False
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.name in ("training", "train", "use_input_stats"):
            return bool(args[i] if i < len(args) else kwargs.get(argument.name, True))
    return True


def _observe(node: Node, fake_mode: Any) -> OpEffects:
    """Run the op on fresh fakes and see what it did."""
    recorder = _Recorder()
    with torch.no_grad(), fake_mode:
        fakes = {arg: tree_map(_fake, value_of(arg)) for arg in node.all_input_nodes}
        leaves = [t for arg in fakes for t in tensors_in(fakes[arg])]
        before = [_metadata(t) for t in leaves]
        args, kwargs = _substitute(node, fakes)
        with recorder:
            result = call(node, args, kwargs)
        after = [_metadata(t) for t in leaves]
        if after != before:  # t_(), set_(), requires_grad_()
            moves = [b[-1] for b in before] != [a[-1] for a in after]
            return replace(UNKNOWN, moves_memory=moves)
    outputs = tensors_in(result)
    if not outputs and not _is_scalar(result):
        return UNKNOWN  # register_hook, retain_grad, backward: there for their effect
    if is_named_in_place(op_name(node)) and not recorder.written:
        return UNKNOWN  # requires_grad_: what it changed was already so in the example value
    owners: dict[object, set[int]] = {}
    for i, leaf in enumerate(leaves):
        owners.setdefault(_storage(leaf), set()).add(i)
    fresh = {_storage(t): k for k, t in enumerate(outputs) if _storage(t) not in owners}
    if op_name(node) in _COPIES_BY_STRIDES and leaves:
        owners.update({storage: {0} for storage in fresh})
    return OpEffects(
        frozenset(i for s in recorder.written for i in owners.get(s, ())),
        recorder.random,
        tuple((frozenset(owners.get(_storage(t), ())), fresh.get(_storage(t))) for t in outputs),
        raises=recorder.raises,
    )


def call(node: Node, args: Any, kwargs: Any) -> Any:
    """Do what a node does, with other arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


def _is_scalar(value: Any) -> bool:
    leaves = tree_flatten(value)[0]
    plain = (bool, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool)
    described = (torch.dtype, torch.device, torch.layout, torch.memory_format)
    return bool(leaves) and all(isinstance(leaf, (*plain, *described)) for leaf in leaves)


def _storage(tensor: torch.Tensor) -> object:
    """Return a tensor's storage; raise for one that has none, whose op is not understood then."""
    storage = storage_of(tensor)
    if storage is None:
        raise NotImplementedError("a tensor without a storage")
    return storage


def _metadata(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return (*geometry(tensor), tensor.requires_grad, _storage(tensor))


def _hint(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        size = size.node.hint
        if size is None:
            raise NotImplementedError(size)
    return int(size)


def _describe(leaf: Any) -> Hashable:
    """Return a key for all that an op can know of an argument without reading data."""
    if not isinstance(leaf, torch.Tensor):
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return ("sym", str(leaf), leaf.node.hint)
        return literal_key(leaf)
    if leaf.layout is not torch.strided:
        raise NotImplementedError(type(leaf))
    shape = tuple(map(_hint, leaf.shape)), tuple(map(_hint, leaf.stride()))
    own = (*shape, leaf.dtype, leaf.device, leaf.requires_grad)
    if not is_wrapper_subclass(leaf):
        return ("tensor", *own)
    if not type(leaf).__module__.startswith("torch."):
        # What its own code does to the tensor that it holds, no schema tells.
        raise NotImplementedError(type(leaf))
    names, described = leaf.__tensor_flatten__()  # type: ignore[attr-defined]
    held = tuple((name, _describe(getattr(leaf, name))) for name in names)
    return (type(leaf), *own, held, literal_key(described))


def _spec(value: Any, seat: dict[Node, int]) -> Hashable:
    """Arguments as a key: nodes by the metadata of their values, literals by type and value.

    ``seat`` numbers the argument nodes: x.add_(x) is not x.add_(y).
    """
    if isinstance(value, Node):
        if value_of(value) is None:
            raise NotImplementedError(f"no metadata for {value}")
        leaves, tree = tree_flatten(value_of(value))
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
    if is_wrapper_subclass(leaf):
        names, described = leaf.__tensor_flatten__()  # type: ignore[attr-defined]
        held = {name: _fake(getattr(leaf, name)) for name in names}
        return type(leaf).__tensor_unflatten__(held, described, shape, stride)  # type: ignore[attr-defined]
    fake = torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device)
    return fake.requires_grad_(leaf.requires_grad)


def _substitute(node: Node, fakes: dict[Node, Any]) -> tuple[Any, Any]:
    def fake(arg: Node) -> Any:
        return fakes[arg]

    return torch.fx.map_arg(node.args, fake), torch.fx.map_arg(node.kwargs, fake)
