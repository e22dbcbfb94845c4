"""The package keeps to its layers, has no cycles, and names torch's private parts in one place."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import fxparam
from tests import layers

PACKAGE = Path(fxparam.__file__).parent


def test_files_import_from_the_layers_below_alone() -> None:
    assert layers.upward_imports(PACKAGE) == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert layers.cycles(PACKAGE) == []


def test_private_names_of_torch_are_in_one_place() -> None:
    assert layers.private_names(PACKAGE) == {}


def test_each_file_says_what_it_is() -> None:
    silent = [n for n, p in layers.sources(PACKAGE).items() if not ast.get_docstring(parsed(p))]
    assert silent == []


def parsed(path: Path) -> ast.Module:
    return layers.parsed(path)


def test_packages_only_name() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        for statement in parsed(path).body:
            names = isinstance(statement, (ast.Import, ast.ImportFrom))
            # The docstring, ``__all__`` and ``__version__``.
            constant = isinstance(statement, (ast.Expr, ast.Assign))
            assert names or (constant and ast.literal_eval(statement.value)), path


def test_no_file_at_the_top_is_private() -> None:
    assert not [p.name for p in PACKAGE.glob("_*.py") if not p.name.startswith("__")]


@pytest.mark.parametrize("name", ["backend", "compile", "export", "hoist", "split", "fold"])
def test_a_public_function_is_not_hidden_by_a_file_of_its_name(name: str) -> None:
    assert inspect.isfunction(getattr(fxparam, name))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"fxparam.{name}")


# --- the checks themselves can fail ------------------------------------------------------------

FILES = {
    "__init__.py": "from fxparam.graph.passes.share import share",
    "_torch/names.py": "from torch._ops import OpOverload",
    "graph/__init__.py": "",
    "graph/analysis/effects.py": "from fxparam._torch import names",
    "graph/rules.py": "from fxparam.graph.analysis.effects import analyze",
    "graph/passes/__init__.py": "",
    "graph/passes/share.py": "import fxparam.graph.rules",
    "eager/register.py": '"""Says ``torch._dynamo`` in prose."""\nimport torch',
    "scopes/region.py": "from fxparam.eager.register import register",
}


def _written(folder: Path, **changed: str) -> Path:
    package = folder / "fxparam"
    for name, source in {**FILES, **changed}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


def test_a_package_in_order_passes(tmp_path: Path) -> None:
    package = _written(tmp_path)
    assert layers.upward_imports(package) == []
    assert layers.cycles(package) == []
    assert layers.private_names(package) == {}


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        (
            "graph/analysis/effects.py",
            "def late():\n    from fxparam.graph.passes import share",
            "graph.analysis.effects:2 imports graph.passes.share",
        ),
        (
            "graph/analysis/effects.py",
            "from ..rules import refusal",
            "graph.analysis.effects:1 imports graph.rules",
        ),
        (
            "eager/register.py",
            "import fxparam.scopes.region as r",
            "eager.register:1 imports scopes.region",
        ),
        (
            "scopes/region.py",
            "if True:\n    from fxparam import graph",
            "scopes.region:2 imports graph",
        ),
        (
            "eager/register.py",
            'import importlib\nimportlib.import_module("fxparam.scopes.region")',
            "eager.register:2 imports scopes.region",
        ),
        ("_torch/names.py", "from fxparam import cached", "_torch.names:1 imports "),
        ("helpers.py", "", "helpers: in no layer"),
    ],
)
def test_an_import_from_above_is_found(tmp_path: Path, file: str, source: str, found: str) -> None:
    assert layers.upward_imports(_written(tmp_path, **{file: source})) == [found]


def test_a_cycle_is_found(tmp_path: Path) -> None:
    changed = {
        "graph/analysis/effects.py": "from fxparam.graph.analysis import nodes",
        "graph/analysis/nodes.py": "from fxparam.graph.analysis.modes import key",
        "graph/analysis/modes.py": "def late():\n    from . import effects",
    }
    group = ["graph.analysis.effects", "graph.analysis.modes", "graph.analysis.nodes"]
    assert layers.cycles(_written(tmp_path, **changed)) == [group]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo.config", "torch._dynamo.config"),
        ("def f():\n    from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("import torch\ntorch._C._nn", "torch._C._nn"),
        ("find = lookup('torch._dynamo.config', 'x')", "torch._dynamo.config"),
        ("def f(node):\n    return node._erased", "_erased"),
    ],
)
def test_a_private_name_is_found(tmp_path: Path, source: str, found: str) -> None:
    package = _written(tmp_path, **{"eager/register.py": source})
    assert ("eager.register", found) in layers.private_names(package)
