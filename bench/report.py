"""Write the tables of README.md and bench/*.md from bench/results/: `python bench/report.py`.

`--check` only compares, and fails where a table differs. Accuracy comes from robustness-tiny.json (`make study`), speed
from cpu.json (`make bench`) and from the file of each GPU (`make gpu`), latency from latency-cpu.json (`make latency`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import latency_page
from markdown_table import markdown

from videopure_fast.web.report_data import (
    LEAST_SHOWN,
    NAMES,
    OLDER,
    PARTS,
    SUMMARY,
    THREATS,
    UNMEASURED,
    USUAL,
    Comparison,
    Way,
    cpu_comparison,
    gpu_comparison,
    outcomes,
)
from videopure_fast.web.report_files import Value

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
STUDY, NOTES, LATENCY = (ROOT / "bench" / name for name in ("STUDY.md", "NOTES.md", "LATENCY.md"))
MISSING = "-"


def robustness_summary(result: dict[str, Any]) -> str:
    """Markdown of the README's table: few defenses, clean, in the gray box, and the minimum over all attacks."""
    rows = result["rows"]
    seconds = _seconds_by_defense(rows)
    cells = {(row["defense"], row["threat_model"], row["eps"]): row for row in rows if row["part"] in PARTS}
    sizes = sorted({eps for _, threat_model, eps in cells if threat_model == "gray-box"})
    least = min(sizes, default=0.0)
    lines = [
        [
            _bold(name),
            _share(cells.get((name, "none", 0.0))),
            *(_share(cells.get((name, "gray-box", eps))) for eps in sizes),
            _share(cells.get((name, "adaptive", least))),
            f"{seconds[name]:.2g}" if name in seconds else MISSING,
        ]
        for name in SUMMARY
    ]
    header = ["defense", "clean", *(f"gray-box, {255 * eps:g}/255" for eps in sizes)]
    header += [f"worst attack, {255 * least:g}/255", "s a clip"]
    counts = {name: {row["n"] for row in rows if row["defense"] in SUMMARY and row["part"] == name} for name in PARTS}
    return "\n".join(
        [
            f"Accuracy with 95 % intervals on packaged clips ({_range(counts['gray-box'])} clips; worst attack: "
            f"{_range(counts['adaptive'])} clips). Gray-box: PGD-10 on the bare classifier. Worst attack: the lowest "
            "accuracy over all attacks, which include exact gradients through the purification.",
            "",
            *markdown(header, lines),
            "",
            "[bench/STUDY.md](bench/STUDY.md) has all defenses, attacks and checks.",
        ]
    )


def robustness(result: dict[str, Any]) -> str:
    """Markdown of the study's tables: all defenses in the gray box, the other threats, and the checks."""
    rows = result["rows"]
    seconds = _seconds_by_defense(rows)
    plain = [row for row in rows if row["part"].startswith("gray-box") or row["part"] == "depths"]
    cells = {(row["defense"], row["threat_model"], row["eps"]): row for row in plain}
    sizes = sorted({row["eps"] for row in plain if row["eps"]})
    gray = [
        [
            _bold(name),
            str(max(row["n"] for row in plain if row["defense"] == name)),
            _share(cells.get((name, "none", 0.0))),
            *(_share(cells.get((name, "gray-box", eps))) for eps in sizes),
            f"{seconds[name]:.2g}" if name in seconds else MISSING,
        ]
        for name in dict.fromkeys(row["defense"] for row in plain)
    ]
    parts = {part for part, _ in THREATS.values()} - {"adaptive"}
    asked = [row for row in rows if row["part"] in parts and row["eps"]]
    least = min((row["eps"] for row in asked), default=0.0)
    strong = {(row["defense"], row["part"], row["threat_model"]): row for row in rows if row["eps"] == least}
    informed = [
        [_bold(name), *(_share(strong.get((name, *place)), count=True) for place in THREATS.values())]
        for name in dict.fromkeys(row["defense"] for row in asked)
    ]
    failed = [f"FAILED: {check['name']} ({check['seen']})" for check in result["checks"] if not check["passed"]]
    verdict = f"{len(result['checks']) - len(failed)} of {len(result['checks'])} checks passed"
    header = ["defense", "clips", "clean", *(f"attacked, {255 * eps:g}/255" for eps in sizes), "s a clip"]
    return "\n".join(
        [
            "Gray-box: PGD-10 with steps of 2/255 on the bare classifier. The clips were not used for training or for "
            f"choosing settings. Accuracies have 95 % intervals; {MISSING}: not measured, or not possible.",
            "",
            *markdown(header, gray),
            "",
            f"Other threats, at {255 * least:g}/255 (in brackets: interval; clips): transfer from another classifier; "
            "200 queries by Square; the classifier's gradients (gray-box); BPDA, with the defense taken for the "
            "identity; the defense's exact gradients, with two attacks. The minimum is taken clip by clip over these, "
            "over the table above and, for five of the defenses, over APGD-10 in the gray box and under BPDA (the plot "
            "below); for ddim, which is randomized, it is the lowest of the attacks' accuracies on the same clips. The "
            "accuracies are upper bounds: every attack could be made stronger, and those on ddim do not average over "
            "its random draws (EOT).",
            "",
            *markdown(["defense", *THREATS], informed),
            "",
            *_sentences(rows),
            *([f"{'; '.join([verdict, *failed])}.", ""] if result["checks"] else []),
            *_seconds(result),
        ]
    )


def _sentences(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences for the parts with few numbers: parity of two implementations, and repeats of a randomized defense."""
    found = []
    parity = [row for row in rows if row["part"] == "parity" and row["threat_model"] == "bpda"]
    for eps in dict.fromkeys(row["eps"] for row in parity):
        cells = {row["defense"].partition(", ")[2]: _share(row, count=True) for row in parity if row["eps"] == eps}
        found += [
            f"videopure under BPDA, PGD-10, {255 * eps:g}/255, by our models (fast) and by diffusers' with the ops' "
            f"reference (reference): {'; '.join(f'{paths}, {share}' for paths, share in cells.items())}.",
            "",
        ]
    for row in rows:
        if row["part"] == "chance":
            found += [
                f"Over ten draws of its noise, {row['defense']} is right on {row['accuracy']:.3f} of {row['n']} clips "
                f"attacked in the gray box at {255 * row['eps']:g}/255, and on {row['worst']:.3f} in every draw.",
                "",
            ]
    return found


def _seconds(result: dict[str, Any]) -> list[str]:
    """How and where the column of seconds was measured."""
    return [
        f"`make study`; seconds: the median of batches of {result['plans']['cost']['batch']} clips on "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}."
        for machine in result["machines"].get("cost", [])
    ] or ["`make study`."]


def _seconds_by_defense(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {row["defense"]: row["seconds_per_clip"] for row in rows if row["part"] == "cost"}


def _range(counts: set[int]) -> str:
    """ "32" or "32 to 64"."""
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else MISSING


def _share(row: dict[str, Any] | None, *, count: bool = False) -> str:
    if row is None:
        return MISSING
    clips = f"; {row['n']}" if count else ""
    return f"{row['accuracy']:.3f} ({row['low']:.2f} to {row['high']:.2f}{clips})"


def _bold(name: str) -> str:
    return f"**{name}**" if name in ("videopure", "ours") else name


Rows = dict[str, dict[str, Any]]


def speed(results: Path) -> str:
    """Markdown of the CPU's results and of every GPU's."""
    cpu, parts = results / "cpu.json", []
    if cpu.exists():
        parts.append(cpu_table(json.loads(cpu.read_text())))
    else:
        parts.append("On a CPU. Not measured yet: no CPU results file.")
    found = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    gpus = [gpu_tables(one["rows"]) for one in found if one.get("kind") == "gpu"]
    return "\n\n".join(parts + (gpus or ["On a GPU. Not measured yet: no GPU results file."]))


def cpu_table(result: dict[str, Any]) -> str:
    """Markdown of bench_purify.py's rows."""
    found = cpu_comparison(Value(result, "cpu.json"))
    if found is None:
        return "On a CPU. Not measured yet: no purification in the results file."
    lines = []
    for name in [name for name in NAMES if (name, found.batches[0]) in found.ways]:
        cells = [_bold("".join(NAMES[name]))]
        for clips in found.batches:
            way = found.ways[name, clips]
            cells += [f"{way.median:.2f} ± {way.iqr:.2f}", _times(found, way, 1)]
        peak = found.ways[name, found.batches[0]].peak_memory
        lines.append([*cells, MISSING if peak is None else f"{peak / 2**20:.0f}"])
    return "\n".join(
        [
            f"On {found.machine}: {found.clips}; medians ± interquartile range.",
            "",
            *markdown([*_heads(found), "MiB for 1 clip"], lines),
            "",
            f"`{found.command}` {found.made}.",
        ]
    )


def gpu_tables(rows: Rows) -> str:
    """Markdown of one results file of gpu.py: the ways to purify, and the goals; each says where it was not measured.

    A row of other sources than those measured last is marked.
    """
    found = gpu_comparison(Value(rows, "rows"))
    if found is None:
        return "On a GPU. Not measured yet: no purification in the results file."
    lines = []
    for name in NAMES:
        ways = [found.ways.get((name, clips)) for clips in found.batches]
        older = any(way is not None and way.older for way in ways)
        cells = [f"{_bold(''.join(NAMES[name]))}{OLDER * older}"]
        for way in ways:
            cells.append(UNMEASURED if way is None else f"{way.median:.3f} ± {way.iqr:.3f}")
            cells.append(MISSING if way is None else _times(found, way, 2))
        lines.append([*cells, *_costs(found.ways.get((name, 1)))])
    return "\n".join(
        [
            f"On {found.machine}: {found.clips}; medians ± interquartile range. Launches, memory and the mean "
            "error against float32 are of 1 clip.",
            "",
            *markdown([*_heads(found), "launches", "GiB", "mean error"], lines),
            "",
            *([f"{OLDER} Measured with other sources.", ""] if any(way.older for way in found.ways.values()) else []),
            *goal_lines(rows, found.ways),
            f"`{found.command}` {found.made}.",
        ]
    )


def _heads(found: Comparison) -> list[str]:
    return ["", *(cell for n in found.batches for cell in (f"{n} clip{'s' * (n > 1)}, s", "times (1)"))]


def _times(found: Comparison, way: Way, digits: int) -> str:
    times = found.times(way)
    return MISSING if times is None else f"{times:.{digits}f}"


def _costs(way: Way | None) -> list[str]:
    """Launches, GiB and mean error."""
    if way is None:
        return [MISSING] * 3
    peak = MISSING if way.peak_memory is None else f"{way.peak_memory / 2**30:.1f}"
    return [str(way.launches or MISSING), peak, MISSING if way.mean_error is None else f"{way.mean_error:.1e}"]


def goal_lines(rows: Rows, found: Mapping[tuple[str, int], Way]) -> list[str]:
    """A table of the goals that were measured: asked, seen, and whether it is met; then the names of the others."""

    def gain(other: str, clips: int, field: str = "median") -> Callable[[], float]:
        return lambda: getattr(found[other, clips], field) / getattr(found["ours", clips], field)

    def op(name: str, form: str, field: str) -> float:
        return rows[f"op: {name}, full, {form}"][field]

    def best(name: str, field: str) -> float:
        forms = [form for form in ("triton", "cuda") if "median" in rows.get(f"op: {name}, full, {form}", {})]
        return op(name, min(forms, key=lambda form: op(name, form, "median")), field)

    def of_copies(name: str) -> Callable[[], float]:
        return lambda: best(name, "bytes_per_second") / rows["ceiling: copies"]["bytes_per_second"]

    goals: list[tuple[str, str, float, bool, Callable[[], float]]] = [  # what, unit, asked, at least, seen
        ("1 clip, times (1)", "", 7, True, gain("authors", 1)),
        ("1 clip, times (3a)", "", 2, True, gain("authors-compiled", 1)),
        ("1 clip, times (3b)", "", 1.3, True, gain("algebra-compiled", 1)),
        ("1 clip, times (3c)", "", 1.3, True, gain("algebra-inductor", 1)),
        ("1 clip", " s", 0.38, False, lambda: found["ours", 1].median),
        ("1 clip, its label by early stop", " s", 0.31, False, lambda: rows[f"label: {USUAL}"]["median"]),
        (
            "1 clip, decoder of TAESD",
            " s",
            0.25,
            False,
            lambda: rows["purification: ours, taesd, 1x32x224x224"]["median"],
        ),
        ("first call, nothing compiled before", " s", 6, False, lambda: rows[f"first call: {USUAL}"]["first_call"]),
        ("peak memory of 1 clip", " GiB", 7, False, lambda: found["ours", 1].peak_memory / 2**30),
        ("8 clips, times (1)", "", 4, True, gain("authors", 8)),
        ("8 clips, times (3a)", "", 2.2, True, gain("authors-compiled", 8)),
        ("8 clips, times (3b)", "", 1.3, True, gain("algebra-compiled", 8)),
        ("8 clips", " clips/s", 2.8, True, lambda: 8 / found["ours", 8].median),
        ("launches of 1 clip, of (1)'s", "", 0.02, False, lambda: 1 / gain("authors", 1, "launches")()),
        (
            *("guided update of all votes, times the autograd loop", "", 50, True),
            lambda: op("guided_update", "library", "eager_median") / best("guided_update", "eager_median"),
        ),
        ("guided update of all votes", " µs", 50, False, lambda: 1e6 * best("guided_update", "median")),
        (
            *("LayerNorm, QKV and temporal attention, times cuBLAS and SDPA", "", 1.5, True),
            lambda: op("folded_temporal_attention", "library", "median") / best("folded_temporal_attention", "median"),
        ),
        ("temporal attention, of the copies' bandwidth", "", 0.6, True, of_copies("temporal_attention")),
        ("GroupNorm and SiLU, of the copies' bandwidth", "", 0.8, True, of_copies("group_norm_silu")),
    ]
    lines, unmeasured = [], []
    for what, unit, asked, at_least, seen in goals:
        try:
            value = seen()
        except (KeyError, ValueError, TypeError, ZeroDivisionError):
            unmeasured.append(what)
            continue
        met = value >= asked if at_least else value <= asked
        lines.append([what, f"{'≥' if at_least else '≤'} {asked}{unit}", f"{value:.3g}{unit}", "yes" if met else "no"])
    table = [*markdown(["goal", "asked", "seen", "met"], lines), ""] if lines else []
    return table + ([f"Goals {UNMEASURED}: {'; '.join(unmeasured)}.", ""] if unmeasured else [])


def prediction(result: dict[str, Any], rows: Rows) -> str:
    """Markdown of what bench/predict.py expects of an H200, by stage and kind of operation, beside the first profile;
    and what the rows of gpu.py have measured: a stage by its captured graph, a kind by its kernels in eager steps."""
    outcome = outcomes(Value(rows, "rows"))
    lines = []
    for stage, found in result["stages"].items():
        for kind, row in found["kinds"].items():
            if max(row["profile"], row["predicted"]) >= LEAST_SHOWN:
                name = f"{stage}: {kind}"
                lines.append([name, *_milliseconds(row), f"{row['launches']:,}", _shown(outcome.get(name))])
        lines.append([f"**{stage}**", *_milliseconds(found), f"{found['launches']:,}", _shown(outcome.get(stage))])
    guidance = f"{1e3 * result['guidance']:.2f}"
    lines.append(["guidance", guidance, guidance, "", "", _shown(outcome.get("guidance"), 2)])
    host = f"{1e3 * result['host']:.1f}"
    lines.append(["host, before the first kernel and between stages", "", host, "", "", _shown(outcome.get("host"))])
    lines.append(["**one clip**", "", f"**{1e3 * result['seconds']:.0f}**", "", "", _shown(outcome.get("clip"), 0)])
    header = ["stage: kind of operation", "profile, ms", "predicted, ms", "saving, ms", "launches", "outcome, ms"]
    return "\n".join(markdown(header, lines))


def _shown(seconds: float | None, digits: int = 1) -> str:
    return UNMEASURED if seconds is None else f"{1e3 * seconds:.{digits}f}"


def _milliseconds(row: dict[str, float]) -> list[str]:
    before, after = 1e3 * row["profile"], 1e3 * row["predicted"]
    return [f"{value + 0.0:.1f}" for value in (before, after, round(before - after, 1))]


def tables(results: Path = RESULTS) -> dict[Path, dict[str, str]]:
    """The generated parts of each file, by name."""
    study = json.loads((results / "robustness-tiny.json").read_text())
    predicted = json.loads((results / "nvidia-h200-prediction.json").read_text())
    measured = json.loads((results / "nvidia-h200.json").read_text())["rows"]
    return {
        README: {
            "accuracy": robustness_summary(study),
            "speed": speed(results),
            "latency": latency_page.picture(results),
        },
        LATENCY: latency_page.parts(results),
        STUDY: {"study": robustness(study)},
        NOTES: {"prediction": prediction(predicted, measured)},
    }


def render(text: str, parts: dict[str, str]) -> str:
    """The text of a file with its generated parts replaced. ValueError unless each part occurs exactly once."""
    for name, table in parts.items():
        part = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = part.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"there are {found} parts named {name}; expected 1")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a file differs, and write nothing")
    check = parser.parse_args().check
    for path, parts in tables().items():
        written = path.read_text()
        rendered = render(written, parts)
        if check and rendered != written:
            sys.exit(f"{path.relative_to(ROOT)} differs from bench/results/: run make report")
        if not check:
            path.write_text(rendered)


if __name__ == "__main__":
    main()
