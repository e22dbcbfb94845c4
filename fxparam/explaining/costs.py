"""Counts the floating-point operations and bytes of an evaluation, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from fxparam._torch.names import FakeTensorMode, TorchDispatchMode
from fxparam._torch.tensors import storage_of
from fxparam.graph.analysis.derived import is_parameter
from fxparam.graph.analysis.evaluations import Evaluation
from fxparam.graph.analysis.nodes import tensors_in, value_of

__all__ = ["Cost", "cost_of", "key_of"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes, computed from shapes.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and decompositions.
        bytes: bytes that operations read and write, each operation by itself.
    """

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


def cost_of(evaluation: Evaluation) -> tuple[Cost, Cost] | None:
    """Return what one evaluation costs, forward and backward, in the form it was captured in.

    It runs on fake tensors. The backward is that of one gradient of the value.

    Returns:
        None if it cannot be run by itself, as where a size depends on data.
    """
    try:
        gm, inputs = _alone(evaluation.nodes)
        return _run(gm, inputs)
    except Exception:  # ops of anybody, on tensors without data: an explanation goes on without
        return None


def key_of(evaluation: Evaluation) -> object:
    """Return what evaluations of the same cost have in common: ops, and shapes of their inputs."""
    return tuple(
        (str(node.target), *(_shape(value_of(each)) for each in (node, *node.all_input_nodes)))
        for node in evaluation.nodes
    )


def _shape(value: Any) -> object:
    return tuple((str(t.dtype), tuple(map(str, t.shape))) for t in tensors_in(value))


def _alone(nodes: Sequence[Node]) -> tuple[GraphModule, list[Any]]:
    """Return a graph with some nodes alone, and its inputs: metadata, or constants as they are."""
    inside, graph = set(nodes), Graph()
    inputs: dict[Node, Node] = {}

    def copied(node: Node) -> Node:
        if node in inside:
            return copies[node]
        if node not in inputs:
            with graph.inserting_before(first):
                inputs[node] = graph.placeholder(node.name)
        return inputs[node]

    first = graph.call_function(len, ((),))
    copies: dict[Node, Node] = {}
    for node in nodes:
        copies[node] = graph.node_copy(node, copied)
    results = [copies[n] for n in nodes if not n.users or {*n.users} - inside]
    graph.output(tuple(results))
    graph.erase_node(first)
    around = nodes[0].graph.owning_module
    return GraphModule({} if around is None else around, graph), [_input(node) for node in inputs]


def _input(node: Node) -> Any:
    value = value_of(node)
    if node.op == "get_attr" and value is None:
        return getattr(node.graph.owning_module, str(node.target))
    return (value, is_parameter(node)) if isinstance(value, Tensor) else value


def _run(gm: GraphModule, inputs: list[Any]) -> tuple[Cost, Cost]:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), counter, _Traffic() as t:
        given = [_fresh(*each) if isinstance(each, tuple) else each for each in inputs]
        t.bytes = 0  # of what made the inputs
        results = tensors_in(_AsCaptured(gm).run(*given))
        forward = Cost(counter.get_total_flops(), t.bytes)
        asked = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        results = [x for x in results if x.requires_grad]
        if asked and results:
            gradients = [torch.empty_like(x) for x in results]
            t.bytes = 0
            torch.autograd.grad(results, asked, gradients, allow_unused=True)
            return forward, Cost(counter.get_total_flops() - forward.flops, t.bytes)
    return forward, Cost()


class _AsCaptured(Interpreter):
    """Runs each node in the grad mode it was captured in, which other nodes have switched."""

    def run_node(self, node: Node) -> Any:
        tracked = any(x.requires_grad for x in tensors_in(value_of(node)))
        with torch.set_grad_enabled(tracked or node.op == "output"):
            return super().run_node(node)


def _fresh(like: Tensor, trained: bool) -> Tensor:
    """Return a fake tensor of known sizes for one that may have symbolic ones."""
    sizes, strides = ([int(n) for n in each] for each in (like.shape, like.stride()))
    made = torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)
    return made.requires_grad_(trained and made.is_floating_point())


class _Traffic(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes that operations read and write; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        read, written = tensors_in((args, kwargs)), tensors_in(result)
        known = {storage_of(x) for x in read}
        if any(storage_of(x) not in known for x in written):
            self.bytes += sum(x.numel() * x.element_size() for x in (*read, *written))
        return result


def _cubic(factor: float) -> Callable[..., int]:
    """Return the formula of an op on matrices: a number of operations for each of n * n * m."""

    def formula(shape: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
        *batch, n, m = shape
        return int(factor * math.prod(batch) * min(n, m) ** 2 * max(n, m))

    return formula


# PyTorch's counter knows products, convolutions and attention. The operations of decompositions are
# those of Golub and Van Loan, Matrix Computations, sections 3 to 8. Of an exponential they are the
# five products of a Taylor polynomial of degree 18; how many squarings there are depends on data.
_FORMULAS = {
    _aten.linalg_matrix_exp: _cubic(10),
    _aten.linalg_householder_product: _cubic(2),
    _aten.geqrf: _cubic(2),
    _aten.linalg_qr: _cubic(4),
    _aten.linalg_inv_ex: _cubic(2),
    _aten._linalg_solve_ex: _cubic(8 / 3),
    _aten.linalg_cholesky_ex: _cubic(1 / 3),
    _aten.linalg_lu_factor_ex: _cubic(2 / 3),
    _aten.linalg_solve_triangular: _cubic(1),
    _aten._linalg_svd: _cubic(14),
    _aten._linalg_eigh: _cubic(9),
    _aten.mv: lambda a, *_, **__: 2 * math.prod(a),
    _aten.dot: lambda a, *_, **__: 2 * math.prod(a),
    _aten.vdot: lambda a, *_, **__: 2 * math.prod(a),
}
