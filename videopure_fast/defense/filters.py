"""Cheap defenses, a baseline for purifiers: clips (B, 3, F, H, W), floats in [0, 1] -> the same shape and dtype.

Results are contiguous, in [0, 1] and on the clips' device. Each clip of a batch is filtered on its own. Every function
raises TypeError or ValueError for input that is not clips: another layout or dtype, an empty axis, values outside
[0, 1] or NaN. Any number of frames and any height and width of 1 or more are accepted. All filters but the two codecs,
`jpeg` and `h264`, are differentiable.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import REPEATABLE_H264
from ..inputs import check_clips, check_count, check_generator
from ..purifier import Purifier

if TYPE_CHECKING:
    import numpy as np
    from av import Packet

_RATE = 25  # frames per second; H.264's rate control depends on it
_SHUFFLE_SEED = 1  # seed of FILTERS' shuffling; seed 0 would keep the order of a clip of two frames


def temporal_mean(clips: Tensor, width: int) -> Tensor:
    """Each frame becomes the mean of the `width` frames around it; the first and the last frame are repeated.

    width: odd, 1 or more; it may exceed the number of frames.
    """
    check_clips(clips)
    return _neighbors(clips, width).mean(-1).contiguous()


def temporal_median(clips: Tensor, width: int) -> Tensor:
    """Each value becomes the median of the `width` frames around it; the first and the last frame are repeated.

    Feature squeezing's median smoothing (arXiv 1704.01155), along time. width: odd, 1 or more; it may exceed the
    number of frames. The gradient goes to the frame whose value is the median; among equal values, to the middle one.
    """
    check_clips(clips)
    # Tensor.median picks another one of equal frames on each device, so that its gradient would differ.
    ordered = _neighbors(clips, width).sort(dim=-1, stable=True).values
    return ordered[..., width // 2].contiguous()


def temporal_shuffle(clips: Tensor, *, generator: torch.Generator, block: int | None = None) -> Tensor:
    """Shuffle the frames of each clip, in a separate random order for each.

    Randomizing the order of frames as a defense is from Hwang et al., arXiv 2112.07921. This is one uniform permutation
    a clip, not a reproduction of their procedure.

    generator: on the CPU, so that orders do not depend on the clips' device. The clips' orders are drawn in turn.
    block: frames move only within consecutive blocks of this many frames (the last may be shorter), which keeps the
        motion between blocks. None: within the whole clip.
    """
    check_clips(clips)
    check_generator(generator)
    frames = clips.shape[2]
    if block is None:
        block = frames
    check_count("block", block)
    orders = [_order(frames, block, generator).to(clips.device) for _ in clips]
    return torch.stack([clip.index_select(1, order) for clip, order in zip(clips, orders, strict=True)])


def jpeg(clips: Tensor, quality: int = 75) -> Tensor:
    """Encode every frame as JPEG and decode it (a defense since arXiv 1608.00853), by Pillow with its 4:2:0 chroma.

    quality: 1 to 95, Pillow's scale. Values are rounded to 8 bits first. JPEG is not differentiable: RuntimeError in
    grad mode with clips that require a gradient, which would be lost silently. `attacks.bpda` can attack it.
    """
    check_clips(clips)
    check_count("quality", quality, most=95)
    _refuse_gradient(clips, "jpeg")
    pictures = _to_bytes(clips)
    for clip in pictures:
        for frame in clip:
            frame[:] = _jpeg_frame(frame, quality)
    return _from_bytes(pictures, clips)


def h264(clips: Tensor, crf: int = 23) -> Tensor:
    """Encode every clip as H.264 (libx264, yuv420p, 25 frames per second) and decode it, in memory.

    x264's preset is medium, on one thread and without the macroblock tree, so that equal clips give equal results.
    crf: its constant rate factor, 0 (finest) to 51 (coarsest). Values are rounded to 8 bits first; odd sides are padded
    by replication and cropped back. H.264 is not differentiable: RuntimeError in grad mode with clips that require a
    gradient, which would be lost silently. `attacks.bpda` can attack it. RuntimeError also where PyAV was built without
    libx264.
    """
    check_clips(clips)
    check_count("crf", crf, least=0, most=51)
    _refuse_gradient(clips, "h264")
    pictures = _to_bytes(_pad_sides(clips, 2))  # chroma has half the resolution
    for clip in pictures:
        clip[:] = _h264_decode(_h264_encode(clip, crf), len(clip))
    return _from_bytes(pictures[..., : clips.shape[3], : clips.shape[4], :], clips)


def reconstruct(purifier: Purifier, clips: Tensor) -> Tensor:
    """Encode and decode by the VAE alone, without diffusion. Sides are padded to the VAE's factor and cropped back."""
    if not isinstance(purifier, Purifier):
        raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    check_clips(clips)
    padded = _pad_sides(clips.to(purifier.vae.device), purifier.vae_factor)
    decoded = purifier.decode(purifier.encode(padded))
    return decoded[..., : clips.shape[3], : clips.shape[4]].to(clips).contiguous()


def _shuffle_with_fixed_seed(clips: Tensor) -> Tensor:
    """Shuffle every clip by the same seed, so that a clip's result does not depend on the batch it is in."""
    check_clips(clips)
    shuffled = [
        temporal_shuffle(clip, generator=torch.Generator().manual_seed(_SHUFFLE_SEED)) for clip in clips.split(1)
    ]
    return torch.cat(shuffled)


# The deterministic filters that need no purifier, by the names under which evaluations compare them.
FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of 3 frames": partial(temporal_mean, width=3),
    "mean of 5 frames": partial(temporal_mean, width=5),
    "median of 3 frames": partial(temporal_median, width=3),
    "median of 5 frames": partial(temporal_median, width=5),
    "JPEG 75": partial(jpeg, quality=75),
    "H.264 crf 23": partial(h264, crf=23),
    "temporal shuffling": _shuffle_with_fixed_seed,
}
WITHOUT_GRADIENT = {"JPEG 75", "H.264 crf 23"}  # the filters that are not differentiable


def _neighbors(clips: Tensor, width: int) -> Tensor:
    """(B, 3, F, H, W) -> (B, 3, F, H, W, width): the `width` frames around each frame, in order."""
    check_count("width", width)
    if width % 2 == 0:
        raise ValueError(f"width must be odd, to have a frame in the middle, got {width}")
    beyond = (-1, -1, width // 2, -1, -1)
    # F.pad's gradient is not deterministic on CUDA, so the clip is padded by torch.cat.
    padded = torch.cat([clips[:, :, :1].expand(beyond), clips, clips[:, :, -1:].expand(beyond)], 2)
    return padded.unfold(2, width, 1)


def _order(frames: int, block: int, generator: torch.Generator) -> Tensor:
    """(frames,) int64: a permutation that keeps every frame in its block."""
    starts = range(0, frames, block)
    return torch.cat([s + torch.randperm(min(block, frames - s), generator=generator, device="cpu") for s in starts])


def _jpeg_frame(frame: np.ndarray, quality: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _h264_encode(frames: np.ndarray, crf: int) -> list[Packet]:
    """Frames (F, H, W, 3) uint8 with even sides -> packets in decoding order. RuntimeError without libx264."""
    import av

    try:
        encoder = av.CodecContext.create("libx264", "w")
    except av.codec.codec.UnknownCodecError as error:
        raise RuntimeError("h264 needs libx264, and PyAV was built without it; `pip install av` has it") from error
    encoder.height, encoder.width = frames.shape[1:3]
    encoder.pix_fmt = "yuv420p"
    encoder.framerate, encoder.time_base = Fraction(_RATE), Fraction(1, _RATE)
    encoder.options = {"preset": "medium", "crf": str(crf), **REPEATABLE_H264}
    packets = []
    for i, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
        picture.pts, picture.time_base = i, encoder.time_base
        packets += encoder.encode(picture)
    return packets + encoder.encode(None)


def _h264_decode(packets: list[Packet], count: int) -> np.ndarray:
    """Packets -> frames (count, H, W, 3) uint8 in display order. RuntimeError where frames are missing."""
    import av
    import numpy as np

    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    pictures = [picture for packet in [*packets, None] for picture in decoder.decode(packet)]
    if [picture.pts for picture in pictures] != list(range(count)):
        raise RuntimeError(f"H.264 gave back frames {[picture.pts for picture in pictures]} of {count}")
    return np.stack([picture.to_ndarray(format="rgb24") for picture in pictures])


def _to_bytes(clips: Tensor) -> np.ndarray:
    """(B, 3, F, H, W) in [0, 1] -> (B, F, H, W, 3) uint8, a contiguous copy that may be overwritten."""
    levels = (clips.detach().cpu().float() * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous().numpy()


def _from_bytes(pictures: np.ndarray, like: Tensor) -> Tensor:
    """(B, F, H, W, 3) uint8 -> (B, 3, F, H, W) in [0, 1], with the dtype and device of `like`."""
    levels = torch.from_numpy(pictures).permute(0, 4, 1, 2, 3)
    return (levels.float() / 255).to(like).contiguous()


def _pad_sides(clips: Tensor, multiple: int) -> Tensor:
    """Replicate the last row and column until height and width are multiples of `multiple`."""
    bottom, right = (-side % multiple for side in clips.shape[-2:])
    if not bottom and not right:
        return clips
    return F.pad(clips.flatten(0, 1), (0, right, 0, bottom), mode="replicate").unflatten(0, clips.shape[:2])


def _refuse_gradient(clips: Tensor, name: str) -> None:
    """RuntimeError where the clips' gradient would be lost silently."""
    if torch.is_grad_enabled() and clips.requires_grad:
        raise RuntimeError(
            f"{name} has no gradient, and the clips require one; use attacks.bpda(filters.{name}, model) to attack "
            "through it, or torch.no_grad()"
        )
