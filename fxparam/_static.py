"""``cached()`` in code that is being compiled: marks on the nodes in place of a dictionary.

A dictionary would be a side effect, which the bodies of higher-order ops may not have, and values
kept in it would break the graph. Traced for fxparam's own backend, a region marks the nodes traced
in it and each evaluation marks its own; the backend then shares marked evaluations as the
dictionary would have (``graph/regions.py``). Other backends would ignore the marks, so for them a
region stays what it is in eager code.

The functions here run while Dynamo traces and give it constants.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import TypeVar, cast

import torch

from fxparam import _private
from fxparam._ambient import ambient
from fxparam.graph.marks import EVALUATION, REGION, within

__all__ = ["UNTRACEABLE", "assignments", "evaluation_of", "is_innermost", "is_open", "region"]

F = TypeVar("F", bound=Callable[..., object])
_numbers = itertools.count()

#: In place of a mark: this evaluation cannot be told from others by one.
UNTRACEABLE = "untraceable"


def _constant(function: F) -> F:
    return cast("F", torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]


@_constant
def region() -> str:
    """The mark of a region that begins here: that of the one around it, if there is one.

    Empty where marks do not do: for other backends, and in generators, which may be left at any
    time, with their regions, and which Dynamo does not close when they are.
    """
    from fxparam import scopes
    from fxparam.backend import Backend

    own = inspect.unwrap(scopes.cached).__code__
    if not isinstance(_private.traced_for(), Backend) or _private.is_in_traced_generator(own):
        return ""
    return _present(REGION) or f"{_private.trace_number()}.{next(_numbers)}"


@_constant
def is_open() -> bool:
    """Whether a region is around what is being traced."""
    return bool(_present(REGION))


@_constant
def is_innermost(mark: str) -> bool:
    """Whether the region of ``mark`` may end now: it, or one in it, began last."""
    return _present(REGION) == mark


@_constant
def evaluation_of(chain: int, training: str) -> str:
    """The mark of one evaluation of a chain, with those it is a part of; empty outside a region.

    Modes are those of the code that reads: Dynamo has entered them here. In the graph they can not
    be told from those that an evaluation begins with, since it drops pairs of switches.

    Args:
        chain: the identity of a ``ParametrizationList``; torch 2.11 takes no module here.
        training: the training modes of its modules, which Dynamo follows and only traced code
            sees as they are.

    Inside a transform of ``torch.func`` the eager region hands out values of the code around it,
    which code on another level of the transform cannot be shown to do.
    """
    if not _present(REGION):
        return ""
    around = _present(EVALUATION)
    if _private.inside_functorch():
        return "" if around else UNTRACEABLE
    modes = ",".join(map(str, ambient()))
    return within(around, f"{_private.trace_number()}.{chain} {training} {modes} {next(_numbers)}")


@_constant
def assignments(chain: int) -> str:
    """What has been assigned so far to attributes of a chain's modules, other than tensors.

    Args:
        chain: the identity of a ``ParametrizationList``.
    """
    return " ".join(_private.traced_assignments(chain))


def _present(key: str) -> str:
    """A mark of the present trace; earlier ones may have left theirs behind."""
    mark: str = _private.trace_marks().get(key, "")
    return mark if mark.startswith(f"{_private.trace_number()}.") else ""
