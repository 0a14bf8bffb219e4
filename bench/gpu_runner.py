"""Runs the rows of bench/gpu.py: within a time limit, each written as soon as it is measured, resumed by the next run.

The results file is JSON: {"kind": "gpu", "rows": {name: row}}. A row has what its task measured, or "error" with the
reason, and always what `describe_run` says of the machine and the sources. While a task runs its row says that it has
not ended, which remains where the process is lost.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import math
import platform
import re
import signal
import subprocess
import sys
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
WRITTEN = ROOT / "kernels" / "tuned.json"  # by one of the stages: no source
SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".h", ".safetensors", ".json")
SMI_FIELDS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "most_sm_mhz": "clocks.max.sm",
    "most_memory_mhz": "clocks.max.mem",
}
# Rows so named are cheap. A ceiling belongs to the same run as the rows compared with it.
ALWAYS_MEASURED = ("ceiling", "build", "compilation")
# Seconds after a task's limit at which the process is ended: a kernel that never ends cannot be interrupted.
GRACE = 15
_LOST = re.compile(r"CUDA error|illegal memory access|misaligned address|unspecified launch failure|device-side assert")

Row = dict[str, Any]


class Task(NamedTuple):
    """One row: its name, its stage, the function that measures it, and the most seconds that it may take."""

    name: str
    stage: str
    run: Callable[[], Row]
    seconds: float = math.inf


class GateFailed(Exception):
    """The result that was to be timed is not correct."""


class LostContext(Exception):
    """An error after which this process can no longer use the GPU."""


class OutOfTime(BaseException):
    """The time limit has passed. Not an Exception: libraries catch those while a task runs."""


def run_tasks(
    tasks: list[Task],
    file: Path,
    device: torch.device,
    *,
    seconds: float,
    again: bool = False,
    skip_failed: bool = False,
    kind: str = "gpu",
    shared: Mapping[str, Any] | None = None,
    after: Callable[[], Row] = dict,
) -> dict[str, Row]:
    """Measure the tasks that the results file lacks; returns all rows of the file.

    seconds: no task runs longer, all together. again: measure also what the file has. skip_failed: leave out tasks
    whose row is an error. kind: of the results file. shared: fields of every row. after: called after every task, it
    returns more fields of the row. LostContext if the process can measure no more.
    """
    results = load_results(file, kind)
    rows, run = results["rows"], describe_run(device)
    deadline = time.monotonic() + seconds
    todo = pending(tasks, rows, run["commit"], again=again, skip_failed=skip_failed)
    with tqdm(todo, unit="row", disable=None) as bar:
        for task in bar:
            left = min(deadline - time.monotonic(), task.seconds)
            if left <= 0:
                break
            bar.set_description(task.name)
            fields = {"stage": task.stage, **(shared or {}), **run}
            rows[task.name] = {**fields, "error": "began and did not end"}
            save_results(file, results)
            row = attempt(task, left)
            rows[task.name] = {**fields, **row, **after()}
            save_results(file, results)
            if lost_context(row.get("error", "")):
                raise LostContext(f"{task.name}: {row['error']}")
    return rows


def lost_context(error: str) -> bool:
    """Whether an error's message means that this process can no longer use the GPU."""
    return bool(_LOST.search(error)) and "out of memory" not in error


def pending(
    tasks: list[Task], rows: Mapping[str, Row], commit: str, *, again: bool = False, skip_failed: bool = False
) -> list[Task]:
    """The tasks without a row of these sources, then those whose row is an error.

    A task that failed may fail again and end the process, so it runs last.
    """
    new, failed = [], []
    for task in tasks:
        row = rows.get(task.name)
        current = row is not None and row["commit"] == commit
        if current and "error" in row:
            failed.append(task)
        elif again or not current or task.name.startswith(ALWAYS_MEASURED):
            new.append(task)
    return new + ([] if skip_failed else failed)


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
    """Raises OutOfTime in the block after so many seconds, and a little later ends the process; in the main thread."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    faulthandler.dump_traceback_later(max(seconds, 0) + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load_results(file: Path, kind: str = "gpu") -> dict[str, Any]:
    """The results in a file, or empty ones if there is none. ValueError for a file of another kind."""
    if not file.exists():
        return {"kind": kind, "rows": {}}
    found = json.loads(file.read_text())
    if found.get("kind") != kind:
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
    tree, others = digest.hexdigest()[:8], f":(exclude){WRITTEN.relative_to(ROOT)}"
    try:
        log, changed = (
            subprocess.run(
                ["git", *given, "--", *SOURCES, others], cwd=ROOT, capture_output=True, text=True, check=True
            )
            for given in (("log", "-1", "--format=%h", "--abbrev=12"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return f"tree-{tree}"
    return f"{log.stdout.strip()}+{tree}" if changed.stdout or not log.stdout else log.stdout.strip()


def source_files() -> list[Path]:
    """Sorted; the files of folders at any depth. Links are not followed: kernels/ is read once."""
    found = [path for pattern in SOURCES for path in ROOT.glob(pattern)]
    inside = [file for path in found for file in (path.rglob("*") if path.is_dir() else (path,))]
    return sorted(file for file in inside if file.suffix in SOURCE_SUFFIXES and file != WRITTEN)
