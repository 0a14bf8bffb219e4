"""PGD: projected gradient steps of equal size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import Model, Shared, best_of_restarts, gradient_steps, prepare
from .registry import register_attack

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register_attack
def pgd(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
    **shared: Unpack[Shared],
) -> Tensor:
    """Projected gradient descent, untargeted (PGD, arXiv 1706.06083). 0 steps return the starting clips."""
    task = prepare(model, clips, labels, eps, steps=steps, min_steps=0, step_size=step_size, **shared)
    return best_of_restarts("pgd", task, gradient_steps(task, task.target.gradient), random_start)
