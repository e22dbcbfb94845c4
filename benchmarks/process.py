"""A function in a fresh process: ``python -m benchmarks.process JOB.json RESULT.json``."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "call", "run"]

ROOT = Path(__file__).parents[1]


def run(command: list[str], limit: float, env: dict[str, str] | None = None) -> str | None:
    """Run Python with arguments, and return why it ended badly; nothing of it is left."""
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its own children end with it
    )
    try:
        _, said = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no result after {limit:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode < 0:
        return f"ended by {signal.Signals(-child.returncode).name}"
    if child.returncode == 0:
        return None
    return (said.strip().splitlines() or [f"exit code {child.returncode}"])[-1]


def call(function: str, limit: float, env: dict[str, str] | None = None, **arguments: Any) -> Any:
    """Return what ``module:function`` returns, as JSON.

    Args:
        limit: seconds after which the process is ended.
        env: more of the environment; without it, compilers find empty caches.

    Returns:
        The result, or ``{"error": line}`` for a process that came to none.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        job.write_text(json.dumps({"function": function, "arguments": arguments}))
        command = ["-m", "benchmarks.process", str(job), str(result)]
        problem = run(command, limit, {"TMPDIR": folder, **caches, **(env or {})})
        return {"error": problem} if problem else json.loads(result.read_text())


def main(job: str, result: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    asked = json.loads(Path(job).read_text())
    module, _, name = asked["function"].partition(":")
    found = getattr(importlib.import_module(module), name)(**asked["arguments"])
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
