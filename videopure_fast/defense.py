"""A classifier behind the purifier: purify, classify every vote, vote."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .purifier import Denoised, Generators, Purifier


class DefendedClassifier(nn.Module):
    """Clips (B, 3, F, H, W), floats in [0, 1] -> mean logits over the purifier's votes (B, K).

    `classifier` takes clips of that layout and range and returns logits (B, K). Attack the mean logits: the majority
    of `predict` has no gradient. `.train()` reaches the classifier alone.

    early_stop: let `predict` decode and classify votes only until the majority of every clip is settled; the labels
    are the same.
    """

    def __init__(self, classifier: nn.Module, purifier: Purifier, *, early_stop: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        self.purifier = purifier
        self.early_stop = early_stop

    def forward(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        return self._logits(self._denoise(clips, generator)).mean(1)

    def votes(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        """The label of each vote: (B, V), int64."""
        with torch.no_grad():
            return self._logits(self._denoise(clips, generator)).argmax(-1)

    @torch.no_grad()
    def predict(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        """The most frequent label over the votes, the smallest of equals: (B,), int64."""
        denoised = self._denoise(clips, generator)
        total = denoised.votes
        counts, done = 0, 0
        # No majority is settled before more than half of the votes; from then on each one may settle it.
        for end in range(total // 2 + 1, total + 1) if self.early_stop else [total]:
            logits = self._logits(denoised, slice(done, end))
            counts = counts + F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(1)
            done = end
            if settled(counts, total - done).all():
                break
        return counts.argmax(-1)

    def _denoise(self, clips: Tensor, generator: Generators) -> Denoised:
        if not isinstance(clips, Tensor) or clips.ndim != 5 or not clips.is_floating_point():
            seen = f"{clips.dtype} {tuple(clips.shape)}" if isinstance(clips, Tensor) else type(clips).__name__
            raise TypeError(f"clips must be a float tensor (B, 3, F, H, W) in [0, 1], got {seen}")
        return self.purifier.denoise(clips, generator=generator)

    def _logits(self, denoised: Denoised, votes: slice = slice(None)) -> Tensor:
        """(B, V, K)."""
        clips = self.purifier.decode_votes(denoised, votes)
        logits = [self.classifier(vote.contiguous()) for vote in clips.unbind(1)]
        if not isinstance(logits[0], Tensor):
            raise TypeError(f"the classifier must return a tensor of logits, got {type(logits[0]).__name__}")
        if logits[0].ndim != 2 or len(logits[0]) != len(clips):
            raise ValueError(f"the classifier must return ({len(clips)}, K) logits, got {tuple(logits[0].shape)}")
        return torch.stack(logits, 1)


def settled(counts: Tensor, remaining: int) -> Tensor:
    """Whether the majority of each row of counts (B, K) stays what it is, whatever the remaining votes are: (B,)."""
    leader = counts.argmax(-1, keepdim=True)  # the smallest of equals, as of the majority
    lead = counts.gather(-1, leader) - counts - remaining
    labels = torch.arange(counts.shape[-1], device=counts.device)
    safe = (lead > 0) | ((lead == 0) & (labels > leader)) | (labels == leader)
    return safe.all(-1)


def majority(labels: Tensor) -> Tensor:
    """(B, V) labels -> (B,): the most frequent of each row, the smallest of equals."""
    return F.one_hot(labels).sum(1).argmax(-1)
