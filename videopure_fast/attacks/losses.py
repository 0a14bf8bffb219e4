"""Losses that attacks raise: each grows as a clip gets closer to being misclassified."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) -> (B,)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) or (B, V, K) logits, labels (B,) -> (B,): the cross-entropy, the mean over votes."""
    return _mean_over_votes(lambda z, y: F.cross_entropy(z, y, reduction="none"), logits, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) or (B, V, K) logits, labels (B,) -> (B,): largest wrong logit minus true logit, the mean over votes."""
    return _mean_over_votes(_margin, logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (arXiv 2003.01690, eq. 6).

    (B, K) or (B, V, K) logits, labels (B,) -> (B,): the margin divided by the difference between the largest and the
    third largest logit, the mean over votes. ValueError for fewer than 3 classes.
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"the dlr loss compares the three largest logits, got {logits.shape[-1]} classes")

    def ratio(z: Tensor, y: Tensor) -> Tensor:
        largest = z.topk(3, dim=-1).values
        return _margin(z, y) / (largest[:, 0] - largest[:, 2] + 1e-12)

    return _mean_over_votes(ratio, logits, labels)


LOSSES: dict[str, LossFunction] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    true = F.one_hot(labels, logits.shape[-1]).bool()
    return logits.masked_fill(true, -math.inf).amax(-1) - logits.gather(-1, labels[:, None])[:, 0]


def _mean_over_votes(loss: LossFunction, logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim == 2:
        return loss(logits, labels)
    vote_losses = loss(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))
    return vote_losses.view(logits.shape[:2]).mean(1)
