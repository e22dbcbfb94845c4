"""A region belongs to one thread of execution, and ends whole."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxparam.parametrize as ours
from fxparam.scopes import store
from tests import zoo


def test_an_exception_leaves_nothing_behind() -> None:
    layer, parametrization = zoo.counted(ours)
    with pytest.raises(ZeroDivisionError), ours.cached():
        _ = layer.weight
        raise ZeroDivisionError
    assert not store.active
    assert layer.weight is not layer.weight
    parametrization.function = lambda x: 1 / 0  # type: ignore[assignment,return-value]
    with ours.cached():
        with pytest.raises(ZeroDivisionError):
            _ = layer.weight
        parametrization.function = torch.tanh
        assert layer.weight is layer.weight


def test_threads_do_not_meet() -> None:
    layer, _ = zoo.counted(ours)
    values: dict[str, Any] = {}
    opened, closed = threading.Barrier(2), threading.Barrier(2)

    def other() -> None:
        values["outside"] = layer.weight is layer.weight
        with ours.cached():
            values["inside"] = layer.weight
            opened.wait(10)
        closed.wait(10)

    thread = threading.Thread(target=other)
    with ours.cached():
        mine = layer.weight
        thread.start()
        opened.wait(10)
        closed.wait(10)  # the other region has ended
        assert layer.weight is mine
    thread.join()
    assert values["outside"] is False and values["inside"] is not mine


def test_a_thread_with_a_copied_context_is_outside() -> None:
    layer, _ = zoo.counted(ours)
    seen: list[bool] = []
    with ours.cached():
        context = contextvars.copy_context()
        run = lambda: seen.append(layer.weight is layer.weight)  # noqa: E731
        thread = threading.Thread(target=context.run, args=(run,))
        thread.start()
        thread.join()
    assert seen == [False]


def test_tasks_do_not_meet() -> None:
    layer, parametrization = zoo.counted(ours)

    async def one() -> Tensor:
        with ours.cached():
            value = layer.weight
            await asyncio.sleep(0)
            assert layer.weight is value
            await asyncio.sleep(0)
        return value

    async def main() -> list[Tensor]:
        return await asyncio.gather(one(), one())

    first, second = asyncio.run(main())
    assert first is not second and parametrization.evaluations == 2


def test_a_task_that_outlives_the_region_that_started_it() -> None:
    layer, _ = zoo.counted(ours)

    async def child() -> None:
        with ours.cached():
            inside = layer.weight
            await asyncio.sleep(0.01)
            assert layer.weight is inside  # its own with block still runs
        assert layer.weight is not layer.weight

    async def main() -> None:
        with ours.cached():
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
        await task

    asyncio.run(main())


def test_a_generator_closed_elsewhere() -> None:
    layer, _ = zoo.counted(ours)

    def values() -> Iterator[Tensor]:
        with ours.cached():
            yield layer.weight

    generator = values()
    context = contextvars.copy_context()
    context.run(next, generator)
    generator.close()  # type: ignore[attr-defined]  # in another context than it ran in
    assert not store.active and not context.run(lambda: store.active)


def test_a_region_keeps_no_model_alive() -> None:
    with ours.cached():
        layer, _ = zoo.counted(ours)
        _ = layer.weight
        gone = weakref.ref(layer)
        del layer, _
        gc.collect()
        assert gone() is None
