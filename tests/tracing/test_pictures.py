"""Pictures of graphs: what the pass does to some models, accesses as written, then shared."""
# ruff: noqa: E501

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, weight_norm

import fxparam
from tests import helpers, zoo


def _chain(m: nn.Module) -> None:
    for step in (zoo.Double(), helpers.MatrixExponential(), helpers.Counting()):
        parametrize.register_parametrization(m, "weight", step)


class TestPictures(expecttest.TestCase):
    def picture(self, model: nn.Module, *args: Any) -> str:
        before = fxparam.symbolic_trace(model, share=False, example_inputs=args or None)
        after = fxparam.symbolic_trace(model, example_inputs=args or None)
        return f"{helpers.shown(before)}\n---\n{helpers.shown(after)}"

    def test_symmetric_linear(self) -> None:
        linear = parametrize.register_parametrization(nn.Linear(3, 3), "weight", zoo.Symmetric())
        self.assertExpectedInline(
            self.picture(nn.Sequential(linear, nn.Tanh(), linear)),
            """\
def forward(self, input):
input_1 = input
_0_parametrizations_weight_original = getattr(self, "0").parametrizations.weight.original
triu = _0_parametrizations_weight_original.triu()
triu_1 = _0_parametrizations_weight_original.triu(1)
getattr_1 = triu_1.mT
_0_weight = triu + getattr_1
_0_bias = getattr(self, "0").bias
linear = torch._C._nn.linear(input_1, _0_weight, _0_bias)
_1 = getattr(self, "1")(linear)
triu_2 = _0_parametrizations_weight_original.triu()
triu_3 = _0_parametrizations_weight_original.triu(1)
getattr_2 = triu_3.mT
_0_weight_1 = triu_2 + getattr_2
linear_1 = torch._C._nn.linear(_1, _0_weight_1, _0_bias)
return linear_1
---
def forward(self, input):
input_1 = input
# prologue: from parameters and buffers alone
_0_parametrizations_weight_original = getattr(self, "0").parametrizations.weight.original
triu = _0_parametrizations_weight_original.triu()
triu_1 = _0_parametrizations_weight_original.triu(1)
getattr_1 = triu_1.mT
_0_weight = triu + getattr_1
# body
_0_bias = getattr(self, "0").bias
linear = torch._C._nn.linear(input_1, _0_weight, _0_bias)
_1 = getattr(self, "1")(linear)
linear_1 = torch._C._nn.linear(_1, _0_weight, _0_bias)
return linear_1""",
        )

    @pytest.mark.skipif(torch.__version__ >= "2.15", reason="Dynamo records .mH as an operation")
    def test_orthogonal_rnn(self) -> None:
        class RNN(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cell = orthogonal(nn.RNNCell(3, 3), "weight_hh")

            def forward(self, xs: Tensor, h: Tensor) -> Tensor:
                for i in range(3):
                    h = self.cell(xs[i], h)
                return h

        xs, h = torch.randn(3, 2, 3), torch.randn(2, 3)
        self.assertExpectedInline(
            self.picture(RNN(), xs, h),
            """\
def forward(self, xs, h):
getitem = xs[0]
cell_weight_ih = self.cell.weight_ih
cell_parametrizations_weight_hh_original = self.cell.parametrizations.weight_hh.original
X = cell_parametrizations_weight_hh_original.tril()
getattr_1 = X.mH
A = X - getattr_1
Q = torch.matrix_exp(A)
cell_parametrizations_weight_hh_0_base = getattr(self.cell.parametrizations.weight_hh, "0").base
cell_weight_hh = cell_parametrizations_weight_hh_0_base @ Q
cell_bias_ih = self.cell.bias_ih
cell_bias_hh = self.cell.bias_hh
ret = torch.rnn_tanh_cell(getitem, h, cell_weight_ih, cell_weight_hh, cell_bias_ih, cell_bias_hh)
getitem_1 = xs[1]
X_1 = cell_parametrizations_weight_hh_original.tril()
getattr_2 = X_1.mH
A_1 = X_1 - getattr_2
Q_2 = torch.matrix_exp(A_1)
cell_weight_hh_1 = cell_parametrizations_weight_hh_0_base @ Q_2
ret_1 = torch.rnn_tanh_cell(getitem_1, ret, cell_weight_ih, cell_weight_hh_1, cell_bias_ih, cell_bias_hh)
getitem_2 = xs[2]
X_2 = cell_parametrizations_weight_hh_original.tril()
getattr_3 = X_2.mH
A_2 = X_2 - getattr_3
Q_4 = torch.matrix_exp(A_2)
cell_weight_hh_2 = cell_parametrizations_weight_hh_0_base @ Q_4
ret_2 = torch.rnn_tanh_cell(getitem_2, ret_1, cell_weight_ih, cell_weight_hh_2, cell_bias_ih, cell_bias_hh)
return ret_2
---
def forward(self, xs, h):
# prologue: from parameters and buffers alone
cell_parametrizations_weight_hh_original = self.cell.parametrizations.weight_hh.original
X = cell_parametrizations_weight_hh_original.tril()
getattr_1 = X.mH
A = X - getattr_1
Q = torch.matrix_exp(A)
cell_parametrizations_weight_hh_0_base = getattr(self.cell.parametrizations.weight_hh, "0").base
cell_weight_hh = cell_parametrizations_weight_hh_0_base @ Q
# body
getitem = xs[0]
cell_weight_ih = self.cell.weight_ih
cell_bias_ih = self.cell.bias_ih
cell_bias_hh = self.cell.bias_hh
ret = torch.rnn_tanh_cell(getitem, h, cell_weight_ih, cell_weight_hh, cell_bias_ih, cell_bias_hh)
getitem_1 = xs[1]
ret_1 = torch.rnn_tanh_cell(getitem_1, ret, cell_weight_ih, cell_weight_hh, cell_bias_ih, cell_bias_hh)
getitem_2 = xs[2]
ret_2 = torch.rnn_tanh_cell(getitem_2, ret_1, cell_weight_ih, cell_weight_hh, cell_bias_ih, cell_bias_hh)
return ret_2""",
        )

    def test_weight_norm_convolution(self) -> None:
        conv = weight_norm(nn.Conv1d(4, 4, 3, padding=1, groups=2), dim=2)
        self.assertExpectedInline(
            self.picture(nn.Sequential(conv, conv)),
            """\
def forward(self, input):
input_1 = input
_0_parametrizations_weight_original0 = getattr(self, "0").parametrizations.weight.original0
_0_parametrizations_weight_original1 = getattr(self, "0").parametrizations.weight.original1
_0_weight = torch._weight_norm(_0_parametrizations_weight_original1, _0_parametrizations_weight_original0, 2)
_0_bias = getattr(self, "0").bias
conv1d = torch.conv1d(input_1, _0_weight, _0_bias, (1,), (1,), (1,), 2)
_0_weight_1 = torch._weight_norm(_0_parametrizations_weight_original1, _0_parametrizations_weight_original0, 2)
conv1d_1 = torch.conv1d(conv1d, _0_weight_1, _0_bias, (1,), (1,), (1,), 2)
return conv1d_1
---
def forward(self, input):
input_1 = input
# prologue: from parameters and buffers alone
_0_parametrizations_weight_original0 = getattr(self, "0").parametrizations.weight.original0
_0_parametrizations_weight_original1 = getattr(self, "0").parametrizations.weight.original1
_0_weight = torch._weight_norm(_0_parametrizations_weight_original1, _0_parametrizations_weight_original0, 2)
# body
_0_bias = getattr(self, "0").bias
conv1d = torch.conv1d(input_1, _0_weight, _0_bias, (1,), (1,), (1,), 2)
conv1d_1 = torch.conv1d(conv1d, _0_weight, _0_bias, (1,), (1,), (1,), 2)
return conv1d_1""",
        )

    def test_chain(self) -> None:
        self.assertExpectedInline(
            self.picture(helpers.Loop(_chain, steps=2)),
            """\
def forward(self, x):
cell_parametrizations_weight_original = self.cell.parametrizations.weight.original
mul = 2 * cell_parametrizations_weight_original
matrix_exp = torch.matrix_exp(mul)
cell_weight = torch.ops.fxparam_test.count(matrix_exp)
cell_bias = self.cell.bias
linear = torch._C._nn.linear(x, cell_weight, cell_bias)
tanh = torch.tanh(linear)
mul_1 = 2 * cell_parametrizations_weight_original
matrix_exp_1 = torch.matrix_exp(mul_1)
cell_weight_1 = torch.ops.fxparam_test.count(matrix_exp_1)
linear_1 = torch._C._nn.linear(tanh, cell_weight_1, cell_bias)
tanh_1 = torch.tanh(linear_1)
return tanh_1
---
def forward(self, x):
# prologue: from parameters and buffers alone
cell_parametrizations_weight_original = self.cell.parametrizations.weight.original
mul = 2 * cell_parametrizations_weight_original
matrix_exp = torch.matrix_exp(mul)
cell_weight = torch.ops.fxparam_test.count(matrix_exp)
# body
cell_bias = self.cell.bias
linear = torch._C._nn.linear(x, cell_weight, cell_bias)
tanh = torch.tanh(linear)
linear_1 = torch._C._nn.linear(tanh, cell_weight, cell_bias)
tanh_1 = torch.tanh(linear_1)
return tanh_1""",
        )

    def test_two_originals(self) -> None:
        linear = parametrize.register_parametrization(nn.Linear(3, 3), "weight", zoo.Sum(2))
        self.assertExpectedInline(
            self.picture(nn.Sequential(linear, linear)),
            """\
def forward(self, input):
input_1 = input
_0_parametrizations_weight_original0 = getattr(self, "0").parametrizations.weight.original0
_0_parametrizations_weight_original1 = getattr(self, "0").parametrizations.weight.original1
stack = torch.stack((_0_parametrizations_weight_original0, _0_parametrizations_weight_original1))
_0_weight = stack.sum(0)
_0_bias = getattr(self, "0").bias
linear = torch._C._nn.linear(input_1, _0_weight, _0_bias)
stack_1 = torch.stack((_0_parametrizations_weight_original0, _0_parametrizations_weight_original1))
_0_weight_1 = stack_1.sum(0)
linear_1 = torch._C._nn.linear(linear, _0_weight_1, _0_bias)
return linear_1
---
def forward(self, input):
input_1 = input
# prologue: from parameters and buffers alone
_0_parametrizations_weight_original0 = getattr(self, "0").parametrizations.weight.original0
_0_parametrizations_weight_original1 = getattr(self, "0").parametrizations.weight.original1
stack = torch.stack((_0_parametrizations_weight_original0, _0_parametrizations_weight_original1))
_0_weight = stack.sum(0)
# body
_0_bias = getattr(self, "0").bias
linear = torch._C._nn.linear(input_1, _0_weight, _0_bias)
linear_1 = torch._C._nn.linear(linear, _0_weight, _0_bias)
return linear_1""",
        )
