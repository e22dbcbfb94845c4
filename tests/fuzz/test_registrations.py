"""Any sequence of registrations: a refused step changes nothing, an accepted one is as torch's."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from fxparam.eager import checks
from tests.fuzz.registrations import KINDS, STORED, Assign, Register, Remove, Step, Train, check

STEPS = st.one_of(
    st.builds(Register, st.integers(0, len(KINDS) - 1), st.booleans(), st.booleans()),
    st.builds(Register, st.integers(0, len(KINDS) - 1), st.booleans(), st.booleans()),
    st.builds(Remove, st.booleans()),
    st.builds(Assign, st.booleans()),
    st.builds(Train, st.booleans()),
)
SEQUENCES = st.lists(STEPS, min_size=1, max_size=6)
# The same sequences in each run.
FIXED = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@FIXED
@given(st.sampled_from(STORED), SEQUENCES)
def test_a_refused_step_changes_nothing(stored: str, steps: list[Step]) -> None:
    check(stored, steps)


def test_that_one_tensor_is_not_two_is_noticed(monkeypatch: Any) -> None:
    monkeypatch.setattr(checks, "check_takes_one_tensor", lambda *args: None)
    with pytest.raises(AssertionError, match="was accepted, and reading raises TypeError"):
        test_a_refused_step_changes_nothing()
