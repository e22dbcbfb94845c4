"""Folding: what a folded program holds, returns and differentiates, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch.fx import GraphModule
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fxparam
from tests import helpers, zoo
from tests.exporting import programs
from tests.exporting.programs import (
    Cell,
    counting,
    counts_itself,
    ours,
    random_mask,
    runs_equal,
    saved_and_loaded,
    x_of,
)

pytestmark = programs.IGNORED

Layer = Callable[[nn.Linear], Any]


def parametrized(*steps: nn.Module) -> Layer:
    def wrap(layer: nn.Linear) -> Any:
        for step in steps:
            parametrize.register_parametrization(layer, "weight", step)
        return layer

    return wrap


def nested(layer: nn.Linear) -> nn.Linear:
    parametrized(helpers.MatrixExponential())(layer)
    original: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    parametrize.register_parametrization(original, "original", zoo.Symmetric())
    return layer


class Masked(nn.Module):
    """A constant, the same for each tensor, and two reads of the original."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() * torch.eye(4, dtype=x.dtype) + x.tril()


class Net(nn.Module):
    def __init__(self, wrap: Layer, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = (wrap(nn.Linear(4, 4, dtype=torch.float64)) for _ in "ab")
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def in_turn(net: Any, x: Tensor) -> Any:
    return net.a(torch.tanh(net.b(torch.tanh(net.a(x)))))


def without_grad(net: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y, w = net.a(x), net.a.weight * 1
    return y, w, x @ w, net.a(x), net.b(x)


def returned(net: Any, x: Tensor) -> Any:
    return net.a.weight, net.b(x), net.b.weight.mT, net.a(x)


WRAPS = {
    "weight norm": weight_norm,
    "orthogonal": orthogonal,
    "householder": partial(orthogonal, orthogonal_map="householder"),
    "nested": nested,
    "masked": parametrized(Masked()),
    "identity": parametrized(nn.Identity()),
    "dropout": parametrized(nn.Dropout()),
}
NAMES = ["a.bias", "a.weight", "b.bias", "b.weight"]
X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def asks(outputs: Any) -> list[bool]:
    return [y.requires_grad for y in (outputs if isinstance(outputs, tuple) else (outputs,))]


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("run", [in_turn, without_grad, returned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_folded_program_is_one_with_plain_weights(wrap: str, run: Any, frozen: bool) -> None:
    model = Net(WRAPS[wrap], run).eval().requires_grad_(not frozen)
    programs = {"fxparam": fxparam.export(model, (X,)), "torch": torch.export.export(model, (X,))}
    if run is not without_grad:  # decomposing forgets the modules of what such a block does
        programs["decomposed"] = programs["torch"].run_decompositions()
    for made_by, program in programs.items():
        folded = fxparam.fold(program)
        runs_equal(folded, model, X)
        if made_by != "decomposed":
            assert asks(folded.module()(X)) == asks(model(X))
        if run is in_turn or (run is without_grad and wrap != "identity"):
            assert sorted(folded.state_dict) == NAMES
            assert "parametrizations" not in folded.graph_module.code
            torch.testing.assert_close(folded.state_dict["a.weight"], model.a.weight)
            assert not any("parametrizations" in entry.fqn for entry in folded.module_call_graph)
        runs_equal(fxparam.fold(folded), model, X)
        runs_equal(saved_and_loaded(folded), model, X)
        # From 2.15 on torch cannot unflatten its own program of that one either.
        if (run, wrap) != (without_grad, "dropout") or torch.__version__ < "2.15":
            torch.testing.assert_close(torch.export.unflatten(folded)(X), model(X))


def under_autocast(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, v = net.a(x), net.a.weight @ net.b.weight
        with torch.no_grad():
            u = net.b(x)
        with torch.autocast("cpu", enabled=False):
            t = net.a(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return y, z, v, u, t, net.b(x), net.b.weight, net.a.weight * 1


@pytest.mark.parametrize("wrap", ["weight norm", "orthogonal", "householder", "nested", "masked"])
def test_folds_what_autocast_evaluates(wrap: str) -> None:
    model = Net(WRAPS[wrap], under_autocast).eval().float()
    x = X.float()
    program = torch.export.export(model, (x,))
    folded = fxparam.fold(program)
    runs_equal(folded, model, x)
    assert "parametrizations" not in folded.graph_module.code
    assert all(re.fullmatch(r"[ab]\.(bias|weight)(_\d)?", name) for name in folded.state_dict)
    # In torch's program the block of no_grad in the one of autocast asks for a gradient.
    assert asks(folded.module()(x)) == asks(program.module()(x))
    runs_equal(fxparam.fold(folded), model, x)
    runs_equal(saved_and_loaded(folded), model, x)
    torch.testing.assert_close(torch.export.unflatten(folded)(x), model(x))


class ByItsLargest(nn.Module):
    """A block in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            largest = x.abs().max()
        return x / largest


class Blocked(nn.Module):
    """All in a block."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.tanh() * 2


def in_both_branches(net: Any, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: net.a(x), lambda x: net.a(x) * 2, (x,))


def just_before_a_block(net: Any, x: Tensor) -> Any:
    with torch.no_grad():
        k = net.a.weight.sum()
        w = net.b.weight
        y = x @ w
    return x * k, y, net.b(x)


def in_blocks_in_each_other(net: Any, x: Tensor) -> Any:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        w = net.a.weight
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        v = net.b.weight
    return x @ w.double() @ v.double()


def in_a_block_of_a_body(net: Any, x: Tensor) -> Any:
    def row(t: Tensor) -> Tensor:
        with torch.no_grad():
            w = net.a.weight
        return t @ w + t @ net.b.weight

    return torch_map(row, x)


@pytest.mark.parametrize(
    "run",
    [in_both_branches, just_before_a_block, in_blocks_in_each_other, in_a_block_of_a_body],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("step", [ByItsLargest, Blocked, zoo.Symmetric])
def test_folds_blocks_in_parametrizations(step: type[nn.Module], run: Any) -> None:
    model = Net(parametrized(step()), run).eval()
    program = fxparam.export(model, (X,))
    runs_equal(program, model, X)
    if torch.__version__ >= (2, 12):  # before, torch cannot unflatten its own program either
        torch.testing.assert_close(torch.export.unflatten(copy.deepcopy(program))(X), model(X))
    for each in (program, torch.export.export(model, (X,))):
        folded = fxparam.fold(each)
        runs_equal(folded, model, X)
        bodies = [m for m in folded.graph_module.modules() if isinstance(m, GraphModule)]
        assert not any("parametrizations" in body.code for body in bodies)
        assert not any("parametrizations" in name for name in folded.state_dict)
        torch.testing.assert_close(torch.export.unflatten(folded)(X), model(X))


def test_tied_originals_in_a_body() -> None:
    """Their names are of two tensors, where only one is evaluated."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = weight_norm(nn.Linear(4, 4, dtype=torch.float64))
            self.b = nn.Linear(4, 4, dtype=torch.float64)
            self.b.weight = self.a.parametrizations.weight.original1  # type: ignore[union-attr]
            parametrize.register_parametrization(self.b, "weight", zoo.Symmetric())

        def forward(self, x: Tensor) -> Tensor:
            return torch_map(lambda row: row @ self.a.weight, x)

    model = Tied()
    for program in (fxparam.export(model, (X,)), torch.export.export(model, (X,))):
        folded = fxparam.fold(program)
        runs_equal(folded, model, X)
        assert "parametrizations" not in folded.graph_module.code


@pytest.mark.parametrize("again", [False, True])
def test_autocast_around_a_body_is_refused(again: bool) -> None:
    """torch leaves the switches of an autocast that has a loop or branch in it in the graph."""

    def run(net: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = torch_map(lambda row: row @ net.a.weight, x)
        return y + net.a(x) if again else y

    model = Net(weight_norm, run).eval()
    for program in (fxparam.export(model, (X,)), torch.export.export(model, (X,))):
        with pytest.raises(ValueError, match=r"a\.weight: it is evaluated under autocast around"):
            fxparam.fold(program)


@pytest.mark.parametrize("wrap", ["weight norm", "nested"])
def test_what_the_caller_does_to_a_returned_value_stays_with_the_caller(wrap: str) -> None:
    model = Net(WRAPS[wrap], returned).eval()
    run = fxparam.export(model, (X,), fold=True).module()
    with torch.no_grad():
        for y in run(X):
            y.zero_()
        torch.testing.assert_close(run(X), model(X))


class Follows(nn.Module):
    """The program writes what the evaluation reads, a buffer or the original."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.cell, self.what = nn.Linear(4, 4, dtype=torch.float64), what
        fxparam.register_parametrization(self.cell, "weight", Scaled())

    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)
        chain: Any = self.cell.parametrizations.weight  # type: ignore[union-attr]
        if self.what == "buffer":
            chain[0].scale.copy_(x.abs().max())
        else:
            chain.original.mul_(0.5)
        return y


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return x * self.scale


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("what", ["buffer", "original"])
def test_what_the_program_writes_cannot_be_folded(what: str, decomposed: bool) -> None:
    model = Follows(what).eval().requires_grad_(False)
    program = torch.export.export(model, (X,))
    if decomposed:
        program = program.run_decompositions()
    with pytest.raises(ValueError, match=r"found: cell\.weight: .* writ(es|ten)"):
        fxparam.fold(program)


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = weight_norm(nn.Linear(4, 4, dtype=torch.float64))
        self.again = self.cell

    def forward(self, x: Tensor) -> Any:
        return self.again(torch.tanh(self.cell(x)))


class _Tied(_Shared):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4, dtype=torch.float64)
        fxparam.transfer_parametrizations_and_params(self.cell, self.again)


class _NamedLikeIt(_Shared):
    def __init__(self) -> None:
        super().__init__()
        self.reparametrizations = nn.ModuleDict({"cell": self.cell})
        del self.cell, self.again

    def forward(self, x: Tensor) -> Any:
        return self.reparametrizations["cell"](x)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("kind", [_Shared, _Tied, _NamedLikeIt])
def test_nothing_is_left_of_modules_with_two_names(kind: Any, strict: bool) -> None:
    model = kind().eval()
    folded = fxparam.fold(torch.export.export(model, (X,), strict=strict))
    runs_equal(folded, model, X)
    held = set(folded.state_dict)
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    assert all(name.rpartition(".")[0] in names for name in held)
    assert not any(".parametrizations." in name for name in held)


FOLDED = ["cell.bias_hh", "cell.bias_ih", "cell.weight_hh", "cell.weight_ih"]


@pytest.mark.parametrize("made_by", ["fxparam", "torch", "torch strict", "loaded", "decomposed"])
@pytest.mark.parametrize("wrap", [counting, ours, orthogonal, spectral_norm, weight_norm])
def test_folded(wrap: Any, made_by: str) -> None:
    model = Cell(wrap).eval()
    x = x_of()
    if made_by == "fxparam":
        folded = fxparam.export(model, (x,), fold=True)
    else:
        program = torch.export.export(model, (x,), strict=made_by == "torch strict")
        if made_by == "loaded":
            program = saved_and_loaded(program)
        if made_by == "decomposed":
            program = program.run_decompositions()
        before = str(program)
        folded = fxparam.fold(program)
        assert str(program) == before
    assert sorted(folded.state_dict) == FOLDED
    targets = [s.target for s in folded.graph_signature.input_specs if s.target]
    assert sorted(targets) == FOLDED
    assert "parametrizations" not in str(folded.graph_module.code)
    assert not any("parametrizations" in e.fqn for e in folded.module_call_graph)
    torch.testing.assert_close(folded.state_dict["cell.weight_hh"], model.cell.weight_hh)
    for each in (
        folded,
        saved_and_loaded(folded),
        folded.run_decompositions(),
        fxparam.fold(folded),
    ):
        runs_equal(each, model, x)
    assert helpers.counted(lambda: folded.module()(x))[0] == 0


def test_folding_reads_the_programs_tensors() -> None:
    model = Cell(orthogonal).eval()
    program = fxparam.export(model, (x_of(),))
    other = Cell(orthogonal).eval()
    for name, tensor in other.state_dict().items():
        program.state_dict[name] = (
            nn.Parameter(tensor) if name in dict(other.named_parameters()) else tensor
        )
    runs_equal(fxparam.fold(program), other, x_of())


@pytest.mark.parametrize("wrap", [random_mask, spectral_norm, counts_itself])
def test_folding_what_has_effects_is_refused(wrap: Any) -> None:
    model = Cell(wrap)
    for call in (
        lambda: fxparam.export(model, (x_of(),), fold=True),
        lambda: fxparam.fold(torch.export.export(model, (x_of(),), strict=True)),
    ):
        with pytest.raises(ValueError, match=r"cell\.weight_hh"):
            call()


def test_folding_without_parametrizations_changes_nothing() -> None:
    program = torch.export.export(nn.Linear(4, 2, dtype=torch.float64), (x_of(),))
    folded = fxparam.fold(program)
    assert str(folded.graph) == str(program.graph)
    assert folded.graph_signature == program.graph_signature


@pytest.mark.parametrize("twice", [False, True])
def test_folding_a_value_that_the_program_returns(twice: bool) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = weight_norm(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Any:
            weights = [self.cell.weight, self.cell.weight] if twice else [self.cell.weight]
            return {"weights": weights, "y": self.cell(x), "rows": x.shape[0], "one": 1}

    model, x = Returns(), torch.randn(4, 3)
    shapes = ({0: torch.export.Dim("rows")},)
    for program in (
        fxparam.export(model, (x,), dynamic_shapes=shapes, fold=True),
        fxparam.fold(torch.export.export(model, (x,), dynamic_shapes=shapes)),
    ):
        assert list(program.state_dict) == ["cell.bias", "cell.weight"]
        torch.testing.assert_close(program.module()(x[:2]), model(x[:2]))


def test_folding_under_no_grad_in_the_model() -> None:
    class Frozen(Cell):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = super().forward(x)
            return super().forward(x)

    model = Frozen(orthogonal).eval()
    folded = fxparam.export(model, (x_of(),), fold=True)
    assert sorted(folded.state_dict) == FOLDED
    runs_equal(folded, model, x_of())


def test_folding_keeps_an_original_that_is_read_elsewhere() -> None:
    class Penalized(Cell):
        def forward(self, x: Tensor) -> Any:
            penalty = self.cell.parametrizations.weight_hh.original.mul(x.sum()).sum()
            return super().forward(x), penalty

    model = Penalized(orthogonal).eval()
    folded = fxparam.export(model, (x_of(),), fold=True)
    assert "cell.parametrizations.weight_hh.original" in folded.state_dict
    runs_equal(folded, model, x_of())


@pytest.mark.parametrize("strict", [False, True])
def test_folding_what_only_a_branch_evaluates_is_refused(strict: bool) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = weight_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.cell(x), lambda x: x.sin(), (x,))

    with pytest.raises(ValueError, match="cell.weight: the body of a loop or branch evaluates it"):
        fxparam.export(Branch(), (torch.ones(2, 4),), fold=True, strict=strict)


def test_folding_a_decomposed_program_that_writes_is_refused() -> None:
    layer = spectral_norm(nn.Linear(4, 4))
    program = torch.export.export(layer, (torch.ones(2, 4),)).run_decompositions()
    with pytest.raises(ValueError, match="found: weight: the evaluation writes"):
        fxparam.fold(program)


class _Uses(nn.Module):
    """Reads a parametrized tensor, and its original, outside of the evaluation."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, dtype=torch.float64)
        parametrize.register_parametrization(self.a, "weight", step)

    def forward(self, x: Tensor) -> Any:
        original: Any = self.a.parametrizations.weight.original  # type: ignore[union-attr]
        return self.a(x), self.a.weight * 2, original.norm()


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("step", [nn.Identity, zoo.Symmetric])
def test_what_uses_a_tensor_is_no_part_of_its_evaluation(
    step: type[nn.Module], strict: bool
) -> None:
    model = _Uses(step()).eval()
    folded = fxparam.export(model, (X,), strict=strict, fold=True)
    runs_equal(folded, model, X)
    torch.testing.assert_close(folded.state_dict["a.weight"], model.a.weight)
    kept = {"a.parametrizations.weight.original"} if step is zoo.Symmetric else set()
    assert folded.state_dict.keys() == {"a.bias", "a.weight"} | kept
