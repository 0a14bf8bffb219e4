"""Temporal translation: a transfer attack with gradients averaged over clips that are shifted in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ..inputs import check_count, check_number
from .base import Model, Shared, best_of_restarts, gradient_steps, prepare
from .registry import register_attack

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register_attack
def temporal_translation(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    max_shift: int = 7,
    weights: str = "gaussian",
    decay: float | None = None,
    random_start: bool = False,
    **shared: Unpack[Shared],
) -> Tensor:
    """Black-box transfer: PGD on gradients averaged over clips shifted in time (TT, arXiv 2110.12190).

    model is the attacker's own; the attacked clips are meant for another model. Each step takes 2 max_shift + 1
    gradients, at clips shifted by -max_shift..max_shift frames, cyclically; each gradient is shifted back.

    step_size: None is eps / steps.
    weights: of the gradients, by shift: "gaussian" (sigma max_shift / 3), "linear" or "uniform".
    decay: None, or the decay of momentum as in `mim` (TT-MI).
    """
    task = prepare(model, clips, labels, eps, steps=steps, step_size=step_size, path_length=1.0, **shared)
    check_count("max_shift", max_shift, least=0)
    if decay is not None:
        check_number("decay", decay)
    weight_of = _shift_weights(weights, max_shift)

    def gradient(x: Tensor) -> Tensor:
        return sum(w * task.target.gradient(x.roll(s, 2)).roll(-s, 2) for s, w in weight_of.items())

    return best_of_restarts("temporal translation", task, gradient_steps(task, gradient, decay), random_start)


def _shift_weights(kind: str, max_shift: int) -> dict[int, float]:
    """The weight of each shift, in frames, from -max_shift to max_shift; their sum is 1. ValueError for the kind."""
    kinds: dict[str, Callable[[int], float]] = {
        "gaussian": lambda s: math.exp(-((3 * s / max(max_shift, 1)) ** 2) / 2),
        "linear": lambda s: 1 - abs(s) / (max_shift + 1),
        "uniform": lambda s: 1.0,
    }
    if kind not in list(kinds):
        raise ValueError(f"weights must be one of {', '.join(kinds)}, got {kind!r}")
    raw = {s: kinds[kind](s) for s in range(-max_shift, max_shift + 1)}
    return {s: w / sum(raw.values()) for s, w in raw.items()}
