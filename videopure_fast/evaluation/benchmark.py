"""An evaluation in one call: `benchmark(classifier, purifier, clips, labels)` compares defenses under attack."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import class_names
from ..attacks.base import check_labeled
from ..data.datasets import draws
from ..data.mapped import MappedDataset, is_map_style
from ..data.sources import ClipSource
from ..defense.registry import Defense, build_defenses, find_defense
from ..inputs import as_floats, check_count
from ..purifier import Purifier
from . import runner
from .checks import checks_work, sanity_checks
from .classifier import align_classifier
from .plan import Plan, Threat, ThreatModel, standard_threat
from .record import clips_digest, weights_digest
from .report import Report
from .runner import Draw, EvalContext

DEFAULT_DEFENSES = ("none", "VAE round trip", "mean of 5 frames", "ddim_inversion", "ddim", "videopure")
DEFAULT_THREATS: tuple[ThreatModel, ...] = ("gray-box", "bpda")
DEFAULT_COUNT = 32


def benchmark(
    classifier: nn.Module,
    purifier: Purifier,
    clips: Tensor | tuple[Tensor, Tensor] | ClipSource | Draw | Any,
    labels: Tensor | None = None,
    *,
    threats: ThreatModel | Threat | Sequence[ThreatModel | Threat] = DEFAULT_THREATS,
    eps: float | Sequence[float] = (4 / 255, 8 / 255),
    defenses: str | Sequence[str] | Mapping[str, Defense] = DEFAULT_DEFENSES,
    surrogate: nn.Module | None = None,
    count: int | None = None,
    seeds: int | Sequence[int] = 1,
    batch: int = 8,
    repeats: int = 3,
    record: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    source: Mapping[str, Any] | None = None,
    workers: int = 0,
    checks: bool = True,
    progress: bool = True,
) -> Report:
    """Accuracy of defenses of a classifier under attack, with 95 % intervals and checks of the attacks.

        report = benchmark(classifier, purifier, (clips, labels), threats=["gray-box", "bpda", "exact"], eps=4 / 255)
        print(report)
        report.plot("accuracy.svg")

    Args:
        classifier: clips (B, 3, F, H, W) in [0, 1] -> logits (B, K), in eval mode, on the purifier's device, in any
            dtype. Where it has class names, as a transformers model does, they are compared with `classes`: its labels
            are put into their order, whatever case, blanks and punctuation; it may know further classes.
        purifier: from which the defenses are made.
        clips: clips (N, 3, F, H, W), floats in [0, 1] or uint8, with `labels` (N,) int64, or both as a tuple; a
            VideoDataset; a map-style data set of torch or Hugging Face, as `data.mapped.MappedDataset` takes it; or a
            function (seed, start, count) -> clips and labels that returns equal ones for equal arguments.
        threats: one or several threat models by name, which `plan.standard_threat` turns into attacks, or Threat
            objects, which attack at most `count` clips. Clean clips are always measured.
        eps: one or several sizes of the attacks in the clips' units, so 4 / 255 and not 4.
        defenses: names, as `defense.find_defense` takes them, or Defense objects by name. The last one is checked
            and pictured.
        surrogate: the attacker's own classifier; the threat model "transfer" needs it.
        count: clips of each seed; by default all clips of tensors divided by the seeds, and 32 of other sources, or
            all where a data set has less.
        seeds: how many, or which; each has its own clips and random numbers.
        batch: clips in memory at once.
        repeats: predictions of each clip by a randomized defense.
        record: a JSON file that keeps what is done, so that an interrupted call continues there; its folder is made if
            absent. None: nothing is kept.
        classes: names by label; those of a data set are its own, unless given here.
        source: a description of models and clips, saved in the record. A record with another one is refused, so name
            here what your draw function returns.
        workers: processes that decode a data set's videos.
        checks: also check gradients and attacks of the last defense, on two clips.
        progress: show a progress bar, in which the checks have their part.

    TypeError or ValueError for bad arguments before any attack, for class names of which the classifier lacks some, and
    for a record of another evaluation.
    """
    for name, value, kind in (("classifier", classifier, nn.Module), ("purifier", purifier, Purifier)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    if surrogate is not None and not isinstance(surrogate, nn.Module):
        raise TypeError(f"surrogate must be of type Module or None, got {type(surrogate).__name__}")
    for role, module in (("classifier", classifier), ("surrogate", surrogate)):
        runner.check_eval_mode(role, module)
    own = dict(defenses) if isinstance(defenses, Mapping) else {}
    for name, defense in own.items():
        if not isinstance(defense, Defense):
            raise TypeError(f"the defense {name!r} is a {type(defense).__name__}; accepted: a defense.Defense")
    numbers = _seeds(seeds)
    data = _data(clips, labels, count, numbers, workers, classes)
    plan = make_plan(threats, data.per_seed, eps=eps, defenses=defenses, seeds=numbers, batch=batch, repeats=repeats)
    device = purifier.unet.device

    def draw(seed: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        drawn, drawn_labels = data.draw(seed, start, size)
        return drawn.to(device), drawn_labels.to(device)

    classes = data.classes if classes is None else classes
    sample = draw(numbers[0], 0, min(2, data.per_seed))[0] if data.sample is None else data.sample.to(device)
    rival = None
    if surrogate is not None:
        unnamed = classes is None and class_names(surrogate) is not None
        labels_of = class_names(classifier) if unnamed else classes  # at least both classifiers have the same labels
        rival = align_classifier("surrogate", surrogate, sample, labels_of)
    aligned = align_classifier("classifier", classifier, sample, classes)
    modules = [None if module is None else weights_digest(module) for module in (classifier, surrogate, purifier)]
    identity = {**(source or {}), **data.identity, "digests": modules, "commit": purifier.commit_hash}
    identity |= {"dtype": str(purifier.unet.dtype), "config": asdict(purifier.config)}
    orders = [None if found is None else found.order for found in (aligned, rival)]
    identity |= {"labels": orders} if any(orders) else {}
    plan = replace(plan, source=json.dumps(identity))
    models = own or build_defenses(purifier, plan.defenses), draw, None if rival is None else rival.classifier
    context = EvalContext(aligned.classifier, *models)
    total = runner.work(plan, context) + (checks_work(plan, context) if checks else 0)
    with tempfile.TemporaryDirectory() as folder, runner.evaluation_bar(total, enabled=progress) as bar:
        path = Path(folder, "record.json") if record is None else record
        done = runner.evaluate(plan, context, path, skipped=data.skipped, bar=bar)
        found = sanity_checks(plan, context, bar=bar) if checks else []
    return Report(done, context, classes=aligned.classes, checks=found)


def make_plan(
    threats: ThreatModel | Threat | Sequence[ThreatModel | Threat],
    count: int,
    *,
    eps: float | Sequence[float],
    defenses: str | Sequence[str] | Mapping[str, Defense],
    seeds: Sequence[int],
    batch: int,
    repeats: int,
) -> Plan:
    """The plan of a `benchmark` with these arguments, without a source. It needs no models.

    count: clips of each seed. The names in a mapping of defenses need not be registered. TypeError or ValueError for
    bad arguments.
    """
    check_count("count", count)
    threats = (threats,) if isinstance(threats, str | Threat) else threats
    names = (defenses,) if isinstance(defenses, str) else tuple(defenses)
    given = [threat if isinstance(threat, Threat) else standard_threat(threat, count) for threat in threats]
    given = [replace(threat, clips=min(count, threat.clips)) for threat in given]
    clean = [] if any(threat.threat_model == "none" for threat in given) else [Threat("none", clips=count)]
    for name in () if isinstance(defenses, Mapping) else names:
        find_defense(name)
    sizes = (eps,) if isinstance(eps, int | float) else tuple(eps)
    return Plan("", (*clean, *given), names, sizes, tuple(seeds), batch, repeats)


def default_count(total: int, seeds: Sequence[int]) -> int:
    """Clips of each seed where none were asked for, of a data set of so many."""
    return max(1, min(DEFAULT_COUNT, total // (max(seeds) + 1)))


class _Data(NamedTuple):
    """Clips to draw from, `per_seed` for each seed.

    sample: clips on which classifiers are tried; None: the first that are drawn.
    """

    draw: Draw
    per_seed: int
    identity: dict[str, Any]
    classes: Sequence[str] | None = None
    sample: Tensor | None = None
    skipped: Mapping[Any, str] | None = None


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, Sequence):
        for seed in seeds:
            check_count("every seed", seed, least=0)
        if not seeds:
            raise ValueError("seeds must not be empty")
        return tuple(seeds)
    check_count("seeds", seeds)
    return tuple(range(seeds))


def _data(
    clips: Tensor | tuple[Tensor, Tensor] | ClipSource | Draw | Any,
    labels: Tensor | None,
    count: int | None,
    seeds: tuple[int, ...],
    workers: int,
    classes: Sequence[str] | None,
) -> _Data:
    """The source of clips, with the number of clips of each seed."""
    if isinstance(clips, tuple | list) and len(clips) == 2 and isinstance(clips[0], Tensor) and labels is None:
        clips, labels = clips
    if isinstance(clips, Tensor):
        if labels is None:
            raise ValueError("clips need labels: pass benchmark(classifier, purifier, clips, labels)")
        return _tensors(clips, labels, count, seeds)
    if labels is not None:
        raise ValueError(f"labels go with a tensor of clips, got clips of type {type(clips).__name__}")
    if not isinstance(clips, ClipSource) and not callable(clips) and is_map_style(clips):
        clips = MappedDataset(clips, classes=classes)
    if isinstance(clips, ClipSource):
        count = default_count(len(clips), seeds) if count is None else count
        check_count("count", count)
        _check_enough(len(clips), count, seeds)
        sample = torch.full((2, *clips.clip_shape), 0.5)
        identity = {"videos": clips.digest, "sampling": asdict(clips.sampling)}
        return _Data(draws(clips, count, workers), count, identity, clips.classes, sample, clips.skipped)
    count = DEFAULT_COUNT if count is None else count
    check_count("count", count)
    if not callable(clips):
        accepted = "a tensor with labels, (clips, labels), a VideoDataset, a map-style data set of videos and labels"
        seen = f"{type(clips).__name__}; accepted: {accepted}, or a function (seed, start, count)"
        raise TypeError(f"clips are a {seen}")
    return _Data(clips, count, {"draw": getattr(clips, "__qualname__", type(clips).__name__)})


def _tensors(clips: Tensor, labels: Tensor, count: int | None, seeds: tuple[int, ...]) -> _Data:
    """Seed s draws from clips s * count to (s + 1) * count."""
    if clips.dtype in (torch.uint8, torch.float16, torch.bfloat16):
        clips = as_floats(clips)
    check_labeled(clips, labels)
    per_seed = len(clips) // (max(seeds) + 1) if count is None else count
    check_count("count", per_seed)
    _check_enough(len(clips), per_seed, seeds)

    def draw(seed: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        first = seed * per_seed + start
        return clips[first : first + size], labels[first : first + size]

    return _Data(draw, per_seed, {"clips": clips_digest(clips, labels)}, sample=clips[:2])


def _check_enough(total: int, count: int, seeds: tuple[int, ...]) -> None:
    if (max(seeds) + 1) * count > total:
        raise ValueError(f"{max(seeds) + 1} x {count} clips are needed, and there are {total}")
