"""Probing and reading video files of any length in bounded memory: mp4 and mov, avi, gif, webm and mkv.

Frames are (3, H, W) uint8 RGB. `video_writer` writes them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import LEAST_SIDE

if TYPE_CHECKING:
    from av import VideoFrame
    from av.audio import AudioStream
    from av.container import InputContainer
    from av.video import VideoStream

MAX_PIXELS = 8192 * 8192  # in one frame; a file of a few bytes can state a frame size that exceeds a machine's memory

# FFmpeg's playlists, device inputs and network protocols are disabled: an untrusted file must not open other files.
_OPEN_OPTIONS = {"format_whitelist": "mov,avi,gif,matroska", "protocol_whitelist": "file"}
# Fail on damage: by default FFmpeg conceals it and goes on.
_DECODE_OPTIONS = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(MAX_PIXELS)}
_ACCEPTED = "accepted: mp4, avi, gif and webm videos"
_MAX_MISSING = 0.1  # a file is refused as truncated if more than this share of its stated duration is missing


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds by decoding a whole video file.

    Attributes:
        path: the file.
        frames: number of decoded frames, at least 2.
        height, width: size of a frame as it is shown, in pixels.
        rate: frames per second; the mean if the rate varies.
        has_audio: whether the file has a sound track that can be copied.
        stream: index of the video stream in the container.
        start: time stamp of the first frame, in seconds.
        rotation: degrees by which decoded frames were turned counterclockwise, a multiple of 90.
        pixel_aspect: width divided by height of a pixel as it is shown.
    """

    path: Path
    frames: int
    height: int
    width: int
    rate: Fraction
    has_audio: bool
    stream: int
    start: Fraction
    rotation: int
    pixel_aspect: Fraction


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Decode a video once from end to end, and return its frame count, size, rate and sound.

    The whole file is decoded because headers may state a wrong length, and because a damaged frame should be found
    before hours of work, not after. Of several video streams the one with the most pixels is read; cover pictures are
    ignored. Nothing is repaired: a file is refused if its decoder reports an error or a corrupt frame, or if its frames
    end more than 10 % before the stated duration. Damage that still decodes cannot be detected; this concerns GIF most,
    which has no checksums.

    Raises FileNotFoundError, or ValueError for anything that is not an intact video of 2 frames or more, each of
    8192x8192 pixels at most.
    """
    path = Path(path)
    frames = 0
    first: VideoFrame | None = None
    end: Fraction | None = None
    for frame in _decode(path):
        first = first or frame
        frames += 1
        end = _end(frame) or end
    if first is None or frames < 2:
        raise ValueError(f"{path} has {frames} frame{'s' * (frames != 1)}; {_ACCEPTED} of 2 frames or more")
    start = _time(first) or Fraction(0)
    with open_video(path) as (container, stream):
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        if end is not None and end > start:
            # Keep the header's rate, which is exact, unless it contradicts the time stamps by more than one frame.
            if abs(rate * (end - start) - frames) > 1.1:
                rate = (frames / (end - start)).limit_denominator(100)
        rotation = round(first.rotation / 90) * 90 % 360
        aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
        sideways = rotation % 180 != 0
        return VideoInfo(
            path=path,
            frames=frames,
            height=first.width if sideways else first.height,
            width=first.height if sideways else first.width,
            rate=rate,
            has_audio=audio_stream(container, stream) is not None,
            stream=stream.index,
            start=start,
            rotation=rotation,
            pixel_aspect=1 / aspect if sideways else aspect,
        )


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
    for frame in _torchcodec_frames(video) or map(_upright, _decode(video.path)):
        if frame.shape[1:] == shape:
            yield frame
        else:
            yield F.interpolate(frame[None].contiguous(), shape, mode="bilinear", antialias=True)[0]


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
    if decoder_class is None or video.rotation:  # some versions of torchcodec rotate frames, others do not
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
        container = av.open(f"file:{path}", options=dict(_OPEN_OPTIONS))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a video ({error.strerror}); {_ACCEPTED}") from error
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & cover]
        if not streams:
            raise ValueError(f"{path} has no video stream that can be decoded; {_ACCEPTED}")
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
        height, width = stream.codec_context.height, stream.codec_context.width
        if not 0 < height * width <= MAX_PIXELS:
            raise ValueError(f"{path} has frames of {height}x{width}; accepted: 1 to {MAX_PIXELS} pixels a frame")
        yield container, stream


def _decode(path: Path) -> Iterator[VideoFrame]:
    """Yield all frames of the largest video stream; ValueError at the first sign of damage."""
    import av

    with open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.options = dict(_DECODE_OPTIONS)
        count = 0
        start: Fraction | None = None
        end: Fraction | None = None
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError(f"{path} is damaged: it breaks off or is corrupt after {count} frames")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise ValueError(f"{path} is damaged: frame {count} is corrupt")
                    start = _time(frame) if start is None else start
                    end = _end(frame) or end
                    count += 1
                    yield frame
        except av.FFmpegError as error:
            raise ValueError(f"{path} is damaged: decoding fails after {count} frames ({error.strerror})") from error
        stated = _stated_seconds(stream)
        if stated and start is not None and end is not None and end - start < (1 - _MAX_MISSING) * stated:
            raise ValueError(
                f"{path} is damaged: its {count} frames end after {float(end - start):.2f} s of {float(stated):.2f} s"
            )
        if container.format.name == "gif" and not _reaches_trailer(path):
            raise ValueError(f"{path} is damaged: no more than {count} frames can be read before it breaks off")


def _stated_seconds(stream: VideoStream) -> Fraction | None:
    """Duration of a stream according to its header, in seconds; None if it states none."""
    if stream.duration and stream.time_base is not None:
        return stream.duration * stream.time_base
    try:  # Matroska and WebM have a tag such as "00:00:01.600000000"
        hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
    except ValueError:
        return None


def _reaches_trailer(path: Path) -> bool:
    """Whether the blocks of a GIF file end with its trailer. (FFmpeg takes any unknown byte for the file's end.)"""
    with path.open("rb") as file:

        def skip_colors(flags: int) -> None:
            file.seek(3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0, os.SEEK_CUR)

        def skip_data() -> None:
            while length := file.read(1):
                if length == b"\0":
                    return
                file.seek(length[0], os.SEEK_CUR)

        header = file.read(13)
        skip_colors(header[10])
        while block := file.read(1):
            if block == b"\x21":  # extension: a label, then data
                file.seek(1, os.SEEK_CUR)
            elif block == b"\x2c":  # picture: 8 bytes of place and size, flags, a color table, the code size, then data
                place = file.read(9)
                if len(place) < 9:
                    return False
                skip_colors(place[8])
                file.seek(1, os.SEEK_CUR)
            else:
                return block == b";"
            skip_data()
    return False


def audio_stream(container: InputContainer, video: VideoStream) -> AudioStream | None:
    """The audio stream that belongs to a video stream; None if there is none that can be copied."""
    audio = cast("AudioStream | None", container.streams.best("audio", related=video))
    return None if audio is None or audio.codec_context is None else audio


def _time(frame: VideoFrame) -> Fraction | None:
    """Time stamp of a frame, in seconds; None if it has none."""
    return None if frame.pts is None else frame.pts * frame.time_base


def _end(frame: VideoFrame) -> Fraction | None:
    """Time stamp at which a frame ends, in seconds; None if it has none."""
    return None if frame.pts is None else (frame.pts + (frame.duration or 0)) * frame.time_base


def _upright(frame: VideoFrame) -> Tensor:
    """A decoded frame as (3, H, W) uint8, rotated as its file demands."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90) % 4, (1, 2))
