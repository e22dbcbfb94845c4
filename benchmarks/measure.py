"""The instruments: a clock, and a record of what a compilation made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from benchmarks.programs import Program

__all__ = [
    "Compilation",
    "compilation",
    "graphs_captured",
    "timed_step",
]


def timed_step(program: Program) -> tuple[float, float | None]:
    """Seconds of one step, and of its forward if the step has one that ends."""
    program.reset()
    return (_timed_on_cuda if program.setting.device == "cuda" else _timed_on_cpu)(program)


def _timed_on_cpu(program: Program) -> tuple[float, float | None]:
    middle: list[float] = []
    start = time.perf_counter()
    program.step(lambda: middle.append(time.perf_counter()))
    end = time.perf_counter()
    return end - start, middle[0] - start if middle else None


def _timed_on_cuda(program: Program) -> tuple[float, float | None]:
    """By events on the stream: waiting in the middle would take the overlap of the halves away."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    halves: list[None] = []

    def forward_done() -> None:
        middle.record()
        halves.append(None)

    torch.cuda.synchronize()
    start.record()
    program.step(forward_done)
    end.record()
    end.synchronize()
    forward = start.elapsed_time(middle) / 1e3 if halves else None
    return start.elapsed_time(end) / 1e3, forward


@dataclass
class Compilation:
    """Attributes:
    graphs: that Inductor was given.
    nodes: in these graphs, the bodies of higher-order ops included.
    kernels: that it generated; calls of library functions are not among them.
    code: that it generated, a text for each graph.
    """

    graphs: int = 0
    nodes: int = 0
    kernels: int = 0
    code: list[str] = field(default_factory=list)


@contextlib.contextmanager
def compilation() -> Iterator[Compilation]:
    """Record what Inductor is given and makes, whichever backend calls it."""
    from torch._inductor import compile_fx as inductor
    from torch._inductor import metrics
    from torch._inductor.graph import GraphLowering

    seen, depth, original = Compilation(), 0, inductor.compile_fx

    def recording(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if depth == 0:  # it calls itself with its configuration applied
            seen.graphs += 1
            seen.nodes += _nodes(model)
        depth += 1
        try:
            return original(model, *args, **kwargs)
        finally:
            depth -= 1

    before = metrics.generated_kernel_count
    with (
        mock.patch.object(inductor, "compile_fx", recording),
        mock.patch.object(GraphLowering, "save_output_code", seen.code.append),
    ):
        yield seen
    seen.kernels = metrics.generated_kernel_count - before


def graphs_captured() -> int:
    """How many graphs Dynamo has given to any backend in this process."""
    return int(counters["stats"]["unique_graphs"])


def _nodes(model: Any) -> int:
    modules = [model, *model.modules()] if isinstance(model, torch.nn.Module) else []
    graphs = {id(m.graph): m.graph for m in modules if isinstance(m, torch.fx.GraphModule)}
    return sum(len(graph.nodes) for graph in graphs.values())
