"""From a case and a contestant to a program: something with one measured step."""

from __future__ import annotations

import contextlib
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam
from benchmarks.cases.case import Case, Inputs, Run, Size, Step
from benchmarks.contestants import Contestant
from benchmarks.counting import count_evaluations

__all__ = ["Program", "Setting", "inputs_of", "program", "reference"]


@dataclass(frozen=True)
class Setting:
    """Where and how precisely a program runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, or ``bfloat16`` for autocast to it; parameters stay float32.
    """

    device: str = "cpu"
    dtype: str = "float32"

    def autocast(self) -> Any:
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, getattr(torch, self.dtype))


@dataclass
class Program:
    """A model and how it runs. ``step`` gives outputs; gradients are left in the parameters.

    Attributes:
        plain: whether the parametrizations were removed from the model.
        fixed: whether by design it runs with weights of its own, not the model's parameters as
            they are then: frozen, plain, in a package, JAX's.
        once: whether only its first step is also the others': plain, where evaluations have effects
            and with them other values in the next step.
    """

    model: nn.Module
    run: Run
    inputs: Inputs
    body: Step
    setting: Setting = field(default_factory=Setting)
    plain: bool = False
    fixed: bool = False
    once: bool = False

    def give(self, inputs: Inputs) -> None:
        """Let the steps to come have these inputs."""
        self.inputs = inputs

    def reset(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self, forward_done: Callable[[], None] = lambda: None) -> list[Any]:
        outputs = self.body(self.model, self.run, self.inputs, forward_done)
        return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]

    def tensors(self, outputs: list[Any]) -> list[Tensor]:
        """What a step gave, for a comparison."""
        return outputs

    def gradients(self) -> dict[str, Tensor]:
        """By parameter."""
        named = self.model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def buffers(self) -> dict[str, Tensor] | None:
        """By name; None where the model's own are not what was computed with."""
        return dict(self.model.named_buffers())


def inputs_of(case: Case, size: Size, setting: Setting) -> Inputs:
    torch.manual_seed(1)
    return tuple(x.to(setting.device) for x in case.inputs(size))


def reference(
    case: Case, size: Size, setting: Setting, *, sharing: bool, exact: bool = False
) -> Program:
    """Eager as written.

    Args:
        sharing: under torch's ``cached()`` where evaluations have effects, which is another
            computation: that of the contestants that share them.
        exact: in float64, from the same parameters and inputs.
    """
    model = _model(case, "written", size, setting)
    inputs = inputs_of(case, size, setting)
    if exact:
        setting = Setting(setting.device)
        model = model.double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    run = _in_region(model) if case.effects and sharing else model
    return Program(model, _autocast(run, setting), inputs, case.step_of(False), setting)


def program(
    case: Case, contestant: Contestant, size: Size, setting: Setting, *, counting: bool = False
) -> Program:
    """A contestant with state of its own, equal to every other's; compiled by its first step.

    Args:
        counting: put ops into the parametrizations that count their evaluations.
    """
    if contestant.compiler == "jax":
        from benchmarks.jax_program import jax_program

        return jax_program(case, contestant, size, setting)
    model = _model(case, contestant.source, size, setting)
    if counting:
        count_evaluations(model)
    inputs = inputs_of(case, size, setting)
    run = _autocast(_run(case, contestant, model), setting)
    step = case.step_of(contestant.source == "by hand")
    if contestant.region == "fxparam" and case.scope in ("accumulate", "around"):
        block = fxparam.accumulate if case.scope == "accumulate" else fxparam.cached
        step = _in_block(block, step)
    plain, compiled = contestant.source == "plain", contestant.compiler is not None
    fixed = plain or contestant.freezing or (case.exported and compiled)
    return Program(model, run, inputs, step, setting, plain, fixed, plain and case.effects)


def _model(case: Case, source: str, size: Size, setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    model = (case.by_hand if source == "by hand" else case.written)(size)
    with torch.no_grad():
        # As after some training: what an exponential costs depends on its argument, and torch
        # registers an orthogonal weight at the exponential of zero.
        for name, p in model.named_parameters():
            if "original" in name.rpartition(".")[2]:
                p.add_(0.02 * torch.randn_like(p))
    if source == "plain":
        _make_plain(model)
    return model.to(setting.device)


def _make_plain(model: nn.Module) -> None:
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                getattr(module, name).requires_grad_()


def _run(case: Case, contestant: Contestant, model: nn.Module) -> Run:
    if case.exported:
        return _exported(contestant, model)
    if contestant.compiler is None:
        return _in_region(model) if contestant.region == "torch" else model
    model.forward = types.MethodType(_own_code(type(model).forward), model)  # type: ignore
    options: dict[str, Any] = {"fullgraph": case.fullgraph}
    if contestant.freezing:
        return _freezing(torch.compile(model, backend=contestant.compiler, **options))
    if contestant.region == "torch":
        return torch.compile(_own_code(_in_region(model)), backend=contestant.compiler, **options)
    if contestant.region == "fxparam" and case.scope == "cached":
        fxparam.adopt(model)
        run = _own_code(_in_region(model, fxparam.cached))
        return torch.compile(run, backend="fxparam", **options)
    if contestant.region == "fxparam" and case.scope in ("call", "frozen"):
        return fxparam.compile(model, scope=case.scope, **options)
    return torch.compile(model, backend=contestant.compiler, **options)


def _freezing(run: Run) -> Run:
    """Compile with Inductor's ``freezing`` at the first call.

    By ``torch.compile(options=)`` nothing is frozen: whether parameters are constants Dynamo asks
    the global configuration, before options apply. Of what is computed from constants alone
    Inductor (torch 2.13) folds no constructors, hence not the mask that ``tril`` becomes: an
    orthogonal weight is still evaluated.
    """
    compiled = False

    def frozen(*inputs: Tensor) -> Any:
        nonlocal compiled
        if compiled:
            return run(*inputs)
        compiled = True
        with torch._inductor.config.patch(freezing=True):
            return run(*inputs)

    return frozen


def _in_region(
    model: nn.Module, region: Callable[[], Any] = parametrize.cached
) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> Any:
        with region():
            return model(*inputs)

    return run


def _in_block(block: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    def run(model: nn.Module, *args: Any) -> Any:
        with block(model):
            return step(model, *args)

    return run


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own.

    Dynamo keeps what it compiled by code object: contestants in one process that share one would
    wait for each other's guards, and meet the limit of recompilations.
    """
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _autocast(run: Run, setting: Setting) -> Run:
    if setting.dtype == "float32":
        return run

    def cast(*inputs: Tensor) -> Any:
        with setting.autocast():
            return run(*inputs)

    return cast


class _Region(nn.Module):
    """A model in torch's ``cached()``, for ``torch.export``, which takes modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        with parametrize.cached():
            return self.model(*inputs)


def _exported(contestant: Contestant, model: nn.Module) -> Run:
    """Exported and compiled ahead of time at the first call, so that compile time is measured."""
    if contestant.compiler is None:
        return _in_region(model) if contestant.region == "torch" else model
    export = torch.export.export
    if contestant.compiler == "fxparam":
        export = partial(fxparam.export, fold=contestant.region == "fxparam")
    source = _Region(model) if contestant.region == "torch" else model
    options = {"freezing": True} if contestant.freezing else {}
    loaded: list[Run] = []

    def run(*inputs: Tensor) -> Any:
        if not loaded:
            with tempfile.TemporaryDirectory() as folder:
                package = torch._inductor.aoti_compile_and_package(
                    export(source, inputs, strict=False),
                    package_path=str(Path(folder) / "model.pt2"),
                    inductor_configs=options,
                )
                loaded.append(torch._inductor.aoti_load_package(package))
        return loaded[0](*inputs)

    return run
