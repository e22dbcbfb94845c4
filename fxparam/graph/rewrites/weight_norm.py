"""``torch._weight_norm`` becomes pointwise operations and a reduction.

Inductor calls ATen for the backward of ``torch._weight_norm``. What is written here it compiles to
one kernel forward and one backward, and ``vmap`` has rules for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxparam._torch.names import weight_norm_functions
from fxparam.graph.rewrites.rewrite import Call, Rewrite

__all__ = ["WEIGHT_NORM"]


def _is_right(call: Call) -> bool:
    v, g, dim = call.tensor("v"), call.tensor("g"), call.arguments["dim"]
    if v is None or g is None or not isinstance(dim, int) or not v.is_contiguous():
        return False
    # In half precision torch's kernel rounds once, and keeps the norms in float32.
    if v.dtype != g.dtype or v.dtype not in (torch.float32, torch.float64):
        return False
    if dim == -1:
        return g.dim() == 0
    return 0 <= dim < v.dim() > 1 and g.shape == tuple(_kept(v, dim))


def _kept(v: Tensor, dim: int) -> list[int]:
    return [size if i == dim else 1 for i, size in enumerate(v.shape)]


def _form(v: Tensor, g: Tensor, dim: int) -> Tensor:
    others = None if dim == -1 else [i for i in range(v.dim()) if i != dim]
    norms: Tensor = torch.linalg.vector_norm(v, 2, others, keepdim=dim != -1)
    return v * (g / norms)


WEIGHT_NORM = Rewrite(
    name="weight_norm",
    targets=frozenset(weight_norm_functions),
    parameters=("v", "g", "dim"),
    is_right=_is_right,
    form=_form,
    gains="forward and backward",
)
