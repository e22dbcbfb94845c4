"""What the programs are made of; a script carries the source of the classes it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def squash(h: Tensor) -> Tensor:
    """Bounded, so that long programs stay comparable; smooth in real and complex dtypes."""
    return h / (1 + h.abs())


class Cell(nn.Module):
    """Holds one tensor, to be parametrized, and applies it."""

    def __init__(self, weight: Tensor, stored: str) -> None:
        super().__init__()
        if stored == "parameter":
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self, h: Tensor) -> Tensor:
        return squash(h @ self.weight)


class Recurrent(nn.Module):
    """A recurrent layer of PyTorch, whose weights are parametrized one by one."""

    def __init__(self, kind: str, like: Tensor) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(len(like), len(like), dtype=like.dtype)

    def forward(self, h: Tensor) -> Tensor:
        result = self.layer(h)
        while isinstance(result, tuple):
            result = result[0]
        return result


class Computed(nn.Module):
    """A weight computed by a property: no ``parametrize`` anywhere."""

    def __init__(self, raw: Tensor, stored: str, *links: nn.Module) -> None:
        super().__init__()
        if stored == "parameter":
            self.raw = nn.Parameter(raw)
        else:
            self.register_buffer("raw", raw)
        self.links = nn.ModuleList(links)

    @property
    def weight(self) -> Tensor:
        value = self.raw
        for link in self.links:
            value = link(value)
        return value

    def forward(self, h: Tensor) -> Tensor:
        return squash(h @ self.weight)


class Identity(nn.Module):
    """The value is the original itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Transposed(nn.Module):
    """The value is a view of the original."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Skew(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = x.tril(-1)
        return a - a.mT


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matrix_exp(0.3 * x)


class Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)


class Inverse(nn.Module):
    """Raises on a singular original: may not run where the program would not have run it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


class Root(nn.Module):
    """Has an infinite derivative at zero: no gradient is not one of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


class Mask(nn.Module):
    """Multiplies by a buffer."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (like.abs() > 0.3).to(like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class LowRank(nn.Module):
    """LoRA."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(0.3 * like[:, :1].clone())
        self.b = nn.Parameter(0.3 * like[:1].clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a @ self.b


class Scaled(nn.Module):
    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + like[0, 0].clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Reads(nn.Module):
    """Reads another parametrized tensor, twice."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.other.weight - 0.1 * self.other.weight.mT


class WorksInPlace(nn.Module):
    """Writes, but to nothing that anyone else sees."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.mul_(2)
        return y


class Quantised(nn.Module):
    """Steps forward, straight through in backward, which is additive in the gradient."""

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x - torch.sin(8 * x) / 8

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    def forward(self, x: Tensor) -> Tensor:
        return self.StraightThrough.apply(x)


class Bounded(nn.Module):
    """Bounds the gradient: that of a sum is not the sum of those of its terms."""

    class BoundGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 1.5 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient / (1 + gradient.abs())

    def forward(self, x: Tensor) -> Tensor:
        return self.BoundGradient.apply(x)


class ToHalf(nn.Module):
    """The value has fewer bits than its original."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float16)


class ToBrain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


class Rounded(nn.Module):
    """Has fewer bits on the way, and as many as its original in the end."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float16).to(x.dtype)


class Drawn(nn.Module):
    """Draws a mask, in the midst of what a partitioner may compute again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.sin(), 0.5, self.training).exp()


class Phased(nn.Module):
    """Saves for backward what is computed from a buffer, and not the buffer."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("phase", like.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * torch.cos(self.phase))


class Overwritten(Phased):
    """Overwrites the buffer once it has read it."""

    def forward(self, x: Tensor) -> Tensor:
        value = super().forward(x)
        with torch.no_grad():
            self.phase.mul_(1.3)
        return value


class Product(nn.Module):
    """Two originals."""

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return u @ v

    def right_inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, torch.eye(len(y), dtype=y.dtype)


class DropoutMask(nn.Module):
    """Draws a mask at each evaluation in training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class Counter(nn.Module):
    """Counts its evaluations in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        # A copy, since autograd would save the buffer that the next evaluation writes.
        return x * (1 + 0.1 * self.count.clone()).to(x.dtype)


class Iterated(nn.Module):
    """Begins with a step of an iteration under ``no_grad``, as a power iteration may."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("v", like[0].clone())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.v.mul_(0.9).add_(0.1)
        return x + 0.1 * self.v.clone()


class Normalized(nn.Module):
    """Batch norm: writes its running statistics without saying so."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(len(like), dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


#: Registered without the check of the value's dtype.
CHANGES_THE_DTYPE = ("ToHalf", "ToBrain")


class _Amplify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return 0.001 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.scale * gradient, None


def amplified(x: Tensor, scale: float) -> Tensor:
    """Small values with large gradients, as where a loss is scaled."""
    return _Amplify.apply(x, scale)


# Control flow. Eager runs plain Python: torch's own operators compile themselves when called in
# eager, and a reference should not.


def scan(step: Callable[..., Any], carry: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.scan import scan as compiled

        return compiled(step, carry, xs)
    ys = []
    for x in xs:
        carry, y = step(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)


def while_loop(more: Callable[..., Any], step: Callable[..., Any], carry: Any) -> Any:
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.while_loop import while_loop as compiled

        return compiled(more, step, carry)
    while more(*carry):
        carry = step(*carry)
    return carry


def cond(which: Tensor, then: Callable[..., Any], other: Callable[..., Any], h: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.cond(which, then, other, (h,))
    return then(h) if which else other(h)


def switch(which: Tensor, branches: list[Callable[..., Any]], h: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.switch import switch as compiled

        return compiled(which, branches, (h,))
    return branches[int(which.clamp(0, len(branches) - 1))](h)


def map_rows(row: Callable[..., Any], rows: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.map import map as compiled

        return compiled(row, rows)
    return torch.stack([row(r) for r in rows])


@torch.compiler.nested_compile_region
def region(f: Callable[..., Any], *args: Tensor) -> Any:
    """A call of ``f`` as a region; Dynamo traces none that is made while it traces."""
    return f(*args)
