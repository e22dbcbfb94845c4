"""``python -m fxparam``: the demo."""

from __future__ import annotations

import sys

_COMMANDS = ("demo",)


def main(arguments: list[str]) -> int:
    """Run a command and return its exit code: 2, and a line, for one that does not exist."""
    if not arguments or arguments[0] not in _COMMANDS:
        given = repr(arguments[0]) if arguments else "none"
        print(f"usage: python -m fxparam {{{','.join(_COMMANDS)}}}: got {given}", file=sys.stderr)
        return 2
    from fxparam import demo

    return demo.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
