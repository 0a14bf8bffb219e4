"""What is measured, and what has been: plans, and records of them that survive an interruption.

A `Plan` is worked through in units, each one batch of clips under one threat at one eps for one seed. What a unit
draws depends on its own name alone, so that a resumed evaluation ends with the table of an unbroken one. A `Record`
holds the outcome of every unit against every defense.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from ..attacks import ATTACKS
from ..attacks.base import Shared
from ..files import atomic_write
from ..inputs import check_count, check_number

Access = Literal["none", "transfer", "gray-box", "query", "bpda", "exact"]
ADAPTIVE: tuple[Access, ...] = ("query", "bpda", "exact")  # the attacker asks the defense itself
_MOST_RECORD = 2**28  # bytes


@dataclass(frozen=True)
class Threat:
    """What an attacker has, and does with it.

    access: "none": clean clips. "transfer": the gradients of another classifier. "gray-box": those of the defended
        classifier, without knowledge of the defense. "query": the defense's logits. "bpda": the classifier's gradients
        at the defense's votes, the defense taken for the identity. "exact": the defense's own gradients.
    attack: a name of attacks.ATTACKS, and its settings but for eps: numbers, words and bools. clips: how many of each
        seed's are attacked.
    """

    access: Access
    attack: str = "pgd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    clips: int = 100

    def __post_init__(self) -> None:
        for name, value, accepted in (("access", self.access, get_args(Access)), ("attack", self.attack, (*ATTACKS,))):
            if value not in accepted:  # tuples: a value that has no hash is no name either
                raise ValueError(f"unknown {name} {value!r}; accepted: {', '.join(accepted)}")
        if self.access == "query" and self.attack != "square":
            raise ValueError(f"'query' gives no gradients, which {self.attack} needs; accepted: square")
        check_count("clips", self.clips)
        if not isinstance(self.settings, Mapping):
            raise TypeError(f"settings must be a mapping of names to values, got {type(self.settings).__name__}")
        known, needed = _options(self.attack)
        if unknown := sorted(map(str, set(self.settings) - known)):
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
class Plan:
    """What is measured. source: where the clips come from, in words: part of the record's identity.

    eps: in the clips' units; at most 1 unless all attacks are of the l2 norm. repeats: predictions of each clip by a
    randomized defense, for its mean and its worst accuracy.
    """

    source: str
    threats: tuple[Threat, ...]
    defenses: tuple[str, ...]
    eps: tuple[float, ...] = (4 / 255,)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 16
    repeats: int = 10

    def __post_init__(self) -> None:
        for name, kind in {"threats": Threat, "defenses": str, "eps": (int, float), "seeds": int}.items():
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
                raise TypeError(f"{name} must be {Plan.__annotations__[name]}, got {values!r}")
        names = {"threats": [threat.name for threat in self.threats], "eps": [_size(eps) for eps in self.eps]}
        for name, values in {**names, "defenses": self.defenses, "seeds": self.seeds}.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be some, and none twice, got {values}")
        norms = {threat.settings.get("norm", "linf") for threat in self.threats if threat.access != "none"}
        most = math.inf if norms == {"l2"} else 1
        if not all(0 < eps <= most for eps in self.eps):
            raise ValueError(f"every eps must be more than 0 and at most {most}, in the clips' units, got {self.eps}")
        for name in ("batch", "repeats"):
            check_count(name, getattr(self, name))

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

    def name(self, defense: str = "") -> str:
        return f"{self.threat.name} | {_size(self.eps)} | seed {self.seed} | {self.start} | {defense}"

    def generator(self, purpose: str) -> torch.Generator:
        """Draws that depend on nothing but this unit and what they are for."""
        digest = hashlib.sha256(f"{self.name()} | {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Record:
    """The units that are done, in a JSON file that is replaced whole, never edited in place.

    skipped: why clips could not be read, by their names. machines: those that the units were done on, with their
    versions. ValueError for a file that is no record, or one of another plan.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan) -> None:
        self._path, self.plan = Path(path), plan
        self.units: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.machines: list[dict[str, Any]] = []
        if not self._path.exists():
            return
        if self._path.stat().st_size > _MOST_RECORD:
            raise ValueError(f"{self._path} is larger than a record can be, {_MOST_RECORD >> 20} MiB")
        try:
            saved = json.loads(self._path.read_text())
            self.units, self.skipped = dict(saved["units"]), dict(saved.get("skipped", {}))
            self.machines = [dict(machine) for machine in saved.get("machines", [])]
            if (known := saved["hash"]) == plan.hash:
                sizes = {unit.name(name): unit.clips for unit in plan.units() for name in plan.defenses}
                if unknown := sorted(self.units.keys() - sizes.keys()):
                    raise ValueError(f"the plan has no unit {unknown[0]!r}: are settings in another order?")
                for name, entry in self.units.items():
                    _check_entry(sizes[name], **entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(f"{self._path} is no record of an evaluation ({type(error).__name__}: {error})") from error
        if known != plan.hash:
            raise ValueError(
                f"{self._path} is the record of another plan, which differs in {_difference(saved, plan)}: "
                "name another file or folder"
            )

    def add(self, name: str, unit: dict[str, Any], machine: dict[str, Any] | None = None) -> None:
        self.units[name] = unit
        self.machines += [] if machine is None or machine in self.machines else [machine]
        content = {
            "hash": self.plan.hash,
            "plan": asdict(self.plan),
            "machines": self.machines,
            "skipped": self.skipped,
            "units": self.units,
        }
        with atomic_write(self._path) as file:
            file.write_text(json.dumps(content))

    def clips(self, unit: Unit) -> int | None:
        """How many of a unit's clips could be read; None where none of its entries tells."""
        entries = (self.units.get(unit.name(name)) for name in self.plan.defenses)
        return next((len(entry["right"]) for entry in entries if entry and entry["right"] is not None), None)


@contextmanager
def exclusive_lock(path: str | os.PathLike[str]) -> Iterator[None]:
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
    """ValueError or TypeError unless it is what `evaluate` adds for as many clips, or fewer."""
    if right is not None:
        _check_counts(clips, right, **cost)
    elif cost:
        raise ValueError(f"a unit that could not be has {cost}")


def _check_counts(clips: int, right: list[int], *, repeats: int, seconds: float, peak_bytes: int | None) -> None:
    counts = [repeats, *right] if isinstance(right, list) else [None]
    if not all(type(n) is int and 0 <= n <= repeats for n in counts) or repeats < 1 or len(right) > clips:
        raise ValueError(f"a unit of {clips} clips has {right!r} right of {repeats!r}")
    check_number("seconds", seconds)
    check_count("peak_bytes", 0 if peak_bytes is None else peak_bytes, least=0)


def weights_digest(module: nn.Module) -> str:
    """Of a module's weights, by which a record is of these alone."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + bytes(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()))
    return found.hexdigest()[:16]
