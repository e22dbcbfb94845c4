"""Triton kernels of parametrized models, for an H100 that is pretended: how many, and right."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton.cases import CASES

ROOT = Path(__file__).parents[2]
#: What tests/triton/pretended_gpu.py leans on.
SUPPORTED = ("2.13", "3.7")
#: Cases of ``make test``; ``make triton`` runs the others too.
SLICE = {"orthogonal", "weight norm", "ternary", "scan"}
#: Cases in which Inductor calls more kernels and ops than are needed.
GAIN = {"orthogonal", "weight norm", "LoRA", "batch"}
#: Cases in which fxparam's lowered and batched forms call fewer than by hand.
BETTER_THAN_BY_HAND = {"orthogonal", "batch"}
#: Ops that one kernel must run together, some of them in an evaluation; the second, in backward,
#: with the sum of the reads' gradients.
FUSED: dict[str, list[set[str]]] = {
    "weight norm": [
        {"pow.Tensor_Scalar", "sum.dim_IntList", "div.Tensor", "mul.Tensor"},
        {"sum.dim_IntList", "neg.default", "div.Tensor", "mul.Tensor", "where.self", "add.Tensor"},
    ],
    "ternary": [
        {"maximum.default", "minimum.default", "div.Tensor", "round.default", "mul.Tensor"},
        {"add.Tensor", "where.self"},
    ],
    "softplus": [
        {"exp.default", "log1p.default", "where.self"},
        {"add.Tensor", "exp.default", "div.Tensor", "where.self"},
    ],
    "symmetric": [{"add.Tensor", "ge.Scalar", "where.self"}] * 2,
    "LoRA": [{"add.Tensor", "mul.Tensor"}],
    "scan": [{"pow.Tensor_Scalar", "sum.dim_IntList"}],
}


def _reason() -> str | None:
    try:
        found = (torch.__version__, importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return "needs triton: pip install 'fxparam[triton]'"
    if all(f.startswith(f"{s}.") for f, s in zip(found, SUPPORTED, strict=True)):
        return None
    return "needs torch {} and triton {}: found {} and {}".format(*SUPPORTED, *found)


pytestmark = pytest.mark.skipif(_reason() is not None, reason=_reason() or "")


def _python(module: str, *arguments: object, **environment: str) -> None:
    """Run a module of these tests in a process of its own."""
    own = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", **environment}
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.triton.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**kept, **own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _measured(folder: Path, *cases: str, **environment: str) -> dict[str, dict[str, Any]]:
    output = folder / "measured.json"
    _python("measure", output, *cases, TRITON_INTERPRET="1", **environment)
    found: dict[str, dict[str, Any]] = json.loads(output.read_text())
    return found


def _calls(seen: dict[str, Any]) -> int:
    return int(seen["launches"] + seen["extern_calls"])


def _wrong_numbers(seen: dict[str, Any]) -> bool:
    return not seen["error"] <= max(4 * seen["eager_error"], 1e-6)


def problems(case: str, seen: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is not as it should be in the code of a case."""
    inductor, shared, ours, by_hand = (
        seen[each] for each in ("Inductor", "shared", "fxparam", "by hand")
    )
    # Backward needs a copy of spectral norm's vector, which a training step in between overwrites:
    # as eager code, fxparam saves it. Inductor alone does not, and raises an error then.
    copies = int(case == "spectral norm")
    wrong = [f"{name}: numbers" for name, each in seen.items() if _wrong_numbers(each)]
    wrong += [
        f"{name}: {each['interpreted']} runs of kernels"
        for name, each in seen.items()
        if not each["interpreted"] >= each["configurations"] > 0
    ]
    for key in ("kernels", "launches"):
        if shared[key] != by_hand[key] + copies:
            wrong.append(f"{key}: {shared[key]}, by hand {by_hand[key]}")
    if shared["extern_calls"] != by_hand["extern_calls"]:
        wrong.append(f"calls of ops: {shared['extern_calls']}, by hand {by_hand['extern_calls']}")
    if not _calls(ours) <= _calls(by_hand) + copies - (case in BETTER_THAN_BY_HAND):
        wrong.append(f"{_calls(ours)} calls, by hand {_calls(by_hand)}")
    if not _calls(ours) <= _calls(inductor) + copies - (case in GAIN):
        wrong.append(f"{_calls(ours)} calls, Inductor {_calls(inductor)}")
    if case == "scan" and not _runs(ours) < _runs(inductor):
        wrong.append(f"{_runs(ours)} runs of kernels, Inductor {_runs(inductor)}")
    fused = [set(kernel["ops"]) for kernel in ours["fused"] if kernel["of_evaluations"]]
    for ops in FUSED.get(case, []):
        if not any(ops <= kernel for kernel in fused):
            wrong.append(f"not fused: {sorted(ops)}")
    return wrong


def _runs(seen: dict[str, Any]) -> float:
    """Return how many kernels run in a call, in loops too."""
    return float(seen["interpreted"] / seen["configurations"])


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_those_of_by_hand_and_right(case: str, tmp_path: Path) -> None:
    if case not in SLICE and not os.environ.get("FXPARAM_TRITON"):
        pytest.skip("one of make triton's")
    seen = _measured(tmp_path, case)[case]
    control = seen.pop("wrong", None)
    assert problems(case, seen) == []
    assert all("Triton" in each["languages"] for each in seen.values())
    if control is not None:  # a kernel that was made wrong is noticed
        assert _wrong_numbers(control)
    # Every configuration compiles for the GPU, and keeps its values in registers.
    sources, compiled = tmp_path / "sources.json", tmp_path / "compiled.json"
    kernels = {source: name for each in seen.values() for source, name in each["sources"].items()}
    sources.write_text(json.dumps(kernels))
    _python("cubin", sources, compiled)
    binaries = json.loads(compiled.read_text())
    assert len(binaries) == len(kernels) and all(binaries)
    assert {(target, spills) for each in binaries for target, spills in each} == {("sm_90a", False)}


def test_without_sharing_the_counts_are_wrong(tmp_path: Path) -> None:
    seen = _measured(tmp_path, "weight norm", FXPARAM_DISABLE="1")
    seen["weight norm"].pop("wrong")
    found = problems("weight norm", seen["weight norm"])
    assert {line.partition(":")[0] for line in found} >= {"kernels", "launches", "calls of ops"}
