"""Whether an evaluation can be believed: what a reviewer asks of gradients and attacks, each with an answer.

A defence whose gradients are wrong looks robust (obfuscated gradients, arXiv 1802.00420; checklist of arXiv
1902.06705). So: the exact gradient must agree with finite differences, an attack that goes on must gain, accuracy must
reach zero where anything is allowed, and who knows more must not do worse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attack_parts import cross_entropy, vote
from .attacks import apgd, pgd
from .defense import DefendedClassifier
from .evaluation import Accuracy
from .purifier import Purifier

# Of a pixel, in float64: so small that hardly any sign of the guidance turns, by itself or by the flow under it. Its
# derivative is zero between its jumps, and finite differences across them see more.
_DIFFERENCE = 1e-9
_AGREEMENT = 1e-3  # of a derivative with its finite difference, relative


class Check(NamedTuple):
    """A question, whether the answer is as it must be, and what was seen."""

    name: str
    passed: bool
    seen: str


def gradient_check(purifier: Purifier, classifier: nn.Module, clips: Tensor, labels: Tensor) -> Check:
    """The exact gradient against a central difference along its own sign, on copies in float64.

    clips: (B, 3, F, H, W) in [0, 1]; labels (B,).
    """
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
        return cross_entropy(defended.vote_logits(x, generator=generator), labels).sum()

    x = clips.detach().double().clamp(_DIFFERENCE, 1 - _DIFFERENCE)
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point), point)
    direction = gradient.sign()
    with torch.no_grad():
        numeric = (loss(x + _DIFFERENCE * direction) - loss(x - _DIFFERENCE * direction)) / (2 * _DIFFERENCE)
    analytic, numeric = (gradient * direction).sum().item(), numeric.item()
    passed = analytic > 0 and abs(analytic - numeric) <= _AGREEMENT * abs(numeric)
    return Check(
        "the exact gradient agrees with finite differences", passed, f"{analytic:.6g}, by differences {numeric:.6g}"
    )


def source_check(
    other: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor, *, eps: float, steps: int = 10
) -> Check:
    """PGD on the attacker's own classifier, from which attacks transfer: it must be right on most clips, and lose most
    of them. A poor one makes every defence look good."""

    def accuracy(x: Tensor) -> float:
        with torch.no_grad():
            return (vote(other(x)) == labels).double().mean().item()

    generator = torch.Generator().manual_seed(0)
    clean = accuracy(clips)
    attacked = accuracy(pgd(other, clips, labels, eps=eps, step_size=eps / 2, steps=steps, generator=generator))
    seen = f"right on {clean:.2f} of clean clips, on {attacked:.2f} of those attacked at {255 * eps:g}/255"
    return Check("the attacker's own classifier is accurate, and fooled", clean > 0.5 > attacked, seen)


def effort_check(
    model: Callable[[Tensor], Tensor], clips: Tensor, labels: Tensor, *, eps: float, steps: int = 10
) -> Check:
    """PGD in small steps on `model`, an attack's target: the mean loss must be higher in its second half."""
    losses: list[float] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits, labels)
        losses.append(loss.mean().item())
        return loss

    generator = torch.Generator().manual_seed(0)
    options = {"eps": eps, "step_size": eps / 4, "steps": steps, "random_start": False}
    pgd(model, clips, labels, loss=watched, generator=generator, **options)
    half = len(losses) // 2
    first, second = (sum(part) / len(part) for part in (losses[:half], losses[half:]))
    seen = f"{losses[0]:.3g} at first, {losses[half]:.3g} half way, {losses[-1]:.3g} at step {steps}"
    return Check("the loss rises with the attack's steps", second > first and losses[-1] > losses[0], seen)


def reach_check(
    model: Callable[[Tensor], Tensor],
    clips: Tensor,
    labels: Tensor,
    *,
    eps: Iterable[float] = (8 / 255, 64 / 255, 1.0),
    steps: int = 10,
) -> Check:
    """APGD on `model`, an attack's target: no clip may withstand the last eps."""
    seen, right = [], 1.0
    for size in eps:
        attacked = apgd(model, clips, labels, eps=size, steps=steps, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            right = (vote(model(attacked)) == labels).double().mean().item()
        seen.append(f"{right:.2f} at {255 * size:g}/255")
    return Check("accuracy goes to zero as eps grows", right == 0, ", ".join(seen))


def order_checks(rows: Iterable[Accuracy]) -> list[Check]:
    """Who knows more must not do worse, within the intervals, for each defence and eps.

    exact <= bpda <= gray-box, by one attack with one budget; the best of exact and bpda <= transfer and query.
    """
    cells: dict[tuple[str, float], list[Accuracy]] = {}
    for row in rows:
        cells.setdefault((row.defence, row.eps), []).append(row)
    return [
        Check(
            f"{defence}, {255 * eps:g}/255: {stronger.access} is at least as strong as {weaker.access}",
            stronger.low <= weaker.high,
            " against ".join(
                f"{row.accuracy:.3f} ({row.low:.3f} to {row.high:.3f}, n={row.n})" for row in (stronger, weaker)
            ),
        )
        for (defence, eps), cell in cells.items()
        for stronger, weaker in _pairs(cell)
    ]


def _pairs(cell: list[Accuracy]) -> Iterator[tuple[Accuracy, Accuracy]]:
    """Rows of one defence and eps of which the first must not be the more accurate."""
    for knows, less in (("exact", "bpda"), ("exact", "gray-box"), ("bpda", "gray-box")):
        for one in cell:
            for other in cell:
                same = one.threat.removeprefix(one.access) == other.threat.removeprefix(other.access)
                if (one.access, other.access) == (knows, less) and same:
                    yield one, other
    white = min((row for row in cell if row.access in ("exact", "bpda")), key=lambda row: row.accuracy, default=None)
    yield from ((white, row) for row in cell if white is not None and row.access in ("transfer", "query"))
