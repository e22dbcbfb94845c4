"""Run checks on several ranks on this machine, as ``torchrun`` starts them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist

__all__ = ["ENGINES", "RANKS", "available", "names", "outcomes"]

_ROOT = Path(__file__).parents[2]
ENGINES = ("dtensors", "ddp", "fsdp2", "tensor_parallel", "checkpoints")
RANKS = int(os.environ.get("FXPARAM_RANKS", "2"))


def available() -> bool:
    return dist.is_available() and dist.is_gloo_available()


def names(engine: str) -> list[str]:
    """The names of an engine's checks, in the order in which they run."""
    source = (Path(__file__).parent / "checks" / f"{engine}.py").read_text()
    lines = (line for line in source.splitlines() if line.startswith("def check_"))
    return [line.removeprefix("def check_").partition("(")[0] for line in lines]


@functools.cache
def outcomes(engine: str) -> dict[str, str]:
    """For each check of an engine what it raised, on whichever rank; empty if nothing."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command]
            + ["-m", "tests.distributed.worker", engine, folder],
            cwd=_ROOT,
            env={
                **os.environ,
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
                "PYTHONPATH": str(_ROOT),
            },
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        for path in Path(folder).iterdir():
            for line in path.read_text().splitlines():
                name, error = json.loads(line)
                found[name] = found.get(name, "") + error
    if not found:
        raise RuntimeError(f"no check has run:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return found
