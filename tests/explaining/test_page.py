"""The page of an explanation, looked at in a browser where there is one; and the drawing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import fxparam
from fxparam.explaining.explanation import Explanation
from fxparam.explaining.facts import GraphExplained, TensorExplained
from fxparam.explaining.picture import Block, Operation, Picture
from tests.explaining.test_explain import Breaks, Repeats
from tests.test_site import from_elsewhere

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class TwoGraphs(nn.Module):
    """A loop in front of a graph break, and behind it a tensor that is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Repeats(orthogonal(nn.Linear(4, 4)), times=8)
        self.norm = spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.loop(x)
        torch._dynamo.graph_break()
        return self.norm(self.norm(x))


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    torch.manual_seed(0)
    return fxparam.explain(TwoGraphs(), torch.randn(2, 4))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1200",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(executable_path=DRIVER)
    driver = selenium.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def _opened(browser: Any, explanation: Explanation, folder: Path) -> Any:
    page = folder / "page.html"
    explanation.to_html(page)
    browser.get(page.as_uri())
    return browser


def _all(browser: Any, selector: str) -> list[Any]:
    found: list[Any] = browser.find_elements("css selector", selector)
    return found


def _labels(browser: Any, selector: str = "#graph .leaf") -> list[str]:
    return [each.get_attribute("aria-label") for each in _all(browser, selector)]


def _keys(browser: Any, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def test_the_page_loads_nothing_and_names_do_not_end_its_scripts(explanation: Explanation) -> None:
    page = explanation._repr_html_(whole=True)
    assert from_elsewhere(page) == []
    assert not re.search(r"\b(?:fetch|XMLHttpRequest|import)\s*\(", page.partition("<script>")[0])
    named = TensorExplained("</script><b>&", ("K",), 1, 1, 1)
    page = Explanation("graph", (), (named,))._repr_html_(whole=True)
    assert "</script><b>" not in page
    data = re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)
    assert data is not None and json.loads(data[1])["tensors"] == ["</script><b>&"]
    assert explanation._repr_html_().startswith("<iframe srcdoc=")


def test_a_loop_is_drawn_as_a_loop(explanation: Explanation) -> None:
    before, after = (getattr(explanation.graphs[0], side) for side in ("before", "after"))
    (loop,) = (block for block in before.blocks if block.kind == "repeat")
    assert loop.times == 8
    assert [b.kind for b in loop.blocks[0].blocks] == ["evaluation", "module", "module"]
    kinds = [block.kind for block in after.blocks]
    assert kinds == ["inputs", "evaluation", "repeat"]
    assert [b.kind for b in after.blocks[2].blocks[0].blocks] == ["module", "module"]


def test_each_operation_is_in_one_block(explanation: Explanation) -> None:
    def inside(block: Block) -> Iterator[int]:
        yield from block.operations
        for each in block.blocks:
            yield from inside(each)

    for graph in explanation.graphs:
        for picture in (graph.before, graph.after):
            found = [i for block in picture.blocks for i in inside(block)]
            assert sorted(found) == list(range(len(picture.operations)))
            assert all(n < i for i, o in enumerate(picture.operations) for n in o.inputs)


def test_a_drawing_needs_no_browser(
    explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IndexError, match="graph=2: there are 2"):
        explanation.to_svg(tmp_path / "graph.svg", graph=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "py_mini_racer", None)
        with pytest.raises(ImportError, match=r"fxparam\[viz\]"):
            explanation.to_svg(tmp_path / "graph.svg")
    pytest.importorskip("py_mini_racer", reason="needs mini-racer: fxparam[viz]")
    explanation.to_svg(tmp_path / "graph.svg")
    root = ElementTree.parse(tmp_path / "graph.svg").getroot()
    texts = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("loop.layer.weight") == 2
    assert any("× 8" in text for text in texts)
    moved = [p for p in root.iter("{http://www.w3.org/2000/svg}path") if p.get("class") == "moved"]
    assert len(moved) == 1


def test_the_page_works(browser: Any, explanation: Explanation, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    page = _opened(browser, explanation, tmp_path)
    assert len(_all(page, "tbody tr")) == 2
    labels = _labels(page)
    assert labels.count("loop.layer.weight") == 2 and len(_all(page, "path.moved")) == 1

    # The filter.
    _keys(page, "/", "norm")
    (row,) = _all(page, "tbody tr:not([hidden])")
    assert "norm.weight" in row.text and "rule 5" in row.text
    assert page.find_element("id", "left").text == "1 of 2"

    # Pinning goes to the graph that has the tensor; Escape ends it and the filter.
    row.click()
    assert _all(page, "#graph.pinned .leaf.lit") and "norm.weight" in _labels(page)
    _keys(page, Keys.ESCAPE)
    assert not _all(page, "#graph.pinned") and len(_all(page, "tbody tr:not([hidden])")) == 2

    # A click on an evaluation pins, one on its sign opens it.
    _all(page, "[data-graph]")[0].click()
    (first, _) = _all(page, "#graph .leaf.evaluation")
    first.click()
    assert _all(page, "path.moved.lit") and _all(page, "tbody tr.pinned")
    operations = len(_labels(page))
    _all(page, "#graph .leaf.evaluation .open")[0].click()
    assert len(_labels(page)) > operations and "matrix_exp" in _labels(page)

    # The keyboard does the same.
    page.execute_script("document.querySelector('tbody tr').focus()")
    _keys(page, Keys.ARROW_DOWN, Keys.ENTER)
    assert page.find_element("css selector", "tr.pinned").get_attribute("data-t") == "1"
    page.execute_script("document.querySelector('#graph .leaf .open').parentElement.focus()")
    shown = len(_labels(page))
    _keys(page, Keys.SPACE)
    assert len(_labels(page)) > shown

    # Hovering, or the keyboard's focus, shows the line of code.
    _all(page, "[data-graph]")[0].click()
    page.execute_script("document.querySelector('#graph .leaf.evaluation').focus()")
    tip = page.find_element("id", "tip").text
    assert "x = torch.tanh(self.layer(x))" in tip and "test_explain.py" in tip
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_graph_of_thousands_of_operations_is_folded(browser: Any, tmp_path: Path) -> None:
    operations = tuple(
        Operation(f"n{i}", f"op{i % 7}", "float32 4", (), (i - 1,) if i else (), "t" * (i % 9 == 0))
        for i in range(5000)
    )
    blocks = [
        Block(f"layer {i % 11}", "module", tuple(range(10 * i, 10 * i + 10))) for i in range(500)
    ]
    parts = tuple(
        Block(f"part {i}", "part", blocks=tuple(blocks[50 * i :][:50])) for i in range(10)
    )
    picture = Picture(operations, parts)
    graph = GraphExplained(picture, picture)
    page = _opened(browser, Explanation("graph", (graph,), ()), tmp_path)
    assert len(_all(page, "#graph .leaf")) == 20
    _all(page, "#graph .leaf .open")[0].click()
    assert len(_all(page, "#graph .leaf")) == 69
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_breaks_are_on_the_page(tmp_path: Path) -> None:
    explanation = fxparam.explain(Breaks(orthogonal(nn.Linear(4, 4))), torch.randn(2, 4))
    explanation.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "2 graphs, 1 graph break" in text and "would save 1 of 2" in text
