"""The benchmark suite: its cases are what they say, and its check of results can fail."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import benchmarks.__main__ as command
from benchmarks import compile_cost, peak, runner, worker
from benchmarks import process as processes
from benchmarks.cases import CASES, Case, Size
from benchmarks.cases.case import training_step
from benchmarks.check import Expected, Wrong, check, expected_of, outcome_of, outcomes_of
from benchmarks.contestants import BY_HAND, CONTESTANTS, contestants_for
from benchmarks.counting import COUNTS
from benchmarks.environment import environment
from benchmarks.errors import first_line
from benchmarks.files import write_json
from benchmarks.measure import compilation, timed_step
from benchmarks.memory import allocated, at_peak, resident
from benchmarks.process import run_job, run_module
from benchmarks.programs import Program, Setting, program
from benchmarks.runner import Plan
from benchmarks.statistic import ratios, spread
from benchmarks.table import print_table
from benchmarks.timing import interleaved

HERE = Setting()
EAGER_BY_HAND = dataclasses.replace(CONTESTANTS[BY_HAND], compiler=None)
RNN = CASES["orthogonal-rnn"]


def _expected(case: Case, *, sharing: bool = False) -> Expected:
    return expected_of(case, case.tiny, HERE, sharing=sharing)


@pytest.mark.parametrize("name", CASES)
def test_the_source_hoisted_by_hand_equals_the_one_as_written(name: str) -> None:
    case = CASES[name]
    expected = _expected(case, sharing=True)
    for outcome in expected.eager:
        assert all(t.isfinite().all() for t in outcome.outputs)
        assert bool(outcome.gradients) == case.train
    assert expected.exact is not None
    check(outcomes_of(program(case, EAGER_BY_HAND, case.tiny, HERE)), expected)


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


def test_plain_weights_have_the_results_of_the_parametrized_ones() -> None:
    plain = dataclasses.replace(CONTESTANTS["plain"], compiler=None)
    for name in ("orthogonal-rnn", "gan-critic", "albert-lora"):
        case = CASES[name]
        outcomes = outcomes_of(program(case, plain, case.tiny, HERE))
        expected = _expected(case, sharing=True)
        check(outcomes, expected)
        both = outcomes[0].gradients.keys() & expected.eager[0].gradients.keys()
        assert bool(both) == (name != "albert-lora")
        for parameter in both:
            outcomes[0].gradients[parameter] *= 1.01
            with pytest.raises(Wrong, match="gradient of"):
                check(outcomes, expected)


@pytest.mark.parametrize("name", ["jax", "jax-by-hand"])
def test_jax_computes_the_same_and_leaves_its_arrays_to_the_check(name: str) -> None:
    jax = pytest.importorskip("jax")
    made = program(RNN, CONTESTANTS[name], RNN.tiny, HERE)
    assert isinstance(made.step()[0], jax.Array)
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert made.gradients().keys() == trained
    outcomes = outcomes_of(made)
    assert len(outcomes) == 2  # none with other parameters
    check(outcomes, _expected(RNN))


def test_sharing_an_evaluation_with_effects_is_checked_as_another_program() -> None:
    case = CASES["spectral-rnn"]
    actual = outcomes_of(program(case, EAGER_BY_HAND, case.tiny, HERE))
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


def _stops(model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
    """Does nothing any more from its fifth step on."""
    model.ran = getattr(model, "ran", 0) + 1
    return torch.zeros(()) if model.ran > 4 else training_step(model, run, inputs, done)


def _kept(model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
    """Keeps what it gave for parameters, whatever the inputs are."""
    key = tuple(float(p.detach().sum()) for p in model.parameters())
    kept = model.__dict__.setdefault("kept", {})
    if key not in kept:
        y = training_step(model, run, inputs, done)
        kept[key] = y.detach(), [p.grad for p in model.parameters()]
    y, gradients = kept[key]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    return y


def _spoils(model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
    """Sets parameters to zero from its fifth step on."""
    y = training_step(model, run, inputs, done)
    model.ran = getattr(model, "ran", 0) + 1
    if model.ran > 4:
        with torch.no_grad():
            next(model.parameters()).zero_()
    return y


def test_a_contestant_that_goes_wrong_while_it_is_timed_is_refused() -> None:
    makers = {
        "right": _right,
        "stops": partial(_changed, _stops),
        "kept": partial(_changed, _kept),
        "spoils": partial(_changed, _spoils),
    }
    expected = _expected(RNN)
    results = interleaved(makers, lambda name: expected, 3)
    assert len(results["right"]["steps"]) == 3
    assert results["stops"]["error"].startswith("once it was timed: Wrong: output 0")
    assert results["spoils"]["error"].startswith("once it was timed: Wrong: output 0")
    assert results["kept"]["error"].startswith("Wrong: output 0 with other inputs")


def test_buffers_are_as_at_the_start_for_the_step_after_the_timing() -> None:
    case = CASES["spectral-rnn"]
    expected = _expected(case)
    makers = {"eager": lambda: program(case, CONTESTANTS["eager"], case.tiny, HERE)}
    assert len(interleaved(makers, lambda name: expected, 3)["eager"]["steps"]) == 3


def test_a_plain_weight_without_a_gradient_is_refused() -> None:
    made = program(RNN, CONTESTANTS["plain"], RNN.tiny, HERE)
    made.model.cell.weight.requires_grad_(False)
    with pytest.raises(Wrong, match="gradients of cell.weight: none"):
        check([outcome_of(made)], _expected(RNN))


def test_turns_change_their_order_and_each_step_follows_one_of_its_own() -> None:
    ran: list[str] = []

    def named(name: str, model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
        ran.append(name)
        return training_step(model, run, inputs, done)

    makers = {name: partial(_changed, partial(named, name)) for name in "abc"}
    expected = _expected(RNN)
    interleaved(makers, lambda name: expected, 8)
    del ran[-3:]  # checked once more
    turns = ["".join(ran[i : i + 6]) for i in range(len(ran) - 48, len(ran), 6)]
    assert len(set(turns)) > 1
    for turn in turns:
        assert sorted(turn[::2]) == ["a", "b", "c"] and turn[::2] == turn[1::2]


def test_a_turn_may_be_given_time_in_which_its_threads_settle() -> None:
    ends: list[tuple[str, float]] = []

    def named(name: str, model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
        outputs = training_step(model, run, inputs, done)
        ends.append((name, time.perf_counter()))
        return outputs

    makers = {name: partial(_changed, partial(named, name)) for name in "ab"}
    expected = _expected(RNN)
    results = interleaved(makers, lambda name: expected, 1, settle=0.2)
    assert all(len(each["steps"]) == 1 for each in results.values())
    del ends[-2:]  # checked once more
    last = ends[-1][0]
    turn = list(itertools.takewhile(lambda step: step[0] == last, reversed(ends)))
    timed, settled, before = turn[0], turn[1], ends[-1 - len(turn)]
    assert len(turn) > 2 and timed[1] > settled[1] >= before[1] + 0.2


def test_a_program_that_compiles_again_while_it_is_timed_is_an_error() -> None:
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    def compiles(model: nn.Module, run: Any, inputs: Any, done: Any) -> Any:
        torch._dynamo.reset_code(twice.__code__)
        torch.compile(twice, backend="eager")(inputs[0])
        return training_step(model, run, inputs, done)

    makers = {"right": _right, "compiles": partial(_changed, compiles)}
    expected = _expected(RNN)
    results = interleaved(makers, lambda name: expected, 2)
    assert results["compiles"] == {"error": "recompiled while timed"}
    assert len(results["right"]["steps"]) == 2


def test_buffers_are_checked() -> None:
    case = CASES["spectral-rnn"]
    expected = _expected(case)
    actual = _expected(case).eager
    assert actual[0].buffers
    next(iter(actual[0].buffers.values())).mul_(1.1)
    with pytest.raises(Wrong, match="buffer of"):
        check(actual, expected)


def test_whole_numbers_are_compared_exactly() -> None:
    expected, actual = _expected(RNN), _expected(RNN).eager
    for outcome, count in ((expected.eager[0], 10**6), (actual[0], 10**6 + 1)):
        assert outcome.buffers is not None
        outcome.buffers["count"] = torch.tensor(count)
    assert expected.exact is not None and expected.exact[0].buffers is not None
    expected.exact[0].buffers["count"] = torch.tensor(10**6)
    with pytest.raises(Wrong, match="buffer of count is not eager's"):
        check(actual, expected)


def test_where_eager_itself_has_no_precision_nothing_passes() -> None:
    expected = _expected(RNN)
    check(expected.eager, expected)
    assert expected.exact is not None
    expected.exact[0].outputs[0].mul_(1.1)
    with pytest.raises(Wrong, match="output 0"):
        check(expected.eager, expected)


class _Stale(nn.Module):
    """Keeps the first value of its weight, and passes gradients on to the original all the same."""

    def __init__(self, parametrization: nn.Module) -> None:
        super().__init__()
        self.parametrization, self.kept = parametrization, None

    def forward(self, x: Tensor) -> Tensor:
        value = self.parametrization(x)
        if self.kept is None:
            self.kept = value.detach()
        return self.kept + value - value.detach()


def test_a_program_that_keeps_a_weight_is_refused() -> None:
    made = _right()
    chain = made.model.cell.parametrizations.weight
    names = dict(made.model.named_parameters()).keys()
    chain[0].forward = _Stale(copy.copy(chain[0])).forward
    assert dict(made.model.named_parameters()).keys() == names
    outcomes = outcomes_of(made)
    expected = _expected(RNN)
    check(outcomes[:1], expected)
    with pytest.raises(Wrong, match="output 0 after the parameters changed is not eager's"):
        check(outcomes, expected)


def _losing(access: int, size: Size) -> Program:
    """Eager, without the gradient of one access."""
    made = program(RNN, CONTESTANTS["eager"], size, HERE)

    def run(x: Tensor) -> Tensor:
        h = torch.zeros_like(x[0])
        for i, row in enumerate(made.model.read(x)):
            weight = made.model.cell.weight
            h = torch.tanh(row + h @ (weight.detach() if i == access else weight).T)
        return h

    return dataclasses.replace(made, run=run)


@pytest.mark.parametrize("exact", [True, False])
def test_a_gradient_that_lacks_one_access_of_32_is_refused(exact: bool) -> None:
    size = Size(steps=32, width=8, batch=2)
    expected = expected_of(RNN, size, HERE)
    if not exact:
        expected = dataclasses.replace(expected, exact=None)
    check(outcomes_of(_losing(-1, size)), expected)
    for access in (4, 28):
        with pytest.raises(Wrong, match="gradient of cell"):
            check(outcomes_of(_losing(access, size)), expected)


def test_the_parameters_are_as_before_once_the_outcomes_are_known() -> None:
    made = _right()
    before = copy.deepcopy(made.model.state_dict())
    outcomes_of(made)
    torch.testing.assert_close(dict(made.model.state_dict()), dict(before), rtol=0, atol=0)


def test_contestants_apply_where_they_mean_something() -> None:
    for case in CASES.values():
        names = [c.name for c in contestants_for(case, list(CONTESTANTS))]
        assert ("inductor-freezing" in names) == (not case.train)
        assert ("fxparam-scope" in names) == (case.scope is not None)
        assert BY_HAND in names and "plain" in names


def test_sizes_grow_along_the_knob_of_a_case() -> None:
    for case in CASES.values():
        knobs = {case.knob(size) for size in case.sizes()} - {case.knob(case.size)}
        assert knobs in ({8, 128}, {8, 32, 128}, {4, 64}, {4, 16})
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
    peak = resident(made)
    assert peak is None or peak >= 0
    with compilation() as seen:
        pass
    assert (seen.graphs, seen.nodes, seen.kernels, seen.code) == (0, 0, 0, [])


def test_memory_is_what_the_allocator_gives_out_at_most() -> None:
    made = _right()
    kept = torch.ones(1000)

    def step(*_: Any) -> Any:
        first = torch.ones(2000)
        second = first + 1  # both are there
        del first
        return [second.sum() + kept[0]]

    made.body = step
    first = allocated(made)
    assert 16_000 <= first < 17_000 and allocated(made) == first
    blocks, inside = at_peak(made)
    assert sum(blocks) == first and blocks[:2] == [8000, 8000] and inside[-1] == "aten::add"


def test_what_is_allocated_at_the_peak_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--case", "accumulation", "--contestant", "eager"]
    assert peak.main([*asked, "--value", "8"]) == 0
    assert "accumulation, steps 8" in capsys.readouterr().out
    assert peak.main([*asked, "--value", "0"]) == 2
    assert capsys.readouterr().err.strip() == "--value 0: at least 1"
    assert peak.main(["--case", "orthogonal-rnn", "--contestant", "inductor-freezing"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "--contestant inductor-freezing: does not apply to orthogonal-rnn"


def test_a_process_that_fails_is_an_error_in_one_line() -> None:
    assert "No module named" in run_module("no_such_module", {}, 60, cold=True)["error"]
    assert run_module("benchmarks.worker", {}, 0.01, cold=True) == {"error": "no result after 0 s"}
    assert processes._reason(-11, "a warning\n") == "exit code -11: SIGSEGV"
    assert processes._reason(1, "a\nb\n") == "b" and processes._reason(3, "") == "exit code 3"


@pytest.mark.parametrize("given", [True, False])
def test_what_the_processor_can_do_is_found_out_once(given: bool, tmp_path: Path) -> None:
    folder = processes._instructions().name if given else str(tmp_path)
    code = """
from torch._inductor import cpp_builder, cpu_vec_isa

def build(self):
    raise SystemExit(3)

cpp_builder.CppBuilder.build = build
cpu_vec_isa.pick_vec_isa()
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    builds = subprocess.run([sys.executable, "-c", code], env=environment).returncode == 3
    assert builds != given


def test_a_probe_in_a_fresh_process() -> None:
    case = CASES["ode"]
    job = {
        "kind": "probe",
        "case": case.name,
        "contestants": ["eager"],
        "size": dataclasses.asdict(case.tiny),
        "setting": dataclasses.asdict(HERE),
        "whole": True,
    }
    result = run_job(job, 120)
    assert result["evaluations"] == [4, 4]
    assert "compile" not in result and "nodes" not in result


@pytest.mark.parametrize("name", ["inductor", "fxparam"])
def test_a_compiled_contestant_is_measured(name: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    contestant = CONTESTANTS[name]
    result = worker.probe(RNN, contestant, RNN.tiny, HERE, tmp_path)
    assert result["compile"] > 0 and result["graphs"] == 1
    assert result["nodes"] > 0 and result["kernels"] > 0
    (code,) = tmp_path.iterdir()
    assert code.name == f"orthogonal-rnn-steps4-{name}-cpu-float32.py.txt" and code.read_text()
    counted = worker.count(RNN, contestant, RNN.tiny, HERE)
    assert counted == ([1, 1] if name == "fxparam" else [4, 4])


def test_freezing_evaluates_nothing_once_it_is_compiled() -> None:
    freezing = CONTESTANTS["inductor-freezing"]
    # An orthogonal weight Inductor does not fold: its triangle comes from a mask made in the graph.
    case = CASES["wavenet-generate"]
    assert worker.count(case, freezing, case.tiny, HERE) == [0, 0]
    case = CASES["inference"]
    torch.compiler.reset()
    made = program(case, freezing, case.tiny, HERE)
    with compilation() as seen:
        outcomes = outcomes_of(made)
    assert "_frozen_param" in seen.code[0]
    assert len(outcomes) == 2  # none with other parameters
    check(outcomes, _expected(case))


def test_a_probe_that_is_not_the_first_only_compiles_and_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(worker, "check")
    monkeypatch.delattr(worker, "count")
    job = {"kind": "probe", "case": "ode", "contestants": ["eager"], "whole": False}
    sizes = {"size": dataclasses.asdict(CASES["ode"].tiny), "setting": dataclasses.asdict(HERE)}
    assert {"peak", "allocated"} <= worker._run(job | sizes).keys()


def test_probes_go_in_rounds_whose_order_changes_until_they_have_taken_long() -> None:
    case, clock, ran = CASES["ode"], [0.0], []

    def job(job: dict[str, Any], limit: float) -> dict[str, Any]:
        (name,) = job["contestants"]
        ran.append((name, job["whole"]))
        clock[0] += 40.0 if name == "plain" else 1.0
        if name == "inductor":
            return {"error": "always"}
        return {"compile": float(len(ran)), "peak": 1.0, "evaluations": [1, 1]}

    names = ["eager", "inductor", "plain", "fxparam"]
    plan = Plan(["ode"], names, probes=4)
    heard: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_job", job)
        patch.setattr(runner.time, "perf_counter", lambda: clock[0])
        found = runner._probes(plan, case, case.tiny, lambda what, number: heard.append(number), 0)
        first = [*ran]
        runner._probes(plan, case, case.tiny, lambda what, number: None, 0)
    assert ran[len(first) :] == first  # the order is always the same
    counts = {name: len([1 for other, _ in first if other == name]) for name in plan.names(case)}
    # Eager has nothing to compile again.
    assert counts == {"eager": 1, "inductor": 1, "by-hand": 4, "plain": 2, "fxparam": 4}
    assert [whole for _, whole in first] == [True] * 5 + [False] * 7
    always = [name for name, _ in first if name in ("by-hand", "fxparam")]
    assert len({tuple(always[i : i + 2]) for i in range(0, 8, 2)}) > 1
    assert heard == sorted(set(heard)) and heard[-1] <= plan.jobs() - 1
    assert found["inductor"] == {"error": "always"}
    assert len(found["fxparam"]["compiles"]) == 4 and len(found["plain"]["peaks"]) == 2
    values = sorted(found["fxparam"]["compiles"])
    assert values[1] <= found["fxparam"]["compile"] <= values[2]


def _fake_job(job: dict[str, Any], limit: float) -> dict[str, Any]:
    names = job["contestants"]
    if job["kind"] == "time":
        seconds = {"by-hand": 1.0, "fxparam": 1.25}
        return {n: {"steps": [seconds[n]] * 2, "forwards": [seconds[n] / 2] * 2} for n in names}
    if names == ["inductor"]:
        return {"error": "Unsupported: [a line]"}
    made = {"graphs": 2, "nodes": 7, "kernels": 5}
    return {"compile": 3.0, "peak": 1000, "allocated": 8000, "evaluations": [1, 1], **made}


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
    assert "3.0 [3.0 3.0]" in printed and "counting op at the end of each chain" in printed
    assert "†" not in printed
    results = json.loads(output.read_text())
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("python -m benchmarks --case ode")
    rows = {(row["contestant"], row["value"]): row for row in results["rows"]}
    assert len(rows) == 9  # by-hand is always there
    assert rows["fxparam", 32]["step_ratio"]["median"] == 1.25
    assert rows["fxparam", 32]["compile_ratio"] == 1.0
    assert rows["fxparam", 32]["compiles"] == [3.0] * 3 and rows["fxparam", 32]["graphs"] == 2
    assert rows["fxparam", 32]["steps"] == [1.25] * 2 and rows["fxparam", 8]["peaks"] == [1000] * 3
    assert rows["fxparam", 32]["forwards"] == [0.625] * 2
    assert rows["fxparam", 8]["allocated"] == 8000 and rows["fxparam", 8]["allocated_ratio"] == 1
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
    results["environment"] = {**environment("cpu"), "date": "another", "system": "another"}
    output.write_text(json.dumps(results))
    assert command.main([*given, "--resume"]) == 0
    results["environment"]["source"] = "another"
    output.write_text(json.dumps(results))
    capsys.readouterr()
    assert command.main([*given, "--resume"]) == 2
    assert "made with another source" in capsys.readouterr().err
    output.write_text("{")
    assert command.main([*given, "--resume"]) == 2
    assert "not a recorded run" in capsys.readouterr().err


def test_the_environment_names_the_source_and_the_compiler() -> None:
    found = environment("cpu")
    assert len(found["source"]) == 12 and int(found["source"], 16) >= 0
    assert found["source"] == environment("cpu")["source"]
    assert any(c.isdigit() for c in found["compiler"])


def test_what_is_cut_off_while_it_is_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert json.loads(path.read_text()) == [1]


def test_rows_that_compute_another_program_than_by_hand_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run_job", _fake_job)
    monkeypatch.setattr(command, "_console", lambda: None)
    given = [
        "--case",
        "gan-critic",
        "--contestant",
        "fxparam",
        "--output",
        str(tmp_path / "b.json"),
    ]
    assert command.main(given) == 0
    printed = capsys.readouterr().out
    assert "fxparam †" in printed and "1.25 †" in printed and "by-hand †" not in printed
    assert "  † another program than the one by hand" in printed
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["contestant"]: row["another"] for row in rows} == {
        "by-hand": False,
        "fxparam": True,
    }


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
        (["--limit", "0"], "--limit 0.0: a number of seconds, more than 0"),
        (["--limit", "nan"], "--limit nan: a number"),
        (["--limit", "inf"], "--limit inf: a number"),
        (["--output", "x.png"], "--output x.png: plots are written beside it with this ending"),
        (["--show", "x.svg"], "--show x.svg: plots are"),
        (["--code", __file__], "not a folder"),
        (
            ["--case", "ode", "--contestant", "inductor-freezing"],
            "applies to none of the cases ode",
        ),
        (
            ["--quick", "--contestant", "fxparam-scope"],
            "applies to none of the cases orthogonal-rnn,",
        ),
        (["--show", __file__], "not a recorded run"),
        (
            ["--show", str(processes.ROOT / "benchmarks/results/compile-cost.json")],
            "not a recorded",
        ),
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
    assert quick.probes == 1 and command._plan(command._parser().parse_args([])).probes == 3


@pytest.mark.parametrize("kind", compile_cost.KINDS)
def test_compile_cost_measures_a_graph_of_about_the_size_asked_for(kind: str) -> None:
    torch.compiler.reset()
    row = compile_cost.measure(kind, 80, "aot_eager")
    assert 60 <= row["nodes"] <= 100
    assert (row["left"] < row["nodes"] / 2) == (kind == "repeated")
    assert 0 < row["pass"] < row["compile"]


@pytest.mark.parametrize("limit", ["nan", "inf", "-5"])
def test_compile_cost_takes_a_number_of_seconds(
    limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_cost.main(["--limit", limit]) == 2
    assert "a number of seconds, more than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(contestant="zzz"),
        lambda row: row.update(step=5),
        lambda row: row.update(step_ratio="x"),
        lambda row: row.update(compile="x"),
        lambda row: row.update(evaluations=[1]),
        None,
    ],
)
def test_what_is_no_recorded_run_gives_one_line_and_2(
    change: Callable[[dict[str, Any]], None] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorded = json.loads((processes.ROOT / "benchmarks/results/cpu-quick.json").read_text())
    if change is None:
        recorded["rows"] = []
    else:
        change(next(row for row in recorded["rows"] if row["error"] is None))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(recorded))
    assert command.main(["--show", str(path)]) == 2
    said = capsys.readouterr().err
    assert "not a recorded run" in said and said.count("\n") == 1


def test_no_column_is_left_out_of_a_narrow_terminal() -> None:
    console = pytest.importorskip("rich.console").Console(width=40, file=io.StringIO())
    columns = tuple(f"column {i}" for i in range(12))
    print_table("a table", columns, [["contestant", *("1234567",) * 11]], console)
    printed = console.file.getvalue()
    assert printed.count("1234567") == 11 and "…" not in printed
    assert all(str(i) in printed for i in range(12))


def test_graphs_that_inductor_is_too_slow_for_have_more_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def ran(module: str, job: dict[str, Any], limit: float, *, cold: bool) -> dict[str, Any]:
        asked.append((job["kind"], job["nodes"], job["inner"], limit))
        if job["inner"] == "inductor":
            return {"error": f"no result after {limit:.0f} s"}
        nodes, inner = job["nodes"], job["inner"]
        return {"nodes": nodes, "left": nodes, "pass": 1e-4 * nodes, "compile": 9.0, "inner": inner}

    monkeypatch.setattr(compile_cost, "run_module", ran)
    output = str(tmp_path / "cost.json")
    assert compile_cost.main(["--nodes", "10", "20", "--limit", "5", "--output", output]) == 0
    assert asked == [
        (kind, *job)
        for kind in compile_cost.KINDS
        for job in ((10, "inductor", 65), (10, "aot_eager", 110), (20, "aot_eager", 110))
    ]


def test_linear_growth_has_slope_one() -> None:
    rows = [{"nodes": n, "pass": 3e-4 * n} for n in (1000, 2000, 20_000)]
    assert compile_cost.slope(rows) == pytest.approx(1.0)
    assert compile_cost.slope(rows[:1]) is None
