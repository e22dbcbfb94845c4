"""Warn that torch's precompiled artifacts are not kept apart by backend.

With ``torch._dynamo.config.caching_precompile`` a compiled function is loaded in a later process by
its name and first line. One that another backend compiled is loaded for this one as well, shares
nothing, and no backend is called: it can only be said beforehand.
"""

from __future__ import annotations

import functools
import logging

from fxparam._torch.dynamo import keeps_artifacts

__all__ = ["warn_of_artifacts"]

_log = logging.getLogger("fxparam")


def warn_of_artifacts() -> None:
    """Log a warning, once, if torch loads what was compiled in an earlier process."""
    if keeps_artifacts():
        _warn_once()


@functools.cache
def _warn_once() -> None:
    _log.warning(
        "torch._dynamo.config.caching_precompile is on. It does not tell backends apart: what "
        "another backend compiled in an earlier process is loaded for fxparam, and shares "
        "nothing. Give each backend a TORCHINDUCTOR_CACHE_DIR of its own."
    )
