"""An AttributeError in a parametrization is not one of the module: it is named as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam


class _Misspelt(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scael


def _in_region(layer: nn.Module, x: Tensor) -> Any:
    with fxparam.cached():
        return layer(x)


def _compiled(layer: nn.Module, x: Tensor, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(layer, backend=fxparam.backend("eager"), **options)(x)


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "read": lambda layer, x: layer.weight,
    "called": lambda layer, x: layer(x),
    "in a region": _in_region,
    "compiled": _compiled,
    "compiled whole": lambda layer, x: _compiled(layer, x, fullgraph=True),
    "traced": lambda layer, x: fxparam.symbolic_trace(layer, example_inputs=(x,)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_error_is_named(way: str) -> None:
    if way in ("compiled whole", "traced") and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 does not say what traced code raises")
    layer = nn.Linear(3, 3)
    fxparam.register_parametrization(layer, "weight", _Misspelt(), unsafe=True)
    with pytest.raises(Exception, match="scael") as info:
        WAYS[way](layer, torch.randn(2, 3))
    assert not isinstance(info.value, AttributeError)
    if way in ("read", "called", "in a region", "compiled"):
        assert isinstance(info.value, RuntimeError)
        assert isinstance(info.value.__cause__, AttributeError)
        assert "Linear.weight" in str(info.value)
