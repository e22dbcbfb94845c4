"""An extension of Griffe: docstrings are written for readers of the source, and shown as Markdown.

A reference such as ``:func:`fxparam.cached` `` becomes a link to what this site shows, and code in
other words. An example that no section introduces is fenced, as Markdown takes ``>>>`` for a
quotation. ``Example::`` is the way in which Sphinx writes a fence, and ``Example:`` names the
section that Griffe calls ``Examples:``.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")
DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).+\n?)*)+", re.MULTILINE)
SECTION = re.compile(r"^Example:$", re.MULTILINE)
LITERAL = re.compile(r"^Example::\n\n((?:^    .*\n?|^\n)+)", re.MULTILINE)


class Markdown(griffe.Extension):
    """Turns what is not Markdown in each docstring into it."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **_: Any) -> None:
        if obj.docstring is not None:
            text = inspect.cleandoc(obj.docstring.value)
            obj.docstring.value = _shown(text)


def _shown(text: str) -> str:
    text = SECTION.sub("Examples:", ROLE.sub(_reference, text))
    text = LITERAL.sub(lambda m: f"Example:\n\n{_fenced('python', m[1])}", text)
    return DOCTEST.sub(lambda m: _fenced("pycon", m[0]), text)


def _fenced(language: str, code: str) -> str:
    return f"```{language}\n{textwrap.dedent(code).strip()}\n```\n"


def _reference(match: re.Match[str]) -> str:
    name = match[1]
    ours = name.startswith("fxparam.") and name.count(".") == 1
    return f"[`{name}`][{name}]" if ours else f"`{name}`"
