"""Plain tensors in place of parametrized ones for a while; the originals' memory is given up."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fxparam._torch.tensors import owns_memory
from fxparam.eager.classes import chains_of, original_class
from fxparam.eager.describe import first_names
from fxparam.scopes.held import state_of
from fxparam.scopes.models import lists_in
from fxparam.scopes.purity import evaluate_noting_effects

__all__ = ["without_originals"]


@contextmanager
def without_originals(*models: Module) -> Iterator[None]:
    """Replace the parametrized tensors of models by plain ones with their values, for the block.

    What the originals hold is kept in files meanwhile; in main memory if they are on an
    accelerator.

    Raises:
        RuntimeError: a model is in training mode, now or when it is called; a tensor has an
            evaluation with effects; a module has a class that another library put on it.
    """
    names = lists_in(models, "fxparam.frozen(drop_originals=True)")
    for model in models:
        _check_inference(model)
    owners = _owners(models, names)
    with torch.no_grad():
        values = {
            chain: _value(chain, names[chain]) for c in owners.values() for chain in c.values()
        }
    with ExitStack() as restored:
        for model in (*models, *owners):
            _without.add(model)
            restored.callback(_without.discard, model)
            restored.callback(model.register_forward_pre_hook(_refuse_training).remove)
        for module, chains in owners.items():
            restored.callback(_put_back, module, type(module), dict(module._modules))
            _take_out(module, {name: values[chain] for name, chain in chains.items()})
        folder = restored.enter_context(tempfile.TemporaryDirectory(prefix="fxparam-"))
        for i, tensor in enumerate(_tensors_to_give_up(models, values)):
            restored.enter_context(_given_up(tensor, Path(folder, str(i))))
        del values
        yield


def _owners(models: tuple[Module, ...], chains: Iterable[Module]) -> dict[Module, dict[str, Any]]:
    """Return the modules with parametrized tensors, apart from those in parametrizations."""
    inner = {module for chain in chains for module in chain.modules()}
    found: dict[Module, dict[str, Any]] = {}
    for module in (module for model in models for module in model.modules()):
        own = chains_of(module)
        if own is not None and module not in inner:
            found[module] = dict(own.items())
    return found


# Models whose originals are dropped: copies have the hook as well, and are none of them.
_without: WeakSet[Module] = WeakSet()


def _refuse_training(model: Module, *_: Any) -> None:
    """A hook of models whose originals are dropped."""
    if model in _without:
        _check_inference(model)


def _check_inference(model: Module) -> None:
    """Raise RuntimeError if a module of a model is in training mode."""
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise RuntimeError(
            "fxparam.frozen(drop_originals=True) is for inference: nothing can be trained in it.\n"
            f"required: model.eval()\nfound: in training mode are {first_names(training)}"
        )


def _value(chain: Module, name: str) -> Tensor:
    (value,), (pure,) = evaluate_noting_effects([chain], lambda: [chain()], [state_of(chain)])
    if not pure or not isinstance(value, Tensor):
        raise RuntimeError(
            "fxparam.frozen(drop_originals=True) replaces tensors by their values.\n"
            "required: evaluations that write no tensor and draw no random number\n"
            f"found: the evaluation of '{name}' does"
        )
    return value.detach().clone()  # it may be a view of an original


def _take_out(module: Module, values: dict[str, Tensor]) -> None:
    """Make the parametrized tensors of a module plain ones."""
    cls = original_class(type(module))
    if cls is None:
        raise RuntimeError(
            "fxparam.frozen(drop_originals=True) gives a module its original class.\n"
            "required: a class made by fxparam, as adopt(model) gives\n"
            f"found: {type(module).__name__}"
        )
    chains = module._modules.pop("parametrizations")
    assert chains is not None
    object.__setattr__(module, "__class__", cls)
    for name, value in values.items():
        if any(True for _ in chains._modules[name].parameters()):  # type: ignore[union-attr]
            module._parameters[name] = Parameter(value, requires_grad=False)
        else:
            module._buffers[name] = value


def _put_back(module: Module, cls: type, children: dict[str, Module | None]) -> None:
    """Undo what ``_take_out`` did, in part or whole; submodules get back their order."""
    for name in children["parametrizations"]._modules:  # type: ignore[union-attr]
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    object.__setattr__(module, "__class__", cls)
    present = {"parametrizations": children["parametrizations"], **module._modules}
    module._modules.clear()
    for name in (*children, *present):
        if name in present:
            module._modules[name] = present[name]


def _tensors_to_give_up(models: tuple[Module, ...], chains: Iterable[Module]) -> list[Tensor]:
    """Return the tensors of parametrization lists that are alone on memory of their own."""
    left = {id(t) for m in models for t in (*m.parameters(), *m.buffers())}
    found = {id(t): t for chain in chains for t in (*chain.parameters(), *chain.buffers())}
    return [t for t in found.values() if id(t) not in left and owns_memory(t)]


@contextmanager
def _given_up(tensor: Tensor, file: Path) -> Iterator[None]:
    """Let a tensor have no memory in the block."""
    kept: Tensor | None = tensor.detach().clone(memory_format=torch.preserve_format)
    assert kept is not None
    device = tensor.device
    if device.type == "cpu":
        torch.save(kept, file)
        kept = None
    else:
        kept = kept.cpu()
    tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            tensor.data = (torch.load(file) if kept is None else kept).to(device)
