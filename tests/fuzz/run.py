"""One program, one way to run it: all that can be seen of it, under labels.

Two training steps: the outputs, their aliasing, the gradients of parameters and inputs, every
parameter and buffer after, the state of the random number generator, the warnings.
"""

from __future__ import annotations

import importlib.util
import linecache
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from functorch.compile import default_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop

import fxparam

_STEPS = 2
_RATE = 0.01
# Autograd in the code that is compiled is then traced, too, where this torch can.
_CONFIG = {name: True for name in ("trace_autograd_ops",) if hasattr(torch._dynamo.config, name)}
# Directories of torch that warn about compiling, not about the program.
_MACHINERY = ("_dynamo", "_functorch", "_inductor", "_higher_order_ops", "fx", "_subclasses", "jit")


@dataclass
class Record:
    """What was seen: tensors and other values by label; ``error`` is what was raised, if it was."""

    seen: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    merged: int = 0
    autocast: bool = False
    tolerance: float | None = None


Inner = str | Callable[..., Any]


def load(source: str, name: str = "fuzzed") -> ModuleType:
    """The script as a module, from a file, so that Dynamo and ``inspect`` find its source."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        linecache.getlines(str(path))
    return module


def in_eager(script: ModuleType) -> Record:
    return _run(script, lambda model: model)


def without_checkpoints(script: ModuleType) -> Record:
    """Eager, but for checkpoints, which are called as plain functions."""
    checkpoint = script.checkpoint
    script.checkpoint = lambda f, *args, **_: f(*args)
    try:
        return in_eager(script)
    finally:
        script.checkpoint = checkpoint


def saving_all() -> Callable[..., Any]:
    """``aot_eager``, but backward recomputes nothing."""
    return aot_autograd(
        fw_compiler=boxed_nop,
        partition_fn=default_partition,
        keep_inference_input_mutations=True,
    )


def by_torch(script: ModuleType, inner: str) -> Record:
    """Plain ``torch.compile``."""
    torch.compiler.reset()
    return _run(script, lambda model: torch.compile(model, backend=inner))


@contextmanager
def without_what_is_mended(script: ModuleType) -> Iterator[bool]:
    """The script without what torch does wrong and fxparam does right; True if it had any."""
    before = script.BUDGET, script.BETWEEN
    script.BUDGET, script.BETWEEN = 1.0, ""
    try:
        yield before != (1.0, "")
    finally:
        script.BUDGET, script.BETWEEN = before


def by_fxparam(script: ModuleType, inner: Inner) -> Record:
    torch.compiler.reset()
    if script.CAPTURE != "compile":
        examples = (script.values(77),) if script.CAPTURE == "trace by Dynamo" else None
        return _run(script, lambda model: _traced(model, examples))
    backend = fxparam.backend(inner)
    scope = script.SCOPE if script.SCOPE in ("call", "frozen") else "graph"
    record = _run(script, lambda model: fxparam.compile(model, scope=scope, backend=backend), True)
    record.merged = sum(report.merged for report in backend.reports)
    return record


def _traced(model: nn.Module, examples: Sequence[Tensor] | None) -> Callable[..., Any]:
    if examples is None:
        return fxparam.symbolic_trace(model)
    return fxparam.symbolic_trace(model, example_inputs=examples)


def _run(
    script: ModuleType, wrap: Callable[[nn.Module], Callable[..., Any]], by_us: bool = False
) -> Record:
    record = Record()
    with (
        warnings.catch_warnings(record=True) as caught,
        torch._dynamo.config.patch({**_CONFIG, **dict.fromkeys(script.FLAGS, True)}),
        torch._functorch.config.patch(activation_memory_budget=script.BUDGET),
        # Else its random numbers are not those of eager.
        torch._inductor.config.patch(fallback_random=True),
    ):
        warnings.simplefilter("always")
        try:
            model = script.build()
            call = _in_scope(script.SCOPE, wrap(model), model, by_us)
            block = _block(script, model, by_us)
            x = script.values(77).requires_grad_(script.GRAD)
            for step in range(_STEPS):
                torch.manual_seed(step)
                with torch.set_grad_enabled(script.GRAD):
                    _step(script, model, call, x, record.seen, f"step {step}", block)
        except Exception as error:
            record.error = error
    mine = [w for w in caught if not any(f"/torch/{part}/" in w.filename for part in _MACHINERY)]
    # Of scopes, not of programs: what is not frozen, and values that die later than in eager.
    about_scopes = ("a frozen scope of fxparam", "the write is lost")
    if script.SCOPE:
        mine = [w for w in mine if not any(words in str(w.message) for words in about_scopes)]
    record.seen["warnings"] = sorted({f"{w.category.__name__}: {w.message}" for w in mine})
    return record


def _in_scope(
    scope: str, call: Callable[..., Any], model: nn.Module, by_us: bool
) -> Callable[..., Any]:
    """Calls that share as in a scope. Ours are in it; eager's are in a region each."""
    adopted = () if scope == "region" else (model,)

    def in_a_region(x: Tensor) -> tuple[Tensor, ...]:
        with fxparam.cached(*adopted):
            return (*call(x), *call(x)) if scope == "region" else call(x)

    def with_and_without_gradients(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():  # copies: what returns a value returns the same one in all calls
            first = [output.clone() for _ in range(2) for output in one(x)]
        return (*first, *one(x))

    one = call if by_us or not scope else in_a_region
    if scope == "region":
        return in_a_region
    return with_and_without_gradients if scope == "frozen" else one


def _block(script: ModuleType, model: nn.Module, by_us: bool) -> Callable[[], Any]:
    """Return the block of a step. Effects are another program's unless they occur once."""
    if script.SCOPE == "step" and (by_us or script.EFFECTS):
        return lambda: fxparam.accumulate(model)
    return nullcontext


def _step(
    script: ModuleType,
    model: nn.Module,
    call: Callable[..., Any],
    x: Tensor,
    seen: dict[str, Any],
    step: str,
    block: Callable[[], Any],
) -> None:
    with block():
        for micro in range(2 if script.SCOPE == "step" else 1):
            _forward_and_backward(script, model, call, x, seen, f"{step}.{micro}")
    for name, leaf in [("x", x), *model.named_parameters()]:
        seen[f"{step}: gradient of {name}"] = None if leaf.grad is None else leaf.grad.clone()
        if leaf.grad is not None:
            with torch.no_grad():
                # Bounded, since a step that is too far ends in nan, which is like any other.
                leaf -= _RATE * leaf.grad / leaf.grad.abs().max().clamp(min=1)
            leaf.grad = None
        seen[f"{step}: {name}"] = leaf.detach().clone()
    for name, buffer in model.named_buffers():
        seen[f"{step}: {name}"] = buffer.detach().clone()
    seen[f"{step}: random number generator"] = torch.get_rng_state()


def _forward_and_backward(
    script: ModuleType,
    model: nn.Module,
    call: Callable[..., Any],
    x: Tensor,
    seen: dict[str, Any],
    step: str,
) -> None:
    outputs = call(x)
    # Two frozen calls return one tensor; each read in a step has an alias, and a graph one for all.
    if script.SCOPE not in ("frozen", "step"):
        seen[f"{step}: aliasing"] = _aliasing(outputs)
    if script.CALLER_WRITES and script.SCOPE != "frozen":
        with torch.no_grad():
            for output in outputs[1:2]:
                output.mul_(2)
    for k, output in enumerate(outputs):
        seen[f"{step}: output {k}"] = output.detach().clone()
        seen[f"{step}: output {k} requires grad"] = output.requires_grad
    if script.GRAD:
        _write_between(script.BETWEEN, model)
        _backward(outputs)


def _write_between(by: str, model: nn.Module) -> None:
    """Write to the buffers named ``phase``, of which no value is saved that eager needs."""
    phases = [b for name, b in model.named_buffers() if name.endswith("phase")]

    def write() -> None:
        for phase in phases:
            (phase.data if by == "data" else phase).mul_(0.5)

    with torch.no_grad():
        if by == "a graph":
            torch.compile(write, backend="eager")()
        elif by:
            write()


def _backward(outputs: Sequence[Tensor]) -> None:
    terms = [
        # Weighted, so that outputs exchanged are seen.
        (k + 1) * output.abs().square().sum().to(torch.float64)
        for k, output in enumerate(outputs)
        if output.requires_grad
    ]
    if terms:
        torch.stack(terms).sum().backward()


def _aliasing(outputs: Sequence[Tensor]) -> list[tuple[int, int]]:
    """For each output, the first that is the same object and the first on the same memory."""
    objects = [id(output) for output in outputs]
    memory = [output.untyped_storage().data_ptr() for output in outputs]
    pairs = zip(objects, memory, strict=True)
    return [(objects.index(a), memory.index(b)) for a, b in pairs]
