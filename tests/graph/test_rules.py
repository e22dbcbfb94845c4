"""The six rules: numbered, listed at the head of their file, each with predicates that ask it."""

from __future__ import annotations

import pickle
import re

from fxparam.graph import Rule, rules
from tests.fuzz.mutate import PREDICATES


def _predicates_by_rule() -> dict[int, set[str]]:
    """The predicates that the head of the file names, by the number of their rule."""
    sections = re.split(r"^(\d)\. ", rules.__doc__ or "", flags=re.MULTILINE)[1:]
    texts = dict(zip(map(int, sections[::2]), sections[1::2], strict=True))
    texts[6] = texts[6].partition("\n\n")[0]
    return {n: set(re.findall(r"``([a-z_]+)``", text)) for n, text in texts.items()}


def test_the_head_of_the_file_lists_six_rules_with_their_predicates() -> None:
    named = _predicates_by_rule()
    assert sorted(named) == [1, 2, 3, 4, 5, 6]
    assert all(callable(getattr(rules, name)) for names in named.values() for name in names)


def test_each_predicate_of_the_file_is_named_under_one_rule_or_asks_what_is_worthwhile() -> None:
    listed = [name for names in _predicates_by_rule().values() for name in names]
    written = {
        name
        for name, value in vars(rules).items()
        if callable(value) and getattr(value, "__module__", "") == rules.__name__
    }
    assert len(listed) == len(set(listed))
    assert written - set(listed) == {"Rule", "refusal", "obstacle", "is_too_large"}


def test_the_fuzzer_switches_each_predicate_off_under_the_number_it_has_here() -> None:
    listed = {(n, name) for n, names in _predicates_by_rule().items() for name in names}
    switched = {(int(key[0]), name) for key, (name, _, _) in PREDICATES.items()}
    numbering = {(1, "literal_key"), (1, "_key")}
    # A program of the fuzzer computes in float64, where no gradient is summed in less.
    reduced = {(1, "is_its_gradient_summed_in_reduced_precision")}
    assert switched - numbering == listed - reduced


def test_a_refusal_says_its_rule_and_why() -> None:
    assert {rule.number for rule in Rule} == {1, 2, 3, 4, 5, 6, None}
    assert str(Rule.WRITES) == "rule 5, the evaluation writes in place"
    assert str(Rule.TOO_LARGE) == "not worthwhile, the value has more than max_bytes bytes"
    assert pickle.loads(pickle.dumps(Rule.WRITES)) is Rule.WRITES
