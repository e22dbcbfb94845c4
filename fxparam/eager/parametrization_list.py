"""``ParametrizationList``: the parametrizations of one tensor and its originals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from torch.nn.utils import parametrize as torch_parametrize

from fxparam.eager import checks
from fxparam.eager.originals import Writes, initial_originals, register, right_inverses
from fxparam.eager.rollback import unchanged_if_refused

__all__ = ["ParametrizationList"]


class ParametrizationList(torch_parametrize.ParametrizationList):
    """The parametrizations of one tensor, and the original tensor(s) they start from.

    It is what ``module.parametrizations.<name>`` holds; :func:`register_parametrization` makes it.
    Indexing and iterating give the parametrizations in the order of registration.

    Args:
        modules: the parametrizations; at least one.
        original: the parameter or buffer to parametrize, of any shape and dtype. It is written to
            (its right inverse is stored in it), after every check has passed.
        unsafe: whether the value may differ from ``original`` in dtype and shape.

    Attributes:
        original: the original tensor, when the right inverse gives one.
        original0, original1, ...: the original tensors, when it gives a sequence.
        unsafe: as above; once True it stays so.
        is_tensor: whether the right inverse gives one tensor.
        ntensors: how many originals there are.

    Raises:
        ValueError: if ``modules`` is empty, or if a right inverse or the value breaks the contract
            of :func:`register_parametrization`. Nothing is changed then.

    Source: :class:`torch.nn.utils.parametrize.ParametrizationList`, of which it is a subclass.

    Example:
        >>> import torch
        >>> import fxparam
        >>> class Exp(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.exp()
        ...     def right_inverse(self, y):
        ...         return y.log()
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> _ = fxparam.register_parametrization(layer, "weight", Exp())
        >>> layer.parametrizations.weight.original.tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """

    #: Whether a scope has its value, as :func:`fxparam.accumulate` sets it for a block.
    in_step = False
    #: Whether its value is its original, as :func:`fxparam.disabled` sets it for a block.
    disabled = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: everything but what a block has set."""
        return {k: v for k, v in self.__dict__.items() if k not in ("in_step", "disabled")}

    def __init__(
        self, modules: Sequence[Module], original: Tensor | Parameter, unsafe: bool = False
    ) -> None:
        if len(modules) == 0:
            raise ValueError(
                "ParametrizationList requires one or more modules.\nmodules given: 0\n"
                "It is made by register_parametrization."
            )
        shape, dtype = checks.shape_and_dtype(original)
        ModuleList.__init__(self, modules)
        self.unsafe = unsafe
        new = right_inverses(list(modules), original, required=False)
        originals = initial_originals(original, new)
        self.is_tensor = isinstance(new, Tensor)
        self.ntensors = len(originals)
        for name, value in originals.items():
            self._set_original(name, value)
        if not unsafe:
            checks.check_value(self(), shape, dtype)
        if self.is_tensor:
            # Up to here a stand-in took its place. Optimizers hold the original, so it goes on.
            writes = Writes()
            writes.plan(original, new)
            writes.commit()
            self._set_original("original", original)

    @classmethod
    def of(cls, step: Module, *originals: Tensor) -> ParametrizationList:
        """Return a list that is not checked, with originals that are what its step has been given.

        Args:
            step: the one parametrization.
            originals: the tensors that it is called with.
        """
        chain: ParametrizationList = cls.__new__(cls)
        ModuleList.__init__(chain, [step])
        chain.unsafe = False
        chain.is_tensor = len(originals) == 1
        chain.ntensors = len(originals)
        for i, original in enumerate(originals):
            chain._set_original("original" if chain.is_tensor else f"original{i}", original)
        return chain

    def _set_original(self, name: str, value: Any) -> None:
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        if isinstance(value, Tensor):
            register(self, name, value)
        else:
            setattr(self, name, value)

    def _steps(self) -> list[Module]:
        """Return the parametrizations, without the ``parametrizations`` of nested originals."""
        return [step for key, step in self._modules.items() if key.isdigit() and step is not None]

    def append(self, module: Module) -> ParametrizationList:
        """Add a parametrization at the end of the chain."""
        self.add_module(str(len(self._steps())), module)
        return self

    def right_inverse(self, value: Tensor) -> None:
        """Set the original(s) so that the chain gives ``value``.

        Args:
            value: a tensor that the last ``right_inverse`` accepts, usually of the shape and dtype
                of the parametrized tensor.

        Raises:
            RuntimeError: if a parametrization has no ``right_inverse``.
            ValueError: if the right inverses give another number of tensors than there are
                originals, or another dtype. Nothing is changed then.

        Source: :meth:`torch.nn.utils.parametrize.ParametrizationList.right_inverse`.

        Example:
            >>> import torch
            >>> import fxparam
            >>> class Double(torch.nn.Module):
            ...     def forward(self, x):
            ...         return 2 * x
            ...     def right_inverse(self, y):
            ...         return y / 2
            >>> layer = fxparam.register_parametrization(torch.nn.Linear(1, 1), "bias", Double())
            >>> layer.bias = torch.ones(1)
            >>> layer.parametrizations.bias.original.item()
            0.5
        """
        if torch.compiler.is_compiling():
            self._assign(value)
        else:
            with unchanged_if_refused(self):
                self._assign(value)

    def _assign(self, value: Tensor) -> None:
        new = value if self.disabled else right_inverses(self._steps(), value, required=True)
        values = checks.assigned_originals(self, new)
        writes, nested = Writes(), {}
        for name, tensor in values.items():
            if name in self._parameters or name in self._buffers or name in self.__dict__:
                target = getattr(self, name)
                if isinstance(tensor, Tensor) and isinstance(target, Tensor):
                    writes.plan(target, tensor)
                    continue
            # An opaque original, or one that is itself parametrized and has its right inverse.
            nested[name] = tensor
        writes.commit()
        for name, tensor in nested.items():
            setattr(self, name, tensor)

    def _originals(self) -> list[Any]:
        """Return what the first parametrization is called with."""
        if self.is_tensor:
            return [self.original]
        return [getattr(self, f"original{i}") for i in range(self.ntensors)]

    def forward(self) -> Tensor:
        """Return the value of the parametrized tensor, computed from the originals."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            raise RuntimeError("Parametrization is not working with scripting.")
        if self.disabled:
            return self.original
        # By key, as the modules after the parametrizations are those of nested originals; and not
        # by index, for which Dynamo traces three functions and guards that none was exchanged.
        steps: Any = self._modules
        value = steps["0"](*self._originals())
        index = 1
        while str(index) in steps:
            value = steps[str(index)](value)
            index += 1
        return value  # type: ignore[no-any-return]


# Where users find it, and what pickles name.
ParametrizationList.__module__ = "fxparam.parametrize"
