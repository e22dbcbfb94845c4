"""``accumulate()``: one evaluation and one backward for all micro-batches of an optimizer step.

The block is a region whose values are cut off from their evaluations: readers get a leaf, on which
the gradients of all backwards add up. When the block ends, one backward carries the sums through
the evaluations into the originals.

A leaf belongs to its parametrization list and not to a thread, unlike the values of ``cached()``:
autograd runs backwards, and with them checkpointed functions again, in threads of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxparam._torch.names import checkpoint_around
from fxparam._torch.tensors import version_of
from fxparam.scopes import store
from fxparam.scopes.additive import check_additive
from fxparam.scopes.models import lists_in
from fxparam.scopes.snapshot import Snapshot

__all__ = ["accumulate"]


class _Step(store.Region):
    """The values of one ``accumulate()`` block.

    Args:
        names: the names of the parametrization lists that are evaluated once.
    """

    def __init__(self, names: dict[Module, str]) -> None:
        super().__init__()
        self._names = names
        # Each value, the leaf for its readers, and the node in which the leaf's gradients arrive.
        self._leaves: list[tuple[Tensor, Tensor, Any]] = []
        self._closed = False
        self._dtypes: dict[int, torch.dtype] = {}  # of values, by the identity of their leaves

    @property
    def usable(self) -> bool:
        """Check whether the block is open; in any thread, as autograd has threads of its own."""
        return self.depth > 0

    def evaluate(self, chain: Module, name: str) -> Tensor:
        """Return the leaf of a new evaluation; the value itself where it has no gradient."""
        with _outside_checkpoints():
            value: Tensor = chain()
        if not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf:
            return value
        if not all(map(_is_leaf, Snapshot(chain).objects)):
            return value  # a micro-batch computed an original, whose backward goes on through it
        check_additive(chain, value, self._names[chain])
        wide = _widest(chain, value)
        leaf = value.detach().to(wide).requires_grad_()
        self._dtypes[id(leaf)] = value.dtype
        node: Any = torch.autograd.graph.get_gradient_edge(leaf).node
        node.register_prehook(self._refuse_if_closed)  # a hook of the leaf Dynamo would see
        self._leaves.append((value, leaf, node))
        return leaf

    def keep(self, evaluation: store.Evaluation) -> Tensor:
        """Return a new value, evaluated by eager code, of whose backward all is to be seen."""
        run = partial(self.evaluate, evaluation.chain, evaluation.name)
        return super().keep(evaluation._replace(run=run))

    def hand_out(self, value: Tensor) -> Tensor:
        """Return what one reader gets: an alias of its own, or a cast to the value's precision.

        So a hook on it sees the gradient of this reader, as in eager code, and the gradients of
        casts are summed in the precision of the originals.
        """
        dtype = self._dtypes.get(id(value))
        if dtype is None:
            return value
        return value.view_as(value) if dtype == value.dtype else value.to(dtype)

    def forget(self, chain: Module) -> None:
        """Refuse an assignment: what was computed in the block has the value from before.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "an assignment to a parametrized tensor inside of fxparam.accumulate().\n"
            "required: originals that stay as they are until the block has ended\n"
            f"found: an assignment to {self._names[chain]}"
        )

    def owns(self, parameters: set[int]) -> str | None:
        """Return the name of a tensor that has one of the parameters, given by ``id()``."""
        for chain, name in self._names.items():
            if not parameters.isdisjoint(map(id, chain.parameters())):
                return name
        return None

    def differentiate(self) -> None:
        """Carry the gradients of all readers through each evaluation, once.

        In the reverse order of the evaluations: what an evaluation reads of another parametrized
        tensor, whose leaf thus gets its gradient, was evaluated before.
        """
        for value, leaf, _ in reversed(self._leaves):
            if leaf.grad is not None:
                _backward(value, leaf.grad)

    def close(self) -> None:
        """Let no gradient arrive any more, of what was computed in the block."""
        self._leaves.clear()
        self._closed = True

    def _refuse_if_closed(self, gradients: tuple[Tensor, ...]) -> None:
        """Raise RuntimeError if a gradient arrives that no original will get."""
        if self._closed:
            raise RuntimeError(
                "a backward after fxparam.accumulate() of what was computed inside of it.\n"
                "required: the backward in the block, which carries gradients to the originals\n"
                "found: a backward when it had ended"
            )


def _backward(value: Tensor, gradient: Tensor) -> None:
    """Carry a gradient through an evaluation.

    Raises:
        RuntimeError: if what the evaluation has saved was written.
    """
    parts = _parts(gradient, value)
    for left in range(parts - 1, -1, -1):
        try:
            value.backward((gradient / parts).to(value.dtype), retain_graph=left > 0)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "fxparam.accumulate() ends with one backward through the evaluations.\n"
                "required: originals and buffers that stay as they are until then\n"
                f"found: {error}"
            ) from error


def _is_leaf(held: object) -> bool:
    return not isinstance(held, Tensor) or held.is_leaf


def _outside_checkpoints() -> AbstractContextManager[Any]:
    """Return a context in which a checkpoint around does not see what is saved for backward.

    It counts what it saves, and finds no evaluation when it runs again.
    """
    if checkpoint_around() is None:
        return nullcontext()

    def pack(tensor: Tensor) -> tuple[Tensor, int | None]:
        return tensor.detach(), version_of(tensor)  # the tensor itself would hold its own graph

    def unpack(packed: tuple[Tensor, int | None]) -> Tensor:
        tensor, version = packed
        if version_of(tensor) != version:  # as autograd checks without hooks
            raise RuntimeError("a saved tensor has been modified by an inplace operation")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _widest(chain: Module, value: Tensor) -> torch.dtype:
    """Return the dtype in which the gradients of a value's readers are summed."""
    wide = value.dtype
    if not value.is_floating_point():  # complex: a float dtype with more bits has no such numbers
        return wide
    for tensor in chain.parameters():
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).eps < torch.finfo(wide).eps:
            wide = tensor.dtype
    return wide


def _parts(gradient: Tensor, value: Tensor) -> int:
    """Return into how many summands a gradient is split, for each to be finite in fewer bits.

    A power of two, so that the division is exact.
    """
    if gradient.dtype == value.dtype:
        return 1
    largest = gradient.abs().max().item() if gradient.numel() else 0.0
    room = torch.finfo(value.dtype).max / 2
    return 2 ** math.ceil(math.log2(largest / room)) if room < largest < math.inf else 1


@contextmanager
def accumulate(*models: Module) -> Iterator[None]:
    """Evaluate and differentiate each parametrized tensor once for all forwards and backwards.

    Use it around the micro-batches of one optimizer step. The first access of a tensor evaluates
    it; all later ones, in eager and compiled code, get that value. Each backward in the block adds
    to the gradient of the value. When the block ends, one backward for each parametrized tensor
    carries that gradient into the originals and adds it to their ``.grad``; until then the
    originals have none. Gradients are those of the same program without the block, up to rounding.
    Effects (a power iteration, a random mask) occur once in the block.

    An access in another grad or autocast mode is a new evaluation. Values in fewer bits than their
    originals have their gradients summed in the bits of the originals. The block costs the memory
    of one tensor for each parametrized tensor that was read, and of its gradient.

    Args:
        models: modules, at least one. All parametrized tensors in them are evaluated once; those
            that were registered through torch are made ours for good, as :func:`fxparam.adopt`
            does; old-style hooks are left alone.

    Raises:
        TypeError: if an argument is not a module, or there is none.
        RuntimeError: if the block is entered inside of one for the same tensor; if a custom
            ``autograd.Function`` in an evaluation is not additive in the gradient, or changes a
            state in backward; if an optimizer of the originals steps in the block, or a
            parametrized tensor is assigned or an original written there. If the block ends by an
            exception, no gradient reaches the originals.

    Source: gradient accumulation as in https://docs.pytorch.org/docs/stable/notes/amp_examples.html

    Example:
        >>> import torch
        >>> import fxparam
        >>> model = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with fxparam.accumulate(model):
        ...     for batch in torch.randn(8, 2, 3):
        ...         model(batch).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """
    step = _Step(lists_in(models, "fxparam.accumulate"))
    for chain, name in step._names.items():
        if store.step_of(chain) is not None:
            raise RuntimeError(
                f"fxparam.accumulate() inside of another one for the same tensor.\n"
                f"required: one block around all micro-batches of an optimizer step\n"
                f"found: {name} is in an open block already"
            )

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        name = step.owns(held)
        if name is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() inside of fxparam.accumulate().\n"
                f"required: the step after the block, which gives the originals their gradients\n"
                f"found: a step on the originals of {name}"
            )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        with store.stepping(step, step._names):
            yield
        step.differentiate()
    finally:
        step.close()
        hook.remove()
