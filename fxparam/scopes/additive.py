"""May the gradients of several backwards go through an evaluation as their sum?

Derivatives are linear, hence additive. A custom ``autograd.Function`` may be anything: it may clip
the gradient, normalise it, or keep a state that gradients change. A copy of the evaluation is tried
with random gradients of several sizes. Custom ops are believed.
"""

from __future__ import annotations

import copy
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import Module

from fxparam.scopes.snapshot import Snapshot

__all__ = ["check_additive"]

#: Sizes of the gradients that are tried: powers of two, within what float16 can hold.
_SIZES = (2.0**-12, 1.0, 2.0**11)

#: How torch.library.register_autograd names the functions that it makes.
_OF_CUSTOM_OPS = "GeneratedBackwardFor_"

_checked: WeakKeyDictionary[Module, set[object]] = WeakKeyDictionary()


def check_additive(chain: Module, value: Tensor, name: str) -> None:
    """Check that the backward of an evaluation is additive.

    Once for each parametrization list, as long as it has the same modules and flags, and its values
    the same custom functions.

    Args:
        chain: a ``ParametrizationList``.
        value: what it gave, with its graph.
        name: the name of the tensor, for the message.

    Raises:
        RuntimeError: it is not, or it changes a state.
    """
    functions = _custom_functions(value)
    if not functions:
        return
    key = (frozenset(functions), tuple(map(ref, chain.modules())), *_flags(chain))
    if key not in _checked.setdefault(chain, set()):
        found = _fault(copy.deepcopy(chain))
        if found:
            raise RuntimeError(
                f"fxparam.accumulate() cannot share {name}: its backward runs once in the block.\n"
                "required: a backward that is additive in the gradient and changes no state\n"
                f"found: {found}, in {', '.join(sorted(functions))}"
            )
        _checked[chain].add(key)


def _custom_functions(value: Tensor) -> set[str]:
    """Return the names of the custom functions in the graph of a value."""
    found: set[str] = set()
    work, seen = [value.grad_fn], set()
    while work:
        node = work.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and not node.name().startswith(_OF_CUSTOM_OPS):
            found.add(node.name().removesuffix("Backward"))
        work.extend(below for below, _ in node.next_functions)
    return found


def _fault(chain: Module) -> str:
    """Return what is wrong with the backward of an evaluation; empty if nothing is."""
    originals = [p for p in chain.parameters() if p.requires_grad]
    devices = {p.device.index for p in originals if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        value = chain()
        before = (Snapshot(chain), _numbers(chain))

        def backward(gradient: Tensor) -> list[Tensor]:
            got = torch.autograd.grad(
                value, originals, gradient, retain_graph=True, allow_unused=True
            )
            return [g for g in got if g is not None]

        # Small integers: their sums are exact in every dtype.
        draw = partial(torch.randint, -8, 9, value.shape, device=value.device)
        for size in _SIZES:
            a, b = (draw().to(value.dtype) * size for _ in range(2))
            parts = zip(backward(a), backward(b), backward(a + b), strict=True)
            if not all(_is_sum(*part, computed_in=value.dtype) for part in parts):
                return f"the backward of a sum is not the sum, for gradients of size {size:g}"
    if before != (Snapshot(chain), _numbers(chain)):
        return "backward changed a tensor or a number of the parametrization"
    return ""


def _is_sum(a: Tensor, b: Tensor, both: Tensor, *, computed_in: torch.dtype) -> bool:
    tolerance = max(64 * torch.finfo(both.dtype).eps, 8 * torch.finfo(computed_in).eps)
    scale = max(float(a.abs().max()), float(b.abs().max())) if a.numel() else 0.0
    return bool(torch.allclose(a + b, both, rtol=tolerance, atol=tolerance * scale))


def _flags(chain: Module) -> list[object]:
    return [value for value in _numbers(chain) if isinstance(value, (bool, str))]


def _numbers(chain: Module) -> list[object]:
    plain = (bool, int, float, str)
    return [v for m in chain.modules() for v in vars(m).values() if isinstance(v, plain)]
