"""From a case and a contestant to a program: something with one measured step."""

from __future__ import annotations

import contextlib
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam
from benchmarks.cases.case import Case, Inputs, Run, Size, Step
from benchmarks.contestants import Contestant
from benchmarks.counting import count_evaluations, partitioned

__all__ = ["Program", "Setting", "program", "reference"]

_REGIONS: dict[str, Callable[[], Any]] = {"torch": parametrize.cached, "region": fxparam.cached}


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
            they are then: frozen, plain, in a package.
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

    def __post_init__(self) -> None:
        self._buffers = {name: t.clone() for name, t in self.model.named_buffers()}

    def restart(self) -> None:
        """Give the buffers their first values: the next step is the first one again."""
        with torch.no_grad():
            for name, t in self.model.named_buffers():
                t.copy_(self._buffers[name])

    def step(self) -> list[Tensor]:
        self.model.zero_grad(set_to_none=True)
        with self.setting.autocast():
            outputs = self.body(self.run, self.inputs)
        return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def reference(
    case: Case, size: Size, setting: Setting, *, sharing: bool, exact: bool = False
) -> Program:
    """Return eager as written.

    Args:
        sharing: under torch's ``cached()`` where evaluations have effects, which is another
            computation: that of the contestants that share them.
        exact: in float64, from the same parameters and inputs.
    """
    model = _model(case, "written", size, setting)
    inputs = _inputs(case, size, setting)
    if exact:
        setting = replace(setting, dtype="float32")  # without autocast
        model = model.double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    run = _InRegion(model) if case.effects and sharing else model
    return Program(model, run, inputs, case.step_of(False), setting)


def program(
    case: Case, contestant: Contestant, size: Size, setting: Setting, *, counting: bool = False
) -> Program:
    """Return a contestant with state of its own, equal to every other's; its first step compiles.

    Args:
        counting: put ops into the parametrizations that count their evaluations. The compilers
            then generate no code (:func:`counting.partitioned`).
    """
    model = _model(case, contestant.source, size, setting)
    if contestant.adopted or contestant.scope == "region":
        fxparam.adopt(model)
    if counting:
        count_evaluations(model)
    step = case.step_of(contestant.source == "by hand")
    blocks = {
        "around": partial(fxparam.cached, model),
        "step": partial(fxparam.accumulate, model),
        **(_REGIONS if case.called_in_a_loop else {}),
    }
    if contestant.scope in blocks:
        step = _in_block(blocks[contestant.scope], step)
    plain, compiled = contestant.source == "plain", contestant.compiler is not None
    return Program(
        model,
        _run(case, contestant, model, counting),
        _inputs(case, size, setting),
        step,
        setting,
        plain=plain,
        fixed=plain or contestant.freezing or (case.exported and compiled),
        once=plain and case.effects,
    )


def _inputs(case: Case, size: Size, setting: Setting) -> Inputs:
    torch.manual_seed(1)
    return tuple(x.to(setting.device) for x in case.inputs(size))


def _model(case: Case, source: str, size: Size, setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    model = case.model(size, source == "by hand")
    with torch.no_grad():
        # As after some training: what an exponential costs depends on its argument, and torch
        # registers an orthogonal weight at the exponential of zero.
        for name, p in model.named_parameters():
            if "original" in name.rpartition(".")[2]:
                p.add_(0.02 * torch.randn_like(p))
    if source == "plain":
        for module in filter(parametrize.is_parametrized, list(model.modules())):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                getattr(module, name).requires_grad_()
    return model.to(setting.device)


def _run(case: Case, contestant: Contestant, model: nn.Module, counting: bool) -> Run:
    region = None if case.called_in_a_loop else _REGIONS.get(contestant.scope or "")
    by_hand_in_eager = case.eager_by_hand and contestant.source == "by hand"
    source = model if region is None else _InRegion(model, region)
    if contestant.compiler is None or by_hand_in_eager:
        return source
    if case.exported:
        return _exported(contestant, source, counting)
    source.forward = types.MethodType(_own_code(type(source).forward), source)  # type: ignore
    inner: Any = partitioned if counting else "inductor"
    if contestant.compiler == "inductor":
        return torch.compile(source, backend=inner, fullgraph=case.fullgraph)
    backend = fxparam.backend(inner, **contestant.options)
    longer = contestant.scope if contestant.scope in ("call", "frozen") else "graph"
    compiled: Run = fxparam.compile(source, scope=longer, backend=backend, fullgraph=case.fullgraph)
    return compiled


class _InRegion(nn.Module):
    """A model whose calls are in a region, as a module: ``torch.export`` takes no function."""

    def __init__(self, model: nn.Module, region: Callable[[], Any] = parametrize.cached) -> None:
        super().__init__()
        self.model, self.region = model, region

    def forward(self, *inputs: Tensor) -> Any:
        with self.region():
            return self.model(*inputs)


def _in_block(block: Callable[[], Any], step: Step) -> Step:
    def run(*args: Any) -> Any:
        with block():
            return step(*args)

    return run


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy with a code object of its own.

    Dynamo keeps what it compiled by code object: contestants in one process that share one would
    wait for each other's guards, and meet the limit of recompilations.
    """
    code, defaults = function.__code__.replace(), function.__defaults__
    return types.FunctionType(
        code, function.__globals__, function.__name__, defaults, function.__closure__
    )


def _exported(contestant: Contestant, source: nn.Module, counting: bool) -> Run:
    """Exported and compiled ahead of time at the first call, so that compile time is measured."""
    export = torch.export.export
    if contestant.compiler == "fxparam":
        export = partial(fxparam.export, fold=contestant.scope == "fold")
    loaded: list[Run] = []

    def run(*inputs: Tensor) -> Any:
        if not loaded and counting:
            loaded.append(export(source, inputs, strict=False).module())
        elif not loaded:
            with tempfile.TemporaryDirectory() as folder:
                package = torch._inductor.aoti_compile_and_package(
                    export(source, inputs, strict=False),
                    package_path=str(Path(folder) / "model.pt2"),
                )
                loaded.append(torch._inductor.aoti_load_package(package))
        return loaded[0](*inputs)

    return run
