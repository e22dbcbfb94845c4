"""What was hoisted, what was kept, and why: plain data with a readable ``repr``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch.fx import Node

from fxparam.graph.evaluations import Evaluation
from fxparam.graph.legality import Rule

__all__ = ["Entry", "Report", "make_report"]


@dataclass(frozen=True)
class Entry:
    """One parametrized tensor.

    Attributes:
        name: its qualified name.
        accesses: evaluations in the graph as captured, one per access.
        evaluations: evaluations of which at least one operation is left.
        kept: for each rule that kept an operation of a repeated evaluation, how many
            evaluations it kept.
    """

    name: str
    accesses: int
    evaluations: int
    kept: tuple[tuple[Rule, int], ...] = ()


@dataclass(frozen=True)
class Report:
    """What one pass over one graph did.

    Attributes:
        entries: one per parametrized tensor that the graph names.
        merged: operations that now use an earlier one's value, named or not.
    """

    entries: tuple[Entry, ...] = ()
    merged: int = 0

    def __repr__(self) -> str:
        lines = [f"fxparam: {self.merged} operations shared"]
        for entry in self.entries:
            lines.append(f"  {entry.name}: {entry.accesses} accesses, {entry.evaluations} kept")
            lines += [f"    {count} kept: {rule.value}" for rule, count in entry.kept]
        return "\n".join(lines)


def make_report(found: list[Evaluation], merged: set[Node], refusals: dict[Node, Rule]) -> Report:
    """Count, for each parametrized tensor, what the pass left of its evaluations."""
    entries = []
    for name in dict.fromkeys(e.name for e in found):
        mine = [e for e in found if e.name == name]
        left = [e for e in mine if any(node not in merged for node in e.nodes)]
        why = Counter(
            next(refusals[node] for node in e.nodes if node in refusals)
            for e in mine[1:]
            if e in left and any(node in refusals for node in e.nodes)
        )
        entries.append(Entry(name, len(mine), len(left), tuple(why.items())))
    return Report(tuple(entries), len(merged))
