"""Attacks on 5-D clips. Each takes any callable from clips to logits and knows no purifier.

All share one contract. clips: (B, 3, F, H, W), float32 or float64 in [0, 1]; labels: (B,) int64; eps and step_size are
in the clips' units (4/255, not 4). The model returns logits (B, K), or (B, V, K) for V votes: a named loss is then the
mean of the votes' losses, and a clip is fooled when the majority is wrong. Attacked clips stay in [0, 1] and in the
ball, measured after rounding. Parameters get no gradient, the model's mode and the caller's grad mode stay as they
are, and every draw comes from `generator`, on the CPU, so that it does not depend on the device.

Keywords shared by the gradient attacks: `norm` is "linf" or "l2"; `loss` is "ce", "dlr", "margin" or a callable from
the model's logits and labels to (B,), which the attack raises; `eot` calls of a random model are averaged for each
gradient (EOT, arXiv 1707.07397); of `restarts` runs each clip keeps the best: one that fools, or else the largest loss.
Runs after the first start at random. `progress` shows a bar.

ART 1.20 runs FGM, PGD, MIM, AutoPGD and OverTheAirFlickering well on such clips, foolbox 3.3 FGSM and PGD in both
norms; tests hold fgsm and pgd against them. These are our own because EOT, losses on every vote, restarts and balls
that hold in floating point are needed at once, and because neither has Square on clips, temporal translation or the
single frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .gradients import straight_through

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = Callable[[Tensor], Tensor]  # clips -> logits (B, K) or (B, V, K)
Loss = str | Callable[[Tensor, Tensor], Tensor]  # a name, or (logits, labels) -> (B,)


class Attack(NamedTuple):
    """What a command line looks up: the function, and one line of help."""

    run: Callable[..., Tensor]
    help: str


class Shared(TypedDict, total=False):
    """Keywords of the gradient attacks; the module's docstring explains them, `_prepare` holds the defaults."""

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


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


def vote(logits: Tensor) -> Tensor:
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


# Attacks by gradient


def fgsm(
    model: Model, clips: Tensor, labels: Tensor, *, eps: float, random_start: bool = False, **shared: Unpack[Shared]
) -> Tensor:
    """One step of size eps along the gradient (FGSM, arXiv 1412.6572)."""
    task = _prepare(model, clips, labels, eps, step_size=eps, **shared)
    return _restart("fgsm", task, _climber(task, task.target.gradient), random_start)


def pgd(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
    **shared: Unpack[Shared],
) -> Tensor:
    """Projected gradient descent, untargeted (PGD, arXiv 1706.06083).

    0 steps give its start. The bounds of its l_inf ball are rounded to nearest, as they were when the results at hand
    were recorded: a pixel may leave the ball by its own rounding, 2**-25 in float32. All other balls round inwards.
    """
    task = _prepare(model, clips, labels, eps, steps=steps, least_steps=0, step_size=step_size, **shared)
    ball = task.ball
    ball.low, ball.high = (ball.clips - eps).clamp(min=0), (ball.clips + eps).clamp(max=1)
    return _restart("pgd", task, _climber(task, task.target.gradient), random_start)


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

    step_size: None is eps / steps.
    """
    task = _prepare(model, clips, labels, eps, steps=steps, step_size=step_size, pace=1.0, **shared)
    return _restart("mim", task, _climber(task, task.target.gradient, decay), random_start)


def apgd(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 100,
    random_start: bool = True,
    **shared: Unpack[Shared],
) -> Tensor:
    """PGD that halves its step where the climb stalls and keeps its best clip (Auto-PGD, arXiv 2003.01690).

    It takes steps + 1 gradients. "dlr" does not saturate where "ce" does; a strong evaluation takes both.
    """
    task = _prepare(model, clips, labels, eps, steps=steps, **shared)
    return _restart("apgd", task, lambda x, bar: _auto_pgd(task, x, bar), random_start)


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

    model is the attacker's own, on which the clips are crafted for another. Shifts of -max_shift..max_shift frames are
    cyclic, their gradients shifted back; weights: "gaussian" (sigma max_shift / 3), "linear" or "uniform". Each step
    takes 2 max_shift + 1 gradients. decay: None, or mim's (TT-MI). step_size: None is eps / steps.
    """
    task = _prepare(model, clips, labels, eps, steps=steps, step_size=step_size, pace=1.0, **shared)
    _check_count("max_shift", max_shift, least=0)
    shares = _shift_weights(weights, max_shift)

    def gradient(x: Tensor) -> Tensor:
        return sum(w * task.target.gradient(x.roll(s, 2)).roll(-s, 2) for s, w in shares.items())

    return _restart("temporal translation", task, _climber(task, gradient, decay), random_start)


# Attacks by queries


@torch.no_grad()
def square(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    queries: int = 1000,
    p_init: float = 0.8,
    whole_clip: bool = False,
    loss: Loss = "margin",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Random search by squares of +-eps, without gradients, in the l_inf ball (Square, arXiv 1912.00049).

    A clip is shown to the model at most `queries` times, the first time as it is, and no more once it is fooled.
    p_init: share of a frame's pixels in the first squares. We know of no Square for video in the literature; its
    black-box attacks find that few frames carry the answer (arXiv 1911.09449), so each square fills a stretch of
    frames, drawn with it. whole_clip=True fills all frames, as all channels are: the packaged classifier, which sees
    motion, was then right on 63 of 64 clips after 150 queries at 12/255, and on 31 against stretches.
    """
    task = _prepare(model, clips, labels, eps, loss=loss, generator=generator)
    target, ball, clips = task.target, task.ball, task.ball.clips
    _check_count("queries", queries)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must lie in (0, 1], got {p_init}")
    best = _Best(clips, *target.score(clips))
    for query in tqdm(range(1, queries), desc="square", disable=not progress):
        alive = (best.rate == 0).nonzero()[:, 0]
        if not len(alive):
            break
        share = _square_share(p_init, query / queries) if query > 1 else None
        region, rising = (t.to(clips.device) for t in _draw_square(clips[alive], share, whole_clip, generator))
        painted = torch.where(rising, ball.high[alive], ball.low[alive])
        proposal = torch.where(region, painted, best.clips[alive])
        best.offer(proposal, *replace(target, labels=target.labels[alive]).score(proposal), at=alive)
    return best.clips


# Stress tests outside the usual balls


def flicker(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 50,
    step_size: float | None = None,
    thickness: float = 0.1,
    roughness: float = 0.1,
    loss: Loss = "ce",
    eot: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """One RGB offset of at most eps for each frame: a flickering light (arXiv 2002.05123).

    As in the paper, the loss pays for the offsets' mean square (thickness) and for those of their first and second
    differences in time, which goes round (roughness); here offsets are counted in eps. They start at 0: `generator` is
    not drawn from. The step shrinks to nothing, so that they settle; step_size: None is 5 eps / steps.
    """
    task = _prepare(
        model, clips, labels, eps, steps=steps, step_size=step_size, pace=5.0, loss=loss, eot=eot, generator=generator
    )
    clips = task.ball.clips
    offset = torch.zeros_like(clips[..., :1, :1])
    for i in tqdm(range(steps), desc="flicker", disable=not progress):
        gain = eps * task.target.gradient(offset, lambda offset: (clips + offset).clamp(0, 1))
        price = _gradient_of(offset / eps, lambda u: _flicker_price(u, thickness, roughness))
        offset = (offset + task.step_size * (1 - i / steps) * (gain - price).sign()).clamp(-eps, eps)
    return _shift(clips, offset)


def one_frame(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    frame: int | None = None,
    random_start: bool = False,
    **shared: Unpack[Shared],
) -> Tensor:
    """PGD on one frame (arXiv 2011.14585): the one given, or each clip's frame of the largest gradient norm.

    step_size: None is 2.5 eps / steps.
    """
    task = _prepare(model, clips, labels, eps, steps=steps, step_size=step_size, **shared)
    clips, count = task.ball.clips, clips.shape[2]
    if frame is not None and not (isinstance(frame, int) and 0 <= frame < count):
        raise ValueError(f"frame must be None or one of 0..{count - 1}, got {frame!r}")
    if frame is None:
        frames = _lengths(task.target.gradient(clips).transpose(1, 2).flatten(0, 1)).view(-1, count).argmax(1)
    else:
        frames = torch.full((len(clips),), frame, device=clips.device)
    task.ball.restrict(F.one_hot(frames, count).bool().view(-1, 1, count, 1, 1))
    return _restart("one frame", task, _climber(task, task.target.gradient), random_start)


def patch(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    *,
    size: int,
    corner: tuple[int, int] | None = None,
    eps: float = 1.0,
    steps: int = 50,
    step_size: float | None = None,
    random_start: bool = True,
    **shared: Unpack[Shared],
) -> Tensor:
    """PGD on a square of pixels, size x size, at the same place of all frames (after arXiv 1712.09665).

    corner: its top and left, drawn for each clip where None. In l_inf, eps = 1 leaves it free within [0, 1].
    step_size: None is 2.5 eps / steps.
    """
    task = _prepare(model, clips, labels, eps, steps=steps, step_size=step_size, **shared)
    height, width = clips.shape[-2:]
    if not isinstance(size, int) or not 1 <= size <= min(height, width):
        raise ValueError(f"size must be an int of 1..{min(height, width)} for frames of {height}x{width}, got {size!r}")
    room = (height - size, width - size)
    if corner is None:
        top, left = (torch.randint(most + 1, (len(clips),), generator=shared.get("generator")) for most in room)
    elif len(corner) == 2 and all(0 <= place <= most for place, most in zip(corner, room, strict=True)):
        top, left = (torch.full((len(clips),), place) for place in corner)
    else:
        raise ValueError(f"corner must be (top, left) within (0, 0)..{room}, got {corner!r}")
    task.ball.restrict((_span(top, size, height, -2) & _span(left, size, width, -1)).to(clips.device))
    return _restart("patch", task, _climber(task, task.target.gradient), random_start)


_ALL = (fgsm, pgd, mim, apgd, temporal_translation, square, flicker, one_frame, patch)
ATTACKS: dict[str, Attack] = {run.__name__: Attack(run, (run.__doc__ or "").partition("\n")[0]) for run in _ALL}


# Around a defence


def bpda(purify: Callable[[Tensor], Tensor], model: Model) -> Model:
    """model(purify(clips)), with purify taken for the identity in the backward pass (BPDA, arXiv 1802.00420).

    purify returns clips (B, 3, F, H, W), for logits (B, K), or votes (B, V, 3, F, H, W), for logits (B, V, K); the
    clips' gradient is then the sum over votes.
    """

    def defended(clips: Tensor) -> Tensor:
        with torch.no_grad():
            purified = purify(clips.detach())
        seen = tuple(purified.shape) if isinstance(purified, Tensor) else type(purified).__name__
        if clips.shape not in (seen, (*seen[:1], *seen[2:])):
            raise ValueError(f"purify must return clips {tuple(clips.shape)} or votes of them, got {seen}")
        if clips.shape == seen:
            return model(straight_through(clips, purified))
        return torch.stack([model(straight_through(clips, one.contiguous())) for one in purified.unbind(1)], 1)

    return defended


# What the attacks are made of


@dataclass(frozen=True)
class _Target:
    """The model under attack and the loss to raise."""

    model: Model
    labels: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    eot: int

    def losses(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """One call of the model: whether each clip is fooled, as 0 or 1, and its loss. Both (B,)."""
        logits, count = self.model(clips), len(clips)
        if not isinstance(logits, Tensor):
            raise TypeError(f"the model must return a tensor of logits, got {type(logits).__name__}")
        if logits.ndim not in (2, 3) or len(logits) != count or 0 in logits.shape:
            raise ValueError(f"the model must return ({count}, K) or ({count}, V, K), got {tuple(logits.shape)}")
        if self.labels.max() >= logits.shape[-1]:
            raise ValueError(f"labels reach {self.labels.max()}, but the model returns {logits.shape[-1]} classes")
        loss = self.loss(logits, self.labels)
        if not isinstance(loss, Tensor) or loss.shape != (count,):
            raise ValueError(f"the loss must be a tensor ({count},), got {getattr(loss, 'shape', type(loss))}")
        return (vote(logits.detach()) != self.labels).to(loss.dtype), loss

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

        gradient = sum(_gradient_of(point, loss) for _ in range(self.eot)) / self.eot
        rate, losses = map(torch.stack, zip(*found, strict=True))
        return gradient, rate.mean(0), losses.mean(0)


def _gradient_of(point: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
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


class _Ball:
    """All clips in [0, 1] within eps of the given ones, in the norm, after rounding. mask: where they may differ."""

    def __init__(self, clips: Tensor, eps: float, norm: str) -> None:
        self.clips, self.eps, self.norm = clips, eps, norm
        self.restrict(torch.ones_like(clips[:, :1], dtype=torch.bool))

    def restrict(self, mask: Tensor) -> None:
        """mask: bool, broadcastable to the clips."""
        self.mask, reach = mask, self.eps * mask.to(self.clips.dtype)
        self.low, self.high = _shift(self.clips, -reach), _shift(self.clips, reach)

    def project(self, x: Tensor) -> Tensor:
        if self.norm == "linf":
            return x.clamp(self.low, self.high)
        delta = (x - self.clips) * self.mask
        shrink = (self.eps / _lengths(delta)).clamp(max=1)
        return _shift(self.clips, delta * shrink.to(x.dtype))

    def ascent(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 in the norm that climbs fastest; 0 where the gradient is."""
        if self.norm == "linf":
            return gradient.sign()
        gradient = _unit(gradient * self.mask, lambda g: g.abs().flatten(1).amax(1))  # squares must not underflow
        return _unit(gradient, _lengths)

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """A point, uniform in the ball and cut to [0, 1] (l2), or uniform in the box (l_inf)."""
        make = torch.rand if self.norm == "linf" else torch.randn
        noise = make(self.clips.shape, generator=generator, dtype=self.clips.dtype).to(self.clips.device)
        if self.norm == "linf":
            return self.project(self.low + (self.high - self.low) * noise)
        room = self.mask[0].expand_as(self.clips[0]).sum().item()
        radius = torch.rand(len(noise), 1, 1, 1, 1, generator=generator, dtype=noise.dtype) ** (1 / room)
        return self.project(self.clips + self.eps * radius.to(noise.device) * _unit(noise * self.mask, _lengths))


def _shift(clips: Tensor, delta: Tensor) -> Tensor:
    """clips + delta in [0, 1], rounded towards clips, so that the difference is never larger than delta."""
    moved = (clips + delta).clamp(0, 1)
    return torch.where((moved - clips).abs() > delta.abs(), torch.nextafter(moved, clips), moved)


def _lengths(x: Tensor) -> Tensor:
    """The l2 norm of each row, float64: (B, 1, ...), as many dimensions as x."""
    return x.double().flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def _unit(x: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Each row divided by its size; rows of zeros stay."""
    size = size(x).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return x / torch.where(size > 0, size, 1)


class _Best:
    """The best clips seen: those that fool more often, or as often with a larger loss."""

    def __init__(self, clips: Tensor, rate: Tensor, loss: Tensor) -> None:
        self.clips, self.rate, self.loss = clips.clone(), rate.clone(), loss.clone()

    def offer(self, clips: Tensor, rate: Tensor, loss: Tensor, at: Tensor | slice = slice(None)) -> None:
        """at: which of the rows these are."""
        wins = (rate > self.rate[at]) | ((rate == self.rate[at]) & (loss > self.loss[at]))
        for mine, other in ((self.clips, clips), (self.rate, rate), (self.loss, loss)):
            mine[at] = torch.where(wins.view(-1, *[1] * (other.ndim - 1)), other, mine[at])


@dataclass(frozen=True)
class _Task:
    """A checked call of an attack."""

    target: _Target
    ball: _Ball
    steps: int
    step_size: float
    restarts: int
    generator: torch.Generator | None
    progress: bool


_Run = Callable[[Tensor, tqdm], Tensor]  # from a start, with a bar that counts steps, to attacked clips


def _climber(task: _Task, gradient: Callable[[Tensor], Tensor], decay: float | None = None) -> _Run:
    """Projected steps of one size along the gradient; with decay, along the sum of gradients of mean size 1."""

    def run(x: Tensor, bar: tqdm) -> Tensor:
        momentum = torch.zeros_like(x)
        for _ in range(task.steps):
            direction = gradient(x)
            if decay is not None:
                momentum = direction = decay * momentum + _unit(direction, lambda g: g.abs().flatten(1).mean(1))
            x = task.ball.project(x + task.step_size * task.ball.ascent(direction))
            bar.update()
        return x

    return run


def _restart(name: str, task: _Task, run: _Run, random_start: bool) -> Tensor:
    """The best of the runs for each clip. The first starts at the clip, or at random; all others at random."""
    best = None
    with tqdm(total=task.steps * task.restarts, desc=name, disable=not task.progress) as bar:
        for i in range(task.restarts):
            x = run(task.ball.draw(task.generator) if random_start or i else task.ball.clips.clone(), bar)
            if task.restarts == 1:
                return x
            score = task.target.score(x)
            best = best or _Best(x, *score)
            best.offer(x, *score)
    return best.clips


def _auto_pgd(task: _Task, x: Tensor, bar: tqdm) -> Tensor:
    """Algorithm 1 of arXiv 2003.01690; at checkpoints a clip whose climb stalls goes on from its peak in half steps."""
    target, ball = task.target, task.ball
    gradient, rate, loss = target.probe(x)
    found = _Best(x, rate, loss)
    previous, peak, peak_gradient, peak_loss = x, x, gradient, loss
    step = torch.full_like(x[:, :1, :1, :1, :1], 2 * ball.eps)
    period, shortest, shrink = (max(int(share * task.steps), 1) for share in (0.22, 0.06, 0.03))
    rises, halved, checked, last_check = torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool), loss, -1
    for i in range(task.steps):
        moved = ball.project(x + step * ball.ascent(gradient))
        if i > 0:
            moved = ball.project(x + 0.75 * (moved - x) + 0.25 * (x - previous))
        previous, x, before = x, moved, loss
        gradient, rate, loss = target.probe(x)
        found.offer(x, rate, loss)
        rises = rises + (loss > before)
        better = loss > peak_loss
        peak, peak_gradient, peak_loss = _choose(better, (x, gradient, loss), (peak, peak_gradient, peak_loss))
        if i - last_check == period:
            halved = (rises <= 0.75 * period) | (~halved & (peak_loss <= checked))
            step, x, gradient = _choose(halved, (step / 2, peak, peak_gradient), (step, x, gradient))
            rises, checked, last_check, period = torch.zeros_like(loss), peak_loss, i, max(period - shrink, shortest)
        bar.update()
    return found.clips


def _choose(which: Tensor, these: tuple[Tensor, ...], those: tuple[Tensor, ...]) -> list[Tensor]:
    """Row by row, these where `which` (B,), else those."""
    pairs = zip(these, those, strict=True)
    return [torch.where(which.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs]


def _shift_weights(kind: str, most: int) -> dict[int, float]:
    """Shifts in frames to weights of sum 1."""
    kinds: dict[str, Callable[[int], float]] = {
        "gaussian": lambda s: math.exp(-((3 * s / max(most, 1)) ** 2) / 2),
        "linear": lambda s: 1 - abs(s) / (most + 1),
        "uniform": lambda s: 1.0,
    }
    if kind not in kinds:
        raise ValueError(f"weights must be one of {', '.join(kinds)}, got {kind!r}")
    raw = {s: kinds[kind](s) for s in range(-most, most + 1)}
    return {s: w / sum(raw.values()) for s, w in raw.items()}


def _square_share(p_init: float, done: float) -> float:
    """The share of a frame that a square covers: halved at fixed parts of the budget (arXiv 1912.00049, section 5)."""
    return p_init / 2 ** sum(done > part for part in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))


def _draw_square(
    clips: Tensor, share: float | None, whole_clip: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Where each clip's square lies, and which of its channels rise. With share None, at first: stripes everywhere, of
    one column, each frame's its own unless whole_clip."""
    count, channels, frames, height, width = clips.shape
    if share is None:
        rising = torch.rand(count, channels, 1 if whole_clip else frames, 1, width, generator=generator) < 0.5
        return torch.ones(1, dtype=torch.bool), rising

    def place(length: Tensor, size: int) -> Tensor:
        return (torch.rand(count, generator=generator) * (size - length + 1)).long()

    side = torch.tensor(min(max(round(math.sqrt(share * height * width)), 1), height, width))
    length = torch.tensor(frames) if whole_clip else torch.randint(1, frames + 1, (count,), generator=generator)
    region = _span(place(side, height), side, height, -2) & _span(place(side, width), side, width, -1)
    region = region & _span(place(length, frames), length, frames, -3)
    return region, torch.rand(count, channels, 1, 1, 1, generator=generator) < 0.5


def _span(start: Tensor, length: Tensor | int, size: int, dim: int) -> Tensor:
    """Which of `size` places lie in [start, start + length): start (B,) -> bool, 5-D, places along dim."""
    places = torch.arange(size)
    inside = (places >= start[:, None]) & (places < (start + length)[:, None])
    return inside.view(-1, *[size if d == dim else 1 for d in (-4, -3, -2, -1)])


def _flicker_price(u: Tensor, thickness: float, roughness: float) -> Tensor:
    """Of offsets (B, 3, F, 1, 1) in units of the largest one: (B,)."""
    first, second = u - u.roll(1, 2), u.roll(1, 2) - 2 * u + u.roll(-1, 2)
    return (thickness * u.square() + roughness * (first.square() + second.square())).flatten(1).mean(1)


# At the door


def _prepare(
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
) -> _Task:
    """Checks everything before any work. Without a step_size, all steps together are `pace` times eps."""
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    _check_clips(clips, labels)
    _check_size("eps", eps)
    if step_size is not None:
        _check_size("step_size", step_size)
    for name, value, least in (("steps", steps, least_steps), ("restarts", restarts, 1), ("eot", eot, 1)):
        _check_count(name, value, least=least)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if not callable(loss) and loss not in list(_LOSSES):
        raise ValueError(f"loss must be callable or one of {', '.join(_LOSSES)}, got {loss!r}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, got {generator.device}")
    with torch.inference_mode(False):  # so that the model may save the labels for its backward pass
        clips, labels = clips.detach().clone(), labels.clone()
    target = _Target(model, labels, loss if callable(loss) else _LOSSES[loss], eot)
    size = pace * eps / max(steps, 1) if step_size is None else step_size
    return _Task(target, _Ball(clips, eps, norm), steps, size, restarts, generator, progress)


def _check_clips(clips: Tensor, labels: Tensor) -> None:
    for name, value in (("clips", clips), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if clips.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"clips must be float32 or float64, in [0, 1], got {clips.dtype}")
    if clips.ndim != 5 or clips.shape[1] != 3 or 0 in clips.shape:
        raise ValueError(f"clips must be (B, 3, F, H, W), got {tuple(clips.shape)}")
    low, high = clips.min().item(), clips.max().item()
    if not (low >= 0 and high <= 1):  # so that NaN is refused
        raise ValueError(f"clips must lie in [0, 1], got {low} to {high}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != clips.shape[:1] or labels.device != clips.device or labels.min() < 0:
        seen = f"{tuple(labels.shape)} on {labels.device}, down to {labels.min() if labels.numel() else None}"
        raise ValueError(f"labels must be ({len(clips)},) of 0 or more on {clips.device}, got {seen}")


def _check_size(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, in the clips' units, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, in the clips' units, got {value}")


def _check_count(name: str, value: int, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
