"""Pictures of an evaluation: clips before and after purification; accuracy against eps and against seconds a clip."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..files import atomic_write
from ..measure.plot import Panel, Series, draw
from .runner import Examples
from .tables import Accuracy

_STRIP_COLUMNS, _STRIP_SIDE = 8, 128  # frames; pixels of a frame's longer side, at most
AMPLIFICATION = 16  # of the perturbation, to make it visible
_VIDEO_SIDE, _VIDEO_RATE = 192, 8  # pixels, at most; frames per second
_CAPTION = 20  # pixels of height
_BAR_DISTANCE = 0.05  # of neighboring error bars, in distances of ticks
_LEAST_SECONDS = 1e-4  # a logarithmic axis has no zero


def write_strip(
    found: Examples, classes: Sequence[str], path: str | os.PathLike[str], *, threat: str, defense: str
) -> None:
    """A PNG of the first clip: rows are clean, attacked, purified, and attacked - clean; columns are up to 8 frames.

    threat, defense: names for the captions of the attacked and the purified row.
    """
    clean, attacked, purified = found.clean[0], found.attacked[0], found.purified[0]
    captions = [*_captions(found, classes, 0), f"attacked - clean, x{AMPLIFICATION}, around gray"]
    captions[1:3] = f"{captions[1]} ({threat})", f"{captions[2]} ({defense})"
    frames = torch.linspace(0, clean.shape[1] - 1, min(_STRIP_COLUMNS, clean.shape[1])).long()
    rows = []
    for caption, clip in zip(captions, (clean, attacked, purified, amplified(attacked - clean)), strict=True):
        pixels = _enlarge(clip[:, frames], _STRIP_SIDE).transpose(0, 1)  # [F, 3, H, W]
        row = torch.cat(list(pixels), -1)
        rows += [_caption([caption], row.shape[-1]), row]
    picture = Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).contiguous().numpy())
    with atomic_write(path) as temporary:
        picture.save(temporary)


def amplified(perturbation: Tensor) -> Tensor:
    """A perturbation made visible, in [0, 1].

    Signed, with gray for zero: the absolute value of an l_inf perturbation is nearly the same everywhere.
    """
    return (0.5 + perturbation * AMPLIFICATION).clamp(0, 1)


def write_side_by_side(found: Examples, classes: Sequence[str], path: str | os.PathLike[str]) -> None:
    """A video that shows clean, attacked and purified side by side, one clip after another."""
    from ..data.video_writer import VideoWriter

    frames = list(_side_by_side(found, classes))
    height, width = frames[0].shape[1:]
    with VideoWriter(path, height=height, width=width, rate=_VIDEO_RATE) as writer:
        for frame in frames:
            writer.write(frame)


def draw_accuracy(
    rows: Sequence[Accuracy], path: str | os.PathLike[str], *, eps: float | None = None, note: str = ""
) -> None:
    """Robust accuracy against eps, and against seconds a clip at one eps: panels for each threat, .svg or .png.

    The last panels show the minimum over all attacks. Error bars are 95 % intervals.

    eps: the one of the panels against seconds; a threat's smallest where it is None, or where the threat lacks it.
    ValueError if no row belongs to an attack.
    """
    attacked = [row for row in rows if row.threat_model != "none"]
    if not attacked:
        raise ValueError("there is no accuracy under attack to draw")
    title = "minimum over all attacks"
    attacked = [row._replace(threat=title) if row.threat_model == "adaptive" else row for row in attacked]
    names = list(dict.fromkeys(row.defense for row in attacked))
    # One time for all rows of a defense, because the minimum has none of its own.
    seconds = {row.defense: row.seconds_per_clip for row in reversed(rows) if row.seconds_per_clip is not None}
    panels = [
        panel
        for threat in dict.fromkeys(row.threat for row in attacked)
        for panel in _panels([row for row in attacked if row.threat == threat], names, seconds, eps)
    ]
    draw(panels, names, path, note=note)


def _panels(
    rows: Sequence[Accuracy], names: Sequence[str], seconds: Mapping[str, float], eps: float | None
) -> Iterator[Panel]:
    """The panels of one threat: accuracy against eps, if it has several, then against seconds a clip."""
    sizes = sorted({row.eps for row in rows})
    if len(sizes) > 1:
        series = []
        for i, name in enumerate(names):
            offset = _BAR_DISTANCE * (i - (len(names) - 1) / 2)  # error bars of one eps stand side by side
            found = sorted((row for row in rows if row.defense == name), key=lambda row: row.eps)
            if found:
                series.append(_series(name, [sizes.index(row.eps) + offset for row in found], found))
        yield Panel(rows[0].threat, "eps, 1/255", "accuracy", series, [f"{255 * eps:g}" for eps in sizes], top=1)
    eps = eps if eps in sizes else sizes[0]
    series = [
        _series(row.defense, [max(seconds[row.defense], _LEAST_SECONDS)], [row]) for row in rows if row.eps == eps
    ]
    yield Panel(f"{rows[0].threat}, eps {255 * eps:g}/255", "seconds a clip", "accuracy", series, top=1)


def _series(name: str, x: Sequence[float], rows: Sequence[Accuracy]) -> Series:
    return Series(name, x, [row.accuracy for row in rows], [row.low for row in rows], [row.high for row in rows])


def _captions(found: Examples, classes: Sequence[str], i: int) -> list[str]:
    true, attacked, purified = (
        classes[labels[i]] for labels in (found.labels, found.attacked_labels, found.purified_labels)
    )
    return [f"clean, truly {true}", f"attacked: seen as {attacked}", f"purified: seen as {purified}"]


def _side_by_side(found: Examples, classes: Sequence[str]) -> Iterator[Tensor]:
    """Yield frames (3, H, W) uint8: a caption above clean | attacked | purified."""
    for i in range(len(found.labels)):
        sides = [_enlarge(clips[i], _VIDEO_SIDE) for clips in (found.clean, found.attacked, found.purified)]
        pixels = torch.cat(sides, -1)
        heading = _caption(_captions(found, classes, i), pixels.shape[-1])
        for frame in pixels.unbind(1):
            yield torch.cat([heading, frame], 1)


def _enlarge(clip: Tensor, side: int) -> Tensor:
    """(3, F, H, W) in [0, 1] -> uint8, enlarged by the largest whole factor that keeps both sides within `side`."""
    scale = max(1, side // max(clip.shape[-2:]))
    enlarged = clip.cpu().float().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return (enlarged * 255).round().to(torch.uint8)


def _caption(texts: list[str], width: int) -> Tensor:
    """White image (3, _CAPTION, width) uint8 with the texts in columns of equal width."""
    bar = Image.new("RGB", (width, _CAPTION), "white")
    drawing = ImageDraw.Draw(bar)
    for i, text in enumerate(texts):
        drawing.text((i * width // len(texts) + 4, 4), text, fill="black")
    return torch.frombuffer(bytearray(bar.tobytes()), dtype=torch.uint8).view(_CAPTION, width, 3).permute(2, 0, 1)
