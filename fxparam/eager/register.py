"""Register and remove parametrizations, and ask what is parametrized.

Each function checks everything first and changes the module last, so that a refused call changes
nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, TypeVar

from torch.nn import Module, ModuleDict

from fxparam.eager import checks, reading
from fxparam.eager.classes import chain_of, chains_of, original_class
from fxparam.eager.describe import first_names, kind_of, spelled
from fxparam.eager.engines import engine_of
from fxparam.eager.hooks import drop_hooks
from fxparam.eager.install import class_with, install, uninstall
from fxparam.eager.parametrization_list import ParametrizationList
from fxparam.eager.plain import plain_tensor
from fxparam.eager.rollback import unchanged_if_refused
from fxparam.eager.transfer import transferred

__all__ = [
    "is_parametrized",
    "register_parametrization",
    "remove_parametrizations",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]

M = TypeVar("M", bound=Module)


def register_parametrization(
    module: M, tensor_name: str, parametrization: Module, *, unsafe: bool = False
) -> M:
    """Make ``module.<tensor_name>`` the value of ``parametrization`` on an original tensor.

    The tensor moves to ``module.parametrizations.<tensor_name>.original`` and keeps its identity,
    so that optimizers still hold it. If ``parametrization.right_inverse`` exists, the original is
    set to what it gives; if it gives a sequence of tensors, these become new ``original0``,
    ``original1``, ..., and ``forward`` is called with as many arguments. Registering again on the
    same tensor appends to the chain. ``module.<tensor_name> = value`` goes through the right
    inverses. The parametrization takes over the training mode of ``module``.

    Args:
        module: the module; changed in place.
        tensor_name: a parameter or buffer of ``module``, or a tensor already parametrized. Its
            shape, dtype and device stay what they are.
        parametrization: maps original tensor(s) to the value. A tensor of shape ``(*)`` and some
            dtype to one of the same shape and dtype, unless ``unsafe``.
        unsafe: skip the checks of the value's shape and dtype.

    Returns:
        ``module``.

    Raises:
        ValueError: if there is no tensor of that name; if the value is not a tensor or changes
            dtype or shape; if ``right_inverse`` gives something else than tensors, or one tensor
            of another dtype or device; for a chain, if it gives another dtype or shape.
        TypeError: if ``module`` or ``parametrization`` is not a module.
        RuntimeError: if the tensor is uninitialized (a lazy module), or ``module`` is one of
            ``torch.jit``.
        KeyError: if the name is one that ``torch.nn.ModuleDict`` reserves, such as ``"keys"``.

    After an error, ``module`` and ``parametrization`` are as before.

    Source: :func:`torch.nn.utils.parametrize.register_parametrization`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> class Symmetric(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.triu() + x.triu(1).mT
        ...     def right_inverse(self, a):
        ...         return a.triu()
        >>> layer = fxparam.register_parametrization(torch.nn.Linear(3, 3), "weight", Symmetric())
        >>> torch.equal(layer.weight, layer.weight.mT)
        True
        >>> layer.weight = torch.eye(3)
        >>> torch.equal(layer.weight, torch.eye(3))
        True
    """
    checks.check_modules(module=module, parametrization=parametrization)
    if is_parametrized(module, tensor_name):
        chain: Any = module.parametrizations[tensor_name]  # type: ignore[index]
        with (
            engine_of(module, tensor_name, chain) as engine,
            unchanged_if_refused(chain, parametrization),
        ):
            engine.check_has_no_parameters(parametrization)
            parametrization.train(module.training)
            checks.check_takes_one_tensor(parametrization, tensor_name)
            if not unsafe:
                value = reading.present().value(chain, "")
                checks.check_appended(value, parametrization, tensor_name)
            chain.append(parametrization)
            chain.unsafe |= unsafe
        return module
    with engine_of(module, tensor_name) as engine:
        original = checks.registrable(module, tensor_name)
        engine.check_may_be_stored()
        engine.check_is_not_tied()
        engine.check_has_no_parameters(parametrization)
        cls = class_with(module, tensor_name)
        with unchanged_if_refused(parametrization, tensor=original):
            parametrization.train(module.training)
            chain = ParametrizationList([parametrization], original, unsafe=unsafe)
            engine.check_stays_one_tensor(chain)
        install(module, tensor_name, chain, cls)
        engine.move(chain, "original")
    return module


def is_parametrized(module: Module, tensor_name: str | None = None) -> bool:
    """Check whether ``module`` has a parametrized tensor: any, or the one named ``tensor_name``.

    Modules parametrized through ``torch.nn.utils.parametrize`` count as well.

    Source: :func:`torch.nn.utils.parametrize.is_parametrized`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = fxparam.register_parametrization(layer, "bias", torch.nn.Identity())
        >>> fxparam.is_parametrized(layer), fxparam.is_parametrized(layer, "weight")
        (True, False)
    """
    chains = getattr(module, "parametrizations", None)
    if not isinstance(chains, ModuleDict):
        return False
    return len(chains) > 0 if tensor_name is None else tensor_name in chains


def remove_parametrizations(module: M, tensor_name: str, leave_parametrized: bool = True) -> M:
    """Make ``module.<tensor_name>`` a plain parameter or buffer again.

    Args:
        module: the module; changed in place. With its last parametrized tensor it gets back the
            class it had.
        tensor_name: the parametrized tensor.
        leave_parametrized: True: the tensor keeps its present value (in the original tensor,
            which keeps its identity, or in a new one if there were several originals: a parameter
            if they are, whether or not they ask for a gradient and in every grad mode). False: it
            becomes the original tensor, unchanged.

    Returns:
        ``module``.

    Raises:
        ValueError: if the tensor is not parametrized; if ``leave_parametrized=False`` and it has
            several originals.
        RuntimeError: if the present value cannot be stored in the original (its dtype differs, or
            a tensor subclass has no ``set_``).

    After an error, ``module`` is as before.

    Source: :func:`torch.nn.utils.parametrize.remove_parametrizations`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = fxparam.register_parametrization(layer, "weight", torch.nn.Tanh())
        >>> fxparam.remove_parametrizations(layer, "weight", leave_parametrized=False)
        Linear(in_features=2, out_features=2, bias=True)
    """
    checks.check_modules(module=module)
    present: Any = chains_of(module) if is_parametrized(module) else None
    chain = chain_of(module, tensor_name) if present else None
    if chain is None:
        raise ValueError(
            f"Module '{kind_of(module)}' does not have a parametrization on "
            f"{spelled(tensor_name)}\nparametrized: {first_names(sorted(present or ()))}\n"
            f"asked for: {spelled(tensor_name)}"
        )
    with engine_of(module, tensor_name, chain) as engine:
        engine.check_stays_one_tensor(chain)
        engine.check_is_not_tied()
        if leave_parametrized:
            engine.check_may_be_stored()
        with unchanged_if_refused(chain):
            plain = plain_tensor(module, tensor_name, chain, leave_parametrized)
        uninstall(module, tensor_name, plain)
        engine.move(module, tensor_name)
    drop_hooks(module, tensor_name)
    return module


def type_before_parametrizations(module: Module) -> type:
    """Return the class of ``module`` before anything was parametrized; its class if nothing is.

    Source: :func:`torch.nn.utils.parametrize.type_before_parametrizations`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = fxparam.register_parametrization(layer, "bias", torch.nn.Identity())
        >>> type(layer).__name__, fxparam.type_before_parametrizations(layer).__name__
        ('ParametrizedLinear', 'Linear')
    """
    if not is_parametrized(module):
        return type(module)
    # Along the MRO, as a class may have been put on top since (FSDP does so).
    found = (original_class(cls) for cls in type(module).__mro__)
    return next((cls for cls in found if cls is not None), type(module).__bases__[0])


def transfer_parametrizations_and_params(
    from_module: Module, to_module: M, tensor_name: str | None = None
) -> M:
    """Give ``to_module`` the parametrizations of ``from_module``, with their parameters.

    Both modules then hold the same parametrization modules and the same original tensors. A tensor
    that ``to_module`` lacks is created. The parametrizations take over the training mode of
    ``to_module``. Nothing happens if ``from_module`` is not parametrized.

    Args:
        from_module: the module to take from; unchanged.
        to_module: the module to give to; its tensors have the shapes and dtypes of
            ``from_module``'s.
        tensor_name: the one tensor to transfer; all parametrized ones if None.

    Returns:
        ``to_module``.

    Raises:
        KeyError: if ``tensor_name`` is not parametrized in ``from_module``.
        AttributeError: if neither module has it.
        ValueError: if the parametrizations change the dtype or shape of a tensor of ``to_module``.
        RuntimeError: if ``to_module`` is lazy and not yet called, or one of ``torch.jit``.

    After an error, both modules are as before.

    Source: :func:`torch.nn.utils.parametrize.transfer_parametrizations_and_params`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> _ = fxparam.register_parametrization(a, "weight", torch.nn.Tanh())
        >>> _ = fxparam.transfer_parametrizations_and_params(a, b)
        >>> a.parametrizations.weight.original is b.parametrizations.weight.original
        True
    """
    checks.check_modules(from_module=from_module, to_module=to_module)
    if not is_parametrized(from_module):
        return to_module
    checks.check_not_scripted(to_module)
    names = list(chains_of(from_module) or ()) if tensor_name is None else [tensor_name]
    with ExitStack() as undo:
        for name in names:
            chain = chain_of(to_module, name)
            undo.enter_context(engine_of(to_module, name, chain)).check_is_none()
            both = [chain_of(module, name) for module in (from_module, to_module)]
            undo.enter_context(unchanged_if_refused(*filter(None, both)))
            for step in chain_of(from_module, name) or ():
                step.train(to_module.training)
        chains = {n: transferred(from_module, to_module, n) for n in names}
    for name, chain in chains.items():
        present = chain_of(to_module, name)
        if present is None:
            install(to_module, name, chain, class_with(to_module, name))
        else:
            present.__dict__.update(chain.__dict__)
    return to_module
