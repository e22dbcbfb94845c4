"""A parametrization that gathers a sharded parameter, as SimpleFSDP does by a property."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import Module

from fxparam.eager.describe import kind_of

__all__ = ["Sharded"]


class Sharded(Module):
    """The whole tensor of a ``DTensor`` parameter: gathered forward, its gradient reduced backward.

    In a compiled graph a parameter is gathered once and its gradient reduced once, however often it
    is read. Assigning a whole tensor writes each rank's part. Further parametrizations may follow
    in the chain, or stand before, if the original is what is sharded:
    ``register_parametrization(layer.parametrizations.weight, "original", Sharded())``.

    Args:
        reduce: how the ranks' gradients are reduced, ``"avg"`` or ``"sum"``.

    Shape: a ``DTensor`` of global shape ``(*)`` to a plain tensor of shape ``(*)``.

    Raises:
        ValueError: ``reduce`` is something else.
        TypeError: in the forward, if the tensor is no ``DTensor``.

    Source: https://docs.pytorch.org/docs/stable/distributed.tensor.html

    Example::

        sharded = distribute_tensor(layer.weight.detach(), mesh, [Shard(0)])
        layer.weight = torch.nn.Parameter(sharded)
        fxparam.register_parametrization(layer, "weight", Sharded())
        checkpoint = fxparam.plain_state_dict(model, full=False)  # keys as without parametrizations
    """

    def __init__(self, reduce: str = "avg") -> None:
        super().__init__()
        if reduce not in ("avg", "sum"):
            raise ValueError(f"reduce must be 'avg' or 'sum': got {reduce!r}")
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole tensor."""
        if not isinstance(x, DTensor):
            raise TypeError(
                f"Sharded gathers a DTensor.\nrequired: a DTensor\nfound: {kind_of(x)}\n"
                "Shard the parameter first, with torch.distributed.tensor.distribute_tensor."
            )
        dimensions = x.device_mesh.ndim
        whole = x.redistribute(placements=[Replicate()] * dimensions)
        return whole.to_local(grad_placements=[Partial(self.reduce)] * dimensions)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return a whole tensor, of which each rank keeps its part."""
        return value
