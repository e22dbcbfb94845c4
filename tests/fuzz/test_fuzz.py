"""The same programs at each run: a slice of what ``make fuzz`` runs."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Iterator

import pytest
import torch

from fxparam.graph.passes import batch
from tests.fuzz import campaign, mutate, themes
from tests.fuzz.generate import generate
from tests.fuzz.judge import Verdict, judge
from tests.fuzz.program import SCOPES, Program, in_scope, render
from tests.fuzz.run import load

_SLICES = 8
_SLICE = 25
# A value left a loop with what may raise; came out of a body after its reader; gave two branches
# gradients of different strides.
_WERE_NOT = (487, 611, 1857)


pytestmark = pytest.mark.filterwarnings("ignore:the value of the parametrized tensor")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are tiny; and the random numbers of other tests are left as they were.

    pytest would format every record of torch's trace log.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.compiler.reset()
    gc.collect()  # values that a program wrote to are said to be lost when they die


@pytest.mark.parametrize("part", range(_SLICES))
def test_programs_give_the_same_as_in_eager(part: int) -> None:
    tally = campaign.Tally()
    for _, judgement, tally in campaign.run(range(part * _SLICE, (part + 1) * _SLICE)):
        if judgement.verdict is Verdict.MISMATCH:
            program = campaign.shrunk(tally.mismatches[-1])
            pytest.fail(f"{judgement.differences}\n\n{render(program)}")
    # Else the programs have become too tame, or too wild for torch.
    assert tally.shared >= tally.run / 3
    assert tally.verdicts[Verdict.SAME] >= tally.run / 2


@pytest.mark.parametrize("scope", SCOPES[1:])
def test_programs_in_a_scope_give_the_same_as_in_eager(scope: str) -> None:
    tally = campaign.Tally()
    for _, judgement, tally in campaign.run(range(_SLICE), scope=scope):
        if judgement.verdict is Verdict.MISMATCH:
            program = campaign.shrunk(tally.mismatches[-1])
            pytest.fail(f"{judgement.differences}\n\n{render(program)}")
    assert tally.verdicts[Verdict.SAME] >= tally.run / 2


def test_programs_of_equal_evaluations_are_as_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    trace = batch.vectorize
    monkeypatch.setattr(batch, "vectorize", lambda *given: batches.append(1) or trace(*given))
    for seed in range(_SLICE):
        program = themes.themed(seed, "alike")
        assert judge(program).verdict is not Verdict.MISMATCH, render(program)
    assert len(batches) >= _SLICE / 4


@pytest.mark.parametrize("seed", (8001, 8025))
def test_programs_in_a_region_that_once_did_not(seed: int) -> None:
    program = in_scope(generate(seed), "region")
    assert judge(program).verdict is not Verdict.MISMATCH


@pytest.mark.parametrize("seed", _WERE_NOT)
def test_programs_that_once_did_not(seed: int) -> None:
    assert judge(generate(seed)).verdict is Verdict.SAME


def test_a_seed_names_one_program() -> None:
    assert render(generate(7)) == render(generate(7))
    assert render(generate(7)) != render(generate(8))


def test_a_script_is_a_module_by_itself() -> None:
    script = load(render(generate(1)))
    assert isinstance(script.build(), torch.nn.Module)


# A search would meet programs that the passes, without a rule, do not finish with.
_NOTICED_RULES = {"1": 12, "2": 5, "3": 1, "4": 26, "5": 29, "6": 1}


def _check_that_it_is_as_eager(program: Program) -> None:
    verdict = judge(program).verdict
    if verdict is Verdict.UNABLE:
        pytest.skip("this torch cannot compile the program by itself")
    assert verdict is Verdict.SAME


@pytest.mark.parametrize("rule", mutate.RULES)
def test_a_rule_switched_off_is_noticed(rule: str) -> None:
    program = generate(_NOTICED_RULES[rule])
    _check_that_it_is_as_eager(program)
    with mutate.without(rule):
        assert judge(program).verdict is Verdict.MISMATCH


@pytest.mark.parametrize(
    ("seed", "predicate"),
    [(190, "1: gradients taken in the graph"), (474, "6: a gradient on every path")],
)
def test_programs_about_gradients_notice(seed: int, predicate: str) -> None:
    program = generate(seed)
    _check_that_it_is_as_eager(program)
    with mutate.without(predicate):
        assert judge(program).verdict is Verdict.MISMATCH


# The first seeds that notice without long compilations.
_NOTICED = [
    (48, "1: readers in reduced precision"),
    (48, "narrow: in one graph"),
    (48, "narrow: in a body"),
    (2644, "sizes: that data decide"),
    (128, "regions: operands that share memory"),
    (324, "recurrent: an original written between"),
    (20, "overwritten: what is read or drawn is saved"),
    (16, "switch: a branch that may not run"),
]


@pytest.mark.parametrize(("seed", "fix"), _NOTICED)
def test_programs_about_a_theme_notice(seed: int, fix: str) -> None:
    theme = mutate.THEMES[fix]
    if not themes.is_on(theme):
        pytest.skip("this torch has nothing of the kind")
    program = generate(seed)
    assert program.theme == theme
    _check_that_it_is_as_eager(program)
    with mutate.without(fix):
        assert judge(program).verdict is Verdict.MISMATCH


@pytest.mark.parametrize(
    ("program", "predicate"),
    [
        (themes.themed(4, "held"), "held: a tensor written"),
        (generate(135), "held: other objects"),
        (themes.themed(34, "held"), "held while tracing: something written"),
        (themes.themed(109, "held"), "held while tracing: other modes"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_value_that_is_held_too_long_is_noticed(program: Program, predicate: str) -> None:
    program = in_scope(program, mutate.SCOPES[predicate])
    _check_that_it_is_as_eager(program)
    with mutate.without(predicate):
        assert judge(program).verdict is Verdict.MISMATCH


def test_seeds_of_a_theme() -> None:
    for theme in filter(themes.is_on, themes.IN_TURN):
        seeds = itertools.islice(themes.seeds_of(theme, start=1000), 3)
        assert {generate(seed).theme for seed in seeds} == {theme}


@pytest.mark.parametrize("predicate", (*mutate.PREDICATES, *mutate.FIXES, *mutate.HELD))
def test_a_predicate_that_is_switched_off_exists(predicate: str) -> None:
    with mutate.without(predicate):
        pass
