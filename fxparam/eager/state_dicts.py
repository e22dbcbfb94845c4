"""State dicts of the model without parametrizations: a value for each parametrized tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fxparam._torch.dtensors import is_dtensor, value_like, whole
from fxparam.eager import checks
from fxparam.eager.classes import chains_of
from fxparam.eager.engines import engine_of, innermost
from fxparam.eager.rollback import unchanged

__all__ = ["load_plain_state_dict", "plain_state_dict"]


def plain_state_dict(model: Module, *, full: bool = True) -> dict[str, Any]:
    """Return the state dict that ``model`` would have without its parametrizations.

    In place of ``cell.parametrizations.weight.original`` and what else a parametrization stores
    there is ``cell.weight``, with the present value. Each is evaluated once, and the model stays as
    it is, buffers that an evaluation writes included.

    Args:
        model: any module. Where its parameters are sharded, all ranks call this.
        full: True: tensors that ranks hold parts of are gathered. False: they are ``DTensor``s, as
            ``torch.distributed.checkpoint`` saves them; the value of a sharded original is sharded
            like it.

    Returns:
        Names to tensors that ask for no gradient, of the shapes and dtypes of the plain tensors.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.Linear(2, 3)
        >>> _ = fxparam.register_parametrization(layer, "weight", torch.nn.Tanh())
        >>> list(fxparam.plain_state_dict(layer))
        ['bias', 'weight']
        >>> torch.nn.Linear(2, 3).load_state_dict(fxparam.plain_state_dict(layer))
        <All keys matched successfully>
    """
    checks.check_modules(model=model)
    stored, parametrized = _parts(model)
    found = {key: whole(value) if full else value for key, value in stored.items()}
    values: dict[Module, Tensor] = {}
    for key, (module, chain) in parametrized.items():
        if chain not in values:
            values[chain] = _value(module, key.rpartition(".")[2], chain, full)
        found[key] = values[chain]
    return found


def load_plain_state_dict(
    model: Module, state_dict: Mapping[str, Any], strict: bool = True
) -> None:
    """Load what a model without parametrizations has saved.

    Parametrized tensors are assigned, through the right inverses of their parametrizations. What
    these store beside originals stays as it is.

    Args:
        model: any module. Where its parameters are sharded, all ranks call this.
        state_dict: as :func:`plain_state_dict` returns it, full or not.
        strict: whether each key must be in both.

    Raises:
        RuntimeError: if ``strict`` and they are not, or if a value has another shape than its
            tensor, before anything is changed; if a parametrization has no ``right_inverse``.
        ValueError: if a right inverse refuses a value. What comes before it was loaded by then, as
            by :meth:`torch.nn.Module.load_state_dict`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> class Double(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        ...     def right_inverse(self, y):
        ...         return y / 2
        >>> layer = fxparam.register_parametrization(torch.nn.Linear(1, 1), "weight", Double())
        >>> plain = torch.nn.Linear(1, 1).state_dict()
        >>> _ = plain["weight"].fill_(1.0)
        >>> fxparam.load_plain_state_dict(layer, plain)
        >>> layer.weight.item(), layer.parametrizations.weight.original.item()
        (1.0, 0.5)
    """
    checks.check_modules(model=model)
    stored, parametrized = _parts(model)
    expected = {*stored, *parametrized}
    if strict and expected != {*state_dict}:
        raise RuntimeError(
            "the state dict is not that of the model without parametrizations.\n"
            f"missing: {sorted(expected - {*state_dict})}\n"
            f"unexpected: {sorted({*state_dict} - expected)}"
        )
    assigned = {
        key: _fitting(value, key, *parametrized[key])
        for key, value in state_dict.items()
        if key in parametrized
    }
    rest = {
        key: value_like(value, stored[key]) if isinstance(stored.get(key), Tensor) else value
        for key, value in state_dict.items()
        if key not in parametrized
    }
    model.load_state_dict(rest, strict=False)
    for key, value in assigned.items():
        setattr(parametrized[key][0], key.rpartition(".")[2], value)


def _parts(model: Module) -> tuple[dict[str, Any], dict[str, tuple[Module, Any]]]:
    """Return what a model's state dict has of plain tensors, and its parametrized tensors.

    The latter by the keys that they have in a plain model, each with its module and its list.
    """
    stored, parametrized = model.state_dict(), {}
    inside: set[Module] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        chains = chains_of(module)
        if chains is None or module in inside:
            continue
        inside.update(chains.modules())
        for name, chain in chains.items():
            prefix = f"{path}." if path else ""
            below = f"{prefix}parametrizations.{name}."
            stored = {key: value for key, value in stored.items() if not key.startswith(below)}
            parametrized[f"{prefix}{name}"] = module, chain
    return stored, parametrized


def _fitting(value: Any, key: str, module: Module, chain: Any) -> Tensor:
    """Return a value for a parametrized tensor, whole and in the dtype of the tensor.

    Raises:
        RuntimeError: it has another shape than the tensor.
    """
    holder = innermost(chain)
    if holder.is_tensor and not chain.unsafe:
        model = holder.original
    else:
        model = _value(module, key.rpartition(".")[2], chain, full=False)
    if value.shape != model.shape:
        raise RuntimeError(
            f"size mismatch for {key}: the state dict has {tuple(value.shape)}, the model "
            f"{tuple(model.shape)}"
        )
    return whole(value).to(model.dtype)  # type: ignore[no-any-return]


def _value(module: Module, name: str, chain: Module, full: bool) -> Tensor:
    """Return the value of a parametrized tensor, detached."""
    with engine_of(module, name, chain), unchanged(chain), torch.no_grad():
        value: Tensor = getattr(module, name).detach().clone()
    if full:
        return whole(value)  # type: ignore[no-any-return]
    original = next(iter(chain._parameters.values()), None)
    return value if is_dtensor(value) or original is None else value_like(value, original)
