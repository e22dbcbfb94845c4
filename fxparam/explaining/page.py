"""An explanation as one HTML page that loads nothing, and a graph of it as SVG."""

from __future__ import annotations

import html
import json
import linecache
from collections.abc import Iterator
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from fxparam.explaining.facts import Explained, TensorExplained
from fxparam.explaining.picture import Block, Picture
from fxparam.explaining.text import counted, done, head, near, summary, unseen

__all__ = ["drawing", "in_frame", "page"]


def page(explanation: Explained) -> str:
    """Return the page of an explanation."""
    data = _data(explanation)
    # In a script element nothing but its end is special.
    embedded = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    scripts = "".join(f"<script>{_web(name)}</script>" for name in _SCRIPTS)
    tabs = "".join(
        f'<button data-graph="{i}" aria-pressed="{str(i == 0).lower()}">graph {i + 1}</button>'
        for i in range(len(explanation.graphs))
    )
    return Template(_web("page.html")).substitute(
        style=_web("page.css") + _web("graph.css"),
        summary="".join(f"<li>{line}</li>" for line in _summary(explanation)),
        rows="".join(_row(i, each) for i, each in enumerate(explanation.tensors)),
        tabs=tabs if len(explanation.graphs) > 1 else "",
        data=embedded,
        scripts=scripts + f"<script>{_web('page.js')}</script>",
    )


def in_frame(page: str) -> str:
    """Return a page as an element of another, with styles and scripts of its own."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" title="fxparam" '
        'style="width:100%;height:720px;border:0"></iframe>'
    )


def drawing(explanation: Explained, graph: int) -> str:
    """Return a graph as SVG, as the page draws it.

    Raises:
        ImportError: ``mini-racer`` is not installed.
    """
    try:
        from py_mini_racer import MiniRacer
    except ImportError as error:
        raise ImportError(
            "to_svg runs the code of the page, for which it needs mini-racer.\n"
            "pip install 'fxparam[viz]', or use to_html, which needs nothing."
        ) from error
    engine = MiniRacer()
    for name in _SCRIPTS:
        engine.eval(_web(name))
    data, style = json.dumps(_data(explanation)["graphs"][graph]), json.dumps(_web("graph.css"))
    return str(engine.eval(f"drawn({data}, new Set(), new Map(), {style})"))


_SCRIPTS = ("dagre.min.js", "draw.js")


@cache
def _web(name: str) -> str:
    return resources.files("fxparam.explaining").joinpath("web", name).read_text("utf-8")


def _data(explanation: Explained) -> dict[str, Any]:
    """Return what the page draws: short keys, since a graph may have thousands of operations."""
    names = [each.name for each in explanation.tensors]
    number = {name: i for i, name in enumerate(names)}
    places: dict[str, int] = {}

    def of(picture: Picture) -> dict[str, Any]:
        operations = [
            {
                "n": each.name,
                "op": each.op,
                "value": each.value,
                "w": [places.setdefault(place, len(places)) for place in each.where],
                "i": each.inputs,
                "t": number.get(each.tensor, -1),
            }
            for each in picture.operations
        ]
        return {"ops": operations, "blocks": [_block(each) for each in picture.blocks]}

    moved = [i for i, each in enumerate(explanation.tensors) if each.saved != 0]
    graphs = [
        {"before": of(g.before), "after": of(g.after), "moved": moved} for g in explanation.graphs
    ]
    code = [[near(place), _code(place)] for place in places]
    return {"graphs": graphs, "tensors": names, "code": code}


def _block(block: Block) -> dict[str, Any]:
    return {
        "label": block.label,
        "kind": block.kind,
        "ops": block.operations,
        "blocks": [_block(each) for each in block.blocks],
        "times": block.times,
    }


def _code(where: str) -> str:
    file, _, line = where.rpartition(":")
    return linecache.getline(file, int(line)).strip()


def _summary(explanation: Explained) -> Iterator[str]:
    for line in (*head(explanation), *unseen(explanation), *summary(explanation)):
        yield html.escape(line.strip())


def _row(i: int, tensor: TensorExplained) -> str:
    before, now = ("?" if n is None else str(n) for n in (tensor.runs_before, tensor.runs))
    kind = " → ".join(tensor.kind)
    notes = [html.escape(line) for line in done(tensor)]
    for each in tensor.refused:
        places = ", ".join(f"<code>{html.escape(near(place))}</code>" for place in each.where)
        notes.append(
            f'<div class="refused">{html.escape(str(each))} {places}<br>'
            f'<span class="soft">To change: {html.escape(each.change)}</span></div>'
        )
    cost = "" if tensor.forward is None else counted(tensor.forward.flops)
    back = "" if tensor.backward is None else counted(tensor.backward.flops)
    return (
        f'<tr data-t="{i}" tabindex="0"><td><span class="dot"></span>'
        f"<code>{html.escape(tensor.name)}</code></td><td>{html.escape(kind)}</td>"
        f'<td class="n">{tensor.accesses}</td><td class="n">{before}</td>'
        f'<td class="n">{now}</td><td class="n">{cost}</td><td class="n">{back}</td>'
        f"<td>{'<br>'.join(notes)}</td></tr>"
    )
