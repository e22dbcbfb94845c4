"""The demo's pieces, and its command on a small run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fxparam import demo
from fxparam.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("rich")


def test_quick_run_agrees_hoists_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = demo.Settings(hidden=8, batch=8, steps=3, rounds=2, pixels=8)
    monkeypatch.setattr(demo, "QUICK", small)
    plot = tmp_path / "plot.png"
    assert main(["demo", "--quick", "--output", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "fxparam" in printed and "8 / 8" in printed and "1 / 1" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


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
