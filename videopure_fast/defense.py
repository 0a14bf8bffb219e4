"""A classifier behind the purifier: purify, classify every vote, vote."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .purifier import Generators, Purifier


class DefendedClassifier(nn.Module):
    """Clips (B, 3, F, H, W), floats in [0, 1] -> mean logits over the purifier's votes (B, K).

    `classifier` takes clips of that layout and range and returns logits (B, K). Attack the mean logits: the majority
    of `predict` has no gradient. `.train()` reaches the classifier alone.
    """

    def __init__(self, classifier: nn.Module, purifier: Purifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.purifier = purifier

    def forward(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        return self._logits(clips, generator).mean(1)

    def votes(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        """The label of each vote: (B, V), int64."""
        with torch.no_grad():
            return self._logits(clips, generator).argmax(-1)

    def predict(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        """The most frequent label over the votes, the smallest of equals: (B,), int64."""
        with torch.no_grad():
            return majority(self._logits(clips, generator).argmax(-1))

    def _logits(self, clips: Tensor, generator: Generators) -> Tensor:
        """(B, V, K)."""
        if not isinstance(clips, Tensor) or clips.ndim != 5 or not clips.is_floating_point():
            seen = f"{clips.dtype} {tuple(clips.shape)}" if isinstance(clips, Tensor) else type(clips).__name__
            raise TypeError(f"clips must be a float tensor (B, 3, F, H, W) in [0, 1], got {seen}")
        votes = self.purifier(clips, return_votes=True, generator=generator)
        logits = [self.classifier(vote.contiguous()) for vote in votes.unbind(1)]
        if not isinstance(logits[0], Tensor):
            raise TypeError(f"the classifier must return a tensor of logits, got {type(logits[0]).__name__}")
        if logits[0].ndim != 2 or len(logits[0]) != len(clips):
            raise ValueError(f"the classifier must return ({len(clips)}, K) logits, got {tuple(logits[0].shape)}")
        return torch.stack(logits, 1)


def majority(labels: Tensor) -> Tensor:
    """(B, V) labels -> (B,): the most frequent of each row, the smallest of equals."""
    return F.one_hot(labels).sum(1).argmax(-1)
