"""A record as pictures: step times of all cases, how they grow, and what maps cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contestants import BY_HAND
from benchmarks.tables import groups, ratio

__all__ = ["draw"]

Row = dict[str, Any]
_SHOWN = {
    "inductor": ("Inductor", "tab:orange", "s"),
    "inductor-cached": ("Inductor, cached() by hand", "tab:purple", "D"),
    "plain": ("plain weights", "tab:gray", "|"),
    "fxparam": ("fxparam", "tab:green", "o"),
    "longer": ("fxparam, the longest scope", "tab:green", "*"),
}
_LONGER = ("fxparam-fold", "fxparam-frozen", "fxparam-step", "fxparam-call", "fxparam-around")


def draw(record: Row, stem: Path) -> list[Path]:
    """Write ``stem.png``, and one more for growth and maps each, where they were measured.

    Returns:
        What was written; nothing where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures: dict[str, tuple[str, Callable[[list[Row]], Any]]] = {
        "cases": (f"{stem.name}.png", _cases),
        "growth": (f"{stem.name}-growth.png", _growth),
        "maps": (f"{stem.name}-maps.png", _maps),
    }
    written = []
    for section, (name, made) in pictures.items():
        if record.get(section):
            figure = made(record[section])
            written.append(stem.with_name(name))
            figure.savefig(written[-1], dpi=110)
            pyplot.close(figure)
    return written


def _cases(rows: list[Row]) -> Any:
    """A line a case; a point's place is the step time in multiples of the source by hand."""
    from matplotlib import pyplot

    cases = list(groups(rows))
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(cases) + 1.6), layout="constrained")
    for name, (label, color, mark) in _SHOWN.items():
        points = []
        for y, (_, _, group) in enumerate(cases):
            longer = next((each for each in _LONGER if each in group), "")
            found = ratio(group, longer if name == "longer" else name)
            if found is not None:
                points.append((found, y))
        if points:
            axes.scatter(*zip(*points, strict=True), label=label, color=color, marker=mark, s=45)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [case for case, _, _ in cases])
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.25, 0.5, 1, 2, 5, 10, 30], ["0.1", "¼", "½", "1", "2", "5", "10", "30"])
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("step time, as a multiple of the source hoisted by hand (left is faster)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _growth(rows: list[Row]) -> Any:
    """Milliseconds against steps or layers, on logarithmic axes: the slope is the growth."""
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(cases), figsize=(4 * len(cases), 3), layout="constrained", squeeze=False
    )
    for axes, case in zip(panels[0], cases, strict=True):
        for name, style in (("inductor", "s-"), ("fxparam", "o-"), (BY_HAND, "^:")):
            found = [row for row in rows if (row["case"], row["contestant"]) == (case, name)]
            points = [
                (r["value"], 1e3 * statistics.median(r["steps"])) for r in found if "steps" in r
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name)
        values = sorted({row["value"] for row in rows if row["case"] == case})
        axes.set(xscale="log", yscale="log", title=case, ylabel="ms a step")
        axes.set_xticks(values, map(str, values))
        axes.minorticks_off()
    panels[0][0].legend(fontsize=8)
    return figure


def _maps(rows: list[Row]) -> Any:
    """Cost and error against size, a column for each map of which more sizes were measured."""
    from matplotlib import pyplot

    by_map: dict[str, list[Row]] = {}
    for row in rows:
        if "shape" in row:
            by_map.setdefault(row["map"], []).append(row)
    maps = {name: found for name, found in by_map.items() if len(found) > 2}
    figure, axes = pyplot.subplots(
        2, len(maps), squeeze=False, figsize=(5 * len(maps), 7), layout="constrained"
    )
    for column, (name, found) in zip(axes.T, maps.items(), strict=True):
        sizes = [row["shape"] for row in found]
        for who, color in (("torch", "tab:orange"), ("ours", "tab:blue")):
            times, values, gradients = zip(*(row[who] for row in found), strict=True)
            column[0].plot(sizes, times, "o-", color=color, label=who)
            column[1].plot(sizes, values, "o--", color=color)
            column[1].plot(sizes, gradients, "o-", color=color)
        column[0].set(title=name, yscale="log", ylabel="forward and backward, ms")
        column[1].set(yscale="log", ylabel="relative error: value (dashed), gradient")
        column[0].legend()
    return figure
