"""Accuracy of defences under attack, threat model by threat model, in a record that survives an interruption.

A `Plan` says what is measured; `evaluate` works through it in units of one batch of clips under one threat at one eps
for one seed against one defence, and writes each unit down when it is done; `table` makes rows of the record. What a
unit draws depends on its own name alone, so that a resumed evaluation ends with the table of an unbroken one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attack_parts import Shared, vote
from .attacks import ATTACKS, bpda
from .defense import DefendedClassifier
from .filters import FILTERS, reconstruct
from .profiling import PeakMemory, replacing, synchronize
from .purifier import Purifier

Access = Literal["none", "transfer", "gray-box", "query", "bpda", "exact"]
ADAPTIVE: tuple[Access, ...] = ("query", "bpda", "exact")  # the attacker asks the defence itself
_MOST_RECORD = 2**28  # bytes


@dataclass(frozen=True)
class Threat:
    """What an attacker has, and does with it.

    access: "none": clean clips. "transfer": the gradients of another classifier. "gray-box": those of the defended
        classifier, without knowledge of the defence. "query": the defence's logits. "bpda": the classifier's gradients
        at the defence's votes, the defence taken for the identity. "exact": the defence's own gradients.
    attack: a name of attacks.ATTACKS, and its settings but for eps. clips: how many of each seed's are attacked.
    """

    access: Access
    attack: str = "pgd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    clips: int = 100

    def __post_init__(self) -> None:
        if self.access not in get_args(Access):
            raise ValueError(f"unknown access {self.access!r}; accepted: {', '.join(get_args(Access))}")
        if self.attack not in ATTACKS:
            raise ValueError(f"unknown attack {self.attack!r}; accepted: {', '.join(ATTACKS)}")
        options = inspect.signature(ATTACKS[self.attack].run).parameters
        known = {name for name, option in options.items() if option.kind is option.KEYWORD_ONLY}
        if any(option.kind is option.VAR_KEYWORD for option in options.values()):
            known |= set(Shared.__annotations__)
        known -= {"eps", "generator", "progress"}
        if unknown := sorted(set(self.settings) - known):
            raise ValueError(f"{self.attack} has no {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
        if isinstance(self.clips, bool) or not isinstance(self.clips, int) or self.clips < 1:
            raise ValueError(f"clips must be an int of 1 or more, got {self.clips!r}")

    @property
    def name(self) -> str:
        if self.access == "none":
            return "clean"
        settings = (
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in self.settings.items()
        )
        return ", ".join([f"{self.access} {self.attack}", *settings])


@dataclass(frozen=True)
class Defence:
    """A way to treat clips before they are classified.

    votes: clips (B, 3, F, H, W) and a generator -> (B, V, 3, F, H, W). logits: of a classifier, the access "bpda" or
    "exact" and a generator, a differentiable callable from clips to (B, K) or (B, V, K); None where an access does not
    exist. purifier: of a purification.
    """

    votes: Callable[[Tensor, torch.Generator], Tensor]
    logits: Callable[[nn.Module, Access, torch.Generator], Callable[[Tensor], Tensor] | None]
    randomised: bool = False
    purifier: Purifier | None = None


@dataclass(frozen=True)
class Plan:
    """What is measured. source: where the clips come from, in words: part of the record's identity.

    repeats: predictions of each clip by a randomised defence, for its mean and its worst accuracy.
    """

    source: str
    threats: tuple[Threat, ...]
    defences: tuple[str, ...]
    eps: tuple[float, ...] = (4 / 255,)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 16
    repeats: int = 10

    def __post_init__(self) -> None:
        named = {"threats": [threat.name for threat in self.threats], "defences": self.defences}
        for name, values in {**named, "eps": self.eps, "seeds": self.seeds}.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be some, and none twice, got {values}")
        if not all(0 < eps <= 1 for eps in self.eps):
            raise ValueError(f"every eps must be more than 0 and at most 1, in the clips' units, got {self.eps}")
        for name in ("batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def units(self) -> Iterator[Unit]:
        for threat in self.threats:
            for eps in self.eps if threat.access != "none" else (0.0,):
                for seed in self.seeds:
                    for start in range(0, threat.clips, self.batch):
                        yield Unit(threat, eps, seed, start, min(self.batch, threat.clips - start))


class Unit(NamedTuple):
    """A batch of clips under one threat."""

    threat: Threat
    eps: float
    seed: int
    start: int
    clips: int

    def name(self, defence: str = "") -> str:
        return f"{self.threat.name} | {255 * self.eps:g}/255 | seed {self.seed} | {self.start} | {defence}"

    def generator(self, purpose: str) -> torch.Generator:
        """Draws that depend on nothing but this unit and what they are for."""
        digest = hashlib.sha256(f"{self.name()} | {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Accuracy(NamedTuple):
    """A row of the table. accuracy is the mean over `n` clips, of randomised defences over repeats too, and `low` to
    `high` its 95 % interval (Wilson); worst counts a clip as right only if every repeat was. access is the threat's,
    or "adaptive" for the minimum over all."""

    access: str
    threat: str
    eps: float
    defence: str
    n: int
    accuracy: float
    low: float
    high: float
    worst: float
    seconds_per_clip: float
    peak_bytes: int | None


def defences(purifier: Purifier, depths: tuple[int, ...] = ()) -> dict[str, Defence]:
    """Every defence that is compared, by name; those that diffuse also at other depths, as "ddim, T=2"."""
    found = {"none": _filter(lambda clips: clips)}
    found |= {
        name: _filter(run, differentiable=not name.startswith(("JPEG", "H.264"))) for name, run in FILTERS.items()
    }
    found["VAE round trip"] = _filter(partial(reconstruct, purifier))
    for depth in (None, *depths):
        config = replace(purifier.config, **({} if depth is None else {"inversion_steps": depth}))
        suffix = "" if depth is None else f", T={depth}"
        for method in ("ddpm", "ddim", "ddim_inversion", "videopure"):
            found[method + suffix] = _purification(purifier, replace(config, method=method))
        videopure = replace(config, method="videopure")
        found["videopure without guidance" + suffix] = _purification(purifier, replace(videopure, update_scale=0.0))
        found["videopure without voting" + suffix] = _purification(purifier, videopure, voting=False)
        found["videopure with feedback" + suffix] = _purification(purifier, replace(videopure, feedback=True))
    return found


def _filter(run: Callable[[Tensor], Tensor], *, differentiable: bool = True) -> Defence:
    def logits(classifier: nn.Module, access: Access, _: torch.Generator) -> Callable[[Tensor], Tensor] | None:
        if access == "bpda":
            return bpda(run, classifier)
        return (lambda clips: classifier(run(clips))) if differentiable else None

    return Defence(lambda clips, _: run(clips)[:, None], logits)


def _purification(purifier: Purifier, config: Any, *, voting: bool = True) -> Defence:
    ours = purifier.variant(**asdict(config))

    def votes(clips: Tensor, generator: torch.Generator) -> Tensor:
        purified = ours(clips, return_votes=True, generator=generator)
        return purified if voting else purified[:, -1:]

    def logits(classifier: nn.Module, access: Access, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        of_votes = partial(DefendedClassifier(classifier, ours, gradient=access).vote_logits, generator=generator)
        return of_votes if voting else (lambda clips: of_votes(clips)[:, -1:])

    return Defence(votes, logits, ours.properties["randomised"], ours)


class Record:
    """The units that are done, in a JSON file that is replaced whole, never edited in place.

    skipped: why clips could not be read, by their names. ValueError for a file that is no record, or one of another
    plan.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan) -> None:
        self._path, self.plan = Path(path), plan
        self.units: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        if not self._path.exists():
            return
        if self._path.stat().st_size > _MOST_RECORD:
            raise ValueError(f"{self._path} is larger than a record can be, {_MOST_RECORD >> 20} MiB")
        try:
            saved = json.loads(self._path.read_text())
            known, self.units, self.skipped = saved["hash"], dict(saved["units"]), dict(saved.get("skipped", {}))
            for unit in self.units.values():
                _check_entry(**unit)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{self._path} is no record of an evaluation ({error})") from error
        if known != plan.hash:
            raise ValueError(
                f"{self._path} is the record of another plan ({known}, not {plan.hash}); name another file"
            )

    def add(self, name: str, unit: dict[str, Any]) -> None:
        self.units[name] = unit
        content = {"hash": self.plan.hash, "plan": asdict(self.plan), "skipped": self.skipped, "units": self.units}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as file:
            file.write_text(json.dumps(content))


@contextmanager
def _alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """ValueError if another process of this machine works on the record; where the system has such locks, which end
    with their process however it ends."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    with Path(tempfile.gettempdir(), f"videopure-fast-{name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process works on {path}") from error
        yield


def _check_entry(
    right: list[int] | None, repeats: int = 1, seconds: float = 0.0, peak_bytes: int | None = None
) -> None:
    counts = [] if right is None else right
    if not isinstance(repeats, int) or repeats < 1 or not all(isinstance(n, int) and 0 <= n <= repeats for n in counts):
        raise ValueError(f"a unit has {right} right of {repeats!r}")
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ValueError(f"a unit took {seconds!r} seconds")
    if peak_bytes is not None and not isinstance(peak_bytes, int):
        raise ValueError(f"a unit held {peak_bytes!r} bytes")


def evaluate(
    plan: Plan,
    classifier: nn.Module,
    available: Mapping[str, Defence],
    draw: Callable[[int, int, int], tuple[Tensor, Tensor]],
    path: str | os.PathLike[str],
    *,
    other: nn.Module | None = None,
    skipped: Mapping[Any, str] | None = None,
    progress: bool = False,
) -> Record:
    """Do what is left of a plan.

    available: the plan's defences by name. draw: (seed, start, count) -> clips (count, 3, F, H, W) in [0, 1] and labels
    (count,), the same for the same numbers, on the models' device; fewer where some cannot be read. path: the record;
    it is continued where it is there. other: the attacker's own classifier, for the access "transfer".
    skipped: grows while `draw` finds clips that cannot be read (`VideoDataset.skipped`), and is kept in the record.
    """
    if unknown := [name for name in plan.defences if name not in available]:
        raise ValueError(f"unknown defences {', '.join(unknown)}; accepted: {', '.join(available)}")
    if other is None and any(threat.access == "transfer" for threat in plan.threats):
        raise ValueError("the access 'transfer' needs another classifier to attack, got none")
    with _alone(path):
        record = Record(path, plan)
        units = list(plan.units())
        with tqdm(total=len(units) * len(plan.defences), desc="evaluate", unit="batch", disable=not progress) as bar:
            for unit in units:
                left = [name for name in plan.defences if unit.name(name) not in record.units]
                bar.update(len(plan.defences) - len(left))
                if not left:
                    continue
                clips, labels = draw(unit.seed, unit.start, unit.clips)
                record.skipped |= {str(name): why for name, why in (skipped or {}).items()}
                adaptive = unit.threat.access in ADAPTIVE
                victim = other if unit.threat.access == "transfer" else classifier
                attacked = None if adaptive else _attack(unit, victim, clips, labels)
                for name in left:
                    bar.set_postfix_str(f"{unit.threat.name}, {name}")
                    defence = available[name]
                    if adaptive:
                        attacked = _attack(unit, _target(unit, classifier, defence, name), clips, labels, name)
                    record.add(unit.name(name), _judge(unit, classifier, defence, attacked, labels, name, plan.repeats))
                    bar.update()
    return record


def _target(unit: Unit, classifier: nn.Module, defence: Defence, name: str) -> Callable[[Tensor], Tensor] | None:
    """What an attacker of the defence itself attacks; None where the defence has no such access."""
    access = "bpda" if unit.threat.access == "query" else unit.threat.access  # the logits are the same for both
    return defence.logits(classifier, access, unit.generator(f"noise {name}"))


def _attack(
    unit: Unit, model: Callable[[Tensor], Tensor] | None, clips: Tensor, labels: Tensor, defence: str = ""
) -> Tensor | None:
    if unit.threat.access == "none" or not len(clips):
        return clips
    if model is None:
        return None
    generator = unit.generator(f"attack {defence}")
    run = ATTACKS[unit.threat.attack].run
    return run(model, clips, labels, eps=unit.eps, generator=generator, **unit.threat.settings)


def _judge(
    unit: Unit,
    classifier: nn.Module,
    defence: Defence,
    attacked: Tensor | None,
    labels: Tensor,
    name: str,
    repeats: int,
) -> dict[str, Any]:
    """The unit's entry: for each clip how many of the repeats were right, and what they cost."""
    if attacked is None:
        return {"right": None}
    if not len(labels):
        return {"right": [], "repeats": 1, "seconds": 0.0, "peak_bytes": None}
    repeats = repeats if defence.randomised else 1
    generator, right = unit.generator(f"defend {name}"), torch.zeros_like(labels)
    memory, start = PeakMemory(attacked.device), time.perf_counter()
    for _ in range(repeats):
        with torch.no_grad():
            right += (vote(_logits(classifier, defence.votes(attacked, generator))) == labels).to(right)
    synchronize(attacked.device)
    seconds = (time.perf_counter() - start) / repeats
    return {"right": right.tolist(), "repeats": repeats, "seconds": seconds, "peak_bytes": memory.read()}


def _logits(classifier: nn.Module, votes: Tensor) -> Tensor:
    """Votes (B, V, 3, F, H, W) -> logits (B, V, K)."""
    logits = [classifier(one.contiguous()) for one in votes.unbind(1)]
    if not isinstance(logits[0], Tensor) or logits[0].ndim != 2 or len(logits[0]) != len(votes):
        seen = tuple(logits[0].shape) if isinstance(logits[0], Tensor) else type(logits[0]).__name__
        raise ValueError(f"the classifier must return logits ({len(votes)}, K), got {seen}")
    return torch.stack(logits, 1)


# Tables


def wilson_interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of an accuracy observed on n clips (Wilson 1927)."""
    centre = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def table(*records: Record) -> list[Accuracy]:
    """A row for each threat, eps and defence that is done in full; then, for each eps and defence of which an attacker
    knew something, the minimum over all that was done to it, clip by clip (of the clips that all attacks had): who
    knows the defence may also attack as if they did not.

    Records of several plans must be of the same clips.
    """
    rows, attacks = [], {}
    for record in records:
        for threat in record.plan.threats:
            for eps in record.plan.eps if threat.access != "none" else (0.0,):
                for name in record.plan.defences:
                    found = outcome(record, threat, eps, name)
                    if found.shares:
                        rows.append(_row(threat.access, threat.name, eps, name, [found]))
                        attacks.setdefault((eps, name), []).append((threat.access, found))
    for (eps, name), done in attacks.items():
        if any(access in ADAPTIVE for access, _ in done):
            done = attacks.get((0.0, name), []) + done
            accesses, outcomes = zip(*done, strict=True)
            if len(done) > 1 and set.intersection(*(set(found.shares) for found in outcomes)):
                what = f"minimum of {', '.join(dict.fromkeys(accesses)).replace('none', 'clean')}"
                rows.append(_row("adaptive", what, eps, name, list(outcomes)))
    return rows


def inaccessible(record: Record) -> dict[str, list[str]]:
    """By threat, the defences that do not give an attacker what it needs: those have no row."""
    found: dict[str, list[str]] = {}
    for unit in record.plan.units():
        for name in record.plan.defences:
            if record.units.get(unit.name(name), {"right": ()})["right"] is None:
                names = found.setdefault(unit.threat.name, [])
                names += [] if name in names else [name]
    return found


class Outcome(NamedTuple):
    """Of each clip, by seed and place among the seed's, the share of repeats that were right; and what they cost."""

    shares: dict[tuple[int, int], float]
    seconds_per_clip: float
    peak_bytes: int | None


def outcome(record: Record, threat: Threat, eps: float, defence: str) -> Outcome:
    """Empty where a unit is missing, or the access does not exist."""
    units = [unit for unit in record.plan.units() if (unit.threat, unit.eps) == (threat, eps)]
    entries = [record.units.get(unit.name(defence)) for unit in units]
    if any(entry is None or entry["right"] is None for entry in entries):
        return Outcome({}, 0.0, None)
    shares = {
        (unit.seed, unit.start + i): right / entry["repeats"]
        for unit, entry in zip(units, entries, strict=True)
        for i, right in enumerate(entry["right"])
    }
    peaks = [entry["peak_bytes"] for entry in entries if entry["peak_bytes"] is not None]
    seconds = sum(entry["seconds"] for entry in entries)
    return Outcome(shares, seconds / max(len(shares), 1), max(peaks, default=None))


def _row(access: str, threat: str, eps: float, defence: str, outcomes: list[Outcome]) -> Accuracy:
    common = set.intersection(*(set(outcome.shares) for outcome in outcomes))
    shares = [min(outcome.shares[clip] for outcome in outcomes) for clip in common]
    n, accuracy = len(shares), math.fsum(shares) / len(shares)
    worst = sum(share == 1 for share in shares) / n
    seconds = sum(outcome.seconds_per_clip for outcome in outcomes) / len(outcomes)
    peak = max((outcome.peak_bytes for outcome in outcomes if outcome.peak_bytes is not None), default=None)
    return Accuracy(access, threat, eps, defence, n, accuracy, *wilson_interval(accuracy, n), worst, seconds, peak)


# Examples, for pictures


class Examples(NamedTuple):
    """Clips (n, 3, F, H, W) and labels (n,). `purified` are the attacked clips' last votes, its labels all votes'."""

    clean: Tensor
    attacked: Tensor
    purified: Tensor
    labels: Tensor
    attacked_labels: Tensor
    purified_labels: Tensor


def rescued(record: Record, threat: Threat, eps: float, defence: str) -> list[tuple[int, int]]:
    """Seed and place of every clip of a cell of the table, those first that the defence alone keeps right."""
    defended, bare = (outcome(record, threat, eps, name).shares for name in (defence, "none"))
    return sorted(defended, key=lambda clip: (bare.get(clip, 1.0) - defended[clip], clip))


def examples(
    threat: Threat,
    eps: float,
    clips: Tensor,
    labels: Tensor,
    classifier: nn.Module,
    defence: Defence,
    *,
    other: nn.Module | None = None,
) -> Examples:
    """Attack a few clips (n, 3, F, H, W) anew, and what classifier and defence make of them."""
    unit = Unit(threat, eps, 0, 0, len(clips))
    adaptive, victim = threat.access in ADAPTIVE, other if threat.access == "transfer" else classifier
    attacked = _attack(unit, _target(unit, classifier, defence, "") if adaptive else victim, clips, labels)
    if attacked is None:
        raise ValueError(f"this defence has no access {threat.access!r}")
    with torch.no_grad():
        votes = defence.votes(attacked, unit.generator("defend"))
        seen = [vote(logits) for logits in (classifier(attacked), _logits(classifier, votes))]
    return Examples(clips, attacked, votes[:, -1], labels, *seen)
