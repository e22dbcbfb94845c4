"""A function run on a batch, as a graph of plain ops: ``torch.func.vmap``'s rules, spelled out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxparam._torch.names import OpOverload, lookup

__all__ = ["CannotBatch", "differentiates", "fake_mode_of", "trace_batched"]

_make_fx: Any = lookup("torch.fx.experimental.proxy_tensor", "make_fx")
_has_fallback = lookup("torch._C._functorch", "_is_vmap_fallback_enabled")
_allow_fallback = lookup("torch._C._functorch", "_set_vmap_fallback_enabled")
_without_compiled_autograd = lookup("torch._dynamo.compiled_autograd", "_disable")
_FakeTensor: Any = lookup("torch._subclasses.fake_tensor", "FakeTensor")


class CannotBatch(Exception):
    """A function cannot be run on a batch as plain ops; the text says why."""


def fake_mode_of(tensor: object) -> Any:
    """Return the mode that a fake tensor belongs to; None for another tensor."""
    return tensor.fake_mode if isinstance(tensor, _FakeTensor) else None


def trace_batched(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Sequence[Tensor]]
) -> GraphModule:
    """Trace a function run for many sets of inputs at once.

    Args:
        function: of tensors, to a list of tensors.
        inputs: for each argument the fake tensors it is given, one for each run; a single one for
            an argument that all runs are given. Some argument differs between the runs.

    Returns:
        A graph of ATen ops that takes all the inputs, in their order. It returns the results of the
        first run, then those of the second, and so on, as views of one tensor for each result. Each
        node has an example value in ``meta["val"]``.

    Raises:
        CannotBatch: an op has no batching rule, or the batch is not made of plain ops alone.
    """
    lengths = [len(given) for given in inputs]
    seats = [0 if length > 1 else None for length in lengths]

    def run(*flat: Tensor) -> list[Tensor]:
        given, values = iter(flat), []
        for length in lengths:
            parts = [next(given) for _ in range(length)]
            values.append(torch.stack(parts) if length > 1 else parts[0])
        results = torch.func.vmap(function, in_dims=tuple(seats))(*values)
        return [each for run in zip(*map(torch.unbind, results), strict=True) for each in run]

    try:
        with _without_fallback():
            gm: GraphModule = _make_fx(run)(*(tensor for given in inputs for tensor in given))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise CannotBatch(_first_line(error)) from error
    _drop_unused(gm)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            raise CannotBatch("a constant is made in the evaluation")
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            raise CannotBatch(f"the batching rule writes in place, by {node.target}")
    return gm


def differentiates(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Check that autograd goes from some results, computed on fake tensors, to what they need."""
    ends = [each for each in results if each.requires_grad]
    starts = [each for each in inputs if each.requires_grad]
    if not ends or not starts:
        return True
    try:
        with _without_compiled_autograd():
            ones = [torch.ones_like(each) for each in ends]
            torch.autograd.grad(ends, starts, ones, allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@contextmanager
def _without_fallback() -> Iterator[None]:
    """Make an op without a batching rule an error, where ``vmap`` would run it in a loop."""
    before = _has_fallback()
    _allow_fallback(False)
    try:
        yield
    finally:
        _allow_fallback(before)


def _first_line(error: Exception) -> str:
    """Return why ``vmap`` refused: an op that it would run in a loop is one without a rule."""
    text = (str(error).splitlines() or [""])[0]
    name, fallback, _ = text.partition(" hit the vmap fallback")
    return f"{name} has no batching rule" if fallback else text


def _drop_unused(gm: GraphModule) -> None:
    """Erase what nothing reads, such as copies that autograd saved; checks return nothing."""
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function" and not node.users and _has_value(node):
            gm.graph.erase_node(node)


def _has_value(node: Node) -> bool:
    return node.meta.get("val") is not None
