"""Tensor parallelism for modules with parametrized tensors.

A style of torch's shards the parameters of a module. Those of a parametrized tensor are its
originals, of which the style knows nothing. It is therefore applied to a plain module without data,
which shows where it puts each parameter, and how inputs and outputs are converted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import Module, Parameter

from fxparam._torch.dtensors import apply_style, placed, sharded_first, take_hooks, whole
from fxparam.eager.adopt import adopt
from fxparam.eager.classes import chain_of
from fxparam.eager.describe import kind_of
from fxparam.eager.parametrization_list import ParametrizationList
from fxparam.eager.register import is_parametrized, type_before_parametrizations
from fxparam.eager.rollback import unchanged

__all__ = ["ParametrizedParallel"]


class ParametrizedParallel(ParallelStyle):
    """A ``ParallelStyle`` for a module with parametrized tensors: register first, then parallelize.

    Each original is sharded along its first dimension. A value is computed on every rank from the
    whole originals, and then placed as the style places a plain parameter. Parameters of the
    parametrizations themselves (as those of LoRA) stay whole, and are the first rank's everywhere.
    State dict keys stay what they are.

    Args:
        style: what the module would get without parametrizations, such as
            ``torch.distributed.tensor.parallel.ColwiseParallel()``.

    Raises:
        TypeError: ``style`` is no ``ParallelStyle``.
        ValueError: when it is applied, before anything is changed: if the module has submodules
            beside its parametrizations, or originals that are parametrized themselves.

    Source: https://docs.pytorch.org/docs/stable/distributed.tensor.parallel.html

    Example::

        parallelize_module(
            model,
            mesh,
            {
                "up": ParametrizedParallel(ColwiseParallel()),
                "down": ParametrizedParallel(RowwiseParallel()),
            },
        )
    """

    def __init__(self, style: ParallelStyle) -> None:
        if not isinstance(style, ParallelStyle):
            raise TypeError(f"style must be a ParallelStyle: got {kind_of(style)}")
        self.style = style

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        adopt(module)
        others = [name for name, _ in module.named_children() if name != "parametrizations"]
        if others:
            raise ValueError(
                f"{kind_of(module)} has submodules beside its parametrizations: "
                f"{', '.join(others)}\nParallelize these by themselves."
            )
        for name in getattr(module, "parametrizations", ()):
            chain: Any = chain_of(module, name)
            if is_parametrized(chain) or isinstance(chain, PlacedList):
                raise ValueError(
                    f"{name!r} of {kind_of(module)} cannot be parallelized.\nrequired: originals "
                    "that are parametrized by nothing else, and not parallelized yet"
                )
        plain = _without_data(module)
        apply_style(self.style, plain, device_mesh)
        take_hooks(module, plain)
        for name, model in plain._parameters.items():
            if not isinstance(model, DTensor):
                continue
            if is_parametrized(module, name):
                _place(chain_of(module, name), device_mesh, model)
            else:
                _distribute(module, name, device_mesh, model.placements)
        return module

    def __repr__(self) -> str:
        return f"ParametrizedParallel({self.style!r})"


class PlacedList(ParametrizationList):
    """A list whose originals are sharded, and whose value is placed as a style says.

    Attributes:
        mesh: the devices.
        placements: those of the value.
    """

    mesh: DeviceMesh
    placements: tuple[Any, ...]

    def _originals(self) -> list[Any]:
        return [whole(original) for original in super()._originals()]

    def forward(self) -> Tensor:
        value = self._originals()[0] if self.disabled else super().forward()
        return placed(value, self.mesh, self.placements)

    def right_inverse(self, value: Tensor) -> None:
        super().right_inverse(whole(value))


def _place(chain: Any, mesh: DeviceMesh, model: DTensor) -> None:
    originals = {id(p) for p in chain._parameters.values()}
    everywhere = [Replicate()] * mesh.ndim
    with torch.no_grad():
        for own in (*chain.parameters(), *chain.buffers()):
            if id(own) not in originals and not isinstance(own, DTensor):
                # As torch does with what no style shards: all ranks have the first one's.
                own.copy_(distribute_tensor(own.detach(), mesh, everywhere).to_local())
    for name in list(chain._parameters):
        original = chain._parameters[name]
        if original is not None:
            _distribute(chain, name, mesh, sharded_first(original, mesh))
    chain.__class__ = PlacedList
    chain.mesh, chain.placements = mesh, model.placements


def _distribute(module: Module, name: str, mesh: DeviceMesh, placements: Any) -> None:
    held = module._parameters[name]
    assert held is not None
    sharded = distribute_tensor(held.detach(), mesh, placements)
    module._parameters[name] = Parameter(sharded, requires_grad=held.requires_grad)


def _without_data(module: Module) -> Module:
    """Return a module like another, with plain parameters in place of parametrized tensors."""
    cls: Any = type_before_parametrizations(module)
    plain: Module = cls.__new__(cls)
    plain.__dict__.update(module.__dict__)
    for store in (
        "_parameters",
        "_buffers",
        "_modules",
        *(k for k in module.__dict__ if "hooks" in k),
    ):
        plain.__dict__[store] = type(module.__dict__[store])()
    names = [*module._parameters, *getattr(module, "parametrizations", ())]
    for name in names:
        with unchanged(module), torch.no_grad():  # an evaluation may move what it is computed from
            held = getattr(module, name)
        if held is not None:
            like = torch.empty(held.shape, dtype=held.dtype, device="meta")
            plain._parameters[name] = Parameter(like, requires_grad=held.requires_grad)
    return plain
