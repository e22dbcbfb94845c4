"""The ``torch.compile`` backend: the list of passes, then the inner backend."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule

from fxparam._torch.collectives import collectives_of
from fxparam._torch.ddp import outside_split, see_whole_graphs, warn_of_parts
from fxparam._torch.dynamo import (
    clear_trace_marks,
    compilation,
    lookup_backend,
    restart_trace,
    trace_number,
)
from fxparam._torch.guards import guard_shared_memory
from fxparam._torch.inductor import inductor_with
from fxparam._torch.names import trace_artifact
from fxparam.compiling.artifacts import warn_of_artifacts
from fxparam.compiling.check_ranks import check_ranks, compare_exchanges
from fxparam.compiling.failures import PassFailedError, is_disabled, is_strict, named
from fxparam.compiling.in_region import FirstReaders, with_values_of_region
from fxparam.compiling.own_frames import leave_own_frames_to_eager_code
from fxparam.eager.describe import kind_of
from fxparam.graph.passes.batch import batched
from fxparam.graph.passes.batch_results import batch_results
from fxparam.graph.passes.hoist import HoistResult, hoist
from fxparam.graph.passes.lower import AFTER_BATCHES, BEFORE_BATCHES
from fxparam.graph.passes.lower import lower as lower_ops
from fxparam.graph.passes.take_outside import is_in_a_region_around
from fxparam.graph.report import Report
from fxparam.graph.rewrites.rewrite import Rewrite
from fxparam.graph.torch_bugs.donated_buffers import keep_saved_tensors
from fxparam.graph.torch_bugs.memory_of_results import show_what_bodies_pass_on
from fxparam.graph.torch_bugs.recomputed_values import (
    mark_for_partitioner,
    saving_what_may_change,
)
from fxparam.graph.torch_bugs.scalar_outputs import allow_scalar_outputs
from fxparam.marks import EVALUATION, REGION, VALUE, settle
from fxparam.scopes.under_dynamo import forget_models

__all__ = ["Backend", "backend", "default"]

_log = logging.getLogger("fxparam")

# Inner backends whose compiled graphs are one autograd node each, as partial gradients need it.
_ONE_NODE = ("inductor", "aot_eager")


class Backend:
    """A ``torch.compile`` backend; make one with :func:`backend`.

    Attributes:
        reports: what the pass did, for each graph compiled since the last
            ``torch.compiler.reset()``.
    """

    compiler_name = "fxparam"

    def __init__(
        self,
        inner: str | Callable[..., Any],
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        max_bytes: float = math.inf,
        strict: bool | None = None,
        lower: bool = True,
        batch: bool = True,
        check_ranks: bool | None = None,
    ) -> None:
        self._inner, self._mode, self._options = inner, mode, options or {}
        self._max_bytes, self._strict = max_bytes, strict
        self._lower, self._batch, self._check_ranks = lower, batch, check_ranks
        self._unshared: object = None  # the compilation whose graph a pass failed on
        self._first_readers = FirstReaders()
        self._gets_parts = False  # of a graph that was given whole
        self.reports: list[Report] = []
        warn_of_artifacts()

    # torch 2.15 and newer call it when the backend is given to torch.compile.
    _dynamo_backend_init = staticmethod(warn_of_artifacts)

    def __repr__(self) -> str:
        given: dict[str, Any] = {"mode": self._mode, **self._options, "strict": self._strict}
        if self._max_bytes != math.inf:
            given["max_bytes"] = self._max_bytes
        inner = self._inner if isinstance(self._inner, str) else kind_of(self._inner)
        if not self._lower:
            given["lower"] = False
        if not self._batch:
            given["batch"] = False
        given["check_ranks"] = self._check_ranks
        options = "".join(f", {k}={v!r}" for k, v in given.items() if v is not None)
        return f"fxparam.backend({inner!r}{options})"

    @property
    def reads_marks(self) -> bool:
        """True if the passes will run, so that ``cached()`` is to mark the nodes it traces."""
        return not is_disabled() and (self._unshared is None or self._unshared != compilation())

    @property
    def last_report(self) -> Report | None:
        """The report on the graph compiled last, or None."""
        return self.reports[-1] if self.reports else None

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Hoist, then compile with the inner backend.

        ``mode`` and ``options`` are those given to ``torch.compile``; they go to the inner
        backend, over those given to :func:`backend`.
        """
        warn_of_artifacts()
        inner = self._configured(mode or self._mode, {**self._options, **(options or {})})
        if self._gets_parts:
            part: Callable[..., Any] = inner(gm, example_inputs)
            return part
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            warn_of_parts()
        return self._compile(gm, example_inputs, inner, inner)

    def compile_whole(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        split: Callable[..., Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Hoist a graph of a model in ``DistributedDataParallel``, then let it be split.

        Args:
            gm: the graph.
            inputs: those it is called with the first time.
            split: compiles a graph in parts, each by a call of this backend.
            mode: that given to ``torch.compile``.
            options: those given to it.
        """

        def in_parts(gm: GraphModule, inputs: Sequence[Any]) -> Any:
            self._gets_parts = True
            try:
                return split(gm, inputs)
            finally:
                self._gets_parts = False

        warn_of_artifacts()
        inner = self._configured(mode or self._mode, {**self._options, **(options or {})})
        return self._compile(gm, inputs, in_parts, outside_split(inner))

    def _compile(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        inner: Callable[..., Any],
        evaluations: Callable[..., Any],
    ) -> Callable[..., Any]:
        """Hoist a graph and compile it.

        Args:
            gm: the graph.
            example_inputs: those it is called with the first time.
            inner: the backend that compiles it.
            evaluations: the one that compiles what is evaluated in front of it, for a scope.
        """
        compiled: Callable[..., Any]
        if not self.reads_marks:
            compiled = inner(gm, example_inputs)
            return compiled
        try:
            with named():
                result, inner = self._share(gm, example_inputs, inner, evaluations)
        except PassFailedError as error:
            self._give_up(error)
        self._record(result)
        if self._check_ranks:
            check_ranks(result.graph_module, result.report)
        elif self._check_ranks is None:
            compare_exchanges(result.graph_module)
        if len(result.apart) > 1:
            guard_shared_memory(result.apart)
        if result.has_bodies:
            allow_scalar_outputs(gm)
        with (
            keep_saved_tensors(has_bodies=result.has_bodies),
            saving_what_may_change(by_inductor=self._inner == "inductor"),
        ):
            compiled = inner(gm, example_inputs)
        return compiled

    def _share(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        inner: Callable[..., Any],
        evaluations: Callable[..., Any],
    ) -> tuple[HoistResult, Callable[..., Any]]:
        """Run the passes; return what they did, and a backend for the graph as it is now."""
        settle(gm, trace_number())
        clear_trace_marks((REGION, EVALUATION, VALUE))
        # Passes run ops on fake tensors: a checkpoint around must not count what these save.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            # Dynamo restores the frame's own modes before it calls a backend.
            result = hoist(
                gm,
                grad_enabled=torch.is_grad_enabled(),
                autocast_now=True,
                # Of a rank's own sizes; ranks that decide differently would wait for each other.
                max_bytes=math.inf if collectives_of(gm) else self._max_bytes,
            )
            result = self._cheaper(result)
        if is_in_a_region_around(gm):
            evaluations = self._of_evaluations(evaluations)
            inner = with_values_of_region(
                gm, example_inputs, inner, evaluations, self._first_readers
            )
        return result, inner

    def _cheaper(self, result: HoistResult) -> HoistResult:
        """Batch evaluations that are the same computation, and lower the ops of all."""
        result = self._lowered(result, BEFORE_BATCHES)
        if self._batch:
            result = batched(
                result,
                grad_enabled=torch.is_grad_enabled(),
                max_bytes=self._max_bytes,
                lowered=self._lower,
            )
        return self._lowered(result, AFTER_BATCHES)

    def _of_evaluations(self, compile: Callable[..., Any]) -> Callable[..., Any]:
        """Return a backend for evaluations that were taken out of their graph: it batches them."""
        if not self._batch or self._inner not in _ONE_NODE:
            return compile

        def batched_first(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            enabled = torch.is_grad_enabled()
            with named(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                found = batch_results(
                    gm, grad_enabled=enabled, max_bytes=self._max_bytes, lowered=self._lower
                )
                if found.modified and self._lower:
                    lower_ops(
                        gm, grad_enabled=enabled, autocast_now=True, max_bytes=self._max_bytes
                    )
            report = self.reports[-1]
            self.reports[-1] = replace(report, batches=(*report.batches, *found.batches))
            return compile(gm, inputs)  # type: ignore[no-any-return]

        return batched_first

    def _lowered(self, result: HoistResult, rewrites: tuple[Rewrite, ...]) -> HoistResult:
        if not self._lower:
            return result
        gm, enabled = result.graph_module, torch.is_grad_enabled()
        lowered = lower_ops(
            gm,
            grad_enabled=enabled,
            autocast_now=True,
            max_bytes=self._max_bytes,
            rewrites=rewrites,
        )
        if not lowered:
            return result
        return replace(result, report=result.report.with_lowered(lowered), modified=True)

    def _give_up(self, error: PassFailedError) -> NoReturn:
        """Let Dynamo trace the present frame anew, to be compiled as it is; raise if strict."""
        frame = compilation()
        if is_strict(self._strict) or frame is None:
            raise error
        warnings.warn(f"{error}\nThe graph is compiled unshared.", RuntimeWarning, stacklevel=2)
        self._unshared = frame
        restart_trace("a pass of fxparam failed")

    def _record(self, result: HoistResult) -> None:
        """Keep the report, and show it where there is something to see."""
        report = result.report
        self.reports.append(report)
        if report.entries or result.modified:
            _log.info("%r", report)
            trace_artifact("fxparam_report", lambda: repr(report))

    def reset(self) -> None:
        """Called by ``torch.compiler.reset()``, as for Inductor and any backend with state."""
        self.reports.clear()
        forget_models()
        self._first_readers = FirstReaders()
        inner = self._configured(self._mode, self._options)
        if hasattr(inner, "reset"):
            inner.reset()

    def _configured(self, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
        if self._inner == "inductor":
            configured: Callable[..., Any] = inductor_with(
                mode,
                options,
                joint_custom_pre_pass=mark_for_partitioner,
                post_grad_custom_pre_pass=show_what_bodies_pass_on,
            )
            return configured
        inner = lookup_backend(self._inner)
        extra = {k: v for k, v in (("mode", mode), ("options", options)) if v}
        return (lambda gm, inputs: inner(gm, inputs, **extra)) if extra else inner


def _as_it_is(saved: torch.Tensor) -> torch.Tensor:
    return saved


def backend(
    inner: str | Callable[..., Any] = "inductor",
    *,
    mode: str | None = None,
    max_bytes: float = math.inf,
    strict: bool | None = None,
    lower: bool = True,
    batch: bool = True,
    check_ranks: bool | None = None,
    **options: Any,
) -> Backend:
    """Return a ``torch.compile`` backend that shares evaluations, then calls ``inner``.

    ``torch.compile(model, backend="fxparam")`` is ``torch.compile(model, backend=backend())``.

    Args:
        inner: any backend that ``torch.compile`` takes: a registered name, or a callable from a
            ``GraphModule`` and example inputs to a callable.
        mode: as ``torch.compile``'s, handed to ``inner``.
        max_bytes: a value with more bytes than this is not shared: a shared value lives longer. It
            does not count in a graph with collectives, as ranks may have values of other sizes.
        strict: what happens if a pass of this backend fails on a graph. True: an error. False: a
            warning, and the graph is compiled as it was captured. None: True if the environment has
            ``FXPARAM_STRICT=1``. With ``FXPARAM_DISABLE=1`` no graph is shared at all.
        lower: whether ops of evaluations are rewritten to cheaper forms, which compute the same
            function and derivative up to rounding.
        batch: evaluations of different tensors that are the same computation, of the same shapes,
            run as one where that is faster. False: each runs by itself.
        check_ranks: ranks that share other collectives than each other would wait for ever. None:
            while they compile, one that finds another plan than the first rank's raises. True: they
            also compare what they share, and wait for each other, 20 seconds at most. False: they
            compare nothing.
        **options: as ``torch.compile(options=...)``, handed to ``inner``.

    Raises:
        ValueError: ``inner`` is no registered backend.
        TypeError: ``inner`` is neither a string nor callable, ``max_bytes`` is no number, or
            ``lower``, ``batch`` or ``check_ranks`` no bool.

    Source: https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html

    >>> import torch
    >>> compiled = torch.compile(torch.nn.Linear(2, 2), backend=backend("eager"))
    >>> compiled(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """
    if isinstance(inner, str):
        names = torch.compiler.list_backends(exclude_tags=())
        if inner not in names:
            known = ", ".join(sorted(set(names) - {"fxparam"}))
            raise ValueError(f"inner must be a registered backend: got {inner!r}, known: {known}")
    elif not callable(inner):
        raise TypeError(f"inner must be a backend's name or a callable: got {type(inner).__name__}")
    if not isinstance(max_bytes, (int, float)):
        raise TypeError(f"max_bytes must be a number of bytes: got {kind_of(max_bytes)}")
    for name, switch in {"lower": lower, "batch": batch, "check_ranks": check_ranks}.items():
        unset = name == "check_ranks" and switch is None
        if not (unset or isinstance(switch, bool)):
            raise TypeError(f"{name} must be True or False: got {switch!r}")
    return Backend(inner, mode, options, max_bytes, strict, lower, batch, check_ranks)


#: What the entry point ``fxparam`` names.
default = Backend("inductor")

leave_own_frames_to_eager_code()
see_whole_graphs(Backend)
