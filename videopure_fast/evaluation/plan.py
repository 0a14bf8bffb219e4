"""What an evaluation measures: threats, and plans that divide the work into batches of clips.

A `Plan` consists of batches, each a few clips under one threat at one eps for one seed. The random numbers of a batch
depend on its name alone, so that a resumed evaluation gives the same table as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..attacks import ATTACKS, attack_settings
from ..inputs import check_count

ThreatModel = Literal["none", "transfer", "gray-box", "query", "bpda", "exact"]
ADAPTIVE: tuple[ThreatModel, ...] = ("query", "bpda", "exact")  # the attacker can query the defense itself


@dataclass(frozen=True)
class Threat:
    """What the attacker has access to, and the attack with its settings.

    Attributes:
        threat_model: "none": clean clips. "transfer": the gradients of another classifier. "gray-box": those of the
            defended classifier, without knowledge of the defense. "query": the defense's logits. "bpda": the
            classifier's gradients at the defense's votes, with the defense taken for the identity. "exact": the
            defense's own gradients.
        attack: a name of attacks.ATTACKS.
        settings: the attack's keyword arguments, without eps: numbers, strings, bools or None.
        clips: how many clips of each seed are attacked.

    TypeError or ValueError for other values, and for settings that the attack does not have or that it lacks.
    """

    threat_model: ThreatModel
    attack: str = "pgd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    clips: int = 100

    def __post_init__(self) -> None:
        names = get_args(ThreatModel)
        for name, value, accepted in (("threat_model", self.threat_model, names), ("attack", self.attack, (*ATTACKS,))):
            if value not in accepted:  # both are tuples, so that a value without a hash is refused here too
                raise ValueError(f"unknown {name} {value!r}; accepted: {', '.join(accepted)}")
        if self.threat_model == "query" and self.attack != "square":
            raise ValueError(f"'query' gives no gradients, which {self.attack} needs; accepted: square")
        check_count("clips", self.clips)
        if not isinstance(self.settings, Mapping):
            raise TypeError(f"settings must be a mapping of names to values, got {type(self.settings).__name__}")
        known, needed = attack_settings(self.attack)
        if unknown := sorted(map(str, set(self.settings) - known)):
            raise ValueError(f"{self.attack} has no {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
        if self.threat_model != "none" and (missing := sorted(needed - set(self.settings))):
            raise ValueError(f"{self.attack} needs {', '.join(missing)} among its settings")
        for name, value in self.settings.items():
            if not isinstance(value, (str, int, float, type(None))):
                raise TypeError(f"{name} must be a number, a string, a bool or None, got {type(value).__name__}")

    @property
    def name(self) -> str:
        """The part of a record's keys that stands for this threat."""
        return self._describe(lambda _, value: f"{value:.3g}" if isinstance(value, float) else str(value))

    @property
    def title(self) -> str:
        """A readable description, with step sizes in 1/255."""
        return self._describe(lambda key, value: f"{255 * value:g}/255" if key == "step_size" and value else str(value))

    def _describe(self, text: Callable[[str, Any], str]) -> str:
        if self.threat_model == "none":
            return "clean"
        settings = (f"{key}={text(key, value)}" for key, value in self.settings.items())
        return ", ".join([f"{self.threat_model} {self.attack}", *settings])


def standard_threat(
    threat_model: ThreatModel,
    clips: int,
    *,
    attack: str = "pgd",
    steps: int = 10,
    step_size: float = 2 / 255,
    loss: str = "ce",
    eot: int = 1,
    restarts: int = 1,
    queries: int = 500,
) -> Threat:
    """A threat with the usual attack of its threat model: "transfer" uses temporal_translation, "query" square.

    Args:
        clips: how many clips of each seed are attacked.
        attack, loss, restarts: for "gray-box", "bpda" and "exact".
        steps: iterations of a gradient attack. step_size: per step, in the clips' units; apgd chooses its own.
        eot: calls over which the gradient, or the answer to a query, is averaged. "transfer" ignores it.
        queries: for "query".
    """
    if threat_model == "none":
        return Threat("none", clips=clips)
    if threat_model == "query":
        return Threat("query", "square", {"queries": queries, **({} if eot == 1 else {"eot": eot})}, clips)
    gradient_steps = {"steps": steps, "step_size": step_size}
    if threat_model == "transfer":
        return Threat("transfer", "temporal_translation", gradient_steps, clips)
    # Settings at their defaults are left out, which keeps the names short.
    changed = {
        key: value for key, value in (("loss", loss), ("eot", eot), ("restarts", restarts)) if value not in ("ce", 1)
    }
    own = {"steps": steps} if attack == "apgd" else gradient_steps
    return Threat(threat_model, attack, own | changed, clips)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        source: a description of clips and models; a record of one source does not go on with another.
        threats: every defense is attacked under each of them.
        defenses: names.
        eps: sizes of attacks in the clips' units; at most 1 unless all attacks use the l2 norm.
        seeds: each has its own clips and random numbers.
        batch: clips in memory at once.
        repeats: predictions of each clip by a randomized defense, for its mean and its worst accuracy.

    TypeError or ValueError for other types, empty or repeated values, and sizes out of range.
    """

    source: str
    threats: tuple[Threat, ...]
    defenses: tuple[str, ...]
    eps: tuple[float, ...] = (4 / 255,)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 16
    repeats: int = 10

    def __post_init__(self) -> None:
        kinds: dict[str, type | tuple[type, ...]] = {"defenses": str, "eps": (int, float), "seeds": int}
        for name, kind in {"threats": Threat, **kinds}.items():
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
                raise TypeError(f"{name} must be {Plan.__annotations__[name]}, got {values!r}")
        names = {"threats": [threat.name for threat in self.threats], "eps": [_in_255ths(eps) for eps in self.eps]}
        for name, values in {**names, "defenses": self.defenses, "seeds": self.seeds}.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must not be empty or repeat a value, got {values}")
        norms = {threat.settings.get("norm", "linf") for threat in self.threats if threat.threat_model != "none"}
        most = math.inf if norms == {"l2"} else 1
        if not all(0 < eps <= most for eps in self.eps):
            raise ValueError(f"every eps must be more than 0 and at most {most}, in the clips' units, got {self.eps}")
        for name in ("batch", "repeats"):
            check_count(name, getattr(self, name))

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def batches(self) -> Iterator[EvalBatch]:
        for threat in self.threats:
            for eps in self.eps if threat.threat_model != "none" else (0.0,):
                for seed in self.seeds:
                    for start in range(0, threat.clips, self.batch):
                        yield EvalBatch(threat, eps, seed, start, min(self.batch, threat.clips - start))


def _in_255ths(eps: float) -> str:
    return f"{255 * eps:g}/255"


class EvalBatch(NamedTuple):
    """Clips `start` to `start + clips` of a seed, under one threat at one eps."""

    threat: Threat
    eps: float
    seed: int
    start: int
    clips: int

    def name(self, defense: str = "") -> str:
        """The key of a record's entry for this batch and a defense."""
        return f"{self.threat.name} | {_in_255ths(self.eps)} | seed {self.seed} | {self.start} | {defense}"

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator seeded by this batch's name and the purpose, and by nothing else."""
        digest = hashlib.sha256(f"{self.name()} | {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
