"""torch's own distributed engines, on two ranks of this machine (``make distributed``: on four)."""

from __future__ import annotations

import pytest

from tests.distributed import launch

pytestmark = pytest.mark.skipif(not launch.available(), reason="torch has no gloo here")

CHECKS = [(engine, name) for engine in launch.ENGINES for name in launch.names(engine)]


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(("engine", "name"), CHECKS, ids=lambda value: value)
def test_check(engine: str, name: str) -> None:
    outcomes = launch.outcomes(engine)
    assert name in outcomes, f"not run: {outcomes}"
    assert outcomes[name] == ""
