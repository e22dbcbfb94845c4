"""Spectral norms of averaged models say that their vectors are no singular vectors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxparam
from tests.eager.test_old_style import old

X = torch.ones(1, 16)
MAKERS: list[Any] = [
    lambda: fxparam.adopt(spectral_norm(nn.Linear(16, 16))),
    lambda: fxparam.adopt(old("spectral_norm", nn.Linear(16, 16))),
]


def average(model: Any, **options: Any) -> Any:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), **options)
    for _ in range(20):
        with torch.no_grad():
            model.parametrizations.weight.original.copy_(torch.randn(16, 16))
        model(X)
        averaged.update_parameters(model)
    return averaged.module


@pytest.mark.parametrize("make", MAKERS)
def test_averaged_vectors_are_warned_of_once(make: Any) -> None:
    torch.manual_seed(0)
    averaged = average(make(), use_buffers=True).eval()
    with pytest.warns(UserWarning, match=r"too small a number(.|\n)*use_buffers=True"):
        assert torch.linalg.matrix_norm(averaged.weight, 2) > 1.1
    averaged(X)
    # As the message says: in training mode the vectors get the length one.
    other = average(make(), use_buffers=True)
    other.parametrizations.weight.train()
    for _ in range(50):
        other(X)
    assert torch.linalg.matrix_norm(other.eval().weight, 2) < 1.1


@pytest.mark.parametrize("make", MAKERS)
def test_other_models_are_left_in_peace(make: Any) -> None:
    torch.manual_seed(0)
    for model in (make(), average(make()), make().to(torch.bfloat16), make().double()):
        model.eval()
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.weight.shape == (16, 16)
    loaded = make().eval()
    loaded.load_state_dict(make().state_dict())
    assert "_SpectralNorm" in str(loaded) or "SpectralNormOfHook" in str(loaded)
    loaded(X)
    torch.compile(loaded, backend="eager", fullgraph=True)(X)
    torch.export.export(loaded, (X,))


def test_a_vector_is_looked_at_when_it_was_written() -> None:
    looked = []
    layer: Any = MAKERS[0]().eval()
    step = layer.parametrizations.weight[0]
    with pytest.MonkeyPatch.context() as patch:
        length = torch.linalg.vector_norm
        patch.setattr(torch.linalg, "vector_norm", lambda v: looked.append(1) or length(v))
        for _ in range(3):
            layer(X)
        assert len(looked) == 1
        step._u.mul_(1.001)
        layer(X)
        layer(X)
        assert len(looked) == 2


def test_a_vector_that_is_normed_has_no_singular_vectors() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    layer: Any = fxparam.adopt(spectral_norm(Scale(), "scale")).eval()
    torch.testing.assert_close(layer.scale.norm(), torch.ones(()))
