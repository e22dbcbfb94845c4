"""The tables of a record, as Markdown: printed, and written into the pages that show them.

    python -m benchmarks.tables RECORD.json

In README and docs, a table named ``cases`` stands between the lines ``<!-- cases -->`` and
``<!-- /cases -->``.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.contestants import BY_HAND
from benchmarks.process import ROOT

__all__ = ["PAGES", "TABLES", "fill", "groups", "main", "of_rows", "ratio", "table"]

Row = dict[str, Any]
Cells = list[str]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_README = (
    "orthogonal-rnn",
    "orthogonal-rnn-scan",
    "orthogonal-flow-wide",
    "albert-lora",
    "accumulation",
)
_ANOTHER = "†"  # another program than the one by hand: it evaluates at each access, with effects


def _table(head: Iterable[str], lines: Iterable[Cells]) -> str:
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def groups(rows: list[Row]) -> Iterator[tuple[str, int, dict[str, Row]]]:
    """Yield each case, its size, and its rows by contestant."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["case"], row["value"]), {})[row["contestant"]] = row
    for (case, value), group in found.items():
        yield case, value, group


def _ratios(row: Row, by_hand: Row) -> list[float]:
    """Return the ratio to the program by hand of each round that both took part in."""
    pairs = zip(row["steps"], by_hand.get("steps", ()), strict=False)
    return [mine / theirs for mine, theirs in pairs]


def ratio(group: dict[str, Row], name: str, figure: str = "steps") -> float | None:
    """Return a figure of a contestant as a multiple of the one by hand."""
    row, by_hand = group.get(name, {}), group[BY_HAND]
    if not row.get(figure) or not by_hand.get(figure):
        return None
    if figure == "steps":
        return statistics.median(_ratios(row, by_hand))
    return float(row[figure] / by_hand[figure])


def _number(value: float | None, shape: str = "{:.2f}") -> str:
    return "-" if value is None else shape.format(value)


def _step(group: dict[str, Row], name: str) -> str:
    if name not in group:
        return ""
    if "error" in group[name]:
        return "fails"
    return _number(ratio(group, name)) + (f" {_ANOTHER}" if group[name]["another"] else "")


def _quartiles(group: dict[str, Row], name: str) -> str:
    found = _ratios(group[name], group[BY_HAND])
    if len(found) < 2:
        return "-"
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{low:.2f} to {high:.2f}"


def _evaluations(group: dict[str, Row], name: str) -> str:
    found = group.get(name, {}).get("evaluations")
    return f"{found[0]} / {found[1]}" if found else "-"


def _figures(group: dict[str, Row], name: str) -> Cells:
    """Return what is said of each contestant of fxparam."""
    if name not in group or "error" in group[name]:
        return [group.get(name, {}).get("error", ""), *[""] * 4]
    return [
        _step(group, name),
        _quartiles(group, name),
        _number(ratio(group, name, "compile")),
        _number(ratio(group, name, "memory")),
        _evaluations(group, name),
    ]


_FIGURES = ("step", "quartiles", "compile", "memory", "evaluations")


def _contestants(rows: list[Row]) -> str:
    """Show all there is of each contestant."""
    lines = []
    for case, value, group in groups(rows):
        for name, row in group.items():
            own = [*_figures(group, name)]
            if "error" not in row:
                times = 1e3 * statistics.median(row["steps"]), row["memory"] / 1e6
                own += [_number(t) for t in times]
                own += [_number(row.get("compile"), "{:.1f}")]
                own += [_number(row.get(each), "{}") for each in ("graphs", "kernels")]
            lines.append([f"{case} {value}", name, *own])
    return _table(
        ("case", "contestant", *_FIGURES, "ms", "MB", "compile s", "graphs", "kernels"), lines
    )


_COMPARED = ("eager-cached", "eager-fxparam-cached", "inductor", "inductor-cached", "plain")


def _cases(rows: list[Row]) -> str:
    head = ("eager, `cached()` of torch", "of fxparam", "Inductor", "Inductor, `cached()`")
    lines = []
    for case, _, group in groups(rows):
        both = f"{_evaluations(group, 'inductor')}, {_evaluations(group, 'fxparam')}"
        own = [*_figures(group, "fxparam")[:-1], both]
        own[0] = own[0] and f"**{own[0]}**"
        lines.append([f"`{case}`", *(_step(group, name) for name in _COMPARED), *own])
    names = ("fxparam", *_FIGURES[1:-1], "evaluations: Inductor, fxparam")
    return _table(("", *head, "plain weights", *names), lines)


def _scopes(rows: list[Row]) -> str:
    lines = [
        [f"`{case}`", f"`{name}`", _step(group, "plain"), *_figures(group, name)]
        for case, _, group in groups(rows)
        for name in CASES[case].also
        if name in group
    ]
    return _table(("", "asked for", "plain weights", *_FIGURES), lines)


def _readme(rows: list[Row]) -> str:
    lines = []
    for case, _, group in groups(rows):
        if case not in _README:
            continue
        asked = "fxparam-step" if case == "accumulation" else "fxparam"
        counts = (_evaluations(group, name) for name in ("inductor", asked))
        steps = (_step(group, name) for name in ("eager", "inductor", asked))
        lines.append([f"{CASES[case].about} (`{case}`)", *steps, *counts])
    head = ("eager", "Inductor", "fxparam", "evaluations: Inductor", "fxparam")
    return _table(("model", *head), lines)


def _growth(rows: list[Row]) -> str:
    cases: dict[str, list[dict[str, Row]]] = {}
    for case, _, group in groups(rows):
        cases.setdefault(case, []).append(group)
    lines = []
    for case, sizes in cases.items():
        cells = [f"`{case}`"]
        for name in ("inductor", "fxparam"):
            for figure in ("steps", "compile", "memory"):
                cells.append(", ".join(_number(ratio(g, name, figure)) for g in sizes))
        for name in ("inductor", "fxparam"):
            cells.append(", ".join(_evaluations(g, name) for g in sizes))
        lines.append(cells)
    figures = ("step", "compile", "memory")
    head = [f"{who}: {figure}" for who in ("Inductor", "fxparam") for figure in figures]
    return _table(("", *head, "evaluations: Inductor", "fxparam"), lines)


def _starts(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        both = [row[state].get(part) for part in ("first", "whole") for state in ("cold", "warm")]
        lines.append([f"`{row['case']}`", row["contestant"], *(_number(t, "{:.1f}") for t in both)])
    head = ("first step, cold", "warm", "whole process, cold", "warm")
    return _table(("", "", *head), lines)


def _passes(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        own = [row.get("error", "-")] * 3
        if "error" not in row:
            own = [f"{row['passes']:.2f}", f"{row['compile']:.1f}"]
            own.append(f"{row['passes'] / row['compile']:.1%}")
        lines.append([row["kind"], str(row["nodes"]), f"`{row['inner']}`", *own])
    return _table(("graph", "nodes", "inner backend", "passes s", "compilation s", "share"), lines)


def _jax(rows: list[Row]) -> str:
    found = {(row["scan"], row["by_hand"]): row for row in rows}
    lines = []
    for scan, name in ((False, "Python loop"), (True, "`lax.scan`")):
        ways = [found.get((scan, by_hand), {}) for by_hand in (False, True)]
        steps = [_number(1e3 * way["step"]) if "step" in way else "fails" for way in ways]
        lines.append([name, *steps])
    return _table(("JAX, orthogonal RNN", "as written, ms", "hoisted by hand, ms"), lines)


def _maps(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "shape" in row:
            pairs = (row["torch"], row["ours"])
            own = [cell for ms, v, g in pairs for cell in (f"{ms:.2f}", f"{v:.1e}", f"{g:.1e}")]
            lines.append([f"{row['map']} {row['shape']}", *own])
    return _table(("map", "torch", "value", "gradient", "ours", "value", "gradient"), lines)


def _unchanged(rows: list[Row]) -> str:
    found = [row for row in rows if "unchanged" in row]
    lines = [[row["map"], *(f"{ms:.2f}" for ms in row["unchanged"])] for row in found]
    head = ("forward, 64x64", "and backward", "forward, 256x256", "and backward")
    return _table(("map", *head), lines)


def _explaining(rows: list[Row]) -> str:
    names = ("capture", "explain")
    lines = [
        [row["model"], *(f"{row[n]:.2f}" for n in names), f"{row['explain'] / row['capture']:.2f}"]
        for row in rows
    ]
    return _table(("model", "capture and passes, s", "explained, s", "ratio"), lines)


def _distributed(rows: list[Row]) -> str:
    first = rows[0]["step"]
    lines = [[r["way"], f"{1e3 * r['step']:.1f}", f"{r['step'] / first:.2f}"] for r in rows]
    return _table(("two ranks", "ms a step", "ratio"), lines)


def _kernels(rows: list[Row]) -> str:
    names = {
        "Inductor": "Inductor",
        "shared": "fxparam with `lower=False, batch=False`",
        "fxparam": "fxparam",
        "by hand": "by hand",
    }
    lines = [
        [row["case"], *(", ".join(map(str, row["counts"][name])) for name in names)] for row in rows
    ]
    return _table(("", *names.values()), lines)


def _demo(rows: list[Row]) -> str:
    by_hand = rows[-1]["step"]
    lines = []
    for row in rows:
        figures = [f"{row['compile']:.1f}", str(row["steps"]), f"{1e3 * row['step']:.1f}"]
        figures += [f"{row['step'] / by_hand:.2f}", "{} / {}".format(*row["evaluations"])]
        figures += [f"{row['accuracy']:.3f}", _number(row["goal"], "{:.1f}")]
        lines.append([row["way"], *figures, f"{row['difference']:.0e}"])
    head = ("compile s", "steps", "ms per step", "x by hand", "evaluations fwd / bwd")
    return _table(("", *head, "test accuracy", "seconds to 0.9", "loss difference"), lines)


def _environment(record: Row) -> str:
    found = record["environment"]
    where = found.get("gpu") or f"{found['processor']}, {found['threads']} threads"
    return (
        f"{where}, torch {found['torch']}, fxparam {found['fxparam']}, Python {found['python']}, "
        f"{found['date']}. `{record['command']}` took {record['minutes']:.0f} minutes."
    )


_OF_SECTION: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "cases": ("cases", _cases),
    "scopes": ("cases", _scopes),
    "readme": ("cases", _readme),
    "growth": ("growth", _growth),
    "starts": ("starts", _starts),
    "passes": ("passes", _passes),
    "jax": ("jax", _jax),
    "maps": ("maps", _maps),
    "unchanged": ("maps", _unchanged),
    "explaining": ("explaining", _explaining),
    "distributed": ("distributed", _distributed),
    "kernels": ("kernels", _kernels),
    "demo": ("demo", _demo),
}
TABLES = ("environment", *_OF_SECTION)


def table(name: str, record: Row) -> str:
    """Return a table of a record by its name."""
    if name == "environment":
        return _environment(record)
    section, made = _OF_SECTION[name]
    return _made(section, made, record.get(section, []))


def _made(section: str, made: Callable[[list[Row]], str], rows: list[Row]) -> str:
    errors = [row["error"] for row in rows if "error" in row and "contestant" not in row]
    if errors or not rows:
        return f"{section}: {errors[0] if errors else 'not measured'}"
    return made(rows)


def of_rows(section: str, rows: list[Row]) -> str:
    """Return rows of a section as they come; of cases, all there is."""
    if section in ("cases", "growth"):
        return _made(section, _contestants, rows)
    tables = [made for of, made in _OF_SECTION.values() if of == section]
    return "\n\n".join(_made(section, made, rows) for made in tables)


def fill(page: str, record: Row) -> str:
    """Return a page with the tables of a record in it."""
    for name in TABLES:
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if place.search(page):
            shown = f"\n{table(name, record)}\n\n"
            page = place.sub(lambda m, shown=shown: m[1] + shown + m[2], page)
    return page


def main(record: str) -> None:
    """Print every table of a record, and write them into README and docs."""
    found = json.loads(Path(record).read_text())
    for name in TABLES:
        print(f"\n{name}:\n\n{table(name, found)}")
    for page in PAGES:
        page.write_text(fill(page.read_text(), found))


if __name__ == "__main__":
    main(*sys.argv[1:])
