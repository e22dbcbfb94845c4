"""From a seed to a program: statements that only programs about a theme have.

``narrow``         many readers of a value in fewer bits than its original
``sizes``          sizes and numbers that data decide
``regions``        one region, called many times
``switch``         several branches
``recurrent``      layers of PyTorch that loop by themselves
"""

from __future__ import annotations

from tests.fuzz.grammar import Writer, of_a_theme
from tests.fuzz.program import Block, Line, Statement

# How many readers there are, and how large a gradient of each: float16 has no number above 65504,
# and in bfloat16 a sum of many terms has 8 bits.
_READERS = (12, 16, 20)
_SCALES = {"float16": (2048, 8192, 32768), "bfloat16": (1, 16)}
_OF_LINK = {"ToHalf": "float16", "ToBrain": "bfloat16", "Rounded": "float16"}


def _reading(w: Writer) -> tuple[str, str, str]:
    """How the holder ``narrow`` is read in reduced precision: the dtype, the value, a heading."""
    own = [_OF_LINK[link.kind] for link in w.apart["narrow"].chain if link.kind in _OF_LINK]
    rounded = any(link.kind == "Rounded" for link in w.apart["narrow"].chain)
    value = "self.narrow.weight"
    if own and not rounded:
        return own[0], value, ""
    dtype = own[0] if own else w.rng.choice(list(_SCALES))
    if rounded:
        return dtype, value, ""
    if w.rng.random() < 0.5:
        return dtype, f"{value}.to(torch.{dtype})", ""
    return dtype, value, f'with torch.autocast("cpu", torch.{dtype}):'


def _product(w: Writer, dtype: str, value: str, row: str) -> str:
    cast = "" if any(link.kind == "Rounded" for link in w.apart["narrow"].chain) else dtype
    left = f"{row}.to(torch.{cast})" if cast else row
    form = w.rng.choice(["({} @ {})", "({} * {})", "torch.nn.functional.linear({}, {})"])
    return form.format(left, value) + ".float().sum()"


@of_a_theme("narrow reads", in_body=True)
def _narrow_reads(w: Writer, kind: str) -> Statement:
    """Many readers in one graph, or in one body."""
    dtype, value, heading = _reading(w)
    total, scale = w.name("total"), w.rng.choice(_SCALES[dtype])
    term = _product(w, dtype, value, "((1 + 0.03 * k) * h.detach())")
    loop = f"for k in range({w.rng.choice(_READERS)}):\n    {total} = {total} + {term}"
    if heading:
        loop = heading + "\n    " + loop.replace("\n", "\n    ")
    begin = f"{total} = h.new_zeros(())\n"
    return Line(kind, f"{begin}{loop}\nh = h + amplified({total}, {scale}.0)")


@of_a_theme("narrow body", block=True)
def _narrow_body(w: Writer, kind: str) -> Statement:
    """Many readers in a body that is run twice."""
    f = w.name("segment")
    call = f"checkpoint({f}, {{}}, use_reentrant=False)"
    if w.inner != "eager" and w.rng.random() < 0.5:
        call = f"region({f}, {{}})"
    reads = _narrow_reads(w, "narrow reads")
    again = call.format(call.format("h"))
    return Block(kind, f"def {f}(h):", (reads,), "return h + 0", f"h = {again}")


@of_a_theme("narrow scan", block=True)
def _narrow_scan(w: Writer, kind: str) -> Statement:
    """One reader in each of many steps of a loop."""
    dtype, value, heading = _reading(w)
    f, total, scale = w.name("step"), w.name("total"), w.rng.choice(_SCALES[dtype])
    rows = f"[(1 + 0.03 * k) * h.detach() for k in range({w.rng.choice(_READERS)})]"
    term = _product(w, dtype, value, "x")
    term = f"{heading}\n    term = {term}" if heading else f"term = {term}"
    zero = "h.sum() * 0"  # a carry that asks for a gradient (torch-bugs.md)
    if w.rng.random() < 0.7:
        body, last = f"{term}\nc = c + term", "return c + 0, c.sum()"
        call = f"{total}, _ = scan({f}, {zero}, torch.stack({rows}))"
        opening = f"def {f}(c, x):"
    else:
        body, last = term, "return term + 0"
        call = f"{total} = map_rows({f}, torch.stack({rows})).sum()"
        opening = f"def {f}(x):"
    call += f"\nh = h + amplified({total}, {scale}.0)"
    return Block(kind, opening, (Line("narrow scan", body),), last, call)


@of_a_theme("write to the narrow original")
def _write_narrow(w: Writer, kind: str) -> Statement:
    original = w.original(w.apart["narrow"])
    return Line(kind, f"with torch.no_grad():\n    {original}.mul_(0.9)")


_SELECTIONS = (
    "{0}[{0} > 0]",
    "torch.masked_select({0}, {0} > 0)",
    "{0}.flatten()[torch.nonzero({0}.flatten() > 0)[:, 0]]",
    "{0} + ({0} > 0).sum().item()",
    "torch.unique({0}.detach().round())",
    "torch.bincount({0}.detach().abs().long().flatten()).to({0}.dtype)",
    "torch.nonzero({0}.detach() > 0)",
    "torch.where({0}.detach() > 0)[0]",
)


@of_a_theme("sizes that data decide")
def _select(w: Writer, kind: str) -> Statement:
    """The same selection twice or thrice; what becomes of each tells which may be one."""
    form = w.rng.choice(_SELECTIONS)
    value = f"self.{w.holder().name}.weight"
    other = w.read() if w.rng.random() < 0.2 else value
    names = [w.name("s") for _ in range(w.rng.choice([2, 2, 3]))]
    lines = [f"{name} = {form.format(other if k == 1 else value)}" for k, name in enumerate(names)]
    if w.rng.random() < 0.25:
        lines.insert(1, f"with torch.no_grad():\n    {w.original()}.mul_(0.9)")
    for name in w.rng.sample(names, w.rng.choice([0, 1, 1])):
        lines.append(f"{name}.mul_(2)")
    for name in w.rng.sample(names, w.rng.choice([0, 1, 2])):
        lines.append(f"out.append({name})")
    lines += [f"h = h + 0.1 * {name}.sum()" for name in names]
    return Line(kind, "\n".join(lines))


@of_a_theme("region of many calls", in_body=True, block=True)
def _regions(w: Writer, kind: str) -> Statement:
    """One function as a region: called in a row, in a loop, around other statements."""
    f = w.name("segment")
    given = ""
    body = w.nested(body=True)
    opening = f"def {f}(h):"
    if w.rng.random() < 0.4:
        value = w.name("w")
        opening, given = f"def {f}(h, {value}):", value
        body = (Line("region", f"h = squash(h @ {value})"), *body)
    parts: list[Statement] = [Block("region", opening, body, "return h + 0")]
    for _ in range(w.rng.choice([2, 3])):
        operand = f", self.{w.holder().name}.weight" if given else ""
        form = w.rng.choice(
            [
                "h = {}",
                "h = h + {}",
                "for _ in range(2):\n    h = {}",
                "for _ in range(3):\n    h = squash(h + {})",
            ]
        )
        parts.append(Line("region", form.format(f"region({f}, h{operand})")))
        if w.rng.random() < 0.5:
            parts += w.nested(body=False)
    return Block(kind, "", tuple(parts))


@of_a_theme("switch", in_body=True, block=True)
def _switch(w: Writer, kind: str) -> Statement:
    """One of several branches; an index outside of them is that of the nearest."""
    names = [w.name("case") for _ in range(w.rng.choice([2, 3, 4]))]
    which = w.rng.choice(
        [
            "(h.abs().sum() > 1).long()",
            "torch.tensor(1)",
            f"torch.tensor({len(names) + 1})",
            "(10 * h.abs().sum()).long()",
            "(h.real.sum() > 0).long() * 2 - 1",
        ]
    )
    branches = [Block("branch", f"def {n}(h):", w.nested(body=True), "return h + 0") for n in names]
    call = f"h = switch({which}, [{', '.join(names)}], h)"
    if w.singular:
        broken = Line("singular", "h = squash(h @ self.singular.weight)")
        branches.append(Block("branch", "def never(h):", (broken,), "return h + 0"))
        # Twice, as a value used once would stay where it is.
        call = f"h = switch(torch.tensor(0), [{names[0]}, never], h)\n" * 2 + call
    return Block(kind, "", tuple(branches), closing=call)


@of_a_theme("recurrent layer", in_body=True)
def _recurrent(w: Writer, kind: str) -> Statement:
    form = w.rng.choice(
        [
            "h = self.recurrent(h)",
            "h = self.recurrent(self.recurrent(h))",
            "for _ in range(3):\n    h = self.recurrent(h)",
            "h = h + self.recurrent(2 * h)",
        ]
    )
    return Line(kind, form)


@of_a_theme("read a recurrent weight", in_body=True)
def _read_recurrent(w: Writer, kind: str) -> Statement:
    tensor = w.rng.choice(w.apart["recurrent"].tensors)
    return Line(kind, f"h = h + 0.1 * self.recurrent.{tensor}[: SIZE]")


@of_a_theme("write to a recurrent original")
def _write_recurrent(w: Writer, kind: str) -> Statement:
    original = w.original(w.apart["recurrent"])
    return Line(kind, f"with torch.no_grad():\n    {original}.mul_(0.9)")
