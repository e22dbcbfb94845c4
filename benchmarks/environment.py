"""Where a run was made, and of what: no figure means anything without."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.process import ROOT

__all__ = ["environment", "in_a_line"]


def environment(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "source": _source(),
        "compiler": _compiler(),
        "versions": {
            name: version
            for name in ("torch", "fxparam", "triton", "jax", "numpy")
            if (version := _version(name)) is not None
        },
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def in_a_line(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = found.get("gpu") or f"{found['processor']}, {found['threads']} threads"
    return f"{where}; Python {found['python']}, {versions}"


def _source() -> str:
    """A digest of this package's code and the suite's: a version tells nothing between releases."""
    digest = hashlib.sha256()
    for folder in ("fxparam", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _compiler() -> str | None:
    """The first line of the version of the C++ compiler that Inductor calls."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        told = subprocess.run(
            [get_cpp_compiler(), "--version"], capture_output=True, text=True, check=True
        )
    except Exception:  # torch raises various errors of its own where there is none
        return None
    return told.stdout.partition("\n")[0].strip()


def _version(name: str) -> str | None:
    try:
        return torch.__version__ if name == "torch" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
