"""Loops under Inductor train as in eager code: the memory of operands serves no other value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.testing import assert_close

import fxparam
from fxparam.graph import copy_what_bodies_pass_on
from tests import helpers


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _step(weight: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(h + x) + 0.5 * weight
    return h + 0, h.sum()


def _passed_on(x: Tensor, weight: Tensor) -> Tensor:
    """Backward's carry for what has no gradient is zeros, and read when the loop is over."""
    h = torch.tanh(x @ weight)
    return _loop(lambda h, x: _step(weight.detach(), h, x), h, torch.stack([h, 2 * h, 3 * h]))


def _in_place(x: Tensor, weight: Tensor) -> Tensor:
    """A position among what is saved for backward is that of a carry of the body."""
    x = x + torch.tanh(x @ weight)
    h = torch.tanh(x @ weight)
    return _loop(partial(_step, weight), h, torch.stack([h, 2 * h, 3 * h]))


def _loop(step: Callable[..., tuple[Tensor, Tensor]], h: Tensor, xs: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return scan(step, h, xs, dim=0)[0]
    for x in xs:
        h, _ = step(h, x)
    return h


@pytest.mark.parametrize("function", [_passed_on, _in_place])
def test_the_gradient_of_what_is_read_before_a_scan(function: Callable[..., Tensor]) -> None:
    """torch 2.13's Inductor by itself gets each of them wrong."""
    helpers.skip_unless_scans_train()
    compiled = torch.compile(function, backend="fxparam")
    torch.manual_seed(0)
    x, weight = (torch.randn(4, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    expected, actual = function(x, weight), compiled(x, weight)
    assert_close(actual, expected)
    gradients = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (actual, expected)]
    assert_close(*gradients)


def test_a_body_returns_copies_of_its_operands() -> None:
    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cond(x.sum() > 0, lambda x: (x.sin(), x + 1), lambda x: (x + 1, x.cos()), (x,))

    gm = torch.fx.experimental.proxy_tensor.make_fx(traced)(torch.ones(3))
    bodies = [m for name, m in gm.named_children() if isinstance(m, torch.fx.GraphModule)]
    for body in bodies:  # as torch's own backward of an addition would be
        (given,) = body.graph.find_nodes(op="placeholder")
        for node in body.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            node.replace_all_uses_with(given)
            body.graph.erase_node(node)
        body.recompile()
    copy_what_bodies_pass_on(gm.graph)
    for body in bodies:
        output = body.graph.output_node()
        assert all(node.op == "call_function" for node in output.all_input_nodes)
        body.graph.lint()
    x = torch.ones(3)
    out = gm(x)
    assert_close(out, (x.sin(), x))
    assert out[1].data_ptr() != x.data_ptr()


def test_saved_tensors_stay_saved_where_there_are_bodies() -> None:
    seen = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        seen.append(torch._functorch.config.donated_buffer)
        return gm.forward

    weight = torch.ones(3, requires_grad=True)
    by_branch = lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x * weight,))  # noqa: E731
    for function in (by_branch, lambda x: torch.sin(x * weight)):
        torch.compile(function, backend=fxparam.backend(inner))(torch.ones(3))
    assert seen == [False, True]
