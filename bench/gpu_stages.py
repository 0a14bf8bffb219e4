"""The rows of each stage of bench/gpu.py, and the process that measures them."""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_ops import ACTIVATIONS, OPS
from diffusers.utils import logging
from gpu_models import DTYPE, BenchModels, Workload
from gpu_ops import op_row
from gpu_plan import STAGES, plan
from gpu_profile import kernels_by_kind
from gpu_rows import (
    COMPILED_PATHS,
    FIRST_CALLS,
    copy_ceiling,
    first_call,
    label,
    lossy,
    matrix_ceiling,
    purification,
    stages,
    stream,
)
from gpu_runner import (
    ROOT,
    WRITTEN,
    LostContext,
    OutOfTime,
    Row,
    Task,
    load_results,
    run_tasks,
    source_version,
    time_limit,
)
from gpu_suite import NAME as SUITE
from gpu_suite import run_suite
from gpu_table import print_table
from op_baselines import LIBRARY
from tune_calls import recorded_calls

from videopure_fast.machine import nvidia_smi
from videopure_fast.ops.backend import SUPPORTED_DTYPES

GATE_FAILED, LOST = 3, 4  # exit statuses: a result was not correct; this process can measure no more
USUAL_PATHS = ("ours", "authors", "algebra-captured", "algebra", "ours-eager", "authors-xformers")
COMPARED_PATHS = ("ours", "authors", "algebra")  # at another size, and with another flow
STAGED_PATHS = ("ours", "algebra")
TUNE_SECONDS = 20  # for one call; a kernel that never ends takes no more


class Run:
    """What the stages share: the command's options, the device, the models and the files."""

    def __init__(self, given: argparse.Namespace, device: torch.device) -> None:
        self.given, self.device = given, device
        self.models = BenchModels(device, given.quick)
        self.file = given.out or results_file(device, given.quick)
        self.tune_file = self.file.with_name(f"tune-{self.file.name}")
        frames, side = (4, 16) if given.quick else (32, 224)
        self.usual = Workload(1, frames, side, side)
        self.batches = sorted(set(given.clips or ((2,) if given.quick else (8,))))
        self.on_cpu = device.type == "cpu"

    def task(self, stage: str, name: str, run: Callable[..., Row], *arguments: Any) -> Task:
        return Task(name, stage, partial(run, *arguments))

    def purifications(self, stage: str, paths: tuple[str, ...], *workloads: Workload) -> list[Task]:
        pairs = [(path, workload) for workload in workloads for path in paths]
        return [
            self.task(stage, f"purification: {path}, {workload}", purification, self.models, path, workload)
            for path, workload in pairs
        ]

    def stage_rows(self, stage: str, *workloads: Workload) -> list[Task]:
        pairs = [(path, workload) for workload in workloads for path in STAGED_PATHS]
        return [self.task(stage, f"stages: {path}, {w}", stages, self.models, path, w) for path, w in pairs]

    def op_rows(self, stage: str, *sizes: str) -> Iterator[Task]:
        for size in sizes:
            for make in OPS:
                op = make.__name__
                native = [form for form in SUPPORTED_DTYPES[op] if (form == "cpu") == self.on_cpu]
                for form in (*native, "reference", *(("library",) if op in LIBRARY else ())):
                    yield self.task(stage, f"op: {op}, {size}, {form}", op_row, self.models, make, size, form)


def build_tasks(run: Run) -> list[Task]:
    return [Task("build", "build", partial(build, run.on_cpu))]


def build(on_cpu: bool) -> Row:
    """Builds the extension, unless one is here that loads and has the kernels of the device."""
    found = "from videopure_fast import _C; raise SystemExit(not (_C.has_cuda or {on_cpu}))"
    loads = [sys.executable, "-c", found.format(on_cpu=on_cpu)]
    if subprocess.run(loads, cwd=ROOT, capture_output=True).returncode == 0:
        return {"built": False}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:  # the Triton kernels need no compiler
        return {"error": (done.stderr.strip().splitlines() or ["the build failed"])[-1]}
    return {"built": True}


def test_tasks(run: Run) -> list[Task]:
    return [] if run.on_cpu else [Task(SUITE, "test", partial(run_suite, run.file))]


def bench_tasks(run: Run) -> list[Task]:
    """One clip of the usual size; then its ops, another size and another flow."""
    usual, models = run.usual, run.models
    other = Workload(1, usual.frames // 2, usual.height * 8 // 7, usual.width * 8 // 7)
    return [
        run.task("bench", f"first call: ours, {usual}", first_call, models, usual),
        *run.purifications("bench", USUAL_PATHS[:1], usual),
        *run.stage_rows("bench", usual)[:1],
        run.task("bench", f"kernels: ours, {usual}", kernels_by_kind, models, usual),
        run.task("bench", f"label: ours, {usual}", label, models, usual),
        *run.purifications("bench", USUAL_PATHS[1:3], usual),
        *run.stage_rows("bench", usual)[1:],
        run.task("bench", "ceiling: copies", copy_ceiling, models),
        run.task("bench", "ceiling: matrix products", matrix_ceiling, models),
        *run.purifications("bench", USUAL_PATHS[3:], usual),
        *run.op_rows("bench", "small" if models.quick else "full"),
        *run.purifications("bench", COMPARED_PATHS, other, usual._replace(flow="raft")),
    ]


def tune_tasks(run: Run) -> list[Task]:
    """Every distinct call of a purification. Without a GPU the calls are in float32, which all forms take."""
    import tune  # needs triton

    models = run.models
    dtype = torch.float32 if run.on_cpu else DTYPE
    calls = recorded_calls(models.purifier(run.usual, dtype, fast=True), models.clips(run.usual))
    found = [(call, tune.ways_of(call, run.device)) for call in calls]
    compilation = Task("compilation", "tune", partial(tune.compile_all, found, run.device))
    row = partial(tune.call_row, device=run.device, quick=models.quick)
    return [
        compilation,
        *(Task(str(call.signature), "tune", partial(row, call, ways), TUNE_SECONDS) for call, ways in found),
    ]


def tuned_tasks(run: Run) -> list[Task]:
    """What the kernels' table, as it is now, has made of one clip."""
    tasks = [*run.purifications("tuned", ("ours",), run.usual), *run.stage_rows("tuned", run.usual)[:1]]
    tasks.append(run.task("tuned", f"kernels: ours, {run.usual}", kernels_by_kind, run.models, run.usual))
    tasks.append(run.task("tuned", f"label: ours, {run.usual}", label, run.models, run.usual))
    for how in FIRST_CALLS[1:]:  # the kernels are compiled by now
        tasks.append(run.task("tuned", f"first call {how}: ours, {run.usual}", first_call, run.models, run.usual, how))
    return [task._replace(name=f"tuned {task.name}") for task in tasks]


def batch_tasks(run: Run) -> list[Task]:
    """Several clips of the usual size, and small clips alone and together."""
    usual = [run.usual._replace(clips=n) for n in run.batches]
    frames, side, counts = (4, 16, (1, 3)) if run.given.quick else (16, 128, (1, 4, 16))
    small = [Workload(n, frames, side, side) for n in counts if Workload(n, frames, side, side) != run.usual]
    paths = ("ours", "algebra-captured")
    return [
        *run.purifications("batch", paths, *usual),
        *run.purifications("batch", ("ours",), *small),
        *run.stage_rows("batch", *usual)[:1],
    ]


def stream_tasks(run: Run) -> list[Task]:
    """Small clips, which do not fill a GPU alone, by how many share an evaluation; and the usual ones."""
    small, most = (Workload(1, 4, 16, 16), (1, 2)) if run.given.quick else (Workload(1, 16, 128, 128), (1, 4, 16))
    return [
        *(run.task("stream", f"stream: {small}, {n} at once", stream, run.models, small, n) for n in most),
        *(run.task("stream", f"stream: {run.usual}, {n} at once", stream, run.models, run.usual, n) for n in most[:2]),
    ]


def compile_tasks(run: Run) -> list[Task]:
    return run.purifications("compile", COMPILED_PATHS, run.usual)


def lossy_tasks(run: Run) -> list[Task]:
    return [run.task("lossy", f"purification: ours, taesd, {run.usual}", lossy, run.models, run.usual)]


def rest_tasks(run: Run) -> list[Task]:
    """What takes minutes a row, and what says little."""
    usual = [run.usual._replace(clips=n) for n in run.batches]
    sizes = [size for size in ACTIVATIONS if size == "small"] if not run.given.quick else []
    return [*run.op_rows("rest", *sizes), *run.purifications("rest", ("authors", *COMPILED_PATHS), *usual)]


TASKS: dict[str, Callable[[Run], list[Task]]] = {
    "build": build_tasks,
    "test": test_tasks,
    "bench": bench_tasks,
    "tune": tune_tasks,
    "tuned": tuned_tasks,
    "batch": batch_tasks,
    "stream": stream_tasks,
    "compile": compile_tasks,
    "lossy": lossy_tasks,
    "rest": rest_tasks,
}


def work(given: argparse.Namespace, fail: Callable[[str], Any]) -> int:
    """Measures what the results files lack, stage by stage; returns the exit status. fail: is told of bad options."""
    logging.set_verbosity_error()  # diffusers warns of every cast
    check_options(given, fail)
    run = Run(given, chosen_device(given, fail))
    chosen = tuple(given.stage)
    allowed = [60 * STAGES[name].minutes for name in chosen]
    began = limit = given.began or time.time()
    end = began + (60 * given.minutes if given.minutes else sum(allowed))
    if not given.began:
        where = "a CPU" if run.on_cpu else torch.cuda.get_device_name(run.device)
        print(f"{where}: at most {(end - began) / 60:g} min; rows go to {run.file}\n{plan(chosen)}", flush=True)
    rows: dict[str, Row] = {}
    for position, name in enumerate(chosen):
        limit = end if len(chosen) == 1 else min(end, limit + allowed[position])
        started = time.time()
        try:
            found = measure(run, name, limit - started)
        except LostContext as error:
            print(error, file=sys.stderr)
            return LOST
        rows |= found
        later = chosen[position + 1 :]
        print(progress(name, found, time.time() - started, max(0, end - time.time()), later), flush=True)
    if not rows and any(given.only):
        fail(f"no row is named like {' or '.join(given.only)!r}; a run without --only names them all")
    return conclude(run, rows)


def conclude(run: Run, rows: dict[str, Row]) -> int:
    """Prints the rows and where they are; returns the exit status."""
    shown = [name for name, row in rows.items() if row["stage"] != "tune"]
    if shown:
        print_table({**load_results(run.file)["rows"], **rows}, shown)
    print("\n".join(["", *(str(file) for file in (run.file, run.tune_file) if file.exists())]))
    return GATE_FAILED if any(row.get("gate_failed") for row in rows.values()) else 0


def measure(run: Run, name: str, seconds: float) -> dict[str, Row]:
    """The rows of a stage, by name, with those that the results file had already."""
    if seconds <= 0:
        return {}
    given, tuning = run.given, name == "tune"
    try:
        with time_limit(seconds):
            tasks = [task for task in TASKS[name](run) if any(text in task.name for text in given.only)]
    except (Exception, OutOfTime) as error:
        print(f"{name}: no rows ({type(error).__name__}: {error})", file=sys.stderr)
        return {}

    def after() -> Row:
        run.models.free_memory()
        return nvidia_smi(run.device, sm_mhz_just_after="clocks.sm")

    table, before = table_digest(), load_results(run.file)["rows"]
    other_table = name == "tuned" and any(before.get(task.name, {}).get("table") != table for task in tasks)
    rows = run_tasks(
        tasks,
        run.tune_file if tuning else run.file,
        run.device,
        seconds=seconds,
        again=given.again or other_table,
        skip_failed=given.skip_failed,
        kind="tune" if tuning else "gpu",
        shared={"model": "small" if given.quick else "full", "table": table},
        after=dict if tuning else after,
    )
    # Rows of other sources may be left in the file, where there was no time to measure them again.
    named = ((task.name, rows.get(task.name, {})) for task in tasks)
    found = {task: row for task, row in named if row.get("commit") == source_version()}
    if tuning and not run.on_cpu and not given.quick:
        import tune

        major, minor = torch.cuda.get_device_capability(run.device)
        tune.write_table(found, 10 * major + minor, torch.cuda.get_device_name(run.device))
    run.models.free_memory()
    return found


def table_digest() -> str | None:
    """Tells the kernels' table from other ones; None where there is none."""
    return hashlib.sha256(WRITTEN.read_bytes()).hexdigest()[:8] if WRITTEN.exists() else None


def progress(name: str, rows: dict[str, Row], seconds: float, left: float, later: tuple[str, ...]) -> str:
    failed = sum("error" in row for row in rows.values())
    note = f", {failed} of them errors" if failed else ""
    rest = f"; {left / 60:.1f} min left for {', '.join(later)}" if later else ""
    return f"{name}: {len(rows)} rows in {seconds:.0f} s{note}{tune_summary(rows) if name == 'tune' else ''}{rest}"


def tune_summary(rows: dict[str, Row]) -> str:
    """How long the calls of one purification take together, as they are and at best."""
    measured = [row for row in rows.values() if row.get("fastest") and "median" in row]
    if not measured:
        return ""
    shipped = sum(row["median"] * sum(row["counts"].values()) for row in measured)
    best = sum(row["ways"][row["fastest"]]["median"] * sum(row["counts"].values()) for row in measured)
    return f"; calls take {1e3 * shipped:.1f} ms, each in its fastest way {1e3 * best:.1f} ms"


def check_options(given: argparse.Namespace, fail: Callable[[str], Any]) -> None:
    if min(given.clips or [1]) < 1 or not 0 < (given.minutes or 1) < math.inf:
        fail(f"--clips must be 1 or more and --minutes more than 0, got {given.clips} and {given.minutes}")


def chosen_device(given: argparse.Namespace, fail: Callable[[str], Any]) -> torch.device:
    try:
        device = torch.empty(0, device=given.device or "cuda").device
    except (RuntimeError, AssertionError) as error:
        fail(f"no such device here ({str(error).splitlines()[0]}); --device cpu --quick tries the script")
    if device.type != "cuda" and not given.quick:
        fail("the full-size model is for a GPU; add --quick")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def results_file(device: torch.device, quick: bool) -> Path:
    """bench/results/<gpu>.json; a quick run's in build/."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "build" / f"{slug}-quick.json" if quick else ROOT / "bench" / "results" / f"{slug}.json"
