"""Parametrized modules pickle, ``torch.save`` and copy, as plain modules do."""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import fxparam.parametrize as ours
from tests import zoo


class Stateful(nn.Linear):
    """Says itself what is pickled."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.handle = io.BytesIO(b"open")  # never in a pickle
        self.restored = False

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = io.BytesIO(b"again")
        self.restored = True


def _make_reduced(size: int) -> Reduced:
    return Reduced(size)


class Reduced(nn.Linear):
    """Rebuilt by a function, then updated."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.size = size

    def __reduce__(self) -> Any:
        return _make_reduced, (self.size,), self.__dict__


class ReducedByClass(nn.Linear):
    """Rebuilt by calling its class, whichever that is."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.in_features,), self.__dict__


class Copied(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        twin = self.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        twin.copied = True
        return twin


class Rebuilt(nn.Linear):
    """Copied by constructing one of the same class and loading its state."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Rebuilt:
        return type(self)(self.in_features, self.out_features)


class Slotted(nn.Linear):
    __slots__ = ("note",)


class Registered(nn.Linear):
    """Has a reducer in copyreg."""


def _reduce_registered(module: Registered) -> Any:
    return Registered, (module.in_features, module.out_features), module.__dict__


copyreg.pickle(Registered, _reduce_registered)  # type: ignore[arg-type]


def by_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_old_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module, protocol=0))


def by_save(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [by_pickle, by_old_pickle, by_save, copy.deepcopy]


def parametrized(module: nn.Module) -> nn.Module:
    ours.register_parametrization(module, "weight", zoo.Symmetric())
    ours.register_parametrization(module, "weight", zoo.Scaled())
    ours.register_parametrization(module, "bias", zoo.Sum())
    return module


def check_twin(module: nn.Module, twin: nn.Module) -> None:
    assert twin is not module and type(twin) is type(module)
    assert ours.type_before_parametrizations(twin) is ours.type_before_parametrizations(module)
    assert list(twin.state_dict()) == list(module.state_dict())
    for name in module.parametrizations:
        assert ours.is_parametrized(twin, name)
        assert torch.equal(getattr(twin, name), getattr(module, name))
        assert type(twin.parametrizations[name]) is type(module.parametrizations[name])
    before = module.weight.detach().clone()
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.zero_()
    assert torch.equal(module.weight.detach(), before)
    for name in list(twin.parametrizations):
        ours.remove_parametrizations(twin, name)
    assert type(twin) is ours.type_before_parametrizations(module)
    assert ours.is_parametrized(module, "weight")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", [zoo.linear, Stateful, Reduced, ReducedByClass])
def test_round_trip(way: Any, cls: Any) -> None:
    module = parametrized(cls(3))
    twin = way(module)
    check_twin(module, twin)
    if cls is Stateful:
        assert twin.restored and twin.handle.read() == b"again"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", [Slotted, Registered, Copied])
def test_round_trip_of_more_classes(way: Any, cls: Any) -> None:
    module = parametrized(cls(3, 3))
    if cls is Slotted:
        module.note = ["kept"]
    twin = way(module)
    if cls is Slotted:
        assert twin.note == ["kept"] and twin.note is not module.note
    if cls is Copied and way is copy.deepcopy:
        assert twin.copied
    check_twin(module, twin)


def test_constructing_the_class_of_a_parametrized_module() -> None:
    """Some copy by ``type(self)(...)``. What they get is a plain module, and works as one."""
    module = ours.register_parametrization(Rebuilt(3, 3), "weight", zoo.Symmetric())
    twin = copy.deepcopy(module)
    assert isinstance(twin, Rebuilt) and not ours.is_parametrized(twin)
    assert twin.weight is twin._parameters["weight"]
    twin.weight = nn.Parameter(torch.eye(3))
    assert_close(twin(torch.eye(3)), torch.eye(3) + twin.bias)
    assert_close(module(torch.eye(3)), module.weight.mT + module.bias)


def test_shallow_copy() -> None:
    module = parametrized(zoo.linear())
    twin = copy.copy(module)
    assert type(twin) is type(module) and torch.equal(twin.weight, module.weight)
    assert twin.parametrizations is module.parametrizations


@pytest.mark.parametrize("way", WAYS)
def test_inside_a_model_with_shared_tensors(way: Any) -> None:
    first, second = zoo.linear(), zoo.linear()
    ours.register_parametrization(first, "weight", zoo.Symmetric())
    ours.transfer_parametrizations_and_params(first, second)
    model = way(nn.Sequential(first, nn.ReLU(), second, second))
    assert model[2] is model[3] and type(model[0]) is type(model[2])
    a, b = model[0].parametrizations.weight, model[2].parametrizations.weight
    assert a.original is b.original and a[0] is b[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", [orthogonal, spectral_norm, weight_norm])
def test_torch_parametrizations(way: Any, wrap: Any) -> None:
    module = ours.adopt(wrap(nn.Linear(3, 4))).eval()
    twin = way(module)
    assert torch.equal(twin.weight, module.weight)
    if wrap is weight_norm:
        # Its hook still reads state dicts from before parametrizations.
        old = {"weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 3), "bias": torch.ones(4)}
        twin.load_state_dict(old)
        assert_close(twin.weight.detach(), torch.ones(4, 3) / 3**0.5)


@pytest.mark.parametrize("way", WAYS)
def test_a_parametrized_original(way: Any) -> None:
    module = ours.register_parametrization(zoo.linear(), "weight", zoo.Double())
    ours.register_parametrization(module.parametrizations.weight, "original", zoo.Symmetric())
    twin = way(module)
    assert torch.equal(twin.weight, module.weight)
    assert type(twin.parametrizations.weight) is type(module.parametrizations.weight)


def test_torch_refuses_what_ours_pickles() -> None:
    for api, pickles in ((ours, True), (torch_parametrize, False)):
        module = api.register_parametrization(zoo.linear(), "weight", zoo.Symmetric())
        if pickles:
            assert torch.equal(by_pickle(module).weight, module.weight)
        else:
            with pytest.raises(RuntimeError, match="only supported through state_dict"):
                pickle.dumps(module)


def test_in_a_fresh_process(tmp_path: Path) -> None:
    module = ours.adopt(weight_norm(spectral_norm(Stateful(3)).eval(), "bias"))
    torch.save({"model": module, "weight": module.weight.detach()}, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "loaded = torch.load(sys.argv[1], weights_only=False)\n"
        "model, weight = loaded['model'], loaded['weight']\n"
        "import fxparam.parametrize as ours\n"
        "assert torch.equal(model.weight, weight), (model.weight, weight)\n"
        "assert type(model).__name__ == 'ParametrizedStateful' and model.restored\n"
        "assert ours.is_parametrized(model, 'bias')\n"
        "ours.remove_parametrizations(model, 'weight')\n"
        "ours.remove_parametrizations(model, 'bias')\n"
        "assert type(model).__name__ == 'Stateful'\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, cwd=root)


def test_averaged_model() -> None:
    model = nn.Sequential(parametrized(zoo.linear()), nn.Tanh())
    averaged = AveragedModel(model)
    assert type(averaged.module[0]) is type(model[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    twin = by_save(averaged)
    x = torch.randn(2, 3)
    assert_close(twin(x), averaged(x))
    for a, b in zip(twin.parameters(), averaged.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_only_loading_of_a_state_dict(tmp_path: Path) -> None:
    module, twin = parametrized(zoo.linear()), parametrized(zoo.linear())
    torch.save(module.state_dict(), tmp_path / "state.pt")
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(twin.weight, module.weight) and torch.equal(twin.bias, module.bias)


def test_built_on_meta_and_loaded_by_assignment() -> None:
    module = parametrized(zoo.linear())
    with torch.device("meta"):
        twin = parametrized(zoo.linear())
    assert twin.weight.is_meta
    twin.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(twin.weight, module.weight) and torch.equal(twin.bias, module.bias)
    assert isinstance(twin.parametrizations.weight.original, nn.Parameter)


def test_to_empty_and_conversions() -> None:
    with torch.device("meta"):
        module = parametrized(zoo.linear())
    module.to_empty(device="cpu")
    module.load_state_dict(parametrized(zoo.linear()).state_dict())
    assert module.double().weight.dtype == torch.float64


def test_below_another_class() -> None:
    """A class put on top is never lost on the way: it is copied, and pickled only by its name."""
    module = parametrized(zoo.linear())
    module.__class__ = type("Sharded", (zoo.Identity, type(module)), {})
    twin = copy.deepcopy(module)
    assert type(twin) is type(module) and torch.equal(twin.weight, module.weight)
    with pytest.raises(pickle.PicklingError, match="Sharded"):
        pickle.dumps(module)


class Picky(nn.Linear):
    def __reduce__(self) -> str:
        return "SINGLETON"


SINGLETON = Picky(2, 2)
ours.register_parametrization(SINGLETON, "weight", zoo.Double())


def test_a_module_pickled_by_name() -> None:
    assert copy.deepcopy(SINGLETON) is SINGLETON


def test_a_pickle_names_no_class_that_is_made_at_run_time() -> None:
    text = pickle.dumps(parametrized(zoo.linear()), protocol=0).decode("latin-1")
    assert "ParametrizedLinear" not in text and "fxparam.parametrize" in text


def test_a_value_is_not_in_the_pickle() -> None:
    module = parametrized(zoo.linear())
    with ours.cached():
        value: Tensor = module.weight
        assert torch.equal(by_pickle(module).weight, value)
        assert copy.deepcopy(module).weight is not value
