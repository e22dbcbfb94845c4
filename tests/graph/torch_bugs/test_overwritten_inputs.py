"""Backward never recomputes from a buffer that forward has overwritten."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fxparam
from tests.graph.torch_bugs import torch_alone


class Scaled(nn.Module):
    """A model that reads a buffer, and then overwrites it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((3,), 2.0, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        y = torch.sin(weight * torch.cos(self.scale))
        self.scale.mul_(2)
        return y.sum()


def _gradient(backend: object) -> Tensor:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    model = Scaled() if backend is None else torch.compile(Scaled(), backend=backend)
    return torch.autograd.grad(model(weight), weight)[0]


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_torch_alone_recomputes_from_the_new_value(backend: str) -> None:
    wrong = (_gradient(backend) - _gradient(None)).abs().max() > 0.1
    file = "fxparam/graph/torch_bugs/overwritten_inputs.py"
    torch_alone.check(bool(wrong), then=f"{file} may be dropped")


def test_what_is_read_is_saved_here() -> None:
    torch.testing.assert_close(_gradient(fxparam.backend()), _gradient(None), rtol=0, atol=1e-15)


class Critic(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(inputs, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().sum() + self.layer(2 * x).tanh().sum()


# Inductor alone is wrong for 3 and 4 inputs by 0.3 %, for 2 by 5e-8, and right from 5 on.
@pytest.mark.parametrize("inputs", range(2, 9))
def test_spectral_norm_trains_as_in_eager(inputs: int) -> None:
    torch.manual_seed(inputs)
    model = Critic(inputs)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend())
    for _ in range(2):
        x = torch.randn(4, inputs, dtype=torch.float64)
        for m in (model, twin):
            m.zero_grad()
        model(x).backward()
        compiled(x).backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-12, msg=name)
        for p, q in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)


def test_a_pass_of_the_users_own_still_runs() -> None:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Seen(CustomGraphPass):
        graphs = 0

        def __call__(self, graph: torch.fx.Graph) -> None:
            Seen.graphs += 1

        def uuid(self) -> None:
            return None

    model = Critic(3)
    compiled = torch.compile(model, backend=fxparam.backend(joint_custom_pre_pass=Seen()))
    compiled(torch.randn(2, 3, dtype=torch.float64)).backward()
    assert Seen.graphs > 0


def test_a_list_of_passes_of_the_users_own() -> None:
    from fxparam._torch.inductor import inductor_with

    seen: list[str] = []
    before = [lambda graph: seen.append("one"), lambda graph: seen.append("two")]
    with torch._inductor.config.patch(joint_custom_pre_pass=before):
        inductor = inductor_with(
            None, None, joint_custom_pre_pass=lambda graph: seen.append("ours")
        )
    inductor.config["joint_custom_pre_pass"](torch.fx.Graph())
    assert seen == ["one", "two", "ours"]


def test_a_pass_that_is_told_whether_it_is_inference() -> None:
    from torch._inductor import custom_graph_pass

    if not hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass"):
        pytest.skip("this torch has no such passes")
    seen = []

    class Told(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph: torch.fx.Graph, is_inference: bool) -> None:
            seen.append(is_inference)

        def uuid(self) -> None:
            return None

    backend = fxparam.backend(post_grad_custom_pre_pass=Told())
    torch.compile(torch.sin, backend=backend)(torch.ones(3))
    assert seen == [True]
