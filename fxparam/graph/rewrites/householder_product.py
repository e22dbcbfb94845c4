"""``torch.linalg.householder_product`` becomes matrix products and a triangular solve."""

from __future__ import annotations

import torch

from fxparam.graph.rewrites.rewrite import Call, Rewrite
from fxparam.lowering.householder import compact_wy, is_like_torch
from fxparam.lowering.precision import multiplies_exactly

__all__ = ["HOUSEHOLDER_PRODUCT"]

_aten = torch.ops.aten


def _is_right(call: Call) -> bool:
    a, tau = call.tensor("a"), call.tensor("tau")
    if a is None or tau is None or call.autocast:
        return False
    return is_like_torch(a, tau) and multiplies_exactly(a.dtype, a.device)


HOUSEHOLDER_PRODUCT = Rewrite(
    name="householder_product",
    targets=frozenset(
        {
            torch.linalg.householder_product,
            torch.orgqr,
            "orgqr",
            _aten.linalg_householder_product.default,
            _aten.orgqr.default,
        }
    ),
    parameters=("a", "tau"),
    is_right=_is_right,
    form=compact_wy,
)
