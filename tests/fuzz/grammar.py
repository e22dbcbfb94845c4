"""From a seed to a program: its statements.

Accesses are many and mostly of one holder, so that there is something to share; what forbids
sharing (writes, modes, escapes, hooks) stands between them often.

The flow is the variable ``h``, a matrix; what a program shows besides goes to ``out``. A statement
says where it may stand: bodies of higher-order ops may write and show nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from random import Random

from tests.fuzz.program import IMPURE, Block, Holder, Line, Statement

#: Holders that only statements of their own read.
APART = ("singular", "narrow", "recurrent")
# Statements that are one to torch, in what it can and cannot do.
_LOOPS = {"scan", "map", "narrow scan"}
_REGIONS = {"region", "region of many calls"}
_BRANCHES = {"cond", "switch"}
HIGHER_ORDER = {*_LOOPS, *_REGIONS, *_BRANCHES, "while_loop"}


# The second changes nothing where autocast is off.
_AUTOCAST = ("torch.bfloat16", "torch.bfloat16", "enabled=False")


class Writer:
    """Writes one program's statements."""

    def __init__(
        self,
        rng: Random,
        holders: tuple[Holder, ...],
        *,
        dtype: str,
        grad: bool,
        inner: str,
        weights: Mapping[str, int] | None = None,
        allows: Callable[[str], bool] = lambda kind: True,
        most: Mapping[str, int] | None = None,
    ) -> None:
        """Args:
        weights: how often the statements of a theme are written.
        allows: says of each other kind of statement whether it may be written.
        most: how many statements of a kind there may be.
        """
        self.rng, self.dtype, self.grad, self.inner = rng, dtype, grad, inner
        self.holders = tuple(h for h in holders if h.name not in APART)
        self.apart = {h.name: h for h in holders if h.name in APART}
        self.singular = "singular" in self.apart
        self.weights, self.allows, self.most = weights or {}, allows, most or {}
        self.written: Counter[str] = Counter()
        self.pure = [h for h in self.holders if not self._is_impure(h)]
        self.solves = any(link.kind == "cayley" for h in holders for link in h.chain)
        self.names: list[str] = []  # variables that hold a value, in scope
        self.in_body = False
        self.in_checkpoint = False
        self.depth = 0
        self.fresh = 0

    def _is_impure(self, holder: Holder) -> bool:
        if holder.same_as:
            return any(self._is_impure(h) for h in self.holders if h.name == holder.same_as)
        read = [h for link in holder.chain for h in self.holders if h.name == link.of]
        own = {link.kind for link in holder.chain}
        return bool(IMPURE & own) or any(map(self._is_impure, read))

    def program(self) -> tuple[Statement, ...]:
        return self._statements(self.rng.randint(3, 7))

    def _statements(self, count: int) -> tuple[Statement, ...]:
        return tuple(self._statement() for _ in range(count))

    def _statement(self) -> Statement:
        table = _IN_BODY if self.in_body else _ANYWHERE
        table = {kind: weight for kind, weight in table.items() if self.allows(kind)}
        table = {**table, **{k: w for k, w in self.weights.items() if self.may_stand_here(k)}}
        if self.depth >= 2:
            table = {kind: weight for kind, weight in table.items() if kind not in _BLOCKS}
        barred = self._barred()
        table = {kind: weight for kind, weight in table.items() if kind not in barred}
        if self.singular and self.rng.random() < 0.2:  # what may not run, in a body that doesn't
            table = {k: w for k, w in table.items() if k in ("cond", "while_loop")} or table
        kind = self.rng.choices(list(table), list(table.values()))[0]
        self.written[kind] += 1
        return _WRITE[kind](self, kind)

    def may_stand_here(self, kind: str) -> bool:
        """Check whether a statement of a theme may stand here; some show a result."""
        return not self.in_body or kind in _STAND_IN_BODIES

    def _barred(self) -> set[str]:
        """What torch cannot do here, whoever compiles."""
        barred = {kind for kind, most in self.most.items() if self.written[kind] >= most}
        barred |= {"while_loop"} if self.grad else set()
        if self.in_checkpoint or (self.grad and self.inner == "eager") or not self.pure:
            barred |= HIGHER_ORDER
        if self.in_body and self.grad:  # nested, these take seconds to differentiate
            barred |= {*_LOOPS, *_REGIONS, *_BRANCHES}
        if self.dtype == "complex64" and self.grad:
            barred |= _LOOPS
        if self.solves and self.grad:
            # Its check for singular matrices is an effect: torch 2.13 cannot train a `cond` with
            # one, and loses the gradient of a region with one.
            barred |= {*_REGIONS, *_BRANCHES}
        return barred

    def name(self, stem: str) -> str:
        self.fresh += 1
        return f"{stem}{self.fresh}"

    def nested(self, *, body: bool, checkpoint: bool = False) -> tuple[Statement, ...]:
        """The statements of a block; what they bind is not seen outside."""
        outer = self.names[:], self.in_body, self.in_checkpoint
        self.in_body = self.in_body or body
        self.in_checkpoint = self.in_checkpoint or checkpoint
        if body and self.rng.random() < 0.8:
            # Bodies that take two tensors on the same memory are more than torch can do.
            self.names = []
        self.depth += 1
        made = self._statements(self.rng.choice([1, 2] if body else [1, 2, 2, 3]))
        self.depth -= 1
        self.names, self.in_body, self.in_checkpoint = outer
        return made

    def holder(self) -> Holder:
        candidates = list(self.holders)
        if self.in_body and self.rng.random() < 0.95:
            candidates = self.pure or candidates
        return candidates[0] if self.rng.random() < 0.65 else self.rng.choice(candidates)

    def read(self) -> str:
        """An expression: an access, or a variable that holds one."""
        if self.names and self.rng.random() < 0.25:
            return self.rng.choice(self.names)
        return f"self.{self.holder().name}.weight"

    def original(self, holder: Holder | None = None) -> str:
        holder = holder or self.holder()
        return f"self.{holder.name}.{self.rng.choice(holder.originals)}"


Maker = Callable[[Writer, str], Statement]
_WRITE: dict[str, Maker] = {}
_ANYWHERE: dict[str, int] = {}
_IN_BODY: dict[str, int] = {}
_BLOCKS: set[str] = set()
_STAND_IN_BODIES: set[str] = set()


def of_a_theme(
    name: str, *, in_body: bool = False, block: bool = False
) -> Callable[[Maker], Maker]:
    """Register how to write a kind of statement that only programs about a theme have."""

    def register(make: Maker) -> Maker:
        _WRITE[name] = make
        _STAND_IN_BODIES.update({name} if in_body else ())
        _BLOCKS.update({name} if block else ())
        return make

    return register


def _kind(
    *names: str, weight: int, in_body: int = 0, block: bool = False
) -> Callable[[Maker], Maker]:
    """Register how to write a kind of statement, and how often."""

    def register(make: Maker) -> Maker:
        for name in names:
            _WRITE[name], _ANYWHERE[name], _IN_BODY[name] = make, weight, in_body
            _BLOCKS.update({name} if block else ())
        return make

    return register


@_kind("use", weight=40, in_body=40)
def _use(w: Writer, kind: str) -> Statement:
    form = w.rng.choice(
        [
            *["h = squash(h @ {})"] * 4,
            "h = h + 0.5 * {}",
            "h = squash({} @ h)",
            "h = h + 0.5 * {}.detach()",
            "h = squash(h @ {}.mT)",
            "h = h + {}.reshape(-1)[:2].sum()",
            "h = squash(nn.functional.linear(h, {}))",
        ]
    )
    return Line(kind, form.format(w.read()))


@_kind("call", weight=8, in_body=8)
def _call(w: Writer, kind: str) -> Statement:
    return Line(kind, f"h = self.{w.holder().name}(h)")


@_kind("vmap", weight=2, in_body=1)
def _vmap(w: Writer, kind: str) -> Statement:
    return Line(kind, f"h = squash(torch.vmap(lambda row: row @ {w.read()})(h))")


@_kind("read original", weight=2, in_body=1)
def _read_original(w: Writer, kind: str) -> Statement:
    return Line(kind, f"h = h + 0.1 * {w.original()}")


@_kind("show", weight=6)
def _show(w: Writer, kind: str) -> Statement:
    form = w.rng.choice(["{}", "{}", "{}.reshape(-1)", "{}.detach()", "{}.sum()"])
    return Line(kind, f"out.append({form.format(w.read())})")


@_kind("literal", weight=4)
def _literal(w: Writer, kind: str) -> Statement:
    """The same but for the type or the sign of a literal, twice.

    AOTAutograd's own CSE merges 0.0 and -0.0.
    """
    value = f"self.{w.holder().name}.weight.detach()"
    if w.dtype == "complex64":
        value += ".real"
    division = [f"torch.sign({value} / {zero})" for zero in ("0.0", "-0.0")]
    types = [f"({value} > 0) * {one}" for one in ("1", "1.0", "True")]
    first, second = w.rng.sample(
        w.rng.choice([division, types] if w.inner == "eager" else [types]), 2
    )
    return Line(kind, f"out += [{first}, {second}]")


@_kind("bind", weight=8, in_body=4)
def _bind(w: Writer, kind: str) -> Statement:
    form = w.rng.choice(["{}", "{}", "{}", "{}.detach()", "{}.mT"])
    text = form.format(f"self.{w.holder().name}.weight")
    name = w.name("w")
    w.names.append(name)
    return Line(kind, f"{name} = {text}")


@_kind("bind without gradient", weight=3, in_body=3)
def _bind_without_gradient(w: Writer, kind: str) -> Statement:
    """Evaluated under another mode than it is used under."""
    text = f"self.{w.holder().name}.weight"
    name = w.name("w")
    w.names.append(name)
    return Line(kind, f"with torch.no_grad():\n    {name} = {text}")


@_kind("write to the value", weight=5, in_body=2)
def _write_value(w: Writer, kind: str) -> Statement:
    form = w.rng.choice(
        ["{}.mul_(1.5)", "{}[0] = 0.25", "{}.diagonal().add_(0.5)", "{}.transpose_(0, 1)"]
    )
    if w.names and w.rng.random() < 0.5:
        return Line(kind, form.format(w.rng.choice(w.names)))
    name = w.name("w")
    w.names.append(name)
    bound = f"{name} = self.{w.holder().name}.weight\n"
    return Line(kind, bound + form.format(name))


@_kind("write to an original", weight=8)
def _write_original(w: Writer, kind: str) -> Statement:
    holder = w.holder()
    form = w.rng.choice(
        [
            "{}.mul_(0.9)",
            "{}.detach().add_(0.1)",
            "{}[0].add_(0.5)",
            "{}.mT[1].mul_(0.5)",
            "{}[0] = 0.25",
            "{}.copy_(h.detach())" if len(holder.originals) == 1 else "{}.mul_(0.8)",
        ]
    )
    return Line(kind, "with torch.no_grad():\n    " + form.format(w.original(holder)))


@_kind("write to a mask", weight=5)
def _write_mask(w: Writer, kind: str) -> Statement:
    for holder in w.holders:
        kinds = [link.kind for link in holder.chain]
        if "Mask" in kinds:
            where = "links" if holder.api == "property" else "parametrizations.weight"
            mask = f"self.{holder.name}.{where}[{kinds.index('Mask')}].mask"
            form = w.rng.choice(["{}.mul_(0.5)", "{}[0].zero_()", "{}.mT[1:].add_(0.5)"])
            return Line(kind, form.format(mask))
    return _write_original(w, "write to an original")


@_kind("hook", weight=2)
def _hook(w: Writer, kind: str) -> Statement:
    name = w.name("w")
    w.names.append(name)
    bound = f"{name} = self.{w.holder().name}.weight\n"
    return Line(kind, f"{bound}if {name}.requires_grad:\n    {name}.register_hook(lambda g: 2 * g)")


@_kind("graph break", weight=2)
def _graph_break(w: Writer, kind: str) -> Statement:
    return Line(kind, "torch._dynamo.graph_break()")


@_kind("functional_call", weight=4)
def _functional_call(w: Writer, kind: str) -> Statement:
    holder = w.holder()
    value = w.rng.choice(["self.free", "self.free", "2 * self.free", w.original(holder), "h"])
    swap = f'{{"{holder.originals[0]}": {value}}}'
    if len(holder.originals) > 1:
        swap = f'{{"{holder.originals[1]}": 2 * self.{holder.name}.{holder.originals[1]}}}'
    return Line(kind, f"h = torch.func.functional_call(self.{holder.name}, {swap}, (h,))")


@_kind("loop", weight=14, in_body=4, block=True)
def _loop(w: Writer, kind: str) -> Statement:
    return Block(kind, f"for _ in range({w.rng.choice([2, 3])}):", w.nested(body=False))


@_kind("no_grad", "autocast", "enable_grad", weight=4, in_body=1, block=True)
def _mode(w: Writer, kind: str) -> Statement:
    """A block under another mode, whose result joins the flow after it."""
    before_grad = w.grad
    w.grad = w.grad or kind == "enable_grad"  # bars what torch cannot train
    heading = {
        "no_grad": "with torch.no_grad():",
        "enable_grad": "with torch.enable_grad():",
        "autocast": f'with torch.autocast("cpu", {w.rng.choice(_AUTOCAST)}):',
    }[kind]
    before = w.name("h")
    block = Block("mode", heading, w.nested(body=False), closing=f"h = {before} + h")
    w.grad = before_grad
    return Block(kind, "", (Line("mode", f"{before} = h"), block))


@_kind("cached", weight=7, block=True)
def _cached(w: Writer, kind: str) -> Statement:
    return Block(kind, "with fxparam.cached():", w.nested(body=False))


@_kind("checkpoint", weight=5, in_body=1, block=True)
def _checkpoint(w: Writer, kind: str) -> Statement:
    f = w.name("segment")
    body = w.nested(body=True, checkpoint=True)
    result, last = "h", "return h"
    if w.rng.random() < 0.3:  # a value leaves the body
        value = w.name("w")
        result, last = f"h, {value}", f"return h, self.{w.holder().name}.weight"
        w.names.append(value)
    call = f"{result} = checkpoint({f}, h, use_reentrant=False)"
    return Block(kind, f"def {f}(h):", body, last, call)


@_kind("region", weight=2, in_body=1, block=True)
def _region(w: Writer, kind: str) -> Statement:
    f = w.name("segment")
    body, last = w.nested(body=True), "return h + 0"
    call = f"h = region({f}, region({f}, h))"
    if not w.grad and w.rng.random() < 0.25:
        body = (_write_original(w, "write to an original"), *body)
    if w.rng.random() < 0.2:  # a value leaves the body, which runs twice
        first, second = w.name("w"), w.name("w")
        last = f"return h + 0, self.{w.holder().name}.weight"
        call = f"h, {first} = region({f}, h)\nh, {second} = region({f}, h)"
        w.names += [first, second]
    elif w.rng.random() < 0.3:  # operands that may be one value
        f = f"{f}_on"
        value = w.name("w")
        body = (Line("region", f"h = squash(h @ {value})"), *body)
        given = [f"self.{w.holder().name}.weight" for _ in range(2)]
        call = f"h = region({f}, region({f}, h, {given[0]}), {given[1]})"
        return Block(kind, f"def {f}(h, {value}):", body, last, call)
    return Block(kind, f"def {f}(h):", body, last, call)


@_kind("scan", weight=4, in_body=1, block=True)
def _scan(w: Writer, kind: str) -> Statement:
    f = w.name("step")
    call = f"h, _ = scan({f}, h, torch.stack([h, 2 * h, 3 * h]))"
    body = (Line("scan", "h = squash(h + x)"), *w.nested(body=True))
    return Block(kind, f"def {f}(h, x):", body, "return h + 0, h.sum()", call)


@_kind("map", weight=2, in_body=1, block=True)
def _map(w: Writer, kind: str) -> Statement:
    f = w.name("row")
    call = f"h = map_rows({f}, torch.stack([h, 0.5 * h])).sum(0)"
    return Block(kind, f"def {f}(h):", w.nested(body=True), "return h + 0", call)


@_kind("cond", weight=4, in_body=1, block=True)
def _cond(w: Writer, kind: str) -> Statement:
    f, g = w.name("then"), w.name("other")
    which = w.rng.choice(["h.abs().sum() > 1", "h.abs().sum() > -1", "h.abs().sum() < -1"])
    then, other = w.nested(body=True), w.nested(body=True)
    call = f"h = cond({which}, {f}, {g}, h)"
    if w.singular and "-1" in which:
        broken = (Line("singular", "h = squash(h @ self.singular.weight)"),)
        if ">" in which:
            other += broken
        else:
            then += broken
        call += f"\n{call}"  # a value used once would stay where it is
    branches = (
        Block("branch", f"def {f}(h):", then, "return h + 0"),
        Block("branch", f"def {g}(h):", other, "return h + 0"),
    )
    return Block(kind, "", branches, closing=call)


@_kind("while_loop", weight=4, in_body=1, block=True)
def _while_loop(w: Writer, kind: str) -> Statement:
    f, trips = w.name("step"), w.rng.choice([0, 1, 3])
    body = w.nested(body=True)
    if w.singular and not trips:
        body += (Line("singular", "h = squash(h @ self.singular.weight)"),)
    call = f"_, h = while_loop(lambda i, h: i < {trips}, {f}, (torch.tensor(0), h))"
    return Block(kind, f"def {f}(i, h):", body, "return i + 1, h + 0", call)


def gradient_in_the_graph(rng: Random, holder: Holder) -> Statement:
    """The gradient of one access, which is not that of all of them."""
    kind, weight = "gradient in the graph", f"self.{holder.name}.weight"
    of = rng.choice(["first1", f"self.{holder.name}.{holder.originals[0]}", "first1"])
    asks = "first1.requires_grad and torch.is_grad_enabled()"
    taken = f"torch.autograd.grad(loss1, {of}, allow_unused=True, materialize_grads=True)"
    text = f"""\
first1, second1 = {weight}, {weight}
loss1 = squash(h.detach() @ first1 @ second1).square().sum()
if {asks}:
    out.append({taken}[0])"""
    return Line(kind, text)


def detached_in_a_branch(rng: Random, holder: Holder) -> Statement:
    """A value that the branch taken does not differentiate, with an infinite derivative."""
    weight = f"self.{holder.name}.weight"
    uses = (f"h = h + {weight}.detach()", f"h = squash(h @ {weight})")
    which = "h.abs().sum() > -1"
    if rng.random() < 0.5:
        uses, which = uses[::-1], "h.abs().sum() < -1"
    names = ("detaches1", "differentiates1")
    branches = tuple(
        Block("branch", f"def {name}(h):", (Line("use", use),), "return h + 0")
        for name, use in zip(names, uses, strict=True)
    )
    read = Line("read original", f"h = h + 0.1 * self.{holder.name}.{holder.originals[0]}")
    call = f"h = cond({which}, {names[0]}, {names[1]}, h)"
    return Block("detached in a branch", "", (read, *branches), closing=f"{call}\n{call}")
