"""``frozen()``: one evaluation for all calls, in inference, until an original changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Module

from fxparam.scopes import store
from fxparam.scopes.dropped import without_originals
from fxparam.scopes.held import Values, state_of
from fxparam.scopes.models import adopt_models, lists_in
from fxparam.scopes.purity import evaluate_noting_effects
from fxparam.scopes.region import cached

__all__ = ["FrozenValues", "frozen", "frozen_call", "invalidate"]


class FrozenValues(Values):
    """Values that outlive the blocks and calls in which they are read, in whatever thread."""

    def __init__(self) -> None:
        super().__init__(kept=2)
        self._said: set[str] = set()
        _all.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how a copy is made, which begins without values."""
        return FrozenValues, ()

    def say(self, why: str) -> None:
        """Warn, once for each reason, that values are not held."""
        if why not in self._said:
            self._said.add(why)
            warnings.warn(f"a frozen scope of fxparam does not hold values {why}", stacklevel=2)


_all: WeakSet[FrozenValues] = WeakSet()


class FrozenRegion(store.Region):
    """A block or a call with values that outlive it.

    Args:
        frozen: these values.
        of_call: holds what cannot be frozen for as long as the call lasts; None to evaluate it at
            each access.
    """

    outlives_calls = True

    def __init__(self, frozen: FrozenValues, of_call: Values | None) -> None:
        super().__init__()
        self._frozen, self._of_call = frozen, of_call

    @property
    def shared(self) -> Values | None:
        """The values that a block in this region shares, other than frozen ones."""
        return self._of_call

    def for_block(self) -> store.Region:
        """Return the region for a ``cached()`` block in this one."""
        return self if self._of_call is not None else FrozenRegion(self._frozen, Values())

    @property
    def usable(self) -> bool:
        """Check whether the region has values for the running code."""
        if not super().usable:
            return False
        if self._of_call is None and torch.is_grad_enabled():
            self._frozen.say("whose gradients are recorded: use torch.no_grad()")
            return False
        return True

    def find(self, chain: Module, modes: tuple[object, ...]) -> Tensor | None:
        """Return the value that a new evaluation would give, or None."""
        held = None if torch.is_grad_enabled() else self._frozen.find(chain, modes)
        if held is None and self._of_call is not None:
            held = self._of_call.find(chain, modes)
        return None if held is None else held.value

    def keep(self, evaluation: store.Evaluation) -> Tensor:
        """Return a new value, and hold it for as long as it is right."""
        chain, name, modes, run = evaluation
        before = state_of(chain)
        if torch.is_grad_enabled():
            self._frozen.say("whose gradients are recorded: use torch.no_grad()")
            value, pure = run(), False
        else:
            value, pure = evaluate_noting_effects(chain, run, before)
            if not pure:
                self._frozen.say(
                    f"whose evaluations write tensors or draw random numbers: '{name}'"
                )
        if pure:
            # The state from before: another thread may have written by now.
            self._frozen.keep(chain, value, modes, before)
        elif self._of_call is not None:
            self._of_call.keep(chain, value, modes, state_of(chain))
        return value

    def forget(self, chain: Module) -> None:
        """Drop the values of a list."""
        self._frozen.forget(chain)
        if self._of_call is not None:
            self._of_call.forget(chain)


@contextmanager
def frozen_call(frozen: FrozenValues) -> Iterator[None]:
    """Read frozen values in the block, which is one call: it shares what cannot be frozen."""
    if torch.compiler.is_dynamo_compiling():  # in the graph of a model around
        with cached():
            yield
        return
    around = store.current()
    shared = None if around is None else around.shared
    with store.inside(FrozenRegion(frozen, Values() if shared is None else shared)):
        yield


@contextmanager
def frozen(*models: Module, drop_originals: bool = False) -> Iterator[None]:
    """Evaluate each parametrized tensor once for the whole block, in inference.

    Where no gradients are recorded (``torch.no_grad()``, ``torch.inference_mode()``), the first
    access of a tensor evaluates it, and all later ones get that value, in eager code and in code
    that is compiled with ``backend="fxparam"``. A value is handed out again only while a new
    evaluation would give the same; :func:`fxparam.cached` says what is compared. So
    ``optimizer.step()``, ``load_state_dict`` and assignments are noticed.

    Where gradients are recorded each access evaluates, as outside of the block. So does each access
    of a tensor whose evaluation writes tensors (a power iteration in training mode) or draws random
    numbers. A warning says so once.

    The block belongs to one thread of execution. ``fxparam.compile(model, scope="frozen")`` freezes
    values for the calls of a compiled model, in all threads.

    Args:
        models: modules whose parametrizations, registered through torch, are made ours for good, as
            :func:`fxparam.adopt` does. None is needed for what is ours already.
        drop_originals: True: the parametrized tensors of ``models`` are plain ones with their
            values, in the block and for all threads, and the originals' memory is given up. What
            they hold is kept in files, or in main memory for those on an accelerator, and put back
            at the end. The models must be in ``eval()`` mode. Their state dicts have the plain
            tensors.

    Raises:
        TypeError: if one of ``models`` is not a module; with ``drop_originals``, if there is none.
        RuntimeError: with ``drop_originals``, if a model is in training mode, at the begin or when
            it is called, or if an evaluation writes a tensor or draws a random number.

    Note:
        Writes that torch does not count are not noticed: those through ``tensor.data``, NumPy or
        DLPack, and by fused optimizers (``fused=True``). Call :func:`fxparam.invalidate` after
        them.

    Example:
        >>> import torch
        >>> import fxparam
        >>> model = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 3)).eval()
        >>> with fxparam.frozen(model), torch.no_grad():
        ...     print(model.weight is model.weight)
        True
    """
    adopt_models(models)
    if drop_originals:
        with without_originals(*models):
            yield
        return
    around = store.current()
    with store.inside(FrozenRegion(FrozenValues(), None if around is None else around.shared)):
        yield


def invalidate(*models: Module) -> None:
    """Drop the values that scopes hold of the parametrized tensors of models.

    Needed after writes that torch does not count: through ``tensor.data``, NumPy or DLPack, and by
    fused optimizers. All other writes are noticed.

    Args:
        models: modules, at least one.

    Raises:
        TypeError: if an argument is not a module, or there is none.

    Example:
        >>> import torch
        >>> import fxparam
        >>> model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3))
        >>> with fxparam.frozen(model), torch.no_grad():
        ...     before = model.weight
        ...     _ = model.parametrizations.weight.original1.data.mul_(-1)
        ...     fxparam.invalidate(model)
        ...     print(torch.equal(model.weight, -before))
        True
    """
    region = store.current()
    for chain in lists_in(models, "fxparam.invalidate"):
        if region is not None:
            region.forget(chain)
        for values in _all:
            values.forget(chain)
