"""``torch.matrix_exp`` becomes an op with a cheaper backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fxparam.graph.rewrites.rewrite import Call, Rewrite
from fxparam.lowering import exponential

__all__ = ["MATRIX_EXP"]

_aten = torch.ops.aten


def _is_right(call: Call) -> bool:
    a = call.tensor("a")
    return a is not None and a.dtype in exponential.DTYPES and exponential.is_faster(a)


def _form(a: Tensor, max_bytes: int) -> Tensor:
    op = torch.ops.fxparam.matrix_exp
    value: Tensor = op(a, max_bytes) if a.dim() > 2 else op(a)
    return value


MATRIX_EXP = Rewrite(
    name="matrix_exp",
    targets=frozenset(
        {
            torch.matrix_exp,
            torch.linalg.matrix_exp,
            "matrix_exp",
            _aten.linalg_matrix_exp.default,
            _aten.matrix_exp.default,
        }
    ),
    parameters=("a",),
    is_right=_is_right,
    form=_form,
    bounded=True,
)
