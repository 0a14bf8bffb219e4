"""Tables of benchmark runs, for a terminal: one run, its stages, and a comparison of two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .benchmark import Pair, Setting
from .profile import STAGES


def run_table(run: Mapping[str, Any]) -> Table:
    """Throughput, latency percentiles and memory: a row for each setting, and the reasons where one has no figures."""
    settings = run["settings"]
    table = Table(
        title=f"{settings['model']}, {settings['method']}, T={settings['inversion_steps']}, {settings['votes']} votes "
        f"decoded, on {run['machine']['device']}, {run['machine']['threads']} CPU threads"
    )
    for column in ("backend", "dtype", "decoder"):
        table.add_column(column)
    lossy = any(row.get("mean_difference_from_full_decoder") is not None for row in run["rows"])
    last = ("calls", "peak MiB", *(("decoder's error",) if lossy else ()))
    for column in ("clip", "batch", "warm-up s", "clips/s", "p50", "p95", "p99 s/clip", *last):
        table.add_column(column, justify="right")
    for row in run["rows"]:
        shape = f"{row['frames']}x{row['height']}x{row['width']}"
        name = (row["backend"], row["dtype"], row["decoder"], shape, str(row["batch"]))
        if "not_measured" in row:
            table.add_row(*name, "not measured")
            continue
        table.add_row(
            *name,
            f"{row['first_call_seconds']:.3g}",
            f"{row['clips_per_second']:.4g}",
            *(f"{row['seconds_per_clip'][p]:.4g}" for p in ("p50", "p95", "p99")),
            str(row["calls"]),
            "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            *([f"{row['mean_difference_from_full_decoder'] or 0:.3g}"] if lossy else []),
        )
    if reasons := {row["not_measured"] for row in run["rows"] if "not_measured" in row}:
        table.caption = "not measured: " + "; ".join(sorted(reasons))
    return table


def stage_table(run: Mapping[str, Any]) -> Table:
    """Milliseconds of each stage of one call, the stages run one after another, for each setting with a profile."""
    table = Table("setting", title="Milliseconds of a call's stages, each run to its end; percent of the roofline")
    for stage in STAGES:
        table.add_column(stage, justify="right")
    for row in run["rows"]:
        if not row.get("profile"):
            continue
        found = {stage["name"]: stage for stage in row["profile"]["stages"]}
        cells = []
        for stage in STAGES:
            seen = found.get(stage)
            percent = f" ({seen['roofline_fraction']:.0%})" if seen and seen["flops"] else ""
            cells.append(f"{seen['seconds'] * 1e3:.4g}{percent}" if seen else "-")
        table.add_row(str(Setting(**{axis: row[axis] for axis in Setting._fields})), *cells)
    return table


def comparison_table(pairs: Sequence[Pair]) -> Table:
    """Throughput, latency and memory of two runs, side by side, for each setting that both measured."""
    table = Table("setting", title="A and B; a ratio is B's figure over A's")
    for column in ("clips/s A", "B", "ratio", "p50 s/clip A", "B", "ratio", "p95 ratio", "p99 ratio", "peak ratio"):
        table.add_column(column, justify="right")
    for name, a, b in pairs:
        throughput = a["clips_per_second"], b["clips_per_second"]
        latency = {p: (a["seconds_per_clip"][p], b["seconds_per_clip"][p]) for p in ("p50", "p95", "p99")}
        table.add_row(
            name,
            *(f"{value:.4g}" for value in throughput),
            _ratio(*throughput),
            *(f"{value:.4g}" for value in latency["p50"]),
            *(_ratio(*latency[p]) for p in ("p50", "p95", "p99")),
            _ratio(a["peak_bytes"], b["peak_bytes"]),
        )
    return table


def _ratio(a: float | None, b: float | None) -> str:
    return f"{b / a:.3g}" if a and b else "-"
