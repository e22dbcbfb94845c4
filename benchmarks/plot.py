"""Results as a picture: step times of each case, and how they grow where that was measured."""

from __future__ import annotations

import itertools
import math
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.contestants import BY_HAND, CONTESTANTS

__all__ = ["draw"]

Row = dict[str, Any]
_ACROSS = 4  # panels side by side


def draw(rows: list[Row], title: str, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``; with several sizes of a case, ``stem-growth`` too.

    Returns:
        What was written; nothing where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    groups = _by_case(rows)
    written = _save(_bars(groups), title, stem)
    growing = {case: found for case, found in groups.items() if len(_values(found)) > 1}
    if growing:
        written += _save(_growth(growing), title, stem.with_name(f"{stem.name}-growth"))
    return written


def _by_case(rows: list[Row]) -> dict[str, list[Row]]:
    return {case: list(group) for case, group in itertools.groupby(rows, lambda row: row["case"])}


def _values(rows: list[Row]) -> list[int]:
    return sorted({row["value"] for row in rows})


def _ratio(row: Row) -> float:
    found = None if row["error"] else row["step_ratio"]
    return found["median"] if found else 0.0


def _color(contestant: str) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](list(CONTESTANTS).index(contestant))


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    across = min(_ACROSS, count)
    down = math.ceil(count / across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(4.2 * across, 2.8 * down), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.axis("off")
    return figure, flat[:count]


def _bars(groups: dict[str, list[Row]]) -> Any:
    """Each case at its middle size; a contestant that fails has its name and no bar."""
    figure, panels = _panels(len(groups))
    for axes, (case, rows) in zip(panels, groups.items(), strict=True):
        values = _values(rows)
        middle = values[len(values) // 2]
        shown = [row for row in rows if row["value"] == middle]
        names = [row["contestant"] for row in shown]
        ratios = [_ratio(row) for row in shown]
        bars = axes.barh(names, ratios, color=[_color(name) for name in names])
        labels = [
            "fails" if row["error"] else f"{r:.2f}" if r else "-"
            for row, r in zip(shown, ratios, strict=True)
        ]
        axes.bar_label(bars, labels, padding=2, fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(f"{case}, {shown[0]['grows']} {middle}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.2)
    figure.supxlabel("step time, x the source hoisted by hand", fontsize=9)
    return figure


def _growth(groups: dict[str, list[Row]]) -> Any:
    """Milliseconds against steps or layers, on logarithmic axes: the slope is the growth."""
    figure, panels = _panels(len(groups))
    for axes, (case, rows) in zip(panels, groups.items(), strict=True):
        for name in CONTESTANTS:
            points = [
                (row["value"], 1e3 * row["step"]["median"])
                for row in rows
                if row["contestant"] == name and row["error"] is None
            ]
            if points:
                style = "--" if name == BY_HAND else "-"
                values, times = zip(*points, strict=True)
                axes.plot(values, times, style, marker=".", color=_color(name), label=name)
        axes.set(xscale="log", yscale="log")
        axes.set_title(f"{case}: ms a step by {rows[0]['grows']}", fontsize=9)
        axes.set_xticks(_values(rows), [str(value) for value in _values(rows)])
        axes.minorticks_off()
        axes.tick_params(labelsize=7)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _save(figure: Any, title: str, stem: Path) -> list[Path]:
    from matplotlib import pyplot

    characters = int(14 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.wrap(title, characters)), fontsize=8)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return paths
