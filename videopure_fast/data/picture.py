"""From a decoded frame to the picture that it shows: orientation and color."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from av import VideoFrame

Orientation = tuple[int, int, int, int]

IDENTITY: Orientation = (1, 0, 0, 1)
HD_LINES = 720  # from so many lines on, colors are BT.709 where a file does not say; BT.601 below

_ONE = 1 << 16  # the elements of a display matrix have 16 fractional bits,
_ONE_LAST = 1 << 30  # those of its last column 30
_UNSPECIFIED = 2  # FFmpeg's AVCOL_SPC_UNSPECIFIED


def orientation(frame: VideoFrame, path: Path) -> Orientation:
    """The display matrix of a frame, as `VideoInfo.orientation`; ValueError if it does more than turn and mirror."""
    import av

    # PyAV's side data and their frame refer to each other. They are freed at once, with a copy in place of the frame:
    # what belongs to a decoder's threads must not live on into a forked process, which has no such threads.
    copy = frame.reformat(width=16, height=16, format="gray")
    data = copy.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    matrix = None if data is None else np.frombuffer(data, np.int32, 9).tolist()
    del copy, data
    gc.collect(1)
    if matrix is None:
        return IDENTITY
    a, b, u, c, d, v, _, _, w = matrix  # what moves the whole picture is left out
    turns = {abs(a), abs(d)} | {_ONE - abs(b), _ONE - abs(c)}
    if turns not in ({0}, {_ONE}) or (u, v, w) != (0, 0, _ONE_LAST):
        shown = ", ".join(f"{value / _ONE:.6g}" for value in (a, b, c, d))
        raise ValueError(
            f"{path} has the display matrix ({shown}), last column ({u}, {v}, {w / _ONE_LAST:.6g}); "
            "accepted: turns by 90 degrees and mirrors, unscaled. `ffmpeg -i in.mp4 out.mp4` applies others"
        )
    return a // _ONE, b // _ONE, c // _ONE, d // _ONE


def states_no_color(frame: VideoFrame) -> bool:
    """Whether a frame has colors of BT.709 only because of its size."""
    return frame.colorspace == _UNSPECIFIED and frame.height >= HD_LINES and not frame.format.is_rgb


def upright(frame: VideoFrame, turn: Orientation, shape: tuple[int, int] | None = None) -> Tensor:
    """A decoded frame as it is shown, moved by `turn`: (3, H, W) uint8 RGB.

    YUV is converted as the frame's tags say; untagged, by BT.709 from HD_LINES lines on, else by BT.601.

    shape: (height, width) of the result, if it is to be resized. swscale does that as it converts, by a bilinear filter
    that averages where it shrinks: within a few levels of `video.resized`, and much sooner.
    """
    options: dict[str, Any] = {"src_colorspace": "ITU709"} if states_no_color(frame) else {}
    if shape is not None:
        height, width = shape if turn[0] else shape[::-1]
        options |= {"height": height, "width": width, "interpolation": "BILINEAR"}
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", **options)).permute(2, 0, 1)
    return oriented(pixels, turn)


def oriented(pixels: Tensor, turn: Orientation) -> Tensor:
    """Pixels (..., H, W) moved by a display matrix, as `VideoInfo.orientation`."""
    a, b, c, d = turn
    if a == 0:
        pixels = pixels.transpose(-2, -1)
    flipped = [axis for axis, sign in ((-1, a + c), (-2, b + d)) if sign < 0]
    return pixels.flip(flipped) if flipped else pixels
