"""What attacks are made of: a checked call, the losses they raise, the ball they stay in, and the best clips so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import check_clips, check_count, check_generator, check_logits, check_number

Model = Callable[[Tensor], Tensor]  # clips -> logits (B, K) or (B, V, K)
Loss = str | Callable[[Tensor, Tensor], Tensor]  # a name, or (logits, labels) -> (B,)


class Shared(TypedDict, total=False):
    """Keywords of the gradient attacks, which explain them; `prepare` holds the defaults."""

    norm: str
    loss: Loss
    restarts: int
    eot: int
    generator: torch.Generator | None
    progress: bool


# Losses, larger where the attack is nearer to its aim


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) or (B, V, K) logits, labels (B,) -> (B,): the cross-entropy, the mean over votes."""
    return _mean_over_votes(lambda z, y: F.cross_entropy(z, y, reduction="none"), logits, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) or (B, V, K) logits -> (B,): the best wrong logit less the true one, the mean over votes."""
    return _mean_over_votes(_margin, logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) or (B, V, K) logits, K >= 3 -> (B,): the margin over the spread of the three largest logits, the mean
    over votes (difference of logits ratio, arXiv 2003.01690, eq. 6)."""
    if logits.shape[-1] < 3:
        raise ValueError(f"the dlr loss compares the three largest logits, got {logits.shape[-1]} classes")

    def ratio(z: Tensor, y: Tensor) -> Tensor:
        largest = z.topk(3, dim=-1).values
        return _margin(z, y) / (largest[:, 0] - largest[:, 2] + 1e-12)

    return _mean_over_votes(ratio, logits, labels)


def majority_vote(logits: Tensor) -> Tensor:
    """(B, K) or (B, V, K) logits -> (B,): the label, the most frequent over votes, the smallest of equals."""
    labels = logits.argmax(-1)
    return labels if logits.ndim == 2 else F.one_hot(labels, logits.shape[-1]).sum(1).argmax(-1)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    true = F.one_hot(labels, logits.shape[-1]).bool()
    return logits.masked_fill(true, -math.inf).amax(-1) - logits.gather(-1, labels[:, None])[:, 0]


def _mean_over_votes(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim == 2:
        return loss(logits, labels)
    votes = loss(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))
    return votes.view(logits.shape[:2]).mean(1)


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


# The model, the ball and the best


@dataclass(frozen=True)
class Target:
    """The model under attack and the loss to raise."""

    model: Model
    labels: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    eot: int

    def losses(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """One call of the model: whether each clip is fooled, as 0 or 1, and its loss. Both (B,)."""
        logits = self.model(clips)
        check_logits(logits, len(clips), votes=True)
        if self.labels.max() >= logits.shape[-1]:
            raise ValueError(f"labels reach {self.labels.max()}, but the model returns {logits.shape[-1]} classes")
        loss = self.loss(logits, self.labels)
        if not isinstance(loss, Tensor) or loss.shape != clips.shape[:1] or not loss.is_floating_point():
            seen = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be floats ({len(clips)},), got {seen}")
        if loss.isnan().any():  # it is never the larger: the attack would keep the clips that it began with
            raise ValueError("the loss is NaN")
        return (majority_vote(logits.detach()) != self.labels).to(loss.dtype), loss

    def score(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Over `eot` calls: how often each clip is fooled, and its mean loss. Both (B,)."""
        with torch.no_grad():
            rate, loss = map(torch.stack, zip(*(self.losses(clips) for _ in range(self.eot)), strict=True))
        return rate.mean(0), loss.mean(0)

    def gradient(self, point: Tensor, show: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Of the mean loss of the clips show(point) over `eot` calls: point's shape."""
        return self.probe(point, show)[0]

    def probe(self, point: Tensor, show: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient, and the score of the same calls."""
        found: list[tuple[Tensor, Tensor]] = []

        def loss(x: Tensor) -> Tensor:
            rate, loss = self.losses(show(x))
            found.append((rate, loss.detach()))
            return loss

        gradient = sum(gradient_of(point, loss) for _ in range(self.eot)) / self.eot
        rate, losses = map(torch.stack, zip(*found, strict=True))
        return gradient, rate.mean(0), losses.mean(0)


def gradient_of(point: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the sum of loss(point), whatever the caller's grad mode; no other tensor gets a gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        point = point.detach().clone().requires_grad_()  # a clone: inference tensors never get gradients
        total = loss(point).sum()
        if not total.requires_grad:
            raise ValueError("no gradient leads from the loss to the clips: labels or hard votes instead of logits?")
        (gradient,) = torch.autograd.grad(total, point)
    if not gradient.isfinite().all():
        raise ValueError("the gradient is not finite: clips made from it would fool by being NaN")
    return gradient


class Ball:
    """All clips in [0, 1] within eps of the given ones, in the norm, after rounding. mask: where they may differ."""

    def __init__(self, clips: Tensor, eps: float, norm: str) -> None:
        self.clips, self.eps, self.norm = clips, eps, norm
        self.restrict(torch.ones_like(clips[:, :1], dtype=torch.bool))

    def restrict(self, mask: Tensor) -> None:
        """mask: bool, broadcastable to the clips."""
        self.mask, reach = mask, self.eps * mask.to(self.clips.dtype)
        self.low, self.high = shift(self.clips, -reach), shift(self.clips, reach)

    def project(self, x: Tensor) -> Tensor:
        if self.norm == "linf":
            return x.clamp(self.low, self.high)
        delta = (x - self.clips) * self.mask
        shrink = (self.eps / lengths(delta)).clamp(max=1)
        return shift(self.clips, delta * shrink.to(x.dtype))

    def ascent(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 in the norm that climbs fastest; 0 where the gradient is."""
        if self.norm == "linf":
            return gradient.sign()
        gradient = unit(gradient * self.mask, lambda g: g.abs().flatten(1).amax(1))  # squares must not underflow
        return unit(gradient, lengths)

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """A point, uniform in the ball and cut to [0, 1] (l2), or uniform in the box (l_inf)."""
        make = torch.rand if self.norm == "linf" else torch.randn
        noise = make(self.clips.shape, generator=generator, dtype=self.clips.dtype).to(self.clips.device)
        if self.norm == "linf":
            return self.project(self.low + (self.high - self.low) * noise)
        room = self.mask[0].expand_as(self.clips[0]).sum().item()
        radius = torch.rand(len(noise), 1, 1, 1, 1, generator=generator, dtype=noise.dtype) ** (1 / room)
        return self.project(self.clips + self.eps * radius.to(noise.device) * unit(noise * self.mask, lengths))


class Best:
    """The best clips seen: those that fool more often, or as often with a larger loss."""

    def __init__(self, clips: Tensor, rate: Tensor, loss: Tensor) -> None:
        self.clips, self.rate, self.loss = clips.clone(), rate.clone(), loss.clone()

    def offer(self, clips: Tensor, rate: Tensor, loss: Tensor, at: Tensor | slice = slice(None)) -> None:
        """at: which of the rows these are."""
        wins = (rate > self.rate[at]) | ((rate == self.rate[at]) & (loss > self.loss[at]))
        for mine, other in ((self.clips, clips), (self.rate, rate), (self.loss, loss)):
            mine[at] = torch.where(wins.view(-1, *[1] * (other.ndim - 1)), other, mine[at])


def shift(clips: Tensor, delta: Tensor) -> Tensor:
    """clips + delta in [0, 1], rounded towards clips, so that the difference is never larger than delta."""
    moved = (clips + delta).clamp(0, 1)
    return torch.where((moved - clips).abs() > delta.abs(), torch.nextafter(moved, clips), moved)


def lengths(x: Tensor) -> Tensor:
    """The l2 norm of each row, float64: (B, 1, ...), as many dimensions as x."""
    return x.double().flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def unit(x: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Each row divided by its size; rows of zeros stay."""
    size = size(x).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return x / torch.where(size > 0, size, 1)


# At the door


@dataclass(frozen=True)
class Task:
    """A checked call of an attack."""

    target: Target
    ball: Ball
    steps: int
    step_size: float
    restarts: int
    generator: torch.Generator | None
    progress: bool


def prepare(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 1,
    least_steps: int = 1,
    step_size: float | None = None,
    pace: float = 2.5,
    norm: str = "linf",
    loss: Loss = "ce",
    restarts: int = 1,
    eot: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Task:
    """Checks everything before any work. Without a step_size, all steps together are `pace` times eps."""
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    check_labeled(clips, labels)
    check_number("eps", eps, zero=False)
    if step_size is not None:
        check_number("step_size", step_size, zero=False)
    for name, value, least in (("steps", steps, least_steps), ("restarts", restarts, 1), ("eot", eot, 1)):
        check_count(name, value, least=least)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps must be at most 1 in l_inf, in the clips' units (4/255, not 4), got {eps}")
    if not callable(loss) and loss not in list(_LOSSES):
        raise ValueError(f"loss must be callable or one of {', '.join(_LOSSES)}, got {loss!r}")
    if generator is not None:
        check_generator(generator)
    with torch.inference_mode(False):  # so that the model may save the labels for its backward pass
        clips, labels = clips.detach().clone(), labels.clone()
    target = Target(model, labels, loss if callable(loss) else _LOSSES[loss], eot)
    size = pace * eps / max(steps, 1) if step_size is None else step_size
    return Task(target, Ball(clips, eps, norm), steps, size, restarts, generator, progress)


def check_labeled(clips: Tensor, labels: Tensor) -> None:
    """TypeError or ValueError unless clips are as of `check_clips`, of 32 bits or more, and labels (B,) int64 of 0 or
    more beside them."""
    check_clips(clips, (torch.float32, torch.float64))
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.layout != torch.strided or labels.is_nested:
        raise TypeError(f"labels must be dense int64, got {labels.dtype}, {labels.layout}")
    if labels.shape != clips.shape[:1] or labels.device != clips.device or labels.min() < 0:
        seen = f"{tuple(labels.shape)} on {labels.device}, down to {labels.min() if labels.numel() else None}"
        raise ValueError(f"labels must be ({len(clips)},) of 0 or more on {clips.device}, got {seen}")
