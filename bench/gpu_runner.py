"""Runs the rows of bench/gpu.py: within a time limit, each written as soon as it is measured, resumed by the next run.

The results file is JSON: {"kind": "gpu", "rows": {name: row}}. A row has what its task measured, or "error" with the
reason, and always what `describe_run` says of the machine and the sources.
"""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from videopure_fast.files import atomic_write, make_folder
from videopure_fast.machine import installed, nvidia_smi

ROOT = Path(__file__).resolve().parents[1]
# A row is measured again when one of these files has changed.
SOURCES = ("videopure_fast", "kernels", "csrc", "bench/*.py")
SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".h", ".safetensors", ".json")
SMI_FIELDS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "most_sm_mhz": "clocks.max.sm",
    "most_memory_mhz": "clocks.max.mem",
}
ALWAYS_MEASURED = "ceiling"  # rows so named are cheap, and belong to the same run as the rows compared with them

Row = dict[str, Any]


class Task(NamedTuple):
    """One row: its name, its stage, and the function that measures it."""

    name: str
    stage: str
    run: Callable[[], Row]


class GateFailed(Exception):
    """The result that was to be timed is not correct."""


class OutOfTime(BaseException):
    """The time limit has passed. Not an Exception: libraries catch those while a task runs."""


def run_tasks(
    tasks: list[Task],
    file: Path,
    device: torch.device,
    *,
    seconds: float,
    again: bool = False,
    shared: Mapping[str, Any] | None = None,
    cleanup: Callable[[], None] = lambda: None,
) -> dict[str, Row]:
    """Measure the tasks that the results file lacks; returns all rows of the file.

    seconds: no task runs longer, all together. again: measure also what the file has. shared: fields of every row.
    cleanup: called after every task.
    """
    results = load_results(file)
    rows, run = results["rows"], describe_run(device)
    deadline = time.monotonic() + seconds
    todo = pending(tasks, rows, run["commit"], again)
    with tqdm(todo, unit="row", disable=None) as bar:
        for task in bar:
            left = deadline - time.monotonic()
            if left <= 0:
                bar.write(f"{len(todo) - bar.n} rows are left; run the same command again to measure them")
                break
            bar.set_description(task.name)
            row = attempt(task, left)
            cleanup()
            row = {"stage": task.stage, **(shared or {}), **row, **run}
            row |= nvidia_smi(device, sm_mhz_just_after="clocks.sm")
            rows[task.name] = row
            save_results(file, results)
            error = row.get("error", "")
            if "CUDA error" in error and "out of memory" not in error:
                bar.write(f"{task.name}: {error}\nthe CUDA context is lost; run the same command again to go on")
                break
    return rows


def pending(tasks: list[Task], rows: Mapping[str, Row], commit: str, again: bool) -> list[Task]:
    """The tasks without a row of these sources, then those whose row is an error.

    A task that failed may fail again and end the CUDA context, so it runs last.
    """
    new, failed = [], []
    for task in tasks:
        row = rows.get(task.name)
        if again or row is None or row["commit"] != commit or task.name.startswith(ALWAYS_MEASURED):
            new.append(task)
        elif "error" in row:
            failed.append(task)
    return new + failed


def attempt(task: Task, seconds: float) -> Row:
    """The task's row, or {"error": the reason}; with "gate_failed" where the result was not correct."""
    try:
        with time_limit(seconds):
            return task.run()
    except OutOfTime:
        return {"error": f"stopped after {seconds:.0f} s; the next run tries again"}
    except GateFailed as error:
        return {"error": str(error), "gate_failed": True}
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"error": f"{type(error).__name__}: {message}"}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds; in the main thread only."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load_results(file: Path) -> dict[str, Any]:
    """The results in a file, or empty ones if there is none. ValueError for a file of another kind."""
    if not file.exists():
        return {"kind": "gpu", "rows": {}}
    found = json.loads(file.read_text())
    if found.get("kind") != "gpu":
        raise ValueError(f"{file} holds other results; accepted: a new file, or one that this script wrote")
    return found


def save_results(file: Path, results: dict[str, Any]) -> None:
    make_folder(file.parent)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def describe_run(device: torch.device) -> Row:
    """The machine, the versions, the sources and the time (UTC): fields of every row."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        **nvidia_smi(device, **SMI_FIELDS),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: installed(name) for name in ("triton", "diffusers", "xformers")},
        "python": platform.python_version(),
        "commit": source_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@cache
def source_version() -> str:
    """The last commit that changed the sources; with local changes "<commit>+<digest>", without git "tree-<digest>"."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    tree = digest.hexdigest()[:8]
    try:
        log, changed = (
            subprocess.run(["git", *arguments, "--", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True)
            for arguments in (("log", "-1", "--format=%h", "--abbrev=12"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return f"tree-{tree}"
    return f"{log.stdout.strip()}+{tree}" if changed.stdout or not log.stdout else log.stdout.strip()


def source_files() -> list[Path]:
    """Sorted; the files of folders at any depth. Links are not followed: kernels/ is read once."""
    found = [path for pattern in SOURCES for path in ROOT.glob(pattern)]
    inside = [file for path in found for file in (path.rglob("*") if path.is_dir() else (path,))]
    return sorted(file for file in inside if file.suffix in SOURCE_SUFFIXES)
