"""Old-style weight norm and spectral norm: folded once adopted, and refused before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxparam
from tests.eager.test_old_style import OwnNames, old

pytestmark = [
    # Export warns of what the hooks assign.
    pytest.mark.filterwarnings("ignore:The tensor attribute"),
    # Inside torch, when a program is decomposed.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]

CASES: list[Any] = [
    ("weight_norm", lambda: nn.Conv1d(2, 3, 2), "weight", {}, torch.ones(1, 2, 4)),
    ("weight_norm", lambda: nn.Conv1d(2, 3, 2), "weight", {"dim": None}, torch.ones(1, 2, 4)),
    ("weight_norm", OwnNames, "down_v", {"dim": 1}, torch.ones(1, 3)),
    ("spectral_norm", lambda: nn.Linear(1, 1), "weight", {}, torch.ones(1, 1)),
    ("spectral_norm", OwnNames, "up", {}, torch.ones(1, 3)),
]


@pytest.mark.parametrize(("norm", "build", "name", "options", "x"), CASES)
def test_a_model_is_folded_once_it_is_adopted(
    norm: str, build: Any, name: str, options: Any, x: torch.Tensor
) -> None:
    model = nn.Sequential(old(norm, build(), name, **options)).eval()
    y = model(x)
    plain = torch.export.export(model, (x,))
    for run in (
        lambda: fxparam.export(model, (x,), fold=True),
        lambda: fxparam.fold(plain),
        lambda: fxparam.fold(plain.run_decompositions()),
    ):
        with pytest.raises(ValueError, match=rf"found: .*\['0.{name}'\]\n.*fxparam.adopt"):
            run()
    program = fxparam.export(fxparam.adopt(model), (x,), fold=True)
    torch.testing.assert_close(program.module()(x), y)
    assert f"0.{name}" in program.state_dict
    assert not [key for key in program.state_dict if "original" in key or "_g" in key]


def test_export_leaves_the_hooks_in_the_model() -> None:
    model = nn.Sequential(
        old("weight_norm", nn.Linear(3, 3)), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    )
    x = torch.ones(1, 3)
    names = [name for name, _ in model.named_parameters()]
    program = fxparam.export(model, (x,))
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(program.module()(x), model(x))


def test_other_tensors_of_such_names_are_folded() -> None:
    class Gated(nn.Module):
        """Has a gain and a matrix under the names of weight norm, which multiplies neither."""

        def __init__(self) -> None:
            super().__init__()
            self.map_g, self.map_v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, 3))
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map_g.sum() * self.layer(x @ self.map_v)

    program = fxparam.export(Gated(), (torch.ones(1, 3),), fold=True)
    assert "layer.weight" in program.state_dict
