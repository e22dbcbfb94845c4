"""Static ``cached()``: in a marked region, a parametrized tensor is evaluated once, with effects.

Outside a region an evaluation that writes or draws random numbers is kept (rule 5). In one it is
shared as the eager ``cached()`` shares it: the second evaluation of a chain is taken out whole,
with what it writes and draws, if nothing but the first wrote what it reads since, nobody wrote to
the value, and the modes are the same. It is compared with the first node by node; that it reads
what the first left behind (a buffer assigned in forward) is no difference, nor that Dynamo dropped
what nobody used of either. An evaluation that is a part of another is one by itself as well.

A region around a loop holds for the loop's body: random numbers that an evaluation draws there are
drawn in front of the loop (``motion``).
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from fxparam._torch.fx import is_erased
from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.modes import grad_and_autocast, switches_a_mode
from fxparam.graph.analysis.nesting import Level, is_run_again
from fxparam.graph.analysis.nodes import owner, value_of
from fxparam.graph.analysis.numbering import key_of
from fxparam.graph.rules import Rule, has_effects, has_one_backward_for_all
from fxparam.marks import EvaluationMark, evaluation_marks, join, region_mark

__all__ = [
    "MarkedEvaluation",
    "RegionRefusedError",
    "check_regions",
    "marked_evaluations",
    "share_regions",
]


_HOOKS = {"register_hook", "retain_grad"}


@dataclass(frozen=True)
class MarkedEvaluation:
    """One evaluation in a region.

    Attributes:
        mark: what it evaluates, and under which modes.
        nodes: in order, those of evaluations that are a part of it included; no mode switches.
        own: those that are in no such part.
    """

    mark: EvaluationMark
    nodes: tuple[Node, ...]
    own: tuple[Node, ...]

    @property
    def shared_by(self) -> tuple[str, str]:
        """Evaluations that may have one value."""
        return self.mark.region, self.mark.chain


def marked_evaluations(gm: GraphModule) -> list[MarkedEvaluation]:
    """Return the evaluations in regions, in order, each in front of its parts."""
    found: dict[EvaluationMark, list[Node]] = {}
    own: dict[EvaluationMark, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or switches_a_mode(node):
            continue
        marks = evaluation_marks(node)
        for mark in marks:
            found.setdefault(mark, []).append(node)
        if marks:
            own.setdefault(marks[-1], []).append(node)
    return [
        MarkedEvaluation(mark, tuple(nodes), tuple(own.get(mark, ())))
        for mark, nodes in found.items()
    ]


def share_regions(level: Level) -> set[Node]:
    """Take repeated evaluations of a graph's regions out; the nodes that were."""
    run = _Run(level)
    evaluations = marked_evaluations(level.gm)
    run.share(evaluations)
    # Of those whose parts were shared differently, the rest.
    left = [e for e in evaluations if e.own and len(e.own) < len(e.nodes)]
    run.share([MarkedEvaluation(e.mark, e.own, e.own) for e in left])
    return set(run.replaced)


class RegionRefusedError(RuntimeError):
    """A compiled ``cached()`` region asks for an evaluation that cannot be shared there."""


class _Likeness(enum.Enum):
    """How a later evaluation compares with an earlier one of the same tensor."""

    SAME = enum.auto()
    OTHER_ORIGINALS = enum.auto()
    DIFFERENT = enum.auto()


@dataclass(frozen=True)
class _Comparison:
    """A likeness and, where it is SAME, for each later node the earlier one that did the same."""

    likeness: _Likeness
    matches: dict[Node, Node] = field(default_factory=dict)


class _Run:
    """The eager region's course through one graph, evaluation after evaluation."""

    def __init__(self, level: Level) -> None:
        self.level = level
        self.replaced: dict[Node, Node] = {}
        # As traced: what follows replaces parts of evaluations that later ones are compared with.
        self.traced = {
            node: (_key(level.gm, node), tuple(node.all_input_nodes))
            for evaluation in marked_evaluations(level.gm)
            for node in evaluation.nodes
        }
        self.once = {node for node in self.traced if _happens_once(level, node)}

    def share(self, evaluations: list[MarkedEvaluation]) -> None:
        kept: dict[tuple[str, str], list[list[MarkedEvaluation]]] = {}
        for again in evaluations:
            if any(is_erased(node) for node in again.nodes):
                continue  # taken out, or a part of it, with one that it is a part of
            groups = kept.setdefault(again.shared_by, [])
            found = self._found(groups, again)
            if found is None:
                groups.append([again])
                continue
            group, matches = found
            group.append(again)
            for table in self.level.tables:
                table.forget(matches)
            for node in again.nodes:
                if node not in matches:
                    join(node, (group[0].own or group[0].nodes)[0])
            for node in reversed(matches):
                self.replaced[node] = matches[node]
                node.replace_all_uses_with(self._now(node))
                self.level.gm.graph.erase_node(node)

    def _now(self, node: Node) -> Node:
        """Return the node that a node's value is taken from now."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _found(
        self, groups: list[list[MarkedEvaluation]], again: MarkedEvaluation
    ) -> tuple[list[MarkedEvaluation], dict[Node, Node]] | None:
        """Return the evaluation whose value the eager region would give, and the matching nodes.

        It keeps one value for the same originals and modes, the last one. With that evaluation
        come those that have its value already.
        """
        for group in reversed(groups):
            first = max(group, key=lambda evaluation: len(evaluation.nodes))
            if first.mark.modes != again.mark.modes:
                continue
            if first.mark.training != again.mark.training:
                if _inputs(first) & _inputs(again):
                    return None
                continue
            compared = self._compare(first, again)
            if compared.likeness is _Likeness.OTHER_ORIGINALS:
                continue
            written = any(is_written(t, group, again) for t in self.level.tables)
            if compared.likeness is _Likeness.SAME and not written:
                return group, compared.matches
            return None
        return None

    def _compare(self, first: MarkedEvaluation, again: MarkedEvaluation) -> _Comparison:
        """Compare a later evaluation with the first, node by node.

        Dynamo has dropped nodes of either that nobody used: those of the later one that are not
        among the first's stay as they are.
        """
        matches: dict[Node, Node] = {}
        rest = list(first.nodes)
        place = self.level.tables[0].position
        for other in again.nodes:
            # What came out of a body between the nodes of ``first`` does not wait for the rest.
            alike = [n for n in rest if place[n] < place[other] and self._is_alike(n, other)]
            one = next((n for n in alike if self._has_the_inputs(n, other, first, matches)), None)
            if one is not None:
                matches[other] = one
                rest = rest[rest.index(one) + 1 :]
            elif any(self._has_other_originals(n, other, first, again, matches) for n in alike):
                return _Comparison(_Likeness.OTHER_ORIGINALS)
            elif other in self.once:
                return _Comparison(_Likeness.DIFFERENT)
        missed = self.once.intersection(first.nodes) - {*matches.values()}
        if missed or not matches:
            return _Comparison(_Likeness.DIFFERENT)
        return _Comparison(_Likeness.SAME, matches)

    def _is_alike(self, one: Node, other: Node) -> bool:
        return self.traced[one][0] == self.traced[other][0] and (
            self._modes(one) == self._modes(other)
        )

    def _same(self, a: Node, b: Node, first: MarkedEvaluation, matches: dict[Node, Node]) -> bool:
        """Check whether an input of the later evaluation is the first's, or what replaced it."""
        if self._now(b) is self._now(a) or matches.get(b) is a:
            return True
        left_behind = a not in first.nodes and self._now(b) in first.nodes
        return left_behind or _is_same_attribute(self.level.gm, a, b)

    def _has_the_inputs(
        self, one: Node, other: Node, first: MarkedEvaluation, matches: dict[Node, Node]
    ) -> bool:
        pairs = zip(self.traced[one][1], self.traced[other][1], strict=True)
        return all(self._same(a, b, first, matches) for a, b in pairs)

    def _has_other_originals(
        self,
        one: Node,
        other: Node,
        first: MarkedEvaluation,
        again: MarkedEvaluation,
        matches: dict[Node, Node],
    ) -> bool:
        """Check whether the first inputs that are not the same come from outside."""
        pairs = zip(self.traced[one][1], self.traced[other][1], strict=True)
        a, b = next((a, b) for a, b in pairs if not self._same(a, b, first, matches))
        return a not in first.nodes and b not in again.nodes

    def _modes(self, node: Node) -> list[Hashable]:
        return [grad_and_autocast(table.of[node].modes) for table in self.level.tables]


def _happens_once(level: Level, node: Node) -> bool:
    """Check whether a node that runs twice is another program."""
    return any(
        has_effects(table, node) is not None or not has_one_backward_for_all(table, node)
        for table in level.tables
    )


def _key(gm: GraphModule, node: Node) -> Hashable:
    """Return a key for the function that a node computes of its inputs."""
    return key_of(gm, node, {n: seat for seat, n in enumerate(node.all_input_nodes)})


def _inputs(evaluation: MarkedEvaluation) -> set[Node]:
    return {n for node in evaluation.nodes for n in node.all_input_nodes} - {*evaluation.nodes}


def is_written(table: EffectTable, group: list[MarkedEvaluation], again: MarkedEvaluation) -> bool:
    """Check whether what an evaluation read, or its value, is written before a later one.

    ``table`` knows each of the evaluations that have one value by the storages it had by itself.
    """
    nodes = [node for evaluation in (*group, again) for node in evaluation.nodes]
    touched = frozenset().union(*(table.of[n].reads | table.of[n].storages for n in nodes))
    end, start = table.position[group[0].nodes[-1]], table.position[again.nodes[0]]
    if not table.written(touched, end, start):
        return False
    between = [n for n in list(table.of)[end + 1 : start] if not (is_erased(n) or _hangs_a_hook(n))]
    return any(table.of[n].writes_all or table.of[n].writes & touched for n in between)


def _hangs_a_hook(node: Node) -> bool:
    """On the value, which is one tensor for all its readers here, as in the eager region."""
    return str(getattr(node.target, "__name__", node.target)) in _HOOKS


def _is_same_attribute(gm: GraphModule, a: Node, b: Node) -> bool:
    if a.op != "get_attr" or b.op != "get_attr":
        return False
    return key_of(gm, a, {}) == key_of(gm, b, {})


def check_regions(levels: list[Level]) -> None:
    """Refuse what the eager ``cached()`` would share and the pass could not.

    Raises:
        RegionRefusedError: an evaluation with effects, or without one backward for all accesses,
            is left in a body that its region encloses, and would run again there or elsewhere in
            the region.
    """
    sites: Counter[tuple[str, str]] = Counter()
    inside: list[tuple[MarkedEvaluation, bool]] = []
    for level in levels:
        for evaluation in marked_evaluations(level.gm):
            if not any(_tells_runs_apart(evaluation, table) for table in level.tables):
                continue
            sites[evaluation.shared_by] += 1
            calls = [context.call.node for context in level.contexts]
            if any(region_mark(call) == evaluation.mark.region for call in calls):
                inside.append((evaluation, is_run_again(level, ())))
    for evaluation, repeated in inside:
        if repeated or sites[evaluation.shared_by] > 1:
            site = owner(evaluation.nodes[0])
            raise RegionRefusedError(
                "fxparam.cached() around a loop or branch that is compiled shares an evaluation "
                "with effects only where they can be moved in front of it.\n"
                f"required: {site[1] if site else 'the tensor'} is read before the loop or branch "
                "and that value used in it, or its parametrizations write nothing\n"
                "found: it is read inside, and its parametrizations write, draw random numbers or "
                "have a backward that is not additive"
            )


def _tells_runs_apart(evaluation: MarkedEvaluation, table: EffectTable) -> bool:
    """Check whether one run of an evaluation is another program than several."""
    calls = _calls(evaluation)
    given = frozenset().union(*(table.of[node].storages for node in _inputs(evaluation)))
    if any(_leaves_a_trace(table, node, given) for node in calls):
        return True
    additive = all(has_one_backward_for_all(table, node) for node in calls)
    return not additive and _is_used(table, calls)


def _is_used(table: EffectTable, nodes: Iterable[Node]) -> bool:
    """Check whether anything that leaves a graph, or has effects, is computed from some nodes."""
    work, seen = list(nodes), set(nodes)
    while work:
        for user in work.pop().users:
            if user.op == "output" or not table.of[user].pure:
                return True
            if user not in seen:
                seen.add(user)
                work.append(user)
    return False


def _leaves_a_trace(table: EffectTable, node: Node, given: frozenset[int]) -> bool:
    """Check whether a node draws, or writes to more than what its evaluation made."""
    rule = has_effects(table, node)
    if rule is not Rule.WRITES:
        return rule is not None
    return table.of[node].writes_all or bool(table.of[node].writes & given)


def _calls(evaluation: MarkedEvaluation) -> list[Node]:
    """Return the nodes of an evaluation that have a value."""
    return [node for node in evaluation.nodes if value_of(node) is not None]
