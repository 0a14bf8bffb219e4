"""Square: random search by queries, without gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..inputs import check_count, check_number
from .base import Best, Loss, Model, interval_mask, prepare
from .registry import register_attack

# Shares of the query budget at which the squares' area is halved (arXiv 1912.00049, section 5).
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@register_attack
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

    The model sees each clip at most `queries` times, the first time unchanged, and no more once it is misclassified.
    For a randomized model each query is `eot` calls, and a clip counts as misclassified when all of them are wrong.

    We know of no Square attack on video in the literature; black-box attacks on video find that few frames decide the
    answer (arXiv 1911.09449). Each square therefore covers a random interval of frames.

    p_init: share of a frame's pixels that the first squares cover, in (0, 1].
    whole_clip: whether squares cover all frames, as they cover all channels. The packaged classifier, which depends on
        motion, is then hardly ever fooled.
    """
    task = prepare(model, clips, labels, eps, loss=loss, eot=eot, generator=generator)
    target, ball, clips = task.target, task.ball, task.ball.clips
    check_count("queries", queries)
    check_number("p_init", p_init, zero=False, most=1)  # squares of no size would change nothing
    best = Best(clips, *target.score(clips))
    for query in tqdm(range(1, queries), desc="square", disable=not progress):
        remaining = (best.success < 1).nonzero()[:, 0]  # indices of the clips that are not yet misclassified
        if not len(remaining):
            break
        draw = _draw_stripes if query == 1 else _draw_square
        share = _square_share(p_init, query / queries)
        region, rising = (t.to(clips.device) for t in draw(clips[remaining].shape, share, whole_clip, generator))
        painted = torch.where(rising, ball.high[remaining], ball.low[remaining])
        proposal = torch.where(region, painted, best.clips[remaining])
        best.update(proposal, *replace(target, labels=target.labels[remaining]).score(proposal), at=remaining)
    return best.clips


def _square_share(p_init: float, done: float) -> float:
    """The share of a frame's pixels that a square covers, when the share `done` of the queries is used."""
    return p_init / 2 ** sum(done > part for part in _HALVINGS)


def _draw_stripes(
    shape: torch.Size, share: float, whole_clip: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """As `_draw_square`, but of all pixels: stripes one column wide, drawn anew for each frame unless whole_clip."""
    count, channels, frames, _, width = shape
    rising = torch.rand(count, channels, 1 if whole_clip else frames, 1, width, generator=generator) < 0.5
    return torch.ones(1, dtype=torch.bool), rising


def _draw_square(
    shape: torch.Size, share: float, whole_clip: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw a square for each clip of this shape (B, 3, F, H, W): two bool tensors, broadcastable to it.

    The first is True where pixels change; the second is True where they rise to the ball's upper bound, else they fall
    to its lower one. share: of a frame's pixels that the square covers.
    """
    count, channels, frames, height, width = shape

    def draw_start(length: Tensor, size: int) -> Tensor:
        return (torch.rand(count, generator=generator) * (size - length + 1)).long()

    side = torch.tensor(min(max(round(math.sqrt(share * height * width)), 1), height, width))
    length = torch.tensor(frames) if whole_clip else torch.randint(1, frames + 1, (count,), generator=generator)
    rows = interval_mask(draw_start(side, height), side, height, -2)
    columns = interval_mask(draw_start(side, width), side, width, -1)
    region = rows & columns & interval_mask(draw_start(length, frames), length, frames, -3)
    return region, torch.rand(count, channels, 1, 1, 1, generator=generator) < 0.5
