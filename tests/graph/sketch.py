"""Graphs drawn by hand, as Dynamo makes them, and one check for all rewrites of them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.nn.utils.parametrize import ParametrizationList

from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.nesting import Level, levels_of
from fxparam.graph.passes.move_out import move_out
from fxparam.graph.passes.share import share
from tests.helpers import shown

SIZE = 3


class Sketch:
    """A graph whose nodes carry ``example_value``: each op is run on fake tensors as it is added.

    Tensors are square matrices of doubles unless another shape is given.
    """

    def __init__(self, around: Sketch | None = None) -> None:
        self.graph = Graph()
        self.fakes = FakeTensorMode() if around is None else around.fakes
        self.held: dict[str, Any] = {}

    def parameter(self, name: str = "p", *shape: int) -> Node:
        return self._placeholder(name, nn.Parameter(self._empty(shape)))

    def input(self, name: str = "x", *shape: int) -> Node:
        return self._placeholder(name, self._empty(shape))

    def like(self, name: str, node: Node) -> Node:
        """Add an input of a body that is given the value of a node of the graph around."""
        return self._placeholder(name, node.meta["example_value"])

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        with self.fakes:
            return torch.empty(shape or (SIZE, SIZE), dtype=torch.float64)

    def _placeholder(self, name: str, value: Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    def attribute(self, name: str, value: Any) -> Node:
        """Read what the graph's module holds; a body has no example value."""
        self.held[name] = value
        node = self.graph.get_attr(name)
        if isinstance(value, Tensor):
            node.meta["example_value"] = self.fakes.from_tensor(value)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Call a function, or a method that is given by its name, and see what it returns."""
        node = self._node(target, args, kwargs)
        run = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with self.fakes:
            node.meta["example_value"] = run(*_values(args), **_values(kwargs))
        return node

    def note(self, target: Any, *args: Any, value: Any = None) -> Node:
        """Call what is not run while the graph is drawn, and say what it returns."""
        node = self._node(target, args, {})
        node.meta["example_value"] = _values(value)
        return node

    def _node(self, target: Any, args: Any, kwargs: Any) -> Node:
        if isinstance(target, str):
            return self.graph.call_method(target, args, kwargs)
        return self.graph.call_function(target, args, kwargs)

    def evaluation(self, target: Any, *args: Any, call: int = 0, step: int = 0) -> Node:
        """Call a function in the evaluation of ``cell.weight``, as Dynamo records it."""
        node = self.call(target, *args)
        path = "L['self'].cell.parametrizations.weight"
        node.meta["nn_module_stack"] = {
            f"cell.parametrizations.weight@{call}": (path, ParametrizationList),
            f"cell.parametrizations.weight.{step}@{call}": (f"{path}[{step}]", nn.Identity),
        }
        return node

    def returns(self, *values: Any) -> GraphModule:
        self.graph.output(values)
        gm = GraphModule(self.held, self.graph)
        for name, value in self.held.items():
            setattr(gm, name, value)
        gm.graph.lint()
        return gm


def _values(arguments: Any) -> Any:
    return map_arg(arguments, lambda node: node.meta.get("example_value"))


def levels(gm: GraphModule) -> list[Level]:
    """Return the graphs that ``gm`` runs, with their effects where gradients are enabled."""
    return levels_of(gm, analyze(gm, grad_enabled=True))


def move(gm: GraphModule) -> None:
    """Share in each graph and move values one graph outwards, until nothing moves."""
    while True:
        found = levels(gm)
        shared = {level: share(level) for level in found}
        motion = move_out(found, shared, float("inf"))
        if not (motion.values or motion.operands):
            break


def graphs(gm: GraphModule) -> dict[str, GraphModule]:
    """Return a graph, and the bodies that are read in it and in each other, by name."""
    modules = {name: m for name, m in gm.named_modules() if isinstance(m, GraphModule)}
    read = {f"{name}.{n.target}".strip(".") for name, m in modules.items() for n in m.graph.nodes}
    return {name: module for name, module in modules.items() if not name or name in read}


def text(gm: GraphModule) -> str:
    """Return the code of a graph and of its bodies, higher-order ops by their names alone."""
    codes = (shown(m, name.replace(".", "_") or "forward") for name, m in graphs(gm).items())
    return "\n".join(codes).replace("torch.ops.higher_order.", "")


def count(gm: GraphModule) -> Counter[str]:
    """Count the calls of a graph and of its bodies by the name of what they call."""
    nodes = (n for m in graphs(gm).values() for n in m.graph.nodes if n.op.startswith("call"))
    return Counter(str(getattr(n.target, "__name__", n.target)) for n in nodes)


def picture(
    gm: GraphModule, rewrite: Callable[[GraphModule], Any], **counts: tuple[int, int]
) -> str:
    """Return a graph's code before and after a rewrite, which is checked on the way.

    The graph stays valid, nodes that survive keep their metadata, outputs and gradients on real
    tensors stay the same, and rewriting once more changes nothing.

    Args:
        counts: for a name of an operation, how often it is called before and after.
    """
    before, found = text(gm), count(gm)
    expected, kept = results(gm), _metadata(gm)
    _rewrite(gm, rewrite)
    after, left = text(gm), count(gm)
    for node, meta in _metadata(gm).items():
        for key, value in kept.get(node, {}).items():
            same = meta[key] is value if key == "example_value" else meta[key] == value
            assert same, f"{node}: {key}"
    torch.testing.assert_close(results(gm), expected)
    _rewrite(gm, rewrite)
    assert text(gm) == after
    assert {name: (found[name], left[name]) for name in counts} == counts
    return f"{before}\n---\n{after}"


def _rewrite(gm: GraphModule, rewrite: Callable[[GraphModule], Any]) -> None:
    rewrite(gm)
    for module in graphs(gm).values():
        module.graph.lint()
        module.recompile()


def _metadata(gm: GraphModule) -> Mapping[Node, dict[str, Any]]:
    return {node: dict(node.meta) for m in graphs(gm).values() for node in m.graph.nodes}


def results(gm: GraphModule) -> list[Any]:
    """Return the outputs of a run on real tensors, and the gradients of parameters."""
    inputs = [_real(node, seed) for seed, node in enumerate(gm.graph.find_nodes(op="placeholder"))]
    torch.manual_seed(0)
    with torch.enable_grad():
        outputs = list(gm(*inputs))
    asked = [each for each in inputs if isinstance(each, nn.Parameter)]
    losses = [y.sum() for y in outputs if y.requires_grad]
    if losses and asked:
        outputs += torch.autograd.grad(operator.add(0, sum(losses)), asked, allow_unused=True)
    return [each if each is None else each.detach() for each in outputs]


def _real(placeholder: Node, seed: int) -> Tensor:
    value = placeholder.meta["example_value"]
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(value.shape, dtype=value.dtype, generator=generator)
    return nn.Parameter(real) if isinstance(value, nn.Parameter) else real
