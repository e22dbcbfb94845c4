"""Read the modes that change what an evaluation gives: grad, inference, autocast, dtype."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["ambient", "ambient_mark"]


@cache
def _devices() -> tuple[str, ...]:
    """Return the kinds of device that may have autocast on."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def ambient() -> tuple[object, ...]:
    """Return the modes that change what an evaluation gives, apart from mode objects."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        *(
            torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None
            for d in _devices()
        ),
    )


def ambient_mark() -> str:
    """Return the modes of :func:`ambient` as one text, which Dynamo can trace as a constant."""
    return ",".join(map(str, ambient()))
