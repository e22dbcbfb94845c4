"""The modes in force along a graph, as a key that two accesses can compare (rule 4).

Mode switches are nodes that take no tensor. Grad mode and the paired switches below are followed
exactly, so that the modes after a block are those before it; any other switch is not understood,
and what comes after it is taken to run under modes of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node

from fxparam._torch.names import set_grad_enabled, tree_flatten
from fxparam.graph.analysis.nodes import value_of
from fxparam.graph.analysis.numbering import literal_key

# Switches that come in pairs: by name, since Dynamo's targets move between versions of torch.
_PAIRS = {
    "_enter_autocast": "_exit_autocast",
    "_enter_inference_mode": "_exit_inference_mode",
    "_vmap_increment_nesting": "_vmap_decrement_nesting",
    "_grad_increment_nesting": "_grad_decrement_nesting",
    "_jvp_increment_nesting": "_jvp_decrement_nesting",
}
# These name the whole mode in their arguments; a functorch level is a new one each time.
_BY_VALUE = {"_enter_autocast", "_enter_inference_mode"}
_ENTRY = "entry"  # no switch was met that is not understood
# Constructing a module, as a slice of a ``ModuleList`` does, is logged.
_NEUTRAL = {"lazy_load_decompositions", "is_grad_enabled", "_log_api_usage_once"}
# Whether it is on, and the dtype it casts to; another key for what is not known.
_Autocast = tuple[Hashable, Hashable]


def grad_may_be_enabled(key: Hashable) -> bool:
    """Check whether autograd may record what runs under the modes of a ``ModeStack``'s key."""
    return not isinstance(key, tuple) or key[1] is not False


def may_autocast(key: Hashable) -> bool:
    """Check whether autocast may be switched, from what it is where the graph starts."""
    return not isinstance(key, tuple) or bool(key[2])


def may_transform(key: Hashable) -> bool:
    """Check whether a transform of ``torch.func`` may run what is under a ``ModeStack``'s key."""
    if not isinstance(key, tuple) or key[0] != _ENTRY:
        return True
    return any(name not in _BY_VALUE for name, _ in key[3])


def switches_a_mode(node: Node) -> bool:
    """Check whether a node switches grad, autocast or inference mode.

    Such nodes stay where they are, whoever is taken out around them: Dynamo drops pairs that undo
    each other, so that what one piece of code has switched the next may switch back.
    """
    name = getattr(node.target, "__name__", "")
    return name in {"_set_grad_enabled", *_BY_VALUE, *(_PAIRS[n] for n in _BY_VALUE)}


def grad_and_autocast(key: Hashable) -> Hashable:
    """Of the modes under a ``ModeStack``'s key, those that an eager ``cached()`` tells apart."""
    return key[1:3] if isinstance(key, tuple) else key


class ModeStack:
    """Follows the switches of one graph, in order.

    Args:
        grad_enabled: the grad mode in which the graph starts; None when that is not known.
        autocast_now: autocast is then as it is now; else that is not known.
    """

    def __init__(self, grad_enabled: bool | None, autocast_now: bool = False) -> None:
        self._autocast_now = autocast_now
        self._fresh = itertools.count()
        self._base: Hashable = _ENTRY
        self._grad: Hashable = grad_enabled
        self._autocast: dict[str, _Autocast] = {}  # by device, where it was switched
        self._entered: list[tuple[str, Hashable]] = []
        self._taken: set[Node] = set()
        self._asked: dict[Node, Hashable] = {}  # the grad mode that a node answered

    def fork(self) -> ModeStack:
        """Return the modes in force here, to be followed into a body."""
        copy = ModeStack(None, self._autocast_now)
        copy._fresh, copy._base, copy._grad = self._fresh, self._base, self._grad
        copy._autocast = dict(self._autocast)
        copy._entered = list(self._entered)
        return copy

    @property
    def key(self) -> Hashable:
        return (
            self._base,
            self._grad,
            frozenset(
                (device, _casts_to(state))
                for device, state in self._autocast.items()
                if _casts_to(state) != _casts_to(_autocast_on_entry(device, self._autocast_now))
            ),
            tuple(entry for entry in self._entered if entry[0] != "_enter_autocast"),
        )

    def is_switch(self, node: Node) -> bool:
        """Check whether a node switches a mode, after those that were entered."""
        return _is_switch(node, self._taken)

    def enter(self, node: Node) -> None:
        """Follow a mode switch."""
        self._taken.add(node)
        name = getattr(node.target, "__name__", str(node.target))
        if name == "_set_grad_enabled":
            self.set_grad(node.args[0])
        elif name == "is_grad_enabled":
            self._asked[node] = self._grad
        elif name == "_enter_autocast":
            self._entered.append((name, self.set_autocast(*node.args)))
        elif name in _PAIRS:
            by_value = name in _BY_VALUE
            self._entered.append((name, literal_key(node.args) if by_value else next(self._fresh)))
        elif self._entered and _PAIRS[self._entered[-1][0]] == name:
            _, before = self._entered.pop()
            if name == "_exit_autocast":
                self._put_back(*before)  # type: ignore[misc]
        elif name not in _NEUTRAL:
            self._base = next(self._fresh)

    def set_grad(self, mode: object) -> None:
        """The grad mode becomes what a literal names, or what it was where it was asked for."""
        if isinstance(mode, Node) and mode in self._asked:
            self._grad = self._asked[mode]
        else:
            self._grad = mode if isinstance(mode, bool) else next(self._fresh)

    def set_autocast(
        self, device: Any, dtype: Any = None, enabled: Any = True, *_: Any
    ) -> tuple[str, _Autocast]:
        """Switch a device's autocast; gives the device, and what it was."""
        before = self._autocast.get(device, _autocast_on_entry(device, self._autocast_now))
        if any(isinstance(v, Node) for v in (dtype, enabled)):
            self._autocast[device] = (next(self._fresh), next(self._fresh))
        else:
            # Without a dtype it is the one set last, by an autocast that is off, too.
            self._autocast[device] = (bool(enabled), dtype or before[1])
        return device, before

    def _put_back(self, device: str, state: _Autocast) -> None:
        self._autocast[device] = state


def _autocast_on_entry(device: str, now: bool) -> _Autocast:
    if not now:
        return "entry", "entry"
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _casts_to(state: _Autocast) -> Hashable:
    """Return the key of an autocast's casts; None while it is off."""
    enabled, dtype = state
    return None if enabled is False else (enabled, dtype)


def _is_switch(node: Node, switches: set[Node]) -> bool:
    """Check whether a node is a call that neither takes nor returns a tensor or a number."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in (torch.is_grad_enabled, set_grad_enabled):
        return True  # also where a run has left the answer, a number
    values = [value_of(n) for n in (node, *node.all_input_nodes)]
    if any(a.op == "get_attr" for a in node.all_input_nodes):
        return False
    leaves = [leaf for value in values for leaf in tree_flatten(value)[0] if leaf is not None]
    sized = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float)
    # In a graph without metadata every node would look like a switch.
    known = all(a in switches or _is_valued(a) for a in node.all_input_nodes)
    return known and not any(isinstance(leaf, sized) for leaf in leaves)


def _is_valued(node: Node) -> bool:
    return "example_value" in node.meta or "val" in node.meta
