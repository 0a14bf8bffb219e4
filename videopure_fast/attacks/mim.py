"""MIM: gradient steps with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..inputs import check_number
from .base import Model, Shared, best_of_restarts, gradient_steps, prepare
from .registry import register_attack

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register_attack
def mim(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    random_start: bool = False,
    **shared: Unpack[Shared],
) -> Tensor:
    """Gradient steps with momentum, which transfer better (MIM, arXiv 1710.06081).

    step_size: None is eps / steps. decay: factor of the momentum at each step, 0 or more.
    """
    task = prepare(model, clips, labels, eps, steps=steps, step_size=step_size, path_length=1.0, **shared)
    check_number("decay", decay)
    return best_of_restarts("mim", task, gradient_steps(task, task.target.gradient, decay), random_start)
