"""Do all ranks share the same evaluations? Asked while they compile, where collectives are shared.

A rank that shares a gather where another runs it twice makes both wait for ever. Each rank writes
its plan for a frame, the collectives and evaluations of its graph, to the store of the process
group, and waits until every other rank has written the same one. Ranks may compile at other times,
and some of them anew for other shapes: a plan that the others have had counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

from torch.fx import GraphModule

from fxparam._torch.collectives import collectives_of, ranks, store_of_ranks
from fxparam._torch.dynamo import traced_code
from fxparam.graph.report import Report

__all__ = ["RanksDifferError", "check_ranks"]

_SECONDS = 20


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
    code = traced_code()
    frame = "graph" if code is None else f"{code.co_name}:{code.co_firstlineno}"
    store, text = store_of_ranks(), json.dumps(plan)
    digest = hashlib.sha1(text.encode()).hexdigest()
    store.set(f"fxparam/{frame}/latest/{own}", text)
    store.set(f"fxparam/{frame}/{digest}/{own}", "")
    for rank in range(count):
        key = f"fxparam/{frame}/{digest}/{rank}"
        if not store.check([key]) and not _arrives(store, key):
            raise RanksDifferError(_message(store, frame, plan, own, rank))


def _arrives(store: Any, key: str) -> bool:
    try:
        store.wait([key], timedelta(seconds=_SECONDS))
    except RuntimeError:  # of the store: too late
        return False
    return True


def _message(store: Any, frame: str, plan: Sequence[str], own: int, rank: int) -> str:
    key = f"fxparam/{frame}/latest/{rank}"
    if store.check([key]):
        theirs = json.loads(store.get(key))
        pairs = enumerate(zip_longest(plan, theirs, fillvalue="nothing"))
        i, (mine, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        found = f"line {i} of the plan is '{mine}' on rank {own} and '{other}' on rank {rank}"
    else:
        found = f"rank {rank} has not compiled it within {_SECONDS} seconds"
    return (
        "Ranks would run other collectives than each other, and wait for ever.\n"
        f"required: the same plan for '{frame}' on every rank\nfound: {found}"
    )
