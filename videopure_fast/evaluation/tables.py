"""Accuracies out of records: for each threat, eps and defense, with their intervals, and the least over attacks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .record import ADAPTIVE, Record, Threat


class Accuracy(NamedTuple):
    """A row of the table. accuracy is the mean over `n` clips, of randomized defenses over repeats too, and `low` to
    `high` its 95 % interval (Wilson); worst counts a clip as right only if every repeat was. access is the threat's,
    or "adaptive" for the minimum over all, which has no time of its own."""

    access: str
    threat: str
    eps: float
    defense: str
    n: int
    accuracy: float
    low: float
    high: float
    worst: float
    seconds_per_clip: float | None
    peak_bytes: int | None


def wilson_interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of an accuracy observed on n clips, 1 or more (Wilson 1927)."""
    if n < 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"an accuracy of 0 to 1 on 1 clip or more has an interval, got {accuracy} on {n}")
    center = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def table(*records: Record, randomized: Collection[str] = ()) -> list[Accuracy]:
    """A row for each threat, eps and defense that is done in full; then, for each eps and defense of which an attacker
    knew something, the minimum over all that was done to it, clip by clip (of the clips that all attacks had): who
    knows the defense may also attack as if they did not.

    randomized: names of the defenses that draw. Of many attacks on one, some are lucky on any clip; so its minimum is
    the lowest of the accuracies, not one clip by clip. Records of several plans must be of the same clips.
    """
    rows, attacks = [], {}
    for record in records:
        for threat in record.plan.threats:
            for eps in record.plan.eps if threat.access != "none" else (0.0,):
                for name in record.plan.defenses:
                    found = outcome(record, threat, eps, name)
                    if found.shares:
                        rows.append(_row(threat.access, threat.title, eps, name, found))
                        attacks.setdefault((eps, name), []).append((threat.access, found))
    for (eps, name), done in attacks.items():
        if any(access in ADAPTIVE for access, _ in done):
            done = attacks.get((0.0, name), []) + done
            accesses, outcomes = zip(*done, strict=True)
            common = set.intersection(*(set(found.shares) for found in outcomes))
            if len(done) > 1 and common:
                of = ", ".join(dict.fromkeys(accesses)).replace("none", "clean")
                what = f"{'lowest' if name in randomized else 'minimum'} of {of}"
                least = _lowest if name in randomized else _clipwise
                peak = _most(found.peak_bytes for found in outcomes)
                rows.append(_row("adaptive", what, eps, name, Outcome(least(outcomes, common), None, peak)))
    return rows


def _clipwise(outcomes: Collection[Outcome], clips: set[tuple[int, int]]) -> dict[tuple[int, int], float]:
    return {clip: min(outcome.shares[clip] for outcome in outcomes) for clip in clips}


def _lowest(outcomes: Collection[Outcome], clips: set[tuple[int, int]]) -> dict[tuple[int, int], float]:
    found = ({clip: outcome.shares[clip] for clip in clips} for outcome in outcomes)
    return min(found, key=lambda shares: math.fsum(shares.values()))


def inaccessible(record: Record) -> dict[str, list[str]]:
    """By access, the defenses that do not give an attacker what it needs: those have no row."""
    found: dict[str, list[str]] = {}
    for unit in record.plan.units():
        for name in record.plan.defenses:
            if record.units.get(unit.name(name), {"right": ()})["right"] is None:
                names = found.setdefault(unit.threat.access, [])
                names += [] if name in names else [name]
    return found


class Outcome(NamedTuple):
    """Of each clip, by seed and place among the seed's, the share of repeats that were right; and what they cost: the
    median over batches, of which the first warms up, and the most memory."""

    shares: dict[tuple[int, int], float]
    seconds_per_clip: float | None
    peak_bytes: int | None


def outcome(record: Record, threat: Threat, eps: float, defense: str) -> Outcome:
    """Empty where a unit is missing, or the access does not exist."""
    units = [unit for unit in record.plan.units() if (unit.threat, unit.eps) == (threat, eps)]
    entries = [record.units.get(unit.name(defense)) for unit in units]
    if any(entry is None or entry["right"] is None for entry in entries):
        return Outcome({}, None, None)
    shares = {
        (unit.seed, unit.start + i): right / entry["repeats"]
        for unit, entry in zip(units, entries, strict=True)
        for i, right in enumerate(entry["right"])
    }
    seconds = [entry["seconds"] / len(entry["right"]) for entry in entries if entry["right"]]
    middle = statistics.median(seconds) if seconds else None
    return Outcome(shares, middle, _most(entry["peak_bytes"] for entry in entries))


def _most(peaks: Iterable[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def _row(access: str, threat: str, eps: float, defense: str, found: Outcome) -> Accuracy:
    n, accuracy = len(found.shares), math.fsum(found.shares.values()) / len(found.shares)
    worst = sum(share == 1 for share in found.shares.values()) / n
    interval = wilson_interval(accuracy, n)
    return Accuracy(
        access, threat, eps, defense, n, accuracy, *interval, worst, found.seconds_per_clip, found.peak_bytes
    )


def rescued(record: Record, threat: Threat, eps: float, defense: str) -> list[tuple[int, int]]:
    """Seed and place of every clip of a cell of the table, those first that the defense alone keeps right."""
    defended, bare = (outcome(record, threat, eps, name).shares for name in (defense, "none"))
    return sorted(defended, key=lambda clip: (bare.get(clip, 1.0) - defended[clip], clip))
