"""The demo's table and picture: ``make demo`` prints and draws the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.process import call
from fxparam import demo

__all__ = ["measure", "rows"]


def measure(image: str) -> list[dict[str, Any]]:
    """Train the four ways, draw them into ``image``, and return a row for each."""
    settings = demo.Settings()
    everyone = demo.run(settings)
    if wrong := demo.verdict(everyone, settings.pixels):
        return [{"error": wrong[0]}]
    demo.plot(everyone, Path(image))
    steps = demo.compared_steps(everyone)
    return [
        {
            "way": one.name,
            "compile": one.compile_seconds,
            "steps": len(one.losses),
            "step": one.step_ms / 1e3,
            "evaluations": one.evaluations,
            "accuracy": one.points[-1].accuracy,
            "goal": one.seconds_to_goal,
            "difference": demo.largest_difference(one, everyone[0], steps),
            "compared": steps,
        }
        for one in everyone
    ]


def rows(limit: float, record: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each way; the picture is drawn beside the record."""
    image = record.resolve().with_name("demo.png")
    found = call("benchmarks.demo:measure", limit, image=str(image))
    yield from found if isinstance(found, list) else [found]
