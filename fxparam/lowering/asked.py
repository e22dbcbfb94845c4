"""Where eager code takes a cheaper form: where a gradient is asked for, and nobody traces."""

from __future__ import annotations

import torch
from torch import Tensor

from fxparam._torch.names import tracing_state

__all__ = ["asks_for_gradients"]


def asks_for_gradients(*tensors: Tensor) -> bool:
    """Check whether autograd will record what is computed from some tensors.

    False as well in code that is traced. What is compiled, the backend lowers, which knows more;
    exported programs hold torch's own ops.
    """
    traced = torch.compiler.is_compiling() or tracing_state() is not None
    if traced or not torch.is_grad_enabled():
        return False
    # A proxy of torch.fx is no tensor.
    plain = all(isinstance(tensor, Tensor) for tensor in tensors)
    return plain and any(tensor.requires_grad for tensor in tensors)
