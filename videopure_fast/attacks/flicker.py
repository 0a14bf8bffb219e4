"""Flicker: one color offset for each frame, a stress test outside the usual balls."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..inputs import check_number
from .base import Loss, Model, gradient_of, perturb, prepare
from .registry import register_attack


@register_attack
def flicker(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 50,
    step_size: float | None = None,
    thickness: float = 0.1,
    roughness: float = 0.1,
    loss: Loss = "ce",
    eot: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """One RGB offset of at most eps for each frame: a flickering light (arXiv 2002.05123).

    As in the paper, a penalty is subtracted from the loss: thickness times the offsets' mean square, and roughness
    times the mean squares of their first and second differences in time, which is cyclic; here offsets are in units of
    eps. The offsets start at 0: `generator` is not drawn from. The step size falls to 0 linearly, so that they settle.

    step_size: of the first step; None is 5 eps / steps.
    """
    task = prepare(
        model,
        clips,
        labels,
        eps,
        steps=steps,
        step_size=step_size,
        path_length=5.0,
        loss=loss,
        eot=eot,
        generator=generator,
    )
    check_number("thickness", thickness)
    check_number("roughness", roughness)
    clips = task.ball.clips
    offset = torch.zeros_like(clips[..., :1, :1])
    for i in tqdm(range(steps), desc="flicker", disable=not progress):
        gain = eps * task.target.gradient(offset, lambda offset: (clips + offset).clamp(0, 1))
        cost = gradient_of(offset / eps, lambda u: _penalty(u, thickness, roughness))
        offset = (offset + task.step_size * (1 - i / steps) * (gain - cost).sign()).clamp(-eps, eps)
    return perturb(clips, offset)


def _penalty(offsets: Tensor, thickness: float, roughness: float) -> Tensor:
    """The penalty (B,) of offsets (B, 3, F, 1, 1) in units of eps."""
    before, after = offsets.roll(1, 2), offsets.roll(-1, 2)
    first, second = offsets - before, before - 2 * offsets + after
    cost = thickness * offsets.square() + roughness * (first.square() + second.square())
    return cost.flatten(1).mean(1)
