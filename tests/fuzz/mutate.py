"""Is the fuzzer any good? Each rule of sharing is switched off in turn; programs must notice.

A rule is switched off by patching the predicates that ask it, in every module that looks them up.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.fx import Node

from fxparam.graph import hoist as _hoist  # noqa: F401  imports every pass
from tests.fuzz import campaign
from tests.fuzz.judge import Verdict, judge
from tests.fuzz.program import Program
from tests.fuzz.themes import seeds_of


def _literals_without_type(value: Any) -> Any:
    """1, 1.0 and True are one key; so are 0.0 and -0.0."""
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return ("literal", value)


def _any_original(number: Callable[..., Any]) -> Callable[..., Any]:
    """Inputs of the graph are one key, whichever they are."""

    def changed(value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, Node) and value.op in ("placeholder", "get_attr"):
            shape = tuple(getattr(value.meta.get("example_value"), "shape", ()))
            return ("node", value.op, shape)
        return number(value, *args, **kwargs)

    return changed


def _always(answer: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda predicate: lambda *args, **kwargs: answer


Mutation = Callable[[Callable[..., Any]], Callable[..., Any]]

_EVERYWHERE = "fxparam.graph"
_NUMBERING = "fxparam.graph.analysis.numbering"

#: For each predicate, under the number of its rule: the function, where it is looked up, and what
#: becomes of it.
PREDICATES: dict[str, tuple[str, str, Mutation]] = {
    "1: literals, types and signs": ("literal_key", _NUMBERING, lambda _: _literals_without_type),
    "1: the same original": ("_key", _NUMBERING, _any_original),
    "1: one backward for all": ("has_one_backward_for_all", _EVERYWHERE, _always(True)),
    "1: gradients taken in the graph": ("may_a_gradient_be_taken", _EVERYWHERE, _always(False)),
    "1: readers in reduced precision": (
        "do_readers_sum_in_reduced_precision",
        _EVERYWHERE,
        _always(False),
    ),
    "1: steps of a loop in reduced precision": (
        "is_its_gradient_summed_in_reduced_precision",
        _EVERYWHERE,
        _always(False),
    ),
    "2: an original written between": ("is_an_input_written_between", _EVERYWHERE, _always(False)),
    "2: an original written in a body": ("is_an_input_written_inside", _EVERYWHERE, _always(False)),
    "2: an original written around the call": (
        "is_an_input_written_around",
        _EVERYWHERE,
        _always(False),
    ),
    "3: the value written": ("is_the_value_written", _EVERYWHERE, _always(False)),
    "3: the value written in a body": ("is_the_value_written_inside", _EVERYWHERE, _always(False)),
    "3: the value escapes": ("does_the_value_escape", _EVERYWHERE, _always(False)),
    "3: the value leaves a body": ("does_the_value_leave_the_body", _EVERYWHERE, _always(False)),
    "4: the modes of the call": ("runs_under_the_modes_of_the_call", _EVERYWHERE, _always(True)),
    "4: the same modes": ("runs_under_the_same_modes", _EVERYWHERE, _always(True)),
    "5: effects": ("has_effects", _EVERYWHERE, _always(None)),
    "6: runs whenever the call does": ("runs_whenever_the_call_does", _EVERYWHERE, _always(True)),
    "6: a gradient on every path": ("has_a_gradient_on_every_path", _EVERYWHERE, _always(True)),
}


_SHARE, _INVARIANTS = "fxparam.graph.passes.share", "fxparam.graph.passes.invariants"
_HOIST = "fxparam.graph.passes.hoist"

#: The same for what is no predicate of a rule by itself.
FIXES: dict[str, tuple[str, str, Mutation]] = {
    "narrow: values in fewer bits": ("narrowed", _EVERYWHERE, _always(frozenset())),
    "narrow: in one graph": ("narrowed", _SHARE, _always(frozenset())),
    "narrow: in a body": ("narrowed", _INVARIANTS, _always(frozenset())),
    "sizes: that data decide": ("has_new_sizes", _SHARE, _always(False)),
    "regions: operands that share memory": ("copy_aliases", _HOIST, _always(set())),
    "general: gradients of branches laid out alike": (
        "lay_gradients_out_alike",
        _EVERYWHERE,
        _always(None),
    ),
    "switch: a branch that may not run": (
        "runs_whenever_the_call_does",
        _EVERYWHERE,
        _always(True),
    ),
    "recurrent: an original written between": (
        "is_an_input_written_between",
        _EVERYWHERE,
        _always(False),
    ),
    "overwritten: what is read or drawn is saved": (
        "save_what_may_change",
        "fxparam",
        _always(None),
    ),
}

#: The same for values that are held too long: what tells that they are not right any more.
HELD: dict[str, tuple[str, str, Mutation]] = {
    "held: a tensor written": ("are_unchanged", "fxparam.scopes.unchanged", _always(True)),
    "held: other objects": ("_first_exchanged", "fxparam.scopes.unchanged", _always(None)),
    "held: the value written": ("was_written", "fxparam.scopes.held", _always(False)),
    "held: other modes": ("present", "fxparam.scopes.store", _always(())),
    "held while tracing: something written": (
        "_is_right",
        "fxparam.scopes.held_in_trace",
        _always(True),
    ),
    "held while tracing: other modes": (
        "ambient_mark",
        "fxparam.scopes.held_in_trace",
        _always(""),
    ),
}

#: The scope in which programs notice that.
SCOPES = {
    "held: a tensor written": "frozen",
    "held: other objects": "region",
    "held: the value written": "region",
    "held: other modes": "call",
    "held while tracing: something written": "",
    "held while tracing: other modes": "",
}

_ALL = PREDICATES | FIXES | HELD

#: The theme whose programs notice; all programs do, where none is named.
THEMES = {
    "1: readers in reduced precision": "narrow",
    "1: steps of a loop in reduced precision": "narrow",
    **{name: name.partition(":")[0] for name in FIXES if not name.startswith("general")},
}


#: The six rules, each with all its predicates.
RULES = tuple(sorted({name.partition(":")[0] for name in PREDICATES}))


@contextmanager
def without(rule: str) -> Iterator[None]:
    """Every predicate whose name starts so switched off: a whole rule, or one predicate of it.

    Raises:
        LookupError: fxparam has no such predicate.
    """
    with ExitStack() as stack:
        for name in _ALL:
            if name.startswith(rule):
                stack.enter_context(_without(name))
        yield


@contextmanager
def _without(predicate: str) -> Iterator[None]:
    name, where, mutation = _ALL[predicate]
    modules = [module for key, module in list(sys.modules.items()) if key.startswith(where)]
    found = [m for m in modules if callable(getattr(m, name, None))]
    if not found:
        raise LookupError(f"{predicate}: fxparam has no {name}")
    before = [getattr(m, name) for m in found]
    for module, function in zip(found, before, strict=True):
        setattr(module, name, mutation(function))
    try:
        yield
    finally:
        for module, function in zip(found, before, strict=True):
            setattr(module, name, function)


def programs_until_noticed(
    rule: str, *, limit: int, start: int = 0, inner: str = ""
) -> tuple[int, Program | None]:
    """How many programs ran until one gave a mismatch that it does not give with the rule."""
    theme, scope = THEMES.get(rule), SCOPES.get(rule, "")
    seeds = seeds_of(theme, start) if theme else itertools.count(start)
    ran = 0
    while ran < limit:
        seed = next(seeds)
        with without(rule):
            program, judgement, _ = next(campaign.run([seed], inner=inner, scope=scope))
        ran += judgement.verdict is not Verdict.INVALID
        if judgement.verdict is not Verdict.MISMATCH:
            continue
        if judge(program, inner=inner).verdict is not Verdict.MISMATCH:
            return ran, program
    return ran, None
