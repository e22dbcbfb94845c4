"""What the tests of torch's bugs are judged by: it can fail, both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.graph.torch_bugs import torch_alone

THEN = "the workaround may be dropped"


def test_a_bug_that_is_there_and_one_that_is_mended() -> None:
    torch_alone.check(True, then=THEN)
    torch_alone.check(True, then=THEN, mended_in="999")
    torch_alone.check(False, then=THEN, mended_in="2.11")
    torch_alone.check(False, then=THEN, since="999")


def test_a_bug_that_is_gone_says_what_may_be_dropped() -> None:
    with pytest.raises(AssertionError, match=f"no longer errs here: .*{THEN}"):
        torch_alone.check(False, then=THEN)


def test_a_bug_that_is_back_is_found() -> None:
    with pytest.raises(AssertionError, match="errs here too, .* from 2.11 on, before 2.11 alone"):
        torch_alone.check(True, then=THEN, mended_in="2.11")


def test_a_wrong_gradient_and_a_wrong_result_are_errors() -> None:
    def program(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    def wrong(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return lambda x, weight: (x * weight.detach() + 0 * weight,)

    assert torch_alone.error(program, "eager") == 0
    assert torch_alone.error(program, wrong) == 1
    assert torch_alone.error(program, lambda gm, inputs: lambda x, w: (x + w,)) > 0.1
