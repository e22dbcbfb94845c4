"""The demo's pieces, and its command on a small run."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from fxparam import demo
from fxparam.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("rich")


def test_quick_run_agrees_hoists_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = demo.Settings(hidden=8, batch=8, seconds=0.2, turns=2, pixels=8)
    monkeypatch.setattr(demo, "QUICK", small)
    plot = tmp_path / "plot.png"
    assert main(["demo", "--quick", "--output", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "fxparam" in printed and "8 / 8" in printed and "1 / 1" in printed
    assert "seconds" in printed and "Each trained for 0 s" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def _fake(name: str, seconds_of_a_step: float) -> demo.Contestant:
    """A contestant whose steps take no time and are said to take some."""
    one = demo.Contestant(name, None)
    one.model = torch.nn.Linear(4, 10)
    one.batches = itertools.repeat((torch.zeros(1), torch.zeros(1)))
    one.step = lambda x, y: torch.tensor(1.0 / (1 + len(one.losses)))
    one.step_seconds = [seconds_of_a_step]
    return one


def test_a_way_trains_for_its_seconds_and_a_few_steps_at_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unit = torch.zeros(2, 4), torch.zeros(2)
    data = (*unit, *unit)
    for cost, steps in ((0.125, [8, 16]), (0.75, [5, 5]), (0.5, [5, 5, 6])):
        one, real = _fake("one", cost), demo._timed_step
        monkeypatch.setattr(demo, "_timed_step", lambda one, r=real, c=cost: r(one) * 0 + c)
        done = []
        for turn in range(1, len(steps) + 1):
            demo._train_turn(one, float(turn), data)
            done.append(len(one.losses))
        monkeypatch.setattr(demo, "_timed_step", real)
        assert done == steps
        assert one.seconds == cost * steps[-1]
        # A turn without a step has no point.
        assert [point.seconds for point in one.points] == [cost * n for n in sorted(set(steps))]


def test_a_point_is_the_mean_loss_since_the_last_and_reading_it_costs_no_training_time() -> None:
    one = _fake("one", 1.0)
    one.losses, one.seconds = [9.0, 2.0, 4.0], 3.0
    demo._add_point(one, 1, (torch.zeros(0), torch.zeros(0), torch.zeros(2, 4), torch.zeros(2)))
    assert one.seconds == 3.0
    assert (one.points[0].seconds, one.points[0].loss) == (3.0, 3.0)
    assert one.points[0].accuracy in (0.0, 1.0)


def test_all_ways_train_from_one_seed_on_the_same_batches() -> None:
    settings = demo.Settings(hidden=8, batch=8, seconds=0.1, turns=2, pixels=8)
    everyone = [demo.Contestant("eager", None), demo.Contestant("by hand", None, hoisted=True)]
    ticks: list[int] = []
    demo._train(everyone, settings, demo._digits(settings), lambda: ticks.append(1))
    steps = demo.compared_steps(everyone)
    assert len(ticks) == 4 and steps >= 5
    assert demo.largest_difference(everyone[1], everyone[0], steps) < 1e-4
    for one in everyone:
        assert one.seconds >= 0.1 and len(one.losses) == 1 + len(one.step_seconds)
        assert one.points[0].seconds == 0.0 and len(one.points) >= 2


def test_seconds_to_the_goal_are_those_of_the_first_point_that_reaches_it() -> None:
    one = demo.Contestant("one", None)
    one.points = [demo.Point(0.0, 2.0, 0.1), demo.Point(1.0, 1.0, 0.89)]
    assert one.seconds_to_goal is None
    one.points += [demo.Point(2.0, 0.5, 0.9), demo.Point(3.0, 0.4, 0.95)]
    assert one.seconds_to_goal == 2.0


def test_only_common_steps_are_compared() -> None:
    everyone = demo.contestants()
    for one in everyone:
        one.losses, one.evaluations = [1.0, 0.5], (1, 1)
    everyone[0].evaluations = (8, 8)
    everyone[2].losses = [1.0, 0.5, 0.1]
    assert demo.compared_steps(everyone) == 2 and demo.verdict(everyone, 8) == []
    for one in everyone:
        one.losses = [1.0] * 200
    assert demo.compared_steps(everyone) == 100
    everyone[2].losses = [1.0] * 99 + [2.0] + [1.0] * 100
    assert "fxparam: losses differ" in demo.verdict(everyone, 8)[0]


def test_the_verdict_can_fail() -> None:
    everyone = demo.contestants()
    for one in everyone:
        one.losses, one.evaluations = [1.0, 0.5], (1, 1)
    everyone[0].evaluations = (8, 8)
    assert demo.verdict(everyone, 8) == []
    everyone[2].losses = [1.0, 0.7]
    assert "fxparam: losses differ" in demo.verdict(everyone, 8)[0]
    everyone[2].losses, everyone[2].evaluations = [1.0, 0.5], (1, 8)
    assert "not (1, 1)" in demo.verdict(everyone, 8)[0]


@pytest.mark.parametrize("arguments", [[], ["no_such"]])
def test_unknown_commands_give_one_line_and_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cuda"], "no CUDA device"),
        (["--device", "foo"], "cpu and cuda"),
        (["--device", ""], "cpu and cuda"),
        (["--device", "meta"], "cpu and cuda"),
        (["--output", "no_such_folder/plot.png"], "not a file"),
        (["--output", "."], "not a file"),
    ],
)
def test_bad_arguments_are_plain_errors(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["demo", "--quick", *arguments]) == 2
    printed = capsys.readouterr().out
    assert says in printed and printed.count("\n") == 1


def test_a_missing_extra_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo", "--quick"]) == 2
    assert 'pip install "fxparam[demo]"' in capsys.readouterr().out
