"""Each test here compiles anew, on the same random inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Start without what was compiled before, in this process or an earlier one.

    Inductor's cache does not tell code with donated buffers from code without.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch.compiler.reset()
