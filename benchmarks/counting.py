"""Evaluations counted as they run, forward and backward; never in a timed program.

What is counted is a program of its own: the contestant's with a counting op at the end of each
chain of parametrizations. The op is opaque, so a compiler that would have merged the chain into
what uses it cannot; it may share the op, or fold it into a constant, as it may the chain.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.nn.utils import parametrize

__all__ = ["COUNTS", "count_evaluations", "partitioned"]

COUNTS = {"forward": 0, "backward": 0}


@torch.library.custom_op("fxparam_bench::count", mutates_args=())
def _count(x: Tensor) -> Tensor:
    """The identity; declared pure, so that a compiler may share it like the rest of the chain."""
    COUNTS["forward"] += 1
    return x.clone()


@torch.library.custom_op("fxparam_bench::count_backward", mutates_args=())
def _count_backward(grad: Tensor) -> Tensor:
    COUNTS["backward"] += 1
    return grad.clone()


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    counted: Tensor = _count_backward(grad)
    return counted


_count.register_fake(torch.empty_like)
_count_backward.register_fake(torch.empty_like)
_count.register_autograd(_backward)


class _Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        counted: Tensor = _count(x)
        return counted


def count_evaluations(model: nn.Module) -> None:
    """Let every parametrization of a model count its evaluations in ``COUNTS``."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                # Unsafe: the check would evaluate, which may have effects.
                parametrize.register_parametrization(module, name, _Counting(), unsafe=True)


def partitioned(gm: GraphModule, inputs: list[Any]) -> Any:
    """Compile without code generation, with the decompositions and the partitioner of Inductor."""

    def run(gm: GraphModule, _: list[Any]) -> Any:
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.prims.iota.default):
            node.update_kwarg("dtype", torch.int64)  # of a mask; eager code has none of uint16
        gm.recompile()
        return make_boxed_func(gm)

    return aot_autograd(
        fw_compiler=run,
        decompositions=select_decomp_table,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )(gm, inputs)
