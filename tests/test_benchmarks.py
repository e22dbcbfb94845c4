"""The benchmark suite: its cases are what they say, and its check of results can fail."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import benchmarks.__main__ as command
from benchmarks import check as checking
from benchmarks import distributed, jax_rnn, measure, passes, record, starts, tables
from benchmarks.cases import CASES, Case, Size
from benchmarks.check import Expected, Wrong, check, expected_of, outcome_of, outcomes_of
from benchmarks.contestants import BY_HAND, CONTESTANTS, contestants_for
from benchmarks.counting import COUNTS
from benchmarks.memory import peak
from benchmarks.process import ROOT, call
from benchmarks.programs import Program, Setting, program
from benchmarks.record import SECTIONS, Plan

HERE = Setting()
EAGER = CONTESTANTS["eager"]
EAGER_BY_HAND = dataclasses.replace(CONTESTANTS[BY_HAND], compiler=None)
RNN = CASES["orthogonal-rnn"]
RECORD = ROOT / "benchmarks/results/cpu.json"


def _expected(case: Case, *, sharing: bool = False) -> Expected:
    return expected_of(case, case.tiny, HERE, sharing=sharing)


def _counted(case: Case, contestant: Any) -> tuple[int, int]:
    made = program(case, contestant, case.tiny, HERE, counting=True)
    made.step()
    COUNTS.update(forward=0, backward=0)
    made.step()
    return COUNTS["forward"], COUNTS["backward"]


@pytest.mark.parametrize("name", CASES)
def test_the_source_hoisted_by_hand_equals_the_one_as_written(name: str) -> None:
    case = CASES[name]
    expected = _expected(case, sharing=True)
    for outcome in expected.eager:
        assert all(t.isfinite().all() for t in outcome.tensors.values())
        assert any(n.startswith("gradient") for n in outcome.tensors) == case.train
    check(outcomes_of(program(case, EAGER_BY_HAND, case.tiny, HERE)), expected)


@pytest.mark.parametrize("name", CASES)
def test_by_hand_evaluates_each_weight_once_and_eager_at_each_access(name: str) -> None:
    case = CASES[name]
    eager, by_hand = _counted(case, EAGER), _counted(case, EAGER_BY_HAND)
    assert by_hand[0] > 0 and by_hand[1] == (by_hand[0] if case.train else 0)
    assert eager == by_hand if case.reads_once else eager[0] > by_hand[0]


def test_plain_weights_have_the_results_of_the_parametrized_ones() -> None:
    plain = dataclasses.replace(CONTESTANTS["plain"], compiler=None)
    for name in ("orthogonal-rnn", "albert-lora"):
        case, expected = CASES[name], _expected(CASES[name], sharing=True)
        outcomes = outcomes_of(program(case, plain, case.tiny, HERE))
        check(outcomes, expected)
        both = outcomes[0].tensors.keys() & expected.eager[0].tensors.keys()
        assert any(each.startswith("gradient") for each in both) == (name != "albert-lora")
        for each in both:
            changed = copy.deepcopy(outcomes)
            changed[0].tensors[each] *= 1.01
            with pytest.raises(Wrong, match=each):
                check(changed, expected)
    made = program(RNN, plain, RNN.tiny, HERE)
    made.model.cell.weight.requires_grad_(False)
    with pytest.raises(Wrong, match=r"no gradient of cell\.weight"):
        check([outcome_of(made)], _expected(RNN))


def test_sharing_an_evaluation_with_effects_is_checked_as_another_program() -> None:
    case = CASES["spectral-rnn"]
    actual = outcomes_of(program(case, EAGER_BY_HAND, case.tiny, HERE))
    check(actual, _expected(case, sharing=True))
    with pytest.raises(Wrong):
        check(actual, _expected(case, sharing=False))
    assert EAGER.is_another_program(case) and not EAGER_BY_HAND.is_another_program(case)


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 1.02 * grad


def _right() -> Program:
    return program(RNN, EAGER, RNN.tiny, HERE)


def _with_body(change: Callable[..., Any]) -> Program:
    """A program whose step is changed: it is given the model and the step as it was."""
    made = _right()
    body = made.body
    return dataclasses.replace(
        made, body=lambda run, inputs: change(made.model, lambda: body(run, inputs))
    )


def _no_gradients(model: nn.Module, step: Callable[[], Any]) -> Any:
    y = step()
    model.zero_grad()
    return y


def _wrong_gradient(model: nn.Module, step: Callable[[], Any]) -> Any:
    y = step()
    next(model.parameters()).grad *= 1.02
    return y


def _stops(model: nn.Module, step: Callable[[], Any]) -> Any:
    """Does nothing any more from its ninth step on."""
    model.ran = getattr(model, "ran", 0) + 1
    return torch.zeros(()) if model.ran > 8 else step()


def _kept(model: nn.Module, step: Callable[[], Any]) -> Any:
    """Keeps what it gave for parameters, whatever the inputs are."""
    key = tuple(float(p.detach().sum()) for p in model.parameters())
    kept = model.__dict__.setdefault("kept", {})
    if key not in kept:
        kept[key] = step(), [p.grad for p in model.parameters()]
    y, gradients = kept[key]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    return y


def _recompiles(model: nn.Module, step: Callable[[], Any]) -> Any:
    torch._dynamo.reset_code(_twice.__code__)
    torch.compile(_twice, backend="eager")(torch.ones(1))
    return step()


def _twice(x: Tensor) -> Tensor:
    return 2 * x


def _raises(model: nn.Module, step: Callable[[], Any]) -> Any:
    raise ArithmeticError("first\nsecond")


def test_a_contestant_that_is_wrong_is_refused_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: dict[str, tuple[Callable[..., Any], str]] = {
        "eager-cached": (lambda model, step: 1.01 * step(), "Wrong: output 0 is not eager's"),
        "inductor": (_wrong_gradient, "Wrong: gradient of read.weight is not eager's: off by"),
        "inductor-cached": (lambda model, step: step() * float("nan"), "Wrong: output 0"),
        "plain": (_no_gradients, "Wrong: eager and the contestant differ in gradient of"),
        "fxparam": (_raises, "ArithmeticError: first"),
        "fxparam-region": (_stops, "once it was timed: Wrong: eager and the contestant"),
        "fxparam-call": (_kept, "Wrong: output 0 with other inputs is not eager's"),
        "fxparam-step": (_recompiles, "recompiled while timed"),
    }

    def made(case: Case, contestant: Any, *_: Any, counting: bool = False) -> Program:
        if counting and contestant.name == "eager":
            raise ArithmeticError("no count")
        change = changes.get(contestant.name)
        return _right() if counting or change is None else _with_body(change[0])

    monkeypatch.setattr(measure, "program", made)
    monkeypatch.setattr(measure, "_wake", lambda it: None)
    names = ["eager", BY_HAND, *changes]
    size, setting = dataclasses.asdict(RNN.tiny), dataclasses.asdict(HERE)
    rows = {row["contestant"]: row for row in measure.measure(RNN.name, names, size, setting, 7)}
    assert list(rows) == names
    for name, (_, line) in changes.items():
        assert "steps" not in rows[name] and rows[name]["error"].startswith(line)
    assert rows["fxparam-step"].keys() == rows["plain"].keys()  # no figures
    assert rows["eager"]["not_counted"] == "ArithmeticError: no count"
    assert rows[BY_HAND]["evaluations"] == [0, 0]  # of a stub that counts nothing
    for name in ("eager", BY_HAND):
        assert len(rows[name]["steps"]) == 7 and min(rows[name]["steps"]) > 0


def test_one_by_hand_that_compiles_again_leaves_the_others_their_times() -> None:
    programs = {BY_HAND: _with_body(_recompiles), "fxparam": _right()}
    found = measure._in_turns(programs, 7)
    assert found[BY_HAND] == {"error": "recompiled while timed"}
    assert len(found["fxparam"]["steps"]) == 7


def test_buffers_are_as_at_the_start_for_the_step_after_the_timing() -> None:
    case = CASES["spectral-rnn"]
    made = program(case, EAGER, case.tiny, HERE)
    expected = _expected(case)
    check(outcomes_of(made), expected)
    with pytest.raises(Wrong):
        check([outcome_of(made)], expected)
    made.restart()
    outcome = outcome_of(made)
    check([outcome], expected)
    next(t for name, t in outcome.tensors.items() if name.startswith("buffer")).mul_(1.1)
    with pytest.raises(Wrong, match="buffer of"):
        check([outcome], expected)


def test_whole_numbers_are_compared_exactly_and_exchanged() -> None:
    expected, actual = _expected(RNN), _expected(RNN).eager
    for outcomes, count in ((expected.eager, 10**6), (expected.exact, 10**6), (actual, 10**6 + 1)):
        outcomes[0].tensors["buffer of count"] = torch.tensor(count)
    with pytest.raises(Wrong, match="buffer of count is not eager's"):
        check(actual, expected)
    assert checking._another(torch.tensor([1, 2]), 0).tolist() == [2, 1]
    assert checking._copy(torch.tensor(1j)).tolist() == [0.0, 1.0]


def test_where_eager_itself_has_no_precision_nothing_passes() -> None:
    expected = _expected(RNN)
    check(expected.eager, expected)
    expected.exact[0].tensors["output 0"].mul_(1.1)
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
    chain[0].forward = _Stale(copy.copy(chain[0])).forward
    before = copy.deepcopy(dict(made.model.named_parameters()))
    outcomes = outcomes_of(made)
    torch.testing.assert_close(dict(made.model.named_parameters()), before, rtol=0, atol=0)
    expected = _expected(RNN)
    check(outcomes[:1], expected)
    with pytest.raises(Wrong, match="output 0 after the parameters changed is not eager's"):
        check(outcomes, expected)


def test_each_parameter_is_another_one_for_a_step_even_one_that_does_not_train() -> None:
    model = CASES["albert-lora"].model(CASES["albert-lora"].tiny, False)
    before = copy.deepcopy(dict(model.named_parameters()))
    with checking._other_parameters(model):
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_gradient_that_lacks_one_access_of_32_is_refused() -> None:
    size = Size(steps=32, width=8, batch=2)
    expected = expected_of(RNN, size, HERE)

    def losing(access: int) -> Program:
        made = program(RNN, EAGER, size, HERE)

        def run(x: Tensor) -> Tensor:
            h = torch.zeros_like(x[0])
            for i, row in enumerate(made.model.read(x)):
                weight = made.model.cell.weight
                h = torch.tanh(row + h @ (weight.detach() if i == access else weight).T)
            return h

        return dataclasses.replace(made, run=run)

    check(outcomes_of(losing(-1)), expected)
    for access in (4, 28):
        with pytest.raises(Wrong, match="gradient of cell"):
            check(outcomes_of(losing(access)), expected)


def test_contestants_apply_where_they_mean_something() -> None:
    for case in CASES.values():
        names = [c.name for c in contestants_for(case, CONTESTANTS)]
        assert BY_HAND in names and "plain" in names and {*case.also} <= {*names}
        assert ("inductor-freezing" in names) == (not case.train)
        assert ("inductor" in names) == (not case.reads_once and not case.eager_by_hand)
        assert case.reads_once or "eager-cached" in names
    assert [c.name for c in contestants_for(RNN, ["fxparam"])] == [BY_HAND, "fxparam"]


def test_each_contestant_of_ours_compiles_and_shares(tmp_path: Path) -> None:
    cases = {
        "fxparam": (RNN, [1, 1]),
        "inductor": (RNN, [4, 4]),
        "fxparam-no-lower": (RNN, [1, 1]),
        "fxparam-adopted": (RNN, [1, 1]),
        "fxparam-region": (CASES["spectral-rnn"], [1, 1]),
        "fxparam-call": (CASES["graph-breaks"], [1, 1]),
        "fxparam-around": (CASES["eager-loop"], [1, 1]),
        "fxparam-step": (CASES["accumulation"], [1, 1]),
        "fxparam-frozen": (CASES["inference"], [0, 0]),
    }
    for name, (case, evaluations) in cases.items():
        torch.compiler.reset()
        it = measure._Case(case, case.tiny, HERE)
        assert it.counted(CONTESTANTS[name]) == evaluations, name
    torch.compiler.reset()
    it = measure._Case(RNN, RNN.tiny, HERE)
    _, row = it.compiled(CONTESTANTS["fxparam"], str(tmp_path))
    assert row["compile"] > 0 and row["graphs"] == 1 and row["kernels"] > 0 and row["memory"] > 0
    (code,) = tmp_path.iterdir()
    assert code.name == "orthogonal-rnn-steps4-fxparam-float32.py.txt"
    assert "async_compile" in code.read_text()


def test_frozen_weights_are_constants_of_what_inductor_compiles(tmp_path: Path) -> None:
    torch.compiler.reset()
    case = CASES["inference"]
    it = measure._Case(case, case.tiny, HERE)
    made, _ = it.compiled(CONTESTANTS["inductor-freezing"], str(tmp_path))
    assert "_frozen_param" in next(tmp_path.iterdir()).read_text()
    assert len(outcomes_of(made)) == 2  # none with other parameters
    assert it.counted(CONTESTANTS["inductor-freezing"]) is None


def test_a_wrapped_error_is_shown_by_its_cause() -> None:
    wrapper = RuntimeError("outside")
    wrapper.inner_exception = ValueError("\ninside\nand more")  # type: ignore[attr-defined]
    assert measure.first_line(wrapper) == "ValueError: inside"
    assert len(measure.first_line(ValueError("x" * 1000))) == 120


def test_memory_is_what_the_allocator_gives_out_at_most() -> None:
    kept = torch.ones(1000)

    def run() -> Tensor:
        first = torch.ones(2000)
        second = first + 1  # both are there
        del first
        return second.sum() + kept[0]

    first = peak(run)
    assert 16_000 <= first < 17_000 and peak(run) == first


def test_a_process_that_fails_is_an_error_in_one_line() -> None:
    assert "No module named" in call("no_such_module:f", 60)["error"]
    assert call("benchmarks.maps:measure", 0.01) == {"error": "no result after 0 s"}
    assert call("os:abort", 60) == {"error": "ended by SIGABRT"}


def test_a_first_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setitem(CASES, "ode", dataclasses.replace(CASES["ode"], size=CASES["ode"].tiny))
    found = starts.first_step("ode", "fxparam", 0.0)
    assert 0 < found["first"] < found["whole"]


@pytest.mark.parametrize("kind", passes.KINDS)
def test_what_passes_cost_is_a_part_of_the_compilation(kind: str) -> None:
    torch.compiler.reset()
    row = passes.measure(kind, 80, "aot_eager")
    assert 0 < row["passes"] < row["compile"]


@pytest.mark.parametrize("scan", [False, True])
def test_jax_by_hand_is_the_program_as_written(scan: bool) -> None:
    pytest.importorskip("jax")
    written, by_hand = (jax_rnn.measure(each, scan, rounds=1) for each in (False, True))
    assert by_hand["loss"] == pytest.approx(written["loss"], rel=1e-4)


def _rows(case: str, names: list[str], size: dict[str, int], **_: Any) -> list[dict[str, Any]]:
    """Return made-up figures of a case."""
    seconds = {BY_HAND: 1.0, "fxparam": 1.25}
    rows: list[dict[str, Any]] = []
    for name in names:
        row = {"case": case, "grows": "steps", "value": size["steps"], "contestant": name}
        row |= {"another": CONTESTANTS[name].is_another_program(CASES[case])}
        if name in seconds:
            row |= {"steps": [seconds[name]] * 3, "compile": 3.0, "memory": 8000, "kernels": 5}
            row |= {"graphs": 2, "evaluations": [1, 1]}
        else:
            row |= {"error": "Unsupported: [a line]"}
        rows.append(row)
    return rows


def _call(function: str, limit: float, env: Any = None, **job: Any) -> Any:
    return _rows(**job)


def test_a_run_prints_its_tables_and_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(record, "call", _call)
    output = tmp_path / "bench.json"
    given = ["cases", "growth", "--contestant", "inductor", "--contestant", "fxparam"]
    for case in ("ode", "spectral-rnn", "orthogonal-rnn"):
        given += ["--case", case]
    given += ["--output", str(output)]
    assert command.main(given) == 0
    printed = capsys.readouterr().out
    assert "| ode 32 | fxparam | 1.25 | 1.25 to 1.25 | 1.00 | 1.00 | 1 / 1 | 1250.00 |" in printed
    assert "| ode 32 | inductor | Unsupported: [a line] |" in printed
    assert "| spectral-rnn 32 | fxparam | 1.25 † |" in printed
    found = json.loads(output.read_text())
    assert found["command"].startswith("python -m benchmarks cases growth --contestant inductor")
    assert {"torch", "fxparam", "processor", "threads"} <= found["environment"].keys()
    assert found["environment"]["torch"] == torch.__version__
    assert [row["value"] for row in found["growth"][:9:3]] == [8, 32, 128]
    assert command.main(["--show", str(output)]) == 0
    shown = capsys.readouterr().out
    assert printed.split("\n")[2] in shown
    for name in ("bench.png", "bench-growth.png"):
        assert (tmp_path / name).stat().st_size > 0 and name in shown


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def cut_off(function: str, limit: float, env: Any = None, **job: Any) -> Any:
        if job["case"] == "ode" and not measured.count("ode"):
            measured.append("ode")
            raise KeyboardInterrupt
        measured.append(job["case"])
        return _rows(**job)

    monkeypatch.setattr(record, "call", cut_off)
    output = tmp_path / "bench.json"
    given = ["--case", "orthogonal-rnn", "--case", "ode", "--output", str(output), "--resume"]
    with pytest.raises(KeyboardInterrupt):
        command.main(given)
    assert command.main(given) == 0
    assert measured == ["orthogonal-rnn", "ode", "ode"]
    assert {row["case"] for row in json.loads(output.read_text())["cases"]} == {*measured}


def test_a_section_that_was_cut_off_is_made_anew_and_only_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def cut_off(function: str, limit: float, env: Any = None, **job: Any) -> Any:
        asked.append(job["size"]["steps"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return _rows(**job)

    monkeypatch.setattr(record, "call", cut_off)
    output = tmp_path / "bench.json"
    given = ["growth", "--case", "orthogonal-rnn", "--output", str(output), "--resume"]
    with pytest.raises(KeyboardInterrupt):
        command.main(given)
    assert command.main(given) == command.main(given) == 0
    assert asked == [8, 32, 8, 32, 128]
    found = json.loads(output.read_text())
    assert len(found["growth"]) == 9 and found["done"] == ["growth"]
    for key, value in (("environment", {"torch": "another"}), ("setting", {"dtype": "another"})):
        output.write_text(json.dumps({**found, key: {**found[key], **value}}))
        with pytest.raises(SystemExit):
            command.main(given)
        assert "made elsewhere, or with other settings" in capsys.readouterr().err


def test_what_was_not_measured_is_said_in_its_table() -> None:
    rows = _rows("ode", [BY_HAND, "inductor"], {"steps": 32})
    made = {"cases": rows, "demo": [{"error": "no result after 1 s"}]}
    assert tables.table("jax", made) == "jax: not measured"
    assert tables.table("demo", made) == "demo: no result after 1 s"
    assert "| `ode` |" in tables.table("cases", made)
    assert tables.fill("<!-- jax -->\n<!-- /jax -->", made).count("not measured") == 1


def test_ranks_that_take_too_long_are_ended() -> None:
    (row,) = distributed.rows(0.5)
    assert row == {"error": "no result after 0 s"}


def test_what_is_cut_off_while_it_is_written_leaves_the_old_record(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    record.write(path, {"cases": [{"a": 1}], "command": "c"})
    with pytest.raises(TypeError):
        record.write(path, {"cases": [object()]})
    assert json.loads(path.read_text()) == {"cases": [{"a": 1}], "command": "c"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--case", "foo"], "invalid choice: 'foo'"),
        (["--contestant", "foo"], "invalid choice: 'foo'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--output", "no_such_folder/x.json"], "not a file in a folder that exists"),
        (["--code", __file__], "not a folder"),
        (["--show", "no_such.json"], "--show no_such.json: not a record"),
        (["--show", __file__], "not a record"),
        (["--resume", "--output", __file__], "not a record"),
        (["starts", "--device", "cuda"], "only cases and growth run on a GPU"),
        (["nothing"], "no section nothing: known are cases, growth"),
        (["--rounds", "0"], "--rounds and --limit must be positive numbers"),
        (["--limit", "nan"], "--rounds and --limit must be positive numbers"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {*CASES, *CONTESTANTS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_skipped_plainly_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda"]) == 0
    assert capsys.readouterr().out == "skipped: this torch sees no CUDA device\n"


def test_a_quick_plan_is_a_part_of_the_whole() -> None:
    quick = command._plan(command._parser().parse_args(["--quick"]))
    assert {*quick.cases} < {*CASES} and BY_HAND in quick.contestants and quick.smallest
    assert [*SECTIONS] == command._sections(command._parser().parse_args([]))
    assert Plan().cases == [*CASES] and Plan().contestants == [*CONTESTANTS]


def test_the_tables_of_readme_and_docs_are_those_of_the_record() -> None:
    found = json.loads(RECORD.read_text())
    assert found.keys() >= {"command", "environment", *SECTIONS.keys() - {"jax"}}
    shown: set[str] = set()
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.fill(text, found) == text, f"python -m benchmarks.tables {RECORD.name}"
        shown |= {*re.findall(r"<!-- (\w+) -->", text)}
    assert shown >= {*tables.TABLES}
    assert len(tables.table("readme", found).splitlines()) == 2 + 5
    changed = partial(re.sub, r"\d\.\d\d", "9.99")
    page = (ROOT / "README.md").read_text()
    assert tables.fill(changed(page), found) != changed(page)
