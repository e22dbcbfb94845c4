"""Counts of what Inductor generated: kernels, their launches, and calls of ready-made ops."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Counts", "count", "extern_calls"]


# What the names of ops begin with in generated modules.
_EXTERN = ("extern_kernels.", "torch.ops.", "aten.")


@dataclass(frozen=True)
class Counts:
    """What the generated code of some graphs consists of, as it is written.

    A call in a loop of the generated code counts once.

    Attributes:
        kernels: different kernels, C++ or Triton.
        launches: calls of these.
        extern_calls: calls of ops that Inductor does not generate, such as matrix products.
        languages: of the kernels, ``"C++"`` and ``"Triton"``.
    """

    kernels: int
    launches: int
    extern_calls: int
    languages: tuple[str, ...] = ()


def count(modules: Sequence[str]) -> Counts:
    """Count what modules that Inductor generated consist of.

    >>> module = '''
    ... cpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], "code")
    ... def call(args):
    ...     cpp_fused_add_0(args[0])
    ...     extern_kernels.mm(args[0], args[1], out=args[2])
    ...     cpp_fused_add_0(args[2])
    ... '''
    >>> count([module])
    Counts(kernels=1, launches=2, extern_calls=1, languages=('C++',))
    """
    sources: set[str] = set()
    languages: set[str] = set()
    launches = 0
    for module in modules:
        tree = ast.parse(module)
        kernels = dict(_kernels_of(tree))
        for compiler, source in kernels.values():
            sources.add(source)
            languages.add("Triton" if compiler == "triton" else "C++")
        for called in _called(tree):
            kernel, _, method = called.partition(".")
            launches += kernel in kernels and method in ("", "run")
    calls = sum(extern_calls(modules).values())
    return Counts(len(sources), launches, calls, tuple(sorted(languages)))


def extern_calls(modules: Iterable[str]) -> dict[str, int]:
    """Count the calls of ops that Inductor does not generate, by the ops' names.

    >>> extern_calls(["def call(args):\\n    extern_kernels.mm(args[0], args[1], out=args[2])"])
    {'mm': 1}
    """
    found: Counter[str] = Counter()
    for module in modules:
        for called in _called(ast.parse(module)):
            if called.startswith(_EXTERN):
                name = called.removeprefix("torch.ops.").removeprefix("extern_kernels.")
                found[name.removeprefix("aten.").removesuffix(".default")] += 1
    return dict(found)


def _kernels_of(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the kernels that a generated module defines.

    Each comes with the method of ``async_compile`` that makes it and with its source.
    """
    for statement in tree.body:
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(
                    func=ast.Attribute(value=ast.Name(id="async_compile"), attr=compiler),
                    args=[*_, ast.Constant(value=str(source))],
                ),
            ):
                yield name, (compiler, source.replace(name, ""))


def _called(tree: ast.Module) -> Iterator[str]:
    """Yield what a module calls, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            if name:
                yield name


def _dotted(expression: ast.expr) -> str:
    match expression:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{prefix}.{attr}" if (prefix := _dotted(value)) else ""
    return ""
