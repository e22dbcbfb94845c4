"""A graph in a prologue, run once, and a body, run many times."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import fxparam
from tests import helpers


def _counting(m: nn.Module) -> None:
    for step in (helpers.MatrixExponential(), helpers.Counting()):
        parametrize.register_parametrization(m, "weight", step)


@pytest.mark.parametrize("example", [False, True], ids=["symbolic", "captured"])
def test_prologue_once_body_many_times(example: bool) -> None:
    model = helpers.Loop(_counting)
    x = torch.randn(2, 5, dtype=torch.float64)
    gm = fxparam.symbolic_trace(model, example_inputs=(x,) if example else None)
    prologue, body = fxparam.split(gm)
    assert not prologue.graph.find_nodes(op="placeholder")
    values = prologue()
    outputs: list[Tensor] = []
    counts = helpers.counted(lambda: outputs.extend(body(*values, y) for y in (x, x * 2)))
    assert counts == (0, 0)
    torch.testing.assert_close(outputs, [model(x), model(x * 2)])
    model.zero_grad()
    assert helpers.counted(lambda: sum(outputs).sum().backward())[1] == 1
    actual = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    (model(x) + model(x * 2)).sum().backward()
    torch.testing.assert_close(actual, {k: p.grad for k, p in model.named_parameters()})


def test_the_parts_are_graph_modules_like_any_other() -> None:
    model = helpers.Loop(orthogonal)
    x = torch.randn(2, 5, dtype=torch.float64)
    parts = fxparam.split(fxparam.symbolic_trace(model))
    for prologue, body in (parts, copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        torch.testing.assert_close(body(*prologue(), x), model(x))
    again, rest = fxparam.split(parts[1])
    assert again() == ()
    values = parts[0]()
    torch.testing.assert_close(rest(*values, x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_what_the_graph_writes_stays_in_the_body(training: bool) -> None:
    model = helpers.Loop(spectral_norm).train(training)
    x = torch.randn(2, 5, dtype=torch.float64)
    prologue, body = fxparam.split(fxparam.symbolic_trace(model, example_inputs=(x,)))
    values = prologue()
    twin = copy.deepcopy(model)
    for _ in range(2):
        torch.testing.assert_close(body(*values, x), twin(x))
    assert any(p is torch.mv for p in (n.target for n in body.graph.nodes)) is training


def test_a_value_that_is_returned_stays_in_the_body() -> None:
    class Returns(helpers.Loop):
        def forward(self, x: Tensor) -> Any:
            return self.cell.weight, self.cell(x)

    model = Returns(_counting)
    x = torch.randn(2, 5, dtype=torch.float64)
    prologue, body = fxparam.split(fxparam.symbolic_trace(model, example_inputs=(x,)))
    values = prologue()
    with torch.no_grad():
        body(*values, x)[0].zero_()
    torch.testing.assert_close(body(*values, x)[0], model(x)[0])


def test_parameters_that_are_inputs() -> None:
    model = helpers.Loop(_counting)
    x = torch.randn(2, 5, dtype=torch.float64)
    program = fxparam.export(model, (x,))
    prologue, body = fxparam.split(program.graph_module)
    assert [n.target for n in prologue.graph.find_nodes(op="placeholder")] == [
        "p_cell_parametrizations_weight_original"
    ]
    values = prologue(model.cell.parametrizations.weight.original)
    held = {**program.state_dict, **program.constants}
    inputs = [held.get(s.target, x) for s in program.graph_signature.input_specs]
    (out,) = body(*values, *inputs)
    torch.testing.assert_close(out, model(x))


def test_the_parts_have_the_training_modes_of_the_model() -> None:
    class Normed(helpers.Loop):
        def __init__(self) -> None:
            super().__init__(orthogonal)
            self.norm = nn.BatchNorm1d(5, dtype=torch.float64)

        def forward(self, x: Tensor) -> Any:
            return self.norm(super().forward(x))

    model = Normed()
    model.norm.eval()
    x = torch.randn(2, 5, dtype=torch.float64)
    expected = model(x)
    prologue, body = fxparam.split(fxparam.symbolic_trace(model))
    assert not model.norm.training
    torch.testing.assert_close(body(*prologue(), x), expected)
