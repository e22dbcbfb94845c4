"""Do all ranks share the same evaluations? Asked while they compile, where collectives are shared.

A rank that shares a gather where another runs it twice makes both wait for ever. Ranks therefore
compare their plans for the code that they compile, through the store of the process group. Some
compile later than others, and some anew for other shapes.

Without being asked, ranks compare the exchanges of data alone, and none waits: of the ranks that
exchange data, the first one to compile writes its plan, and one that comes later with another plan
raises. A plan that a rank has had before is not compared again, so that the n-th plan of each is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from types import CodeType
from typing import Any

from torch.fx import GraphModule

from fxparam._torch.collectives import collectives_of, exchanges_of, ranks, store_of_ranks
from fxparam._torch.dynamo import code_behind_a_break, ends_with_a_break, traced_code
from fxparam.graph.report import Report
from fxparam.marks import is_for_a_region_around

__all__ = ["RanksDifferError", "check_ranks", "compare_exchanges"]

_SECONDS = 20
_SWITCH = "\nfxparam.backend(check_ranks=False) compiles without comparing."
# The plans that this rank has had, by code and group of ranks.
_plans: dict[tuple[str, tuple[int, ...]], list[str]] = {}


class RanksDifferError(RuntimeError):
    """Ranks would run other collectives than each other."""


def check_ranks(gm: GraphModule, report: Report) -> None:
    """Compare the plan of a graph with the other ranks' plans for the same code.

    Args:
        gm: the graph as it will be compiled. One without collectives is not compared.
        report: what was shared in it.

    Raises:
        RanksDifferError: after 20 seconds in which a rank has not had the same plan.
    """
    own, count = ranks()
    collectives = collectives_of(gm)
    if count == 1 or not collectives:
        return
    counts = [f"{e.name}: evaluated {e.runs_before} times, now {e.runs}" for e in report.entries]
    plan = [*counts, *(f"collective {name}" for name in collectives)]
    frame = _frame(traced_code())
    store, text = store_of_ranks(), json.dumps(plan)
    digest = hashlib.sha1(text.encode()).hexdigest()
    store.set(f"fxparam/{frame}/latest/{own}", text)
    store.set(f"fxparam/{frame}/{digest}/{own}", "")
    for rank in range(count):
        key = f"fxparam/{frame}/{digest}/{rank}"
        if not store.check([key]) and not _arrives(store, key):
            raise RanksDifferError(_message(store, frame, plan, own, rank))


def compare_exchanges(gm: GraphModule) -> None:
    """Compare the exchanges of a graph with those of the rank that has compiled it first.

    Where a graph breaks on one of two ranks, the exchanges behind the break are compared with what
    the whole graph of the other has there.

    Args:
        gm: the graph as it will be compiled.

    Raises:
        RanksDifferError: they are others.
    """
    own, count = ranks()
    if count == 1:
        return
    code, broken = traced_code(), ends_with_a_break(gm)
    for group, names in exchanges_of(gm, is_for_a_region_around).items():
        frame, text = _frame(code), json.dumps([own, names, broken])
        plans = _plans.setdefault((frame, group), [])
        if text in plans:
            continue
        plans.append(text)
        key = _key(frame, group)
        first = store_of_ranks().compare_set(key, "", text)
        rank, theirs, broken_there = json.loads(first.decode())
        shared = min(len(names), len(theirs))
        if (broken or broken_there) and names[:shared] == theirs[:shared]:
            if broken != broken_there:
                whole, part = (theirs, names) if broken else (names, theirs)
                _meet(key, frame, whole=whole[len(part) :])
        elif names != theirs:
            raise RanksDifferError(_difference(frame, names, theirs, own, rank) + _SWITCH)
        before = code_behind_a_break(code)
        if before is not None:
            _meet(_key(_frame(before), group), _frame(before), part=names, last=not broken)


def _key(frame: str, group: tuple[int, ...]) -> str:
    """Return what names the plan of some code that this rank has had last."""
    members = hashlib.sha1(repr(group).encode()).hexdigest()
    return f"fxparam/{frame}/{members}/{len(_plans.get((frame, group), ()))}"


def _meet(
    key: str,
    frame: str,
    *,
    whole: Sequence[str] | None = None,
    part: Sequence[str] | None = None,
    last: bool = True,
) -> None:
    """Compare what is behind a break on one rank with the rest of the whole graph of another.

    Args:
        key: names the plan of the function.
        frame: names the function.
        whole: the rest of the whole graph, where it is known here.
        part: exchanges behind a break, where they are known here.
        last: whether none come after these.
    """
    store = store_of_ranks()
    if part is None:
        store.set(f"{key}/whole", json.dumps(whole))
        if not store.check([f"{key}/part"]):
            return
        part, last = json.loads(store.get(f"{key}/part"))
    else:
        store.set(f"{key}/part", json.dumps([part, last]))
        if not store.check([f"{key}/whole"]):
            return
        whole = json.loads(store.get(f"{key}/whole"))
    assert whole is not None and part is not None
    starts = range(len(whole) - len(part) + 1)
    if not any(
        list(whole[i : i + len(part)]) == list(part) for i in (starts[-1:] if last else starts)
    ):
        found = f"{list(part)} behind a graph break on one rank, {list(whole)} there on another"
        raise RanksDifferError(_required(frame, found) + _SWITCH)


def _frame(code: CodeType | None) -> str:
    """Return what names some code on every rank."""
    if code is None:
        return "graph"
    return f"{code.co_name} ({Path(code.co_filename).name}:{code.co_firstlineno})"


def _arrives(store: Any, key: str) -> bool:
    try:
        store.wait([key], timedelta(seconds=_SECONDS))
    except RuntimeError:  # of the store: too late
        return False
    return True


def _message(store: Any, frame: str, plan: Sequence[str], own: int, rank: int) -> str:
    key = f"fxparam/{frame}/latest/{rank}"
    if store.check([key]):
        return _difference(frame, plan, json.loads(store.get(key)), own, rank)
    return _required(frame, f"rank {rank} has not compiled it within {_SECONDS} seconds")


def _difference(frame: str, plan: Sequence[str], theirs: Sequence[str], own: int, rank: int) -> str:
    pairs = enumerate(zip_longest(plan, theirs, fillvalue="nothing"))
    i, (mine, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    return _required(
        frame, f"line {i} of the plan is '{mine}' on rank {own} and '{other}' on rank {rank}"
    )


def _required(frame: str, found: str) -> str:
    return (
        "Ranks would run other collectives than each other, and wait for ever.\n"
        f"required: the same plan for '{frame}' on every rank\nfound: {found}"
    )
