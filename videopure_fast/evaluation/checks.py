"""Sanity checks of an evaluation's gradients and attacks.

A defense whose gradients are wrong looks robust (obfuscated gradients, arXiv 1802.00420; checklist of arXiv
1902.06705). The checks: the exact gradient agrees with finite differences; more attack steps raise the loss; accuracy
reaches zero where eps is unbounded; an attacker with more knowledge does not do worse.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks import apgd, pgd
from ..attacks.base import check_labeled, gradient_of, majority_vote
from ..attacks.losses import cross_entropy, margin
from ..defense.classifier import DefendedClassifier
from ..inputs import check_count
from ..purifier import Purifier
from .plan import Plan, Threat
from .record import Record
from .runner import EXACT_GRADIENT, EvalContext
from .tables import Outcome, outcome

# Finite-difference step in pixel values, float64. It is small enough that few of the guidance's sign() terms flip: the
# derivative of sign() is zero, but a finite difference across a flip is not.
_DIFFERENCE = 1e-9
_DIRECTIONS = 3
_AGREEMENT = 1e-3  # largest error of a directional derivative, relative to the gradient's l2 norm
_GAIN = 3  # least ratio of an attack's gain in the loss to that of noise
_SIGNIFICANCE = 0.025  # one-sided probability that an order which holds is reported as broken
_CHECKED_CLIPS = 2
_SOURCE_CLIPS = 32
_EFFORT_STEPS, _NOISE_DRAWS = 5, 4  # PGD computes the loss before each step: four steps go before the last loss
_REACH_EPS, _REACH_STEPS = (8 / 255, 16 / 255, 64 / 255, 1.0), 10
_DOUBLE = 2.0  # purifications in float32 that take as long as one in float64
_LONG = 120  # seconds beyond which the checks say how long they may take


class Check(NamedTuple):
    """A property that must hold, whether it does, and the measured values in words."""

    name: str
    passed: bool
    seen: str


def gradient_check(purifier: Purifier, classifier: nn.Module, clips: Tensor, labels: Tensor) -> Check:
    """Compare the exact gradient of the margin with central differences along random signs, on copies in float64.

    clips: (B, 3, F, H, W) in [0, 1]; labels (B,). Random directions reveal a gradient that misses a frame or a window;
    the gradient's own sign would not. The margin is used because a confident classifier's cross-entropy changes by less
    than its rounding.
    """
    if not isinstance(purifier, Purifier):
        raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    check_labeled(clips, labels)
    unet, vae, decoder, double_classifier = (
        None if module is None else copy.deepcopy(module).double()
        for module in (purifier.unet, purifier.vae, purifier.decoder, classifier)
    )
    negative = purifier.negative_prompt_embeds
    double_purifier = Purifier(
        unet,
        vae,
        prompt_embeds=purifier.prompt_embeds.double(),
        negative_prompt_embeds=None if negative is None else negative.double(),
        flow=purifier.flow,
        config=purifier.config,
        max_frames=purifier.max_frames,
        decoder=decoder,
    )
    defended = DefendedClassifier(double_classifier, double_purifier)

    def loss(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)  # equal noise in every call
        return margin(defended.vote_logits(x, generator=generator), labels).sum()

    x = clips.detach().double().clamp(_DIFFERENCE, 1 - _DIFFERENCE)
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point), point)
    seen, passed, size = [], True, gradient.norm().item()  # the usual size of its product with random signs
    for seed in range(_DIRECTIONS):
        signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x) * 2 - 1
        with torch.no_grad():
            numeric = (loss(x + _DIFFERENCE * signs) - loss(x - _DIFFERENCE * signs)).item() / (2 * _DIFFERENCE)
        analytic = (gradient * signs).sum().item()
        passed &= abs(analytic - numeric) <= _AGREEMENT * size
        seen.append(f"{analytic:.6g} for {numeric:.6g}")
    return Check("the exact gradient agrees with finite differences", passed and size > 0, ", ".join(seen))


def stand_in_check(
    exact: Callable[[Tensor], Tensor], bpda: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor
) -> Check:
    """Compare BPDA's gradient of the margin with the exact one: their mean cosine must be positive.

    BPDA takes the defense for the identity. Where a defense reverses the direction of small changes, BPDA's steps lower
    the loss, and the accuracy under BPDA says nothing about robustness.
    """
    slopes = [gradient_of(clips, lambda x: margin(model(x), labels)).flatten(1) for model in (exact, bpda)]  # noqa: B023
    cosines = F.cosine_similarity(*slopes)
    seen = f"its cosine with the exact one is {', '.join(f'{cosine:.2f}' for cosine in cosines.tolist())}"
    return Check("BPDA's gradient points uphill", cosines.mean().item() > 0, seen)


def source_check(
    surrogate: Callable[[Tensor], Tensor],
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 10,
    batch: int = 16,
) -> Check:
    """Attack the surrogate, from which attacks transfer, by PGD: it must be right on most clean clips and on few
    attacked ones, since a poor surrogate makes every defense look robust. batch: clips in memory at once."""

    def right(x: Tensor, y: Tensor) -> int:
        with torch.no_grad():
            return (majority_vote(surrogate(x)) == y).sum().item()

    generator = torch.Generator().manual_seed(0)
    check_labeled(clips, labels)
    check_count("batch", batch)
    parts = list(zip(clips.split(batch), labels.split(batch), strict=True))
    clean = sum(right(x, y) for x, y in parts) / len(clips)
    attacked = 0.0
    for x, y in parts:
        attacked += right(pgd(surrogate, x, y, eps=eps, step_size=eps / 2, steps=steps, generator=generator), y)
    attacked /= len(clips)
    seen = f"right on {clean:.2f} of clean clips, on {attacked:.2f} of those attacked at {255 * eps:g}/255"
    return Check("the attacker's own classifier is accurate, and fooled", clean > 0.5 > attacked, seen)


def effort_check(
    model: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor, *, eps: float, steps: int = 10
) -> Check:
    """Attack `model` by PGD in small steps: the mean loss must rise several times more than by noise of the same size,
    since noise too raises the loss of rightly classified clips. The last loss is that at the full eps."""
    check_count("steps", steps, least=2)  # PGD computes the loss before each step, and not after the last one
    step_size = eps / (min(steps, _EFFORT_STEPS) - 1)
    losses: list[float] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits, labels)
        losses.append(loss.mean().item())
        return loss

    pgd(model, clips, labels, loss=watched, eps=eps, step_size=step_size, steps=steps, random_start=False)
    gain, half = losses[-1] - losses[0], losses[len(losses) // 2]
    with torch.no_grad():
        noisy = [model(_noisy(clips, eps, seed)) for seed in range(_NOISE_DRAWS)]
    noise = [cross_entropy(logits, labels).mean().item() - losses[0] for logits in noisy]
    most = max(map(abs, noise))
    seen = f"{losses[0]:.3g} at first, {half:.3g} half way, {losses[-1]:.3g} at the end; noise moves it by {most:.2g}"
    return Check("the loss rises with the attack's steps, more than by noise", gain > _GAIN * most, seen)


def reach_check(
    model: Callable[[Tensor], Tensor],
    clips: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[float] = _REACH_EPS,
    steps: int = _REACH_STEPS,
) -> Check:
    """Attack `model` by APGD, starting at the clips: accuracy must be 0 at the last eps, and at some eps less than
    half of the accuracy under as many draws of noise of that size. Beyond that eps only the last one is tried."""
    seen, below_noise, right = [], False, 1.0
    for size in eps:
        if below_noise and size != eps[-1]:
            continue
        attacked = _attacked(model, clips, labels, size, steps)
        with torch.no_grad():
            right = (majority_vote(model(attacked)) == labels).double().mean().item()
            by_noise = _right_under_noise(model, clips, labels, size, draws=steps)
        below_noise |= right < by_noise / 2
        seen.append(f"{right:.2f} at {255 * size:g}/255 (noise {by_noise:.2f})")
    return Check(
        "accuracy goes to zero as eps grows, sooner than by noise", below_noise and right == 0, ", ".join(seen)
    )


def _right_under_noise(
    model: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor, eps: float, *, draws: int
) -> float:
    """The share of clips that the model has right under each of so many draws of noise."""
    right = torch.ones_like(labels, dtype=torch.bool)
    for seed in range(draws):
        right &= majority_vote(model(_noisy(clips, eps, seed))) == labels
        if not right.any():
            break
    return right.double().mean().item()


class _Fooled(Exception):
    """Raised in the place of a gradient that an attack no longer needs."""


def _attacked(model: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    """The clips under APGD; each as it was when it first fooled the model, which ends the attack once all have."""
    fooled, found = torch.zeros_like(labels, dtype=torch.bool), clips.clone()

    def watched(x: Tensor) -> Tensor:
        logits = model(x)
        new = (majority_vote(logits.detach()) != labels) & ~fooled
        found[new] = x.detach()[new]
        fooled.logical_or_(new)
        if fooled.all():
            raise _Fooled
        return logits

    try:
        attacked = apgd(watched, clips, labels, eps=eps, steps=steps, random_start=False)
    except _Fooled:
        return found
    return torch.where(fooled.view(-1, 1, 1, 1, 1), found, attacked)


def _noisy(clips: Tensor, eps: float, seed: int) -> Tensor:
    """clips + eps times random signs, in [0, 1]."""
    signs = torch.randint(2, clips.shape, generator=torch.Generator().manual_seed(seed)).to(clips) * 2 - 1
    return (clips + eps * signs).clamp(0, 1)


_EFFORT, _REACH, _BPDA = "an attack that goes on", "an attack without bounds", "BPDA's gradient"
_EXACT, _SURROGATE = "the exact gradient", "the surrogate"


def checks_work(plan: Plan, context: EvalContext) -> float:
    """How much `sanity_checks` has to do at most, in units of `runner.work`; what is no purification is left out."""
    return sum(_purified(plan, context).values())


def _purified(plan: Plan, context: EvalContext) -> dict[str, float]:
    """Check -> how many clips could be purified in its time, at most; empty where nothing is purified."""
    clips = min(plan.threats[0].clips, _CHECKED_CLIPS)
    if context.defenses[plan.defenses[-1]].purifier is None:
        return {}
    return {
        _EFFORT: clips * (_EFFORT_STEPS * EXACT_GRADIENT + _NOISE_DRAWS),
        _REACH: clips * len(_REACH_EPS) * (_REACH_STEPS + 1) * (EXACT_GRADIENT + 1),
        _BPDA: clips * (EXACT_GRADIENT + 1),
        _EXACT: _DOUBLE * (EXACT_GRADIENT + 2 * _DIRECTIONS),
    }


class _Progress:
    """Moves a bar along with the checks, and says once how long they may take, if that is long.

    name: of the defense. purified: as `_purified` returns it.
    """

    def __init__(self, name: str, purified: dict[str, float], bar: tqdm | None) -> None:
        self._name, self._purified = name, purified
        self._bar = tqdm(disable=True) if bar is None else bar
        self._done, self._announced, self._started = 0.0, False, time.perf_counter()

    @contextmanager
    def of(self, check: str) -> Iterator[None]:
        """Within this block the check runs."""
        self._bar.set_description_str(f"check {self._name}: {check}"[:40])
        end = self._done + self._purified.get(check, 0)
        yield
        self._advance(end - self._done)

    def counted(self, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The model, each of whose calls moves the bar."""

        def call(clips: Tensor) -> Tensor:
            if self._purified:
                self._announce()
                self._advance(len(clips) * (EXACT_GRADIENT if clips.requires_grad else 1))
            return model(clips)

        return call

    def _advance(self, purified: float) -> None:
        self._done += purified
        self._bar.update(purified)

    def _announce(self) -> None:
        if not self._done or self._announced:
            return
        self._announced = True
        left = sum(self._purified.values()) - self._done
        seconds = left / self._done * (time.perf_counter() - self._started)
        if seconds > _LONG and not self._bar.disable:
            took = f"may take up to {tqdm.format_interval(seconds)}, more than two minutes"
            tqdm.write(f"The checks of {self._name} {took}; --no-checks, or checks=False, omits them.", sys.stderr)


def sanity_checks(plan: Plan, context: EvalContext, *, bar: tqdm | None = None) -> list[Check]:
    """The checks that need work, for the plan's last defense, on two clips.

    They use the defense's exact gradient, or BPDA's where it has none. A check that raises counts as failed. bar: a
    `runner.evaluation_bar`, of whose total `checks_work` is a part.
    """
    name, eps = plan.defenses[-1], plan.eps[-1]
    defense, classifier, count = context.defenses[name], context.classifier, plan.threats[0].clips
    drawn = (context.draw(seed, 0, min(count, _CHECKED_CLIPS)) for seed in plan.seeds)
    found = next((batch for batch in drawn if len(batch[1])), None)
    if found is None:
        return [Check(f"{name}: checks", False, "not made: none of the first clips could be read")]
    clips, labels = found
    exact = defense.logits(classifier, "exact", torch.Generator().manual_seed(0))
    bpda = defense.logits(classifier, "bpda", torch.Generator().manual_seed(0))
    progress = _Progress(name, _purified(plan, context), bar)
    todo: dict[str, Callable[[], Check]] = {}
    if (target := exact or bpda) is not None:
        watched = progress.counted(target)
        todo[_EFFORT] = partial(effort_check, watched, clips, labels, eps=eps, steps=_EFFORT_STEPS)
        todo[_REACH] = partial(reach_check, watched, clips, labels, eps=_REACH_EPS, steps=_REACH_STEPS)
    if exact is not None and bpda is not None:
        todo[_BPDA] = partial(stand_in_check, exact, bpda, clips, labels)
    if defense.purifier is not None:
        todo[_EXACT] = partial(gradient_check, defense.purifier, classifier, clips[:1], labels[:1])
    if context.surrogate is not None:
        more = context.draw(plan.seeds[0], 0, min(count, _SOURCE_CLIPS))  # this check is cheap, and two clips are few
        todo[_SURROGATE] = partial(source_check, context.surrogate, *more, eps=eps, batch=plan.batch)
    checks = []
    for what, run in todo.items():
        with progress.of(what):
            try:
                check = run()
            except Exception as error:  # such as a classifier without float64, or too little memory
                check = Check(what, False, f"not made: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            checks.append(check._replace(name=f"{name}: {check.name}"))
    return checks


def order_checks(*records: Record) -> list[Check]:
    """Check that attackers with more knowledge leave no more clips right, beyond chance, on the clips both attacked.

    The orders: exact <= bpda <= gray-box, for the same attack and settings; the stronger of exact and bpda <= transfer
    and query. The exact sign test over the clips on which the two differ fails for an order that holds at most once in
    forty times. The defense "none" has no order, since these threat models do not differ without a defense.
    """
    cells: dict[tuple[str, float], list[tuple[Threat, Outcome]]] = {}
    for record in records:
        for threat in record.plan.threats:
            for eps in record.plan.eps:
                for name in record.plan.defenses:
                    found = outcome(record, threat, eps, name)
                    if name != "none" and threat.threat_model != "none" and found.shares:
                        cells.setdefault((name, eps), []).append((threat, found))
    return [
        _order_check(f"{name}, {255 * eps:g}/255", *pair)
        for (name, eps), cell in cells.items()
        for pair in _pairs(cell)
    ]


_Attacked = tuple[Threat, Outcome]


def _order_check(cell: str, stronger: _Attacked, weaker: _Attacked) -> Check:
    common = sorted(set(stronger[1].shares) & set(weaker[1].shares))
    ours, theirs = ([outcome.shares[clip] for clip in common] for _, outcome in (stronger, weaker))
    against = sum(a > b for a, b in zip(ours, theirs, strict=True))
    differing = against + sum(a < b for a, b in zip(ours, theirs, strict=True))
    chance = sum(math.comb(differing, k) for k in range(against, differing + 1)) / 2**differing
    name = f"{cell}: {stronger[0].threat_model} is at least as strong as {weaker[0].threat_model}"
    means = [sum(shares) / len(common) for shares in (ours, theirs)]
    seen = f"leaves {means[0]:.3f} against {means[1]:.3f} of {len(common)} clips, "
    return Check(name, chance >= _SIGNIFICANCE, f"{seen}{against} of {differing} that differ (p = {chance:.2g})")


def _pairs(cell: list[_Attacked]) -> Iterator[tuple[_Attacked, _Attacked]]:
    """Pairs (stronger, weaker) of attacks on one defense at one eps."""

    def share(attacked: _Attacked) -> float:
        return sum(attacked[1].shares.values()) / len(attacked[1].shares)

    for order in (("exact", "bpda"), ("exact", "gray-box"), ("bpda", "gray-box")):
        for one in cell:
            for other in cell:
                same = (one[0].attack, one[0].settings) == (other[0].attack, other[0].settings)
                if (one[0].threat_model, other[0].threat_model) == order and same and _share_clips(one, other):
                    yield one, other
    best = min((one for one in cell if one[0].threat_model in ("exact", "bpda")), key=share, default=None)
    for other in cell:
        if best is not None and other[0].threat_model in ("transfer", "query") and _share_clips(best, other):
            yield best, other


def _share_clips(one: _Attacked, other: _Attacked) -> bool:
    return not one[1].shares.keys().isdisjoint(other[1].shares)
