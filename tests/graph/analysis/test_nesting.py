"""The graphs of one capture: bodies, the calls that run them, and how often they run."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule

from fxparam.graph.analysis.nesting import Level, inputs_in_each_run, is_run_again
from tests.graph.sketch import Sketch, levels

ops = torch.ops.higher_order


def _nested() -> GraphModule:
    """A checkpoint, called twice, that scans four rows."""
    s = Sketch()
    p, x, xs = s.parameter(), s.input(), s.input("xs", 4, 3, 3)
    middle = Sketch(s)
    h, rows, w = middle.like("h", x), middle.like("rows", xs), middle.like("w", p)
    inner = Sketch(s)
    c, row, v = inner.like("c", x), inner.like("row", x), inner.like("v", p)
    c = inner.call(operator.add, inner.call(torch.matmul, inner.call(torch.exp, v), c), row)
    held = middle.attribute("inner", inner.returns(c, inner.call(torch.neg, c)))
    scan = middle.note(ops.scan, held, [h], [rows], [w], value=(h, rows))
    body = s.attribute("middle", middle.returns(middle.call(operator.getitem, scan, 0)))
    for _ in range(2):
        call = s.note(ops.tag_activation_checkpoint, body, x, xs, p, value=(x,))
        x = s.call(operator.getitem, call, 0)
    return s.returns(x)


def _levels() -> tuple[Level, Level, Level]:
    inner, middle, outer = levels(_nested())
    return inner, middle, outer


def test_bodies_come_before_the_graphs_that_run_them() -> None:
    gm = _nested()
    assert [level.gm for level in levels(gm)] == [gm.middle.inner, gm.middle, gm]


def test_contexts_and_runs() -> None:
    inner, middle, outer = _levels()
    assert [len(level.contexts) for level in (inner, middle, outer)] == [2, 2, 0]
    assert [len(level.tables) for level in (inner, middle, outer)] == [2, 2, 1]
    assert [level.runs for level in (inner, middle, outer)] == [8, 2, 1]
    (first, _) = inner.contexts
    assert first.parent is middle and first.call.op == "scan"
    assert first.around == [first.outer, outer.tables[0]]


def test_what_is_derived_in_a_body_is_so_in_each_context() -> None:
    inner, middle, _ = _levels()
    assert {node.name for node in inner.derived.nodes} == {"v", "exp"}
    assert {node.name for node in middle.derived.nodes} == {"inner", "w"}


def test_a_body_of_which_a_call_is_gone() -> None:
    _, middle, outer = _levels()
    first, again = (c.call.node for c in middle.contexts)
    (user,) = again.users
    user.replace_all_uses_with(outer.gm.graph.find_nodes(op="placeholder")[1])
    for node in (user, again):
        outer.gm.graph.erase_node(node)
    assert [c.call.node for c in middle.live] == [first]
    assert middle.runs == 1


def test_inputs_of_each_run() -> None:
    inner, middle, outer = _levels()
    (p, x, xs) = outer.gm.graph.find_nodes(op="placeholder")
    (exp,) = inner.gm.graph.find_nodes(op="call_function", target=torch.exp)
    # Two calls, and the loop's body counts as run twice.
    assert list(inputs_in_each_run(inner, [exp])) == [frozenset({p})] * 4
    assert is_run_again(inner, [exp])
    h, rows, w = middle.gm.graph.find_nodes(op="placeholder")
    assert is_run_again(middle, [w]) and is_run_again(middle, [rows])
    # The second call begins with the result of the first.
    found = list(inputs_in_each_run(middle, [h]))
    assert found[0] == {x} and len(found) == 2
    assert not is_run_again(outer, [p])
    assert xs in next(inputs_in_each_run(middle, [rows]))
