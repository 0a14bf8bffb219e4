"""Accuracy of defenses under attack, threat model by threat model.

`defenses` names what is compared, a `Setup` is who takes part, and `evaluate` works through a plan, batch by batch,
into a record that survives an interruption.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks import ATTACKS, bpda
from ..attacks.base import check_labeled, majority_vote
from ..defense.classifier import DefendedClassifier, classify_votes
from ..defense.filters import FILTERS, reconstruct
from ..files import check_writable, make_folder
from ..machine import PeakMemory, describe_machine, synchronize
from ..purifier import Purifier
from .record import ADAPTIVE, Access, Plan, Record, Threat, Unit, exclusive_lock
from .tables import rescued


@dataclass(frozen=True)
class Defense:
    """A way to treat clips before they are classified.

    votes: clips (B, 3, F, H, W) and a generator -> (B, V, 3, F, H, W). logits: of a classifier, the access "bpda" or
    "exact" and a generator, a differentiable callable from clips to (B, K) or (B, V, K); None where an access does not
    exist. purifier: of a purification.
    """

    votes: Callable[[Tensor, torch.Generator], Tensor]
    logits: Callable[[nn.Module, Access, torch.Generator], Callable[[Tensor], Tensor] | None]
    randomized: bool = False
    purifier: Purifier | None = None


# Of each purification that is compared: its settings, and whether all its votes are heard or the last alone.
_PURIFICATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    **{method: ({"method": method}, True) for method in ("ddpm", "ddim", "ddim_inversion", "videopure")},
    "videopure without guidance": ({"method": "videopure", "update_scale": 0.0}, True),
    "videopure without voting": ({"method": "videopure"}, False),
    "videopure with feedback": ({"method": "videopure", "feedback": True}, True),
}


def defense_names(depths: tuple[int, ...] = ()) -> tuple[str, ...]:
    """The names of `defenses`, which need no model."""
    deep = (f"{name}, T={depth}" for depth in depths for name in _PURIFICATIONS)
    return ("none", *FILTERS, "VAE round trip", *_PURIFICATIONS, *deep)


def defenses(purifier: Purifier, depths: tuple[int, ...] = ()) -> dict[str, Defense]:
    """Every defense that is compared, by name; those that diffuse also at other depths, as "ddim, T=2"."""
    found = {"none": _filter(lambda clips: clips)}
    found |= {
        name: _filter(run, differentiable=not name.startswith(("JPEG", "H.264"))) for name, run in FILTERS.items()
    }
    found["VAE round trip"] = _filter(partial(reconstruct, purifier))
    for suffix, depth in {"": {}, **{f", T={depth}": {"inversion_steps": depth} for depth in depths}}.items():
        for name, (settings, voting) in _PURIFICATIONS.items():
            found[name + suffix] = _purification(purifier.with_config(**settings, **depth), voting=voting)
    return found


def _filter(run: Callable[[Tensor], Tensor], *, differentiable: bool = True) -> Defense:
    def logits(classifier: nn.Module, access: Access, _: torch.Generator) -> Callable[[Tensor], Tensor] | None:
        if access == "bpda":
            return bpda(run, classifier)
        return (lambda clips: classifier(run(clips))) if differentiable else None

    return Defense(lambda clips, _: run(clips)[:, None], logits)


def _purification(purifier: Purifier, *, voting: bool) -> Defense:
    def votes(clips: Tensor, generator: torch.Generator) -> Tensor:
        purified = purifier(clips, return_votes=voting, generator=generator)
        return purified if voting else purified[:, None]

    def logits(classifier: nn.Module, access: Access, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        of_votes = partial(DefendedClassifier(classifier, purifier, gradient=access).vote_logits, generator=generator)
        return of_votes if voting else (lambda clips: of_votes(clips)[:, -1:])

    return Defense(votes, logits, purifier.properties["randomized"], purifier)


class Setup(NamedTuple):
    """Who takes part in an evaluation.

    classifier: the one that is defended. defenses: by name. draw: (seed, start, count) -> clips (count, 3, F, H, W) in
    [0, 1] and labels (count,), the same for the same numbers, on the models' device; fewer where some cannot be read.
    other: the attacker's own classifier, for the access "transfer".
    """

    classifier: nn.Module
    defenses: Mapping[str, Defense]
    draw: Callable[[int, int, int], tuple[Tensor, Tensor]]
    other: nn.Module | None = None


def evaluate(
    plan: Plan,
    setup: Setup,
    path: str | os.PathLike[str],
    *,
    skipped: Mapping[Any, str] | None = None,
    progress: bool = False,
) -> Record:
    """Do what is left of a plan.

    path: the record; it is continued where it is there. skipped: grows while clips are drawn that cannot be read
    (`VideoDataset.skipped`), and is kept in the record. Bad plans, setups, paths and settings of attacks end in an
    error before any attack.
    """
    for name, value, kind in (("plan", plan, Plan), ("setup", setup, Setup)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if unknown := [name for name in plan.defenses if name not in setup.defenses]:
        raise ValueError(f"unknown defenses {', '.join(unknown)}; accepted: {', '.join(setup.defenses)}")
    if setup.other is None and any(threat.access == "transfer" for threat in plan.threats):
        raise ValueError("the access 'transfer' needs another classifier to attack, got none")
    for name, module in (("classifier", setup.classifier), ("other", setup.other)):
        parts = module.modules() if isinstance(module, nn.Module) else [module]
        if any(getattr(part, "training", False) for part in parts):
            whole = f"the setup's {name}, or a part of it,"
            raise ValueError(f"{whole} is in training mode, where answers differ from call to call: eval()")
    make_folder(Path(path).parent)
    check_writable(path)
    with exclusive_lock(path):
        record = Record(path, plan)
        units = list(plan.units())
        found = {(unit.seed, unit.start, unit.clips): n for unit in units if (n := record.clips(unit)) is not None}
        tried = False
        with tqdm(total=len(units) * len(plan.defenses), desc="evaluate", unit="batch", disable=not progress) as bar:
            for unit in units:
                left = [name for name in plan.defenses if unit.name(name) not in record.units]
                bar.update(len(plan.defenses) - len(left))
                if not left:
                    continue
                clips, labels = _drawn(unit, setup)
                _check_same(unit, len(clips), found)
                if not tried and len(clips):
                    _try_attacks(plan, clips[:1], labels[:1])
                    tried = True
                record.skipped |= {str(name): why for name, why in (skipped or {}).items()}
                machine, attacked = describe_machine(labels.device), None
                for name in left:
                    bar.set_postfix_str(f"{unit.threat.title}, {name}")
                    if attacked is None or unit.threat.access in ADAPTIVE:  # else one attack is on all defenses
                        attacked = _attack(unit, setup, name, clips, labels)
                    record.add(unit.name(name), _judge(unit, setup, name, attacked, labels, plan.repeats), machine)
                    bar.update()
    return record


def _drawn(unit: Unit, setup: Setup) -> tuple[Tensor, Tensor]:
    """The unit's clips and labels: what is not what it must be would count as fooled."""
    clips, labels = setup.draw(unit.seed, unit.start, unit.clips)
    if len(clips) or len(labels):
        check_labeled(clips, labels)
    if len(clips) > unit.clips:
        raise ValueError(f"{len(clips)} clips were drawn where {unit.clips} were asked for")
    return clips, labels


def _check_same(unit: Unit, clips: int, found: dict[tuple[int, int, int], int]) -> None:
    """ValueError where a draw lacks clips that it had under another threat: their places would no longer match."""
    if clips != (before := found.setdefault((unit.seed, unit.start, unit.clips), clips)):
        raise ValueError(
            f"of seed {unit.seed}'s clips from {unit.start} on {clips} could be read, and {before} before: files have "
            "changed, and their outcomes no longer belong together; bring them back, or begin another record"
        )


class _Asked(Exception):
    """A model was asked for logits."""


def _try_attacks(plan: Plan, clips: Tensor, labels: Tensor) -> None:
    """The errors of bad settings now and not hours later: an attack checks all it is given before it asks its model."""

    def model(_: Tensor) -> Tensor:
        raise _Asked

    for threat in plan.threats:
        for eps in plan.eps if threat.access != "none" else ():
            with suppress(_Asked):
                run = ATTACKS[threat.attack].run
                run(model, clips, labels, eps=eps, generator=torch.Generator(), **threat.settings)


def _victim(unit: Unit, setup: Setup, name: str) -> Callable[[Tensor], Tensor] | None:
    """What the unit's attacker of a defense asks for logits or gradients; None where there is no such access."""
    access = unit.threat.access
    if access not in ADAPTIVE:
        return setup.other if access == "transfer" else setup.classifier
    access = "bpda" if access == "query" else access  # the logits are the same for both
    return setup.defenses[name].logits(setup.classifier, access, unit.generator(f"noise {name}"))


def _attack(unit: Unit, setup: Setup, name: str, clips: Tensor, labels: Tensor) -> Tensor | None:
    """The unit's clips as a defense meets them; None where there is no such attack."""
    if unit.threat.access == "none" or not len(clips):
        return clips
    victim = _victim(unit, setup, name)
    if victim is None:
        return None
    generator = unit.generator(f"attack {name if unit.threat.access in ADAPTIVE else ''}")
    run = ATTACKS[unit.threat.attack].run
    return run(victim, clips, labels, eps=unit.eps, generator=generator, **unit.threat.settings)


def _judge(
    unit: Unit, setup: Setup, name: str, attacked: Tensor | None, labels: Tensor, repeats: int
) -> dict[str, Any]:
    """The unit's entry: for each clip how many of the repeats were right, and what they cost."""
    if attacked is None:
        return {"right": None}
    if not len(labels):
        return {"right": [], "repeats": 1, "seconds": 0.0, "peak_bytes": None}
    defense = setup.defenses[name]
    repeats = repeats if defense.randomized else 1
    generator, right = unit.generator(f"defend {name}"), torch.zeros_like(labels)
    memory, start = PeakMemory(attacked.device), time.perf_counter()
    for _ in range(repeats):
        with torch.no_grad():
            logits = classify_votes(setup.classifier, defense.votes(attacked, generator))
        if labels.max() >= logits.shape[-1]:
            raise ValueError(f"labels reach {labels.max()}, but the classifier returns {logits.shape[-1]} classes")
        right += (majority_vote(logits) == labels).to(right)
    synchronize(attacked.device)
    seconds = (time.perf_counter() - start) / repeats
    return {"right": right.tolist(), "repeats": repeats, "seconds": seconds, "peak_bytes": memory.read()}


# Examples, for pictures


class Examples(NamedTuple):
    """Clips (n, 3, F, H, W) and labels (n,). `purified` are the attacked clips' last votes, its labels all votes'."""

    clean: Tensor
    attacked: Tensor
    purified: Tensor
    labels: Tensor
    attacked_labels: Tensor
    purified_labels: Tensor


def examples(record: Record, threat: Threat, eps: float, defense: str, count: int, setup: Setup) -> Examples:
    """The first `count` of the `rescued` clips of a cell, attacked and purified as they were for the record.

    ValueError where the cell is not done in full.
    """
    places = rescued(record, threat, eps, defense)[:count]
    if not places:
        raise ValueError(f"the record has no clips of {threat.title} at {255 * eps:g}/255 against {defense}")
    units = {(unit.seed, unit.start): unit for unit in record.plan.units() if (unit.threat, unit.eps) == (threat, eps)}
    whole: dict[str, Examples] = {}  # by unit: a clip's draws depend on its place in it
    found = []
    for seed, place in places:
        unit = units[seed, place - place % record.plan.batch]
        if unit.name() not in whole:
            whole[unit.name()] = _replay(unit, setup, defense)
        found.append([part[place - unit.start] for part in whole[unit.name()]])
    return Examples(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _replay(unit: Unit, setup: Setup, name: str) -> Examples:
    clips, labels = _drawn(unit, setup)
    attacked = _attack(unit, setup, name, clips, labels)
    with torch.no_grad():
        votes = setup.defenses[name].votes(attacked, unit.generator(f"defend {name}"))
        seen = [majority_vote(logits) for logits in (setup.classifier(attacked), classify_votes(setup.classifier, votes))]
    return Examples(clips, attacked, votes[:, -1], labels, *seen)
