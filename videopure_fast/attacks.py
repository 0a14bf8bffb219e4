"""Attacks on 5-D clips. Each takes any callable from clips to logits and knows no purifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pgd(
    model: Callable[[Tensor], Tensor],
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent in the l_inf ball (Madry et al., arXiv 1706.06083), untargeted, on cross-entropy.

    clips: (B, 3, F, H, W) in [0, 1]; labels: (B,). eps and step_size are in the clips' units (4/255, not 4).
    Returns clips that differ from the given ones by at most eps and lie in [0, 1].
    """
    low, high = (clips - eps).clamp(min=0), (clips + eps).clamp(max=1)
    attacked = clips.clone()
    if random_start:
        noise = torch.rand(clips.shape, generator=generator, dtype=clips.dtype)
        attacked = low + (high - low) * noise.to(clips.device)
    for _ in range(steps):
        with torch.enable_grad():
            attacked = attacked.detach().requires_grad_()
            loss = F.cross_entropy(model(attacked), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = (attacked.detach() + step_size * gradient.sign()).clamp(low, high)
    return attacked
