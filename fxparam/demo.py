"""Sequential digits: an orthogonal RNN reads scikit-learn's digits pixel by pixel, four ways.

The recurrent weight is ``torch.nn.utils.parametrizations.orthogonal``'s and is read at each of 64
steps. Eager, Inductor, fxparam, and Inductor on the source hoisted by hand train from the same
seed on the same batches; losses must agree, and fxparam must evaluate the weight once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

__all__ = ["Contestant", "main", "run"]

# A training run in float32 amplifies rounding: the four differ in the order of their sums. Over
# these steps the curves were apart by 1e-6; a lost or doubled gradient shows at once.
_LOSS_TOLERANCE = 1e-2
_TALLY = {"forward": 0, "backward": 0}


@torch.library.custom_op("fxparam_demo::tally", mutates_args=())
def _tally(x: Tensor) -> Tensor:
    _TALLY["forward"] += 1
    return x.clone()


@torch.library.custom_op("fxparam_demo::tally_backward", mutates_args=())
def _tally_backward(grad: Tensor) -> Tensor:
    _TALLY["backward"] += 1
    return grad.clone()


_tally.register_fake(torch.empty_like)
_tally_backward.register_fake(torch.empty_like)
_tally.register_autograd(lambda ctx, grad: _tally_backward(grad))


class _Tally(nn.Module):
    """The identity, counting its evaluations at run time, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        counted: Tensor = _tally(x)
        return counted


class SequentialDigits(nn.Module):
    """A recurrent network on pixels, shape ``(batch, pixels)``, giving ``(batch, 10)`` logits."""

    def __init__(self, hidden: int, *, hoisted: bool, tally: bool = False) -> None:
        super().__init__()
        self.hoisted = hoisted
        self.read = nn.Linear(1, hidden)
        self.recur = nn.Linear(hidden, hidden, bias=False)
        self.classify = nn.Linear(hidden, 10)
        parametrizations.orthogonal(self.recur, orthogonal_map="cayley")
        if tally:
            register_parametrization(self.recur, "weight", _Tally())

    def forward(self, pixels: Tensor) -> Tensor:
        h = pixels.new_zeros(pixels.shape[0], self.recur.in_features)
        if self.hoisted:
            weight = self.recur.weight
            for x in pixels.unbind(1):
                h = torch.tanh(self.read(x[:, None]) + nn.functional.linear(h, weight))
        else:
            for x in pixels.unbind(1):
                h = torch.tanh(self.read(x[:, None]) + self.recur(h))
        logits: Tensor = self.classify(h)
        return logits


@dataclass
class Contestant:
    """One way to run the model, and what was measured of it."""

    name: str
    backend: Any
    hoisted: bool = False
    compile_seconds: float = 0.0
    step_ms: float = 0.0
    evaluations: tuple[int, int] = (0, 0)
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    step: Callable[[Tensor, Tensor], Tensor] | None = None
    model: nn.Module | None = None


def contestants() -> list[Contestant]:
    return [
        Contestant("eager", None),
        Contestant("Inductor", "inductor"),
        Contestant("fxparam", "fxparam"),
        Contestant("hoisted by hand", "inductor", hoisted=True),
    ]


@dataclass(frozen=True)
class Settings:
    hidden: int = 128
    batch: int = 128
    steps: int = 100
    rounds: int = 15
    pixels: int = 64
    device: str = "cpu"


QUICK = Settings(hidden=32, batch=64, steps=6, rounds=5, pixels=16)


def _digits(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    stride = 64 // settings.pixels
    x = torch.tensor(data.data, dtype=torch.float32)[:, ::stride] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].to(settings.device), y[order].to(settings.device)
    return x[:1437], y[:1437], x[1437:], y[1437:]


def _batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for chosen in torch.split(order, size):
            if len(chosen) == size:  # one shape: no recompilation
                yield x[chosen], y[chosen]


def _prepare(one: Contestant, settings: Settings, *, tally: bool = False) -> None:
    torch.manual_seed(0)
    model = SequentialDigits(settings.hidden, hoisted=one.hoisted, tally=tally).to(settings.device)
    run = model if one.backend is None else torch.compile(model, backend=one.backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    one.model, one.step = model, step


def _train(one: Contestant, settings: Settings, data: tuple[Tensor, ...], tick: Any) -> None:
    """Train a contestant from the common seed on the common batches; its first step compiles."""
    _prepare(one, settings)
    assert one.step is not None and one.model is not None
    batches, times = _batches(data[0], data[1], settings.batch), []
    for _ in range(settings.steps):
        start = time.perf_counter()
        one.losses.append(one.step(*next(batches)).item())
        times.append(time.perf_counter() - start)
        tick()
    one.compile_seconds = 0.0 if one.backend is None else times[0] - statistics.median(times[1:])
    with torch.no_grad():
        right = one.model(data[2]).argmax(1) == data[3]
    one.accuracy = right.float().mean().item()


def _time(everyone: list[Contestant], settings: Settings, data: tuple[Tensor, ...]) -> None:
    """Measure step times, in turns: a noisy machine is noisy for all contestants."""
    x, y = next(_batches(data[0], data[1], settings.batch))
    times: dict[str, list[float]] = {one.name: [] for one in everyone}
    for _ in range(settings.rounds):
        for one in everyone:
            assert one.step is not None
            start = time.perf_counter()
            one.step(x, y).item()  # waits for the device
            times[one.name].append(time.perf_counter() - start)
    for one in everyone:
        one.step_ms = 1e3 * statistics.median(times[one.name])


def _count(one: Contestant, settings: Settings, data: tuple[Tensor, ...]) -> None:
    """Count the evaluations in one step as they run, in a model made for that."""
    counting = Contestant(one.name, one.backend, one.hoisted)
    small = Settings(hidden=8, batch=4, pixels=settings.pixels, device=settings.device)
    _prepare(counting, small, tally=True)
    assert counting.step is not None
    x, y = data[0][:4], data[1][:4]
    counting.step(x, y)
    _TALLY.update(forward=0, backward=0)
    counting.step(x, y)
    one.evaluations = (_TALLY["forward"], _TALLY["backward"])


def run(settings: Settings, tick: Callable[[], None] = lambda: None) -> list[Contestant]:
    """Train, time and count all four; ``tick`` is called after each training step."""
    data = _digits(settings)
    everyone = contestants()
    for one in everyone:
        torch.compiler.reset()
        _count(one, settings, data)
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        for i, one in enumerate(everyone):
            # A cache of its own each: the graphs of the last two are nearly the same. Inductor's
            # table of loaded kernels in memory cannot be emptied, hence the table's caption.
            with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=f"{folder}/{i}"):
                _train(one, settings, data, tick)
    _time(everyone, settings, data)
    return everyone


def largest_difference(one: Contestant, eager: Contestant) -> float:
    """Return the largest difference between a loss curve and eager's."""
    return max(abs(a - b) for a, b in zip(one.losses, eager.losses, strict=True))


def verdict(everyone: list[Contestant], steps_in_sequence: int) -> list[str]:
    """Return a line for each thing that is wrong; none if losses agree and the hoist happened."""
    eager, _, ours, _ = everyone
    wrong = [
        f"{one.name}: losses differ from eager's by {largest_difference(one, eager):.1e}"
        for one in everyone
        if not largest_difference(one, eager) <= _LOSS_TOLERANCE
    ]
    if ours.evaluations != (1, 1):
        wrong.append(f"fxparam evaluated {ours.evaluations} times per step, not (1, 1)")
    if eager.evaluations != (steps_in_sequence, steps_in_sequence):
        wrong.append(f"eager evaluated {eager.evaluations} times: the count is not to be trusted")
    return wrong


def _table(everyone: list[Contestant]) -> Any:
    from rich.table import Table

    table = Table(
        title="Orthogonal RNN on sequential digits",
        caption="compiled in this order in one process: the last reuses kernels of the one before",
    )
    for column in (
        "",
        "compile s",
        "ms per step",
        "x by hand",
        "evaluations fwd / bwd",
        "test accuracy",
        "loss difference",
    ):
        table.add_column(column, justify="left" if not column else "right")
    eager, limit = everyone[0], everyone[-1]
    for one in everyone:
        table.add_row(
            one.name,
            f"{one.compile_seconds:.1f}",
            f"{one.step_ms:.1f}",
            f"{one.step_ms / limit.step_ms:.2f}",
            f"{one.evaluations[0]} / {one.evaluations[1]}",
            f"{one.accuracy:.3f}",
            f"{largest_difference(one, eager):.1e}",
        )
    return table


def _plot(everyone: list[Contestant], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(10, 4))
    for one, style in zip(everyone, ("-", "--", "-.", ":"), strict=True):
        curves.plot(one.losses, style, label=one.name, linewidth=2)
    curves.set(xlabel="training step", ylabel="loss", title="the same loss curve")
    curves.legend()
    drawn = bars.barh([one.name for one in everyone], [one.step_ms for one in everyone])
    bars.bar_label(drawn, fmt="%.0f ms", padding=3)
    bars.set(xlabel="ms per training step", title="step time")
    bars.invert_yaxis()
    bars.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fxparam demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run of about a minute")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("fxparam-demo.png"))
    return parser


def _unusable(device: str, output: Path) -> str | None:
    """Return a line about arguments that cannot work; None if they can.

    Asked before minutes are spent on them.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        return f"--device {device!r}: the demo runs on cpu and cuda"
    if kind == "cuda" and not torch.cuda.is_available():
        return f"--device {device}: this torch sees no CUDA device"
    if output.is_dir() or not output.resolve().parent.is_dir():
        return f"--output {output}: not a file in a folder that exists"
    return None


def main(arguments: list[str]) -> int:
    """Run the ``demo`` command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        print(f'the demo needs {error.name}: pip install "fxparam[demo]"')
        return 2
    problem = _unusable(options.device, options.output)
    if problem is not None:
        print(problem)
        return 2
    base = QUICK if options.quick else Settings()
    settings = Settings(**{**vars(base), "device": options.device})
    console = Console(width=max(100, Console().width))
    with Progress(console=console) as progress:
        task = progress.add_task("training four ways", total=4 * settings.steps)
        everyone = run(settings, lambda: progress.advance(task))
    console.print(_table(everyone))
    _plot(everyone, options.output)
    console.print(f"plot: {options.output.resolve()}", soft_wrap=True)
    wrong = verdict(everyone, settings.pixels)
    for line in wrong:
        console.print(f"WRONG: {line}")
    if not wrong:
        console.print('next: torch.compile(your_model, backend="fxparam")')
    return 1 if wrong else 0
