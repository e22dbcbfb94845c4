"""Old-style weight norm and spectral norm are computed by hooks, which fold does not evaluate away.

A program keeps nothing of the hooks but the names and shapes of the tensors that they read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import Module

from fxparam.eager.describe import first_names
from fxparam.eager.old_style import old_style_tensors

__all__ = ["refuse_model", "refuse_program"]


def refuse_model(model: object) -> None:
    """Raise ValueError if an old-style hook computes a tensor of a model that is to be folded."""
    if isinstance(model, Module):
        _refuse(old_style_tensors(model), "a hook computes")


def refuse_program(program: ExportedProgram) -> None:
    """Raise ValueError if a program has the tensors of old-style weight norm or spectral norm."""
    found = sorted({*_weight_norms(program.state_dict), *_spectral_norms(program.state_dict)})
    _refuse(found, "by the names and shapes in its state dict, the program computes")


def _refuse(found: list[str], how: str) -> None:
    if found:
        raise ValueError(
            "fold evaluates parametrizations, and not what the old-style "
            "torch.nn.utils.weight_norm and spectral_norm compute before each call of a module.\n"
            f"required: parametrized tensors\nfound: {how} {first_names(found)}\n"
            "Call fxparam.adopt(model), which parametrizes these tensors, and export then. Where "
            "the model's own code computes them, parametrize them, or export without fold."
        )


def _weight_norms(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the tensors whose norms and directions are there, in shapes that fit."""
    for key, direction in state.items():
        name = key.removesuffix("_v")
        norm = state.get(f"{name}_g")
        if name != key and isinstance(norm, Tensor) and name not in state:
            kept = [s for s, d in zip(norm.shape, direction.shape, strict=False) if s == d != 1]
            of_one_dimension = norm.ndim == direction.ndim and norm.numel() == math.prod(kept)
            if norm.ndim == 0 or (of_one_dimension and len(kept) <= 1):
                yield name


def _spectral_norms(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the tensors whose originals and singular vectors are there, in shapes that fit."""
    for key, original in state.items():
        name = key.removesuffix("_orig")
        vectors = [state[part] for part in (f"{name}_u", f"{name}_v") if part in state]
        are_vectors = [v.ndim for v in vectors] == [1, 1]
        fit = are_vectors and math.prod(v.numel() for v in vectors) == original.numel()
        if name != key and name not in state and fit:
            yield name
