"""The figures at the top of the report. Each comes from a results file, or says that it was not measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .report_data import UNMEASURED, Comparison, Gpu, Latency, Results, Study
from .report_markup import NBSP, Markup, element
from .report_sections import least_size, size_of_attack

_USUAL_LOAD = 0.8  # of the loads, the one that is named where it was measured


class Tile(NamedTuple):
    """A figure, what it is, and what it is made of."""

    figure: str
    what: str
    detail: str = ""
    tone: str = ""


def summary(results: Results) -> Markup:
    """The tiles."""
    tiles = [_gain(results.cpu, "a CPU"), *_gpu_tiles(results.gpus), *_accuracy(results.study)]
    tiles.append(_latency(results.latency))
    return element("ul", *map(_drawn, tiles), class_="tiles")


def _drawn(tile: Tile) -> Markup:
    known = "" if tile.figure == UNMEASURED else " known"
    parts = [element("strong", tile.figure, class_=f"big{known} {tile.tone}".strip()), element("span", tile.what)]
    detail = element("span", tile.detail, class_="muted") if tile.detail else None
    return element("li", *parts, detail, class_="card tile")


def _gpu_tiles(gpus: list[Gpu]) -> Iterator[Tile]:
    if not gpus:
        yield _gain(None, "a GPU")
    for gpu in gpus:
        yield _gain(gpu.comparison, gpu.comparison.machine)
        first, ours = (gpu.comparison.ways.get((name, gpu.comparison.batches[0])) for name in ("authors", "ours"))
        if first is not None and ours is not None and first.launches and ours.launches:
            what = f"launches for a clip, on {gpu.comparison.machine}"
            yield Tile(f"{ours.launches:,}", what, f"{first.launches:,} by the authors' algorithm")


def _gain(found: Comparison | None, machine: str) -> Tile:
    what = f"as fast as the authors' algorithm, on {machine}"
    clips = 1 if found is None else found.batches[0]
    first, ours = (None if found is None else found.ways.get((name, clips)) for name in ("authors", "ours"))
    times = None if found is None or ours is None else found.times(ours)
    if found is None or first is None or ours is None or times is None:
        return Tile(UNMEASURED, what)
    many, digits = f"{clips} clips" if clips > 1 else "a clip", found.digits
    said = f"{first.median:.{digits}f} s, now {ours.median:.{digits}f} s for {many}"
    return Tile(f"{times:.{digits - 1}f}×", what, said)


def _accuracy(study: Study | None) -> Iterator[Tile]:
    eps = 0.0 if study is None else least_size(study)
    attack = f" at {size_of_attack(eps)}" if eps else ""
    bare, kept = (None if study is None else study.plain(name, eps) for name in ("none", "videopure"))
    what = f"of attacked clips are right{attack}, where the attacker does not know the defense"
    if bare is None or kept is None:
        yield Tile(UNMEASURED, what)
    else:
        yield Tile(_percent(kept.accuracy), what, f"{_percent(bare.accuracy)} without it; {kept.n} clips", "good")
    worst = None if study is None else study.cell("videopure", "adaptive", "adaptive", eps)
    what = f"of them under the worst attack{attack}, exact gradients of the defense included"
    if worst is None:
        yield Tile(UNMEASURED, what)
    else:
        interval = f"{_percent(worst.low)} to {_percent(worst.high)} with 95 % confidence; {worst.n} clips"
        yield Tile(_percent(worst.accuracy), what, interval, "bad")


def _latency(found: Latency | None) -> Tile:
    runs = [] if found is None else [run for run in found.runs if not run.simulated]
    if not runs:
        return Tile(UNMEASURED, "seconds in which most clips are answered under load")
    run = min(runs, key=lambda run: abs(run.load - _USUAL_LOAD))
    return Tile(
        f"{run.latency['p95']:.3g} s",
        f"in which 95 % of clips are answered at {100 * run.load:.0f}{NBSP}% load",
        f"half of them in {run.latency['p50']:.3g} s; {run.title}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}{NBSP}%"
