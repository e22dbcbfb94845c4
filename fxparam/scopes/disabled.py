"""``disabled()``: read the originals of parametrized tensors for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch.nn import Module

from fxparam.eager.checks import check_modules
from fxparam.eager.describe import first_names
from fxparam.scopes.models import adopt_models, names_of_lists

__all__ = ["disabled"]

# How many blocks each list is in: those of other threads may end in any order.
_blocks: WeakKeyDictionary[Module, int] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def disabled(model: Module, *names: str) -> Iterator[None]:
    """Read the originals of parametrized tensors in the block, as if nothing were parametrized.

    Nothing is removed or registered: compiled code is compiled once for each of the two states, and
    not again when the block is entered another time. The block acts on the tensors in all threads.
    Blocks nest.

    Args:
        model: a module. Parametrizations that were registered through torch are made ours for good,
            as :func:`fxparam.adopt` does.
        names: which tensors: their names, as ``"weight"``, for all modules in ``model``, or with
            the path of one module, as ``"layers.0.weight"``. All parametrized tensors if none is
            given.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a name is that of no parametrized tensor.
        RuntimeError: a tensor has several originals, or one that is no tensor, and so none that
            stands for its value.

    Example:
        >>> import torch
        >>> import fxparam
        >>> class Double(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> layer = fxparam.register_parametrization(torch.nn.Linear(2, 2), "weight", Double())
        >>> with fxparam.disabled(layer, "weight"):
        ...     print(layer.weight is layer.parametrizations.weight.original)
        True
    """
    chosen = _chosen(model, names)
    with _lock:
        for chain in chosen:
            _blocks[chain] = _blocks.get(chain, 0) + 1
            chain.__dict__["disabled"] = True
    try:
        yield
    finally:
        with _lock:
            for chain in chosen:
                _blocks[chain] -= 1
                if not _blocks[chain]:
                    del _blocks[chain], chain.__dict__["disabled"]


def _chosen(model: Module, names: tuple[str, ...]) -> list[Module]:
    """Return the parametrization lists of named tensors, which have one original each."""
    check_modules(model=model)
    lists = names_of_lists((model,))
    for name in names:
        if not any(_is_named(path, name) for path in lists.values()):
            raise ValueError(
                f"fxparam.disabled: no parametrized tensor of {type(model).__name__} has the name "
                f"'{name}'.\nfound: {first_names(sorted(lists.values()))}"
            )
    chosen = {
        chain: path
        for chain, path in lists.items()
        if not names or any(_is_named(path, name) for name in names)
    }
    for chain, path in chosen.items():
        if not chain.is_tensor:
            raise RuntimeError(
                f"fxparam.disabled: '{path}' has no original that stands for its value.\n"
                f"required: one original\nfound: {chain.ntensors}"
            )
    adopt_models((model,))
    return list(chosen)


def _is_named(path: str, name: str) -> bool:
    return path == name or path.rpartition(".")[2] == name
