"""What a purification costs, stage by stage: time, launches, FLOPs, distance from the device's floor, memory."""

from __future__ import annotations

import copy
import json
import os
import re
import statistics
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..files import atomic_write, check_writable
from ..machine import PeakMemory, describe_device, synchronize
from ..ops.backend import full_float32

STAGES = ("encode", "inversion", "denoising", "flow", "guidance", "decode", "rest")

_REST, _STAGED, _CHAIN, _CALL = "rest", "all stages", "captured chain", "as called"
_STAGE_OF = {"encode": "encode", "latent_flow": "flow", "vote": "guidance", "decode": "decode"}  # of each method
_MOST_ROUNDS, _ROUNDS_SECONDS = 5, 2.0
_CEILING_SECONDS = 0.15  # for each size
# torch's own table has the attention of GPUs alone.
_MORE_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
_LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch")  # how the runtimes name the launch of a kernel or a graph
_LABEL = "videopure_fast: "

# run(stage, function, *arguments) calls the function, measures, and returns its result.
Run = Callable[..., Any]


class Ceilings(NamedTuple):
    """What the device reached: FLOP/s of matrix products in the model's dtype; bytes a second read and written."""

    matrix: float
    copy: float


class Stage(NamedTuple):
    """One stage of a call.

    launches: of kernels and graphs, on a CUDA GPU; elsewhere the operations that torch dispatched, views left out.
    flops: of matrix products, convolutions and attention.
    floor_seconds: what the ceilings allow for these FLOPs, or for the tensors that enter and leave if that is more.
    peak_bytes: the most memory held meanwhile, on a CUDA GPU by torch, on the CPU by the process; None: not measured.
    """

    name: str
    seconds: float
    launches: int
    flops: int
    floor_seconds: float
    peak_bytes: int | None

    @property
    def of_floor(self) -> float:
        """The achieved fraction of the floor: at 1, nothing on this device could be faster."""
        return self.floor_seconds / self.seconds


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
    ceilings: Ceilings
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
            return {**stage._asdict(), "of_floor": stage.of_floor}

        return {
            **{name: getattr(self, name) for name in ("method", "votes", "dtype", "device", "threads", "rounds")},
            "shape": list(self.shape),
            "ceilings": {"matrix_flops_per_second": self.ceilings.matrix, "copy_bytes_per_second": self.ceilings.copy},
            "stages": [row(stage) for stage in self.stages],
            "staged": row(self.staged),
            "captured_chain": None if self.chain is None else row(self.chain),
            "call": row(self.call),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        counted = "launches" if self.device.startswith("cuda") else "operations"
        header = ("stage", "ms", "share", counted, "GFLOP", "floor ms", "of floor", "peak MiB")
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
                f"floor: FLOPs at {self.ceilings.matrix / 1e9:.4g} GFLOP/s (matrix products in {self.dtype}), or the "
                f"stage's tensors at {self.ceilings.copy / 1e9:.4g} GB/s (copies);",
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
            f"{stage.floor_seconds * 1e3:.3f}" if stage.floor_seconds else "-",
            f"{stage.of_floor:.1%}" if stage.floor_seconds else "-",
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

    def call(model: nn.Module, **options: Any) -> Tensor:
        return model(video, return_votes=return_votes, generator=torch.Generator().manual_seed(0), **options)

    # No graph is captured where a callback wants to see each step.
    eager = partial(call, callback=lambda *_: None)

    result = call(purifier)  # checks the video, compiles kernels, captures the graph
    counts = _count(purifier, eager)
    launches = launches_as_called = Counter({name: count["operations"] for name, count in counts.items()})
    if gpu or trace is not None:
        traced = _trace(lambda run: eager(_staged(purifier, run)), device, trace)
    if gpu:
        launches, launches_as_called = traced, _trace(lambda run: call(_with_chain(purifier, run)), device)

    rounds, started = [], time.perf_counter()
    while len(rounds) < _MOST_ROUNDS and (not rounds or time.perf_counter() - started < _ROUNDS_SECONDS):
        rounds.append(_Round(device))
        rounds[-1].run(_STAGED, eager, _staged(purifier, rounds[-1].run))
        rounds[-1].run(_CALL, call, purifier)
        if gpu:
            call(_with_chain(purifier, rounds[-1].run))
    ceilings = measure_ceilings(device, dtype)

    # The stages are those of one round, which add up to its whole.
    median = sorted(rounds, key=lambda one: one.seconds[_STAGED])[len(rounds) // 2]
    ran = [name for name in STAGES if name in median.seconds]
    median.seconds[_REST] = median.seconds[_STAGED] - sum(median.seconds[name] for name in ran)

    def stage(name: str) -> Stage:
        flops, moved = counts[name]["flops"], counts[name]["bytes"]
        floor = max(flops / ceilings.matrix, moved / ceilings.copy)
        return Stage(name, median.seconds[name], launches[name], flops, floor, median.peaks.get(name))

    def instead_of(parts: Sequence[Stage], name: str, launches: int) -> Stage:
        """What ran as a whole in place of some stages, and has their work and floor."""
        seconds = statistics.median(one.seconds[name] for one in rounds)
        return _together(name, parts)._replace(seconds=seconds, launches=launches, peak_bytes=median.peaks[name])

    stages = tuple(stage(name) for name in (*ran, _REST))
    steps = [one for one in stages if one.name in ("inversion", "denoising")]
    return Profile(
        method=purifier.config.method,
        shape=tuple(video.shape),
        votes=result.shape[-5] if return_votes else 1,
        dtype=str(dtype).removeprefix("torch."),
        device=describe_device(device),
        threads=torch.get_num_threads(),
        rounds=len(rounds),
        ceilings=ceilings,
        stages=stages,
        chain=instead_of(steps, _CHAIN, launches_as_called[_CHAIN]) if _CHAIN in median.seconds else None,
        call=instead_of(stages, _CALL, launches_as_called.total()),
    )


def _together(name: str, stages: Sequence[Stage]) -> Stage:
    peaks = [stage.peak_bytes for stage in stages if stage.peak_bytes is not None]
    seconds, launches, flops, floor = (sum(column) for column in list(zip(*stages, strict=True))[1:5])
    return Stage(name, seconds, launches, flops, floor, max(peaks, default=None))


# Looking at the stages of a purifier


def _staged(purifier: nn.Module, run: Run) -> nn.Module:
    """A copy that shares the models, and runs each of its stages through `run`."""
    watched = copy.copy(purifier)
    inversion, _ = purifier._plan()

    def stage_of(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: run(name, method, *arguments, **options)

    def sample(latents: Tensor, transitions: Sequence[Any], *arguments: Any, **options: Any) -> Iterator[Any]:
        name = "inversion" if transitions == inversion else "denoising"
        steps = purifier.sample(latents, transitions, *arguments, **options)
        while (step := run(name, next, steps, None)) is not None:
            yield step

    for method, name in _STAGE_OF.items():
        setattr(watched, method, stage_of(name, getattr(purifier, method)))
    watched.sample = sample
    return watched


def _with_chain(purifier: nn.Module, run: Run) -> nn.Module:
    """A copy that runs its captured graph through `run`."""
    watched = copy.copy(purifier)
    watched._engine = _WatchedEngine(purifier._engine, run)
    return watched


class _WatchedEngine:
    def __init__(self, engine: Any, run: Run) -> None:
        self._engine = engine
        self._run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def captured(self, *arguments: Any) -> tuple[Tensor, ...]:
        return self._run(_CHAIN, self._engine.captured, *arguments)


class _Round:
    """Times and peaks of one round, by name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.peaks: dict[str, int | None] = {}

    def run(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        memory = PeakMemory(self._device)
        synchronize(self._device)
        start = time.perf_counter()
        result = function(*arguments, **options)
        synchronize(self._device)
        self.seconds[name] += time.perf_counter() - start
        peak = memory.read()
        self.peaks[name] = peak if peak is None else max(peak, self.peaks.get(name) or 0)
        return result


class _Operations(TorchDispatchMode):
    """Counts dispatched operations other than views."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def _count(purifier: nn.Module, call: Callable[[nn.Module], Any]) -> dict[str, Counter[str]]:
    """Of each stage that ran, and the rest: operations, FLOPs, bytes of the tensors that entered and left."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    with FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS) as flops, _Operations() as operations:

        def seen() -> Counter[str]:
            return Counter(flops=flops.get_total_flops(), operations=operations.count)

        def run(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            before = seen()
            result = function(*arguments, **options)
            tensors = [leaf for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, Tensor)]
            found[name] += seen() - before + Counter(bytes=sum(tensor.nbytes for tensor in tensors))
            return result

        call(_staged(purifier, run))
        found[_REST] = seen() - sum(found.values(), Counter())
    return found


def _trace(
    call: Callable[[Run], Any], device: torch.device, path: str | os.PathLike[str] | None = None
) -> Counter[str]:
    """The launches of each stage and of the rest; also writes a Chrome trace to `path`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def run(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(_LABEL + name):
            return function(*arguments, **options)

    with torch.profiler.profile(activities=activities) as profiler:
        call(run)
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
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
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
    return Ceilings(matrix, 2 * copied / _least_seconds(lambda: target.copy_(source), device))


def _least_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call; several are in flight on a GPU, which hides the wait for their end."""
    together = 1 if device.type == "cpu" else 10
    call()
    least, stop = float("inf"), time.perf_counter() + _CEILING_SECONDS
    while time.perf_counter() < stop or least == float("inf"):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(together):
            call()
        synchronize(device)
        least = min(least, (time.perf_counter() - start) / together)
    return least
