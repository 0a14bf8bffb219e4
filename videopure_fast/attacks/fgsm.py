"""FGSM: one gradient step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import Model, Shared, best_of_restarts, gradient_steps, prepare
from .registry import register_attack

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register_attack
def fgsm(
    model: Model, clips: Tensor, labels: Tensor, *, eps: float, random_start: bool = False, **shared: Unpack[Shared]
) -> Tensor:
    """One step of size eps along the gradient (FGSM, arXiv 1412.6572)."""
    task = prepare(model, clips, labels, eps, step_size=eps, **shared)
    return best_of_restarts("fgsm", task, gradient_steps(task, task.target.gradient), random_start)
