"""A product of Householder reflectors in matrix products and one triangular solve.

    H_1 H_2 ... H_k = I - V T V^H        H_i = I - tau_i v_i v_i^H

T is the upper triangular matrix of the compact WY form: T^-1 = diag(1 / tau) + striu(V^H V). It is
had from (I + diag(tau) striu(V^H V)) T = diag(tau), in which no tau is divided by: a reflector with
tau = 0 is the identity.

``torch.linalg.householder_product`` differentiates the reflectors one by one. The form here is
differentiated by autograd, at the cost of a few products.

Source: Schreiber and Van Loan, A Storage-Efficient WY Representation for Products of Householder
Transformations, SIAM J. Sci. Stat. Comput. 10 (1989), 53.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxparam.lowering.asked import asks_for_gradients
from fxparam.lowering.precision import is_autocast_enabled, multiplies_exactly

__all__ = ["DTYPES", "compact_wy", "householder_product", "is_like_torch"]

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def householder_product(a: Tensor, tau: Tensor) -> Tensor:
    """Return ``torch.linalg.householder_product`` up to rounding.

    It is torch's own where no gradient will be asked for, in code that is traced, under autocast,
    and where products are made in less precision than the dtype's.

    Args:
        a: shape ``(..., m, n)``, ``m >= n``; the reflectors are below its diagonal.
        tau: shape ``(..., k)``, ``k <= n``.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.linalg.householder_product.html

    >>> import torch
    >>> a = torch.zeros(3, 2, requires_grad=True)
    >>> householder_product(a, torch.tensor([2.0, 0.0])).detach()
    tensor([[-1.,  0.],
            [ 0.,  1.],
            [ 0.,  0.]])
    """
    if not asks_for_gradients(a, tau) or not is_like_torch(a, tau):
        return torch.orgqr(a, tau)
    if is_autocast_enabled(a.device) or not multiplies_exactly(a.dtype, a.device):
        return torch.orgqr(a, tau)
    return compact_wy(a, tau)


def is_like_torch(a: Tensor, tau: Tensor) -> bool:
    """Check whether torch takes these tensors too, or whether there is nothing to compute."""
    shaped = a.dim() > 1 and tau.shape[:-1] == a.shape[:-2] and a.shape[-2] >= a.shape[-1]
    filled = shaped and 0 < tau.shape[-1] <= a.shape[-1] and a.numel() > 0
    return filled and a.dtype == tau.dtype and a.dtype in DTYPES and a.device == tau.device


def compact_wy(a: Tensor, tau: Tensor) -> Tensor:
    """Return the product of the reflectors; the arguments are not checked."""
    m, n, k = a.shape[-2], a.shape[-1], tau.shape[-1]
    # The product is made transposed: torch's own has columns next to each other in memory.
    transposed = torch.eye(n, m, dtype=a.dtype, device=a.device)
    eye = torch.transpose(transposed, -2, -1)
    v = torch.tril(a[..., :k] if k < n else a, -1) + eye[:, :k]
    factors = torch.unsqueeze(tau, -1)
    inner = eye[:k, :k] + factors * torch.triu(torch.adjoint(v) @ v, 1)
    upper = factors * torch.adjoint(v[..., :n, :])
    solved = torch.linalg.solve_triangular(inner, upper, upper=True, unitriangular=True)
    product = torch.transpose(solved, -2, -1) @ torch.transpose(v, -2, -1)
    return torch.transpose(transposed - product, -2, -1)
