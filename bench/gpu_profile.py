"""The kernels of a purification by stage and by kind of operation, to hold against what bench/predict.py expects.

Steps are eager, so that the profiler can tell which operation has launched a kernel; the kernels are those of the
captured graph.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from gpu_models import BenchModels, Workload, describe
from gpu_rows import stage_calls
from gpu_runner import Row
from predict import KINDS
from torch.profiler import ProfilerActivity, profile

from videopure_fast.machine import synchronize

MOST_ROWS = 60  # of kernels, and of operations by shape, that a stage keeps
MOST_NAME = 120  # characters of a kernel's name
# What torch calls on a GPU in the place of the operation that was counted on the meta device.
ON_GPU = {"scaled_dot_product_attention": "_scaled_dot_product_flash_attention"}


def kernels_by_kind(models: BenchModels, workload: Workload) -> Row:
    """Seconds and launches of each stage's kernels: by kind of operation, by kernel, and by operation and shapes."""
    purifier, clips = models.purifier(workload, fast=True), models.clips(workload)
    row: Row = {**describe(workload), "stages": {}}
    with purifier._inference(clips):
        for stage, call in stage_calls(purifier, clips).items():
            call()
            synchronize(models.device)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if models.device.type == "cuda" else [])]
            with profile(activities=activities, record_shapes=True) as trace:
                call()
                synchronize(models.device)
            row["stages"][stage] = summary(trace.events())
    return row


def summary(events: Any) -> Row:
    """A stage's kernels, summed in three ways, the longest first."""
    kinds: dict[str, Counter[str]] = {kind.name: Counter() for kind in KINDS}
    kernels: dict[str, Counter[str]] = defaultdict(Counter)
    operations: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        for kernel in event.kernels:  # those that this very event has launched
            taken = {"microseconds": kernel.duration, "launches": 1}
            kinds[kind_of(event)].update(taken)
            kernels[kernel.name[:MOST_NAME]].update(taken)
            operations[f"{event.name} {event.input_shapes}"].update(taken)
    return {
        "kinds": {name: {"seconds": c["microseconds"] / 1e6, "launches": c["launches"]} for name, c in kinds.items()},
        "kernels": _longest(kernels),
        "operations": _longest(operations),
    }


def kind_of(event: Any) -> str:
    """The kind of the innermost operation around an event that has one."""
    while event is not None:
        name = event.name.rpartition("::")[2].removesuffix("_")
        name = ON_GPU.get(name, name)
        for kind in KINDS:
            if name in kind.operations:
                return kind.name
        event = event.cpu_parent
    return KINDS[-1].name


def _longest(found: dict[str, Counter[str]]) -> list[tuple[str, int, float]]:
    """(name, launches, microseconds together)."""
    rows = [(name, count["launches"], round(count["microseconds"], 1)) for name, count in found.items()]
    return sorted(rows, key=lambda row: -row[2])[:MOST_ROWS]
