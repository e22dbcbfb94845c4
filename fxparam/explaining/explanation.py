"""Shows what happened to a model: as text, a page, a drawing or a dictionary."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxparam.explaining.facts import Explained
from fxparam.explaining.page import drawing, in_frame, page
from fxparam.explaining.text import text

__all__ = ["Explanation"]

#: Of what ``Explanation.to_dict`` returns: another number where a field went or has another sense.
_VERSION = 1


@dataclass(frozen=True, repr=False)
class Explanation(Explained):
    """What happened to a model; :func:`fxparam.explain` makes it.

    ``print`` shows it, as a table where ``rich`` is installed. A notebook shows the page.

    Attributes:
        scope: the scope it was compiled in.
        graphs: one for each graph of one call, in the order of their compilation.
        tensors: one for each tensor and value that was shared, refused or named.
        scopes: scopes that would share more.
        extern_calls: ops that Inductor calls and does not generate, with the number of calls in the
            code; None if Inductor was not asked.
        unseen: parametrized tensors of the model that no graph names: eager code reads them, or
            nobody does.
        breaks: reasons of Dynamo's for code that it left to eager mode, without a graph.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return it as dictionaries, lists, strings and numbers, without the pictures of graphs.

        ``"version"`` is 1. It changes where a field goes or has another sense, not where one is
        added.
        """
        forward, backward = self.saved
        return {
            "version": _VERSION,
            "scope": self.scope,
            "graphs": [
                {
                    "operations_before": len(graph.before.operations),
                    "operations_after": len(graph.after.operations),
                    "calls": graph.calls,
                    "break": asdict(graph.end) if graph.end else None,
                }
                for graph in self.graphs
            ],
            "tensors": [{**_plain(asdict(each)), "saved": each.saved} for each in self.tensors],
            "saved": {"forward": asdict(forward), "backward": asdict(backward)},
            "scopes": [asdict(each) for each in self.scopes],
            "extern_calls": self.extern_calls,
            "unseen": list(self.unseen),
            "breaks": list(self.breaks),
        }

    def __str__(self) -> str:
        return text(self)

    __repr__ = __str__

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that shows it, and loads nothing from elsewhere.

        Args:
            path: the file; it is overwritten.
        """
        Path(path).write_text(self._repr_html_(whole=True), encoding="utf-8")

    def _repr_html_(self, *, whole: bool = False) -> str:
        return page(self) if whole else in_frame(page(self))

    def to_svg(self, path: str | os.PathLike[str], *, graph: int = 0) -> None:
        """Write a drawing of a graph, before and after.

        Args:
            path: the file; it is overwritten.
            graph: which one.

        Raises:
            ImportError: ``mini-racer`` is not installed; it runs the page's code (``[viz]``).
            IndexError: there is no such graph.
        """
        if not 0 <= graph < len(self.graphs):
            raise IndexError(f"graph={graph}: there are {len(self.graphs)}")
        Path(path).write_text(drawing(self, graph), encoding="utf-8")


def _plain(value: Any) -> Any:
    """Return nested tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
