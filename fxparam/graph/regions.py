"""Static ``cached()``: in a marked region, a parametrized tensor is evaluated once, with effects.

Outside a region an evaluation that writes or draws random numbers is kept (rule 5). In one it is
shared as the eager ``cached()`` shares it: the second evaluation of a chain is taken out whole,
with what it writes and draws, if nothing but the first wrote what it reads since, nobody wrote to
the value, and the modes are the same. It is compared with the first node by node; that it reads
what the first left behind (a buffer assigned in forward) is no difference.

A region around a loop holds for the loop's body: random numbers that an evaluation draws there are
drawn in front of the loop (``motion``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxparam.graph.effects import EffectTable
from fxparam.graph.evaluations import owner
from fxparam.graph.legality import Rule, has_effects, has_one_backward_for_all
from fxparam.graph.marks import evaluation_mark, region_mark
from fxparam.graph.nodes import value_of
from fxparam.graph.numbering import key_of
from fxparam.graph.scopes import Scope, is_run_again

__all__ = ["Marked", "check_regions", "marked_evaluations", "share_regions"]


_HOOKS = {"register_hook", "retain_grad"}


@dataclass(frozen=True)
class Marked:
    """One evaluation in a region.

    Attributes:
        region: where it may be shared.
        chain: what it evaluates.
        training: the training modes of its modules.
        nodes: in order, mode switches included.
    """

    region: str
    chain: str
    training: str
    nodes: tuple[Node, ...]


def marked_evaluations(gm: GraphModule) -> list[Marked]:
    """The evaluations in regions, in order."""
    found: dict[tuple[str, str, str, str], list[Node]] = {}
    for node in gm.graph.nodes:
        mark = evaluation_mark(node) if node.op in ("call_function", "call_method") else None
        if mark is not None:
            found.setdefault(mark, []).append(node)
    return [Marked(*mark[:3], tuple(nodes)) for mark, nodes in found.items()]


def share_regions(scope: Scope) -> set[Node]:
    """Take repeated evaluations of a graph's regions out; the nodes that were."""
    merged: set[Node] = set()
    kept: dict[tuple[str, str], list[list[Marked]]] = {}
    for again in marked_evaluations(scope.gm):
        groups = kept.setdefault((again.region, again.chain), [])
        found = _found(scope, groups, again)
        if found is None:
            groups.append([again])
            continue
        group, matches = found
        for table in scope.tables:
            table.forget(again.nodes)
        _replace(scope.gm, again, matches)
        group.append(again)
        merged.update(again.nodes)
    return merged


def _found(
    scope: Scope, groups: list[list[Marked]], again: Marked
) -> tuple[list[Marked], dict[Node, Node]] | None:
    """The evaluation whose value the eager region would hand out, and what stands for what.

    It keeps one value for the same originals and modes, the last one. With that evaluation come
    those that have its value already.
    """
    for group in reversed(groups):
        first = group[0]
        why = {why_not(table, group, again) for table in scope.tables}
        if Rule.MODES_DIFFER in why:
            continue
        matches = _matches(scope.gm, first, again)
        if matches is None and not _inputs(first) & _inputs(again):
            continue
        same = why == {None} and first.training == again.training
        return (group, matches) if same and matches is not None else None
    return None


def _inputs(evaluation: Marked) -> set[Node]:
    return {n for node in evaluation.nodes for n in node.all_input_nodes} - {*evaluation.nodes}


def why_not(table: EffectTable, group: list[Marked], again: Marked) -> Rule | None:
    """The rule by which the eager ``cached()`` would evaluate again.

    ``table`` knows each of the evaluations that have one value by the storages it had by itself.
    """
    first = group[0]
    nodes = [node for evaluation in group for node in evaluation.nodes]
    if _modes_before(table, first) != _modes_before(table, again):
        return Rule.MODES_DIFFER
    reads = frozenset().union(*(table.of[node].reads for node in nodes))
    values = frozenset().union(*(table.of[node].storages for node in nodes))
    end, start = table.position[first.nodes[-1]], table.position[again.nodes[0]]
    if not table.written(reads | values, end, start):
        return None
    between = list(table.of)[end + 1 : start]
    writing = [table.of[n] for n in between if not (n._erased or _hangs_a_hook(n))]
    if any(e.writes_all or e.writes & reads for e in writing):
        return Rule.ORIGINAL_WRITTEN  # or the value, which the last nodes read
    return Rule.VALUE_WRITTEN if any(e.writes & values for e in writing) else None


def _hangs_a_hook(node: Node) -> bool:
    """On the value, which is one tensor for all its readers here, as in the eager region."""
    return str(getattr(node.target, "__name__", node.target)) in _HOOKS


def _modes_before(table: EffectTable, evaluation: Marked) -> Hashable:
    return table.of[evaluation.nodes[0].prev].modes


def _matches(gm: GraphModule, first: Marked, again: Marked) -> dict[Node, Node] | None:
    """For each node of the later evaluation the one of the first that did the same."""
    if len(first.nodes) != len(again.nodes):
        return None
    inside = set(first.nodes)
    matches: dict[Node, Node] = {}
    for one, other in zip(first.nodes, again.nodes, strict=True):
        ones, others = one.all_input_nodes, other.all_input_nodes
        if len(ones) != len(others):
            return None
        for a, b in zip(ones, others, strict=True):
            # An input from outside is the same, or what the first evaluation put in its place.
            left_behind = a not in inside and b in inside
            if not (b is a or matches.get(b) is a or left_behind or _is_same_attribute(gm, a, b)):
                return None
        seats = range(len(ones))
        if key_of(gm, one, dict(zip(ones, seats, strict=True))) != key_of(
            gm, other, dict(zip(others, seats, strict=True))
        ):
            return None
        matches[other] = one
    return matches


def _is_same_attribute(gm: GraphModule, a: Node, b: Node) -> bool:
    if a.op != "get_attr" or b.op != "get_attr":
        return False
    return key_of(gm, a, {}) == key_of(gm, b, {})


def _replace(gm: GraphModule, again: Marked, matches: Mapping[Node, Node]) -> None:
    for node in reversed(again.nodes):
        node.replace_all_uses_with(matches[node])
        gm.graph.erase_node(node)


def check_regions(scopes: list[Scope]) -> None:
    """Refuse what the eager ``cached()`` would share and the pass could not.

    Raises:
        RuntimeError: an evaluation with effects, or without one backward for all accesses, is left
            in a body that its region encloses, and would run again there or elsewhere in the
            region.
    """
    sites: Counter[tuple[str, str]] = Counter()
    inside: list[tuple[Marked, bool]] = []
    for scope in scopes:
        for evaluation in marked_evaluations(scope.gm):
            sites[evaluation.region, evaluation.chain] += 1
            enclosing = [c for c in scope.contexts if region_mark(c.call.node) == evaluation.region]
            if enclosing and any(_tells_runs_apart(evaluation, t) for t in scope.tables):
                inside.append((evaluation, is_run_again(scope, ())))
    for evaluation, repeated in inside:
        if repeated or sites[evaluation.region, evaluation.chain] > 1:
            site = owner(evaluation.nodes[0])
            raise RuntimeError(
                "fxparam.cached() around a loop or branch that is compiled shares an evaluation "
                "with effects only where they can be moved in front of it.\n"
                f"required: {site[1] if site else 'the tensor'} is read before the loop or branch "
                "and that value used in it, or its parametrizations write nothing\n"
                "found: it is read inside, and its parametrizations write, draw random numbers or "
                "have a backward that is not additive"
            )


def _tells_runs_apart(evaluation: Marked, table: EffectTable) -> bool:
    """Whether one run of an evaluation is another program than several."""
    calls = _calls(evaluation)
    given = frozenset().union(*(table.of[node].storages for node in _inputs(evaluation)))
    if any(_leaves_a_trace(table, node, given) for node in calls):
        return True
    used = any(user not in evaluation.nodes for node in calls for user in node.users)
    return used and not all(has_one_backward_for_all(table, node) for node in calls)


def _leaves_a_trace(table: EffectTable, node: Node, given: frozenset[int]) -> bool:
    """Whether a node of an evaluation draws, or writes to more than what the evaluation made."""
    rule = has_effects(table, node)
    if rule is not Rule.WRITES:
        return rule is not None
    return table.of[node].writes_all or bool(table.of[node].writes & given)


def _calls(evaluation: Marked) -> list[Node]:
    """The nodes of an evaluation, mode switches left out."""
    return [node for node in evaluation.nodes if value_of(node) is not None]
