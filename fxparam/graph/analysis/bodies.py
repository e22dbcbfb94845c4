"""The bodies of higher-order ops: which graphs a node runs, on which operands, and how often.

One table says how each op lays out its arguments. An op that is not in it may do anything with
its operands and is not understood.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.names import HigherOrderOperator, tree_flatten
from fxparam.graph.analysis.nodes import body_of, value_of

__all__ = ["Body", "Call", "call_of", "is_run_by_itself"]


@dataclass(frozen=True)
class _Layout:
    """Where an op keeps its bodies and operands.

    Attributes:
        bodies: positions of the bodies, or of lists of them.
        varying: positions of the argument lists that differ between runs: carries and slices.
        operands: position of the list of operands that stay; the rest of the arguments if
            ``spread``.
        always: positions of the bodies that run at least once whenever the op runs.
        branches: of the bodies, one runs.
        inlined: torch traces the body as a part of the graph around, not by itself.
    """

    bodies: tuple[int, ...]
    varying: tuple[int, ...]
    operands: int
    spread: bool = False
    always: tuple[int, ...] = ()
    branches: bool = False
    inlined: bool = False


_LAYOUTS = {
    "scan": _Layout(bodies=(0,), varying=(1, 2), operands=3),
    "associative_scan": _Layout(bodies=(0,), varying=(1, 1), operands=2),
    "map_impl": _Layout(bodies=(0,), varying=(1,), operands=2),
    "while_loop": _Layout(bodies=(0, 1), varying=(2,), operands=3, always=(0,)),
    "cond": _Layout(bodies=(1, 2), varying=(), operands=3, branches=True),
    "switch": _Layout(bodies=(1,), varying=(), operands=2, branches=True),
    "wrap_with_set_grad_enabled": _Layout((1,), (), 2, spread=True, always=(1,), inlined=True),
    "wrap_with_autocast": _Layout((4,), (), 5, spread=True, always=(4,), inlined=True),
    "wrap": _Layout((0,), (), 1, spread=True, always=(0,), inlined=True),
    "tag_activation_checkpoint": _Layout((0,), (), 1, spread=True, always=(0,), inlined=True),
    "invoke_subgraph": _Layout((0,), (), operands=2, spread=True, always=(0,)),
}


@dataclass(frozen=True)
class Body:
    """A graph that a call runs.

    Attributes:
        module: the graph.
        always: it runs at least once whenever the call does.
    """

    module: GraphModule
    always: bool

    @property
    def placeholders(self) -> list[Node]:
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]


@dataclass(frozen=True)
class Call:
    """A node that runs bodies.

    Attributes:
        node: the call of the higher-order op.
        op: the op's name.
        bodies: the graphs it runs, each on the same operands.
        varying: operands, one per leading placeholder, that stand for others in later runs.
        operands: operands, one per placeholder after those, that are the same in each run.
        iterations: how many times its bodies run, None if not known.
    """

    node: Node
    op: str
    bodies: tuple[Body, ...]
    varying: tuple[Any, ...]
    operands: tuple[Any, ...]
    iterations: int | None

    @property
    def branches(self) -> bool:
        """Of its bodies, one runs."""
        return _LAYOUTS[self.op].branches

    @property
    def loops(self) -> bool:
        """Its bodies run more than once, on other carries or slices each time."""
        return bool(_LAYOUTS[self.op].varying)

    @property
    def inlined(self) -> bool:
        """torch traces its body as a part of the graph around, not by itself."""
        return _LAYOUTS[self.op].inlined

    def set_operands(self, operands: list[Any]) -> None:
        """Give the node other operands; its bodies' placeholders are the caller's to change."""
        layout = _LAYOUTS[self.op]
        args: list[Any] = list(self.node.args)
        if layout.spread:
            args[layout.operands :] = operands
        else:
            args[layout.operands] = type(args[layout.operands])(operands)
        self.node.args = tuple(args)


def call_of(gm: GraphModule, node: Node) -> Call | None:
    """Return the call that a node is; None if it is no higher-order op that is understood."""
    name = getattr(node.target, "__name__", "")
    layout = _LAYOUTS.get(name)
    if layout is None or not isinstance(node.target, HigherOrderOperator):
        return None
    # A tensor among the keywords is an operand whose place is not known; mutated arguments are
    # named by position, which a change of the operands would move.
    if any(isinstance(value, Node) for value in node.kwargs.values()):
        return None
    if node.kwargs.get("mutated_arg_indices"):
        return None
    if len(node.args) <= max(layout.bodies):
        return None
    placed = [(i, leaf) for i in layout.bodies for leaf in _leaves(node.args[i])]
    modules = [body_of(gm, leaf) if isinstance(leaf, Node) else None for _, leaf in placed]
    if not modules or None in modules:
        return None
    varying = tuple(leaf for i in layout.varying for leaf in _leaves(node.args[i]))
    rest = node.args[layout.operands :]
    operands = tuple(rest) if layout.spread else tuple(rest[0])  # type: ignore[arg-type]
    iterations = _iterations(name, node)
    always = [i in layout.always or bool(iterations) for i, _ in placed]
    bodies = tuple(Body(m, a) for m, a in zip(modules, always, strict=True) if m is not None)
    if any(len(body.placeholders) != len(varying) + len(operands) for body in bodies):
        return None
    return Call(node, name, bodies, varying, operands, iterations)


def is_run_by_itself(node: Node) -> bool:
    """Check whether a node runs bodies that stay graphs of their own down to the inner backend."""
    if not isinstance(node.target, HigherOrderOperator):
        return False
    layout = _LAYOUTS.get(node.target.__name__.removesuffix("_stack_output"))
    return layout is not None and not layout.inlined


def _leaves(value: Any) -> Iterator[Any]:
    yield from tree_flatten(value)[0]


def _iterations(name: str, node: Node) -> int | None:
    """Runs of a body that loops over the leading dimension of its slices."""
    if name not in ("scan", "map_impl"):
        return 1 if _LAYOUTS[name].spread else None
    slices = list(_leaves(node.args[2 if name == "scan" else 1]))
    value = value_of(slices[0]) if slices and isinstance(slices[0], Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return None
    return int(value.shape[0]) if isinstance(value.shape[0], int) else None
