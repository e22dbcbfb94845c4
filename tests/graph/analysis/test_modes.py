"""The modes in force along a graph: which nodes run under the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxparam.graph.analysis.modes import (
    ModeStack,
    grad_and_autocast,
    grad_may_be_enabled,
    switches_a_mode,
)
from tests.graph.sketch import Sketch

set_grad = torch._C._set_grad_enabled
enter_autocast, exit_autocast = torch.amp._enter_autocast, torch.amp._exit_autocast
enter_vmap, exit_vmap = (
    torch._functorch.predispatch._vmap_increment_nesting,
    torch._functorch.predispatch._vmap_decrement_nesting,
)


def _keys(*switches: tuple[Any, ...], grad: bool | None = True) -> list[Any]:
    """The modes in front of switches and after each."""
    s = Sketch()
    modes = ModeStack(grad)
    keys = [modes.key]
    entered: list[Any] = []
    for target, *args in switches:
        if target is exit_autocast:
            args = [entered.pop()]
        node = s.note(target, *args)
        if target is enter_autocast:
            entered.append(node)
        assert modes.is_switch(node)
        modes.enter(node)
        keys.append(modes.key)
    return keys


GRAD = (set_grad, False), (set_grad, True)
AUTOCAST = (enter_autocast, "cpu", torch.bfloat16, True, None), (exit_autocast,)
HALF = (enter_autocast, "cpu", torch.float16, True, None)
OFF = (enter_autocast, "cpu", torch.bfloat16, False, None)
VMAP = (enter_vmap, 3, "error"), (exit_vmap,)


@pytest.mark.parametrize("pair", [GRAD, AUTOCAST, VMAP], ids=["grad", "autocast", "vmap"])
def test_after_a_block_the_modes_are_those_before_it(pair: Any) -> None:
    before, inside, after = _keys(*pair)
    assert before == after != inside


def test_which_blocks_are_under_the_same_modes() -> None:
    _, first, _, again, _ = _keys(*AUTOCAST, *AUTOCAST)
    assert first == again
    _, bfloat16, _, half = _keys(*AUTOCAST, HALF)
    assert bfloat16 != half
    _, level, _, other, _ = _keys(*VMAP, *VMAP)
    assert level != other  # a functorch level is a new one each time
    _, on, off, _, _ = _keys(AUTOCAST[0], OFF, AUTOCAST[1], AUTOCAST[1])
    assert on != off
    _, no_grad, _, the_same, and_bfloat16 = _keys(*GRAD, GRAD[0], AUTOCAST[0])
    assert no_grad == the_same != and_bfloat16


def test_an_unknown_switch_makes_modes_of_their_own() -> None:
    def switch() -> None: ...

    before, after, again = _keys((switch,), (switch,))
    assert len({before, after, again}) == 3


def test_what_computes_is_no_switch() -> None:
    s = Sketch()
    modes = ModeStack(True)
    for node in (s.input(), s.call(torch.ones, 3), s.note(torch.numel, value=3)):
        assert not modes.is_switch(node)
    assert modes.key == ModeStack(True).key


@pytest.mark.parametrize(("grad", "may"), [(True, True), (None, True), (False, False)])
def test_where_autograd_may_record(grad: bool | None, may: bool) -> None:
    assert grad_may_be_enabled(ModeStack(grad).key) is may
    assert grad_may_be_enabled("not understood")


def test_a_fork_does_not_change_the_modes_it_came_from() -> None:
    modes = ModeStack(True)
    fork = modes.fork()
    assert fork.key == modes.key
    fork.set_grad(False)
    fork.set_autocast("cpu", torch.bfloat16)
    assert fork.key != modes.key == ModeStack(True).key


def test_of_the_modes_a_region_tells_grad_and_autocast_apart() -> None:
    before, vmap, no_grad = _keys(VMAP[0], GRAD[0])
    assert grad_and_autocast(before) == grad_and_autocast(vmap) != grad_and_autocast(no_grad)


def test_which_nodes_switch_a_mode() -> None:
    s = Sketch()
    switches = [s.note(set_grad, True), s.note(enter_autocast, "cpu", None, True, None)]
    switches.append(s.note(exit_autocast, switches[-1]))
    assert all(map(switches_a_mode, switches))
    others = [s.call(torch.exp, s.input()), s.note(torch.is_grad_enabled, value=True)]
    assert not any(map(switches_a_mode, others))
