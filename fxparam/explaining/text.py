"""An explanation as text: a table where ``rich`` is installed, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fxparam.explaining.costs import Cost
from fxparam.explaining.facts import Explained, TensorExplained

__all__ = ["counted", "done", "head", "near", "summary", "unseen", "text"]

_COLUMNS = ("tensor", "parametrization", "accesses", "evaluations", "now", "what was done")


def text(explanation: Explained) -> str:
    """Return an explanation for a terminal."""
    rows = [
        (*_cells(each), "; ".join((*done(each), *_refused(each)))) for each in explanation.tensors
    ]
    lines = [*head(explanation), "", *_table(rows), *unseen(explanation), *_refusals(explanation)]
    return "\n".join([*lines, *summary(explanation)])


def head(explanation: Explained) -> Iterator[str]:
    """Yield what was captured: graphs, and the breaks between them."""
    number = len(explanation.graphs)
    ends = [graph.end for graph in explanation.graphs if graph.end is not None]
    scope = "" if explanation.scope == "graph" else f", in scope={explanation.scope!r}"
    yield f"{_counted(number, 'graph')}, {_counted(len(ends), 'graph break')}{scope}"
    for end in ends:
        yield f"  break{f' at {near(end.where)}' if end.where else ''}: {end.reason}"


def unseen(explanation: Explained) -> Iterator[str]:
    """Yield what no graph has."""
    for reason in explanation.breaks:
        yield f"Left to eager mode: {reason}"
    if explanation.unseen:
        names = ", ".join(explanation.unseen)
        yield f"No graph names {names}: eager code reads them, or nobody does."


def _cells(tensor: TensorExplained) -> tuple[str, ...]:
    before, now = ("?" if n is None else str(n) for n in (tensor.runs_before, tensor.runs))
    kind = " -> ".join(tensor.kind) or "(no name)"
    return tensor.name, kind, str(tensor.accesses), before, now


def done(tensor: TensorExplained) -> Iterator[str]:
    """Yield what the passes did for a tensor, in words."""
    for op, iterations in tensor.hoisted_from:
        yield f"moved out of {op}" + (f" of {iterations} iterations" if iterations else "")
    for op in tensor.lowered:
        yield f"{op} lowered"
    if tensor.batched_with:
        yield f"batched with {len(tensor.batched_with)} others"
    if tensor.not_batched:
        yield f"not batched: {tensor.not_batched}"


def _refused(tensor: TensorExplained) -> Iterator[str]:
    refused = sum(each.count for each in tensor.refused)
    if refused:
        yield f"{refused} refused"


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        yield "No graph evaluates a parametrized tensor, or another value more than once."
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        for row in (_COLUMNS, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            yield "  ".join(cells).rstrip()
        return
    table = Table()
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if 2 <= i <= 4 else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(100, Console().width), color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table, markup=False)
    yield captured.get().rstrip()


def _refusals(explanation: Explained) -> Iterator[str]:
    for tensor in explanation.tensors:
        for each in tensor.refused:
            yield f"{tensor.name}: {each}"
            yield from (f"  {near(place)}" for place in each.where)
            yield f"  To change: {each.change}"


def summary(explanation: Explained) -> Iterator[str]:
    """Yield what was saved, and what would save more."""
    forward, backward = explanation.saved
    if forward.bytes or forward.flops:
        yield f"Saved in a call: {_cost(forward)} forward, {_cost(backward)} backward."
    if explanation.not_in_saved:
        yield f"Not in these figures, as they are not known: {', '.join(explanation.not_in_saved)}."
    for scope in explanation.scopes:
        yield f"{scope}."
    if explanation.extern_calls is not None:
        calls = (f"{name} ({n})" for name, n in explanation.extern_calls.items())
        yield f"Inductor calls, and does not generate: {', '.join(calls) or 'nothing'}."


def _cost(cost: Cost) -> str:
    return f"{counted(cost.flops)}flop and {counted(cost.bytes)}B"


def counted(number: int) -> str:
    """Return a number in three digits, as ``1.23 M``, for a unit to follow."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} "


def near(place: str) -> str:
    """Return ``file:line`` as it is seen from the current folder, if the file is below it."""
    path = Path(place)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else place


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
