"""Parametrized tensors whose values are tensor subclasses, most of which export cannot trace.

To be folded they are evaluated in front of the tracing: a copy of the model holds what they are
worth as plain tensors. Whether a plain tensor does in a subclass's place depends on the operations
that the subclass defines, so that both models are run on the example and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fxparam._torch.names import tree_map
from fxparam._torch.tensors import is_wrapper_subclass
from fxparam.eager.adopt import adopt_classes
from fxparam.eager.classes import chain_of, chains_of
from fxparam.eager.install import uninstall
from fxparam.scopes.snapshot import Snapshot

__all__ = ["SubclassValue", "subclass_values", "with_plain_values"]


class SubclassValue(NamedTuple):
    """The value of a parametrized tensor that is of a tensor subclass.

    Attributes:
        value: the value.
        constant: whether evaluating it writes nothing, and gives the same each time.
    """

    value: Tensor
    constant: bool

    @property
    def kind(self) -> str:
        """Return the name of the subclass."""
        return type(self.value).__name__


def subclass_values(model: Module) -> dict[str, SubclassValue]:
    """Return the values of parametrized tensors that are of a subclass, by qualified names.

    They are evaluated on a copy of the model; none are returned where that fails.
    """
    found: dict[str, SubclassValue] = {}
    with suppress(Exception), torch.no_grad(), torch.random.fork_rng():
        for path, module in copy.deepcopy(model).named_modules():
            for name in chains_of(module) or ():
                chain: Any = chain_of(module, name)
                before = Snapshot(chain)
                value = chain()
                if type(value) not in (Tensor, Parameter):
                    constant = Snapshot(chain) == before and _is_equal(value, chain())
                    found[f"{path}.{name}".lstrip(".")] = SubclassValue(value, constant)
    return found


def with_plain_values(
    model: Module, values: dict[str, SubclassValue], args: Any, kwargs: Any
) -> Module:
    """Return a copy of a model that holds plain tensors for values that are subclasses.

    The copy has the other parameters and buffers in common with the model, which is not changed.

    Raises:
        ValueError: if a value is not the same each time or cannot be made plain, or if the copy
            computes something else.
    """
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, held)
    adopt_classes(plain)
    for full, value in values.items():
        if not value.constant:
            raise _refused(full, value, "evaluating it writes, or gives another value each time")
        tensor = _plain(value.value)
        if tensor is None:
            raise _refused(full, value, "it gives no plain tensor of its shape and dtype")
        path, _, name = full.rpartition(".")
        module = plain.get_submodule(path)
        originals = chain_of(module, name).parameters(recurse=False)
        asks = [original.requires_grad for original in originals]
        uninstall(module, name, Parameter(tensor, any(asks)) if asks else tensor)
    expected, actual = (_result(each, args, kwargs) for each in (model, plain))
    try:
        torch.testing.assert_close(actual, expected)
    except AssertionError as error:
        full, value = next(iter(values.items()))
        raise _refused(
            full, value, "with plain values the model computes another result"
        ) from error
    return plain


def _is_equal(one: Tensor, other: Tensor) -> bool:
    pair = _plain(one), _plain(other)
    return pair[0] is None or pair[1] is None or torch.equal(pair[0], pair[1])


def _plain(value: Any) -> Tensor | None:
    """Return a plain tensor of the values of one of a subclass; None if none can be had."""
    ways: list[Callable[[], Any]] = [lambda: value.as_subclass(Tensor)]
    if is_wrapper_subclass(value):
        # A sharded tensor; one that is stored in another form; one that computes with another.
        ways = [lambda: value.full_tensor(), lambda: value.dequantize(), lambda: value * 1]
    for way in ways:
        with suppress(Exception):
            tensor = way()
            if type(tensor) is Tensor and (tensor.shape, tensor.dtype) == (
                value.shape,
                value.dtype,
            ):
                return tensor.detach().clone()
    return None


def _result(model: Module, args: Any, kwargs: Any) -> Any:
    """Return what a copy of a model gives for a copy of its inputs, with plain tensors in it."""
    with torch.no_grad(), torch.random.fork_rng():
        result = copy.deepcopy(model)(*copy.deepcopy(args), **copy.deepcopy(kwargs or {}))
    return tree_map(lambda leaf: _plain(leaf) if isinstance(leaf, Tensor) else leaf, result)


def _refused(name: str, value: SubclassValue, why: str) -> ValueError:
    return ValueError(
        "fold puts a plain tensor in the place of a value that is a tensor subclass.\n"
        "required: a value that is the same each time, and that a plain tensor can stand for\n"
        f"found: {name}, of class {value.kind}: {why}\n"
        "Export without fold, or let the parametrization return a plain tensor."
    )
