"""Several ways to run one program, compared: the same, or who is wrong.

Who is to blame is asked only when there is a difference.

- Plain ``torch.compile`` with the same inner backend: what it gets wrong at the same places, or
  cannot compile either, is torch's own.
- Eager without checkpoints: a checkpoint recomputes in backward from what was written since, so
  that gradients in eager are not those of the program. A result that is right is no mismatch.
- Our graph with nothing recomputed in backward, or by Inductor: ``aot_eager``'s partitioner
  recomputes from an input that the graph has overwritten. Inductor's is told what to save.
"""

from __future__ import annotations

import enum
import importlib.util
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fxparam
from tests.fuzz.program import Block, Program, Statement, in_scope, ingredients, render
from tests.fuzz.run import (
    Record,
    by_fxparam,
    by_torch,
    in_eager,
    load,
    saving_all,
    without_checkpoints,
    without_what_is_mended,
)

_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}


class Verdict(enum.Enum):
    SAME = "as eager"
    MISMATCH = "mismatch"
    TORCH = "torch's own mismatch"
    CHECKPOINT = "eager's own (recomputed from what was written since)"
    PARTITION = "aot_eager's own (recomputed from what was written since)"
    REFUSED = "refused by name: cached() around a body, or a model that is not traced"
    UNABLE = "skipped: torch cannot compile it either"
    INVALID = "skipped: raises in eager"


@dataclass
class Judgement:
    """The verdict, the differences from eager by label, and how many operations were shared."""

    verdict: Verdict
    differences: dict[str, str] = field(default_factory=dict)
    merged: int = 0


def judge(program: Program, *, inner: str = "") -> Judgement:
    """Run a program every way that is needed."""
    try:
        script = load(render(program))
    except SyntaxError:  # a shrinking step too far
        return Judgement(Verdict.INVALID)
    found = judge_script(script, inner=inner)
    different = found.verdict in (Verdict.TORCH, Verdict.MISMATCH)
    if different and program.scope:
        # Plain torch reads the values of a scope outside of its graphs, or compiles none.
        alone = judge(in_scope(program, ""), inner=inner)
        if alone.verdict not in (Verdict.SAME, Verdict.MISMATCH):
            return replace(found, verdict=alone.verdict)
    if (
        found.verdict is Verdict.TORCH
        and judge_script(script, inner="eager").verdict is Verdict.SAME
    ):
        return found  # AOTAutograd's: random numbers that it does not draw, say
    if different and "cached" in ingredients(program):
        # ``fxparam.cached`` is ours also when plain torch compiles it: torch's own is what goes
        # wrong without it. Plain torch leaves the graph there, and what follows may then compile;
        # or it compiles nothing at all, as where a graph breaks in a loop.
        whole = replace(program, statements=tuple(_in_one_graph(program.statements)))
        without = judge(whole, inner=inner).verdict
        unable = without is Verdict.UNABLE and "raises" in found.differences
        found.verdict = Verdict.TORCH if without is Verdict.TORCH or unable else Verdict.MISMATCH
    return found


def _in_one_graph(statements: tuple[Statement, ...]) -> Iterator[Statement]:
    for statement in statements:
        if not isinstance(statement, Block):
            if statement.kind != "graph break":
                yield statement
            continue
        body = tuple(_in_one_graph(statement.body))
        if statement.kind == "cached":
            yield from body
        else:
            yield replace(statement, body=body)


def judge_script(script: ModuleType, *, inner: str = "") -> Judgement:
    inner = inner or script.INNER
    expected = in_eager(script)
    if expected.error is not None:
        return Judgement(Verdict.INVALID, {"raises": repr(expected.error)})
    expected.autocast, expected.tolerance = script.AUTOCAST, script.TOLERANCE
    actual = by_fxparam(script, inner)
    found = differences(expected, actual)
    if not found:
        return Judgement(Verdict.SAME, merged=actual.merged)
    if _is_refused(script, actual.error):
        return Judgement(Verdict.REFUSED, found, actual.merged)
    if script.CAPTURE != "compile":
        return Judgement(Verdict.MISMATCH, found, actual.merged)
    with without_what_is_mended(script) as mended:
        plain = by_torch(script, inner)
    by_plain = differences(expected, plain)
    if plain.error is not None and actual.error is not None:
        alike = type(plain.error) is type(actual.error) or not _is_ours(actual.error)
        verdict = Verdict.UNABLE if alike else Verdict.MISMATCH
    elif found.keys() <= by_plain.keys():
        verdict = Verdict.TORCH
    elif plain.error is not None and all(_is_zero_for_none(expected, actual, k) for k in found):
        verdict = Verdict.TORCH  # as ``cond`` does for the branch that is not taken
    elif mended:
        verdict = Verdict.MISMATCH
    else:
        verdict = _excuse(script, inner, expected, actual)
    return Judgement(verdict, found, actual.merged)


def _is_refused(script: ModuleType, error: BaseException | None) -> bool:
    """Check whether the error says that this is not done, and what to do instead."""
    named = ["fxparam.cached() around", "fxparam.accumulate()"]
    if script.SCOPE == "step":
        named.append("leaf Variable that requires grad is being used in an in-place operation")
    if script.CAPTURE != "compile":
        named += ["cannot be traced symbolically", "Explanation: Dynamo does not support"]
    return any(words in str(error) for words in named)


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised below the backend; not, if by Dynamo before it called one."""
    folder = str(Path(fxparam.__file__).parent)
    frames = traceback.walk_tb(error.__traceback__)
    inside = any(frame.f_code.co_filename.startswith(folder) for frame, _ in frames)
    return inside or (error.__cause__ is not None and _is_ours(error.__cause__))


def _excuse(script: ModuleType, inner: str, expected: Record, actual: Record) -> Verdict:
    """A difference that plain torch does not show: one of the two known reasons, or a mismatch."""
    straight = without_checkpoints(script)
    straight.autocast, straight.tolerance = expected.autocast, expected.tolerance
    if not differences(straight, actual):
        return Verdict.CHECKPOINT
    if inner == "aot_eager" and actual.error is None:
        for saving in (saving_all(), "inductor"):  # the first recomputes checkpoints all the same
            saved = by_fxparam(script, saving)
            if not all(differences(right, saved) for right in (expected, straight)):
                return Verdict.PARTITION
    return Verdict.MISMATCH


def differences(expected: Record, actual: Record) -> dict[str, str]:
    """What differs, by label: what was expected and what was found."""
    if actual.error is not None:
        return {"raises": "".join(traceback.format_exception(actual.error)[-3:])}
    labels = expected.seen.keys() | actual.seen.keys()
    tolerance = _tolerance(expected)
    found = {}
    for label in sorted(labels):
        e, a = expected.seen.get(label), actual.seen.get(label)
        if not _same(e, a, tolerance):
            found[label] = f"expected {e}, found {a}"
    return found


def _is_zero_for_none(expected: Record, actual: Record, label: str) -> bool:
    """A gradient of zeros where eager has none."""
    found = actual.seen.get(label)
    nothing = expected.seen.get(label) is None and isinstance(found, Tensor)
    return "gradient of" in label and nothing and not found.any()


def _tolerance(record: Record) -> float:
    """The least precise dtype decides for all: values flow from one into another.

    Autocast computes in bfloat16 what it is given in float32, and says so nowhere. A program about
    the precision of gradients names a tolerance of its own.
    """
    if record.tolerance is not None:
        return record.tolerance
    dtypes = {value.dtype for value in record.seen.values() if isinstance(value, Tensor)}
    if record.autocast and torch.float32 in dtypes:
        dtypes.add(torch.bfloat16)
    return max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def _same(expected: Any, actual: Any, tolerance: float) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return type(expected) is type(actual) and bool(expected == actual)
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, actual)
    size = expected.abs().nan_to_num(0, posinf=0).amax().item() if expected.numel() else 0.0
    atol = tolerance * (1 + size)
    return torch.allclose(actual, expected, rtol=0, atol=atol, equal_nan=True)


def explain(path: str) -> None:
    """Judge a script and say what differs; for a script run by itself."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    judgement = judge_script(script)
    print(f"{judgement.verdict.value}; {judgement.merged} operations shared")
    for label, difference in judgement.differences.items():
        print(f"{label}: {difference}")
