"""Auto-PGD: PGD with momentum that chooses its own step size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .base import Best, Model, Shared, Task, best_of_restarts, prepare
from .registry import register_attack

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Constants of arXiv 2003.01690, section 3.
_MOMENTUM = 0.75  # alpha: weight of the new step; the last step has the rest
_MIN_RISES = 0.75  # rho: share of steps that must raise the loss, or else the step size is halved
# Steps between checkpoints, as shares of all steps: at first, the smallest, and the decrease at each checkpoint.
_PERIOD, _MIN_PERIOD, _PERIOD_DECREASE = 0.22, 0.06, 0.03


@register_attack
def apgd(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 100,
    random_start: bool = True,
    **shared: Unpack[Shared],
) -> Tensor:
    """PGD that halves its step where the climb stalls and keeps its best clip (Auto-PGD, arXiv 2003.01690).

    It takes steps + 1 gradients. "dlr" does not saturate where "ce" does; a strong evaluation takes both.
    """
    task = prepare(model, clips, labels, eps, steps=steps, **shared)
    return best_of_restarts("apgd", task, lambda x, bar: _run(task, x, bar), random_start)


def _run(task: Task, x: Tensor, bar: tqdm) -> Tensor:
    """Algorithm 1 of arXiv 2003.01690 for each clip.

    At checkpoints, clips whose loss stalls halve their step size and return to the point of their largest loss.
    """
    target, ball = task.target, task.ball
    success, loss, gradient = target.value_and_grad(x)
    best = Best(x, success, loss)
    previous, peak, peak_gradient, peak_loss = x, x, gradient, loss
    step_size = torch.full_like(x[:, :1, :1, :1, :1], 2 * ball.eps)
    period, min_period, period_decrease = (
        max(int(share * task.steps), 1) for share in (_PERIOD, _MIN_PERIOD, _PERIOD_DECREASE)
    )
    # Per clip since the last checkpoint: steps that raised the loss, whether it was halved, and the peak loss then.
    rises, halved, checkpoint_loss = torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool), loss
    checkpoint = -1
    for i in range(task.steps):
        moved = ball.project(x + step_size * ball.ascent_direction(gradient))
        if i > 0:
            moved = ball.project(x + _MOMENTUM * (moved - x) + (1 - _MOMENTUM) * (x - previous))
        previous, x, previous_loss = x, moved, loss
        success, loss, gradient = target.value_and_grad(x)
        best.update(x, success, loss)
        rises = rises + (loss > previous_loss)
        better = loss > peak_loss
        peak, peak_gradient, peak_loss = _where(better, (x, gradient, loss), (peak, peak_gradient, peak_loss))
        if i - checkpoint == period:
            halved = (rises <= _MIN_RISES * period) | (~halved & (peak_loss <= checkpoint_loss))
            step_size, x, gradient = _where(halved, (step_size / 2, peak, peak_gradient), (step_size, x, gradient))
            rises, checkpoint_loss, checkpoint = torch.zeros_like(loss), peak_loss, i
            period = max(period - period_decrease, min_period)
        bar.update()
    return best.clips


def _where(condition: Tensor, these: tuple[Tensor, ...], those: tuple[Tensor, ...]) -> list[Tensor]:
    """For each pair of tensors, the rows of `these` where condition (B,) is True, else the rows of `those`."""
    pairs = zip(these, those, strict=True)
    return [torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs]
