"""Read off a node: its example value, the attribute it names, where it was traced.

Where a node was traced stands in ``meta["nn_module_stack"]``, where Dynamo and export record the
modules around it. Names come from there. They are for people (the report) and for telling a
parametrization from other code; sharing does not depend on them, since frames resumed after a graph
break may carry none.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import ParametrizationList

from fxparam._torch.names import tree_flatten, unbacked_symbols
from fxparam._torch.tensors import storage_of

__all__ = [
    "ancestors",
    "attribute_of",
    "body_of",
    "has_new_sizes",
    "is_view",
    "meta_with",
    "module_path",
    "modules_around",
    "owner",
    "tensors_in",
    "value_of",
]


_LIST = re.compile(rf"(.*\.)?(Parametrized)*{ParametrizationList.__name__}")
# A module that a function reads: an argument, a variable around it, a global. Of a model that is
# compiled, Dynamo says ``fn``.
_OF_A_FUNCTION = re.compile(r"[LG]\['(?!self'|fn')(\w+)'\]\.parametrizations\.(\w+)")
# An entry of a dictionary of submodules.
_ENTRY = re.compile(r"(?:\.|^|(?<=\]))(?:__dict__\['_modules'\]|_modules)\['([^']+)'\]")
# A list is ``parametrizations.<tensor>`` of the module that has the tensor.
_OF_THE_LIST = re.compile(r"(^|\.)parametrizations\.(?=[^.]+$)")


def value_of(node: Node) -> Any:
    """The node's example value, as Dynamo (``example_value``) or export (``val``) left it."""
    return node.meta.get("example_value", node.meta.get("val"))


def meta_with(node: Node, value: Any) -> dict[str, Any]:
    """Return the node's metadata, for one that has another example value."""
    key = "example_value" if "example_value" in node.meta else "val"
    return {**node.meta, key: value}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a value, however nested, in order."""
    if isinstance(value, torch.Tensor):  # as nearly all are
        return [value]
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def attribute_of(gm: GraphModule, node: Node) -> Any:
    """Return the object that a ``get_attr`` node names."""
    return operator.attrgetter(str(node.target))(gm)


def body_of(gm: GraphModule, node: Node) -> GraphModule | None:
    """Return the graph that a node hands to a higher-order op, if it is one."""
    value = attribute_of(gm, node) if node.op == "get_attr" else None
    return value if isinstance(value, GraphModule) else None


def has_new_sizes(node: Node) -> bool:
    """Check whether data decide a number or a size in a node's value, which no input of it has."""
    own = unbacked_symbols(value_of(node))
    if not own:
        return False
    known = set().union(*(unbacked_symbols(value_of(n)) for n in node.all_input_nodes))
    return not own <= known


def ancestors(nodes: Iterable[Node], within: Callable[[Node], bool] = lambda _: True) -> set[Node]:
    """Nodes and what they are computed from, as far as a path of nodes ``within`` leads."""
    found: set[Node] = set()
    work = list(nodes)
    while work:
        node = work.pop()
        if node not in found and within(node):
            found.add(node)
            work.extend(node.all_input_nodes)
    return found


def is_view(node: Node) -> bool:
    """Check whether the node's value shows the memory of one of its inputs."""
    inputs = {storage_of(t) for n in node.all_input_nodes for t in tensors_in(value_of(n))}
    outputs = [storage_of(t) for t in tensors_in(value_of(node))]
    return bool(outputs) and all(s is not None and s in inputs for s in outputs)


def owner(node: Node) -> tuple[str, str] | None:
    """Return the outermost ``ParametrizationList`` a node was traced in: its call and its name."""
    for call, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        if _is_list(kind):
            return call, _readable(path)
    return None


def modules_around(node: Node) -> dict[str, Any]:
    """Return the module stack of a node up to the ``ParametrizationList`` it was traced in."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return dict(itertools.takewhile(lambda entry: not _is_list(entry[1][1]), stack.items()))


def _is_list(kind: type | str) -> bool:
    """Check whether an entry of a module stack is a list; export keeps classes by their names.

    The class of a list with a parametrized original is made by ``register_parametrization``, which
    puts ``Parametrized`` in front of the name.
    """
    if isinstance(kind, str):
        return _LIST.fullmatch(kind) is not None
    return issubclass(kind, ParametrizationList)


def _readable(path: str) -> str:
    """Return the name of a tensor by the path of its list, as ``cell.weight``."""
    path = module_path(path)
    read = _OF_A_FUNCTION.fullmatch(path)
    if read is not None:  # several may have a ``weight``
        return f"{read[1]}.{read[2]}"
    # Strict export wraps the model, and unwraps the names but for those in bodies.
    path = _OF_THE_LIST.sub(r"\1", path).removeprefix("_export_root.")
    # A function that closes over a module is read through the function.
    path = path.rpartition(".cell_contents.")[2]
    _, bracket, rest = path.partition("'].")
    return rest if bracket else path


def module_path(path: str) -> str:
    """Return the path of a module with submodules as attributes.

    Where traced code has changed a module, Dynamo spells what it reads there in another way:
    ``cell.__dict__['_modules']['parametrizations']``.
    """
    return _ENTRY.sub(r".\1", path).lstrip(".")
