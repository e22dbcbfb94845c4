"""``python -m fxparam kernels``, and where a command's model comes from."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fxparam.__main__ import main
from fxparam.explaining.example import Example, ExampleError, example_from, factory_at, run
from fxparam.explaining.generated import count

MODULE = """
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = weight_norm(nn.Linear(4, 4, bias=False))

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return {"x": x}

def make():
    return Tied(), torch.ones(2, 4)

def model_alone():
    return Tied()

def fails():
    raise OSError("no such checkpoint\\nsecond line")

not_callable = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "kernel_examples.py").write_text(MODULE)
    (tmp_path / "broken_examples.py").write_text("import nowhere_to_be_found")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("kernel_examples", None)
    return "kernel_examples"


def test_it_prints_what_changed_and_saves_the_code(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", f"{module}:make", "--save", str(tmp_path / "code")]) == 0
    header, kernels, launches, calls = capsys.readouterr().out.splitlines()
    assert header.split() == ["inductor", "fxparam"]
    assert kernels.startswith("kernels (C++)") and launches.startswith("launches")
    before, after = map(int, calls.removeprefix("calls of other ops").split())
    assert after < before
    saved = {path.name: path.read_text() for path in (tmp_path / "code").iterdir()}
    assert set(saved) == {f"{b}-{i}.py" for b in ("inductor", "fxparam") for i in (0, 1)}
    assert count([saved["fxparam-0.py"], saved["fxparam-1.py"]]).extern_calls == after
    assert all(ast.parse(code) for code in saved.values())


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("no colon", "'no colon' is not package.module:function"),
        ("nowhere:make", "cannot import 'nowhere': ModuleNotFoundError: No module named 'nowhere'"),
        (
            "broken_examples:make",
            "cannot import 'broken_examples': ModuleNotFoundError: "
            "No module named 'nowhere_to_be_found'",
        ),
        ("{}:nix", "'kernel_examples' has no function 'nix': found nothing"),
        ("{}:not_callable", "'kernel_examples' has no function 'not_callable': found int"),
        ("{}:fails", "kernel_examples:fails failed: OSError: no such checkpoint"),
        (
            "{}:model_alone",
            "kernel_examples:model_alone must return a model and its inputs, (model, x): "
            "found Tied",
        ),
    ],
)
def test_a_wrong_target_is_a_line_and_code_2(
    module: str, target: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", target.format(module)]) == 2
    assert capsys.readouterr().err == f"fxparam kernels: {line}\n"


def test_what_a_factory_may_return() -> None:
    model, x = nn.Linear(2, 2), torch.ones(1)
    assert example_from((model, x), "it") == Example(model, (x,))
    assert example_from((model, (x, 2)), "it") == Example(model, (x, 2))
    assert example_from((model, {"x": x}), "it") == Example(model, (), {"x": x})
    assert example_from((model, (x,), {"y": 1}), "it") == Example(model, (x,), {"y": 1})
    for wrong in (model, (x, model, 1), (1, x), None):
        with pytest.raises(ExampleError, match="must return a model and its inputs"):
            example_from(wrong, "it")
    assert factory_at(f"{__name__}:_example")().model is not None


def _example() -> tuple[nn.Module, torch.Tensor]:
    return weight_norm(nn.Linear(2, 2)), torch.ones(1, 2)


def test_a_run_goes_backward_where_there_are_gradients() -> None:
    model, x = _example()
    original = model.parametrizations.weight.original0
    with torch.no_grad():
        run(Example(model, (x,)), model)
    assert original.grad is None
    run(Example(model, (x,)), model, [original])
    assert original.grad is None
    run(Example(model, (x,)), model)
    assert original.grad is not None


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("demo", "explain", "kernels", "bench"))
