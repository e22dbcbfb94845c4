"""``accumulate()``: one evaluation and one backward for the micro-batches of a step."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.utils.checkpoint import checkpoint

import fxparam
from fxparam.scopes.store import step_of
from tests import helpers


def _model(*steps: nn.Module) -> nn.Module:
    """A model with two counted parametrizations, whose first layer is read twice in a call."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4, dtype=torch.float64) for _ in range(2)]
    for layer in layers:
        for step in (*steps, helpers.Counting()):
            fxparam.register_parametrization(layer, "weight", copy.deepcopy(step))
    return nn.Sequential(layers[0], nn.Tanh(), layers[0], nn.Tanh(), layers[1])


def _batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, generator=generator, dtype=dtype) for _ in range(4)]


def _in_turn(run: Any) -> None:
    for x in _batches():
        run(x).square().sum().backward()


def _deferred(run: Any) -> None:
    losses = [run(x).square().sum() for x in _batches()]
    for loss in losses:
        loss.backward()


def _backward_of_some(run: Any) -> None:
    losses = [run(x).square().sum() for x in _batches()]
    losses[1].backward()


def _without_gradients_between(run: Any) -> None:
    for x in _batches():
        run(x).square().sum().backward()
        with torch.no_grad():
            run(x)


def _penalty(run: Any) -> None:
    for x in _batches():
        x.requires_grad_()
        gradient = torch.autograd.grad(run(x).sum(), x, create_graph=True)[0]
        gradient.square().sum().backward()


def _checkpointed(run: Any) -> None:
    for x in _batches():
        checkpoint(run, x, use_reentrant=False).square().sum().backward()


def _check_equal(model: nn.Module, twin: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, msg=name)


PROGRAMS = [
    _in_turn,
    _deferred,
    _backward_of_some,
    _without_gradients_between,
    _penalty,
    _checkpointed,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_evaluation_and_one_backward_in_eager_code(program: Callable[[Any], None]) -> None:
    model, twin = _model(), _model()

    def accumulated() -> None:
        with fxparam.accumulate(model):
            program(model)

    forward, backward = helpers.counted(accumulated)
    program(twin)
    assert (forward, backward) == ((4 if program is _without_gradients_between else 2), 2)
    _check_equal(model, twin)


@pytest.mark.parametrize("program", [_in_turn, _deferred, _checkpointed])
@pytest.mark.parametrize("backend", ["ours", "aot_eager"])
def test_one_evaluation_and_one_backward_in_compiled_code(
    program: Callable[[Any], None], backend: str
) -> None:
    model, twin = _model(), _model()
    graphs: list[Any] = []

    def counting(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    inner = counting if program is _in_turn else "aot_eager"
    run = torch.compile(model, backend=fxparam.backend(inner) if backend == "ours" else inner)
    compiled = []
    for _ in range(3):
        model.zero_grad()
        twin.zero_grad()

        def accumulated() -> None:
            with fxparam.accumulate(model):
                program(run)

        assert helpers.counted(accumulated) == (2, 2)
        program(twin)
        _check_equal(model, twin)
        compiled.append(len(graphs))
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                p.sub_(0.1)
                q.sub_(0.1)
    assert compiled[0] == compiled[-1], "compiled again in a later step"


class _Ternary(torch.autograd.Function):
    """Rounds to -1, 0 and 1, with a gradient that is passed where the weight is not clipped."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.mul(2).round().clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return gradient * (weight.abs() < 0.4)


class _Clipped(_Ternary):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.clamp(-1, 1)


class Quantized(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, weight: Tensor) -> Tensor:
        return self.function.apply(weight)


class _Recorded(torch.autograd.Function):
    """Its backward keeps the largest gradient in a buffer, as scaled formats do."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, largest: Tensor) -> Tensor:
        ctx.largest = largest
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        torch.maximum(ctx.largest, gradient.abs().max(), out=ctx.largest)
        return gradient, None


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return _Recorded.apply(weight, self.largest)


def test_a_straight_through_quantizer_keeps_its_mask() -> None:
    model, twin = _model(Quantized(_Ternary)), _model(Quantized(_Ternary))
    with fxparam.accumulate(model):
        _deferred(model)
    _deferred(twin)
    _check_equal(model, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_straight_through_quantizer_of_few_bits(dtype: torch.dtype) -> None:
    def layer() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Linear(4, 4, bias=False)
        for step in (Half(dtype), Quantized(_Ternary)):
            fxparam.register_parametrization(made, "weight", step, unsafe=True)
        return made

    model, twin = layer(), layer()
    x = torch.arange(4, dtype=dtype)
    with fxparam.accumulate(model):
        model(x).sum().backward()
    twin(x).sum().backward()
    _check_equal(model, twin)


@pytest.mark.parametrize(
    ("step", "why"), [(Quantized(_Clipped), "not the sum"), (Scaled(), "changed a tensor")]
)
def test_a_backward_that_may_not_run_once_is_refused_by_name(step: nn.Module, why: str) -> None:
    model = _model(step)
    message = f"cannot share 0.weight(.|\n)*{why}"
    with pytest.raises(RuntimeError, match=message), fxparam.accumulate(model):
        _in_turn(model)
    assert all(p.grad is None for p in model.parameters() if p.dim() == 2)


class Half(nn.Module):
    """A value in fewer bits than its original."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


@pytest.mark.parametrize(
    ("dtype", "size", "reads"), [(torch.bfloat16, 1.0, 1024), (torch.float16, 4096.0, 16)]
)
def test_gradients_in_few_bits_are_summed_in_many(
    dtype: torch.dtype, size: float, reads: int
) -> None:
    layer = nn.Linear(2, 2, bias=False)
    fxparam.register_parametrization(layer, "weight", Half(dtype), unsafe=True)
    x = torch.full((1, 2), size, dtype=dtype)
    with fxparam.accumulate(layer):
        sum(layer(x).sum() for _ in range(reads // 4)).backward()
        for _ in range(reads // 4 * 3):
            layer(x).sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    torch.testing.assert_close(gradient, torch.full((2, 2), size * reads))


def test_autocast_and_scaled_losses() -> None:
    def run(model: nn.Module) -> None:
        for x in _batches(torch.float32):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).square().mean()
            (loss * 1024).backward()

    model = orthogonal(nn.Linear(4, 4))
    twin = copy.deepcopy(model)
    fxparam.adopt(model)
    with fxparam.accumulate(model):
        run(model)
    run(twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=float(q.grad.abs().max()) / 50)


def test_hooks_of_originals_run_once() -> None:
    model = _model()
    calls = []
    original = model[0].parametrizations.weight.original
    original.register_hook(lambda g: calls.append("hook"))
    original.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    with fxparam.accumulate(model):
        _in_turn(model)
        assert calls == []
        assert original.grad is None
    assert calls == ["hook", "accumulated"]


def test_frozen_originals_get_no_gradient() -> None:
    model, twin = _model(), _model()
    for m in (model, twin):
        m[0].parametrizations.weight.original.requires_grad_(False)
    with fxparam.accumulate(model):
        _in_turn(model)
    _in_turn(twin)
    _check_equal(model, twin)


def test_effects_occur_once() -> None:
    model = spectral_norm(nn.Linear(4, 4, dtype=torch.float64), n_power_iterations=1)
    twin = copy.deepcopy(model)
    with fxparam.accumulate(model):  # which adopts it
        _in_turn(model)
    weight = twin.weight
    sum((x @ weight.T + twin.bias).square().sum() for x in _batches()).backward()
    _check_equal(model, twin)
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_an_exception_leaves_the_originals_as_they_were() -> None:
    model = _model()
    original = model[0].parametrizations.weight.original
    original.grad = torch.ones_like(original)
    with pytest.raises(ValueError, match="mine"), fxparam.accumulate(model):
        _in_turn(model)
        raise ValueError("mine")
    torch.testing.assert_close(original.grad, torch.ones_like(original))
    assert step_of(model[0].parametrizations.weight) is None
    with pytest.raises(ValueError, match="mine"), fxparam.accumulate(model):
        loss = model(_batches()[0]).sum()
        raise ValueError("mine")
    with pytest.raises(RuntimeError, match="a backward after fxparam.accumulate"):
        loss.backward()
    with fxparam.accumulate(model):
        _in_turn(model)


def test_misuse_is_refused() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters())
    before = copy.deepcopy(model.state_dict())
    message = r"SGD.step\(\) inside(.|\n)*originals of 0.weight"
    with pytest.raises(RuntimeError, match=message), fxparam.accumulate(model):
        _in_turn(model)
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    refused = pytest.raises(RuntimeError, match="weight is in an open")
    with fxparam.accumulate(model[0]), refused, fxparam.accumulate(model):
        pass
    with pytest.raises(TypeError, match="got none"), fxparam.accumulate():
        pass
    with fxparam.accumulate(model), pytest.raises(RuntimeError, match="assignment to 0.weight"):
        model[0].weight = torch.zeros(4, 4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with fxparam.accumulate(model):
        other.step()


def test_other_originals_are_evaluated_for_themselves() -> None:
    model = _model()
    names = {n: 2 * p.detach() for n, p in model.named_parameters()}
    x = _batches()[0]
    expected = functional_call(model, names, (x,))
    with fxparam.accumulate(model):
        model(x)
        torch.testing.assert_close(functional_call(model, names, (x,)), expected)


def test_a_copy_made_in_the_block_is_outside_of_it() -> None:
    model = _model()
    with fxparam.accumulate(model):
        twin = copy.deepcopy(model)
        assert helpers.counted(lambda: twin(_batches()[0]))[0] == 3
    assert "in_step" not in vars(twin[0].parametrizations.weight)


def test_regions_inside_and_around() -> None:
    model, twin = _model(), _model()

    def accumulated() -> None:
        with fxparam.cached(), fxparam.accumulate(model):
            for x in _batches():
                with fxparam.cached():
                    model(x).square().sum().backward()

    assert helpers.counted(accumulated) == (2, 2)
    _in_turn(twin)
    _check_equal(model, twin)


class Exp(nn.Module):
    """Its backward needs its value."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp()


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.square()


@pytest.mark.parametrize("program", [_in_turn, _checkpointed])
def test_an_original_that_is_written_in_the_block(program: Callable[[Any], None]) -> None:
    model = _model(Squared())
    message = "stay as they are(.|\n)*inplace operation"
    with pytest.raises(RuntimeError, match=message), fxparam.accumulate(model):
        program(model)
        with torch.no_grad():
            model[0].parametrizations.weight.original.add_(1)


@pytest.mark.parametrize("program", [_in_turn, _checkpointed])
def test_nothing_outlives_the_block(program: Callable[[Any], None]) -> None:
    model = _model(Exp())
    values = []
    model[0].parametrizations.weight[0].register_forward_hook(
        lambda module, inputs, output: values.append(weakref.ref(output))
    )
    gc.collect()
    gc.disable()
    try:
        with fxparam.accumulate(model):
            program(model)
        assert len(values) == 1
        assert values[0]() is None
    finally:
        gc.enable()


def test_no_value_of_compiled_code_outlives_the_block() -> None:
    values = []

    def record(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled: Any = lookup_backend("aot_eager")(gm, inputs)

        def run(*args: Any) -> Any:
            values.extend(weakref.ref(a) for a in args if a.requires_grad and a.is_leaf)
            given = compiled(*args)
            values.extend(map(weakref.ref, given))
            return given

        return run

    model = _model(Exp())
    run = torch.compile(model, backend=fxparam.backend(record))
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # compiled first
            values.clear()
            with fxparam.accumulate(model):
                _in_turn(run)
        kept = {id(p) for p in model.parameters()}
        alive = [v for each in values if (v := each()) is not None and id(v) not in kept]
        assert len(values) > 8
        assert alive == []
    finally:
        gc.enable()


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a


@pytest.mark.parametrize("program", [_in_turn, _deferred, _checkpointed])
def test_parametrized_tensors_in_evaluations(program: Callable[[Any], None]) -> None:
    model = _model(Added())
    inner = model[0].parametrizations.weight[0]
    fxparam.register_parametrization(inner, "a", Squared())
    twin = copy.deepcopy(model)

    def reading(m: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: m(x) + m[0].parametrizations.weight[0].a.sum()

    with fxparam.accumulate(model):
        program(reading(model))
    program(reading(twin))
    _check_equal(model, twin)


def test_a_backward_after_the_block_is_refused() -> None:
    model = _model()
    with fxparam.accumulate(model):
        loss = model(_batches()[0]).sum()
    with pytest.raises(RuntimeError, match="a backward after fxparam.accumulate"):
        loss.backward()


class Rotated(nn.Module):
    """A complex value, in fewer bits than its original."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.polar(torch.ones_like(weight), weight).to(torch.complex64)


def test_complex_values() -> None:
    def layer() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        return fxparam.register_parametrization(made, "weight", Rotated(), unsafe=True)

    model, twin = layer(), layer()
    factor = torch.randn(4, 4, dtype=torch.complex64)
    with fxparam.accumulate(model):
        (model.weight * factor).real.sum().backward()
    (twin.weight * factor).real.sum().backward()
    _check_equal(model, twin)


def _mapped(run: Any) -> None:
    for x in _batches():
        torch.func.vmap(run)(x).square().sum().backward()
        run(x).square().sum().backward()


def _differentiated(run: Any) -> None:
    for x in _batches():
        torch.func.grad(lambda x: run(x).square().sum())(x).sum().backward()
        run(x).square().sum().backward()


@pytest.mark.parametrize("program", [_mapped, _differentiated])
def test_transforms_evaluate_for_themselves(program: Callable[[Any], None]) -> None:
    model, twin = _model(Squared()), _model(Squared())
    with fxparam.accumulate(model):
        program(model)
    program(twin)
    _check_equal(model, twin)


@pytest.mark.parametrize("backend", ["eager", "ours"])
def test_compiled_transforms_evaluate_for_themselves(backend: str) -> None:
    model, twin = _model(Squared()), _model(Squared())

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda x: m(x).square().sum())(x)
        return gradient.sum() + torch.func.vmap(m)(x).sum() + m(x).sum()

    run = torch.compile(loss, backend=fxparam.backend("eager") if backend == "ours" else backend)
    with fxparam.accumulate(model):
        for x in _batches():
            run(model, x).backward()
    for x in _batches():
        loss(twin, x).backward()
    _check_equal(model, twin)


def test_an_export_in_the_block_has_the_originals() -> None:
    model = _model(Squared()).eval()
    x = _batches()[0]
    with fxparam.accumulate(model):
        model(x)
        program = fxparam.export(model, (x,))
    assert "0.parametrizations.weight.original" in program.state_dict
    torch.testing.assert_close(program.module()(x), model(x))


def test_an_original_that_a_micro_batch_computes() -> None:
    model, twin = _model(), _model()

    def program(m: Any) -> None:
        for x in _batches():
            w = m[0].parametrizations.weight.original * x.sum()
            y = functional_call(m[0], {"parametrizations.weight.original": w}, (m(x),))
            y.square().sum().backward()

    with fxparam.accumulate(model):
        program(model)
    program(twin)
    _check_equal(model, twin)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_hook_on_a_value_is_its_readers_own(compiled: bool) -> None:
    model, twin = _model(), _model()

    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m[0].weight
        weight.register_hook(lambda gradient: 2 * gradient)
        return m(nn.functional.linear(x, weight))

    run = torch.compile(forward, backend=fxparam.backend("aot_eager")) if compiled else forward
    with fxparam.accumulate(model):
        for x in _batches():
            run(model, x).square().sum().backward()
    for x in _batches():
        forward(twin, x).square().sum().backward()
    _check_equal(model, twin)


def test_a_parametrization_that_is_not_additive_any_more() -> None:
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.clamp(-0.01, 0.01)

    class Clipped(nn.Module):
        on = False

        def forward(self, x: Tensor) -> Tensor:
            return Clip.apply(x) if self.on else x * 1

    layer: Any = fxparam.register_parametrization(nn.Linear(3, 3), "weight", Clipped())
    x = torch.ones(2, 3)
    with fxparam.accumulate(layer):
        layer(x).sum().backward()
    layer.parametrizations.weight[0].on = True
    with pytest.raises(RuntimeError, match="in Clip"), fxparam.accumulate(layer):
        layer(x).sum().backward()
