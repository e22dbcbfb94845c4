"""A program as plain data, and the script that it is.

The script is what runs, in eager and compiled, and what a failure is reported as. It can be run by
itself from the repository: ``PYTHONPATH=. python script.py``.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from tests.fuzz import pieces


@dataclass(frozen=True)
class Line:
    """A statement of one or several lines."""

    kind: str
    text: str


@dataclass(frozen=True)
class Block:
    """Statements under a heading; without a heading they are not indented.

    Attributes:
        last: the last line under the heading.
        closing: what follows.
    """

    kind: str
    heading: str
    body: tuple[Statement, ...]
    last: str = ""
    closing: str = ""


Statement = Line | Block


@dataclass(frozen=True)
class Link:
    """One parametrization of a chain.

    Attributes:
        seed: makes the values of its own tensors.
        of: the holder whose tensor it reads.
    """

    kind: str
    seed: int
    of: str = ""


@dataclass(frozen=True)
class Holder:
    """A module with one parametrized tensor, ``weight``, or a recurrent layer with several.

    Attributes:
        stored: "parameter" or "buffer".
        api: who registers: "torch", "fxparam", or "property" for a computed weight.
        layer: the recurrent layer of PyTorch that the module is, if it is one.
        seed: of the original's values; equal seeds are equal, distinct tensors. Negative: zeros.
        tied_to: the holder whose original this one uses.
        same_as: the holder that this one is.
    """

    name: str
    stored: str = "parameter"
    api: str = "torch"
    chain: tuple[Link, ...] = ()
    seed: int = 0
    tied_to: str = ""
    same_as: str = ""
    layer: str = ""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parametrized tensors, as attributes of the holder."""
        if not self.layer:
            return ("weight",)
        ending = "" if self.layer.endswith("Cell") else "_l0"
        return tuple(f"layer.weight_{which}{ending}" for which in ("hh", "ih"))

    @property
    def originals(self) -> tuple[str, ...]:
        """As attributes of the holder."""
        if self.api == "property":
            return ("raw",)
        if self.layer:
            names = (tensor.removeprefix("layer.") for tensor in self.tensors)
            return tuple(f"layer.parametrizations.{name}.original" for name in names)
        if not self.chain:
            return ("weight",)
        many = self.chain[0].kind in ("Product", "weight_norm")
        names = ("original0", "original1") if many else ("original",)
        return tuple(f"parametrizations.weight.{name}" for name in names)


#: Parametrizations that write, or draw random numbers.
IMPURE = {"DropoutMask", "Counter", "Iterated", "spectral_norm", "Normalized", "WorksInPlace"}

#: By a graph; by two calls in an eager ``cached()`` region; by a call; by calls without gradients;
#: by two micro-batches.
SCOPES = ("", "region", "call", "frozen", "step")


@dataclass(frozen=True)
class Program:
    """A model, how it is run, and on what.

    Attributes:
        seed: it was generated from.
        training: the modules' mode.
        grad: with gradients, or all under ``no_grad``.
        caller_writes: whether the caller writes to the returned tensors before backward.
        scope: how long a value is shared, one of ``SCOPES``.
        theme: what it is about, if it is no general program.
        capture: how fxparam captures it: "compile", "trace" or "trace by Dynamo".
        flags: those of Dynamo's that are on.
        tolerance: how far numbers may differ, relative to the largest; None: as the dtypes say.
        budget: of the memory that forward keeps for backward, the part that it may keep.
        between: who writes to buffers between forward and backward: "eager code", "a graph",
            or "data" for eager code that writes to ``tensor.data``.
    """

    seed: int
    size: int
    dtype: str
    inner: str
    training: bool
    grad: bool
    caller_writes: bool
    holders: tuple[Holder, ...]
    statements: tuple[Statement, ...]
    scope: str = ""
    theme: str = ""
    capture: str = "compile"
    flags: tuple[str, ...] = ()
    tolerance: float | None = None
    budget: float = 1.0
    between: str = ""


def walk(statements: tuple[Statement, ...]) -> Iterator[Statement]:
    """Every statement, at every depth."""
    for statement in statements:
        yield statement
        if isinstance(statement, Block):
            yield from walk(statement.body)


def ingredients(program: Program) -> set[str]:
    """What the program is made of, to be counted."""
    found = {s.kind for s in walk(program.statements)}
    for holder in program.holders:
        found |= {link.kind for link in holder.chain}
        found |= {f"on a {holder.stored}", f"api: {holder.api}"}
        found |= {what for what in ("tied_to", "same_as") if getattr(holder, what)}
    if len({h.seed for h in program.holders}) < len(program.holders):
        found.add("equal originals")
    found |= {program.dtype, f"inner: {program.inner}"}
    found |= {"training"} if program.training else {"evaluation"}
    found |= {h.layer for h in program.holders if h.layer}
    found |= {f"theme: {program.theme or 'none'}", f"capture: {program.capture}"}
    found |= {f"flag: {flag}" for flag in program.flags}
    found |= {"memory budget"} if program.budget < 1 else set()
    found |= {f"written between by {program.between}"} if program.between else set()
    return found | {what for what in ("grad", "caller_writes") if getattr(program, what)}


_HEAD = '''\
"""Program {seed} of tests/fuzz. From the repository: PYTHONPATH=. python {seed}.py"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import fxparam
from tests.fuzz.pieces import amplified, cond, map_rows, region, scan, squash, switch, while_loop

SIZE, DTYPE = {size}, torch.{dtype}
INNER, GRAD, CALLER_WRITES = "{inner}", {grad}, {caller_writes}
AUTOCAST, SCOPE, EFFECTS = {autocast}, "{scope}", {effects}
CAPTURE, FLAGS, TOLERANCE = "{capture}", {flags}, {tolerance}
BUDGET, BETWEEN = {budget}, "{between}"


def values(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(max(seed, 0))
    drawn = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return (0.7 * drawn).to(DTYPE) if seed >= 0 else torch.zeros(SIZE, SIZE, dtype=DTYPE)
'''

_TAIL = """

def build() -> nn.Module:
    torch.manual_seed({seed})
    return Model().train({training})


if __name__ == "__main__":
    from tests.fuzz.judge import explain

    explain(__file__)
"""


def in_scope(program: Program, scope: str) -> Program:
    """The program in a scope; as it is if it is traced, since a trace has none."""
    return replace(program, scope=scope) if program.capture == "compile" else program


def render(program: Program) -> str:
    """The script."""
    used = {link.kind for holder in program.holders for link in holder.chain}
    used |= {_module(holder) for holder in program.holders}
    used |= {base.__name__ for name in used for base in getattr(pieces, name, object).__mro__}
    parts = [
        _HEAD.format(
            **vars(program),
            autocast="autocast" in ingredients(program),
            effects=not used.isdisjoint({*IMPURE, "Overwritten"}),
        )
    ]
    for name, piece in dict(vars(pieces)).items():  # Dynamo takes globals of its own out again
        if name in used:
            parts.append(inspect.getsource(piece))
    init = [line for holder in program.holders for line in _construction(holder)]
    init.append("self.free = nn.Parameter(values(99))")
    body = "\n".join(["h = x", "out = []", *map(_render, program.statements), "return (h, *out)"])
    model = [
        "class Model(nn.Module):",
        "    def __init__(self) -> None:",
        _in(2, "super().__init__()"),
    ]
    model += [_in(2, line) for line in init]
    model += ["", "    def forward(self, x: Tensor) -> tuple[Tensor, ...]:", _in(2, body), ""]
    parts.append("\n".join(model))
    return "\n\n".join(part.strip("\n") + "\n" for part in parts) + _TAIL.format(**vars(program))


def _in(depth: int, text: str) -> str:
    return textwrap.indent(text, "    " * depth)


def _render(statement: Statement) -> str:
    if isinstance(statement, Line):
        return statement.text
    body = [_render(s) for s in statement.body] + [statement.last] * bool(statement.last)
    inner = "\n".join(body) or "pass"
    parts = [statement.heading, _in(1, inner)] if statement.heading else [inner]
    return "\n".join(parts + [statement.closing] * bool(statement.closing))


def _construction(holder: Holder) -> Iterator[str]:
    me = f"self.{holder.name}"
    if holder.same_as:
        yield f"{me} = self.{holder.same_as}"
        return
    made = f'values({holder.seed}), "{holder.stored}"'
    if holder.api == "property":
        links = "".join(f", {_link(link)}" for link in holder.chain)
        yield f"{me} = Computed({made}{links})"
    else:
        made = f'"{holder.layer}", values({holder.seed})' if holder.layer else made
        yield f"{me} = {_module(holder)}({made})"
        for tensor in holder.tensors:
            for link in holder.chain:
                yield _registration(holder, tensor, link)
    if holder.tied_to:
        yield f"{me}.{holder.originals[0]} = self.{holder.tied_to}"


def _module(holder: Holder) -> str:
    if holder.layer:
        return "Recurrent"
    return "Computed" if holder.api == "property" else "Cell"


_OF_TORCH = {
    "orthogonal": 'parametrizations.orthogonal({me}, orthogonal_map="matrix_exp")',
    "cayley": 'parametrizations.orthogonal({me}, orthogonal_map="cayley")',
    "weight_norm": "parametrizations.weight_norm({me})",
    "spectral_norm": "parametrizations.spectral_norm({me})",
}


def _registration(holder: Holder, tensor: str, link: Link) -> str:
    *path, name = f"self.{holder.name}.{tensor}".split(".")
    me = ".".join(path)
    if link.kind in _OF_TORCH:
        return _OF_TORCH[link.kind].format(me=me)
    register = (
        "fxparam.register_parametrization"
        if holder.api == "fxparam"
        else "register_parametrization"
    )
    unsafe = ", unsafe=True" if link.kind in pieces.CHANGES_THE_DTYPE else ""
    return f'{register}({me}, "{name}", {_link(link)}{unsafe})'


def _link(link: Link) -> str:
    if link.of:
        return f"{link.kind}(self.{link.of})"
    made = getattr(pieces, link.kind).__init__
    takes_values = made is not nn.Module.__init__ and link.kind != "Counter"
    return f"{link.kind}({f'values({link.seed})' if takes_values else ''})"
