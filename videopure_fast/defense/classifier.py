"""A classifier behind a purifier: purify the clips, classify every vote, return the majority."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..inputs import FLOATS, check_logits, float_clips
from ..purifier import LatentVotes, Purifier
from ..sampling import Generators
from ..straight_through import straight_through

Gradient = Literal["exact", "bpda", "surrogate"]


class DefendedClassifier(nn.Module):
    """Clips (B, 3, F, H, W), floats in [0, 1] -> mean logits over the purifier's votes (B, K), in the clips' dtype.

    `classifier` takes clips of that layout and range, in the dtype of its weights, and returns logits (B, K); adapters
    has one for other formats. Clips may also be uint8, with logits in float32, or one clip (3, F, H, W), with results
    without B. Attacks should use the mean logits, or the logits of each vote: the labels of `predict` have no gradient.
    `.train()` changes the classifier's mode alone.

    Args:
        early_stop: let `predict` decode and classify votes only until the majority of every clip is settled, which is
            more than half of them where they agree; the labels are the same. Off, it always takes all votes.
        gradient: the gradient of the purification in a backward pass; the logits are the same for all three. "exact":
            that of the purification itself, from encoding to decoding, in memory that does not grow with its steps.
            "bpda": the identity (backward pass differentiable approximation, Athalye et al., arXiv 1802.00420).
            "surrogate": that of a purifier with fewer steps and a softened sign; each vote gets the gradient of the
            nearest vote of that purifier.
        surrogate: the settings of that purifier, fields of PurifyConfig; by default 1 step and a temperature of 0.1.

    TypeError or ValueError for arguments of other types or values.
    """

    any_dtype = True  # of clips: each model is given its own

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Purifier,
        *,
        early_stop: bool = True,
        gradient: Gradient = "exact",
        surrogate: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier must be a torch.nn.Module, got {type(classifier).__name__}")
        if not isinstance(purifier, Purifier):
            raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
        if gradient not in get_args(Gradient):
            raise ValueError(f"unknown gradient {gradient!r}; accepted: {', '.join(get_args(Gradient))}")
        if surrogate is not None and gradient != "surrogate":
            raise ValueError(f"surrogate settings need gradient='surrogate', got {gradient!r}")
        if surrogate is not None and not isinstance(surrogate, Mapping):
            raise TypeError(f"surrogate must be a mapping of settings, got {type(surrogate).__name__}")
        if not isinstance(early_stop, bool):
            raise TypeError(f"early_stop must be a bool, got {early_stop!r}")
        self.classifier = classifier
        self.purifier = purifier
        self.early_stop = early_stop
        self.gradient = gradient
        self._surrogate = {"inversion_steps": 1, "sign_temperature": 0.1} if surrogate is None else dict(surrogate)
        if gradient == "surrogate":
            purifier.with_config(**self._surrogate)  # raises now for bad settings, not at the first backward pass

    def forward(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        return self.vote_logits(clips, generator=generator).mean(-2)

    def vote_logits(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        """The logits of each vote: (B, V, K), differentiable."""
        batch = float_clips(clips)
        logits = self._vote_logits(batch, generator)
        if logits.dtype != batch.dtype:
            logits = logits.to(batch.dtype)
            check_logits(logits, len(batch), votes=True)  # a narrower dtype may overflow
        return logits if clips.ndim == 5 else logits[0]

    def vote_labels(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        """The label of each vote: (B, V), int64."""
        with torch.no_grad():
            labels = self._vote_logits(float_clips(clips), generator).argmax(-1)
        return labels if clips.ndim == 5 else labels[0]

    @torch.no_grad()
    def predict(self, clips: Tensor, *, generator: Generators = None) -> Tensor:
        """The most frequent label over the votes, the smallest among equally frequent ones: (B,), int64."""
        denoised = self.purifier.latent_votes(float_clips(clips), generator=generator)
        total = denoised.num_votes
        counts, done = torch.zeros((), dtype=torch.int64), 0
        # More than half of the votes are needed to settle a majority; after that each further vote may settle it.
        for end in range(total // 2 + 1, total + 1) if self.early_stop else [total]:
            logits = self._logits(denoised, slice(done, end))
            counts = counts + F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(1)
            done = end
            if settled(counts, total - done).all():
                break
        labels = counts.argmax(-1)
        return labels if clips.ndim == 5 else labels[0]

    def _vote_logits(self, clips: Tensor, generator: Generators) -> Tensor:
        """The logits (B, V, K) of a batch of floats, in the classifier's dtype."""
        differentiable = torch.is_grad_enabled() and clips.requires_grad
        if self.gradient == "exact" or not differentiable:
            return self._logits(self.purifier.latent_votes(clips, generator=generator))
        with torch.no_grad():
            votes = self.purifier(clips, return_votes=True, generator=generator)
        if self.gradient == "bpda":
            path = clips[:, None]
        else:
            path = self.purifier.with_config(**self._surrogate)(clips, return_votes=True, generator=generator)
        return classify_votes(self.classifier, _with_gradient_of(path, votes))

    def _logits(self, denoised: LatentVotes, votes: slice = slice(None)) -> Tensor:
        return classify_votes(self.classifier, self.purifier.decode_votes(denoised, votes))


def classify_votes(classifier: nn.Module, votes: Tensor) -> Tensor:
    """Votes (B, V, 3, F, H, W) -> logits (B, V, K). TypeError or ValueError where the classifier returns no logits."""
    classify: Callable[[Tensor], Tensor] = classifier
    if torch.is_grad_enabled() and votes.requires_grad and not classifier.training:
        classify = partial(checkpoint, classify, use_reentrant=False)  # keeps one vote's activations in memory
    with _advising(classifier, votes[:, 0]):
        logits = [classify(in_dtype_of(classifier, vote.contiguous())) for vote in votes.unbind(1)]
    if advice := adapter_advice(classifier, logits[0]):
        raise TypeError(f"the model must return logits (B, K), got {type(logits[0]).__name__}: {advice}")
    check_logits(logits[0], len(votes))
    if len(shapes := {tuple(one.shape) for one in logits}) > 1:
        raise ValueError(f"the model returns logits of several shapes for votes of one: {sorted(shapes)}")
    logits = torch.stack(logits, 1)
    check_logits(logits, len(votes), votes=True)
    return logits


def weights_dtype(classifier: object) -> torch.dtype | None:
    """The dtype of the first of a module's weights that are floats of 16 bits or more; None where it has none, or casts
    clips by itself, as its attribute `any_dtype` says."""
    if not isinstance(classifier, nn.Module) or getattr(classifier, "any_dtype", False):
        return None
    weights = chain(classifier.parameters(), classifier.buffers())
    return next((one.dtype for one in weights if one.dtype in FLOATS), None)


def in_dtype_of(classifier: object, clips: Tensor) -> Tensor:
    """The clips in the dtype of a classifier's weights, or as they are where it has none."""
    return clips.to(weights_dtype(classifier) or clips.dtype)


def adapter_advice(classifier: nn.Module, output: object) -> str:
    """How to adapt a classifier that returned anything but a tensor of logits; "" where nothing is known to fit."""
    if isinstance(output, Tensor) or not isinstance(getattr(output, "logits", None), Tensor):
        return ""
    if hasattr(classifier, "main_input_name"):
        return "adapters.VideoClassifier.huggingface(model, mean=..., std=...) adapts a transformers model"
    return "adapters.VideoClassifier(model) takes the attribute .logits"


def layout_advice(classifier: nn.Module, clips: Tensor) -> str:
    """How to adapt a classifier that fails on clips (B, 3, F, H, W): it is tried on (B, F, 3, H, W); "" if it fails."""
    try:
        with torch.no_grad():
            output = classifier(in_dtype_of(classifier, clips.detach().transpose(1, 2).contiguous()))
    except Exception:  # a classifier of the caller's may raise anything
        return ""
    if adapter_advice(classifier, output):
        return f"it takes (B, F, 3, H, W): {adapter_advice(classifier, output)}"
    try:
        check_logits(output, len(clips))
    except (TypeError, ValueError):
        return ""
    return "it takes (B, F, 3, H, W): adapters.VideoClassifier(model, layout='BTCHW') adapts it"


@contextmanager
def _advising(classifier: nn.Module, clips: Tensor) -> Iterator[None]:
    """Where a classifier fails on clips and another layout would do, raise a ValueError that says so."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        advice = "" if out_of_memory else layout_advice(classifier, clips)
        if not advice:
            raise
        name, shape = type(classifier).__name__, tuple(clips.shape)
        raise ValueError(f"the classifier ({name}) fails on clips {shape}: {error}; {advice}") from error


def _with_gradient_of(path: Tensor, votes: Tensor) -> Tensor:
    """The votes (B, V, ...); the gradient of each goes to the vote of `path` (B, W, ...) at the nearest position."""
    nearest = torch.linspace(0, path.shape[1] - 1, votes.shape[1]).round().long()
    return straight_through(path[:, nearest.to(path.device)], votes)


def settled(counts: Tensor, remaining: int) -> Tensor:
    """Whether no outcome of the remaining votes can change the majority: counts (B, K) -> bool (B,)."""
    leader = counts.argmax(-1, keepdim=True)  # the smallest among equally frequent labels, as in `predict`
    lead = counts.gather(-1, leader) - counts - remaining
    labels = torch.arange(counts.shape[-1], device=counts.device)
    safe = (lead > 0) | ((lead == 0) & (labels > leader)) | (labels == leader)
    return safe.all(-1)
