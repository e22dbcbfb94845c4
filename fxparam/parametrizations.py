"""A drop-in for ``torch.nn.utils.parametrizations``: the same arguments, values and state dicts.

Tensors are registered with :func:`fxparam.register_parametrization`, so that modules pickle and
share classes. ``orthogonal`` computes with the cheaper forms of its maps in eager code, too.

>>> import torch
>>> layer = orthogonal(torch.nn.Linear(20, 40))
>>> torch.dist(layer.weight.T @ layer.weight, torch.eye(20)) < 1e-5
tensor(True)
>>> list(layer.state_dict())
['bias', 'parametrizations.weight.original', 'parametrizations.weight.0.base']
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Module

from fxparam._torch.dtensors import is_dtensor
from fxparam._torch.names import (
    OrthogonalMaps,
    OrthogonalParametrization,
    WeightNormParametrization,
)
from fxparam.eager.classes import chain_of
from fxparam.eager.describe import spelled
from fxparam.eager.engines import engine_of
from fxparam.eager.pickling import WeightNormKeys
from fxparam.eager.register import register_parametrization
from fxparam.eager.spectral import CheckedSpectralNorm
from fxparam.lowering.exponential import matrix_exp
from fxparam.lowering.householder import householder_product

__all__ = ["orthogonal", "spectral_norm", "weight_norm"]

M = TypeVar("M", bound=Module)


class _Orthogonal(OrthogonalParametrization):  # type: ignore[misc]
    """torch's own, with its exponential and its reflectors in cheaper forms."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the orthogonal matrices of some originals: shape ``(..., m, n)``."""
        if self.orthogonal_map == OrthogonalMaps.cayley:
            value: Tensor = super().forward(x)
            return value
        m, n = x.shape[-2], x.shape[-1]  # of ``x``: of its transpose a tracer knows no sizes
        wide = m < n
        tall = x.mT if wide else x
        reflected = self.orthogonal_map == OrthogonalMaps.householder
        q = _reflected(tall) if reflected else _rotated(tall, max(m, n), min(m, n))
        if hasattr(self, "base"):
            q = self.base @ q
        return q.mT if wide else q


def _reflected(x: Tensor) -> Tensor:
    """Return a product of reflectors, its columns with the signs of the diagonal of ``x``."""
    a = x.tril(-1)
    q = householder_product(a, 2.0 / (1.0 + (a * a).sum(-2)))
    return q * x.diagonal(dim1=-2, dim2=-1).int().unsqueeze(-2)


def _rotated(x: Tensor, n: int, k: int) -> Tensor:
    """Return the first columns of the exponential of a skew-Hermitian matrix; ``x`` is n x k."""
    lower = x.tril()
    if n != k:
        lower = torch.nn.functional.pad(lower, (0, n - k))
    return matrix_exp(lower - lower.mH)[..., :k]


def orthogonal(
    module: M,
    name: str = "weight",
    orthogonal_map: str | None = None,
    *,
    use_trivialization: bool = True,
) -> M:
    """``torch.nn.utils.parametrizations.orthogonal``, with a cheaper backward.

    Args:
        module: the module; changed in place.
        name: a tensor of it, of shape ``(..., m, n)``.
        orthogonal_map: ``"matrix_exp"``, ``"cayley"`` or ``"householder"``. Default: the first if
            the matrix is square or complex, else the last.
        use_trivialization: keep the present value as a base, to be multiplied with.

    Raises:
        ValueError: there is no such tensor or map, the tensor has less than two dimensions, or it
            is complex where reflectors are asked for. ``module`` is then as before.

    Source: :func:`torch.nn.utils.parametrizations.orthogonal`.
    """
    with _tensor(module, name) as weight:
        if weight.ndim < 2:
            raise ValueError(
                f"orthogonal needs matrices.\nrequired: at least 2 dimensions\nfound: {weight.ndim}"
            )
        square = weight.shape[-2] == weight.shape[-1] or weight.is_complex()
        chosen = orthogonal_map or ("matrix_exp" if square else "householder")
        if chosen not in OrthogonalMaps.__members__:
            known = ", ".join(map(repr, OrthogonalMaps.__members__))
            raise ValueError(
                f"orthogonal_map must be one of {known}: got {spelled(orthogonal_map)}"
            )
        step = _Orthogonal(weight, OrthogonalMaps[chosen], use_trivialization=use_trivialization)
        return register_parametrization(module, name, step, unsafe=True)


def weight_norm(module: M, name: str = "weight", dim: int | None = 0) -> M:
    """``torch.nn.utils.parametrizations.weight_norm``, which also loads old state dicts.

    Args:
        module: the module; changed in place.
        name: a tensor of it.
        dim: the dimension that keeps a norm for each of its indices; None for one norm in all.

    Raises:
        ValueError: there is no such tensor. ``module`` is then as before.

    Source: :func:`torch.nn.utils.parametrizations.weight_norm`.
    """
    with _tensor(module, name):
        register_parametrization(module, name, WeightNormParametrization(dim), unsafe=True)
    module._register_load_state_dict_pre_hook(WeightNormKeys(name))  # type: ignore[no-untyped-call]
    return module


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> M:
    """``torch.nn.utils.parametrizations.spectral_norm``.

    Args:
        module: the module; changed in place.
        name: a tensor of it.
        n_power_iterations: made at each evaluation in training.
        eps: added to norms that are divided by.
        dim: the dimension of the outputs. Default: 1 for transposed convolutions, else 0.

    Raises:
        ValueError: there is no such tensor, or no iterations are asked for.
        IndexError: there is no such dimension. ``module`` is then as before.

    Source: :func:`torch.nn.utils.parametrizations.spectral_norm`.
    """
    if dim is None:
        dim = int(isinstance(module, (ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)))
    with _tensor(module, name) as weight:
        step = CheckedSpectralNorm(weight, n_power_iterations, dim, eps)
        return register_parametrization(module, name, step)


@contextmanager
def _tensor(module: Module, name: str) -> Iterator[Tensor]:
    """Return a tensor of a module, which is whole in the block.

    Raises:
        ValueError: the module has no tensor of that name, or it is a ``DTensor``.
    """
    with engine_of(module, name, chain_of(module, name)):
        yield _checked(module, name, getattr(module, name, None))


def _checked(module: Module, name: str, found: object) -> Tensor:
    if is_dtensor(found):
        raise ValueError(
            f"{name!r} of {type(module).__name__} is a DTensor, on which this parametrization is "
            "not computed.\nrequired: a tensor that is whole on each rank\n"
            f"found: a DTensor placed as {found.placements}\nRegister first, then parallelize "
            "with fxparam.distributed.ParametrizedParallel(style)."
        )
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the module has no tensor to parametrize.\n"
            f"required: a parameter or buffer {name!r} of {type(module).__name__}\n"
            f"found: {spelled(found)}"
        )
    return found
