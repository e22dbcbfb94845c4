"""Read the modes that change what an evaluation gives: grad, inference, autocast, dtype."""

from __future__ import annotations

from functools import cache

import torch

from fxparam._torch.names import active_modes, any_autocast, dispatch_depth, function_depth

__all__ = ["ambient", "ambient_mark", "present"]

_grad, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_dtype = torch.get_default_dtype


@cache
def _devices() -> tuple[str, ...]:
    """Return the kinds of device that may have autocast on."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def present() -> tuple[object, ...]:
    """Return all modes that change what an evaluation gives, mode objects included; quickly."""
    return (
        _grad(),
        _inference(),
        _dtype(),
        ambient() if any_autocast() else None,
        active_modes() if dispatch_depth() or function_depth() else None,
    )


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
