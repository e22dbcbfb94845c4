"""The graph modules of :func:`fxparam.symbolic_trace`: a model's tensors and a graph over them.

A plain ``GraphModule`` keeps what its graph reads and forgets the rest. These keep every parameter
and buffer under the name it has in the model, so that state dicts fit both; copies and pickles too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, GraphModule
from torch.nn import Module

from fxparam._torch.fx import unpickle_with
from fxparam.tracing.retrace import Retracer

__all__ = ["Blocks", "TracedModule", "skeleton"]


class TracedModule(GraphModule):
    """A graph module that holds every parameter and buffer of ``root``, and its extra state."""

    def __init__(
        self, root: Module | dict[str, Any], graph: Graph, class_name: str = "GraphModule"
    ) -> None:
        super().__init__(root, graph, class_name)
        if isinstance(root, Module):
            constants = set(self._buffers) - set(root._buffers)
            for held in ("_parameters", "_buffers", "_modules"):
                ours, theirs = self.__dict__[held], root.__dict__[held]
                added = {k: v for k, v in ours.items() if k not in theirs}
                self.__dict__[held] = {**theirs, **added}
            # Constants of the code are no part of the state.
            self._non_persistent_buffers_set = root._non_persistent_buffers_set | constants
            if _EXTRA in vars(root):
                self.__dict__[_EXTRA] = vars(root)[_EXTRA]
                kind: Any = type(self)  # torch.fx makes one for each instance
                kind.get_extra_state = _Stateful.get_extra_state
                kind.set_extra_state = _Stateful.set_extra_state

    def _deepcopy_init(self) -> Callable[..., None]:
        return TracedModule.__init__

    def __reduce__(self) -> Any:
        return _rebuild, super().__reduce__()


def _rebuild(function: Callable[..., GraphModule], arguments: tuple[Any, ...]) -> TracedModule:
    body = arguments[0]
    tracer = body.get("_tracer_cls")
    traced = function({**body, "_tracer_cls": Retracer}, *arguments[1:])
    unpickle_with(traced.graph, tracer)
    held = Module()
    held.__dict__ = dict(body)
    return TracedModule(held, traced.graph, held.__dict__.get("_graphmodule_cls_name", ""))


_EXTRA = "_extra_state"


class _Stateful(Module):
    """Holds a copy of the extra state of a module, without which state dicts would not fit both.

    ``load_state_dict`` is strict about the key (``test_extra_state``).
    """

    def get_extra_state(self) -> Any:
        return self.__dict__[_EXTRA]

    def set_extra_state(self, state: Any) -> None:
        self.__dict__[_EXTRA] = state


def _bare(module: Module) -> Module:
    """Return an empty module, with the extra state of ``module`` if it has any."""
    if type(module).get_extra_state is Module.get_extra_state:
        return Module()
    bare = _Stateful()
    bare.set_extra_state(module.get_extra_state())
    return bare


def skeleton(root: Module, whole: Sequence[str] = ()) -> Module:
    """Return the tree of a model's modules, with its very parameters and buffers and no code.

    Args:
        root: the model.
        whole: qualified names of the modules that are taken as they are.
    """
    kept = {root.get_submodule(name) for name in whole}
    made: dict[Module, Module] = {}

    def copy(module: Module) -> Module:
        if module in kept:
            return module
        if module not in made:
            bare = made[module] = _bare(module)
            bare.training = module.training
            bare._parameters = dict(module._parameters)
            bare._buffers = dict(module._buffers)
            bare._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
            bare._modules = {k: None if m is None else copy(m) for k, m in module._modules.items()}
        return made[module]

    return copy(root)


class Blocks:
    """Puts a heading over the prologue and over the body, in the code of a graph."""

    def __init__(self, prologue: Sequence[str]) -> None:
        self.prologue = frozenset(prologue)

    def __call__(self, code: list[str]) -> list[str]:
        headings = [
            (True, "\n# prologue: from parameters and buffers alone\n"),
            (False, "\n# body\n"),
        ]
        out: list[str] = []
        for line in code:
            name = line.partition("=")[0].partition(":")[0].strip()
            is_statement = name.isidentifier() or line.lstrip().startswith("return")
            if headings and is_statement and (name in self.prologue) is headings[0][0]:
                out.append(headings.pop(0)[1])
            out.append(line)
        return out
