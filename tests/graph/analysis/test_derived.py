"""Which nodes depend on parameters, buffers and constants alone."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Node

from fxparam.graph.analysis.derived import PARAMETER, derive, is_parameter
from tests.graph.sketch import Sketch


def _names(nodes: Iterable[Node]) -> set[str]:
    return {node.name for node in nodes}


def test_what_follows_from_a_parameter() -> None:
    s = Sketch()
    p, x = s.parameter(), s.input()
    ones = s.call(torch.ones, 3, 3)
    weight = s.call(operator.add, s.call(torch.exp, p), s.call(operator.mul, ones, 2))
    s.call(operator.matmul, s.call(torch.neg, weight), x)
    found = derive(s.returns(x), [p])
    assert _names(found.nodes) == {"p", "exp", "add", "neg"}
    assert _names(found.constants) == {"ones", "mul"}
    assert _names(found.candidates) == {"exp", "add", "neg"}  # no placeholder, no bare constant


def test_an_evaluation_is_a_candidate_whatever_it_depends_on() -> None:
    s = Sketch()
    x = s.input()
    s.evaluation(torch.exp, x)
    s.evaluation(torch.ones, 3, 3)
    s.call(torch.exp, x)
    found = derive(s.returns(x), [])
    assert _names(found.candidates) == {"exp", "ones"}
    assert not found.nodes


def test_what_the_module_holds_is_a_parameter() -> None:
    s = Sketch()
    held = s.attribute("held", torch.ones(3, 3))
    s.call(torch.exp, held)
    assert _names(derive(s.returns(held), []).candidates) == {"exp"}


def test_which_placeholders_are_parameters() -> None:
    s = Sketch()
    p, x, named = s.parameter(), s.input(), s.input("named")
    named.meta[PARAMETER] = "cell.weight"
    assert [is_parameter(node) for node in (p, x, named)] == [True, False, True]
