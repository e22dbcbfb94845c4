"""``DistributedDataParallel``: the passes see a graph before it is split by buckets."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxparam
from fxparam.parametrizations import weight_norm
from tests.distributed.models import Half, Recurrent, Step, batch, model, one_step

_MANY = 2e-4  # megabytes, of a bucket: one for each parameter


class InARegion(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        with fxparam.cached():
            return super().forward(x)


def _wrapped(module: nn.Module, buckets: float = _MANY) -> DistributedDataParallel:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 200  # type: ignore[attr-defined]
    return DistributedDataParallel(module, bucket_cap_mb=buckets)


def _step(kind: str, region: str = "none", buckets: float = _MANY) -> Step:
    module = model(kind)
    if region == "inside":
        module.__class__ = InARegion
    ddp = _wrapped(module, buckets)
    compiled = torch.compile(ddp, backend=fxparam.backend("aot_eager"))

    def run() -> Any:
        with fxparam.cached() if region == "around" else nullcontext():
            output = compiled(batch())
            output.square().mean().backward()
            return output.detach()

    return one_step(ddp, run, kind)


def check_evaluations_are_shared_across_buckets() -> None:
    for kind in ("pure", "orthogonal"):
        for region in ("none", "inside", "around"):
            step = _step(kind, region)
            assert step.evaluations == (2, 2), (kind, region, step)
            # One for each bucket that DDP fills after the first step.
            buckets = 3 if region == "around" else 4
            assert step.collectives["all_reduce"] == buckets, (kind, region, step)


def check_one_bucket() -> None:
    assert _step("pure", buckets=25).evaluations == (2, 2)


def check_a_failing_pass_leaves_the_split_alone() -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("a pass failed")

    module = model("pure")
    ddp, backend = _wrapped(module), fxparam.backend("aot_eager", strict=False)
    backend._share = fail  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = torch.compile(ddp, backend=backend)(batch())
    assert any("compiled unshared" in str(each.message) for each in caught)
    torch.testing.assert_close(output, module(batch()))


def _differ(module: nn.Module) -> list[str]:
    """The names of the parameters whose gradients are not the same on all ranks."""
    found = []
    for name, p in module.named_parameters():
        every = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(every, p.grad.contiguous())  # type: ignore[union-attr]
        if not all(torch.equal(each, every[0]) for each in every):
            found.append(name)
    return found


def check_assignments_keep_the_hooks_of_gradients() -> None:
    weight = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
    for change in ("assign", "remove", "register"):
        module = model("plain")
        layer = module.cell.wh
        if change != "register":
            fxparam.register_parametrization(layer, "weight", Half())
        ddp = _wrapped(module)
        ddp(batch()).sum().backward()
        ddp.zero_grad()
        if change == "assign":
            layer.weight = weight  # type: ignore[assignment]
        elif change == "remove":
            fxparam.remove_parametrizations(layer, "weight")
        else:
            fxparam.register_parametrization(layer, "weight", Half())
        ddp(batch()).square().mean().backward()
        assert _differ(module) == [], change


def check_micro_batches_are_reduced_once() -> None:
    ddp = _wrapped(model("pure"))
    compiled = torch.compile(ddp, backend=fxparam.backend("aot_eager"))

    def run() -> Any:
        with fxparam.accumulate(ddp.module):
            for last in (False, True):
                with nullcontext() if last else ddp.no_sync():
                    output = compiled(batch())
                    (output.square().mean() / 2).backward()
        return output.detach()

    step = one_step(ddp, run, "pure")
    assert step.evaluations == (2, 2)
    plain = _step("pure")  # of one batch
    assert 0 < step.collectives["all_reduce"] <= plain.collectives["all_reduce"], (step, plain)


def check_parts_that_are_not_known_are_warned_of() -> None:
    from torch._dynamo.backends.distributed import DDPOptimizer

    from fxparam._torch import ddp

    known, ours = DDPOptimizer.compile_fn, ddp.warn_of_parts
    DDPOptimizer.compile_fn = known.__wrapped__  # as in a torch that splits elsewhere
    ours.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = torch.compile(_wrapped(module := model("pure")), backend="fxparam")(batch())
    finally:
        DDPOptimizer.compile_fn = known
        ours.cache_clear()
    assert any("optimize_ddp = False" in str(each.message) for each in caught)
    torch.testing.assert_close(output, module(batch()))


def check_new_parameters_are_refused() -> None:
    module = model("plain")
    parallel = DistributedDataParallel(module)
    before = list(module.named_parameters())
    with pytest.raises(ValueError, match="is a parameter of DistributedDataParallel"):
        weight_norm(module.cell.wx)
    assert [name for name, _ in before] == [name for name, _ in module.named_parameters()]
    fxparam.register_parametrization(module.cell.wx, "weight", nn.Tanh())
    parallel(batch()).sum().backward()
    alone = model("plain")
    weight_norm(alone.cell.wx)


def check_options_of_compile_reach_evaluations() -> None:
    given: list[object] = []

    def inner(gm: Any, inputs: Any, options: Any = None) -> Any:
        given.append(options)
        return gm

    ddp = _wrapped(model("pure"))
    compiled = torch.compile(ddp, backend=fxparam.backend(inner), options={"x": 1})
    with fxparam.cached():
        compiled(batch())
    assert len(given) > 1 and all(options == {"x": 1} for options in given), given
