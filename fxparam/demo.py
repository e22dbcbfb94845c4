"""Sequential digits: an orthogonal RNN reads scikit-learn's digits pixel by pixel, four ways.

The recurrent weight is ``torch.nn.utils.parametrizations.orthogonal``'s and is read at each of 64
steps. Eager, Inductor, fxparam, and Inductor on the source hoisted by hand train for the same
seconds, from the same seed on the same batches; the losses of the steps that all four have done
must agree, and fxparam must evaluate the weight once.
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
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import register_parametrization

__all__ = ["Contestant", "main", "run"]

# A training run in float32 amplifies rounding: the four differ in the order of their sums. Over
# the first 100 steps the curves were apart by less than 1e-6. A lost or doubled gradient shows.
_LOSS_TOLERANCE = 1e-2
_COMPARED = 100
_LEAST_STEPS = 5  # of each way, however slow the machine: there is something to compare
_GOAL = 0.9
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
        parametrizations.orthogonal(self.recur)
        if tally:
            register_parametrization(self.recur, "weight", _Tally())

    def forward(self, pixels: Tensor) -> Tensor:
        h = pixels.new_zeros(pixels.shape[0], self.recur.in_features)
        inputs = self.read(pixels[:, :, None]).unbind(1)
        if self.hoisted:
            weight = self.recur.weight
            for x in inputs:
                h = torch.tanh(x + nn.functional.linear(h, weight))
        else:
            for x in inputs:
                h = torch.tanh(x + self.recur(h))
        logits: Tensor = self.classify(h)
        return logits


@dataclass(frozen=True)
class Point:
    """A point of the curves: the loss is the mean over the steps since the point before."""

    seconds: float
    loss: float
    accuracy: float


@dataclass
class Contestant:
    """One way to run the model, and what was measured of it."""

    name: str
    backend: Any
    hoisted: bool = False
    compile_seconds: float = 0.0
    seconds: float = 0.0  # of training, after the first step: that one compiles
    step_seconds: list[float] = field(default_factory=list)
    evaluations: tuple[int, int] = (0, 0)
    losses: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    step: Callable[[Tensor, Tensor], Tensor] | None = None
    model: nn.Module | None = None
    batches: Iterator[tuple[Tensor, Tensor]] = iter(())

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.step_seconds)

    @property
    def seconds_to_goal(self) -> float | None:
        """The seconds of the first point whose accuracy is the goal's; None if there is none."""
        return next((point.seconds for point in self.points if point.accuracy >= _GOAL), None)


def contestants() -> list[Contestant]:
    return [
        Contestant("eager", None),
        Contestant("Inductor", "inductor"),
        Contestant("fxparam", "fxparam"),
        Contestant("hoisted by hand", "inductor", hoisted=True),
    ]


@dataclass(frozen=True)
class Settings:
    hidden: int = 160
    batch: int = 128
    seconds: float = 30.0
    turns: int = 30
    pixels: int = 64
    device: str = "cpu"


QUICK = Settings(hidden=32, batch=64, seconds=2.0, turns=4, pixels=16)


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


def _timed_step(one: Contestant) -> float:
    """Take a step on the next batch, and return the seconds it took."""
    assert one.step is not None
    start = time.perf_counter()
    one.losses.append(one.step(*next(one.batches)).item())  # waits for the device
    return time.perf_counter() - start


def _add_point(one: Contestant, since: int, data: tuple[Tensor, ...]) -> None:
    """Add a point to the curves. The clock of training stands while the test set is read.

    torch's ``cached()`` leaves the model as it is. ``fxparam.cached(model)`` would adopt it: the
    next step would compile again, and the ways without fxparam would no longer be without it.
    """
    assert one.model is not None
    with torch.no_grad(), parametrize.cached():
        right = one.model(data[2]).argmax(1) == data[3]
    loss = statistics.mean(one.losses[since:])
    one.points.append(Point(one.seconds, loss, right.float().mean().item()))


def _train_turn(one: Contestant, until: float, data: tuple[Tensor, ...]) -> None:
    """Train until the contestant's clock says so, and look how far it has come."""
    since = len(one.losses)
    while one.seconds < until or len(one.losses) < _LEAST_STEPS:
        one.step_seconds.append(_timed_step(one))
        one.seconds += one.step_seconds[-1]
    if len(one.losses) > since:
        _add_point(one, since, data)


def _train(
    everyone: list[Contestant], settings: Settings, data: tuple[Tensor, ...], tick: Any
) -> None:
    """Train all from the common seed on the common batches, each for the same seconds.

    They take turns: a noisy machine is noisy for all contestants.
    """
    first = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, one in enumerate(everyone):
            _prepare(one, settings)
            one.batches = _batches(data[0], data[1], settings.batch)
            # A cache of its own each: the graphs of the last two are nearly the same. Inductor's
            # table of loaded kernels in memory cannot be emptied, hence the table's caption.
            with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=f"{folder}/{i}"):
                first[one.name] = _timed_step(one)
            _add_point(one, 0, data)
        for turn in range(1, settings.turns + 1):
            for one in everyone:
                _train_turn(one, settings.seconds * turn / settings.turns, data)
                tick()
    for one in everyone:
        if one.backend is not None:
            one.compile_seconds = first[one.name] - one.step_ms / 1e3


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
    """Count, then train all four; ``tick`` is called after each turn of each."""
    data = _digits(settings)
    everyone = contestants()
    for one in everyone:
        torch.compiler.reset()
        _count(one, settings, data)
    torch.compiler.reset()
    _train(everyone, settings, data, tick)
    return everyone


def compared_steps(everyone: list[Contestant]) -> int:
    """Return how many steps are compared: those that all have done, and no more than 100."""
    return min(_COMPARED, *(len(one.losses) for one in everyone))


def largest_difference(one: Contestant, eager: Contestant, steps: int) -> float:
    """Return the largest difference between a loss curve and eager's, over the first steps."""
    return max(abs(a - b) for a, b in zip(one.losses[:steps], eager.losses[:steps], strict=True))


def verdict(everyone: list[Contestant], steps_in_sequence: int) -> list[str]:
    """Return a line for each thing that is wrong; none if losses agree and the hoist happened."""
    eager, _, ours, _ = everyone
    steps, wrong = compared_steps(everyone), []
    for one in everyone:
        difference = largest_difference(one, eager, steps)
        if not difference <= _LOSS_TOLERANCE:
            wrong.append(f"{one.name}: losses differ from eager's by {difference:.1e}")
    if ours.evaluations != (1, 1):
        wrong.append(f"fxparam evaluated {ours.evaluations} times per step, not (1, 1)")
    if eager.evaluations != (steps_in_sequence, steps_in_sequence):
        wrong.append(f"eager evaluated {eager.evaluations} times: the count is not to be trusted")
    return wrong


def _table(everyone: list[Contestant]) -> Any:
    from rich.table import Table

    eager, limit, steps = everyone[0], everyone[-1], compared_steps(everyone)
    shortest = min(one.seconds for one in everyone)
    caption = (
        f"Each trained for {shortest:.0f} s. The clock starts after the first step, which "
        "compiles,\nand stands while the test set is read. Compiled in this order in one process:\n"
        "later ones may reuse kernels of earlier ones. The losses of the first "
        f"{steps} steps are compared."
    )
    table = Table(title="Orthogonal RNN on sequential digits", caption=caption)
    table.add_column("", no_wrap=True)
    for name in ("compile\ns", "steps", "ms per\nstep", "x by\nhand", "evaluations\nfwd / bwd"):
        table.add_column(name, justify="right")
    for name in ("test\naccuracy", f"seconds\nto {_GOAL}", "loss\ndifference"):
        table.add_column(name, justify="right")
    for one in everyone:
        goal = one.seconds_to_goal
        table.add_row(
            one.name,
            f"{one.compile_seconds:.1f}",
            f"{len(one.losses)}",
            f"{one.step_ms:.1f}",
            f"{one.step_ms / limit.step_ms:.2f}",
            f"{one.evaluations[0]} / {one.evaluations[1]}",
            f"{one.points[-1].accuracy:.3f}",
            "-" if goal is None else f"{goal:.1f}",
            f"{largest_difference(one, eager, steps):.1e}",
        )
    return table


_STYLES = (("tab:red", "s-"), ("tab:orange", "D--"), ("tab:green", "o-"), ("tab:blue", "^:"))


def plot(everyone: list[Contestant], path: Path) -> None:
    """Draw loss and accuracy against seconds of training, into an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, accuracies) = pyplot.subplots(1, 2, figsize=(10, 4))
    for one, (color, style) in zip(everyone, _STYLES, strict=True):
        seconds = [point.seconds for point in one.points]
        label = f"{one.name}, {len(one.losses)} steps"
        look = {"color": color, "label": label, "linewidth": 1.8, "markersize": 3.5}
        losses.plot(seconds, [point.loss for point in one.points], style, **look)
        accuracies.plot(seconds, [point.accuracy for point in one.points], style, **look)
    losses.set(yscale="log", ylabel="loss, mean since the point before", title="training loss")
    losses.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    losses.minorticks_off()
    accuracies.axhline(_GOAL, linestyle="--", color="black", linewidth=1)
    accuracies.set(ylim=(0, 1), ylabel="test accuracy", title="test accuracy")
    for panel in (losses, accuracies):
        panel.set(xlabel="seconds of training, after compilation")
        panel.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fxparam demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run of half a minute")
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
    console = Console(width=max(104, Console().width))
    with Progress(console=console) as progress:
        task = progress.add_task("training four ways", total=4 * settings.turns)
        everyone = run(settings, lambda: progress.advance(task))
    console.print(_table(everyone))
    plot(everyone, options.output)
    console.print(f"plot: {options.output.resolve()}", soft_wrap=True)
    wrong = verdict(everyone, settings.pixels)
    for line in wrong:
        console.print(f"WRONG: {line}")
    if not wrong:
        console.print('next: torch.compile(your_model, backend="fxparam")')
    return 1 if wrong else 0
