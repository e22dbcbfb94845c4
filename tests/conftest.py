"""Tests are strict: a pass that fails is an error, in the processes that tests start too."""

from __future__ import annotations

import os

os.environ.setdefault("FXPARAM_STRICT", "1")
