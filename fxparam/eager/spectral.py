"""Spectral norm that warns where its vectors cannot be singular vectors: they were averaged.

Spectral norm divides by ``u @ W @ v``, where ``u`` and ``v`` are buffers of length one. A moving
average of a model with its buffers averages them, which makes them shorter, and the weight larger.
"""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from fxparam._torch.names import SpectralNormParametrization, is_plain_eager
from fxparam._torch.tensors import version_of

__all__ = ["CheckedSpectralNorm", "warn_if_averaged"]

# In bfloat16 the length of a vector that was made one is off by less.
_TOLERANCE = 0.01
# The version in which the vector of a module was looked at; -1 once there was a warning.
_seen: WeakKeyDictionary[Module, int | None] = WeakKeyDictionary()


class CheckedSpectralNorm(SpectralNormParametrization):  # type: ignore[misc]
    """torch's own, which ``adopt`` gives this class."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return a tensor divided by its spectral norm."""
        if not self.training and not torch.compiler.is_compiling() and weight.ndim > 1:
            warn_if_averaged(self, self._u)
        value: Tensor = super().forward(weight)
        return value


# As reports and printed models show it.
CheckedSpectralNorm.__name__ = SpectralNormParametrization.__name__


def warn_if_averaged(step: Module, vector: Tensor) -> None:
    """Warn once if the singular vector of a spectral norm in eval mode has not the length one.

    A vector that was not written since is not looked at again.

    Args:
        step: the parametrization.
        vector: its buffer, of shape ``(n,)``.
    """
    seen = _seen.get(step, 0)
    if seen == -1 or (step in _seen and seen == version_of(vector)) or not is_plain_eager():
        return
    if vector.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    _seen[step] = version_of(vector)
    length = torch.linalg.vector_norm(vector.detach()).item()
    if abs(length - 1) > _TOLERANCE:
        _seen[step] = -1
        warnings.warn(
            f"a spectral norm divides by too small a number: its singular vector _u has the length "
            f"{length:.3g}, and not 1.\n"
            "A moving average of a model does that if it averages buffers "
            "(AveragedModel(use_buffers=True)).\n"
            "Average the parameters alone. Read the weight some times in train() before eval(), "
            "so that the vectors follow.",
            stacklevel=2,
        )
