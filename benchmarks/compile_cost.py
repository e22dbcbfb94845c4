"""What the passes cost, within the compilation they are part of: it grows linearly.

    python -m benchmarks.compile_cost [--nodes N ...] [--limit SECONDS] [--output JSON]

Two kinds of captured graph: one weight evaluated again and again, and as many weights as there are
evaluations, which share nothing though all look alike. For each size a fresh process times a cold
``torch.compile`` with fxparam, and in it all that fxparam does to the graphs: before Inductor, and
in the two passes that Inductor calls. Instead of Inductor it is ``aot_eager`` from the size on at
which Inductor takes longer than the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import register_parametrization

import fxparam
from benchmarks.environment import environment, in_a_line
from benchmarks.files import write_json
from benchmarks.process import run_module
from benchmarks.table import print_table
from benchmarks.wake import wake_compiler

__all__ = ["KINDS", "main", "measure", "model_of"]

NODES = (1000, 2000, 5000, 10_000, 20_000)
_COLUMNS = ("graph", "nodes", "nodes left", "pass s", "us a node", "compile s", "by", "share")
_WIDTH = 8
_LAST = 10  # times the limit: there is nothing to turn to after ``aot_eager``
# What the backend runs on each graph, or hands to Inductor to run on each, as its file names it.
_PASSES = (
    "settle",
    "hoist",
    "mark_for_partitioner",
    "show_what_bodies_pass_on",
)


def _skew(x: Tensor) -> Tensor:
    a = torch.tril(x, -1)
    a = a - a.mT
    return a + 0.5 * (a @ a)


class _Skew(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _skew(x)


class _Repeated(nn.Module):
    """One parametrized weight, read at each of ``accesses`` steps."""

    per_access = 8

    def __init__(self, accesses: int) -> None:
        super().__init__()
        self.accesses = accesses
        self.layer = nn.Linear(_WIDTH, _WIDTH, bias=False)
        register_parametrization(self.layer, "weight", _Skew())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.accesses):
            x = torch.tanh(self.layer(x))
        return x


class _Distinct(nn.Module):
    """A weight for each of ``accesses`` steps, all computed alike: there is nothing to share.

    They are parts of one parameter: Dynamo takes minutes for the guards of thousands of modules.
    """

    per_access = 9

    def __init__(self, accesses: int) -> None:
        super().__init__()
        self.accesses = accesses
        self.originals = nn.Parameter(torch.randn(accesses, _WIDTH, _WIDTH) * _WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.accesses):
            x = torch.tanh(nn.functional.linear(x, _skew(self.originals[i])))
        return x


KINDS: dict[str, type[_Repeated] | type[_Distinct]] = {
    "repeated": _Repeated,
    "distinct": _Distinct,
}


def model_of(kind: str, nodes: int) -> nn.Module:
    """A model whose captured graph has about so many nodes."""
    build = KINDS[kind]
    return build(max(1, nodes // build.per_access))


@contextlib.contextmanager
def _passes_timed() -> Iterator[dict[str, float]]:
    """Adds up, under "pass", the seconds that fxparam's passes take, and under "nodes" and "left"
    the nodes of the graphs before and after the one that shares."""
    module = fxparam.compiling.backend
    seen = {"nodes": 0, "left": 0, "pass": 0.0}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seen["pass"] += time.perf_counter() - start
            return result

        return run

    def counted(hoist: Callable[..., Any]) -> Callable[..., Any]:
        def run(gm: GraphModule, **kwargs: Any) -> Any:
            seen["nodes"] += len(gm.graph.nodes)
            result = hoist(gm, **kwargs)
            seen["left"] += len(result.graph_module.graph.nodes)
            return result

        return run

    wrapped: dict[str, Any] = {name: timed(getattr(module, name)) for name in _PASSES}
    wrapped["hoist"] = counted(wrapped["hoist"])
    with mock.patch.multiple(module, **wrapped):
        yield seen


def measure(kind: str, nodes: int, inner: str) -> dict[str, Any]:
    """A cold compilation of a training step with ``inner``, and the passes' part of it."""
    wake_compiler(fxparam.backend(inner), "cpu")
    with _passes_timed() as seen:
        compiled = torch.compile(model_of(kind, nodes), backend=fxparam.backend(inner))
        start = time.perf_counter()
        compiled(torch.randn(4, _WIDTH)).sum().backward()
        total = time.perf_counter() - start
    return {"kind": kind, **seen, "compile": total, "inner": inner}


def slope(rows: list[dict[str, Any]]) -> float | None:
    """The power of the number of nodes with which the pass's time grows: 1 is linear."""
    points = [(math.log(row["nodes"]), math.log(row["pass"])) for row in rows]
    if len(points) < 2:
        return None
    fitted = statistics.linear_regression(*zip(*points, strict=True))
    return fitted.slope


def _rows(sizes: list[int], limit: float) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        inner = "inductor"
        for nodes in sizes:
            found = _in_process(kind, nodes, inner, limit)
            # Not tried again for larger graphs.
            if inner == "inductor" and ("error" in found or found["compile"] > limit):
                inner = "aot_eager"
                found = _in_process(kind, nodes, inner, limit)
            rows.append({"kind": kind, "asked": nodes, **found})
    return rows


def _in_process(kind: str, nodes: int, inner: str, limit: float) -> dict[str, Any]:
    print(f"{kind}, {nodes} nodes, {inner}", file=sys.stderr, flush=True)
    job = {"kind": kind, "nodes": nodes, "inner": inner}
    allowed = limit if inner == "inductor" else _LAST * limit
    # Importing torch comes before.
    return run_module("benchmarks.compile_cost", job, allowed + 60, cold=True)


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["kind"], f"{row['asked']} nodes: {row['error']}"]
    return [
        row["kind"],
        f"{row['nodes']}",
        f"{row['left']}",
        f"{row['pass']:.2f}",
        f"{1e6 * row['pass'] / row['nodes']:.0f}",
        f"{row['compile']:.1f}",
        row["inner"],
        f"{row['pass'] / row['compile']:.1%}",
    ]


def _draw(rows: list[dict[str, Any]], title: str, stem: Path) -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for i, kind in enumerate(KINDS):
        mine = [row for row in rows if row["kind"] == kind]
        if not mine:
            continue
        nodes = [row["nodes"] for row in mine]
        power = slope(mine)
        grows = "" if power is None else f", grows as nodes^{power:.2f}"
        axes.plot(nodes, [r["pass"] for r in mine], f"C{i}o-", label=f"{kind}: the pass{grows}")
        for inner, mark in (("inductor", "s--"), ("aot_eager", "x:")):
            part = [(r["nodes"], r["compile"]) for r in mine if r["inner"] == inner]
            if part:
                label = f"{kind}: compile, {inner}"
                axes.plot(*zip(*part, strict=True), f"C{i}{mark}", label=label, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="nodes of the captured graph", ylabel="seconds")
    axes.set_title(title, fontsize=7)
    axes.legend(fontsize=7)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_cost")
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    parser.add_argument("--limit", type=float, default=120, help="seconds of one Inductor compile")
    parser.add_argument("--output", type=Path, default=Path("fxparam-compile-cost.json"))
    return parser


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    output: Path = options.output
    if output.is_dir() or not output.resolve().parent.is_dir():
        print(f"--output {output}: not a file in a folder that exists", file=sys.stderr)
        return 2
    if not 0 < options.limit < math.inf:
        print(f"--limit {options.limit}: a number of seconds, more than 0", file=sys.stderr)
        return 2
    if min(options.nodes) < 1:
        print(f"--nodes {min(options.nodes)}: at least 1", file=sys.stderr)
        return 2
    rows = _rows(sorted(options.nodes), options.limit)
    right = [row for row in rows if "error" not in row]
    print_table("the pass beside the whole compilation", _COLUMNS, [*map(_cells, rows)], None)
    for kind in KINDS:
        power = slope([row for row in right if row["kind"] == kind])
        if power is not None:
            print(f"{kind}: the pass grows as nodes^{power:.2f}")
    where = environment("cpu")
    command = " ".join(["python -m benchmarks.compile_cost", *arguments])
    results = {"command": command, "environment": where, "rows": rows}
    write_json(output, results, indent=1)
    for path in _draw(right, in_a_line(where), output.with_suffix("")):
        print(f"plot: {path}")
    return 0


def _child(job: Path, target: Path) -> int:
    warnings.simplefilter("ignore")
    given = json.loads(job.read_text())
    write_json(target, measure(given["kind"], given["nodes"], given["inner"]))
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    # In a fresh process of its own, it is given a job and where the result goes.
    if len(given) == 2 and Path(given[0]).is_file():
        sys.exit(_child(Path(given[0]), Path(given[1])))
    sys.exit(main(given))
