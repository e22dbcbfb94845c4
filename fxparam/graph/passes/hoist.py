"""The pass: make one evaluation serve many accesses, at the outermost place that is right.

Run before autograd, one value means one backward: merged after it, as torch's own CSE passes do,
the N backwards of N cotangents stay.

Each round looks at the effects of every graph. What repeats in ``cached()`` regions is shared with
its effects, then what repeats in each graph, and values move one graph outwards. The rounds end
when nothing moves and, where there are bodies, nothing was shared: the last one sees the graphs as
they are left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from torch.fx import GraphModule, Node

from fxparam._torch.collectives import collectives_of
from fxparam.graph.analysis.bodies import is_run_by_itself
from fxparam.graph.analysis.derived import derive, is_parameter
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.evaluations import Evaluation, all_evaluations, evaluations
from fxparam.graph.analysis.nesting import Level, inputs_kept_apart, levels_of
from fxparam.graph.analysis.nodes import body_of
from fxparam.graph.passes.copy_aliases import copy_aliases
from fxparam.graph.passes.copy_gathered import copy_gathered
from fxparam.graph.passes.drop_idle_switches import drop_idle_switches
from fxparam.graph.passes.move_out import Motion, move_out
from fxparam.graph.passes.share import Sharing, share
from fxparam.graph.passes.share_regions import check_regions, share_regions
from fxparam.graph.report import Report, make_report
from fxparam.graph.rules import Rule
from fxparam.graph.torch_bugs.branch_gradients import lay_gradients_out_alike

__all__ = ["HoistResult", "hoist"]


@dataclass(frozen=True)
class HoistResult:
    """The result of ``hoist``.

    Attributes:
        graph_module: the same graph module, hoisted.
        report: what was shared and kept.
        modified: whether the graph, or one of its bodies, changed.
        has_bodies: whether its nodes run graphs that the inner backend compiles by themselves.
        apart: inputs, of which the graph writes some. That those which are not the same memory stay
            so was relied on (rules 2 and 3).
    """

    graph_module: GraphModule
    report: Report
    modified: bool
    has_bodies: bool = False
    apart: tuple[Node, ...] = ()


def hoist(
    gm: GraphModule,
    *,
    grad_enabled: bool | None = None,
    autocast_now: bool = False,
    max_bytes: float = float("inf"),
) -> HoistResult:
    """Make repeated evaluations of a graph one, where the rules of sharing allow it.

    Args:
        gm: a graph with fake tensors in its nodes' metadata, as Dynamo makes it; changed in
            place. A graph without that metadata is returned as it is.
        grad_enabled: the grad mode in which the graph is called, None if not known.
        autocast_now: autocast is then as it is now; else that is not known.
        max_bytes: a value with more bytes is not shared.

    Returns:
        The graph module, what was shared and kept, and whether anything changed.
    """
    if not _may_share(gm):
        found = evaluations(gm.graph)
        return HoistResult(gm, make_report(found, found, {}, {}, 0), False)
    rounds = _Rounds(gm, grad_enabled, autocast_now, max_bytes)
    while rounds.run_one():
        pass
    return rounds.finish()


@dataclass
class _Account:
    """The doings of the rounds, counted for the report.

    Attributes:
        before: the evaluations of the graph as it was captured.
        merged: operations that use another's value, and values that left a body.
        origins: for each parametrized tensor, the calls it was moved out of: op and iterations.
        refusals: of the last round, the nodes that were not shared or not moved, and why.
        changed: the graphs and bodies that changed.
    """

    before: list[Evaluation]
    merged: int = 0
    origins: dict[str, dict[Node, tuple[str, int | None]]] = field(default_factory=dict)
    refusals: dict[Node, Rule] = field(default_factory=dict)
    changed: set[GraphModule] = field(default_factory=set)

    def add_regions(self, taken_out: dict[Level, int]) -> None:
        """Add evaluations that were taken out of ``cached()`` regions, counted in operations."""
        self.merged += sum(taken_out.values())
        self.changed |= {level.gm for level, count in taken_out.items() if count}

    def add(self, sharing: dict[Level, Sharing], motion: Motion) -> None:
        """Add what a round shared and moved."""
        self.merged += motion.values + sum(len(each.merged) for each in sharing.values())
        for name, calls in motion.origins.items():
            self.origins.setdefault(name, {}).update(calls)
        self.changed |= {s.gm for s in sharing if motion.changed or sharing[s].merged}
        self.refusals = dict(motion.refusals)
        for each in sharing.values():
            self.refusals.update(each.refusals)


class _Rounds:
    """The rounds over one graph and its bodies."""

    def __init__(
        self, gm: GraphModule, grad_enabled: bool | None, autocast_now: bool, max_bytes: float
    ) -> None:
        self._gm, self._max_bytes = gm, max_bytes
        self._analyze = partial(analyze, gm, grad_enabled=grad_enabled, autocast_now=autocast_now)
        self._levels = self._look()
        self._account = _Account(all_evaluations(self._levels))
        if collectives_of(gm):
            self._account.changed |= copy_gathered(self._levels)
            self._levels = self._look()
        self._apart = inputs_kept_apart(self._levels)

    def _look(self) -> list[Level]:
        """Return every graph, with its effects as they are now."""
        return levels_of(self._gm, self._analyze())

    def run_one(self) -> bool:
        """Share and move values once; check whether another round may find more."""
        taken_out = {level: len(share_regions(level)) for level in self._levels}
        if any(taken_out.values()):
            self._account.add_regions(taken_out)
            self._levels = self._look()
            # What is left of a region leaves the graph, and is written, where any of it did.
            return True
        sharing = {level: share(level, self._max_bytes) for level in self._levels}
        motion = move_out(self._levels, sharing, self._max_bytes)
        self._account.add(sharing, motion)
        repeated = any(each.merged for each in sharing.values())
        if motion.changed or (repeated and len(self._levels) > 1):
            self._levels = self._look()
            return True
        return False

    def finish(self) -> HoistResult:
        """Check and tidy the graphs, and report."""
        levels, account = self._levels, self._account
        check_regions(levels)
        for level in levels:
            if level.gm in account.changed:
                drop_idle_switches(level.gm, level.tables)
        if account.changed:
            account.changed |= copy_aliases(levels)
            lay_gradients_out_alike(levels, account.changed)
        for module in account.changed:
            module.graph.lint()
            module.recompile()
        after = all_evaluations([level for level in levels if level.runs != 0])
        report = make_report(
            account.before, after, account.refusals, account.origins, account.merged
        )
        nodes = (node for level in levels for node in level.gm.graph.nodes)
        has_bodies = any(map(is_run_by_itself, nodes))
        modified = bool(account.changed)
        apart = self._apart if modified else ()
        return HoistResult(self._gm, report, modified, has_bodies, apart)


def _may_share(gm: GraphModule) -> bool:
    """Check whether sharing can be found at all: a cheap look before the analysis of effects."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and is_parameter(n)]
    calls = [(n.target, len(n.all_input_nodes)) for n in derive(gm, inputs).candidates]
    if len(set(calls)) < len(calls):
        return True
    return any(n.op == "get_attr" and body_of(gm, n) is not None for n in gm.graph.nodes)
