"""``cached()`` in code that is being compiled: marks on the nodes in place of a dictionary.

A dictionary would be a side effect, which the bodies of higher-order ops may not have, and values
kept in it would break the graph. Traced for fxparam's own backend, a region marks the nodes traced
in it and each evaluation marks its own; the backend then shares marked evaluations as the
dictionary would have (``graph/regions.py``). Other backends would ignore the marks, so for them a
region stays what it is in eager code.

The functions here run while Dynamo traces and give it constants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch.nn import Module

from fxparam import _private
from fxparam.graph.marks import EVALUATION, REGION

__all__ = ["evaluation_of", "region"]

F = TypeVar("F", bound=Callable[..., object])
_numbers = itertools.count()


def _constant(function: F) -> F:
    return cast("F", torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]


@_constant
def region() -> str:
    """The mark of a region that begins here: that of the one around it, if there is one.

    Empty where the backend would not understand it.
    """
    from fxparam.backend import Backend

    if not isinstance(_private.traced_for(), Backend):
        return ""
    around: str = _private.trace_marks().get(REGION, "")
    return around or f"region {next(_numbers)}"


@_constant
def evaluation_of(chain: Module) -> str:
    """The mark of one evaluation of ``chain``; empty outside a region and in another evaluation."""
    marks = _private.trace_marks()
    if REGION not in marks or EVALUATION in marks:
        return ""
    return f"{id(chain)} {next(_numbers)}"
