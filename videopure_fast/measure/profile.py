"""What a purification costs, stage by stage: time, launches, FLOPs, fraction of the device's roofline, memory."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..files import atomic_write, check_writable
from ..machine import PeakMemory, describe_device, synchronize
from ..ops.backend import full_float32
from ..runtime.spans import Span, listening

STAGES = ("encode", "inversion", "denoising", "flow", "guidance", "decode", "rest")

_REST, _STAGED, _CHAIN, _CALL = "rest", "all stages", "chain", "as called"
_MOST_ROUNDS, _ROUNDS_SECONDS = 5, 2.0
_ROOFLINE_SECONDS = 0.15  # for each size
# torch's own table has the attention of GPUs alone.
_MORE_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
_LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch")  # how the runtimes name the launch of a kernel or a graph
_LABEL = "videopure_fast: "


class Roofline(NamedTuple):
    """What the device reached: FLOP/s of matrix products in the model's dtype; bytes a second read and written."""

    matrix: float
    copy: float


class Stage(NamedTuple):
    """One stage of a call.

    launches: of kernels and graphs, on a CUDA GPU; elsewhere the operations that torch dispatched, views left out.
    flops: of matrix products, convolutions and attention.
    roofline_seconds: the least that the roofline allows for these FLOPs, or, if that is more, for the tensors that
        enter and leave.
    peak_bytes: the most memory held meanwhile, on a CUDA GPU by torch, on the CPU by the process; None: not measured.
    """

    name: str
    seconds: float
    launches: int
    flops: int
    roofline_seconds: float
    peak_bytes: int | None

    @property
    def roofline_fraction(self) -> float:
        """roofline_seconds / seconds: at 1, nothing on this device could be faster."""
        return self.roofline_seconds / self.seconds


@dataclass(frozen=True)
class Profile:
    """What one call of a purifier costs; `print` shows a table.

    stages: those that ran, one after another and each to its end, and last the rest of the call.
    chain: on a CUDA GPU, inversion and denoising as the one graph that usually runs in their place.
    call: the call as it usually runs, where nothing waits but for the end.
    """

    method: str
    shape: tuple[int, ...]
    votes: int
    dtype: str
    device: str
    threads: int
    rounds: int
    roofline: Roofline
    stages: tuple[Stage, ...]
    chain: Stage | None
    call: Stage

    @property
    def staged(self) -> Stage:
        """All stages together."""
        return _together(_STAGED, self.stages)

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, in seconds, bytes, FLOPs and FLOP/s."""

        def row(stage: Stage) -> dict[str, Any]:
            return {**stage._asdict(), "roofline_fraction": stage.roofline_fraction}

        return {
            **{name: getattr(self, name) for name in ("method", "votes", "dtype", "device", "threads", "rounds")},
            "shape": list(self.shape),
            "roofline": {"matrix_flops_per_second": self.roofline.matrix, "copy_bytes_per_second": self.roofline.copy},
            "stages": [row(stage) for stage in self.stages],
            "staged": row(self.staged),
            "captured_chain": None if self.chain is None else row(self.chain),
            "call": row(self.call),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        counted = "launches" if self.device.startswith("cuda") else "operations"
        header = ("stage", "ms", "share", counted, "GFLOP", "roofline ms", "of roofline", "peak MiB")
        whole = (self.staged, *(() if self.chain is None else (self.chain,)), self.call)
        rows = [header, *map(self._cells, (*self.stages, *whole))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        for place in (1 + len(self.stages), 1):
            lines.insert(place, "-" * len(lines[0]))
        shape = "x".join(map(str, self.shape))
        votes = "1 decoded vote" if self.votes == 1 else f"{self.votes} decoded votes"
        return "\n".join(
            [
                f"{self.method} of {shape}, {votes}, {self.dtype}, {self.device}, {self.threads} CPU threads",
                *lines,
                f"roofline: FLOPs at {self.roofline.matrix / 1e9:.4g} GFLOP/s (matrix products in {self.dtype}), or "
                f"the stage's tensors at {self.roofline.copy / 1e9:.4g} GB/s (copies);",
                f"both were measured just now, and times are of the median of {self.rounds} rounds",
            ]
        )

    def _cells(self, stage: Stage) -> tuple[str, ...]:
        return (
            stage.name,
            f"{stage.seconds * 1e3:.2f}",
            f"{stage.seconds / self.staged.seconds:.0%}",
            str(stage.launches),
            f"{stage.flops / 1e9:.2f}",
            f"{stage.roofline_seconds * 1e3:.3f}" if stage.roofline_seconds else "-",
            f"{stage.roofline_fraction:.1%}" if stage.roofline_seconds else "-",
            "not measured" if stage.peak_bytes is None else f"{stage.peak_bytes / 2**20:.0f}",
        )


@torch.no_grad()
def profile(
    purifier: nn.Module, video: Tensor, *, return_votes: bool = True, trace: str | os.PathLike[str] | None = None
) -> Profile:
    """Profiles one call of a Purifier: see its method of this name."""
    if trace is not None:
        check_writable(trace)
    device, dtype = purifier.unet.device, purifier.unet.dtype
    gpu = device.type == "cuda"

    def call(**options: Any) -> Tensor:
        return purifier(video, return_votes=return_votes, generator=torch.Generator().manual_seed(0), **options)

    eager = partial(call, capture=False)
    result = call()  # checks the video, compiles kernels, captures the graph
    counts = _count(eager)
    launches = launches_as_called = Counter({name: count["operations"] for name, count in counts.items()})
    if gpu or trace is not None:
        traced = _trace(eager, STAGES, device, trace)
    if gpu:
        launches, launches_as_called = traced, _trace(call, (_CHAIN,), device)

    rounds: list[_Round] = []
    started = time.perf_counter()
    while len(rounds) < _MOST_ROUNDS and (not rounds or time.perf_counter() - started < _ROUNDS_SECONDS):
        rounds.append(_Round(device))
        with rounds[-1].timed(_STAGED), rounds[-1].listening_to(STAGES):
            eager()
        with rounds[-1].timed(_CALL):
            call()
        if gpu:
            with rounds[-1].listening_to((_CHAIN,)):
                call()
    roofline = measure_roofline(device, dtype)

    # The stages are those of one round, which add up to its whole.
    median = sorted(rounds, key=lambda one: one.seconds[_STAGED])[len(rounds) // 2]
    ran = [name for name in STAGES if name in median.seconds]
    median.seconds[_REST] = median.seconds[_STAGED] - sum(median.seconds[name] for name in ran)

    def stage(name: str) -> Stage:
        flops, moved = counts[name]["flops"], counts[name]["bytes"]
        least = max(flops / roofline.matrix, moved / roofline.copy)
        return Stage(name, median.seconds[name], launches[name], flops, least, median.peaks.get(name))

    def instead_of(parts: Sequence[Stage], name: str, title: str, launched: int) -> Stage:
        """What ran as a whole in place of some stages, and has their work and roofline."""
        seconds = statistics.median(one.seconds[name] for one in rounds)
        return _together(title, parts)._replace(seconds=seconds, launches=launched, peak_bytes=median.peaks[name])

    stages = tuple(stage(name) for name in (*ran, _REST))
    steps = [one for one in stages if one.name in ("inversion", "denoising")]
    chained = _CHAIN in median.seconds and purifier.captured
    return Profile(
        method=purifier.config.method,
        shape=tuple(video.shape),
        votes=result.shape[-5] if return_votes else 1,
        dtype=str(dtype).removeprefix("torch."),
        device=describe_device(device),
        threads=torch.get_num_threads(),
        rounds=len(rounds),
        roofline=roofline,
        stages=stages,
        chain=instead_of(steps, _CHAIN, "captured chain", launches_as_called[_CHAIN]) if chained else None,
        call=instead_of(stages, _CALL, _CALL, launches_as_called.total()),
    )


def _together(name: str, stages: Sequence[Stage]) -> Stage:
    peaks = [stage.peak_bytes for stage in stages if stage.peak_bytes is not None]
    seconds, launches, flops, least = (sum(column) for column in list(zip(*stages, strict=True))[1:5])
    return Stage(name, seconds, launches, flops, least, max(peaks, default=None))


# Listening to the spans of a purifier


class _Outermost:
    """Hears the spans of some names that lie within no other of these: `begin` and `end` are called with each."""

    def __init__(self, names: Collection[str], begin: Callable[[Span], object], end: Callable[[Span], object]) -> None:
        self._names, self._begin, self._end = names, begin, end
        self._depth = 0

    def started(self, span: Span) -> None:
        if span.name in self._names:
            if not self._depth:
                self._begin(span)
            self._depth += 1

    def ended(self, span: Span) -> None:
        if span.name in self._names:
            self._depth -= 1
            if not self._depth:
                self._end(span)


class _Round:
    """Seconds and peak bytes of one round, by name; what is timed runs to its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.peaks: dict[str, int | None] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        memory = PeakMemory(self._device)
        synchronize(self._device)
        start = time.perf_counter()
        yield
        synchronize(self._device)
        self.seconds[name] += time.perf_counter() - start
        peak = memory.read()
        self.peaks[name] = peak if peak is None else max(peak, self.peaks.get(name) or 0)

    @contextmanager
    def listening_to(self, names: Collection[str]) -> Iterator[None]:
        """Time the spans of these names."""
        open_span = ExitStack()
        listener = _Outermost(
            names, lambda span: open_span.enter_context(self.timed(span.name)), lambda _: open_span.close()
        )
        with listening(listener):
            yield


class _Operations(TorchDispatchMode):
    """Counts dispatched operations other than views."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def _count(call: Callable[[], Any]) -> dict[str, Counter[str]]:
    """By stage that ran, and for the rest: operations, FLOPs, bytes of the tensors that entered and left."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    with FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS) as flops, _Operations() as operations:
        before: Counter[str] = Counter()

        def seen() -> Counter[str]:
            return Counter(flops=flops.get_total_flops(), operations=operations.count)

        def begin(_: Span) -> None:
            nonlocal before
            before = seen()

        def end(span: Span) -> None:
            moved = Counter(bytes=sum(tensor.nbytes for tensor in span.tensors))
            found[span.name] += seen() - before + moved

        with listening(_Outermost(STAGES, begin, end)):
            call()
        found[_REST] = seen() - sum(found.values(), Counter())
    return found


def _trace(
    call: Callable[[], Any],
    names: Collection[str],
    device: torch.device,
    path: str | os.PathLike[str] | None = None,
) -> Counter[str]:
    """The launches within the spans of these names, and of the rest; also writes a Chrome trace to `path`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    open_label = ExitStack()
    listener = _Outermost(
        names,
        lambda span: open_label.enter_context(torch.profiler.record_function(_LABEL + span.name)),
        lambda _: open_label.close(),
    )
    with torch.profiler.profile(activities=activities) as profiler:
        with listening(listener):
            call()
        synchronize(device)
    if path is not None:
        with atomic_write(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
    # Unparsed, for torch takes seconds to build its tree of events. A GPU's timeline repeats the labels.
    events = [event for event in profiler.profiler.kineto_results.events() if event.device_type() == DeviceType.CPU]
    timeline = sorted((event.start_ns(), event.duration_ns(), event.name()) for event in events)
    labels = [entry for entry in timeline if entry[2].startswith(_LABEL)]
    launches: Counter[str] = Counter()
    end = 0
    for start, duration, name in timeline:
        if start < end or not _LAUNCH.match(name):
            continue  # also the driver's call within the runtime's
        end = start + duration
        before = bisect_right(labels, start, key=lambda label: label[0]) - 1
        inside = before >= 0 and start <= sum(labels[before][:2])
        launches[labels[before][2].removeprefix(_LABEL) if inside else _REST] += 1
    return launches


@torch.no_grad()
def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """The best of square matrix products and of a copy too large for caches, in under a second."""
    cpu = device.type == "cpu"
    products, copied = ((512, 1024), 2**26) if cpu else ((4096, 8192), 2**29)
    matrix, generator = 0.0, torch.Generator(device).manual_seed(0)
    with full_float32(device):
        for side in products:
            a = torch.randn(side, side, device=device, generator=generator).to(dtype)
            b, c = a.T.contiguous(), torch.empty_like(a)
            matrix = max(matrix, 2 * side**3 / _least_seconds(lambda: torch.mm(a, b, out=c), device))  # noqa: B023
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Roofline(matrix, 2 * copied / _least_seconds(lambda: target.copy_(source), device))


def _least_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of one call. On a GPU several are in flight, which hides the wait for their end."""
    together = 1 if device.type == "cpu" else 10
    call()
    least, stop = float("inf"), time.perf_counter() + _ROOFLINE_SECONDS
    while time.perf_counter() < stop or least == float("inf"):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(together):
            call()
        synchronize(device)
        least = min(least, (time.perf_counter() - start) / together)
    return least
