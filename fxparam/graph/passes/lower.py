"""Ops of evaluations give way to cheaper forms: the same function and derivative up to rounding.

    w = matrix_exp(a)            ->      w = fxparam::matrix_exp(a)

    q = householder_product(a, t)  ->    v = tril(a) + eye; ...; q = eye - v @ solve_triangular(...)

Run when the graphs are hoisted, before autograd: what is saved is mostly backward. Where a rewrite
gains in backward alone, an op is rewritten if a gradient is asked for; else torch's own forward
stays. Under transforms of ``torch.func`` it stays as well. The rest each rewrite says for itself
(``graph/rewrites/``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

from torch.fx import GraphModule, Node

from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.evaluations import name_of
from fxparam.graph.analysis.held_bytes import allowed_bytes, held_bytes
from fxparam.graph.analysis.modes import (
    grad_may_be_enabled,
    may_autocast,
    may_transform,
)
from fxparam.graph.analysis.nesting import Level, levels_of
from fxparam.graph.analysis.nodes import tensors_in, value_of
from fxparam.graph.passes.inline import inline
from fxparam.graph.rewrites.householder_product import HOUSEHOLDER_PRODUCT
from fxparam.graph.rewrites.matrix_exp import MATRIX_EXP
from fxparam.graph.rewrites.rewrite import Call, Rewrite
from fxparam.graph.rewrites.weight_norm import WEIGHT_NORM
from fxparam.lowering.precision import is_autocast_enabled

__all__ = ["AFTER_BATCHES", "BEFORE_BATCHES", "Lowered", "lower"]

#: Rewrites to ops that are batched like any others.
BEFORE_BATCHES = (HOUSEHOLDER_PRODUCT, WEIGHT_NORM)
#: Rewrites that are worthwhile for many small matrices, if not for each.
AFTER_BATCHES = (MATRIX_EXP,)


class Lowered(NamedTuple):
    """An op that was rewritten.

    Attributes:
        tensor: the name of the parametrized tensor, or of the value, that it is a part of.
        rewrite: the name of the rewrite.
        runs: how many times one run of the outermost graph runs it; None if not known.
    """

    tensor: str
    rewrite: str
    runs: int | None


def lower(
    gm: GraphModule,
    *,
    grad_enabled: bool | None = None,
    autocast_now: bool = False,
    max_bytes: float = math.inf,
    rewrites: tuple[Rewrite, ...] = BEFORE_BATCHES + AFTER_BATCHES,
) -> list[Lowered]:
    """Rewrite ops in the evaluations of a graph and of its bodies, in place.

    Args:
        gm: a graph with fake tensors in its nodes' metadata, as Dynamo makes it.
        grad_enabled: the grad mode in which the graph is called, None if not known.
        autocast_now: autocast is then as it is now; else that is not known.
        max_bytes: a form that can do with less holds no more while it works, and no more than
            half of what the rest of its graph holds.
        rewrites: those to make.

    Returns:
        What was rewritten, in graph order, bodies first.
    """
    modules = (m for m in gm.modules() if isinstance(m, GraphModule))
    nodes = (node for module in modules for node in module.graph.nodes)
    if not any(rewrite.arguments(node) for node in nodes for rewrite in rewrites):
        return []  # what is below costs a run of each node on fakes
    table = analyze(gm, grad_enabled=grad_enabled, autocast_now=autocast_now)
    lowered = []
    for level in levels_of(gm, table):
        found = [(node, r) for node in level.gm.graph.nodes for r in rewrites]
        held = held_bytes(level.gm.graph, without=level.derived.candidates)
        bound = allowed_bytes(held, max_bytes)
        done = [_lowered(level, node, r, autocast_now, bound) for node, r in found]
        lowered += [each for each in done if each is not None]
        if any(done):
            level.gm.graph.lint()
            level.gm.recompile()
    return lowered


def _lowered(
    level: Level, node: Node, rewrite: Rewrite, autocast_now: bool, max_bytes: int
) -> Lowered | None:
    """Rewrite a node, if it is a call of the rewrite's op and that is right."""
    arguments = rewrite.arguments(node)
    if arguments is None or node not in level.derived.candidates:
        return None
    modes = [table.of[node].modes for table in level.tables]
    if any(map(may_transform, modes)):
        return None
    if rewrite.gains == "backward" and not (
        _asks_for_gradients(node) and all(map(grad_may_be_enabled, modes))
    ):
        return None
    call = Call(node, arguments, any(_may_autocast(key, node, autocast_now) for key in modes))
    if not rewrite.is_right(call):
        return None
    name = name_of(level, node)
    given = [arguments[parameter] for parameter in rewrite.parameters]
    inline(node, rewrite.form, [*given, max_bytes] if rewrite.bounded else given)
    return Lowered(name, rewrite.name, level.runs)


def _asks_for_gradients(node: Node) -> bool:
    return any(t.requires_grad for t in tensors_in(value_of(node)))


def _may_autocast(modes: Hashable, node: Node, now: bool) -> bool:
    (value, *_) = tensors_in(value_of(node))
    return may_autocast(modes) or not now or is_autocast_enabled(value.device)
