"""The documentation: its Python blocks run and print what is shown, and what it names exists.

The blocks of one file run in order, in one namespace, as one module named ``example``. A ``text``
block right after a Python block is what the Python block prints; without one it prints nothing.
"""

from __future__ import annotations

import ast
import contextlib
import io
import linecache
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"((?:[\w.-]+/)*[\w.-]+\.(?:py|md|json|png))(?:: (\w+))?")


@dataclass(frozen=True)
class Block:
    """A Python block of a page, the line it begins at, and what it prints."""

    line: int
    code: str
    output: str


def blocks_of(text: str) -> list[Block]:
    """Return the Python blocks of a page, each with the ``text`` block right after it."""
    fences = list(_FENCE.finditer(text))
    found = []
    for i, fence in enumerate(fences):
        if fence[1] != "python":
            continue
        after = fences[i + 1] if i + 1 < len(fences) else None
        shown = after is not None and after[1] == "text"
        shown = shown and not text[fence.end() : after.start()].strip()
        line = text.count("\n", 0, fence.start(2)) + 1
        found.append(Block(line, fence[2], after[2] if shown else ""))
    return found


def run(blocks: list[Block]) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page in order, and yield what each prints."""
    module = types.ModuleType("example")
    sys.modules["example"] = module  # where Dynamo looks for the globals of functions it inlines
    try:
        for block in blocks:
            # Dynamo and tracebacks look the source up; lines count from the block's first.
            lines = block.code.splitlines(keepends=True)
            linecache.cache["example.py"] = (0, None, lines, "example.py")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.code, "example.py", "exec", dont_inherit=True), vars(module))
            yield block, printed.getvalue()
    finally:
        del sys.modules["example"]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks_of(p.read_text())], ids=lambda p: p.name
)
def test_blocks_print_what_is_shown(page: Path) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    for block, printed in run(blocks_of(page.read_text())):
        assert printed == block.output, f"{page.name}, the block at line {block.line}"


def test_a_block_that_prints_something_else_is_found() -> None:
    page = "```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n"
    assert blocks_of(page) == [Block(2, "x = 1\n", ""), Block(6, "print(x)\n", "2\n")]
    assert [printed for _, printed in run(blocks_of(page))] == ["", "1\n"]


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made of their words."""
    heads = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _missing(code: str) -> str | None:
    """Return what a piece of code in a sentence names that is not there: a path, or a definition.

    Paths are those of the repository or of the package; ``path.py: name`` names a definition.
    """
    match = _PATH.fullmatch(code)
    if match is None or ("/" not in match[1] and match[2] is None):
        return None
    file = next((f for f in (ROOT / match[1], ROOT / "fxparam" / match[1]) if f.exists()), None)
    if file is None:
        return f"no file {match[1]}"
    if match[2] is None:
        return None
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {n.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, kinds)}
    return None if match[2] in names else f"{match[1]} defines no {match[2]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_functions_that_are_named_exist(page: Path) -> None:
    found = [_missing(code) for code in _CODE.findall(_FENCE.sub("", page.read_text()))]
    assert [each for each in found if each] == []


def test_the_tree_has_every_file() -> None:
    """But those of ``torch_bugs``, which have a page of their own, and what packages re-export."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page.partition("## The tree")[2].partition("\n## ")[0]
    files = (f.relative_to(ROOT / "fxparam") for f in (ROOT / "fxparam").rglob("*.py"))
    inside = [f for f in files if f.name != "__init__.py" and f.parent.name != "torch_bugs"]
    assert [str(f) for f in inside if f"`{f.as_posix()}`" not in tree] == []


def test_a_name_that_is_gone_is_found() -> None:
    assert _missing("graph/rules.py: refusal") is None
    assert _missing("graph/rules.py: no_such") == "graph/rules.py defines no no_such"
    assert _missing("graph/no_such.py") == "no file graph/no_such.py"
