"""Torch alone, without fxparam: does a program go wrong, and should it on this version?

A test of torch alone fails in two cases. Torch was mended: then what we do because of the bug may
be dropped once no supported version has it. Or torch errs where it did not: then it is needed there
as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

#: The oldest release that is supported.
OLDEST = "2.11"


def check(errs: bool, *, then: str, since: str = OLDEST, mended_in: str | None = None) -> None:
    """Check that torch alone errs on the versions where that was seen, and on no others.

    Args:
        errs: whether the program went wrong just now.
        then: what to do once torch is mended, for the message.
        since: the oldest release that errs.
        mended_in: the first release that does not err any more; None while there is none.
    """
    here = torch.__version__
    if here >= since and (mended_in is None or here < mended_in):
        assert errs, f"torch {here} no longer errs here: from this version on, {then}"
    else:
        only = f"from {since} on" + (f", before {mended_in}" if mended_in else "")
        assert not errs, f"torch {here} errs here too, where it was seen to err {only} alone"


def error(
    program: Callable[[Tensor, Tensor], Tensor], backend: Any = "inductor", **options: Any
) -> float:
    """Return how far a compiled program is from eager, in its results and gradients.

    The largest difference, relative to the largest number of the same tensor. Rounding in float64
    makes it about 1e-15.
    """
    x, weight = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = _results(program, x, weight)
    actual = _results(torch.compile(program, backend=backend, **options), x, weight)
    pairs = zip(actual, expected, strict=True)
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)


def _results(program: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    out = program(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def message(run: Callable[[], Any]) -> str:
    """Return what a run raises, as text; nothing if it raises nothing."""
    try:
        run()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def loop(step: Callable[..., tuple[Tensor, Tensor]], h: Tensor, xs: Tensor) -> Tensor:
    """Return the last carry of a loop: a ``scan`` in compiled code, a Python loop in eager code."""
    if torch.compiler.is_compiling():
        last: Tensor = scan(step, h, xs, dim=0)[0]
        return last
    for x in xs:
        h, _ = step(h, x)
    return h
