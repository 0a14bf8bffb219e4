"""Accuracy of defences under attack, threat model by threat model.

`defences` names what is compared, and `evaluate` works through a plan, clip by clip, into a record that survives an
interruption.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attack_parts import check_clips, check_logits, vote
from .attacks import ATTACKS, bpda
from .defense import DefendedClassifier
from .filters import FILTERS, reconstruct
from .profiling import PeakMemory, synchronize
from .purifier import Purifier
from .records import ADAPTIVE, Access, Plan, Record, Threat, Unit, alone
from .tables import rescued


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
    with alone(path):
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


# Examples, for pictures


class Examples(NamedTuple):
    """Clips (n, 3, F, H, W) and labels (n,). `purified` are the attacked clips' last votes, its labels all votes'."""

    clean: Tensor
    attacked: Tensor
    purified: Tensor
    labels: Tensor
    attacked_labels: Tensor
    purified_labels: Tensor


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
        raise ValueError(f"the record has no clips of {threat.title} at {255 * eps:g}/255 against {defence}")
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
