"""The rows of bench/gpu.py as a table in a terminal."""

from __future__ import annotations

import sys

from gpu_runner import Row

HEADER = ("row", "ms", "IQR", "x (1)", "peak GiB", "launches", "error / (1)'s", "note")
MAX_NOTE = 90  # characters; the results file has the whole note
PIPED_WIDTH = 200  # characters


def print_table(rows: dict[str, Row], names: list[str]) -> None:
    """A line for each name that has a row; x (1): how many times as fast as (1), the authors' algorithm."""
    lines = []
    for name in names:
        if name in rows:
            *cells, note = _cells(name, rows)
            lines.append((name, *cells, note[:MAX_NOTE]))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a GPU's machine may have no more than the models need
        for name, *cells in (HEADER, *lines):
            print(f"{name:52}", *(f"{cell:>10}" for cell in cells))
        return
    table = Table(box=None)
    for title in HEADER:
        at_left = title in ("row", "note")
        table.add_column(title, justify="left" if at_left else "right", no_wrap=True, min_width=len(title))
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def _cells(name: str, rows: dict[str, Row]) -> tuple[str, ...]:
    """The cells of a row beside its name; what stands in no column of its own is the note."""
    row = rows[name]
    if "error" in row:
        return ("-", "", "", "", "", "", row["error"])
    error = f"{row['mean_error']:.2g} / {row['mean_error_of_authors']:.2g}" if "mean_error" in row else ""
    if "median" not in row:
        return ("", "", "", "", "", error, _note(row))
    usual = name.removeprefix("tuned ")
    authors = rows.get(usual.replace(row["path"], "authors", 1), {}) if "path" in row else {}
    peak, launches = row.get("peak_memory"), row.get("launches")
    return (
        f"{row['median'] * 1e3:.4g}",
        f"{row['iqr'] * 1e3:.2g}",
        f"{authors['median'] / row['median']:.2f}" if "median" in authors else "",
        "" if peak is None else f"{peak / 2**30:.2f}",
        "" if launches is None else str(launches),
        error,
        "; ".join(row.get("warnings", ())),
    )


def _milliseconds(stage: Row) -> float:
    """The time of a stage, or of its kernels together."""
    if "median" in stage:
        return 1e3 * stage["median"]
    return 1e3 * sum(kind["seconds"] for kind in stage["kinds"].values())


def _note(row: Row) -> str:
    """What a row without a time of its own says: its stages' milliseconds, a ceiling, or tests that passed."""
    if "stages" in row:
        return ", ".join(f"{stage} {_milliseconds(timing):.3g}" for stage, timing in row["stages"].items())
    if "bytes_per_second" in row:
        return f"{row['bytes_per_second'] / 1e9:.4g} GB/s"
    if "flops_per_second" in row:
        return f"{row['flops_per_second'] / 1e12:.4g} TFLOP/s"
    if "first_call" in row:
        return f"first call {row['first_call']:.3g} s, second {row['second_call']:.3g} s"
    if "service" in row:
        return f"{row['clips_per_second']:.3g} clips/s"
    if "passed" in row:
        return f"{row['passed']} passed, {row['skipped']} skipped"
    return "built" if row["built"] else "was built before"
