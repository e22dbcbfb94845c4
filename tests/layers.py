"""Who imports whom in a package, read from its source: layers, cycles, private names of torch.

A file is known by its dotted name below the package: ``graph.passes.share``; the package's own
``__init__`` by an empty one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

#: What files of each room may import beside files of their own room. A file is in the room with the
#: longest name that its own begins with. Rooms that nobody may import are in no list.
ALLOWED: dict[str, set[str]] = {
    "_torch": set(),
    "marks": set(),
    "graph.analysis": {"_torch", "marks"},
    "graph.torch_bugs": {"_torch", "marks", "graph.analysis"},
    "graph.rules": {"_torch", "marks", "graph.analysis"},
    "graph.report": {"_torch", "marks", "graph.analysis", "graph.rules"},
}
ALLOWED["lowering"] = {"_torch"}
ALLOWED["graph.rewrites"] = {"_torch", "graph.analysis", "lowering"}
ALLOWED["graph.passes"] = set(ALLOWED)
ALLOWED["graph"] = set(ALLOWED)
ALLOWED["eager"] = {"_torch"}
ALLOWED["scopes"] = {"_torch", "marks", "eager"}
ALLOWED["tracing"] = {*ALLOWED["graph"], "graph", "eager"}
ALLOWED["exporting"] = {*ALLOWED["tracing"], "scopes"}
ALLOWED["compiling"] = {*ALLOWED["tracing"], "scopes"}
ALLOWED["explaining"] = {*ALLOWED["compiling"], "compiling"}
ALLOWED["parametrize"] = {"eager", "scopes"}
ALLOWED["parametrizations"] = {"_torch", "eager", "lowering"}
ALLOWED["distributed"] = {"_torch", "eager"}
ALLOWED["demo"] = {""}
ALLOWED["__main__"] = {"", "demo"}
ALLOWED[""] = set(ALLOWED) - {"demo", "__main__", "distributed", "parametrize", "parametrizations"}

#: Private names of nodes, tensors, ops and graph modules of torch's.
PRIVATE = {
    "_cdata",
    "_dynamo_source",
    "_erased",
    "_in_spec",
    "_is_view",
    "_out_spec",
    "_overload_names",
    "_param_name_to_source",
    "_qualified_op_name",
    "_remove_from_list",
    "_rename",
    "_schema",
    "_tracer_cls",
    "_update_args_kwargs",
    "_version",
}

_MODULE = re.compile(r"torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*")


def sources(package: Path) -> dict[str, Path]:
    """Return the files of a package by their dotted names."""
    return {_dotted(path.relative_to(package)): path for path in sorted(package.rglob("*.py"))}


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(package: Path) -> dict[str, dict[str, int]]:
    """Return, for each file, the files of the package that it imports, each with a line.

    Imports in functions and under ``if`` count as well.
    """
    files = sources(package)
    found: dict[str, dict[str, int]] = {}
    for name, path in files.items():
        found[name] = {}
        for line, imported in _imported(parsed(path), name, package.name, path.stem == "__init__"):
            while imported not in files:  # a name in a file
                imported = imported.rpartition(".")[0]
            if imported != name:
                found[name].setdefault(imported, line)
    return found


def _imported(
    tree: ast.Module, name: str, package: str, is_init: bool
) -> Iterator[tuple[int, str]]:
    """Yield the dotted names of the package that a file imports, with those of what is in them."""
    here = [package, *filter(None, name.split("."))]
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = len(here) + is_init - node.level
            base = ".".join([*here[:up], node.module or ""] if node.level else [node.module or ""])
            modules = [f"{base.strip('.')}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            given = node.args[0] if node.args else None
            modules = [given.value] if isinstance(given, ast.Constant) else []
        for module in modules:
            first, _, rest = module.partition(".")
            if first == package:
                yield node.lineno, rest


def _called(call: ast.Call) -> str:
    """Return the last part of the name of what is called."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def room_of(name: str, rooms: Mapping[str, set[str]] = ALLOWED) -> str | None:
    """Return the room that a file is in; None if it is in none."""
    fitting = [r for r in rooms if name == r or (r and name.startswith(f"{r}."))]
    return max(fitting, key=len, default=None)


def upward_imports(package: Path, allowed: Mapping[str, set[str]] = ALLOWED) -> list[str]:
    """Return the imports that no layer allows, and the files that are in no layer."""
    found = []
    for name, targets in imports(package).items():
        room = room_of(name, allowed)
        if room is None:
            found.append(f"{name}: in no layer")
            continue
        for target, line in targets.items():
            other = room_of(target, allowed)
            if other != room and other not in allowed[room]:
                found.append(f"{name}:{line} imports {target}")
    return found


def cycles(package: Path) -> list[list[str]]:
    """Return groups of files that import each other, each group once."""
    edges = imports(package)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        work = [start]
        while work:
            for target in edges[work.pop()]:
                if target not in seen:
                    seen.add(target)
                    work.append(target)
        return seen

    after = {name: reached(name) for name in edges}
    groups = {
        tuple(sorted(other for other in after[name] if name in after[other]))
        for name in edges
        if name in after[name]
    }
    return [list(group) for group in sorted(groups)]


def private_names(package: Path) -> dict[tuple[str, str], int]:
    """Return the private names of torch that files outside of ``_torch`` use, each with a line."""
    found: dict[tuple[str, str], int] = {}
    for name, path in sources(package).items():
        if room_of(name) == "_torch":
            continue
        for line, used in _private(parsed(path)):
            found.setdefault((name, used), line)
    return found


def _private(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            spelled = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            spelled = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            spelled = [ast.unparse(node)]
            if node.attr in PRIVATE and ast.unparse(node.value) != "self":
                yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            spelled = [node.value]  # to be looked up; prose does not match as a whole
        else:
            continue
        for name in spelled:
            if _MODULE.fullmatch(name):
                yield node.lineno, name
