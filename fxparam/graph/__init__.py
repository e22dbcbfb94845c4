"""The passes: graph in, graph or facts out. Nothing here knows which capture made a graph."""

from fxparam.graph.analysis.effect_table import Effects, EffectTable
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.evaluations import Evaluation, evaluations
from fxparam.graph.passes.hoist import HoistResult, hoist
from fxparam.graph.report import Entry, Refusal, Report
from fxparam.graph.rules import Rule, refusal
from fxparam.graph.torch_bugs.memory_of_results import show_what_bodies_pass_on
from fxparam.graph.torch_bugs.overwritten_inputs import save_reads_of_overwritten_inputs

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
    "save_reads_of_overwritten_inputs",
    "show_what_bodies_pass_on",
]
