"""The passes: graph in, graph or facts out. Nothing here knows which capture made a graph."""

from fxparam.graph.analysis.effect_table import Effects, EffectTable
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.evaluations import Evaluation, evaluations
from fxparam.graph.passes.hoist import HoistResult, hoist
from fxparam.graph.report import Entry, Refusal, Report
from fxparam.graph.rules import Rule, refusal
from fxparam.graph.torch_bugs.memory_of_results import show_what_bodies_pass_on
from fxparam.graph.torch_bugs.recomputed_values import save_what_may_change

__all__ = [
    "EffectTable",
    "Effects",
    "Entry",
    "Evaluation",
    "HoistResult",
    "Refusal",
    "Report",
    "Rule",
    "analyze",
    "evaluations",
    "hoist",
    "refusal",
    "save_what_may_change",
    "show_what_bodies_pass_on",
]
