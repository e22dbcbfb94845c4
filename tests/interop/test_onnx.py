"""ONNX: programs with parametrizations, and with them folded, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fxparam

pytest.importorskip("onnxscript")
onnxruntime: Any = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore::")


class Net(nn.Module):
    """A convolution, and a cell that is read at each of ``steps`` steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(4, 4, 3, padding=1, groups=2), dim=2)
        self.cell = spectral_norm(nn.Linear(4, 4))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.conv(x)).mean(-1)
        for _ in range(self.steps):
            h = torch.tanh(self.cell(h))
        return h


def _onnx(model: nn.Module, x: Tensor, path: Path, *, fold: bool) -> Any:
    program = fxparam.export(model, (x,), fold=fold)
    torch.onnx.export(program, f=str(path), dynamo=True, verbose=False, external_data=False)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("fold", [False, True])
def test_equal_outputs(fold: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(3).eval(), torch.randn(2, 4, 6)
    session = _onnx(model, x, tmp_path / "net.onnx", fold=fold)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_folded_orthogonal_weight(tmp_path: Path) -> None:
    # The file holds the value alone, whatever operations the parametrization needs.
    torch.manual_seed(0)
    model, x = orthogonal(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    session = _onnx(model, x, tmp_path / "orthogonal.onnx", fold=True)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_file_does_not_grow_with_the_accesses(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6)

    def growth(fold: bool) -> int:
        """Bytes of one more step."""
        sizes = []
        for steps in (4, 8):
            path = tmp_path / f"{steps}.onnx"
            _onnx(Net(steps).eval(), x, path, fold=fold)
            sizes.append(path.stat().st_size)
        return (sizes[1] - sizes[0]) // 4

    # What a step adds is its own operations alone, as with plain weights.
    assert growth(False) == pytest.approx(growth(True), rel=0.1)
