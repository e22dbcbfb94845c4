"""State dicts of the model without parametrizations: a value for each parametrized tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fxparam._torch.dtensors import is_dtensor, placed_like, whole
from fxparam.eager import checks
from fxparam.eager.classes import chains_of
from fxparam.eager.engines import engine_of
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
    parametrized = list(_parametrized(model))
    below = tuple(f"{prefix}parametrizations.{name}." for prefix, _, name, _ in parametrized)
    found: dict[str, Any] = {}
    for key, stored in model.state_dict().items():
        if not key.startswith(below):
            found[key] = whole(stored) if full else stored
    values: dict[Module, Tensor] = {}
    for prefix, module, name, chain in parametrized:
        if chain not in values:
            values[chain] = _value(module, name, chain, full)
        found[f"{prefix}{name}"] = values[chain]
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
        RuntimeError: if ``strict`` and they are not, before anything is changed; if a
            parametrization has no ``right_inverse``.
        ValueError: if a right inverse refuses a value.

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
    parametrized = list(_parametrized(model))
    below = tuple(f"{prefix}parametrizations.{name}." for prefix, _, name, _ in parametrized)
    assigned = {f"{prefix}{name}": module for prefix, module, name, _ in parametrized}
    expected = {key for key in model.state_dict() if not key.startswith(below)} | {*assigned}
    if strict and expected != {*state_dict}:
        raise RuntimeError(
            "the state dict is not that of the model without parametrizations.\n"
            f"missing: {sorted(expected - {*state_dict})}\n"
            f"unexpected: {sorted({*state_dict} - expected)}"
        )
    rest = {key: value for key, value in state_dict.items() if key not in assigned}
    model.load_state_dict(rest, strict=False)
    for key, module in assigned.items():
        if key in state_dict:
            setattr(module, key.rpartition(".")[2], whole(state_dict[key]))


def _parametrized(model: Module) -> Iterator[tuple[str, Module, str, Module]]:
    """Yield parametrized tensors that no parametrization holds: prefix, module, name, list."""
    inside: set[Module] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        chains = chains_of(module)
        if chains is None or module in inside:
            continue
        inside.update(chains.modules())
        for name, chain in chains.items():
            yield f"{path}." if path else "", module, name, chain


def _value(module: Module, name: str, chain: Module, full: bool) -> Tensor:
    """Return the value of a parametrized tensor, detached."""
    with engine_of(module, name, chain), unchanged(chain), torch.no_grad():
        value: Tensor = getattr(module, name).detach().clone()
    if full:
        return whole(value)  # type: ignore[no-any-return]
    original = next(iter(chain._parameters.values()), None)
    return value if is_dtensor(value) or original is None else placed_like(value, original)
