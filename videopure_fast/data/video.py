"""Probing and reading video files of any length in bounded memory: mp4 and mov, avi, gif, webm and mkv, MPEG-TS.

Frames are (3, H, W) uint8 RGB. `video_writer` writes them.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..inputs import LEAST_SIDE
from .containers import avi_share, foreign_container, gif_reaches_trailer
from .picture import IDENTITY, Orientation, orientation, states_no_color, upright
from .timing import MAX_SECONDS, MISSING, median_rate, ordered

if TYPE_CHECKING:
    from av import VideoFrame
    from av.audio import AudioStream
    from av.container import InputContainer
    from av.video import VideoStream

    from .timing import Stamps

MAX_PIXELS = 8192 * 8192  # in one frame; a file of a few bytes can state a frame size that exceeds a machine's memory

# FFmpeg's playlists, device inputs and network protocols are disabled: an untrusted file must not open other files.
_OPEN_OPTIONS = {"format_whitelist": "mov,avi,gif,matroska,mpegts", "protocol_whitelist": "file"}
# Fail on damage: by default FFmpeg conceals it and goes on.
_DECODE_OPTIONS = {"err_detect": "crccheck+bitstream+buffer+explode"}
_ROUNDED = 2**14  # pixels, with which twice as many as a frame has are enough for a decoder that rounds sides up to 64
_ACCEPTED = "accepted: mp4, avi, gif and webm videos, also mov, mkv and MPEG-TS"
_MAX_MISSING = 0.1  # a file is refused as truncated if more than this share of its stated duration is missing


class TooManyPixels(ValueError):
    """A video with a frame that is larger than its reader takes."""


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds by decoding a whole video file.

    Attributes:
        path: the file.
        frames: number of decoded frames, at least 2.
        height, width: size of a frame as it is shown, in pixels.
        rate: frames per second, by the median step between frames; the times of varying rates are in `stamps`.
        has_audio: whether the file has a sound track that can be copied.
        stream: index of the video stream in the container.
        orientation: the display matrix (a, b, c, d), which moves a point (x, y) of a decoded frame to
            (ax + cy, bx + dy); one of the eight that turn and mirror.
        pixel_aspect: width divided by height of a pixel as it is shown.
        assumed_bt709: whether the file has 720 lines or more and states no color space.
        stamps: when each frame is shown, int64, strictly increasing, in ticks of `time_base` from the file's time 0.
        time_base: length of a tick, in seconds.
        last_duration: how long the last frame is shown, in seconds.
    """

    path: Path
    frames: int
    height: int
    width: int
    rate: Fraction
    has_audio: bool
    stream: int
    orientation: Orientation
    pixel_aspect: Fraction
    assumed_bt709: bool
    stamps: Stamps = field(compare=False, repr=False)
    time_base: Fraction
    last_duration: Fraction

    @property
    def start(self) -> Fraction:
        """Time at which the first frame is shown, in seconds."""
        return self.time(0)

    def time(self, frame: int) -> Fraction:
        """Time at which a frame is shown, in seconds."""
        return int(self.stamps[frame]) * self.time_base


def probe(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Decode a video once from end to end, and return its frame count, size, times, rate and sound.

    The whole file is decoded because headers may state a wrong length, and because a damaged frame should be found
    before hours of work, not after. Of several video streams the one with the most pixels is read; cover pictures are
    ignored. Nothing is repaired: a file is refused if its decoder reports an error or a corrupt frame, or if its frames
    end more than 10 %, and more than a frame, before the stated duration; or an AVI, whose length may be a
    guess, before its stated size. Damage that still decodes cannot be detected; this concerns GIF most, which has no
    checksums, and the ends of MPEG-TS, and of an AVI that went into a pipe, which state none.

    Raises FileNotFoundError, or ValueError for anything that is not an intact video of 2 frames or more, each of
    8192x8192 pixels at most, in one orientation that only turns or mirrors; TooManyPixels for a frame of more than
    `max_pixels`, whatever the header says.
    """
    path = Path(path)
    first: VideoFrame | None = None
    turn = IDENTITY
    found = array("q")  # 8 bytes a frame
    latest, last = MISSING, 0
    for frame in _decode(path, max_pixels):
        if first is None:
            first, turn = frame, orientation(frame, path)
        elif frame.rotation != first.rotation:
            raise ValueError(f"{path} changes its orientation at frame {len(found)}; accepted: one for all frames")
        found.append(MISSING if frame.pts is None else frame.pts)
        if found[-1] >= latest:
            latest, last = found[-1], frame.duration or 0
    if first is None or len(found) < 2:
        raise ValueError(f"{path} has {len(found)} frame{'s' * (len(found) != 1)}; {_ACCEPTED}, of 2 frames or more")
    with open_video(path) as (container, stream):
        rate, stamps, time_base = _times(np.asarray(found), Fraction(first.time_base), stream, path)
        aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
        sideways = turn[0] == 0
        return VideoInfo(
            path=path,
            frames=len(found),
            height=first.width if sideways else first.height,
            width=first.height if sideways else first.width,
            rate=rate,
            has_audio=audio_stream(container, stream) is not None,
            stream=stream.index,
            orientation=turn,
            pixel_aspect=1 / aspect if sideways else aspect,
            assumed_bt709=states_no_color(first),
            stamps=stamps,
            time_base=time_base,
            last_duration=last * Fraction(first.time_base) or 1 / rate,
        )


def _times(found: Stamps, time_base: Fraction, stream: VideoStream, path: Path) -> tuple[Fraction, Stamps, Fraction]:
    """Rate, time stamps in order, and their time base."""
    known = found[found != MISSING]
    if len(known) and max(-int(known.min()), int(known.max())) * time_base > MAX_SECONDS:
        raise ValueError(f"{path} is damaged: its time stamps exceed {MAX_SECONDS} s")
    rate = median_rate(found, time_base, (stream.average_rate, stream.guessed_rate, stream.base_rate))
    return rate, *ordered(found, time_base, rate)


def working_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of a picture resized to a short side of `size` pixels: the same aspect, even sides of 16 or more.

    ValueError if size is odd or less than 16, or the result has more than MAX_PIXELS pixels.
    """
    if size < LEAST_SIDE or size % 2:
        raise ValueError(f"size must be an even number of {LEAST_SIDE} pixels or more, got {size}")
    short = min(height, width)
    new_height, new_width = (max(LEAST_SIDE, 2 * round(side * size / short / 2)) for side in (height, width))
    if new_height * new_width > MAX_PIXELS:
        raise ValueError(
            f"{height}x{width} with a short side of {size} becomes {new_height}x{new_width}; "
            f"accepted: {MAX_PIXELS} pixels a frame at most"
        )
    return new_height, new_width


def read_frames(video: VideoInfo, size: int) -> Iterator[Tensor]:
    """Yield the frames of a probed video, (3, h, w) uint8 with (h, w) = working_size(height, width, size).

    torchcodec decodes if it is installed and finds as many frames as PyAV of the same size; otherwise PyAV decodes.
    ValueError if the file is damaged.
    """
    shape = working_size(video.height, video.width, size)
    decoded = (upright(frame, video.orientation) for frame in _decode(video.path))
    for frame in _torchcodec_frames(video) or decoded:
        yield resized(frame, shape)


def resized(frame: Tensor, shape: tuple[int, int]) -> Tensor:
    """A frame (3, H, W) uint8 in another size (height, width)."""
    if frame.shape[1:] == shape:
        return frame
    return F.interpolate(frame[None].contiguous(), shape, mode="bilinear", antialias=True)[0]


def torchcodec_decoder() -> type[Any] | None:
    """torchcodec's VideoDecoder, or None if torchcodec or the FFmpeg libraries that it needs are missing."""
    try:
        from torchcodec.decoders import VideoDecoder
    except Exception:  # the exception of a library that fails to load differs by version and platform
        return None
    return VideoDecoder


def _torchcodec_frames(video: VideoInfo) -> Iterator[Tensor] | None:
    """Frames (3, H, W) uint8 decoded by torchcodec; None if it cannot decode this file as PyAV did."""
    decoder_class = torchcodec_decoder()
    # Versions of torchcodec differ in what they turn, and its colors are BT.601 where a file states no color space.
    if decoder_class is None or video.orientation != IDENTITY or video.assumed_bt709:
        return None
    try:
        decoder = decoder_class(str(video.path), stream_index=video.stream, seek_mode="exact")
        agrees = len(decoder) == video.frames and decoder[0].shape == (3, video.height, video.width)
    except Exception:  # for example a codec that its FFmpeg lacks; `probe` has decoded the file with PyAV
        return None
    return (decoder[i] for i in range(video.frames)) if agrees else None


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file: its container, and its video stream with the most pixels. FileNotFoundError or ValueError if it has
    none."""
    import av

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; {_ACCEPTED}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; {_ACCEPTED}")
    try:
        container = av.open(f"file:{path}", options=dict(_OPEN_OPTIONS), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        if foreign := foreign_container(path):
            name, command = foreign
            raise ValueError(f"{path} is {name}, which is not read; {_ACCEPTED}; convert it by `{command}`") from error
        raise ValueError(f"{path} is damaged or not a video ({error.strerror}); {_ACCEPTED}") from error
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & cover]
        if not streams:
            raise ValueError(f"{path} is damaged or has no video stream that can be decoded; {_ACCEPTED}")
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
        height, width = stream.codec_context.height, stream.codec_context.width
        if not 0 < height * width <= MAX_PIXELS:
            raise ValueError(f"{path} has frames of {height}x{width}; accepted: 1 to {MAX_PIXELS} pixels a frame")
        yield container, stream


def _decode(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[VideoFrame]:
    """Yield all frames of the largest video stream; ValueError at the first sign of damage, or of a larger frame."""
    import av

    with open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        bound = min(2 * max_pixels + _ROUNDED, MAX_PIXELS)  # what is much larger is not even decoded
        stream.codec_context.options = {**_DECODE_OPTIONS, "max_pixels": str(bound)}
        count = 0
        tick = float(stream.time_base or 0)  # seconds
        start, end = float("inf"), float("-inf")  # seconds
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError(f"{path} is damaged: it breaks off or is corrupt after {count} frames")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise ValueError(f"{path} is damaged: frame {count} is corrupt")
                    if frame.width * frame.height > max_pixels:
                        accepted = f"accepted: {max_pixels} pixels a frame at most"
                        raise TooManyPixels(f"{path} has a frame of {frame.width}x{frame.height}; {accepted}")
                    if frame.pts is not None:
                        start = min(start, frame.pts * tick)
                        end = max(end, (frame.pts + (frame.duration or 0)) * tick)
                    count += 1
                    yield frame
        except av.FFmpegError as error:
            raise ValueError(f"{path} is damaged: decoding fails after {count} frames ({error.strerror})") from error
        avi = container.format.name == "avi"  # the length of one that a pipe was given is no length at all
        stated = None if avi else _stated_end(stream, start)
        # Some muxers leave out how long the last frame is shown.
        mean = (end - start) / max(1, count - 1)
        if stated is not None and start <= end < stated - max(_MAX_MISSING * (stated - start), 1.5 * mean):
            raise ValueError(
                f"{path} is damaged: its {count} frames end after {end - start:.2f} s of {stated - start:.2f} s"
            )
        if avi and (share := avi_share(path)) < 1 - _MAX_MISSING:
            raise ValueError(f"{path} is damaged: it breaks off after {share:.0%} of its bytes, in {count} frames")
        if container.format.name == "gif" and not gif_reaches_trailer(path):
            raise ValueError(f"{path} is damaged: no more than {count} frames can be read before it breaks off")


def _stated_end(stream: VideoStream, start: float) -> float | None:
    """When a stream that starts at `start` ends according to its header, in seconds; None if that does not say."""
    if stream.duration and stream.time_base is not None:
        return start + float(stream.duration * stream.time_base)
    try:  # Matroska and WebM have a tag such as "00:00:01.600000000", which counts from the file's time 0
        hours, minutes, seconds = map(float, stream.metadata.get("DURATION", "").split(":"))
        return 3600 * hours + 60 * minutes + seconds
    except ValueError:
        return None


def audio_stream(container: InputContainer, video: VideoStream) -> AudioStream | None:
    """The audio stream that belongs to a video stream; None if there is none that can be copied."""
    audio = cast("AudioStream | None", container.streams.best("audio", related=video))
    return None if audio is None or audio.codec_context is None else audio
