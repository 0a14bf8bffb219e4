"""Parts shared by the attacks: the checked call, the model under attack, the norm ball, and restarts.

An attack calls `prepare`, which checks its arguments and returns a `Task`. A gradient attack then hands its update rule
to `best_of_restarts`; `gradient_steps` is the rule of PGD and MIM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..inputs import check_clips, check_count, check_generator, check_logits, check_number
from .losses import LOSSES, LossFunction

Model = Callable[[Tensor], Tensor]  # clips -> logits (B, K) or (B, V, K)
Loss = str | LossFunction  # a name in LOSSES, or a function from (logits, labels) to (B,)
Norm = Literal["linf", "l2"]


class Shared(TypedDict, total=False):
    """Keyword arguments that all gradient attacks accept; `prepare` checks them and holds their defaults.

    norm: norm of the ball, "linf" or "l2".
    loss: loss to raise: "ce", "dlr", "margin", or a function from (logits, labels) to (B,).
    restarts: number of runs, of which each clip keeps its best.
    eot: model calls averaged for each gradient of a randomized model.
    generator: source of all random draws, on the CPU; None is torch's default generator.
    progress: whether to show a progress bar.
    """

    norm: Norm
    loss: Loss
    restarts: int
    eot: int
    generator: torch.Generator | None
    progress: bool


# The model under attack


@dataclass(frozen=True)
class Target:
    """The model under attack, the true labels (B,), and the loss to raise.

    eot: number of model calls over which scores and gradients are averaged (EOT, arXiv 1707.07397).
    """

    model: Model
    labels: Tensor
    loss: LossFunction
    eot: int

    def losses(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Call the model once. Returns two tensors (B,): 1 where the clip is misclassified, else 0; and its loss.

        TypeError or ValueError for logits or losses of a wrong shape or dtype, or that are not finite.
        """
        logits = self.model(clips)
        check_logits(logits, len(clips), votes=True)
        if self.labels.max() >= logits.shape[-1]:
            raise ValueError(f"labels reach {self.labels.max()}, but the model returns {logits.shape[-1]} classes")
        loss = self.loss(logits, self.labels)
        if not isinstance(loss, Tensor) or loss.shape != clips.shape[:1] or not loss.is_floating_point():
            seen = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be floats ({len(clips)},), got {seen}")
        if loss.isnan().any():  # NaN compares as not larger, so that the attack would return its starting clips
            raise ValueError("the loss is NaN")
        return (majority_vote(logits.detach()) != self.labels).to(loss.dtype), loss

    def score(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Success rate and mean loss of each clip over `eot` model calls, without gradients: two tensors (B,)."""
        with torch.no_grad():
            success, loss = map(torch.stack, zip(*(self.losses(clips) for _ in range(self.eot)), strict=True))
        return success.mean(0), loss.mean(0)

    def gradient(self, point: Tensor, transform: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """d loss(transform(point)) / d point, averaged over `eot` model calls: the shape of point."""
        return self.value_and_grad(point, transform)[2]

    def value_and_grad(
        self, point: Tensor, transform: Callable[[Tensor], Tensor] = lambda x: x
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Success rate (B,), mean loss (B,) and gradient (as `gradient`) at transform(point), from the same calls."""
        scores: list[tuple[Tensor, Tensor]] = []

        def loss(x: Tensor) -> Tensor:
            success, loss = self.losses(transform(x))
            scores.append((success, loss.detach()))
            return loss

        gradient = sum(gradient_of(point, loss) for _ in range(self.eot)) / self.eot
        success, losses = map(torch.stack, zip(*scores, strict=True))
        return success.mean(0), losses.mean(0), gradient


def gradient_of(point: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """d sum(loss(point)) / d point, in whatever grad mode the caller is; no other tensor gets a gradient.

    ValueError if the loss does not depend on point through differentiable operations, or the gradient is not finite.
    """
    with torch.inference_mode(False), torch.enable_grad():
        point = point.detach().clone().requires_grad_()  # a clone: inference tensors never get gradients
        total = loss(point).sum()
        if not total.requires_grad:
            raise ValueError("no gradient leads from the loss to the clips: labels or hard votes instead of logits?")
        (gradient,) = torch.autograd.grad(total, point)
    if not gradient.isfinite().all():
        raise ValueError("the gradient is not finite: clips made from it would fool by being NaN")
    return gradient


def majority_vote(logits: Tensor) -> Tensor:
    """Predicted labels (B,) of logits (B, K), or of votes (B, V, K): the most frequent, the smallest among equals."""
    labels = logits.argmax(-1)
    return labels if logits.ndim == 2 else F.one_hot(labels, logits.shape[-1]).sum(1).argmax(-1)


# The ball and the best clips


class Ball:
    """All clips in [0, 1] whose distance from the given clips is at most eps, measured after rounding.

    clips: (B, 3, F, H, W); eps: radius, in the clips' units; norm: "linf" or "l2" over a whole clip.
    mask: bool, broadcastable to the clips: the pixels that may change. All may until `restrict` is called.
    low, high: bounds of each pixel, of the clips' shape.
    """

    def __init__(self, clips: Tensor, eps: float, norm: Norm) -> None:
        self.clips, self.eps, self.norm = clips, eps, norm
        self.restrict(torch.ones_like(clips[:, :1], dtype=torch.bool))

    def restrict(self, mask: Tensor) -> None:
        """Keep all pixels fixed where mask, bool and broadcastable to the clips, is False."""
        self.mask, reach = mask, self.eps * mask.to(self.clips.dtype)
        self.low, self.high = perturb(self.clips, -reach), perturb(self.clips, reach)

    def project(self, x: Tensor) -> Tensor:
        """A point of the ball for each clip of x: the nearest in l_inf; in l2, the perturbation scaled down to eps."""
        if self.norm == "linf":
            return x.clamp(self.low, self.high)
        delta = (x - self.clips) * self.mask
        shrink = (self.eps / l2_norm(delta)).clamp(max=1)
        return perturb(self.clips, delta * shrink.to(x.dtype))

    def ascent_direction(self, gradient: Tensor) -> Tensor:
        """The direction of norm 1 in which a loss with this gradient rises fastest; 0 where the gradient is 0."""
        if self.norm == "linf":
            return gradient.sign()
        # Divide by the largest entry first: squares of small entries would underflow in the l2 norm.
        gradient = normalize(gradient * self.mask, lambda g: g.abs().flatten(1).amax(1))
        return normalize(gradient, l2_norm)

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """Random clips: uniform in the box (l_inf), or uniform in the ball and then clamped to [0, 1] (l2)."""
        make = torch.rand if self.norm == "linf" else torch.randn
        noise = make(self.clips.shape, generator=generator, dtype=self.clips.dtype).to(self.clips.device)
        if self.norm == "linf":
            return self.project(self.low + (self.high - self.low) * noise)
        dimensions = self.mask[0].expand_as(self.clips[0]).sum().item()
        radius = torch.rand(len(noise), 1, 1, 1, 1, generator=generator, dtype=noise.dtype) ** (1 / dimensions)
        return self.project(self.clips + self.eps * radius.to(noise.device) * normalize(noise * self.mask, l2_norm))


class Best:
    """The best version of each clip so far: the highest success rate, then the largest loss.

    clips: (B, ...); success: success rate (B,), in [0, 1]; loss: (B,).
    """

    def __init__(self, clips: Tensor, success: Tensor, loss: Tensor) -> None:
        self.clips, self.success, self.loss = clips.clone(), success.clone(), loss.clone()

    def update(self, clips: Tensor, success: Tensor, loss: Tensor, at: Tensor | slice = slice(None)) -> None:
        """Replace clips by better ones. at: indices of the rows that these clips belong to; by default all."""
        wins = (success > self.success[at]) | ((success == self.success[at]) & (loss > self.loss[at]))
        for current, new in ((self.clips, clips), (self.success, success), (self.loss, loss)):
            current[at] = torch.where(wins.view(-1, *[1] * (new.ndim - 1)), new, current[at])


def perturb(clips: Tensor, delta: Tensor) -> Tensor:
    """clips + delta clamped to [0, 1], rounded towards clips, so that no pixel changes by more than abs(delta)."""
    moved = (clips + delta).clamp(0, 1)
    return torch.where((moved - clips).abs() > delta.abs(), torch.nextafter(moved, clips), moved)


def l2_norm(x: Tensor) -> Tensor:
    """The l2 norm of each row of (B, ...), in float64: (B, 1, ...), with as many dimensions as x."""
    return x.double().flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def normalize(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Each row of x (B, ...) divided by its norm, given as B values; rows whose norm is 0 stay as they are."""
    size = norm(x).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return x / torch.where(size > 0, size, 1)


def interval_mask(start: Tensor, length: Tensor | int, size: int, dim: int) -> Tensor:
    """Which of `size` positions along dim lie in [start, start + length).

    start: (B,), length: (B,) or one int; dim: -3 (frames), -2 (rows) or -1 (columns). Returns bool, 5-D, of length 1
    in the other dimensions.
    """
    positions = torch.arange(size)
    inside = (positions >= start[:, None]) & (positions < (start + length)[:, None])
    return inside.view(-1, *[size if d == dim else 1 for d in (-4, -3, -2, -1)])


# The call of an attack


@dataclass(frozen=True)
class Task:
    """Checked arguments of one call of an attack.

    ball.clips are a detached copy of the caller's clips; step_size is in the clips' units.
    """

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
    min_steps: int = 1,
    step_size: float | None = None,
    path_length: float = 2.5,
    norm: Norm = "linf",
    loss: Loss = "ce",
    restarts: int = 1,
    eot: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Task:
    """Check the arguments of an attack before any work; TypeError or ValueError says what is accepted.

    min_steps: smallest number of steps that this attack accepts.
    step_size: None is path_length * eps / steps.
    path_length: sum of all steps, in units of eps, where step_size is None.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    check_labeled(clips, labels)
    check_number("eps", eps, zero=False)
    if step_size is not None:
        check_number("step_size", step_size, zero=False)
    for name, value, least in (("steps", steps, min_steps), ("restarts", restarts, 1), ("eot", eot, 1)):
        check_count(name, value, least=least)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps must be at most 1 in l_inf, in the clips' units (4/255, not 4), got {eps}")
    if not callable(loss) and loss not in list(LOSSES):
        raise ValueError(f"loss must be callable or one of {', '.join(LOSSES)}, got {loss!r}")
    if generator is not None:
        check_generator(generator)
    with torch.inference_mode(False):  # so that the model may save the labels for its backward pass
        clips, labels = clips.detach().clone(), labels.clone()
    target = Target(model, labels, loss if callable(loss) else LOSSES[loss], eot)
    size = path_length * eps / max(steps, 1) if step_size is None else step_size
    return Task(target, Ball(clips, eps, norm), steps, size, restarts, generator, progress)


def check_labeled(clips: Tensor, labels: Tensor) -> None:
    """TypeError or ValueError unless clips are (B, 3, F, H, W) float32 or float64 in [0, 1], and labels (B,) int64 of
    0 or more on the same device."""
    check_clips(clips, (torch.float32, torch.float64))
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.layout != torch.strided or labels.is_nested:
        raise TypeError(f"labels must be dense int64, got {labels.dtype}, {labels.layout}")
    if labels.shape != clips.shape[:1] or labels.device != clips.device or labels.min() < 0:
        seen = f"{tuple(labels.shape)} on {labels.device}, down to {labels.min() if labels.numel() else None}"
        raise ValueError(f"labels must be ({len(clips)},) of 0 or more on {clips.device}, got {seen}")


# Runs of gradient attacks


Run = Callable[[Tensor, tqdm], Tensor]  # (starting clips, progress bar that counts steps) -> attacked clips


def gradient_steps(task: Task, gradient: Callable[[Tensor], Tensor], decay: float | None = None) -> Run:
    """A run of task.steps projected steps of equal size along the gradient, the update rule of PGD.

    gradient: from clips to a tensor of their shape. decay: None, or the factor of MIM's momentum, a decayed sum of
    gradients that are each scaled to a mean absolute value of 1.
    """

    def run(x: Tensor, bar: tqdm) -> Tensor:
        momentum = torch.zeros_like(x)
        for _ in range(task.steps):
            direction = gradient(x)
            if decay is not None:
                scaled = normalize(direction, lambda g: g.abs().flatten(1).mean(1))
                momentum = direction = decay * momentum + scaled
            x = task.ball.project(x + task.step_size * task.ball.ascent_direction(direction))
            bar.update()
        return x

    return run


def best_of_restarts(name: str, task: Task, run: Run, random_start: bool) -> Tensor:
    """Call `run` task.restarts times, and keep the best result for each clip.

    The first run starts at the clips themselves, or with random_start at random clips of the ball; later runs always
    start at random. name: label of the progress bar.
    """
    best: Best | None = None
    with tqdm(total=task.steps * task.restarts, desc=name, disable=not task.progress) as bar:
        for i in range(task.restarts):
            x = run(task.ball.sample(task.generator) if random_start or i else task.ball.clips.clone(), bar)
            if task.restarts == 1:
                return x
            score = task.target.score(x)
            best = best or Best(x, *score)
            best.update(x, *score)
    assert best is not None  # `prepare` refuses 0 restarts
    return best.clips
