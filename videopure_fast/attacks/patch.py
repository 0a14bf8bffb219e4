"""Patch: PGD on a square of pixels, a stress test outside the usual balls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..inputs import check_count
from .base import Model, Shared, best_of_restarts, gradient_steps, interval_mask, prepare
from .registry import register_attack

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register_attack
def patch(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    size: int,
    corner: tuple[int, int] | None = None,
    eps: float = 1.0,
    steps: int = 50,
    step_size: float | None = None,
    random_start: bool = True,
    **shared: Unpack[Shared],
) -> Tensor:
    """PGD on a square of pixels, size x size, at the same place of all frames (after arXiv 1712.09665).

    corner: top and left of the square, in pixels; None draws them for each clip.
    eps: in l_inf, 1 lets the square take all values in [0, 1].
    step_size: None is 2.5 eps / steps.
    """
    task = prepare(model, clips, labels, eps, steps=steps, step_size=step_size, **shared)
    height, width = clips.shape[-2:]
    check_count("size", size, most=min(height, width))
    last_corner = (height - size, width - size)
    if corner is None:
        generator = shared.get("generator")
        top, left = (torch.randint(most + 1, (len(clips),), generator=generator) for most in last_corner)
    elif (
        isinstance(corner, (tuple, list))
        and len(corner) == 2
        and all(isinstance(place, int) and 0 <= place <= most for place, most in zip(corner, last_corner, strict=True))
    ):
        top, left = (torch.full((len(clips),), place) for place in corner)
    else:
        raise ValueError(f"corner must be (top, left) within (0, 0)..{last_corner}, got {corner!r}")
    mask = interval_mask(top, size, height, -2) & interval_mask(left, size, width, -1)
    task.ball.restrict(mask.to(clips.device))
    return best_of_restarts("patch", task, gradient_steps(task, task.target.gradient), random_start)
