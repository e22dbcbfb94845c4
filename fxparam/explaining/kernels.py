"""``python -m fxparam kernels``: what sharing changes in the code that Inductor generates."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fxparam._torch.inductor import generated_code
from fxparam.explaining.example import Example, ExampleError, factory_at, run
from fxparam.explaining.generated import Counts, count

__all__ = ["generated_by", "main"]

_BACKENDS = ("inductor", "fxparam")


def generated_by(backend: str, make: Callable[[], Example]) -> list[str]:
    """Return the modules that Inductor generates for a model, forward and backward.

    Args:
        backend: the backend of ``torch.compile``.
        make: makes the model and its inputs.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    example = make()
    with generated_code() as modules:
        run(example, torch.compile(example.model, backend=backend))
    return modules


def _table(found: dict[str, Counts]) -> str:
    languages = sorted({each for counts in found.values() for each in counts.languages})
    rows = [
        ("", *found),
        (f"kernels ({', '.join(languages) or 'none'})", *(c.kernels for c in found.values())),
        ("launches of kernels", *(c.launches for c in found.values())),
        ("calls of other ops", *(c.extern_calls for c in found.values())),
    ]
    return "\n".join(f"{row[0]:26}" + "".join(f"{cell!s:>10}" for cell in row[1:]) for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fxparam kernels",
        description=f"{__doc__} A call in a loop of the generated code counts once.",
    )
    parser.add_argument("target", help="package.module:function; it returns a model and its inputs")
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="write the generated modules there"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run the ``kernels`` command and return its exit code: 2 for a target that is none."""
    options = _parser().parse_args(arguments)
    try:
        make = factory_at(options.target)
        modules = {backend: generated_by(backend, make) for backend in _BACKENDS}
        if options.save is not None:
            _save(modules, options.save)
    except (ExampleError, OSError) as error:
        print(f"fxparam kernels: {error}", file=sys.stderr)
        return 2
    print(_table({backend: count(each) for backend, each in modules.items()}))
    return 0


def _save(modules: dict[str, list[str]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for backend, sources in modules.items():
        for i, source in enumerate(sources):
            (folder / f"{backend}-{i}.py").write_text(source)
