"""Times of a call on a GPU or a CPU, its launches, and the call as a CUDA graph."""

from __future__ import annotations

import fcntl
import math
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from videopure_fast.machine import synchronize

LEAST_ROUNDS, MOST_ROUNDS, FEW_ROUNDS = 5, 30, 3
# The calls by which the host enqueues work: videopure_fast.measure counts kernels and graphs alone.
_ENQUEUES = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")


class Timing(NamedTuple):
    """Seconds of one call: median and interquartile range of the rounds, and the number of rounds."""

    median: float
    iqr: float
    rounds: int


def timed(call: Callable[[], Any], device: torch.device, *, seconds: float, quick: bool = False) -> Timing:
    """Times a warm call: 5 to 30 rounds, as many as fit into `seconds`. CUDA events time a GPU.

    Of calls longer than a second 3 rounds are enough; a quick run has no more.
    """
    synchronize(device)
    with turn():
        return _timed(call, device, seconds, quick)


@contextmanager
def turn() -> Iterator[None]:
    """Holds the file that VIDEOPURE_FAST_GPU_LOCK names, if it does: what compiles beside other work on the GPU waits
    until that has ended."""
    path = os.environ.get("VIDEOPURE_FAST_GPU_LOCK")
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _timed(call: Callable[[], Any], device: torch.device, seconds: float, quick: bool) -> Timing:
    first = seconds_of(lambda: (call(), synchronize(device)))
    least = FEW_ROUNDS if first > 1 else LEAST_ROUNDS
    rounds = FEW_ROUNDS if quick else max(least, min(MOST_ROUNDS, int(seconds / first)))
    if device.type != "cuda":
        return _summary([seconds_of(call) for _ in range(rounds)])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        call()
        end.record()
    synchronize(device)
    return _summary([start.elapsed_time(end) / 1e3 for start, end in events])


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds on the host's clock; does not wait for a GPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _summary(samples: list[float]) -> Timing:
    low, _, high = statistics.quantiles(samples, n=4)
    return Timing(statistics.median(samples), high - low, len(samples))


def count_launches(call: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """launches: kernels, graphs, copies and fills that the host enqueued in one call; kernels: those that ran."""
    if device.type != "cuda":
        return {"launches": None, "kernels": None}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        synchronize(device)
    counts = Counter()
    for event in trace.events():
        on_gpu = event.device_type == DeviceType.CUDA
        counts["kernels"] += on_gpu and not event.name.startswith(("Memcpy", "Memset"))
        counts["launches"] += not on_gpu and bool(_ENQUEUES.match(event.name))
    return {name: counts[name] for name in ("launches", "kernels")}


def copies_beyond_cache(device: torch.device, size: int, *, least: int) -> int:
    """The number of inputs of `size` bytes that fill the GPU's L2 cache four times: `least` to 64, or 2 on a CPU.

    One input over and over would be read from the cache.
    """
    if device.type != "cuda":
        return 2
    cache_size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20)
    return max(least, min(64, math.ceil(4 * cache_size / max(size, 1))))


def graph_of(call: Callable[[], Any]) -> Callable[[], None] | None:
    """Replays the call as a CUDA graph, without the host's share of its time; None if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay
