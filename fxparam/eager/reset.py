"""``reset_parameters()`` of a parametrized module: plain tensors are initialized, then assigned.

The classes of PyTorch initialize their tensors in place. Of a parametrized tensor they would write
to a value that is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Module, Parameter

from fxparam.eager.describe import first_names, kind_of
from fxparam.eager.rollback import unchanged_if_refused

__all__ = ["reset_parameters"]


def reset_parameters(module: Module, reset: Callable[[], Any]) -> Any:
    """Call the ``reset_parameters`` of a parametrized module's own class.

    Args:
        module: the module.
        reset: calls that function.

    Raises:
        RuntimeError: if a parametrization has no ``right_inverse``. Nothing is changed then.
    """
    chains: Any = module._modules.get("parametrizations") or {}
    if not chains:  # none yet: the class is being instantiated
        return reset()
    lacking = [name for name, chain in chains.items() if not _has_inverses(chain)]
    if lacking:
        raise RuntimeError(
            f"{kind_of(module)}.reset_parameters() assigns its parametrized tensors, which needs "
            "the right_inverse of each parametrization.\n"
            f"without one: {first_names(lacking)}\n"
            "Implement it, or initialize the original tensors instead."
        )
    with unchanged_if_refused(module):
        with torch.no_grad():
            plain = {name: Parameter(getattr(module, name).clone()) for name in chains}
        submodules = dict(module._modules)
        del module._modules["parametrizations"]
        module._parameters.update(plain)
        result = reset()
        # The function may have bound other tensors to these names.
        values = {name: module._parameters.pop(name) for name in plain}
        now = dict(module._modules)
        module._modules.clear()
        module._modules.update({**submodules, **now})
        for name, value in values.items():
            setattr(module, name, value.detach())  # type: ignore[union-attr]
    return result


def _has_inverses(chain: Any) -> bool:
    steps: Sequence[Module] = [step for key, step in chain._modules.items() if key.isdigit()]
    return all(hasattr(step, "right_inverse") for step in steps)
