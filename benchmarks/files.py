"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write_json"]


def write_json(path: Path, data: Any, indent: int | None = None) -> None:
    """Write beside the file and move it there: one that is cut off leaves the old one as it was."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(data, indent=indent) + "\n")
    os.replace(beside, path)
