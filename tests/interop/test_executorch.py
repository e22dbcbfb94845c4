"""ExecuTorch: a folded program is delegated as a whole. Run by `make interop`."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils.parametrizations import weight_norm

import fxparam

exir: Any = pytest.importorskip("executorch.exir")
runtime: Any = pytest.importorskip("executorch.runtime")
xnnpack: Any = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")

pytestmark = pytest.mark.filterwarnings("ignore::")


class PositionalConvolution(nn.Module):
    """The grouped, weight-normed convolution of wav2vec 2.0's encoder, smaller."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        conv = nn.Conv1d(64, 64, 16, padding=8, groups=4)
        self.conv = weight_norm(conv, dim=2) if normed else conv

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.conv(x)[:, :, :-1])


def _models() -> tuple[nn.Module, nn.Module, Tensor]:
    """A model with weight norm, its twin with plain weights, and an input."""
    torch.manual_seed(0)
    normed, plain = PositionalConvolution(normed=True), PositionalConvolution(normed=False)
    plain.load_state_dict(
        {"conv.weight": normed.conv.weight.detach(), "conv.bias": normed.conv.bias}
    )
    return normed.eval(), plain.eval(), torch.randn(1, 64, 50)


def _lowered(program: ExportedProgram) -> Any:
    return exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])


def _calls(lowered: Any) -> list[str]:
    graph = lowered.exported_program().graph
    return [getattr(n.target, "__name__", "") for n in graph.nodes if n.op == "call_function"]


def _loaded(lowered: Any) -> tuple[Any, Any]:
    """The method to call, and the program that must outlive it."""
    program = runtime.Runtime.get().load_program(lowered.to_executorch().buffer)
    return program.load_method("forward"), program


@torch.no_grad()
def test_the_whole_graph_is_delegated_and_runs() -> None:
    normed, plain, x = _models()
    folded = _lowered(fxparam.export(normed, (x,), fold=True))
    assert _calls(folded) == ["executorch_call_delegate", "getitem"]
    assert _calls(folded) == _calls(_lowered(torch.export.export(plain, (x,))))
    method, _program = _loaded(folded)
    (out,) = method.execute([x])
    torch.testing.assert_close(out, normed(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_folding_it_is_not() -> None:
    normed, _, x = _models()
    assert len(_calls(_lowered(torch.export.export(normed, (x,))))) > 2


@torch.no_grad()
def test_as_fast_as_plain_weights() -> None:
    normed, plain, x = _models()
    programs = (fxparam.export(normed, (x,), fold=True), torch.export.export(plain, (x,)))
    loaded = [_loaded(_lowered(program)) for program in programs]
    best = [float("inf")] * 2
    for _ in range(300):  # in turns, so that both see the same machine
        for i, (method, _program) in enumerate(loaded):
            start = time.perf_counter()
            method.execute([x])
            best[i] = min(best[i], time.perf_counter() - start)
    print(f"folded {best[0] * 1e3:.3f} ms, plain {best[1] * 1e3:.3f} ms")
    assert best[0] < 1.1 * best[1]
