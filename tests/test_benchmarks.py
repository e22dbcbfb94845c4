"""The benchmark suite: its cases are what they say, and its check of results can fail."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.__main__ as command
from benchmarks import compile_cost, runner
from benchmarks.cases import CASES, Case
from benchmarks.cases.case import training_step
from benchmarks.check import Outcome, Wrong, check, outcome_of
from benchmarks.contestants import BY_HAND, CONTESTANTS, contestants_for
from benchmarks.counting import COUNTS
from benchmarks.errors import first_line
from benchmarks.measure import compilation, peak_memory, timed_step
from benchmarks.process import run_job, run_module
from benchmarks.programs import Program, Setting, program, reference
from benchmarks.runner import Plan
from benchmarks.statistic import ratios, spread
from benchmarks.timing import interleaved

HERE = Setting()
EAGER_BY_HAND = dataclasses.replace(CONTESTANTS[BY_HAND], compiler=None)
RNN = CASES["orthogonal-rnn"]


def _expected(case: Case, *, sharing: bool = False) -> Outcome:
    return outcome_of(reference(case, case.tiny, HERE, sharing=sharing))


@pytest.mark.parametrize("name", CASES)
def test_the_source_hoisted_by_hand_equals_the_one_as_written(name: str) -> None:
    case = CASES[name]
    expected = _expected(case, sharing=True)
    assert all(t.isfinite().all() for t in expected.outputs)
    assert bool(expected.gradients) == case.train
    check(outcome_of(program(case, EAGER_BY_HAND, case.tiny, HERE)), expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.train])
def test_by_hand_evaluates_each_weight_once_and_eager_at_each_access(name: str) -> None:
    case = CASES[name]
    counts = []
    for contestant in (CONTESTANTS["eager"], EAGER_BY_HAND):
        counting = program(case, contestant, case.tiny, HERE, counting=True)
        COUNTS.update(forward=0, backward=0)
        counting.step()
        counts.append((COUNTS["forward"], COUNTS["backward"]))
    eager, by_hand = counts
    assert by_hand[0] == by_hand[1] > 0
    if CASES[name].written is CASES[name].by_hand:  # a control
        assert eager == by_hand
    else:
        assert eager[0] > by_hand[0] and eager[1] > by_hand[1]


def test_plain_weights_have_the_outputs_of_the_parametrized_ones() -> None:
    plain = dataclasses.replace(CONTESTANTS["plain"], compiler=None)
    for name in ("orthogonal-rnn", "gan-critic", "albert-lora"):
        case = CASES[name]
        outcome = outcome_of(program(case, plain, case.tiny, HERE))
        assert outcome.gradients is None
        check(outcome, _expected(case, sharing=True))


def test_sharing_an_evaluation_with_effects_is_checked_as_another_program() -> None:
    case = CASES["spectral-rnn"]
    actual = outcome_of(program(case, EAGER_BY_HAND, case.tiny, HERE))
    with pytest.raises(Wrong):
        check(actual, _expected(case, sharing=False))


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 1.02 * grad


def _right() -> Program:
    return program(RNN, CONTESTANTS["eager"], RNN.tiny, HERE)


def _wrong_gradient() -> Program:
    made = _right()
    cell = made.model.cell
    class_ = type(cell)
    cell.__class__ = type(
        "Wrong",
        (class_,),
        {"weight": property(lambda self: _Scaled.apply(class_.weight.fget(self)))},
    )
    return made


def _changed(body: Callable[..., Any]) -> Program:
    return dataclasses.replace(_right(), body=body)


def _wrong_output(model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
    return 1.01 * training_step(model, run, inputs, done)


def _no_gradients(model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
    with torch.no_grad():
        return run(*inputs)


def _nan(model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
    return training_step(model, run, inputs, done) * float("nan")


def _raises(model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
    raise ArithmeticError("first\nsecond")


def test_a_contestant_that_is_wrong_is_refused_and_the_others_are_timed() -> None:
    makers = {
        "right": _right,
        "wrong gradient": _wrong_gradient,
        "wrong output": partial(_changed, _wrong_output),
        "no gradients": partial(_changed, _no_gradients),
        "nan": partial(_changed, _nan),
        "raises": partial(_changed, _raises),
    }
    expected = _expected(RNN)
    results = interleaved(makers, lambda name: expected, 3)
    assert len(results["right"]["steps"]) == len(results["right"]["forwards"]) == 3
    assert 0 < results["right"]["forwards"][0] < results["right"]["steps"][0]
    says = {
        "wrong gradient": "Wrong: gradient of cell.parametrizations.weight.original is not eager's",
        "wrong output": "Wrong: output 0 is not eager's",
        "no gradients": "Wrong: gradients of",
        "nan": "Wrong: output 0",
        "raises": "ArithmeticError: first",
    }
    for name, line in says.items():
        assert list(results[name]) == ["error"]
        assert results[name]["error"].startswith(line)


def test_turns_change_their_order_and_each_step_follows_one_of_its_own() -> None:
    ran: list[str] = []

    def named(name: str, model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
        ran.append(name)
        return training_step(model, run, inputs, done)

    makers = {name: partial(_changed, partial(named, name)) for name in "abc"}
    expected = _expected(RNN)
    interleaved(makers, lambda name: expected, 8)
    turns = ["".join(ran[i : i + 6]) for i in range(len(ran) - 48, len(ran), 6)]
    assert len(set(turns)) > 1
    for turn in turns:
        assert sorted(turn[::2]) == ["a", "b", "c"] and turn[::2] == turn[1::2]


def test_buffers_are_checked() -> None:
    case = CASES["spectral-rnn"]
    expected = _expected(case)
    actual = _expected(case)
    assert actual.buffers
    next(iter(actual.buffers.values())).mul_(1.1)
    with pytest.raises(Wrong, match="buffer of"):
        check(actual, expected)


def test_contestants_apply_where_they_mean_something() -> None:
    for case in CASES.values():
        names = [c.name for c in contestants_for(case, list(CONTESTANTS))]
        assert ("inductor-freezing" in names) == (not case.train)
        assert ("fxparam-scope" in names) == (case.scope is not None)
        assert BY_HAND in names and "plain" in names


def test_sizes_grow_along_the_knob_of_a_case() -> None:
    for case in CASES.values():
        knobs = {case.knob(size) for size in case.sizes()} - {case.knob(case.size)}
        assert knobs in ({8, 128}, {8, 32, 128}, {4, 64})
        assert case.size in case.sizes() and case.small() == case.sizes()[0]


def test_spread_and_ratios_within_a_round() -> None:
    assert spread([]) is None
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert spread([1.0, 2.0, 3.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
    # One slow round is slow for both.
    found = ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert found is not None and found["median"] == found["high"] == 2.0
    assert ratios([1.0], []) is None


def test_a_wrapped_error_is_shown_by_its_cause() -> None:
    wrapper = RuntimeError("backend='inductor' raised:\nValueError: inside")
    assert first_line(wrapper) == "RuntimeError: ValueError: inside"
    wrapper.inner_exception = ValueError("\ninside\nand more")  # type: ignore[attr-defined]
    assert first_line(wrapper) == "ValueError: inside"
    assert len(first_line(ValueError("x" * 1000))) == 120


def test_instruments_measure_something() -> None:
    made = _right()
    step, forward = timed_step(made)
    assert forward is not None and 0 < forward < step
    peak = peak_memory(made)
    assert peak is None or peak >= 0
    with compilation() as seen:
        pass
    assert (seen.nodes, seen.kernels, seen.code) == (0, 0, [])


def test_a_process_that_fails_is_an_error_in_one_line() -> None:
    assert "No module named" in run_module("no_such_module", {}, 60, cold=True)["error"]
    assert run_module("benchmarks.worker", {}, 0.01, cold=True) == {"error": "no result after 0 s"}


def test_a_probe_in_a_fresh_process() -> None:
    case = CASES["ode"]
    job = {
        "kind": "probe",
        "case": case.name,
        "contestants": ["eager"],
        "size": dataclasses.asdict(case.tiny),
        "setting": dataclasses.asdict(HERE),
    }
    result = run_job(job, 120)
    assert result["evaluations"] == [4, 4]
    assert "compile" not in result and "nodes" not in result


def _fake_job(job: dict[str, Any], limit: float) -> dict[str, Any]:
    names = job["contestants"]
    if job["kind"] == "time":
        seconds = {"by-hand": 1.0, "fxparam": 1.25}
        return {n: {"steps": [seconds[n]] * 2, "forwards": [seconds[n] / 2] * 2} for n in names}
    if names == ["inductor"]:
        return {"error": "Unsupported: [a line]"}
    return {"compile": 3.0, "peak": 1000, "nodes": 7, "kernels": 5, "evaluations": [1, 1]}


def test_a_run_prints_its_table_and_writes_json_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "run_job", _fake_job)
    output = tmp_path / "bench.json"
    given = ["--case", "ode", "--contestant", "inductor", "--contestant", "fxparam", "--grow"]
    assert command.main([*given, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "1.25 [1.25 1.25]" in printed and "inductor: Unsupported: [a line]" in printed
    results = json.loads(output.read_text())
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("python -m benchmarks --case ode")
    rows = {(row["contestant"], row["value"]): row for row in results["rows"]}
    assert len(rows) == 9  # by-hand is always there
    assert rows["fxparam", 32]["step_ratio"]["median"] == 1.25
    assert rows["fxparam", 32]["compile_ratio"] == 1.0
    assert rows["inductor", 8]["error"] == "Unsupported: [a line]"
    for name in ("bench.png", "bench.svg", "bench-growth.png", "bench-growth.svg"):
        assert (tmp_path / name).stat().st_size > 0
    (tmp_path / "bench.svg").unlink()
    assert command.main(["--show", str(output)]) == 0
    assert "1.25 [1.25 1.25]" in capsys.readouterr().out
    assert (tmp_path / "bench.svg").exists()


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[str, int]] = []

    def job(job: dict[str, Any], limit: float) -> dict[str, Any]:
        if len(measured) == 1 and not output_is_whole:
            raise KeyboardInterrupt
        if job["kind"] == "time":
            measured.append((job["case"], job["size"]["steps"]))
        return _fake_job(job, limit)

    monkeypatch.setattr(runner, "run_job", job)
    output = tmp_path / "bench.json"
    given = ["--case", "ode", "--contestant", "fxparam", "--grow", "--output", str(output)]
    output_is_whole = False
    with pytest.raises(KeyboardInterrupt):
        command.main([*given, "--resume"])
    output_is_whole = True
    assert command.main([*given, "--resume"]) == 0
    assert measured == [("ode", 8), ("ode", 32), ("ode", 128)]
    results = json.loads(output.read_text())
    assert [row["value"] for row in results["rows"]] == [8, 8, 32, 32, 128, 128]
    assert "--resume" not in results["command"]
    capsys.readouterr()
    assert command.main([*given, "--rounds", "5", "--resume"]) == 2
    assert "the command there is python -m benchmarks --case ode" in capsys.readouterr().err
    results["environment"]["processor"] = "another"
    output.write_text(json.dumps(results))
    assert command.main([*given, "--resume"]) == 2
    assert "made with another processor" in capsys.readouterr().err


def test_the_table_needs_no_rich(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run_job", _fake_job)
    monkeypatch.setattr(command, "_console", lambda: None)
    given = ["--case", "ode", "--contestant", "fxparam", "--output", str(tmp_path / "bench.json")]
    assert command.main(given) == 0
    assert "1.25 [1.25 1.25]" in capsys.readouterr().out


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name in (*CASES, *CONTESTANTS):
        assert f"  {name} " in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--case", "foo"], "--case 'foo': known are orthogonal-rnn"),
        (["--contestant", "foo"], "--contestant 'foo': known are eager"),
        (["--device", "tpu"], "--device 'tpu': known are cpu, cuda"),
        (["--dtype", "float16"], "--dtype 'float16': known are float32, bfloat16"),
        (["--output", "no_such_folder/x.json"], "not a file in a folder that exists"),
        (["--show", "no_such.json"], "no such file"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_wrong_names_give_one_line_and_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_an_unknown_option_gives_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--nope"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_skipped_plainly_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda"]) == 0
    assert capsys.readouterr().out == "skipped: this torch sees no CUDA device\n"


def test_a_quick_plan_is_a_part_of_the_whole() -> None:
    everything = Plan(list(CASES), list(CONTESTANTS), grow=True)
    assert len(everything.points()) == sum(len(case.sizes()) for case in CASES.values())
    options = command._parser().parse_args(["--quick"])
    quick = command._plan(options)
    assert set(quick.cases) < set(CASES) and BY_HAND in quick.contestants
    assert all(size == case.small() for case, size in quick.points())


@pytest.mark.parametrize("kind", compile_cost.KINDS)
def test_compile_cost_measures_a_graph_of_about_the_size_asked_for(kind: str) -> None:
    torch.compiler.reset()
    row = compile_cost.measure(kind, 80, "aot_eager", repeats=1)
    assert 60 <= row["nodes"] <= 100
    assert (row["left"] < row["nodes"] / 2) == (kind == "repeated")
    assert 0 < row["pass"] < row["compile"]


def test_linear_growth_has_slope_one() -> None:
    rows = [{"nodes": n, "pass": 3e-4 * n} for n in (1000, 2000, 20_000)]
    assert compile_cost.slope(rows) == pytest.approx(1.0)
    assert compile_cost.slope(rows[:1]) is None
