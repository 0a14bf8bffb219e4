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
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..inputs import check_count, check_number
from ..straight_through import straight_through
from .base import Best, Loss, Model, Shared, Task, gradient_of, lengths, prepare, shift, unit

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Attack(NamedTuple):
    """What a command line looks up: the function, and one line of help."""

    run: Callable[..., Tensor]
    help: str


# Attacks by gradient


def fgsm(
    model: Model, clips: Tensor, labels: Tensor, *, eps: float, random_start: bool = False, **shared: Unpack[Shared]
) -> Tensor:
    """One step of size eps along the gradient (FGSM, arXiv 1412.6572)."""
    task = prepare(model, clips, labels, eps, step_size=eps, **shared)
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
    """Projected gradient descent, untargeted (PGD, arXiv 1706.06083). 0 steps give its start."""
    task = prepare(model, clips, labels, eps, steps=steps, least_steps=0, step_size=step_size, **shared)
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
    task = prepare(model, clips, labels, eps, steps=steps, step_size=step_size, pace=1.0, **shared)
    check_number("decay", decay)
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
    task = prepare(model, clips, labels, eps, steps=steps, **shared)
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
    task = prepare(model, clips, labels, eps, steps=steps, step_size=step_size, pace=1.0, **shared)
    check_count("max_shift", max_shift, least=0)
    if decay is not None:
        check_number("decay", decay)
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
    eot: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Random search by squares of +-eps, without gradients, in the l_inf ball (Square, arXiv 1912.00049).

    A clip is shown to the model at most `queries` times, the first time as it is, and no more once it is fooled. Of a
    random model each of these is `eot` calls, and fooled is a clip that all of them see wrong.
    p_init: share of a frame's pixels in the first squares. We know of no Square for video in the literature; its
    black-box attacks find that few frames carry the answer (arXiv 1911.09449), so each square fills a stretch of
    frames, drawn with it. whole_clip=True fills all frames, as all channels are: the packaged classifier, which sees
    motion, is then hardly ever fooled.
    """
    task = prepare(model, clips, labels, eps, loss=loss, eot=eot, generator=generator)
    target, ball, clips = task.target, task.ball, task.ball.clips
    check_count("queries", queries)
    check_number("p_init", p_init, zero=False, most=1)  # squares of no size would change nothing
    best = Best(clips, *target.score(clips))
    for query in tqdm(range(1, queries), desc="square", disable=not progress):
        alive = (best.rate < 1).nonzero()[:, 0]
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
    task = prepare(
        model, clips, labels, eps, steps=steps, step_size=step_size, pace=5.0, loss=loss, eot=eot, generator=generator
    )
    check_number("thickness", thickness)
    check_number("roughness", roughness)
    clips = task.ball.clips
    offset = torch.zeros_like(clips[..., :1, :1])
    for i in tqdm(range(steps), desc="flicker", disable=not progress):
        gain = eps * task.target.gradient(offset, lambda offset: (clips + offset).clamp(0, 1))
        price = gradient_of(offset / eps, lambda u: _flicker_price(u, thickness, roughness))
        offset = (offset + task.step_size * (1 - i / steps) * (gain - price).sign()).clamp(-eps, eps)
    return shift(clips, offset)


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
    task = prepare(model, clips, labels, eps, steps=steps, step_size=step_size, **shared)
    clips, count = task.ball.clips, clips.shape[2]
    check_count("frame", 0 if frame is None else frame, least=0, most=count - 1)
    if frame is None:
        frames = lengths(task.target.gradient(clips).transpose(1, 2).flatten(0, 1)).view(-1, count).argmax(1)
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
    task = prepare(model, clips, labels, eps, steps=steps, step_size=step_size, **shared)
    height, width = clips.shape[-2:]
    check_count("size", size, most=min(height, width))
    room = (height - size, width - size)
    if corner is None:
        top, left = (torch.randint(most + 1, (len(clips),), generator=shared.get("generator")) for most in room)
    elif (
        isinstance(corner, (tuple, list))
        and len(corner) == 2
        and all(isinstance(place, int) and 0 <= place <= most for place, most in zip(corner, room, strict=True))
    ):
        top, left = (torch.full((len(clips),), place) for place in corner)
    else:
        raise ValueError(f"corner must be (top, left) within (0, 0)..{room}, got {corner!r}")
    task.ball.restrict((_span(top, size, height, -2) & _span(left, size, width, -1)).to(clips.device))
    return _restart("patch", task, _climber(task, task.target.gradient), random_start)


_ALL = (fgsm, pgd, mim, apgd, temporal_translation, square, flicker, one_frame, patch)
ATTACKS: dict[str, Attack] = {run.__name__: Attack(run, (run.__doc__ or "").partition("\n")[0]) for run in _ALL}


# Around a defense


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


_Run = Callable[[Tensor, tqdm], Tensor]  # from a start, with a bar that counts steps, to attacked clips


def _climber(task: Task, gradient: Callable[[Tensor], Tensor], decay: float | None = None) -> _Run:
    """Projected steps of one size along the gradient; with decay, along the sum of gradients of mean size 1."""

    def run(x: Tensor, bar: tqdm) -> Tensor:
        momentum = torch.zeros_like(x)
        for _ in range(task.steps):
            direction = gradient(x)
            if decay is not None:
                momentum = direction = decay * momentum + unit(direction, lambda g: g.abs().flatten(1).mean(1))
            x = task.ball.project(x + task.step_size * task.ball.ascent(direction))
            bar.update()
        return x

    return run


def _restart(name: str, task: Task, run: _Run, random_start: bool) -> Tensor:
    """The best of the runs for each clip. The first starts at the clip, or at random; all others at random."""
    best = None
    with tqdm(total=task.steps * task.restarts, desc=name, disable=not task.progress) as bar:
        for i in range(task.restarts):
            x = run(task.ball.draw(task.generator) if random_start or i else task.ball.clips.clone(), bar)
            if task.restarts == 1:
                return x
            score = task.target.score(x)
            best = best or Best(x, *score)
            best.offer(x, *score)
    return best.clips


def _auto_pgd(task: Task, x: Tensor, bar: tqdm) -> Tensor:
    """Algorithm 1 of arXiv 2003.01690; at checkpoints a clip whose climb stalls goes on from its peak in half steps."""
    target, ball = task.target, task.ball
    gradient, rate, loss = target.probe(x)
    found = Best(x, rate, loss)
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
    if kind not in list(kinds):
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
