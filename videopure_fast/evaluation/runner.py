"""Work through a plan: attack each batch of clips, classify what a defense makes of it, and record the outcome."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks import ATTACKS
from ..attacks.base import check_labeled, majority_vote
from ..defense.classifier import classify_votes
from ..defense.registry import Defense, DefenseGradient, LogitsFn
from ..files import check_writable, make_folder
from ..machine import PeakMemory, describe_machine, synchronize
from .plan import ADAPTIVE, EvalBatch, Plan, Threat
from .record import Record, exclusive_lock
from .tables import rescued

Draw = Callable[[int, int, int], tuple[Tensor, Tensor]]

_ROUNDING = 1e-3  # by which a defense's values may leave [0, 1]
EXACT_GRADIENT = 7.0  # purifications that take as long as the exact gradient of one, by the packaged prior on a CPU
_FILTER = 0.01  # purifications that take as long as a defense that is none
_COLUMNS = 80  # of a progress bar, at most


class EvalContext(NamedTuple):
    """The models and clips of an evaluation.

    Attributes:
        classifier: the one that is defended.
        defenses: by name.
        draw: (seed, start, count) -> clips (count, 3, F, H, W) in [0, 1] and labels (count,) int64, on the models'
            device, equal for equal arguments; fewer where clips cannot be read.
        surrogate: the attacker's own classifier, which the threat model "transfer" attacks.
    """

    classifier: nn.Module
    defenses: Mapping[str, Defense]
    draw: Draw
    surrogate: nn.Module | None = None


def evaluate(
    plan: Plan,
    context: EvalContext,
    path: str | os.PathLike[str],
    *,
    skipped: Mapping[Any, str] | None = None,
    bar: tqdm | None = None,
) -> Record:
    """Do those batches of a plan that its record lacks, and return the record.

    path: the record's file, continued where it exists. skipped: path -> reason, to which the draw function adds clips
    that cannot be read (`VideoDataset.skipped`); the record keeps it. bar: an `evaluation_bar`, of whose total `work`
    is a part. TypeError or ValueError for a bad plan, context, path or setting of an attack, before any attack runs.
    """
    for name, value, kind in (("plan", plan, Plan), ("context", context, EvalContext)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    if unknown := [name for name in plan.defenses if name not in context.defenses]:
        raise ValueError(f"unknown defenses {', '.join(unknown)}; accepted: {', '.join(context.defenses)}")
    if context.surrogate is None and any(threat.threat_model == "transfer" for threat in plan.threats):
        raise ValueError("the threat model 'transfer' needs a surrogate, another classifier to attack, got none")
    for role, module in (("classifier", context.classifier), ("surrogate", context.surrogate)):
        check_eval_mode(role, module)
    bar = tqdm(total=0, disable=True) if bar is None else bar
    make_folder(Path(path).parent)
    check_writable(path)
    with exclusive_lock(path):
        record = Record(path, plan)
        batches = list(plan.batches())
        sizes = {
            (batch.seed, batch.start, batch.clips): n for batch in batches if (n := record.clips(batch)) is not None
        }
        settings_checked = False
        for batch in batches:
            done = [name for name in plan.defenses if batch.name(name) in record.entries]
            left = [name for name in plan.defenses if name not in done]
            before = sum(_work(batch, context.defenses[name], plan.repeats) for name in done)
            if not bar.disable:  # work of an earlier run says nothing of this one's pace
                bar.initial, bar.n = bar.initial + before, bar.n + before
            if not left:
                continue
            clips, labels = _draw(batch, context)
            _check_same_size(batch, len(clips), sizes)
            if not settings_checked and len(clips):
                _check_settings(plan, clips[:1], labels[:1])
                settings_checked = True
            record.skipped |= {str(name): why for name, why in (skipped or {}).items()}
            machine, attacked = describe_machine(labels.device), None
            for name in left:
                against = batch.threat.title.partition(" ")[0]  # the threat model, or "clean"
                bar.set_description_str(f"evaluate {against}, {name}"[: _COLUMNS // 2])
                # Other attacks do not depend on the defense: all defenses meet the same clips.
                if attacked is None or batch.threat.threat_model in ADAPTIVE:
                    attacked = _attack(batch, context, name, clips, labels)
                record.add(batch.name(name), _score(batch, context, name, attacked, labels, plan.repeats), machine)
                bar.update(_work(batch, context.defenses[name], plan.repeats))
    return record


@contextmanager
def evaluation_bar(total: float, *, enabled: bool) -> Iterator[tqdm]:
    """A bar over `total` units of work, as of `work`, that fits a terminal of 80 columns.

    It is drawn anew every second, so that its clock goes on while a batch takes long.
    """
    columns = min(_COLUMNS, shutil.get_terminal_size().columns)
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    ended = threading.Event()
    with tqdm(total=total, disable=not enabled, ncols=columns - 1, bar_format=layout, smoothing=0) as bar:

        def tick() -> None:
            while not ended.wait(1):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        if enabled:
            clock.start()
        try:
            yield bar
        finally:
            ended.set()
            if enabled:
                clock.join()


def work(plan: Plan, context: EvalContext) -> float:
    """How much `evaluate` has to do for a plan, in purified clips; a cheap filter's clip counts for little."""
    return sum(_work(batch, context.defenses[name], plan.repeats) for batch in plan.batches() for name in plan.defenses)


def _work(batch: EvalBatch, defense: Defense, repeats: int) -> float:
    calls = float(repeats if defense.randomized else 1)
    if batch.threat.threat_model in ADAPTIVE:
        counts = [batch.threat.settings.get(name) for name in ("queries", "steps", "eot", "restarts")]
        attack = math.prod(count for count in counts if isinstance(count, int))
        calls += attack * (EXACT_GRADIENT if batch.threat.threat_model == "exact" else 1)
    return batch.clips * calls * (_FILTER if defense.purifier is None else 1)


def check_eval_mode(role: str, module: nn.Module | None) -> None:
    """ValueError if a classifier, or a part of it, is in training mode."""
    parts = module.modules() if isinstance(module, nn.Module) else [module]
    if any(getattr(part, "training", False) for part in parts):
        raise ValueError(
            f"the {role}, or a part of it, is in training mode, where its logits differ from call to call: "
            "call eval() first"
        )


def _draw(batch: EvalBatch, context: EvalContext) -> tuple[Tensor, Tensor]:
    """The batch's clips and labels, checked: bad clips would be counted as fooled."""
    clips, labels = context.draw(batch.seed, batch.start, batch.clips)
    if len(clips) or len(labels):
        check_labeled(clips, labels)
    if len(clips) > batch.clips:
        raise ValueError(f"{len(clips)} clips were drawn where {batch.clips} were asked for")
    return clips, labels


def _check_same_size(batch: EvalBatch, clips: int, sizes: dict[tuple[int, int, int], int]) -> None:
    """ValueError where a draw has more or fewer clips than it had under another threat: their places would shift."""
    if clips != (before := sizes.setdefault((batch.seed, batch.start, batch.clips), clips)):
        raise ValueError(
            f"of seed {batch.seed}'s clips from {batch.start} on {clips} could be read, and {before} before: files "
            "have changed, and outcomes before and after cannot be compared; restore the files, or begin another record"
        )


class _ModelCalled(Exception):
    """Raised by a stand-in model when an attack calls it."""


def _check_settings(plan: Plan, clips: Tensor, labels: Tensor) -> None:
    """Raise now what bad settings would raise hours later: an attack checks its arguments before it calls its model."""

    def model(_: Tensor) -> Tensor:
        raise _ModelCalled

    for threat in plan.threats:
        for eps in plan.eps if threat.threat_model != "none" else ():
            with suppress(_ModelCalled):
                run = ATTACKS[threat.attack].run
                run(model, clips, labels, eps=eps, generator=torch.Generator(), **threat.settings)


def attack_target(batch: EvalBatch, context: EvalContext, name: str) -> LogitsFn | None:
    """The function from clips to logits that the batch's attack on a defense queries; None where it has no access."""
    threat_model = batch.threat.threat_model
    if threat_model not in ADAPTIVE:
        return context.surrogate if threat_model == "transfer" else context.classifier
    # "query" needs no gradient, and the logits are the same with both.
    gradient: DefenseGradient = "exact" if threat_model == "exact" else "bpda"
    return context.defenses[name].logits(context.classifier, gradient, batch.generator(f"noise {name}"))


def _attack(batch: EvalBatch, context: EvalContext, name: str, clips: Tensor, labels: Tensor) -> Tensor | None:
    """The batch's clips as the defense meets them; None where the attack has no access."""
    if batch.threat.threat_model == "none" or not len(clips):
        return clips
    target = attack_target(batch, context, name)
    if target is None:
        return None
    generator = batch.generator(f"attack {name if batch.threat.threat_model in ADAPTIVE else ''}")
    run = ATTACKS[batch.threat.attack].run
    attacked = run(target, clips, labels, eps=batch.eps, generator=generator, **batch.threat.settings)
    _check_attacked(batch.threat, batch.eps, clips, attacked)
    return attacked


def _check_attacked(threat: Threat, eps: float, clips: Tensor, attacked: Tensor) -> None:
    """TypeError or ValueError unless an attack returned clips in [0, 1] within eps: others falsify an accuracy."""
    _check_returned(f"the attack {threat.attack!r}", attacked, clips.shape)
    distance = (attacked - clips).double().flatten(1)
    order = 2 if threat.settings.get("norm") == "l2" else math.inf
    farthest = torch.linalg.vector_norm(distance, order, dim=1).max().item()
    if farthest > eps * (1 + 1e-5):
        raise ValueError(
            f"the attack {threat.attack!r} moved a clip by {farthest:.6g}; accepted: eps, {eps:.6g}, at most"
        )


def _check_returned(what: str, clips: Tensor, shape: Sequence[int]) -> None:
    """TypeError or ValueError unless clips, or votes, are of that shape, finite and in [0, 1]."""
    if not isinstance(clips, Tensor):
        raise TypeError(f"{what} must return a tensor, got {type(clips).__name__}")
    if tuple(clips.shape) != tuple(shape):
        raise ValueError(f"{what} must return a tensor of shape {tuple(shape)}, got {tuple(clips.shape)}")
    low, high = (bound.item() for bound in torch.aminmax(clips.detach()))
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN fails both
        raise ValueError(f"{what} must return values in [0, 1], got {low} to {high}")


def _score(
    batch: EvalBatch, context: EvalContext, name: str, attacked: Tensor | None, labels: Tensor, repeats: int
) -> dict[str, Any]:
    """The batch's entry: how many of the repeats were right for each clip, seconds and bytes of one repeat."""
    if attacked is None:
        return {"right": None}
    if not len(labels):
        return {"right": [], "repeats": 1, "seconds": 0.0, "peak_bytes": None}
    defense = context.defenses[name]
    repeats = repeats if defense.randomized else 1
    generator, right = batch.generator(f"defend {name}"), torch.zeros_like(labels)
    memory, start = PeakMemory(attacked.device), time.perf_counter()
    for _ in range(repeats):
        with torch.no_grad():
            votes = defense.votes(attacked, generator)
            count = votes.shape[1] if isinstance(votes, Tensor) and votes.ndim > 1 else 1
            _check_returned(f"the defense {name!r}", votes, (len(labels), count, *attacked.shape[1:]))
            logits = classify_votes(context.classifier, votes)
        if labels.max() >= logits.shape[-1]:
            raise ValueError(f"labels reach {labels.max()}, but the classifier returns {logits.shape[-1]} classes")
        right += (majority_vote(logits) == labels).to(right)
    synchronize(attacked.device)
    seconds = (time.perf_counter() - start) / repeats
    return {"right": right.tolist(), "repeats": repeats, "seconds": seconds, "peak_bytes": memory.read()}


class Examples(NamedTuple):
    """Clips (n, 3, F, H, W) and labels (n,): clean, attacked, and the attacked ones purified.

    `purified` holds each clip's last vote; `purified_labels` are the majority over all votes.
    """

    clean: Tensor
    attacked: Tensor
    purified: Tensor
    labels: Tensor
    attacked_labels: Tensor
    purified_labels: Tensor


def examples(record: Record, threat: Threat, eps: float, defense: str, count: int, context: EvalContext) -> Examples:
    """The first `count` of the `rescued` clips of a cell of the table, attacked and purified again as for the record.

    ValueError where the cell is not done in full.
    """
    places = rescued(record, threat, eps, defense)[:count]
    if not places:
        raise ValueError(f"the record has no clips of {threat.title} at {255 * eps:g}/255 against {defense}")
    cell = [batch for batch in record.plan.batches() if (batch.threat, batch.eps) == (threat, eps)]
    batches = {(batch.seed, batch.start): batch for batch in cell}
    whole: dict[str, Examples] = {}  # by batch, attacked as a whole: a clip's random numbers depend on its place in it
    found = []
    for seed, place in places:
        batch = batches[seed, place - place % record.plan.batch]
        if batch.name() not in whole:
            whole[batch.name()] = _replay(batch, context, defense)
        found.append([part[place - batch.start] for part in whole[batch.name()]])
    return Examples(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _replay(batch: EvalBatch, context: EvalContext, name: str) -> Examples:
    """All clips of a batch as examples of a defense."""
    clips, labels = _draw(batch, context)
    attacked = _attack(batch, context, name, clips, labels)
    assert attacked is not None  # the batch has rescued clips, so the attack has access
    with torch.no_grad():
        votes = context.defenses[name].votes(attacked, batch.generator(f"defend {name}"))
        logits = context.classifier(attacked), classify_votes(context.classifier, votes)
        attacked_labels, purified_labels = map(majority_vote, logits)
    return Examples(clips, attacked, votes[:, -1], labels, attacked_labels, purified_labels)
