"""Accuracies from records: for each threat, eps and defense, with intervals, and the minimum over attacks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .plan import ADAPTIVE, Threat
from .record import Record


class Accuracy(NamedTuple):
    """A row of the table.

    Attributes:
        threat_model: the threat's, or "adaptive" for the minimum over all attacks.
        threat: the threat's title, or for the minimum the names of the threat models.
        eps: in the clips' units; 0 for clean clips.
        n: how many clips.
        accuracy: the mean over clips, and over the repeats of a randomized defense.
        low, high: the accuracy's 95 % interval (Wilson 1927).
        worst: the accuracy where a clip counts as right only if every repeat was.
        seconds_per_clip: median over batches; None for the minimum.
        peak_bytes: the most memory held; None where it is not known.
    """

    threat_model: str
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
    """The Wilson score interval (1927) of an accuracy observed on n clips, by default at 95 % confidence.

    ValueError for an accuracy outside [0, 1] and for n < 1.
    """
    if n < 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"an accuracy of 0 to 1 on 1 clip or more has an interval, got {accuracy} on {n}")
    center = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def table(*records: Record, randomized: Collection[str] = ()) -> list[Accuracy]:
    """Rows for each threat, eps and defense that is done in full, followed by minima over all attacks.

    There is a minimum for each eps and defense with an adaptive attack. It is taken clip by clip, over the clips that
    all attacks had, and over the non-adaptive attacks too: an attacker who knows the defense may still use those.

    records: those of several plans must be of the same clips. randomized: names of the randomized defenses. Among many
    attacks on one of them, some succeed on a clip by chance; so its minimum is the lowest of the attacks' accuracies.
    """
    rows: list[Accuracy] = []
    attacks: dict[tuple[float, str], list[tuple[str, Outcome]]] = {}
    for record in records:
        for threat in record.plan.threats:
            for eps in record.plan.eps if threat.threat_model != "none" else (0.0,):
                for name in record.plan.defenses:
                    found = outcome(record, threat, eps, name)
                    if found.shares:
                        rows.append(_row(threat.threat_model, threat.title, eps, name, found))
                        attacks.setdefault((eps, name), []).append((threat.threat_model, found))
    for (eps, name), done in attacks.items():
        if any(threat_model in ADAPTIVE for threat_model, _ in done):
            done = attacks.get((0.0, name), []) + done
            outcomes = [found for _, found in done]
            common = set.intersection(*(set(found.shares) for found in outcomes))
            if len(done) > 1 and common:
                names = ", ".join(dict.fromkeys(threat_model for threat_model, _ in done)).replace("none", "clean")
                title = f"{'lowest' if name in randomized else 'minimum'} of {names}"
                minimum = _lowest if name in randomized else _clipwise_minimum
                peak = _max_or_none(found.peak_bytes for found in outcomes)
                rows.append(_row("adaptive", title, eps, name, Outcome(minimum(outcomes, common), None, peak)))
    return rows


def _clipwise_minimum(outcomes: Collection[Outcome], clips: set[tuple[int, int]]) -> dict[tuple[int, int], float]:
    return {clip: min(outcome.shares[clip] for outcome in outcomes) for clip in clips}


def _lowest(outcomes: Collection[Outcome], clips: set[tuple[int, int]]) -> dict[tuple[int, int], float]:
    found = ({clip: outcome.shares[clip] for clip in clips} for outcome in outcomes)
    return min(found, key=lambda shares: math.fsum(shares.values()))


def inaccessible(record: Record) -> dict[str, list[str]]:
    """Threat model -> names of the defenses to which it has no access, as "exact" to a codec; they have no row."""
    found: dict[str, list[str]] = {}
    for batch in record.plan.batches():
        for name in record.plan.defenses:
            if record.entries.get(batch.name(name), {"right": ()})["right"] is None:
                names = found.setdefault(batch.threat.threat_model, [])
                names += [] if name in names else [name]
    return found


class Outcome(NamedTuple):
    """How a defense fared under one threat at one eps.

    Attributes:
        shares: (seed, place among the seed's clips) -> the share of repeats that were right.
        seconds_per_clip: the median over batches, since the first one is a warm-up.
        peak_bytes: the most memory held.
    """

    shares: dict[tuple[int, int], float]
    seconds_per_clip: float | None
    peak_bytes: int | None


def outcome(record: Record, threat: Threat, eps: float, defense: str) -> Outcome:
    """The outcome in a record; without shares where a batch is missing, or the attack has no access."""
    batches = [batch for batch in record.plan.batches() if (batch.threat, batch.eps) == (threat, eps)]
    found = [record.entries.get(batch.name(defense)) for batch in batches]
    entries = [entry for entry in found if entry is not None and entry["right"] is not None]
    if len(entries) < len(batches):
        return Outcome({}, None, None)
    shares = {
        (batch.seed, batch.start + i): right / entry["repeats"]
        for batch, entry in zip(batches, entries, strict=True)
        for i, right in enumerate(entry["right"])
    }
    seconds = [entry["seconds"] / len(entry["right"]) for entry in entries if entry["right"]]
    median = statistics.median(seconds) if seconds else None
    return Outcome(shares, median, _max_or_none(entry["peak_bytes"] for entry in entries))


def _max_or_none(peaks: Iterable[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def _row(threat_model: str, threat: str, eps: float, defense: str, found: Outcome) -> Accuracy:
    n, accuracy = len(found.shares), math.fsum(found.shares.values()) / len(found.shares)
    worst = sum(share == 1 for share in found.shares.values()) / n
    interval = wilson_interval(accuracy, n)
    return Accuracy(
        threat_model, threat, eps, defense, n, accuracy, *interval, worst, found.seconds_per_clip, found.peak_bytes
    )


def rescued(record: Record, threat: Threat, eps: float, defense: str) -> list[tuple[int, int]]:
    """(seed, place) of every clip of a cell of the table; first those that only the defense keeps right."""
    defended, bare = (outcome(record, threat, eps, name).shares for name in (defense, "none"))
    return sorted(defended, key=lambda clip: (bare.get(clip, 1.0) - defended[clip], clip))
