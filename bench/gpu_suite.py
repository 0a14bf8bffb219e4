"""The test suite's GPU cases as a row of bench/gpu.py, and the pytest plugin that writes each failure as it comes.

The plugin is this module: `pytest -p gpu_suite`. Under pytest-xdist only the main process writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_runner import ROOT, OutOfTime, Row, load_results, save_results

NAME = "gpu tests"
FILE_VARIABLE = "VIDEOPURE_FAST_GPU_RESULTS"
MOST_PROCESSES = 16
RAN_THROUGH = (0, 1, 5)  # pytest's exit statuses: all passed, some failed, there were none
MOST_LINES = 3  # of a failure's message
WRITTEN_EVERY = 20  # seconds, where nothing fails


def run_suite(file: Path, arguments: tuple[str, ...] = ("-m", "gpu", "tests")) -> Row:
    """Runs pytest, on several cores where pytest-xdist is installed; what it found by the time limit, if that comes.

    file: the results file, whose row of the suite is kept up to date meanwhile.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "gpu_suite", *arguments]
    cores = min(MOST_PROCESSES, os.cpu_count() or 1)
    parallel = find_spec("xdist") is not None and cores > 1
    paths = [str(ROOT / "bench"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, FILE_VARIABLE: str(file), "PYTHONPATH": os.pathsep.join(paths)}
    if parallel:
        command += ["-n", str(cores)]
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // cores))
    began, why = time.monotonic(), "pytest ended early"
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        why += f": {(done.stdout + done.stderr).strip().splitlines()[-1]}"
    except OutOfTime:
        why = "stopped at the time limit; the next run tries again"
    row = load_results(file)["rows"].get(NAME, {})
    found = {key: row.get(key, 0) for key in ("passed", "failed", "skipped")}
    found |= {"failures": row.get("failures", []), "processes": cores if parallel else 1}
    found |= {"seconds": time.monotonic() - began}
    if not row.get("ended", False):
        found["error"] = why
    if found["failed"] or (row.get("ended", False) and not found["passed"]):
        found |= {"error": f"{found['failed']} failed, {found['passed']} passed", "gate_failed": True}
    return found


class FailureWriter:
    """A pytest plugin that counts outcomes and writes them, with the failures, into the row of a results file."""

    def __init__(self, file: Path) -> None:
        self._file, self._failures = file, []
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}
        self._written = time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test passes where its call does; a failure or a skip may come from its fixtures.
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
        if report.failed:
            self._add_failure(report)
        if report.failed or time.monotonic() - self._written > WRITTEN_EVERY:
            self._write()

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is one failure; pytest-xdist goes on without it."""
        if report.failed:
            self._counts["failed"] += 1
            self._add_failure(report)
            self._write()

    def _add_failure(self, report: Any) -> None:
        lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
        seconds = round(getattr(report, "duration", 0.0), 2)
        error = "\n".join(lines[:MOST_LINES])
        self._failures.append({"test": report.nodeid, "seconds": seconds, "error": error})

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._write(ended=exitstatus in RAN_THROUGH)

    def _write(self, **fields: bool) -> None:
        results = load_results(self._file)
        results["rows"].setdefault(NAME, {}).update(self._counts, failures=self._failures, **fields)
        save_results(self._file, results)
        self._written = time.monotonic()


def pytest_configure(config: Any) -> None:
    file = os.environ.get(FILE_VARIABLE)
    if file and not hasattr(config, "workerinput"):  # a process of pytest-xdist has it
        config.pluginmanager.register(FailureWriter(Path(file)))
