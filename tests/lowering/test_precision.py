"""``multiplies_exactly`` follows torch's settings for products in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxparam.lowering.precision import multiplies_exactly, without_autocast

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def _settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def test_by_default_products_are_exact(_settings: None) -> None:
    for device in (CPU, CUDA):
        assert multiplies_exactly(torch.float32, device)
    torch.set_float32_matmul_precision("highest")
    for device in (CPU, CUDA):
        assert multiplies_exactly(torch.complex64, device)


def test_settings_for_float32_are_followed(_settings: None) -> None:
    torch.set_float32_matmul_precision("medium")
    for device in (CPU, CUDA):
        assert not multiplies_exactly(torch.float32, device)
        assert multiplies_exactly(torch.float64, device)


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu"), without_autocast(CPU):
        assert not torch.is_autocast_enabled("cpu")
    with without_autocast(CPU):
        assert not torch.is_autocast_enabled("cpu")
