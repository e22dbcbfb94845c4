"""Compiles kernels for ``sm_90`` in every configuration, and writes what the compiler said.

``python -m tests.triton.cubin SOURCES.json OUTPUT.json``, without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.triton.pretended_gpu import compiled_for_gpu


def main(sources: str, output: str) -> None:
    kernels = json.loads(Path(sources).read_text())
    found = [list(compiled_for_gpu(source, name)) for source, name in kernels.items()]
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
