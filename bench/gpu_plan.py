"""The stages of bench/gpu.py in the order of their worth, how long each may take, and the command's options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple


class Stage(NamedTuple):
    """minutes: its share of the time, beside what the stages before it have left over."""

    minutes: float
    what: str


STAGES = {
    "build": Stage(0.5, "the extension, unless one is here that loads"),
    "test": Stage(3, "the test suite's GPU cases: pytest -m gpu tests"),
    "bench": Stage(2.5, "one clip: whole purifications, their stages, the ops, the ceilings of the machine"),
    "tune": Stage(2.5, "every call of a purification in every way; writes the kernels' table, kernels/tuned.json"),
    "tuned": Stage(0.5, "one clip by that table"),
    "batch": Stage(1.5, "several clips, and small ones"),
    "stream": Stage(0.5, "clips that come one by one and share evaluations: throughput, and what a clip takes"),
    "compile": Stage(0.5, "torch.compile, reduce-overhead and max-autotune; what it compiles is kept for the next run"),
    "lossy": Stage(0.5, "one clip with a lossy decoder"),
    "rest": Stage(30, "only where it is named: rows that take minutes, and small ops"),
}
USUAL_STAGES = tuple(name for name in STAGES if name != "rest")


def plan(names: tuple[str, ...] = tuple(STAGES)) -> str:
    """A line for each stage."""
    return "\n".join(f"  {name:8} {STAGES[name].minutes:4g} min  {STAGES[name].what}" for name in names)


def parser(description: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=description, epilog=f"stages:\n{plan()}", formatter_class=formatter)
    names = {"choices": STAGES, "metavar": "STAGE", "default": list(USUAL_STAGES)}
    options.add_argument("--stage", nargs="+", **names, help="which rows, in this order; default: all but rest")
    options.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="only rows whose name has such a text: 'ours', 'op:'"
    )
    options.add_argument("--clips", type=int, nargs="+", help="clips of the large batches; default: 8, with --quick 2")
    options.add_argument("--quick", action="store_true", help="a tiny model, to try the script; its times mean nothing")
    options.add_argument("--device", help="cuda (the default), cuda:1, ..., or cpu to try the script without a GPU")
    options.add_argument("--again", action="store_true", help="measure rows anew that are in the file already")
    options.add_argument("--skip-failed", action="store_true", help="leave out rows whose last attempt failed")
    options.add_argument("--minutes", type=float, help="stop after so many; default: the sum of the stages'")
    options.add_argument("--out", type=Path, help="results file; default: bench/results/<gpu>.json, --quick in build/")
    # For the process that measures: when the first one began, in seconds since 1970.
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--began", type=float, help=argparse.SUPPRESS)
    return options
