"""``python -m fxparam explain``: what is shared in a model, and what is not and why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from fxparam.explaining.example import ExampleError, factory_at
from fxparam.explaining.explain import explain
from fxparam.explaining.explanation import Explanation

__all__ = ["main"]

_SCOPES = ("graph", "call", "frozen")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fxparam explain", description=__doc__)
    add = parser.add_argument
    add("target", help="package.module:function; it returns a model and its inputs")
    add("--html", type=Path, metavar="FILE", help="write the page there")
    add("--json", type=Path, metavar="FILE", help="write the explanation as JSON there")
    add("--svg", type=Path, metavar="FILE", help="write a drawing of the first graph there")
    add("--scope", choices=_SCOPES, default="graph", help="as of fxparam.compile")
    add("--inductor", action="store_true", help="also say which ops Inductor calls")
    return parser


def _draw(explanation: Explanation, path: Path) -> None:
    try:
        explanation.to_svg(path)
    except ImportError as error:
        raise ExampleError(" ".join(str(error).splitlines())) from error
    except IndexError as error:
        raise ExampleError(f"--svg: {error}") from error


def main(arguments: list[str]) -> int:
    """Run the ``explain`` command and return its exit code: 2 for arguments that cannot work."""
    options = _parser().parse_args(arguments)
    try:
        for path in filter(None, (options.html, options.json, options.svg)):
            if path.is_dir() or not path.resolve().parent.is_dir():
                raise ExampleError(f"{path}: not a file in a folder that exists")
        example = factory_at(options.target)()
        reserved = {"scope", "inductor"} & {*example.kwargs}
        if reserved:
            raise ExampleError(f"inputs may not be named {', '.join(sorted(reserved))}")
        if options.scope != "graph" and not isinstance(example.model, torch.nn.Module):
            raise ExampleError(f"--scope {options.scope} is for modules: the model is none")
        explanation = explain(
            example.model,
            *example.args,
            scope=options.scope,
            inductor=options.inductor,
            **example.kwargs,
        )
        print(explanation)
        if options.html:
            explanation.to_html(options.html)
        if options.json:
            options.json.write_text(json.dumps(explanation.to_dict(), indent=2) + "\n")
        if options.svg:
            _draw(explanation, options.svg)
    except (ExampleError, OSError) as error:
        print(f"fxparam explain: {error}", file=sys.stderr)
        return 2
    return 0
