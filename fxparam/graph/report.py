"""What was hoisted, what was refused, and why: plain data with a readable ``repr``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.fx import Node

from fxparam.graph.analysis.evaluations import Evaluation
from fxparam.graph.analysis.nodes import is_view, module_path
from fxparam.graph.rules import Rule
from fxparam.marks import reads

__all__ = ["Batch", "Entry", "Refusal", "Report", "make_report"]


# Lines in these packages are nobody's accesses.
_PACKAGES = {Path(torch.__file__).parent, Path(__file__).parents[1]}
# A parametrization in its list, as module stacks spell it.
_STEP = re.compile(r"parametrizations\W+\w+\W+\d+\W*$")


@dataclass(frozen=True)
class Refusal:
    """Evaluations that were not shared, and why.

    Attributes:
        rule: the first rule that an operation of theirs would break.
        count: how many evaluations it holds for.
        where: source lines of their accesses, as ``file:line``, where the capture knows them.
    """

    rule: Rule
    count: int
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One parametrized tensor, or another value computed from parameters alone.

    Attributes:
        name: its qualified name; ``op(originals)`` for a value that has none.
        kind: the classes of its parametrizations, in order; empty for a value without a name.
        accesses: evaluations in the graphs as captured, one per access in the source.
        evaluations: of those, the ones of which at least one operation is left.
        runs_before: evaluations in one run as captured, loops unrolled; None if not known.
        runs: evaluations in one run that are left.
        hoisted_from: the loops and other bodies that it was moved out of, each with the number of
            its iterations, None if not known.
        refused: why the others were not shared.
        lowered: the ops that were rewritten to a cheaper form, each once.
    """

    name: str
    kind: tuple[str, ...]
    accesses: int
    evaluations: int
    runs_before: int | None
    runs: int | None
    hoisted_from: tuple[tuple[str, int | None], ...] = ()
    refused: tuple[Refusal, ...] = ()
    lowered: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[Refusal, ...]:
        """The former name of ``refused``."""
        return self.refused


@dataclass(frozen=True)
class Batch:
    """Evaluations of different tensors that are the same computation.

    Attributes:
        names: of the tensors, as in entries.
        refused: why they were not made one; empty if they were.
    """

    names: tuple[str, ...]
    refused: str = ""

    def __str__(self) -> str:
        if self.refused:
            return f"not batched: {self.refused}"
        return f"batched with {len(self.names) - 1} others"


@dataclass(frozen=True)
class Report:
    """The doings of one pass over one graph.

    Attributes:
        entries: one per parametrized tensor that the graph names, and per other computed value that
            is evaluated more than once.
        merged: operations that now use another's value, and values moved out of bodies, named or
            not.
        batches: evaluations that run as one, and others that would if torch could.
    """

    entries: tuple[Entry, ...] = ()
    merged: int = 0
    batches: tuple[Batch, ...] = ()

    def with_lowered(self, lowered: Iterable[tuple[str, str, int | None]]) -> Report:
        """Return the report with ops that were rewritten.

        Args:
            lowered: for each, the name of the tensor or value, the op, and how many times one run
                runs it. A value that is evaluated once gets an entry for it.
        """
        batches = (batch.names for batch in self.batches if not batch.refused)
        together = {name: names for names in batches for name in names}
        ops: dict[str, dict[str, int | None]] = {}
        for name, op, runs in lowered:
            for each in together.get(name, (name,)):
                ops.setdefault(each, {})[op] = runs
        entries = [
            replace(entry, lowered=(*entry.lowered, *ops.pop(entry.name, ())))
            for entry in self.entries
        ]
        for name, found in ops.items():
            runs = next(iter(found.values()))
            entries.append(Entry(name, (), 1, 1, runs, runs, lowered=tuple(found)))
        return replace(self, entries=tuple(entries))

    def __repr__(self) -> str:
        lines = [f"fxparam: {self.merged} operations shared"]
        for entry in self.entries:
            kind = f" ({' -> '.join(entry.kind)})" if entry.kind else ""
            lines.append(f"  {entry.name}{kind}: {_counts(entry)}")
            for op, iterations in entry.hoisted_from:
                lines.append(f"    moved out of {op}{_times(iterations)}")
            lines += [f"    {op} lowered" for op in entry.lowered]
            for refusal in entry.refused:
                lines.append(f"    {refusal.count} refused: {refusal.rule}")
                lines += [f"      {place}" for place in refusal.where]
            lines += [f"    {batch}" for batch in self.batches if entry.name in batch.names]
        named = {entry.name for entry in self.entries}
        for batch in self.batches:
            lines += [f"  {name}: {batch}" for name in batch.names if name not in named]
        return "\n".join(lines)


def _counts(entry: Entry) -> str:
    before, after = ("?" if n is None else n for n in (entry.runs_before, entry.runs))
    return f"evaluated {before} times, now {after}"


def _times(iterations: int | None) -> str:
    return "" if iterations in (None, 1) else f" of {iterations} iterations"


def make_report(
    before: list[Evaluation],
    after: list[Evaluation],
    refusals: Mapping[Node, Rule],
    origins: Mapping[str, Mapping[Node, tuple[str, int | None]]],
    merged: int,
) -> Report:
    """Compare, for each parametrized tensor, its evaluations before and after the pass."""
    entries = []
    for name in dict.fromkeys(e.name for e in before):
        mine = [e for e in before if e.name == name]
        kind = _kind(mine[0])
        if not kind and [e.runs for e in mine] == [1]:
            continue  # a computed value without a name, evaluated once to begin with
        left = [e for e in after if e.name == name and not all(map(is_view, e.nodes))]
        nodes = {node for site in left for node in site.nodes}
        left = [site for site in left if not _is_for_others(site, nodes)]
        left = _whole(left, Counter(e.access for e in mine))
        asked = [site for site in mine for _ in range(_accesses(site))]
        refused: dict[Rule, list[Evaluation]] = {}
        # One evaluation is what sharing leaves; it was not refused.
        for site in left[1:] if left and left[0].runs == 1 else left:
            rule = next((refusals[node] for node in site.nodes if node in refusals), None)
            if rule is not None:
                refused.setdefault(rule, []).append(site)
        moved = Counter(origins.get(name, {}).values())
        entries.append(
            Entry(
                name,
                kind,
                len(asked),
                len(left),
                _total(asked),
                _total(left),
                tuple(moved),
                tuple(Refusal(rule, len(sites), _lines(sites)) for rule, sites in refused.items()),
            )
        )
    # What a later read was given while it was traced is shared as well.
    merged += sum((_accesses(site) - 1) * len(site.nodes) for site in before)
    return Report(tuple(entries), merged)


def _is_for_others(site: Evaluation, nodes: set[Node]) -> bool:
    """Check whether nothing but other evaluations of the tensor uses what a site computes."""
    users = {user for node in site.nodes for user in node.users} - {*site.nodes}
    return bool(users) and users <= nodes


def _whole(left: list[Evaluation], before: Counter[str]) -> list[Evaluation]:
    """Join the parts of an evaluation of which one was moved out of a body and another stayed."""
    found: dict[str, list[Evaluation]] = {}
    for site in left:
        found.setdefault(site.access, []).append(site)
    whole = []
    for access, sites in found.items():
        if not access or len(sites) <= before[access]:
            whole += sites
            continue
        runs = [site.runs for site in sites]
        most = None if None in runs else max(n for n in runs if n is not None)
        nodes = tuple(node for site in sites for node in site.nodes)
        whole.append(Evaluation(sites[0].name, nodes, most, access))
    return whole


def _accesses(site: Evaluation) -> int:
    """Return how many accesses have the value that a site computes, as it was traced."""
    return max(map(reads, site.nodes))


def _total(sites: list[Evaluation]) -> int | None:
    runs = [site.runs for site in sites]
    return None if None in runs else sum(n for n in runs if n is not None)


def _kind(site: Evaluation) -> tuple[str, ...]:
    """The parametrizations a site runs through: what the module stacks name below the list."""
    kinds: dict[str, str] = {}
    for node in site.nodes:
        for call, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
            if _STEP.search(module_path(path)):
                kinds.setdefault(call.partition("@")[0], getattr(kind, "__name__", str(kind)))
    return tuple(kinds.values())


def _lines(sites: list[Evaluation]) -> tuple[str, ...]:
    """Return where evaluations were read: the outermost lines that are not torch's or ours."""
    found: dict[str, None] = {}
    for site in sites:
        trace = site.nodes[0].meta.get("stack_trace") or ""
        frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
        outside = [f for f in frames if _PACKAGES.isdisjoint(Path(f[0]).parents)]
        if outside:
            found[":".join(outside[0])] = None
    return tuple(found)
