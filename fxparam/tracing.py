"""Symbolic tracing in which parametrizations are ordinary, named operations, evaluated once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import TraceError
from torch.nn import Module
from torch.nn.utils.parametrize import ParametrizationList

from fxparam._capture import capture
from fxparam._grad_mode import RecordGradMode
from fxparam._known import Known, Propagation, is_constant
from fxparam._private import storage_identity
from fxparam._traced import Blocks, TracedModule, skeleton
from fxparam.graph import hoist
from fxparam.graph.naming import label
from fxparam.graph.prologue import lift

__all__ = ["Tracer", "symbolic_trace"]


class Tracer(torch.fx.Tracer):
    """Traces parametrizations as part of the modules that have them.

    A module with a parametrized tensor, in itself or in a submodule, is no leaf, built-in layers
    included; override ``is_leaf_module`` to make it one. The graph reads the original tensors
    (``cell.parametrizations.weight.original``) and every buffer by name. What a parametrization
    asks of its originals' shapes and dtypes is answered while tracing and fixed in the graph.
    Switches of the grad mode are recorded.

    Each access is an evaluation, as in eager code; :func:`symbolic_trace` shares them.

    Args: those of :class:`torch.fx.Tracer`.

    Raises:
        torch.fx.proxy.TraceError: from ``trace``: a module branches on its input, or does
            something else that cannot be traced without example inputs; the message names it.

    Source: :class:`torch.fx.Tracer`, of which it is a subclass.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
        >>> for node in fxparam.Tracer().trace(layer).nodes:
        ...     print(node.name)
        input_1
        parametrizations_weight_original0
        parametrizations_weight_original1
        _weight_norm
        bias
        linear
        output
    """

    proxy_buffer_attributes = True

    def trace(
        self,
        root: Module | Callable[..., Any],
        concrete_args: dict[str, Any] | None = None,
    ) -> Graph:
        """The graph of ``root``, whose tensors ``get_attr`` nodes read by their names in it."""
        self._known = Propagation()
        self._rebound: dict[torch.Tensor, Proxy] = {}
        grad_mode = RecordGradMode(lambda: self.graph, lambda: self._known.running)
        try:
            with grad_mode, self._buffers_rebound_in_the_graph(), _no_other_modes(self._known):
                return super().trace(root, concrete_args)
        except _CannotTraceError:
            raise
        except Exception as error:
            raise _CannotTraceError("the model", root, error) from error

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """As in torch.fx, but for parametrized modules and the modules of parametrizations."""
        inside = any(
            isinstance(kind, type) and issubclass(kind, ParametrizationList)
            for _, kind in self.module_stack.values()
        )
        if inside or any(isinstance(part, ParametrizationList) for part in m.modules()):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a call, and name the module in the error if that cannot be done."""
        depth = len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _CannotTraceError:
            raise
        except Exception as error:
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            raise _CannotTraceError(self.path_of_module(m), m, error) from error

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """As in torch.fx, with the values that traced code has assigned to buffers."""
        if isinstance(attr_val, torch.Tensor) and attr_val in self._rebound:
            return self._rebound[attr_val]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> Node:
        """As in torch.fx, with metadata where parameters alone decide them."""
        if kind == "output":
            self._write_rebound_buffers()
        node = super().create_node(kind, *args, **kwargs)
        if isinstance(node.type, str):
            node.type = None  # a postponed annotation, with which torch.fx would not pickle
        value = None
        if kind == "get_attr":
            value = self._known.attribute(_attribute(self.root, str(node.target)))
        elif kind in ("call_function", "call_method"):
            value = self._known.result(node)
        if value is not None:
            node.meta["val"] = value
        return node

    def proxy(self, node: Node) -> Proxy:
        """A proxy that knows its metadata, if those are known."""
        return Known(node, self) if "val" in node.meta else super().proxy(node)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        """A proxy, or the number that a question about known metadata has for an answer."""
        proxy = super().create_proxy(kind, *args, **kwargs)
        if kind.startswith("call") and is_constant(proxy.node.meta.get("val")):
            value = proxy.node.meta["val"]
            self.graph.erase_node(proxy.node)
            return value
        return proxy

    @contextmanager
    def _buffers_rebound_in_the_graph(self) -> Iterator[None]:
        """``self.u = f(self.u)`` of a buffer changes the traced program, not the module."""
        original = Module.__setattr__

        def assign(module: Module, name: str, value: Any) -> None:
            buffer = module._buffers.get(name)
            if isinstance(value, Proxy) and buffer is not None:
                self._rebound[buffer] = value
            else:
                original(module, name, value)

        with _replaced(Module, "__setattr__", assign):
            yield

    def _write_rebound_buffers(self) -> None:
        """What code that rebinds a buffer leaves in the module, the graph writes to the buffer."""
        names = {id(b): n for n, b in self.root.named_buffers()}
        for buffer, proxy in self._rebound.items():
            target = self.create_proxy("get_attr", names[id(buffer)], (), {})
            if not _is_same_memory(target.node, proxy.node):
                target.copy_(proxy.detach())
        self._rebound = {}


class _CannotTraceError(TraceError):
    """Says which module could not be traced."""

    def __init__(self, path: str, module: object, error: Exception) -> None:
        kind = type(module).__name__ if isinstance(module, Module) else "a function"
        super().__init__(
            f"{path} ({kind}) cannot be traced symbolically.\n"
            "required: a forward that does not branch on its inputs\n"
            f"found: {error}\n"
            "Give fxparam.symbolic_trace example_inputs=, or make the module a leaf "
            "(fxparam.Tracer.is_leaf_module)."
        )


def _attribute(root: Module, name: str) -> Any:
    """What a module holds under a name; not by ``getattr``, which the tracer answers."""
    path, _, last = name.rpartition(".")
    for part in path.split(".") if path else ():
        held = root._modules.get(part)
        if held is None:
            return None
        root = held
    for held_by in (root._parameters, root._buffers, vars(root)):
        if last in held_by:
            return held_by[last]
    return None


def _is_same_memory(one: Node, other: Node) -> bool:
    a, b = (storage_identity(node.meta.get("val"))[1] for node in (one, other))
    return a is not None and a == b


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _no_other_modes(known: Propagation) -> Iterator[None]:
    """Refuse modes that symbolic tracing would not record."""

    def refusing(mode: type) -> Any:
        original: Any = mode.__enter__  # type: ignore[attr-defined]

        def enter(self: Any) -> Any:
            if known.running:
                return original(self)
            raise NotImplementedError(f"torch.{mode.__name__} in traced code is not recorded")

        return enter

    autocast, inference = torch.autocast, torch.inference_mode
    with (
        _replaced(autocast, "__enter__", refusing(autocast)),
        _replaced(inference, "__enter__", refusing(inference)),
    ):
        yield


def symbolic_trace(
    root: Module | Callable[..., Any],
    concrete_args: dict[str, Any] | None = None,
    *,
    share: bool = True,
    example_inputs: Sequence[Any] | None = None,
) -> GraphModule:
    """Trace a model into a graph whose parametrizations are ordinary operations, in a prologue.

    The graph module has the model's own parameters and buffers, under the model's names: training
    one trains the other, and their state dicts have the same keys. Nodes of a parametrization
    carry ``meta["fxparam"]`` (which tensor, which step of its chain) and ``nn_module_stack``; the
    value is named after the tensor, ``cell_weight_hh``.

    Args:
        root: a module or function.
        concrete_args: as in :func:`torch.fx.symbolic_trace`.
        share: one evaluation of each parametrized tensor where that is right, by the same rules as
            in compiled code; False gives one for each access, as eager code has. Without example
            inputs it is shared only where what the operations in between do is known by their
            declarations.
        example_inputs: positional arguments of a call. With them the model is captured by Dynamo,
            which follows branches on ranks, dtypes and shapes; ranks and dtypes are then fixed, and
            sizes where the model looks at them.

    Raises:
        torch.fx.proxy.TraceError: the model cannot be traced without example inputs; the message
            names the module.
        ValueError: both ``concrete_args`` and ``example_inputs`` are given.

    Source: :func:`torch.fx.symbolic_trace`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> class Twice(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         linear = torch.nn.Linear(2, 2, bias=False)
        ...         self.cell = torch.nn.utils.parametrizations.weight_norm(linear)
        ...     def forward(self, x):
        ...         return torch.tanh(self.cell(torch.tanh(self.cell(x))))
        >>> [node.name for node in fxparam.symbolic_trace(Twice()).graph.nodes][3:]
        ['cell_weight', 'linear', 'tanh', 'linear_1', 'tanh_1', 'output']
    """
    if example_inputs is not None and concrete_args is not None:
        raise ValueError(
            "concrete_args are for tracing without example inputs.\n"
            "required: one of concrete_args and example_inputs\nfound: both"
        )
    gm = _traced(root, concrete_args) if example_inputs is None else _captured(root, example_inputs)
    if share:
        hoist(gm)
    label(gm)
    if share:
        prologue = lift(gm)
        if prologue:
            gm.graph.on_generate_code(lambda _: Blocks([node.name for node in prologue]))
    gm.graph.lint()
    gm.recompile()
    return gm


def _traced(root: Any, concrete_args: dict[str, Any] | None) -> GraphModule:
    tracer = Tracer()
    if not isinstance(root, Module):
        graph = tracer.trace(root, concrete_args)
        return TracedModule(tracer.root, graph, _name(root))
    with _unchanged(root) as constants:
        graph = tracer.trace(root, concrete_args)
    leaves = [str(node.target) for node in graph.find_nodes(op="call_module")]
    held = skeleton(root, leaves)
    for name, constant in constants.items():
        held.register_buffer(name, constant, persistent=False)
    for node in graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        module, value = held.get_submodule(path), _attribute(root, str(node.target))
        if not hasattr(module, name):  # a plain attribute: a tensor, or an opaque object
            if isinstance(value, torch.Tensor):
                module.register_buffer(name, value, persistent=False)
            else:
                setattr(module, name, value)
    return TracedModule(held, graph, _name(root))


@contextmanager
def _unchanged(root: Module) -> Iterator[dict[str, torch.Tensor]]:
    """Take off the model the constants that torch.fx puts on it."""
    before = set(vars(root))
    constants: dict[str, torch.Tensor] = {}
    try:
        yield constants
    finally:
        for name in set(vars(root)) - before:
            if isinstance(vars(root)[name], torch.Tensor):
                constants[name] = vars(root).pop(name)


def _captured(root: Any, example_inputs: Sequence[Any]) -> GraphModule:
    gm = capture(root, example_inputs, Tracer)
    held = skeleton(root) if isinstance(root, Module) else Module()
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = getattr(gm, name, None)  # what is not the model's: constants and bodies
        if value is None or name in held._parameters or name in held._buffers:
            continue
        if isinstance(value, torch.Tensor):
            held.register_buffer(name, value, persistent=False)
        else:
            setattr(held, name, value)
    return TracedModule(held, gm.graph, _name(root))


def _name(root: Any) -> str:
    return type(root).__name__ if isinstance(root, Module) else str(root.__name__)
