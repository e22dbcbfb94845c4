"""Equal keys are the same function of the same inputs: literals, bodies, attributes."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.numbering import key_of, literal_key
from tests.graph.sketch import Sketch

NAN = float("nan")
#: Literals of which none is another one.
DIFFERENT: list[Any] = [
    *(1, 1.0, True, 1 + 0j, "1", b"1", None, ...),
    *(0.0, -0.0, 0, False, complex(0.0, -0.0), complex(-0.0, 0.0)),
    *((1,), [1], (1.0,), (1, 1)),
    *(torch.float32, torch.float64, torch.device("cpu"), torch.strided, torch.contiguous_format),
    *(functools.partial(max, 1), functools.partial(max, 1.0), functools.partial(max, key=abs)),
    *(object(), object(), {}),
]


def test_literals_that_differ() -> None:
    for a, b in itertools.combinations(DIFFERENT, 2):
        assert literal_key(a) != literal_key(b), (a, b)


@pytest.mark.parametrize("value", [1, 2.5, -0.0, NAN, (1, [2.0]), functools.partial(max, key=abs)])
def test_literals_that_are_one(value: Any) -> None:
    copy = functools.partial(max, key=abs) if isinstance(value, functools.partial) else value
    assert literal_key(value) == literal_key(copy)


def _keys(build: Any) -> tuple[Any, Any]:
    """The keys of the two nodes that ``build`` makes."""
    s = Sketch()
    one, other = build(s)
    gm = s.returns(one, other)
    number = {node: node.name for node in gm.graph.nodes}
    return key_of(gm, one, number), key_of(gm, other, number)


def _body(s: Sketch, name: str, literal: float = 1.0, meta: Any = None) -> Node:
    b = Sketch(s)
    gm = b.returns(b.call(operator.mul, b.input("a"), literal))
    gm.meta.update(meta or {})
    return s.attribute(name, gm)


SHARED = torch.ones(3)
EQUAL = {
    "the same op": lambda s: [s.call(torch.exp, x) for x in 2 * [s.input()]],
    "slices": lambda s: [s.call(operator.getitem, x, slice(0, 2)) for x in 2 * [s.input()]],
    "keywords": lambda s: [s.call(torch.sum, x, dim=0) for x in 2 * [s.input()]],
    "the same tensor": lambda s: [s.attribute("a", SHARED), s.attribute("b", SHARED)],
    "bodies that do the same": lambda s: [_body(s, "a"), _body(s, "b")],
}
UNEQUAL = {
    "other inputs": lambda s: [s.call(torch.exp, s.input(name)) for name in "xy"],
    "equal but distinct tensors": lambda s: [s.attribute(n, torch.ones(3)) for n in "ab"],
    "a function and a method": lambda s: [
        s.call(op, x) for x in [s.input()] for op in (torch.exp, "exp")
    ],
    "another literal": lambda s: [
        s.call(operator.mul, x, v) for x in [s.input()] for v in (0.0, -0.0)
    ],
    "a list and a tuple": lambda s: [
        s.call(torch.permute, x, order) for x in [s.input()] for order in ([1, 0], (1, 0))
    ],
    "bodies that do other things": lambda s: [_body(s, "a", 1.0), _body(s, "b", 2.0)],
    "bodies under another policy": lambda s: [_body(s, "a"), _body(s, "b", meta={"policy": 1})],
}


@pytest.mark.parametrize("name", EQUAL)
def test_the_same_function_of_the_same_inputs(name: str) -> None:
    one, other = _keys(EQUAL[name])
    assert one is not None and one == other


@pytest.mark.parametrize("name", UNEQUAL)
def test_another_function(name: str) -> None:
    one, other = _keys(UNEQUAL[name])
    assert None not in (one, other) and one != other


def test_what_computes_nothing_has_no_key() -> None:
    s = Sketch()
    x = s.input()
    gm: GraphModule = s.returns(x)
    assert [key_of(gm, node, {x: 0}) for node in gm.graph.nodes] == [None, None]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is without distributed")
def test_placements_are_compared_by_what_they_say() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    different = [Shard(0), Shard(1), Replicate(), Partial("avg"), Partial("sum")]
    for a, b in itertools.combinations(different, 2):
        assert literal_key([a]) != literal_key([b]), (a, b)
    again = [Shard(0), Shard(1), Replicate(), Partial("avg"), Partial("sum")]
    assert literal_key(different) == literal_key(again)
