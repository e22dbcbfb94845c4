"""The passes: graph in, graph or facts out. Nothing here knows which capture made a graph."""

from fxparam.graph.effects import Effects, EffectTable, analyze
from fxparam.graph.evaluations import Evaluation, evaluations
from fxparam.graph.hoist import HoistResult, hoist
from fxparam.graph.legality import Rule, refusal
from fxparam.graph.report import Entry, Report

__all__ = [
    "EffectTable",
    "Effects",
    "Entry",
    "Evaluation",
    "HoistResult",
    "Report",
    "Rule",
    "analyze",
    "evaluations",
    "hoist",
    "refusal",
]
