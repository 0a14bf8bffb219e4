"""One frame: PGD on a single frame of each clip, a stress test outside the usual balls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import check_count
from .base import Model, Shared, best_of_restarts, gradient_steps, l2_norm, prepare
from .registry import register_attack

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register_attack
def one_frame(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    frame: int | None = None,
    random_start: bool = False,
    **shared: Unpack[Shared],
) -> Tensor:
    """PGD on one frame (arXiv 2011.14585): the one given, or each clip's frame of the largest gradient norm.

    step_size: None is 2.5 eps / steps. frame: index from 0, or None.
    """
    task = prepare(model, clips, labels, eps, steps=steps, step_size=step_size, **shared)
    clips, count = task.ball.clips, clips.shape[2]
    check_count("frame", 0 if frame is None else frame, least=0, most=count - 1)
    if frame is None:
        frames = l2_norm(task.target.gradient(clips).transpose(1, 2).flatten(0, 1)).view(-1, count).argmax(1)
    else:
        frames = torch.full((len(clips),), frame, device=clips.device)
    task.ball.restrict(F.one_hot(frames, count).bool().view(-1, 1, count, 1, 1))
    return best_of_restarts("one frame", task, gradient_steps(task, task.target.gradient), random_start)
