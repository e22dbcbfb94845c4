"""``python -m fxparam``: the commands."""

from __future__ import annotations

import importlib
import sys

_COMMANDS = {
    "demo": ("fxparam.demo", "an orthogonal RNN on real data, trained four ways"),
    "explain": ("fxparam.explaining.command", "what is shared in a model, and what is not and why"),
    "kernels": (
        "fxparam.explaining.kernels",
        "what sharing changes in the code Inductor generates",
    ),
    "bench": ("benchmarks.__main__", "the benchmark, in a checkout of fxparam"),
}


_USAGE = f"usage: python -m fxparam {{{','.join(_COMMANDS)}}}"


def _help() -> str:
    lines = (f"  {name:9}{about}" for name, (_, about) in _COMMANDS.items())
    return "\n".join([_USAGE, "", *lines, "", "python -m fxparam COMMAND --help says more."])


def main(arguments: list[str]) -> int:
    """Run a command and return its exit code: 2, and a line, for one that does not exist."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if not arguments or arguments[0] not in _COMMANDS:
        given = repr(arguments[0]) if arguments else "none"
        print(f"{_USAGE}: got {given}", file=sys.stderr)
        return 2
    module, _ = _COMMANDS[arguments[0]]
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        print(f"{arguments[0]}: {module} is in a checkout of fxparam only", file=sys.stderr)
        return 2
    code: int = command.main(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
