"""``frozen()``: one evaluation for all calls, in inference, until an original changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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

__all__ = ["FrozenValues", "frozen", "invalidate", "region_of_call"]


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

    @property
    def noting(self) -> Values | None:
        """What holds the values of present modes; None where nothing does."""
        return self._of_call if torch.is_grad_enabled() else self._frozen

    def keep(self, new: store.Evaluations) -> Sequence[Tensor]:
        """Return new values, and hold them for as long as they are right."""
        before = list(map(state_of, new.chains))
        run = partial(self.evaluate, new)
        if torch.is_grad_enabled():
            self._frozen.say("whose gradients are recorded: use torch.no_grad()")
            values, pure = run(), [False] * len(before)
        else:
            values, pure = evaluate_noting_effects(new.chains, run, before)
            if not all(pure):
                name = new.names[pure.index(False)]
                self._frozen.say(
                    f"whose evaluations write tensors or draw random numbers: '{name}'"
                )
        for chain, value, is_pure, was in zip(new.chains, values, pure, before, strict=True):
            if is_pure:
                # The state from before: another thread may have written by now.
                self._frozen.keep(chain, value, new.modes, was, together=new.together)
            elif self._of_call is not None:
                self._of_call.keep(
                    chain, value, new.modes, state_of(chain), new.saved, new.together
                )
        return values

    def forget(self, chain: Module) -> None:
        """Drop the values of a list."""
        self._frozen.forget(chain)
        if self._of_call is not None:
            self._of_call.forget(chain)


def region_of_call(frozen: FrozenValues) -> FrozenRegion:
    """Return the region of one call, which shares what cannot be frozen."""
    around = store.current()
    shared = None if around is None else around.shared
    return FrozenRegion(frozen, Values() if shared is None else shared)


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
