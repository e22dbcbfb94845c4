"""The tracer of models, which goes into the modules that have parametrized tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import TraceError
from torch.nn import Module
from torch.nn.utils.parametrize import ParametrizationList

from fxparam._torch.fx import written_argument
from fxparam._torch.names import call_with_hooks, tree_flatten
from fxparam.tracing.constants import Constants, shown_attribute
from fxparam.tracing.grad_mode import record_grad_mode, replaced
from fxparam.tracing.propagation import Propagation, is_constant
from fxparam.tracing.proxies import Known, Recorded, keep_old_numbers
from fxparam.tracing.rebound import CannotRebindError, State, write_rebound

__all__ = ["Tracer"]


class Tracer(torch.fx.Tracer):
    """Traces parametrizations as part of the modules that have them.

    A module with a parametrized tensor, in itself or in a submodule, is no leaf, built-in layers
    included; override ``is_leaf_module`` to make it one. The graph reads the original tensors
    (``cell.parametrizations.weight.original``) and every buffer by name. What a parametrization
    asks of its originals' shapes and dtypes is answered while tracing and fixed in the graph.
    Switches of the grad mode are recorded. What code binds to buffers (``self.h = f(self.h)``) is
    written to them at the end of the graph; other attributes it changes are put back.

    Each access is an evaluation, as in eager code; :func:`symbolic_trace` shares them.

    Args: those of :class:`torch.fx.Tracer`.

    Raises:
        torch.fx.proxy.TraceError: from ``trace``: a module branches on its input, draws random
            numbers that do not depend on it, or does something else that cannot be traced without
            example inputs; the message names it. Or a buffer is bound to what a graph cannot write
            to it: a tensor of another shape or dtype, or that is in the model already.

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
        """Return the graph of ``root``, whose ``get_attr`` nodes read tensors by their names.

        Constants are attributes of ``root`` afterwards, as :class:`torch.fx.Tracer` makes them.
        """
        self._state = State(root)
        tensors = self._state.tensors
        self._own = {id(tensor) for tensor in tensors.values()}
        self._known = Propagation(tensors)
        self._constants = Constants(
            [*tensors.values(), *self._state.plain_tensors], lambda: self._known.running
        )
        self._made: set[str] = set()  # the names of constants
        try:
            if isinstance(root, Module):
                _check_backward_hooks(root)
            with self._recording():
                graph = super().trace(root, concrete_args)
            self._finish(graph, tensors)
            read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
            added = {name: value for name, value in vars(self.root).items() if name in read}
        except (_CannotTraceError, CannotRebindError):
            raise
        except Exception as error:
            raise _CannotTraceError("the model", root, error) from error
        finally:
            self._state.restore()
        for name, value in added.items():  # constants, which torch.fx has made on the root
            vars(self.root).setdefault(name, value)
        return graph

    @contextmanager
    def _recording(self) -> Iterator[None]:
        def paused() -> bool:
            return self._known.running

        with (
            record_grad_mode(lambda: self.graph, paused),
            replaced(Module, "__setattr__", self._assigning(Module.__setattr__)),
            replaced(torch.autograd.Function, "apply", _refusing_functions()),
            _no_other_modes(self._known),
            self._constants,
        ):
            yield

    def _finish(self, graph: Graph, tensors: dict[str, torch.Tensor]) -> None:
        def describe(node: Node) -> None:
            self._known.describe(node, self.root)

        write_rebound(graph, tensors, self._state.rebound(), describe)
        keep_old_numbers(graph)
        output = graph.output_node()
        for node in output.all_input_nodes:
            shown = shown_attribute(node)
            if shown is not None and shown.target in self._made:  # the caller may write to it
                with graph.inserting_before(output):
                    output.replace_input_with(node, graph.call_method("clone", (node,)))

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """Check whether calls of ``m`` become one node each, as torch.fx does with built-in layers.

        False for parametrized modules, and for the modules of parametrizations.
        """
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
            if not self.is_leaf_module(m, self.path_of_module(m)):
                _check_backward_hooks(m)
            return super().call_module(m, forward, args, kwargs)
        except _CannotTraceError:
            raise
        except Exception as error:
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            raise _CannotTraceError(self.path_of_module(m), m, error) from error

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return the function to trace, with the model's own forward hooks, and its arguments."""
        call, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        if not is_module or not (self.root._forward_hooks or self.root._forward_pre_hooks):
            return call, args

        @functools.wraps(call)
        def hooked(root: Module, *args: Any) -> Any:
            with replaced(root, "forward", functools.partial(call, root)):
                return call_with_hooks(root, args)

        return hooked, args

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> Node:
        """Make a node, with its metadata where parameters alone decide them."""
        node = super().create_node(kind, *args, **kwargs)
        if isinstance(node.type, str):
            node.type = None  # a postponed annotation; torch.fx pickles no graph with one
        self._known.describe(node, self.root)
        shown = shown_attribute(written_argument(node))
        if shown is not None and str(shown.target) in self.tensor_attrs.values():
            name = getattr(node.target, "__name__", node.target)
            raise NotImplementedError(f"{name} writes to a tensor that is a constant of the graph")
        return node

    def create_arg(self, a: Any) -> Any:
        """Turn an argument into one of a node; equal constants become the same one."""
        if not isinstance(a, torch.Tensor) or id(a) in self._own or a in self.tensor_attrs:
            return super().create_arg(a)
        a = self._constants.first_equal(a)
        read = super().create_arg(a)
        self._made.add(self.tensor_attrs[a])
        return read

    def proxy(self, node: Node) -> Proxy:
        """Return a proxy that knows its metadata, if those are known."""
        return (Known if "val" in node.meta else Recorded)(node, self)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        """Return a proxy, or the number that a question about known metadata has for an answer."""
        proxy = super().create_proxy(kind, *args, **kwargs)
        if kind.startswith("call") and is_constant(proxy.node.meta.get("val")):
            value = proxy.node.meta["val"]
            self.graph.erase_node(proxy.node)
            return value
        return proxy

    def _assigning(self, original: Callable[[Module, str, Any], None]) -> Callable[..., None]:
        """Return a ``Module.__setattr__`` that lets a buffer hold what traced code computes."""

        def assign(module: Module, name: str, value: Any) -> None:
            is_tensor = isinstance(value, (Proxy, torch.Tensor)) and not isinstance(
                value, torch.nn.Parameter
            )
            if is_tensor and name in module._buffers and module in self._state:
                if isinstance(value, torch.Tensor):  # in each call a new one
                    value = self.proxy(self.create_arg(value)).clone()
                module._buffers[name] = value
            else:
                original(module, name, value)

        return assign


class _CannotTraceError(TraceError):
    """Raised for a module that cannot be traced; the message names the innermost one."""

    def __init__(self, path: str, module: object, error: Exception) -> None:
        kind = type(module).__name__ if isinstance(module, Module) else "a function"
        super().__init__(
            f"{path} ({kind}) cannot be traced symbolically.\n"
            "required: a forward that can be recorded, and does not branch on its inputs\n"
            f"found: {error}\n"
            "Give fxparam.symbolic_trace example_inputs=, or make the module a leaf "
            "(fxparam.Tracer.is_leaf_module)."
        )


def _check_backward_hooks(module: Module) -> None:
    """Raise NotImplementedError if a module has backward hooks.

    torch hangs them on the tensors of a call, and tracing has proxies instead.
    """
    if module._backward_hooks or module._backward_pre_hooks:
        raise NotImplementedError("a backward hook on the module, which would be lost")


def _refusing_functions() -> Any:
    """Return an ``autograd.Function.apply`` that raises NotImplementedError for proxies.

    The graph would have the nodes of its forward alone, with their own derivatives
    (``test_a_custom_backward_is_not_lost``).
    """
    original: Any = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, Proxy) for leaf in tree_flatten((args, kwargs))[0]):
            raise NotImplementedError(f"{cls.__name__}, whose backward would be lost")
        return original.__get__(None, cls)(*args, **kwargs)

    return classmethod(apply)


@contextmanager
def _no_other_modes(known: Propagation) -> Iterator[None]:
    """Raise NotImplementedError when traced code enters autocast or inference mode in the block.

    The graph would run without them (``test_modes_that_are_not_recorded_are_refused``).
    """

    def refusing(mode: type) -> Any:
        original: Any = mode.__enter__  # type: ignore[attr-defined]

        def enter(self: Any) -> Any:
            if known.running:
                return original(self)
            raise NotImplementedError(f"torch.{mode.__name__} in traced code is not recorded")

        return enter

    autocast, inference = torch.autocast, torch.inference_mode
    with (
        replaced(autocast, "__enter__", refusing(autocast)),
        replaced(inference, "__enter__", refusing(inference)),
    ):
        yield
