"""``reset_parameters()`` of a parametrized module: plain tensors are initialized, then assigned.

The classes of PyTorch initialize their tensors in place. Of a parametrized tensor they would write
to a value that is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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
        with _plain(module, list(chains)) as tensors:
            result = reset()
        for name, tensor in tensors.items():
            setattr(module, name, tensor.detach())
    return result


def _has_inverses(chain: Any) -> bool:
    steps: Sequence[Module] = [step for key, step in chain._modules.items() if key.isdigit()]
    return all(hasattr(step, "right_inverse") for step in steps)


@contextmanager
def _plain(module: Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Let a module hold plain tensors in the place of its parametrized ones."""
    chains = module._modules["parametrizations"]
    with torch.no_grad():
        tensors = {name: Parameter(getattr(module, name).clone()) for name in names}
    del module._modules["parametrizations"]
    before = dict(module._parameters)
    module._parameters.update(tensors)
    try:
        yield dict(tensors)
    finally:
        module._parameters.clear()
        module._parameters.update(before)
        module._modules["parametrizations"] = chains
