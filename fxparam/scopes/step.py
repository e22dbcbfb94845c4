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
from typing import Any, NoReturn

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
        # Values and the leaves for their readers; those in one list have one graph of autograd.
        self._leaves: list[list[tuple[Tensor, Tensor]]] = []
        self._nodes: list[Any] = []  # in which the gradients of leaves arrive
        self._dtypes: dict[int, torch.dtype] = {}  # of values, by the identity of their leaves

    @property
    def usable(self) -> bool:
        """Check whether the block is open; in any thread, as autograd has threads of its own."""
        return self.depth > 0

    def evaluate(self, new: store.Evaluations) -> list[Tensor]:
        """Return the leaves of new evaluations; the values themselves where they have no gradient.

        By eager code, of whose backward all is to be seen, unless more is known of what is
        compiled.
        """
        computed = [not all(map(_is_leaf, Snapshot(chain).objects)) for chain in new.chains]
        with _outside_checkpoints():
            if new.compiled is not None and new.additive and not any(computed):
                values, compiled = new.compiled(), True
            else:
                values, compiled = [chain() for chain in new.chains], False
        found: list[Tensor] = []
        group: list[tuple[Tensor, Tensor]] = []
        for chain, value, is_computed in zip(new.chains, values, computed, strict=True):
            # A micro-batch may have computed an original, whose backward goes on through it.
            if not is_computed and _has_graph(value):
                if not compiled:
                    check_additive(chain, value, self._names[chain])
                group.append((value, self._leaf(chain, value)))
                found.append(group[-1][1])
            else:
                found.append(value)
        self._leaves += [group] if compiled else [[each] for each in group]
        return found

    def _leaf(self, chain: Module, value: Tensor) -> Tensor:
        """Return what stands for a value, with its gradients summed in the widest precision."""
        leaf = value.detach().to(_widest(chain, value)).requires_grad_()
        self._dtypes[id(leaf)] = value.dtype
        self._nodes.append(torch.autograd.graph.get_gradient_edge(leaf).node)
        return leaf

    def hand_out(self, value: Tensor, hidden: bool = False) -> Tensor:
        """Return what one reader gets: an alias of its own, or a cast to the value's precision.

        So a hook on it sees the gradient of this reader, as in eager code, and the gradients of
        casts are summed in the precision of the originals.

        Args:
            value: the leaf, or a value without one.
            hidden: whether the reader is a compiled graph that does not return the value.
        """
        dtype = self._dtypes.get(id(value))
        if dtype is None or (hidden and dtype == value.dtype):
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
        for group in reversed(self._leaves):
            reached = [(value, leaf.grad) for value, leaf in group if leaf.grad is not None]
            if reached:
                _backward(reached)

    def close(self) -> None:
        """Let no gradient arrive any more, of what was computed in the block."""
        self._leaves.clear()
        for node in self._nodes:
            node.register_prehook(_refuse)  # a hook of the leaf Dynamo would see
        self._nodes.clear()


def _backward(reached: list[tuple[Tensor, Tensor]]) -> None:
    """Carry gradients through the evaluations of values.

    Args:
        reached: values of one graph of autograd, and the gradient of each.

    Raises:
        RuntimeError: if what the evaluations have saved was written.
    """
    parts = max(_parts(gradient, value) for value, gradient in reached)
    values = [value for value, _ in reached]
    if parts > 1:
        reached = [(value, gradient / parts) for value, gradient in reached]
    gradients = [gradient.to(value.dtype) for value, gradient in reached]
    for left in range(parts - 1, -1, -1):
        try:
            torch.autograd.backward(values, gradients, retain_graph=left > 0)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "fxparam.accumulate() ends with one backward through the evaluations.\n"
                "required: originals and buffers that stay as they are until then\n"
                f"found: {error}"
            ) from error


def _refuse(gradients: tuple[Tensor, ...]) -> NoReturn:
    """Raise RuntimeError: a gradient arrives that no original will get."""
    raise RuntimeError(
        "a backward after fxparam.accumulate() of what was computed inside of it.\n"
        "required: the backward in the block, which carries gradients to the originals\n"
        "found: a backward when it had ended"
    )


def _has_graph(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


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
