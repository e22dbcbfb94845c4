"""An H100 as far as Inductor asks: what it compiles for one, run on CPU tensors.

All private names of torch and Triton that these tests lean on are in this file. They are those of
torch 2.13 and triton 3.7 (``SUPPORTED``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._inductor.compile_fx as compile_fx_module
import triton
import triton.language as tl
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.interpreter import GridExecutor

from fxparam._torch.inductor import generated_code

__all__ = ["Kernel", "Run", "compiled_for_gpu", "for_gpu"]

_CPU, _GPU = torch.device("cpu"), torch.device("cuda", 0)
_H100 = types.SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=80 << 30,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _item(self: Any, index: Any) -> Any:
    """``self[index]``; that of a tensor on a GPU asks CUDA for a guard, an op does not."""
    if isinstance(index, int) and self.device.type == "cuda":
        return torch.ops.aten.select.int(self, 0, index)
    return torch.Tensor.__getitem__(self, index)


def _copy(self: Any, source: Any, non_blocking: bool = False) -> Any:
    """``self.copy_(source)``, below autograd's kernel, which asks CUDA for a guard."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.aten.copy_.default(self, source, non_blocking)


# What Inductor and its generated code ask of CUDA.
_ANSWERS: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "is_available": _always(True),
        "device_count": _always(1),
        "current_device": _always(0),
        "set_device": _always(None),
        "get_device_capability": _always((9, 0)),
        "_get_device_properties": _always(_H100),
        "_lazy_init": _always(None),
        "_exchange_device": _always(0),
        "_maybe_exchange_device": _always(0),
        "synchronize": _always(None),
        "get_rng_state": _always(torch.zeros(16, dtype=torch.uint8)),
        "set_rng_state": _always(None),
    },
    torch._C: {"_cuda_getDevice": _always(0), "_cuda_getCurrentRawStream": _always(0)},
    torch._C._dynamo.guards: {"_empty_strided_cuda": torch._C._dynamo.guards._empty_strided_cpu},
    FakeTensor: {"__getitem__": _item, "copy_": _copy},
}


class _Driver(CudaDriver):
    def __init__(self) -> None:  # CudaDriver's own needs libcuda
        pass

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(_Driver())
# Inductor's own launcher, which is compiled ahead, needs libcuda.
_COMPILE_HERE = {"force_disable_caches": True, "use_static_triton_launcher": False}


@contextlib.contextmanager
def _pretended() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for where, names in _ANSWERS.items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(where, name, value, create=True))
        has_triton.cache_clear()
        stack.callback(has_triton.cache_clear)
        yield


class _Libdevice:
    """PyTorch's functions in the place of libdevice, which the interpreter does not have."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            arrays = [torch.from_numpy(np.ascontiguousarray(a.handle.data)) for a in args]
            spelled = {"nearbyint": "round", "rint": "round", "fabs": "abs"}.get(name, name)
            like = args[0].handle
            result = getattr(torch, spelled)(*arrays).numpy()
            return tl.core.tensor(type(like)(result, like.dtype), args[0].type)

        return call


@dataclass(frozen=True)
class Kernel:
    """A kernel as it was scheduled.

    Attributes:
        name: its name in the generated code.
        ops: the ops that are fused in it, views left out, by their names in ATen.
        of_evaluations: of these, the ones that were traced in a parametrization, forward or
            backward.
    """

    name: str
    ops: tuple[str, ...]
    of_evaluations: tuple[str, ...]


@dataclass
class Run:
    """What was generated, and run, in a :func:`for_gpu` block."""

    modules: list[str] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)  # of kernels: source -> name
    interpreted: int = 0  # runs of kernels
    _autotuners: list[Any] = field(default_factory=list)

    @property
    def configurations(self) -> int:
        """The most configurations that a kernel may choose from."""
        return max((len(each.configs) for each in self._autotuners), default=1)

    def next_configuration(self) -> None:
        """Let each kernel run in its next configuration. Autotuning would have to measure."""
        for each in self._autotuners:
            each.configs = each.configs[1:] + each.configs[:1]


@contextlib.contextmanager
def for_gpu(*, change: Callable[[str], str] = lambda source: source) -> Iterator[Run]:
    """What Inductor compiles in the block, it compiles for an H100; it runs on CPU tensors.

    ``TRITON_INTERPRET=1`` must have been set when Triton was imported.

    Args:
        change: makes the source of each kernel another, to see that a wrong one is noticed.
    """
    run = Run()
    load, define = AsyncCompile.triton, TritonScheduling.define_kernel
    execute = GridExecutor.__call__

    def define_kernel(self: Any, source: str, nodes: Any, kernel: Any) -> Any:
        name = define(self, source, nodes, kernel)
        run.kernels.append(_kernel(name, nodes))
        return name

    def load_kernel(self: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        run.sources[source] = name
        run._autotuners.append(load(self, name, change(source), device_str))
        return run._autotuners[-1]

    def interpret(self: Any, *args: Any, **kwargs: Any) -> Any:
        run.interpreted += 1
        return execute(self, *args, **kwargs)

    patch, compile_fx = mock.patch.object, compile_fx_module.compile_fx
    with (
        generated_code() as run.modules,
        config.patch(_COMPILE_HERE),
        patch(
            compile_fx_module,
            "compile_fx",
            functools.partial(compile_fx, inner_compile=_compile_for_gpu),
        ),
        patch(TritonScheduling, "define_kernel", define_kernel),
        patch(AsyncCompile, "triton", load_kernel),
        patch(GridExecutor, "__call__", interpret),
        patch(triton_helpers, "libdevice", _Libdevice()),
    ):
        yield run


def _compile_for_gpu(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
    """Inductor's ``compile_fx_inner``, for a graph on the GPU that gets CPU tensors."""
    mode = detect_fake_mode(inputs)

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_GPU)

    _move_graphs(gm, move)
    inputs, before = [move(x) for x in inputs], len(PyCodeCache.modules)
    with _pretended():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)
        out = compile_fx_module.compile_fx_inner(gm, inputs, **kwargs)
    for module in PyCodeCache.modules[before:]:
        if hasattr(module, "runner"):
            module.device = lambda **_: _CPU  # in calls of ATen functions
    call = out.current_callable

    def run(args: Any) -> Any:
        with _pretended():
            return call(args)

    out.current_callable = run
    return out


def _move_graphs(gm: torch.fx.GraphModule, move: Callable[[Any], Any]) -> None:
    """Write the GPU in the place of each device that a graph names, bodies included."""
    for module in (m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in module.graph.nodes:
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs), lambda a: _GPU if isinstance(a, torch.device) else a
            )
            if "val" in node.meta:
                node.meta["val"] = tree_map(move, node.meta["val"])
        module.recompile()


def _kernel(name: str, nodes: Any) -> Kernel:
    inner = (node.node for node in nodes if getattr(node, "node", None) is not None)
    origins = {origin for node in inner for origin in node.get_origins()}
    ops = [o for o in origins if not getattr(o.target, "is_view", False)]
    ours = [o for o in ops if _is_of_an_evaluation(o)]
    return Kernel(name, _names(ops), _names(ours))


def _names(nodes: list[torch.fx.Node]) -> tuple[str, ...]:
    return tuple(sorted({str(node.target).removeprefix("aten.") for node in nodes}))


def _is_of_an_evaluation(node: torch.fx.Node) -> bool:
    stacks = (node.meta.get(key) or {} for key in ("nn_module_stack", "fwd_nn_module_stack"))
    return any("parametrizations" in str(entry[0]) for s in stacks for entry in s.values())


def compiled_for_gpu(source: str, name: str) -> Iterator[tuple[str, bool]]:
    """Compile every configuration of a kernel to machine code, as a GPU's process would.

    ``TRITON_INTERPRET`` must not be set.

    Yields:
        For each configuration: the target of its PTX, and whether it spills registers.
    """
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with _pretended(), config.patch(_COMPILE_HERE):
        kernel = getattr(PyCodeCache.load(source), name)
        for configuration in kernel.configs:
            asm = kernel._precompile_config(configuration).kernel.asm
            with tempfile.TemporaryDirectory() as folder:
                binary = Path(folder, "kernel.cubin")
                binary.write_bytes(asm["cubin"])
                usage = subprocess.run(
                    [os.fspath(disassembler), "-res-usage", os.fspath(binary)],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            target = next(x for x in asm["ptx"].splitlines() if x.startswith(".target"))
            spills = "STACK:0 " not in usage or "LOCAL:0 " not in usage
            yield target.split()[1], spills
