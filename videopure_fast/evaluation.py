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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attack_parts import Shared, check_clips, check_logits, vote
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
    attack: a name of attacks.ATTACKS, and its settings but for eps: numbers, words and bools. clips: how many of each
        seed's are attacked.
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
        if isinstance(self.clips, bool) or not isinstance(self.clips, int) or self.clips < 1:
            raise ValueError(f"clips must be an int of 1 or more, got {self.clips!r}")
        if not isinstance(self.settings, Mapping):
            raise TypeError(f"settings must be a mapping of names to values, got {type(self.settings).__name__}")
        known, needed = _options(self.attack)
        if unknown := sorted(set(self.settings) - known):
            raise ValueError(f"{self.attack} has no {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
        if self.access != "none" and (missing := sorted(needed - set(self.settings))):
            raise ValueError(f"{self.attack} needs {', '.join(missing)} among its settings")
        for name, value in self.settings.items():
            if not isinstance(value, (str, int, float, type(None))):
                raise TypeError(f"{name} must be a number, a word or a bool, got {type(value).__name__}")

    @property
    def name(self) -> str:
        """The key of its units in a record."""
        return self._words(lambda _, value: f"{value:.3g}" if isinstance(value, float) else str(value))

    @property
    def title(self) -> str:
        """For people: lengths in 1/255."""
        return self._words(lambda key, value: f"{255 * value:g}/255" if key == "step_size" and value else str(value))

    def _words(self, show: Callable[[str, Any], str]) -> str:
        if self.access == "none":
            return "clean"
        return ", ".join([f"{self.access} {self.attack}", *(f"{k}={show(k, v)}" for k, v in self.settings.items())])


def _options(attack: str) -> tuple[set[str], set[str]]:
    """The names of an attack's settings, and of those that it needs."""
    parameters = inspect.signature(ATTACKS[attack].run).parameters.values()
    own = [option for option in parameters if option.kind is option.KEYWORD_ONLY]
    known, needed = {option.name for option in own}, {option.name for option in own if option.default is option.empty}
    if any(option.kind is option.VAR_KEYWORD for option in parameters):
        known |= set(Shared.__annotations__)
    return known - {"eps", "generator", "progress"}, needed - {"eps"}


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

    eps: in the clips' units; at most 1 unless a threat is of the l2 norm. repeats: predictions of each clip by a
    randomised defence, for its mean and its worst accuracy.
    """

    source: str
    threats: tuple[Threat, ...]
    defences: tuple[str, ...]
    eps: tuple[float, ...] = (4 / 255,)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 16
    repeats: int = 10

    def __post_init__(self) -> None:
        for name, kind in {"threats": Threat, "defences": str, "eps": (int, float), "seeds": int}.items():
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
                raise TypeError(f"{name} must be {Plan.__annotations__[name]}, got {values!r}")
        names = {"threats": [threat.name for threat in self.threats], "eps": [_size(eps) for eps in self.eps]}
        for name, values in {**names, "defences": self.defences, "seeds": self.seeds}.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be some, and none twice, got {values}")
        most = math.inf if any(threat.settings.get("norm") == "l2" for threat in self.threats) else 1
        if not all(0 < eps <= most for eps in self.eps):
            raise ValueError(f"every eps must be more than 0 and at most {most}, in the clips' units, got {self.eps}")
        for name in ("batch", "repeats"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of 1 or more, got {value!r}")

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def units(self) -> Iterator[Unit]:
        for threat in self.threats:
            for eps in self.eps if threat.access != "none" else (0.0,):
                for seed in self.seeds:
                    for start in range(0, threat.clips, self.batch):
                        yield Unit(threat, eps, seed, start, min(self.batch, threat.clips - start))


def _size(eps: float) -> str:
    return f"{255 * eps:g}/255"


class Unit(NamedTuple):
    """A batch of clips under one threat."""

    threat: Threat
    eps: float
    seed: int
    start: int
    clips: int

    def name(self, defence: str = "") -> str:
        return f"{self.threat.name} | {_size(self.eps)} | seed {self.seed} | {self.start} | {defence}"

    def generator(self, purpose: str) -> torch.Generator:
        """Draws that depend on nothing but this unit and what they are for."""
        digest = hashlib.sha256(f"{self.name()} | {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Accuracy(NamedTuple):
    """A row of the table. accuracy is the mean over `n` clips, of randomised defences over repeats too, and `low` to
    `high` its 95 % interval (Wilson); worst counts a clip as right only if every repeat was. access is the threat's,
    or "adaptive" for the minimum over all, which has no time of its own."""

    access: str
    threat: str
    eps: float
    defence: str
    n: int
    accuracy: float
    low: float
    high: float
    worst: float
    seconds_per_clip: float | None
    peak_bytes: int | None


# Of each purification that is compared: its settings, and whether all its votes are heard or the last alone.
_PURIFICATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    **{method: ({"method": method}, True) for method in ("ddpm", "ddim", "ddim_inversion", "videopure")},
    "videopure without guidance": ({"method": "videopure", "update_scale": 0.0}, True),
    "videopure without voting": ({"method": "videopure"}, False),
    "videopure with feedback": ({"method": "videopure", "feedback": True}, True),
}


def defence_names(depths: tuple[int, ...] = ()) -> tuple[str, ...]:
    """The names of `defences`, which need no model."""
    deep = (f"{name}, T={depth}" for depth in depths for name in _PURIFICATIONS)
    return ("none", *FILTERS, "VAE round trip", *_PURIFICATIONS, *deep)


def defences(purifier: Purifier, depths: tuple[int, ...] = ()) -> dict[str, Defence]:
    """Every defence that is compared, by name; those that diffuse also at other depths, as "ddim, T=2"."""
    found = {"none": _filter(lambda clips: clips)}
    found |= {
        name: _filter(run, differentiable=not name.startswith(("JPEG", "H.264"))) for name, run in FILTERS.items()
    }
    found["VAE round trip"] = _filter(partial(reconstruct, purifier))
    for suffix, depth in {"": {}, **{f", T={depth}": {"inversion_steps": depth} for depth in depths}}.items():
        for name, (settings, voting) in _PURIFICATIONS.items():
            found[name + suffix] = _purification(purifier.variant(**settings, **depth), voting=voting)
    return found


def _filter(run: Callable[[Tensor], Tensor], *, differentiable: bool = True) -> Defence:
    def logits(classifier: nn.Module, access: Access, _: torch.Generator) -> Callable[[Tensor], Tensor] | None:
        if access == "bpda":
            return bpda(run, classifier)
        return (lambda clips: classifier(run(clips))) if differentiable else None

    return Defence(lambda clips, _: run(clips)[:, None], logits)


def _purification(purifier: Purifier, *, voting: bool) -> Defence:
    def votes(clips: Tensor, generator: torch.Generator) -> Tensor:
        purified = purifier(clips, return_votes=True, generator=generator)
        return purified if voting else purified[:, -1:]

    def logits(classifier: nn.Module, access: Access, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        of_votes = partial(DefendedClassifier(classifier, purifier, gradient=access).vote_logits, generator=generator)
        return of_votes if voting else (lambda clips: of_votes(clips)[:, -1:])

    return Defence(votes, logits, purifier.properties["randomised"], purifier)


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
            self.units, self.skipped = dict(saved["units"]), dict(saved.get("skipped", {}))
            if (known := saved["hash"]) == plan.hash:
                sizes = {unit.name(name): unit.clips for unit in plan.units() for name in plan.defences}
                for name, entry in self.units.items():
                    _check_entry(sizes[name], **entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(f"{self._path} is no record of an evaluation ({type(error).__name__}: {error})") from error
        if known != plan.hash:
            raise ValueError(
                f"{self._path} is the record of another plan, which differs in {_difference(saved, plan)}: "
                "name another file or folder"
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


def _difference(saved: dict[str, Any], plan: Plan) -> str:
    """Which fields of a plan are not those of a saved one."""
    theirs, mine = saved.get("plan"), json.loads(json.dumps(asdict(plan)))
    if not isinstance(theirs, dict):
        return "its hash"
    return ", ".join(name for name in mine if theirs.get(name) != mine[name]) or "its hash"


def _check_entry(clips: int, *, right: list[int] | None, **cost: Any) -> None:
    """ValueError or TypeError unless it is what `_judge` gives for as many clips, or fewer."""
    if right is not None:
        _check_counts(clips, right, **cost)
    elif cost:
        raise ValueError(f"a unit that could not be has {cost}")


def _check_counts(clips: int, right: list[int], *, repeats: int, seconds: float, peak_bytes: int | None) -> None:
    counts = [repeats, *right] if isinstance(right, list) else [None]
    if not all(type(n) is int and 0 <= n <= repeats for n in counts) or repeats < 1 or len(right) > clips:
        raise ValueError(f"a unit of {clips} clips has {right!r} right of {repeats!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
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
                clips, labels = _drawn(unit, draw)
                record.skipped |= {str(name): why for name, why in (skipped or {}).items()}
                adaptive = unit.threat.access in ADAPTIVE
                victim = other if unit.threat.access == "transfer" else classifier
                attacked = None if adaptive else _attack(unit, victim, clips, labels)
                for name in left:
                    bar.set_postfix_str(f"{unit.threat.title}, {name}")
                    defence = available[name]
                    if adaptive:
                        attacked = _attack(unit, _target(unit, classifier, defence, name), clips, labels, name)
                    record.add(unit.name(name), _judge(unit, classifier, defence, attacked, labels, name, plan.repeats))
                    bar.update()
    return record


def _drawn(unit: Unit, draw: Callable[[int, int, int], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The unit's clips and labels: what is not what it must be would count as fooled."""
    clips, labels = draw(unit.seed, unit.start, unit.clips)
    if len(clips) or len(labels):
        check_clips(clips, labels)
    if len(clips) > unit.clips:
        raise ValueError(f"{len(clips)} clips were drawn where {unit.clips} were asked for")
    return clips, labels


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
            logits = _logits(classifier, defence.votes(attacked, generator))
        if labels.max() >= logits.shape[-1]:
            raise ValueError(f"labels reach {labels.max()}, but the classifier returns {logits.shape[-1]} classes")
        right += (vote(logits) == labels).to(right)
    synchronize(attacked.device)
    seconds = (time.perf_counter() - start) / repeats
    return {"right": right.tolist(), "repeats": repeats, "seconds": seconds, "peak_bytes": memory.read()}


def _logits(classifier: nn.Module, votes: Tensor) -> Tensor:
    """Votes (B, V, 3, F, H, W) -> logits (B, V, K)."""
    logits = [classifier(one.contiguous()) for one in votes.unbind(1)]
    if not isinstance(logits[0], Tensor) or logits[0].ndim != 2 or len(logits[0]) != len(votes):
        seen = tuple(logits[0].shape) if isinstance(logits[0], Tensor) else type(logits[0]).__name__
        raise ValueError(f"the classifier must return logits ({len(votes)}, K), got {seen}")
    logits = torch.stack(logits, 1)
    check_logits(logits)
    return logits


# Tables


def wilson_interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of an accuracy observed on n clips, 1 or more (Wilson 1927)."""
    if n < 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"an accuracy of 0 to 1 on 1 clip or more has an interval, got {accuracy} on {n}")
    centre = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def table(*records: Record, randomised: Collection[str] = ()) -> list[Accuracy]:
    """A row for each threat, eps and defence that is done in full; then, for each eps and defence of which an attacker
    knew something, the minimum over all that was done to it, clip by clip (of the clips that all attacks had): who
    knows the defence may also attack as if they did not.

    randomised: names of the defences that draw. Of many attacks on one, some are lucky on any clip; so its minimum is
    the lowest of the accuracies, not one clip by clip. Records of several plans must be of the same clips.
    """
    rows, attacks = [], {}
    for record in records:
        for threat in record.plan.threats:
            for eps in record.plan.eps if threat.access != "none" else (0.0,):
                for name in record.plan.defences:
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
                what = f"{'lowest' if name in randomised else 'minimum'} of {of}"
                least = _lowest if name in randomised else _clipwise
                peak = _most(found.peak_bytes for found in outcomes)
                rows.append(_row("adaptive", what, eps, name, Outcome(least(outcomes, common), None, peak)))
    return rows


def _clipwise(outcomes: Collection[Outcome], clips: set[tuple[int, int]]) -> dict[tuple[int, int], float]:
    return {clip: min(outcome.shares[clip] for outcome in outcomes) for clip in clips}


def _lowest(outcomes: Collection[Outcome], clips: set[tuple[int, int]]) -> dict[tuple[int, int], float]:
    found = ({clip: outcome.shares[clip] for clip in clips} for outcome in outcomes)
    return min(found, key=lambda shares: math.fsum(shares.values()))


def inaccessible(record: Record) -> dict[str, list[str]]:
    """By access, the defences that do not give an attacker what it needs: those have no row."""
    found: dict[str, list[str]] = {}
    for unit in record.plan.units():
        for name in record.plan.defences:
            if record.units.get(unit.name(name), {"right": ()})["right"] is None:
                names = found.setdefault(unit.threat.access, [])
                names += [] if name in names else [name]
    return found


class Outcome(NamedTuple):
    """Of each clip, by seed and place among the seed's, the share of repeats that were right; and what they cost."""

    shares: dict[tuple[int, int], float]
    seconds_per_clip: float | None
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
    seconds = sum(entry["seconds"] for entry in entries)
    return Outcome(shares, seconds / max(len(shares), 1), _most(entry["peak_bytes"] for entry in entries))


def _most(peaks: Iterable[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def _row(access: str, threat: str, eps: float, defence: str, found: Outcome) -> Accuracy:
    n, accuracy = len(found.shares), math.fsum(found.shares.values()) / len(found.shares)
    worst = sum(share == 1 for share in found.shares.values()) / n
    interval = wilson_interval(accuracy, n)
    return Accuracy(
        access, threat, eps, defence, n, accuracy, *interval, worst, found.seconds_per_clip, found.peak_bytes
    )


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
    record: Record,
    threat: Threat,
    eps: float,
    defence: str,
    count: int,
    classifier: nn.Module,
    available: Mapping[str, Defence],
    draw: Callable[[int, int, int], tuple[Tensor, Tensor]],
    *,
    other: nn.Module | None = None,
) -> Examples:
    """The first `count` of the `rescued` clips of a cell, attacked and purified as they were for the record.

    The rest is as for `evaluate`. ValueError where the cell is not done in full.
    """
    places = rescued(record, threat, eps, defence)[:count]
    if not places:
        raise ValueError(f"the record has no clips of {threat.title} at {_size(eps)} against {defence}")
    units = {(unit.seed, unit.start): unit for unit in record.plan.units() if (unit.threat, unit.eps) == (threat, eps)}
    whole: dict[str, Examples] = {}  # by unit: a clip's draws depend on its place in it
    found = []
    for seed, place in places:
        unit = units[seed, place - place % record.plan.batch]
        if unit.name() not in whole:
            whole[unit.name()] = _replay(unit, classifier, available[defence], defence, draw, other)
        found.append([part[place - unit.start] for part in whole[unit.name()]])
    return Examples(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _replay(
    unit: Unit,
    classifier: nn.Module,
    defence: Defence,
    name: str,
    draw: Callable[[int, int, int], tuple[Tensor, Tensor]],
    other: nn.Module | None,
) -> Examples:
    clips, labels = _drawn(unit, draw)
    if unit.threat.access in ADAPTIVE:
        attacked = _attack(unit, _target(unit, classifier, defence, name), clips, labels, name)
    else:
        attacked = _attack(unit, other if unit.threat.access == "transfer" else classifier, clips, labels)
    with torch.no_grad():
        votes = defence.votes(attacked, unit.generator(f"defend {name}"))
        seen = [vote(logits) for logits in (classifier(attacked), _logits(classifier, votes))]
    return Examples(clips, attacked, votes[:, -1], labels, *seen)


def weights_digest(module: nn.Module) -> str:
    """Of a module's weights, by which a record is of these alone."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + bytes(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()))
    return found.hexdigest()[:16]
