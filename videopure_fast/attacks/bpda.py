"""BPDA: a defended model whose defense is the identity in the backward pass, for any attack by gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..straight_through import straight_through
from .base import Model


def bpda(purify: Callable[[Tensor], Tensor], model: Model) -> Model:
    """model(purify(clips)), with purify replaced by the identity in the backward pass (BPDA, arXiv 1802.00420).

    purify returns clips (B, 3, F, H, W), for logits (B, K), or votes (B, V, 3, F, H, W), for logits (B, V, K); the
    clips' gradient is then the sum over votes. The returned model raises ValueError if purify returns another shape.
    """

    def defended(clips: Tensor) -> Tensor:
        with torch.no_grad():
            purified = purify(clips.detach())
        seen = tuple(purified.shape) if isinstance(purified, Tensor) else type(purified).__name__
        if clips.shape not in (seen, (*seen[:1], *seen[2:])):
            raise ValueError(f"purify must return clips {tuple(clips.shape)} or votes of them, got {seen}")
        if clips.shape == seen:
            return model(straight_through(clips, purified))
        return torch.stack([model(straight_through(clips, vote.contiguous())) for vote in purified.unbind(1)], 1)

    return defended
