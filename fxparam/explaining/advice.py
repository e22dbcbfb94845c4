"""Says for each rule how to change code so that it no longer forbids to share."""

from __future__ import annotations

from fxparam.graph.rules import Rule

__all__ = ["change_for"]

_CHANGES = {
    Rule.NOT_ADDITIVE: "Write the parametrization with PyTorch's own ops, without an "
    "autograd.Function of its own; or read the tensor once in a cached() block.",
    Rule.DIFFERENTIATED: "Read the tensor once and keep it in a variable, where second derivatives "
    "may be those of one value.",
    Rule.REDUCED: "Let the parametrization return the dtype of its original, and cast at the use.",
    Rule.ORIGINAL_WRITTEN: "Move the write behind the last read, or in front of the first.",
    Rule.WRITTEN_AROUND: "Move the write out of the compiled function, behind the call.",
    Rule.VALUE_WRITTEN: "Write to a clone: weight = module.weight.clone().",
    Rule.VALUE_ESCAPES: "Return a clone of the value, or do not return it.",
    Rule.MODES_DIFFER: "Put all reads in the same torch.no_grad(), autocast or functorch block, "
    "or read the tensor once in front of it.",
    Rule.RANDOM: "Put the reads in a fxparam.cached() block if one draw may serve them all.",
    Rule.WRITES: "Put the reads in a fxparam.cached() block if the write may happen once for all; "
    "or call eval() where the model does not train.",
    Rule.UNKNOWN: "Declare what the custom op writes (mutates_args=) and give it a fake.",
    Rule.MAY_NOT_RUN: "Read the tensor once in front of the loop or branch.",
    Rule.NO_GRADIENT: "Read the tensor once in front of the branch, where a gradient of zeros is "
    "as good as None.",
    Rule.TOO_LARGE: "Raise max_bytes of the backend, if there is memory for the value.",
    Rule.ONE_USE: "Nothing: there is nothing to share it with.",
}


def change_for(rule: Rule) -> str:
    """Return what to change about code in which a rule forbids sharing."""
    return _CHANGES[rule]
