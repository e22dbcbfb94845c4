"""The site of the documentation: every page is in its nav, and it loads nothing from elsewhere.

It is built where ``make docs`` has made ``.venv-docs``. MkDocs then checks links and anchors.
"""

from __future__ import annotations

import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fxparam

ROOT = Path(__file__).parents[1]
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
# What a browser loads by itself: not the target of a link that a reader may follow.
_LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}
_ELSEWHERE = re.compile(r"^(?:\w+:)?//")
_IN_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)")


class _Loads(HTMLParser):
    """Collects the addresses that a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(_LOADED.get(tag, ""))
        if address is not None:
            self.found.append(address)


def from_elsewhere(page: str) -> list[str]:
    """Return the addresses on other hosts that a page or a style sheet loads."""
    loads = _Loads()
    loads.feed(page)
    return [a for a in loads.found if _ELSEWHERE.match(a)] + _IN_STYLE.findall(page)


def test_every_page_is_in_the_nav() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    listed = re.findall(r": ([\w.-]+\.md)$", nav, re.MULTILINE)
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert len(listed) == len(set(listed))
    assert pages - {*listed} == set()
    assert {page for page in {*listed} - pages if not (ROOT / page).exists()} == set()


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    names = {f"fxparam.{name}" for name in fxparam.__all__}
    modules = {f"fxparam.{name}" for name in ("parametrize", "parametrizations", "distributed")}
    assert (names | modules) - {*shown} == set()


def test_what_is_loaded_from_elsewhere_is_found() -> None:
    assert from_elsewhere('<img src="a.png"><a href="https://pytorch.org">torch</a>') == []
    assert from_elsewhere('<script src="//host/a.js"></script>') == ["//host/a.js"]
    assert from_elsewhere("body { background: url(https://host/a.png) }") == ["https://host/a.png"]


@pytest.mark.skipif(not MKDOCS.exists(), reason="`make docs` makes the environment")
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(MKDOCS), "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    built = [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in built}
    assert {str(f): found for f in built if (found := from_elsewhere(f.read_text()))} == {}
