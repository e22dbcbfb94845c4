"""Results as text: one table a case, and one of step times over all of them.

With rich where it is installed, else the same cells as plain columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.contestants import CONTESTANTS

__all__ = ["print_line", "print_rows", "print_summary", "print_table"]

Row = dict[str, Any]

_COLUMNS = (
    "contestant",
    "step: x by hand [quartiles]",
    "ms",
    "forward: x",
    "ms",
    "compile: x",
    "s [range]",
    "memory: x",
    "MB",
    "resident: x",
    "MB",
    "evaluations",
    "graphs",
    "nodes",
    "kernels",
)
_NOTES = (
    "memory: the most that torch's allocator has given out in a step; resident: of the process",
    "evaluations: those of the program with a counting op at the end of each chain",
)
_ANOTHER = "†"
_DIFFERS = (
    f"{_ANOTHER} another program than the one by hand: it evaluates at each access, as written, "
    "and that has effects"
)


def print_rows(rows: list[Row], console: Any = None) -> None:
    """The table of one case at one size."""
    first = rows[0]
    title = f"{first['case']}, {first['grows']} {first['value']}"
    print_table(title, _COLUMNS, [_cells(row) for row in rows], console)
    for note in (*_NOTES, *([_DIFFERS] if any(map(_is_another, rows)) else [])):
        print_line(f"  {note}", console)


def print_summary(rows: list[Row], console: Any = None) -> None:
    """Step times in multiples of the program by hand: a line a case, a column a contestant."""
    names = [n for n in CONTESTANTS if any(row["contestant"] == n for row in rows)]
    lines = []
    for (case, value), group in itertools.groupby(rows, lambda r: (r["case"], r["value"])):
        found = {row["contestant"]: row for row in group}
        lines.append([f"{case} {value}", *(_summary_cell(found.get(n)) for n in names)])
    title = "step time, x the source hoisted by hand"
    print_table(title, ("case", *names), lines, console)
    if any(map(_is_another, rows)):
        print_line(f"  {_DIFFERS}", console)


def _summary_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["error"] is not None:
        return "fails"
    return _number(_median(row["step_ratio"]), "{:.2f}") + _mark(row)


def _cells(row: Row) -> list[str]:
    name = row["contestant"] + _mark(row)
    if row["error"] is not None:
        return [name, row["error"]]
    step, ratio, forward = row["step"], row["step_ratio"], row["forward"]
    quartiles = f" [{ratio['low']:.2f} {ratio['high']:.2f}]" if ratio else ""
    evaluations = row["evaluations"]
    return [
        name,
        _number(_median(ratio), "{:.2f}") + quartiles,
        _number(_median(step), "{:.2f}", 1e3),
        _number(_median(row["forward_ratio"]), "{:.2f}"),
        _number(_median(forward), "{:.2f}", 1e3),
        _number(row["compile_ratio"], "{:.2f}"),
        _number(row["compile"], "{:.1f}") + _range(row.get("compiles")),
        _number(row.get("allocated_ratio"), "{:.2f}"),
        _number(row.get("allocated"), "{:.2f}", 1e-6),
        _number(row["peak_ratio"], "{:.2f}"),
        _number(row["peak"], "{:.1f}", 1e-6),
        "-" if evaluations is None else f"{evaluations[0]} / {evaluations[1]}",
        _number(row.get("graphs"), "{}"),
        _number(row["nodes"], "{}"),
        _number(row["kernels"], "{}"),
    ]


def _is_another(row: Row) -> bool:
    return bool(row.get("another"))  # not in what earlier versions recorded


def _mark(row: Row) -> str:
    return f" {_ANOTHER}" if _is_another(row) else ""


def _range(values: list[float] | None) -> str:
    return f" [{min(values):.1f} {max(values):.1f}]" if values and len(values) > 1 else ""


def _median(spread: dict[str, float] | None) -> float | None:
    return None if spread is None else spread["median"]


def _number(value: float | None, shape: str, scale: float = 1) -> str:
    return "-" if value is None else shape.format(value * scale if scale != 1 else value)


def print_table(title: str, columns: tuple[str, ...], lines: list[list[str]], console: Any) -> None:
    """Lines shorter than the columns carry a message in their second cell, printed below."""
    whole = [line for line in lines if len(line) == len(columns)]
    if console is None:
        for text in _plain(title, columns, whole):
            print(text)
    else:
        console.print(f"\n{title}", markup=False, soft_wrap=True)
        table = _rich(columns, whole)
        # Not cropped: no column is left out, and a narrow terminal breaks the lines.
        width = max(console.width, console.measure(table).minimum)
        console.print(table, width=width, crop=False)
    for line in lines:
        if len(line) != len(columns):
            print_line(f"  {line[0]}: {line[1]}", console)


def print_line(text: str, console: Any) -> None:
    print(text) if console is None else console.print(text, markup=False, soft_wrap=True)


def _rich(columns: tuple[str, ...], lines: list[list[str]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        justify: Any = "right" if i else "left"
        # Only heads are folded, between words.
        cells = max(map(len, (*column.split(), *(line[i] for line in lines))))
        table.add_column(escape(column), justify=justify, overflow="fold", min_width=cells)
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def _plain(title: str, columns: tuple[str, ...], lines: list[list[str]]) -> Iterator[str]:
    table = [list(columns), *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    yield f"\n{title}"
    for line in table:
        first, *others = (
            text.rjust(w) if i else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()
