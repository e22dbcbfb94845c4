"""``fxparam.compile``: ``torch.compile`` with fxparam's backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxparam


def test_compile_is_torch_compile() -> None:
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    torch.testing.assert_close(fxparam.compile(model)(x), model(x))

    @fxparam.compile(fullgraph=True)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    torch.testing.assert_close(double(x), x * 2)
    with pytest.raises(TypeError, match="int"):
        fxparam.compile(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="backend"):
        fxparam.compile(model, backend="eager")
