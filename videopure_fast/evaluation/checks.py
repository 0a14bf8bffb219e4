"""Whether an evaluation can be believed: what a reviewer asks of gradients and attacks, each with an answer.

A defense whose gradients are wrong looks robust (obfuscated gradients, arXiv 1802.00420; checklist of arXiv
1902.06705). So: the exact gradient must agree with finite differences, an attack that goes on must gain, accuracy must
reach zero where anything is allowed, and who knows more must not do worse.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import apgd, pgd
from ..attacks.base import check_labeled, gradient_of, majority_vote
from ..attacks.losses import cross_entropy, margin
from ..defense.classifier import DefendedClassifier
from ..inputs import check_count
from ..purifier import Purifier
from .record import Record, Threat
from .tables import Outcome, outcome

# Of a pixel, in float64: so small that hardly any sign of the guidance turns, by itself or by the flow under it. Its
# derivative is zero between its jumps, and finite differences across them see more.
_DIFFERENCE = 1e-9
_DIRECTIONS = 3
_AGREEMENT = 1e-3  # of a derivative with its finite difference, relative to the gradient's length
_GAIN = 3  # of an attack over noise
_DOUBT = 0.025  # the chance, one-sided, that an order which holds is called broken


class Check(NamedTuple):
    """A question, whether the answer is as it must be, and what was seen."""

    name: str
    passed: bool
    seen: str


def gradient_check(purifier: Purifier, classifier: nn.Module, clips: Tensor, labels: Tensor) -> Check:
    """The exact gradient of the margin against central differences along random signs, on copies in float64.

    clips: (B, 3, F, H, W) in [0, 1]; labels (B,). Random directions see a gradient that a frame or a window has lost;
    the gradient's own sign would not. A confident classifier's cross-entropy is flatter than its rounding; the margin
    is not.
    """
    if not isinstance(purifier, Purifier):
        raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    check_labeled(clips, labels)
    unet, vae, decoder, judge = (
        None if module is None else copy.deepcopy(module).double()
        for module in (purifier.unet, purifier.vae, purifier.decoder, classifier)
    )
    prompts = {"prompt_embeds": purifier.prompt_embeds, "negative_prompt_embeds": purifier.negative_prompt_embeds}
    prompts = {name: value if value is None else value.double() for name, value in prompts.items()}
    options = {"flow": purifier.flow, "config": purifier.config, "max_frames": purifier.max_frames, "decoder": decoder}
    defended = DefendedClassifier(judge, Purifier(unet, vae, **prompts, **options))

    def loss(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)  # the same noise each time
        return margin(defended.vote_logits(x, generator=generator), labels).sum()

    x = clips.detach().double().clamp(_DIFFERENCE, 1 - _DIFFERENCE)
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point), point)
    seen, passed, size = [], True, gradient.norm().item()  # about what random signs make of it
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
    """Whether BPDA's gradient of the margin may stand for the exact one: on average it must point uphill.

    BPDA takes the defense for the identity. Where a defense turns small changes around, following its gradient makes
    clips safer, and what they withstand says nothing.
    """
    slopes = [gradient_of(clips, lambda x: margin(model(x), labels)).flatten(1) for model in (exact, bpda)]  # noqa: B023
    cosines = F.cosine_similarity(*slopes)
    seen = f"its cosine with the exact one is {', '.join(f'{cosine:.2f}' for cosine in cosines.tolist())}"
    return Check("BPDA's gradient points uphill", cosines.mean().item() > 0, seen)


def source_check(
    other: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor, *, eps: float, steps: int = 10, batch: int = 16
) -> Check:
    """PGD on the attacker's own classifier, from which attacks transfer: it must be right on most clips, and lose most
    of them. A poor one makes every defense look good. batch: clips in memory at once."""

    def right(x: Tensor, y: Tensor) -> int:
        with torch.no_grad():
            return (majority_vote(other(x)) == y).sum().item()

    options = {"eps": eps, "step_size": eps / 2, "steps": steps, "generator": torch.Generator().manual_seed(0)}
    check_labeled(clips, labels)
    check_count("batch", batch)
    parts = list(zip(clips.split(batch), labels.split(batch), strict=True))
    clean = sum(right(x, y) for x, y in parts) / len(clips)
    attacked = sum(right(pgd(other, x, y, **options), y) for x, y in parts) / len(clips)
    seen = f"right on {clean:.2f} of clean clips, on {attacked:.2f} of those attacked at {255 * eps:g}/255"
    return Check("the attacker's own classifier is accurate, and fooled", clean > 0.5 > attacked, seen)


def effort_check(
    model: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor, *, eps: float, steps: int = 10
) -> Check:
    """PGD in small steps on `model`, an attack's target: its gain in the mean loss must be several times what noise of
    the same size does, for noise too raises the loss of clips that are right."""
    check_count("steps", steps, least=2)  # the loss is seen before each step, not after the last
    losses: list[float] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits, labels)
        losses.append(loss.mean().item())
        return loss

    options = {"eps": eps, "step_size": eps / 4, "steps": steps, "random_start": False}
    pgd(model, clips, labels, loss=watched, **options)
    gain, half = losses[-1] - losses[0], losses[len(losses) // 2]
    with torch.no_grad():
        noise = [cross_entropy(model(_noisy(clips, eps, seed)), labels).mean().item() - losses[0] for seed in range(4)]
    most = max(map(abs, noise))
    seen = f"{losses[0]:.3g} at first, {half:.3g} half way, {losses[-1]:.3g} at the end; noise moves it by {most:.2g}"
    return Check("the loss rises with the attack's steps, more than by noise", gain > _GAIN * most, seen)


def reach_check(
    model: Callable[[Tensor], Tensor],
    clips: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[float] = (8 / 255, 16 / 255, 64 / 255, 1.0),
    steps: int = 10,
) -> Check:
    """APGD from the clips on `model`, an attack's target: no clip may withstand the last eps, and at some eps the
    attack must leave less than half of what as many draws of noise of that size do."""
    seen, sooner, right = [], False, 1.0
    for size in eps:
        attacked = apgd(model, clips, labels, eps=size, steps=steps, random_start=False)
        with torch.no_grad():
            right = (majority_vote(model(attacked)) == labels).double().mean().item()
            draws = [majority_vote(model(_noisy(clips, size, seed))) == labels for seed in range(steps)]
            by_noise = torch.stack(draws).all(0).double().mean().item()
        sooner |= right < by_noise / 2
        seen.append(f"{right:.2f} at {255 * size:g}/255 (noise {by_noise:.2f})")
    return Check("accuracy goes to zero as eps grows, sooner than by noise", sooner and right == 0, ", ".join(seen))


def _noisy(clips: Tensor, eps: float, seed: int) -> Tensor:
    """clips + eps times random signs, in [0, 1]."""
    signs = torch.randint(2, clips.shape, generator=torch.Generator().manual_seed(seed)).to(clips) * 2 - 1
    return (clips + eps * signs).clamp(0, 1)


def order_checks(*records: Record) -> list[Check]:
    """Who knows more must not do worse, on the clips that both attacked, beyond what chance allows.

    By the exact sign test over the clips on which the two differ: an order that holds fails once in forty, or less.

    exact <= bpda <= gray-box, by one attack with one budget; the best of exact and bpda <= transfer and query. Without
    a defense, which all of them attack alike, nothing is asked.
    """
    cells: dict[tuple[str, float], list[tuple[Threat, Outcome]]] = {}
    for record in records:
        for threat in record.plan.threats:
            for eps in record.plan.eps:
                for name in record.plan.defenses:
                    found = outcome(record, threat, eps, name)
                    if name != "none" and threat.access != "none" and found.shares:
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
    name = f"{cell}: {stronger[0].access} is at least as strong as {weaker[0].access}"
    means = [sum(shares) / len(common) for shares in (ours, theirs)]
    seen = f"leaves {means[0]:.3f} against {means[1]:.3f} of {len(common)} clips, "
    return Check(name, chance >= _DOUBT, f"{seen}{against} of {differing} that differ (p = {chance:.2g})")


def _pairs(cell: list[_Attacked]) -> Iterator[tuple[_Attacked, _Attacked]]:
    """Attacks on one defense with one eps, of which the first must not leave the higher accuracy."""

    def share(attacked: _Attacked) -> float:
        return sum(attacked[1].shares.values()) / len(attacked[1].shares)

    for knows, less in (("exact", "bpda"), ("exact", "gray-box"), ("bpda", "gray-box")):
        for one in cell:
            for other in cell:
                same = (one[0].attack, one[0].settings) == (other[0].attack, other[0].settings)
                if (one[0].access, other[0].access) == (knows, less) and same and _share_clips(one, other):
                    yield one, other
    white = min((one for one in cell if one[0].access in ("exact", "bpda")), key=share, default=None)
    for other in cell:
        if white is not None and other[0].access in ("transfer", "query") and _share_clips(white, other):
            yield white, other


def _share_clips(one: _Attacked, other: _Attacked) -> bool:
    return not one[1].shares.keys().isdisjoint(other[1].shares)
