"""A graph as plain data for people: its operations, and the blocks that fold them.

Operations of one evaluation are a block, operations of one call of a module are another, bodies of
loops and branches are boxes, and blocks that repeat are shown once with the number of times. So a
loop that Dynamo unrolled looks like a loop again.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.bodies import Call, call_of
from fxparam.graph.analysis.nodes import (
    body_of,
    module_path,
    modules_around,
    owner,
    tensors_in,
    value_of,
)

__all__ = ["Block", "Operation", "Picture", "is_own_file", "joined", "picture"]

# A period of blocks is looked for up to this length.
_LONGEST_PERIOD = 24
# More blocks than this on one level are folded once more.
_MOST = 60
_Key = tuple[str, str, str, str]
_OWN = {Path(torch.__file__).parent, Path(__file__).parents[1]}


@dataclass(frozen=True)
class Operation:
    """One node.

    Attributes:
        name: in the graph.
        op: what it calls.
        value: dtype and shape of its result, as ``float32 4 x 4``.
        where: the lines of code that led to it, outermost first, as ``file:line``.
        inputs: indices of operations whose results it takes.
        tensor: the parametrized tensor that it evaluates, if it does.
    """

    name: str
    op: str
    value: str
    where: tuple[str, ...]
    inputs: tuple[int, ...]
    tensor: str = ""


@dataclass(frozen=True)
class Block:
    """Operations that are folded to one.

    Attributes:
        label: what a folded block shows.
        kind: ``evaluation``, ``inputs``, ``module``, ``body``, ``repeat`` or ``part``.
        operations: indices of its own, in graph order.
        blocks: the blocks in it; a block has these or operations.
        tensor: the parametrized tensor that it evaluates, if it does.
        times: how often it repeats.
    """

    label: str
    kind: str
    operations: tuple[int, ...] = ()
    blocks: tuple[Block, ...] = ()
    tensor: str = ""
    times: int = 1


@dataclass(frozen=True)
class Picture:
    """A graph and the bodies in it.

    Attributes:
        operations: nodes of the graph and of its bodies.
        blocks: how they are folded.
    """

    operations: tuple[Operation, ...]
    blocks: tuple[Block, ...]

    @property
    def tensors(self) -> set[str]:
        """The parametrized tensors that are evaluated in it."""
        return {each.tensor for each in self.operations if each.tensor}


def joined(pictures: Sequence[Picture]) -> Picture:
    """Return a graph, and those that are run in front of it for a scope, as one picture.

    Args:
        pictures: of the graph, then of the others.
    """
    operations: list[Operation] = []
    blocks: list[Block] = []
    for i, each in enumerate((*pictures[1:], *pictures[:1])):
        shift = len(operations)
        operations += [
            replace(o, inputs=tuple(n + shift for n in o.inputs)) for o in each.operations
        ]
        moved = tuple(_shifted(block, shift) for block in each.blocks)
        in_front = i < len(pictures) - 1
        blocks += [Block("once in the scope", "body", blocks=moved)] if in_front else moved
    return Picture(tuple(operations), tuple(blocks))


def _shifted(block: Block, shift: int) -> Block:
    return replace(
        block,
        operations=tuple(i + shift for i in block.operations),
        blocks=tuple(_shifted(each, shift) for each in block.blocks),
    )


def picture(gm: GraphModule, *, in_front: Container[str] = ()) -> Picture:
    """Return a graph of Dynamo's as plain data.

    Args:
        gm: the graph.
        in_front: tensors whose evaluations are shown in front of what is around them. A shared
            evaluation stands in the first of the loop's steps, and serves them all.
    """
    painter = _Painter(in_front)
    blocks, _ = painter.blocks_of(gm, {})
    return Picture(tuple(painter.operations), blocks)


class _Painter:
    """Numbers the operations of a graph and its bodies."""

    def __init__(self, in_front: Container[str]) -> None:
        self.operations: list[Operation] = []
        self._in_front = in_front

    def blocks_of(
        self, gm: GraphModule, given: dict[Node, int]
    ) -> tuple[tuple[Block, ...], list[int]]:
        """Return the blocks of a graph, and the operations whose results it returns.

        Args:
            gm: the graph.
            given: for placeholders of a body, the operations whose results they are. They are not
                operations of their own.
        """
        index = dict(given)
        runs: list[tuple[_Key, list[int]]] = []
        evaluations: dict[_Key, list[int]] = {}
        blocks: list[Any] = []
        for node in gm.graph.nodes:
            if node in given or node.op == "output" or body_of(gm, node) is not None:
                continue
            call = call_of(gm, node)
            if call is not None:
                blocks.append(self._body(node, call, index))
                runs = []
                continue
            index[node] = self._add(node, [index[n] for n in node.all_input_nodes if n in index])
            key = _key(node)
            if key[0] == "evaluation" and key in evaluations:
                evaluations[key].append(index[node])
            elif runs and runs[-1][0] == key:
                runs[-1][1].append(index[node])
            else:
                runs.append((key, [index[node]]))
                blocks.append(runs[-1])
                if key[0] == "evaluation":
                    evaluations[key] = runs[-1][1]
        made = [b if isinstance(b, Block) else self._block(*b) for b in blocks]
        # The order of the others stays: sorting is stable.
        made.sort(key=lambda b: 2 - (b.kind == "inputs") * 2 - (b.tensor in self._in_front))
        returned = gm.graph.output_node().all_input_nodes
        return _folded(made), [index[node] for node in returned if node in index]

    def _body(self, node: Node, call: Call, index: dict[Node, int]) -> Block:
        """Return the block of a call that runs bodies."""
        operands = [*call.varying, *call.operands]
        inner: list[Block] = []
        results: list[int] = []
        for body in call.bodies:
            given = {
                placeholder: index[operand]
                for placeholder, operand in zip(body.placeholders, operands, strict=False)
                if isinstance(operand, Node) and operand in index
            }
            blocks, returned = self.blocks_of(body.module, given)
            inner += blocks
            results += returned
        index[node] = self._add(node, results)
        inner.append(Block("results", "part", (index[node],)))
        times = call.iterations
        label = call.op if times in (None, 1) else f"{call.op}, {times} iterations"
        return Block(label, "body", blocks=tuple(inner))

    def _add(self, node: Node, inputs: Sequence[int]) -> int:
        evaluated = owner(node)
        self.operations.append(
            Operation(
                node.name,
                _spelled(node),
                _described(value_of(node)),
                tuple(_lines_of(node)),
                tuple(dict.fromkeys(inputs)),
                evaluated[1] if evaluated is not None and node.op.startswith("call") else "",
            )
        )
        return len(self.operations) - 1

    def _block(self, key: _Key, operations: list[int]) -> Block:
        kind, label, tensor, _ = key
        if not label:
            label = ", ".join(dict.fromkeys(self.operations[i].op for i in operations[:4]))
            label += ", ..." if len(operations) > 4 else ""
        return Block(label, kind, tuple(operations), tensor=tensor)


def _key(node: Node) -> _Key:
    """Return what nodes of one block have in common: kind, label, tensor, line.

    Evaluations are told apart by their access, which is in the label until blocks are folded. Code
    of the outermost function has no label; each line of it is a block.
    """
    if node.op in ("placeholder", "get_attr"):
        return "inputs", "inputs", "", ""
    evaluated = owner(node)
    if evaluated is not None:
        return "evaluation", evaluated[0], evaluated[1], ""
    around = list(modules_around(node).values())
    name = module_path(re.sub(r"^L\['\w+'\]", "", around[-1][0])) if around else ""
    if not name:
        return "module", "", "", next(_lines_of(node), "")
    kind = around[-1][1]
    return "module", f"{name} ({getattr(kind, '__name__', kind)})", "", ""


def _folded(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Return blocks with those that repeat made one, and with few on a level."""
    named = [replace(b, label=b.tensor) if b.kind == "evaluation" else b for b in blocks]
    found, before = _repeats(named), len(named)
    while len(found) < before:  # a loop around a loop
        found, before = _repeats(found), len(found)
    while len(found) > _MOST:
        found = [
            Block(_span(part), "part", blocks=tuple(part)) if len(part) > 1 else part[0]
            for part in (found[i : i + _MOST // 2] for i in range(0, len(found), _MOST // 2))
        ]
    return tuple(found)


def _span(part: Sequence[Block]) -> str:
    return f"{part[0].label} ... {part[-1].label}"


def _repeats(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks in which three or more equal sequences, one after the other, are one block."""
    signatures = [_signature(block) for block in blocks]
    found: list[Block] = []
    i = 0
    while i < len(blocks):
        period, times = _period(signatures, i)
        if times < 3:
            found.append(blocks[i])
            i += 1
            continue
        runs = tuple(
            Block(f"{t + 1} of {times}", "part", blocks=tuple(blocks[i + t * period :][:period]))
            for t in range(times)
        )
        found.append(Block("repeats", "repeat", blocks=runs, times=times))
        i += period * times
    return found


def _signature(block: Block) -> tuple[Any, ...]:
    """Return what blocks have in common that do the same, in a loop or for numbered layers."""
    names = (re.sub(r"\d+", "#", name) for name in (block.kind, block.label, block.tensor))
    return *names, len(block.operations), tuple(map(_signature, block.blocks))


def _period(signatures: Sequence[Any], start: int) -> tuple[int, int]:
    """Return the length and number of the equal sequences at a place that cover the most."""
    best = (1, 1)
    for period in range(1, min(_LONGEST_PERIOD, (len(signatures) - start) // 3) + 1):
        first, times = signatures[start : start + period], 1
        while signatures[start + times * period : start + (times + 1) * period] == first:
            times += 1
        if times >= 3 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _spelled(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return node.op
    name = getattr(node.target, "__name__", None) or str(node.target)
    return name.removesuffix(".default").rpartition(".")[2] if "." in name else name


def _described(value: Any) -> str:
    shapes = (
        f"{str(t.dtype).removeprefix('torch.')} {' x '.join(map(str, t.shape))}".rstrip()
        for t in tensors_in(value)
    )
    return ", ".join(shapes)


def is_own_file(file: str) -> bool:
    """Check whether a file is torch's or this package's."""
    return not _OWN.isdisjoint(Path(file).parents)


def _lines_of(node: Node) -> Iterator[str]:
    """Yield the lines that led to a node, outermost first, without torch's and this package's."""
    trace = node.meta.get("stack_trace") or ""
    for file, line in re.findall(r'File "([^"]+)", line (\d+)', trace):
        if not is_own_file(file):
            yield f"{file}:{line}"
