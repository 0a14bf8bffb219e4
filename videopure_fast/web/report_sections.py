"""Sections of the report on speed and accuracy: each draws its results, and has the numbers in a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .report_charts import Bullet, Level, Point, Stack, Step, bullets, levels, scatter, stacks, waterfall
from .report_data import (
    LEAST_SHOWN,
    NAMES,
    OLDER,
    OWN,
    SUMMARY,
    THREATS,
    UNMEASURED,
    Cell,
    Comparison,
    Gpu,
    Results,
    Share,
    Study,
    Way,
)
from .report_markup import NBSP, Markup, element, joined, legend, table

_MISSING = "-"
_MINUS = "\u2212"
_LEAST_SECONDS = 1e-4  # a logarithmic axis has no zero
_STAGES = {"encode": "series-4", "chain": "series-1", "decode": "series-3"}  # of a GPU; other stages share a color
# The defenses of the summary by color, and what each is.
_DEFENSES = {
    "none": ("series-2", "the classifier as it is"),
    "mean of 5 frames": ("series-4", "a filter that costs nothing"),
    "ddim": ("series-3", "plain diffusion and denoising; randomized"),
    "videopure": ("series-1", "inversion, guided denoising and votes"),
}


Section = tuple[str, str, Markup]


def section(name: str, title: str, *parts: str | None) -> Section:
    """Name, by which the table of contents finds it, title and content of a section."""
    return name, title, joined(parts)


def figure(title: str, *parts: str | None) -> Markup:
    return element("figure", element("h3", title), *parts)


def paragraph(*parts: str | None) -> Markup:
    return element("p", *parts, class_="muted")


def unmeasured(command: str) -> Markup:
    said = ("Not measured yet: ", element("code", command), " in a checkout of the sources measures it.")
    return element("p", *said, class_="note")


def side_by_side(*parts: Markup) -> Markup:
    return element("div", *parts, class_="two")


# Speed


def speed(results: Results) -> Section:
    """The ways to purify, from the authors' algorithm to ours."""
    cpu, gpus = [results.cpu] if results.cpu else [], [gpu.comparison for gpu in results.gpus]
    panels = [_comparison(one) for one in cpu] or [_absent("On a CPU", "make bench")]
    panels += [_comparison(one) for one in gpus] or [_absent("On a GPU", "make gpu")]
    said = (
        "Seconds for one clip; shorter is faster. The percentage is what a step changes of the one that it builds on, "
        "and × how many times as fast as (1) it is. Only ways whose votes are correct have a bar."
    )
    swatches = [
        ("series-1", "from the authors' algorithm to ours"),
        ("pale", "other ways, to compare with"),
        ("dashed", "saved by the step"),
    ]
    title = "From the authors' algorithm to ours"
    return section("speed", title, paragraph(said), legend(swatches), side_by_side(*panels), *map(_numbers, cpu + gpus))


def _absent(title: str, command: str) -> Markup:
    return figure(title, unmeasured(command))


def _comparison(found: Comparison) -> Markup:
    """A machine's waterfall, and of a GPU the ways that were not measured."""
    clips = found.batches[0]
    many = f"{clips} clips" if clips > 1 else "one clip"
    steps = [_step(found, found.ways[name, clips]) for name in NAMES if (name, clips) in found.ways]
    absent = ["".join(NAMES[name]) for name in NAMES if found.is_gpu and (name, clips) not in found.ways]
    older = any(way.older for way in found.ways.values())
    return figure(
        f"On {found.machine}",
        paragraph(f"{found.clips[:1].upper()}{found.clips[1:]}."),
        waterfall(steps, f"Seconds for {many} on {found.machine}"),
        element("figcaption", f"Not measured: {'; '.join(absent)}.") if absent else None,
        element(
            "figcaption",
            *("Medians; whiskers are as long as the interquartile range. ", element("code", found.command), " "),
            found.made + (f", {found.day}" if found.day else "") + ".",
            f" {OLDER}{NBSP}Measured with other sources." if older else None,
        ),
    )


def _step(found: Comparison, way: Way) -> Step:
    title, detail = NAMES[way.name]
    before = found.before(way)
    return Step(
        f"{title}{OLDER * way.older}",
        detail.lstrip(":, "),
        way.median,
        way.iqr,
        None if before is None else before.median,
        _spread(found, way) + " s",
        "" if before is None else _times(found, way) + "×",
        _change(way, before),
        way.name in OWN,
    )


def _spread(found: Comparison, way: Way) -> str:
    digits = found.digits
    return f"{way.median:.{digits}f} ± {way.iqr:.{digits}f}"


def _times(found: Comparison, way: Way) -> str:
    times = found.times(way)
    return _MISSING if times is None else f"{times:.{found.digits - 1}f}"


def _change(way: Way, before: Way | None) -> str:
    if before is None or not before.median:
        return ""
    return f"{way.median / before.median - 1:+.0%}".replace("-", _MINUS).replace("%", f"{NBSP}%")


def _numbers(found: Comparison) -> Markup:
    """The table of a machine."""
    header = [""]
    for clips in found.batches:
        header += [f"{clips} clip{'s' * (clips > 1)}, s", "times (1)"]
    header += ["launches", "GiB", "mean error"] if found.is_gpu else ["MiB"]
    names = [name for name in NAMES if found.is_gpu or (name, found.batches[0]) in found.ways]
    rows = []
    for name in names:
        ways = [found.ways.get((name, clips)) for clips in found.batches]
        first = ways[0]
        before = None if first is None else found.before(first)
        cells = ["".join(NAMES[name]) + OLDER * any(way is not None and way.older for way in ways)]
        for way in ways:
            cells += [UNMEASURED, _MISSING] if way is None else [_spread(found, way), _times(found, way)]
        cells += _costs(first, gpu=found.is_gpu)
        cells += ["", ""] if first is None else [_change(first, before), "".join(NAMES[before.name]) if before else ""]
        rows.append(cells)
    return table([*header, "change", "of"], rows, title=f"The numbers: {found.machine}", bold=["ours"])


def _costs(way: Way | None, *, gpu: bool) -> list[str]:
    """What a way costs beside time: on a GPU launches, GiB and the error, on a CPU MiB."""
    peak = None if way is None or way.peak_memory is None else way.peak_memory / 2 ** (30 if gpu else 20)
    if not gpu:
        return [_MISSING if peak is None else f"{peak:.0f}"]
    launches = _MISSING if way is None or way.launches is None else f"{way.launches:,}"
    error = _MISSING if way is None or way.mean_error is None else f"{way.mean_error:.1e}"
    return [launches, _MISSING if peak is None else f"{peak:.1f}", error]


# A GPU's stages


def stages(results: Results) -> Section:
    """Where a GPU's time goes: by stage, and by kind of operation, predicted and measured."""
    found = [joined(_stages(gpu)) for gpu in results.gpus if gpu.shares]
    said = (
        "A clip is encoded, goes through the chain of UNet evaluations, and its votes are decoded. What each kind of "
        "operation should take was predicted from a first profile; then the changes were made, and measured."
    )
    return section("stages", "Where a GPU's time goes", paragraph(said), *(found or [unmeasured("make gpu")]))


def _stages(gpu: Gpu) -> Iterator[Markup]:
    totals = [share for share in gpu.shares if not share.kind]
    measured = all(share.outcome is not None for share in totals)
    rows = [_stack("first profile, its kernels alone", [(share.stage, share.profile) for share in totals])]
    rows.append(_stack("predicted", [(share.stage, share.predicted) for share in totals]))
    if measured:
        rows.append(_stack("measured afterwards", [(share.stage, share.outcome or 0.0) for share in totals]))
    swatches = [(_STAGES.get(share.stage, "series-5"), share.stage) for share in totals]
    clip, host = gpu.seconds.get("clip"), gpu.seconds.get("host")
    whole = "" if clip is None or host is None else f" A whole clip takes {_ms(clip)} ms, {_ms(host)} of them outside."
    yield figure(
        f"By stage, on {gpu.comparison.machine}",
        legend(swatches),
        stacks(rows, "Milliseconds of each stage", "ms"),
        element("figcaption", f"Milliseconds of one clip in these stages.{whole}"),
    )
    marks = [("pale", "first profile"), ("series-1", "measured afterwards"), ("stroke", "predicted")]
    yield legend(marks)
    kinds = {one.stage: [_bullet(share) for share in gpu.shares if _is_of(one.stage, share)] for one in totals}
    panels = [
        figure(stage, bullets(rows, f"Milliseconds by kind of operation: {stage}", "ms"))
        for stage, rows in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]
    yield element("div", *panels, class_="two tall")
    header = ["stage: kind of operation", "first profile, ms", "predicted, ms", "measured, ms", "launches"]
    yield table(header, map(_share_cells, filter(_matters, gpu.shares)), bold=[share.stage for share in totals])


def _matters(share: Share) -> bool:
    return not share.kind or max(share.profile, share.predicted, share.outcome or 0.0) >= LEAST_SHOWN


def _is_of(stage: str, share: Share) -> bool:
    """Whether it is a kind of operation in that stage, and more than next to nothing."""
    return share.stage == stage and bool(share.kind) and _matters(share)


def _stack(name: str, parts: Sequence[tuple[str, float]]) -> Stack:
    drawn = [(_STAGES.get(stage, "series-5"), 1e3 * seconds, f"{stage}: {_ms(seconds)} ms") for stage, seconds in parts]
    return Stack(name, drawn, f"{1e3 * sum(seconds for _, seconds in parts):.0f} ms")


def _bullet(share: Share) -> Bullet:
    seen = None if share.outcome is None else 1e3 * share.outcome
    said = UNMEASURED if seen is None else f"{seen:.1f} ms"
    return Bullet(share.kind, seen, 1e3 * share.profile, 1e3 * share.predicted, said)


def _share_cells(share: Share) -> list[str]:
    name = f"{share.stage}: {share.kind}" if share.kind else share.stage
    return [name, _ms(share.profile), _ms(share.predicted), _ms(share.outcome), f"{share.launches:,}"]


def _ms(seconds: float | None) -> str:
    return UNMEASURED if seconds is None else f"{1e3 * seconds:.1f}"


# Accuracy


def accuracy(results: Results) -> Section:
    """Accuracy by what the attacker has, a panel a defense."""
    title = "Accuracy by what the attacker knows"
    if results.study is None:
        return section("accuracy", title, unmeasured("make study"))
    found = results.study
    eps = least_size(found)
    said = (
        f"Packaged clips, attacks of at most {size_of_attack(eps)}. From top to bottom the attacker has more: another "
        "classifier, answers of the defense, the classifier's gradients, the defense taken for the identity (BPDA), "
        "the defense's exact gradients. The minimum over all attacks is what may be called robustness. Bands are 95 % "
        "intervals."
    )
    panels = [_levels(found, name, eps) for name in SUMMARY]
    return section(
        "accuracy",
        title,
        paragraph(said),
        side_by_side(*panels),
        _plain_table(found),
        _threat_table(found, eps),
        _checks(found) if found.checks else None,
        paragraph(element("code", "make study"), f" {found.made}." if found.made else "."),
    )


def least_size(found: Study) -> float:
    """The smallest size of the attacks of all kinds."""
    parts = {part for part, _ in THREATS.values()} - {"adaptive"}
    return min((eps for part in parts for eps in found.sizes(part)), default=0.0)


def _levels(found: Study, defense: str, eps: float) -> Markup:
    kind, words = _DEFENSES[defense]
    rows = [_level("clean", found.plain(defense))]
    for name, place in THREATS.items():
        if name.startswith("gray-box") and eps:
            rows.append(_level("gray-box, PGD-10", found.plain(defense, eps)))
        rows.append(_level(name, found.cell(defense, *place, eps)))
    return figure(defense, paragraph(words), levels(rows, f"Accuracy of {defense} by threat", kind))


def _level(name: str, cell: Cell | None) -> Level:
    if cell is None:
        return Level(name, None, 0.0, 0.0, UNMEASURED)
    return Level(name, cell.accuracy, cell.low, cell.high, f"{cell.accuracy:.3f}")


def _plain_table(found: Study) -> Markup:
    names = dict.fromkeys(defense for defense, _ in found.plain_cells)
    sizes, seconds = found.sizes("gray-box"), found.seconds
    rows = []
    for name in names:
        cells = [found.plain(name), *(found.plain(name, eps) for eps in sizes)]
        most = max((cell.n for cell in cells if cell is not None), default=0)
        rows.append([name, str(most), *map(_interval, cells), f"{seconds[name]:.2g}" if name in seconds else _MISSING])
    header = ["defense", "clips", "clean", *(f"attacked, {size_of_attack(eps)}" for eps in sizes), "s a clip"]
    title = "The numbers: clean, and attacked in the gray box by PGD-10 on the bare classifier"
    return table(header, rows, title=title, bold=["videopure"])


def _threat_table(found: Study, eps: float) -> Markup:
    parts = {part for part, _ in THREATS.values()} - {"adaptive"}
    names = dict.fromkeys(cell.defense for cell in found.cells.values() if cell.part in parts)
    rows = []
    for name in names:
        cells = [found.cell(name, *place, eps) for place in THREATS.values()]
        rows.append([name, *(_interval(cell, count=True) for cell in cells)])
    title = f"The numbers: other threats, at {size_of_attack(eps)}; in brackets interval and clips"
    return table(["defense", *THREATS], rows, title=title, bold=["videopure"])


def _checks(found: Study) -> Markup:
    failed = [f"Failed: {name} ({seen})." for name, passed, seen in found.checks if not passed]
    said = f"{len(found.checks) - len(failed)} of {len(found.checks)} checks of attacks and gradients passed"
    return element("details", element("summary", said), *map(paragraph, failed))


def _interval(cell: Cell | None, *, count: bool = False) -> str:
    if cell is None:
        return _MISSING
    clips = f"; {cell.n}" if count else ""
    return f"{cell.accuracy:.3f} ({cell.low:.2f} to {cell.high:.2f}{clips})"


def size_of_attack(eps: float) -> str:
    """ "4/255"."""
    return f"{255 * eps:g}/255"


# Accuracy against time


def tradeoff(results: Results) -> Section:
    """Robust accuracy against seconds a clip."""
    title = "What robustness costs"
    found = results.study
    if found is None or not found.seconds:
        return section("tradeoff", title, unmeasured("make study"))
    eps, seconds = least_size(found), found.seconds
    gray = {name: found.plain(name, eps) for name in seconds}
    worst = {name: found.cell(name, "adaptive", "adaptive", eps) for name in seconds}
    said = (
        f"Accuracy under attacks of at most {size_of_attack(eps)} against seconds a clip, on a logarithmic axis. Lines "
        "are 95 % intervals. Points that have no room for their name are in the table."
    )
    panels = [
        _plot("attacked in the gray box", gray, seconds),
        _plot("minimum over all attacks", worst, seconds),
    ]
    rows = [[name, f"{seconds[name]:.2g}", _interval(gray[name]), _interval(worst[name])] for name in seconds]
    return section(
        "tradeoff",
        title,
        paragraph(said),
        side_by_side(*panels),
        element("p", element("code", "make study"), f" {found.made}.", class_="muted"),
        table(["defense", "s a clip", "gray-box", "minimum"], rows, bold=["videopure"]),
    )


def _plot(title: str, cells: dict[str, Cell | None], seconds: Mapping[str, float]) -> Markup:
    points = [
        Point(
            name,
            _DEFENSES[name][0] if name in _DEFENSES else "quiet",
            max(seconds[name], _LEAST_SECONDS),
            *(cell.accuracy, cell.low, cell.high),
            name in _DEFENSES,
        )
        for name, cell in cells.items()
        if cell is not None
    ]
    if not points:
        return figure(title, unmeasured("make study"))
    chart = scatter(points, f"Accuracy against seconds a clip, {title}", x_unit="s", y_unit="")
    return figure(title, chart, element("figcaption", "Accuracy, by seconds a clip."))
