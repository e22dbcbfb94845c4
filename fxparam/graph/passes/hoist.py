"""The pass: make one evaluation serve many accesses, at the outermost place that is right.

Run before autograd, one value means one backward: merged after it, as torch's own CSE passes do,
the N backwards of N cotangents stay.

Each round looks at the effects of every graph. What repeats in ``cached()`` regions is shared with
its effects, then what repeats in each graph, and values move one graph outwards. The rounds end
when nothing moves and, where there are bodies, nothing was shared: the last one sees the graphs as
they are left.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxparam.graph.analysis.bodies import is_run_by_itself
from fxparam.graph.analysis.derived import derive, is_parameter
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.evaluations import Evaluation, all_evaluations, evaluations
from fxparam.graph.analysis.nesting import levels_of
from fxparam.graph.analysis.nodes import body_of
from fxparam.graph.passes.copy_aliases import copy_aliases
from fxparam.graph.passes.drop_idle_switches import drop_idle_switches
from fxparam.graph.passes.move_out import Motion, move_out
from fxparam.graph.passes.share import share
from fxparam.graph.passes.share_regions import check_regions, share_regions
from fxparam.graph.report import Report, make_report
from fxparam.graph.rules import Rule
from fxparam.graph.torch_bugs.branch_gradients import lay_gradients_out_alike

__all__ = ["HoistResult", "hoist"]


@dataclass(frozen=True)
class HoistResult:
    """What ``hoist`` returns.

    Attributes:
        graph_module: the same graph module, hoisted.
        report: what was shared and kept.
        modified: whether the graph, or one of its bodies, changed.
        has_bodies: whether its nodes run graphs that the inner backend compiles by themselves.
    """

    graph_module: GraphModule
    report: Report
    modified: bool
    has_bodies: bool = False


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
    merged, moved = 0, Motion()
    before: list[Evaluation] | None = None
    changed: set[GraphModule] = set()
    while True:
        levels = levels_of(gm, analyze(gm, grad_enabled=grad_enabled, autocast_now=autocast_now))
        if before is None:
            before = all_evaluations(levels)
        in_regions = {level.gm: len(share_regions(level)) for level in levels}
        if any(in_regions.values()):
            # What is left of a region leaves the graph, and is written, where any of it did.
            merged += sum(in_regions.values())
            changed |= {module for module, count in in_regions.items() if count}
            continue
        shared = {level: share(level, max_bytes) for level in levels}
        step = move_out(levels, shared, max_bytes)
        moves = step.values or step.operands
        repeated = sum(len(each.merged) for each in shared.values())
        merged += repeated
        changed |= {level.gm for level in levels if moves or shared[level].merged}
        for name, calls in step.origins.items():
            moved.origins.setdefault(name, {}).update(calls)
        moved.values += step.values
        if not (moves or (repeated and len(levels) > 1)):
            break
    check_regions(levels)
    for level in levels:
        if level.gm in changed:
            drop_idle_switches(level.gm, level.tables)
    if changed:
        changed |= copy_aliases(levels)
        lay_gradients_out_alike(levels, changed)
    refusals: dict[Node, Rule] = dict(step.refusals)
    for result in shared.values():
        refusals.update(result.refusals)
    after = all_evaluations([level for level in levels if level.runs != 0])
    report = make_report(before, after, refusals, moved.origins, merged + moved.values)
    for module in changed:
        module.graph.lint()
        module.recompile()
    nodes = [node for level in levels for node in level.gm.graph.nodes]
    return HoistResult(gm, report, bool(changed), any(map(is_run_by_itself, nodes)))


def _may_share(gm: GraphModule) -> bool:
    """Check whether sharing can be found at all: a cheap look before the analysis of effects."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and is_parameter(n)]
    calls = [(n.target, len(n.all_input_nodes)) for n in derive(gm, inputs).candidates]
    if len(set(calls)) < len(calls):
        return True
    return any(n.op == "get_attr" and body_of(gm, n) is not None for n in gm.graph.nodes)
