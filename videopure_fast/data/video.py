"""Files and layouts in and out: probing, reading, purifying and writing videos of any length in bounded memory.

Frames are (3, H, W) uint8 RGB. mp4 and mov, avi, gif, webm and mkv are read; mp4, avi, gif and webm are written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import LEAST_SIDE

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.audio import AudioStream
    from av.container import InputContainer
    from av.video import VideoStream

MAX_PIXELS = 8192 * 8192  # of one frame; a few bytes of file can ask for more memory than a machine has

# Playlists, device inputs and network protocols of FFmpeg stay shut: a foreign file must not open other files.
_OPEN_OPTIONS = {"format_whitelist": "mov,avi,gif,matroska", "protocol_whitelist": "file"}
# By default FFmpeg paints over damage and goes on.
_DECODE_OPTIONS = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(MAX_PIXELS)}
_ACCEPTED = "accepted: mp4, avi, gif and webm videos"
_TRUNCATED = 0.1  # share of the stated duration whose absence says that the file's end is lost


class _Format(NamedTuple):
    container: str
    codec: str
    pixels: str
    options: dict[str, str]


# Visually lossless: about 45 dB for H.264 and VP9. MPEG-4 has no constant quality but its quantizer, 2 being fine.
_FORMATS = {
    ".mp4": _Format("mp4", "libx264", "yuv420p", {"crf": "17"}),
    ".avi": _Format("avi", "mpeg4", "yuv420p", {"qmin": "2", "qmax": "3", "b": "20M"}),
    ".webm": _Format("webm", "libvpx-vp9", "yuv420p", {"crf": "17", "b": "0", "cpu-used": "4", "row-mt": "1"}),
    ".gif": _Format("gif", "gif", "pal8", {}),
}


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` found by decoding a whole file.

    Attributes:
        path: the file.
        frames: decoded frames, at least 2.
        height, width: of a frame as it is shown, in pixels.
        rate: frames per second; the mean where the rate varies.
        has_audio: whether a sound track goes with the video.
        stream: index of the video stream in the container.
        start: time stamp of the first frame in seconds.
        rotation: degrees by which decoded frames were turned counterclockwise, a multiple of 90.
        pixel_aspect: width of a shown pixel over its height.
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
    """Decode a video once from end to end, and say what it holds.

    Headers lie about lengths, and hours of work should not end at a damaged frame. The largest video stream counts,
    cover pictures aside. Nothing is repaired: a file is refused where its decoder reports an error or a corrupt frame,
    or where its frames end more than 10 % before the stated duration. Damage that still decodes cannot be seen, in GIF
    above all, which has no checksums.

    Raises FileNotFoundError, or ValueError with a sentence for anything that is not an intact video of 2 frames or
    more, each of 8192x8192 pixels at most.
    """
    path = Path(path)
    frames, first, end = 0, None, None
    for frame in _decode(path):
        first = first or frame
        frames += 1
        end = _end(frame) or end
    if frames < 2:
        raise ValueError(f"{path} has {frames} frame{'s' * (frames != 1)}; {_ACCEPTED} of 2 frames or more")
    start = _time(first) or Fraction(0)
    with _open(path) as (container, stream):
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        if end is not None and end > start:
            # A header's rate is exact where it is right; a frame may be missing at either end.
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
            has_audio=_audio_stream(container, stream) is not None,
            stream=stream.index,
            start=start,
            rotation=rotation,
            pixel_aspect=1 / aspect if sideways else aspect,
        )


def working_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with a short side of `size` pixels, the picture's aspect, and even sides of 16 or more."""
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
    """Frames of a probed video one by one, (3, h, w) uint8 with (h, w) = working_size(height, width, size).

    torchcodec decodes where it loads and finds the same frames, else PyAV. ValueError if the file is damaged.
    """
    shape = working_size(video.height, video.width, size)
    for frame in _torchcodec_frames(video) or map(_upright, _decode(video.path)):
        if frame.shape[1:] == shape:
            yield frame
        else:
            yield F.interpolate(frame[None].contiguous(), shape, mode="bilinear", antialias=True)[0]


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if a video can be written there: a known extension in an existing, writable folder; else ValueError."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"cannot write {path}: accepted extensions are {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: the folder {path.parent} is read-only")
    return path


class VideoWriter:
    """Encodes frames into a video file that appears, or replaces another, only when it is complete.

    Use as a context manager. The frames go to a hidden file in the same folder, which is renamed when the block ends,
    and removed when it fails. mp4 is H.264, avi MPEG-4, webm VP9, gif a palette of 256 colors for each frame.

    Args:
        path: the file; its extension chooses the format.
        height, width: of the frames, even (H.264, MPEG-4 and VP9 halve the color planes).
        rate: frames per second. GIF rounds time stamps to 1/100 s.
        source: a video whose sound is copied, not re-encoded, and whose pixel aspect is kept. Where the format cannot
            hold the sound, a UserWarning says so. It may be the file that is being replaced.

    Raises ValueError for a path or size that cannot be written, OSError if writing fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        height: int,
        width: int,
        rate: Fraction | float,
        source: VideoInfo | None = None,
    ) -> None:
        self.path = check_output(path)
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise ValueError(f"frames must have even sides, got {height}x{width}")
        if not rate > 0:
            raise ValueError(f"rate must be more than 0 frames per second, got {rate}")
        self._format = _FORMATS[self.path.suffix.lower()]
        self._height, self._width = height, width
        self._rate = Fraction(rate).limit_denominator(1001)
        self._source = source
        self._written = 0
        # Not tempfile: its files are closed to everyone but their owner, and would stay so under the final name.
        self._partial = self.path.with_name(f".{self.path.stem}-{secrets.token_hex(4)}.partial")

    def __enter__(self) -> VideoWriter:
        self._resources = contextlib.ExitStack()
        try:
            with self._failures():
                self._start()
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, frame: Tensor) -> None:
        """Append one frame, (3, height, width) uint8."""
        expected = (3, self._height, self._width)
        if frame.dtype != torch.uint8 or frame.shape != expected:
            raise ValueError(f"frame is {frame.dtype} {tuple(frame.shape)}; accepted: torch.uint8 {expected}")
        picture = _picture(frame, self._format.pixels)
        picture.pts, picture.time_base = self._written, 1 / self._rate
        with self._failures():
            self._output.mux(self._video.encode(picture))
            self._written += 1
            self._copy_audio(until=self._written / self._rate)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._failures():
                    self._finish()
        finally:
            self._discard()

    def _start(self) -> None:
        import av

        self._output = self._resources.enter_context(
            av.open(f"file:{self._partial}", "w", format=self._format.container)
        )
        self._video = self._output.add_stream(self._format.codec, rate=self._rate, options=dict(self._format.options))
        self._video.height, self._video.width = self._height, self._width
        self._video.pix_fmt = self._format.pixels
        if self._source is not None and self._source.pixel_aspect != 1:
            self._video.codec_context.sample_aspect_ratio = self._source.pixel_aspect
        self._audio: AudioStream | None = None
        self._packets: Iterator[Packet] = iter(())
        self._packet: Packet | None = None
        if self._source is not None and self._source.has_audio:
            self._start_audio(self._source)

    def _start_audio(self, source: VideoInfo) -> None:
        container, stream = self._resources.enter_context(_open(source.path))
        audio = _audio_stream(container, stream)
        codec = audio.codec_context.name
        if codec not in self._output.supported_codecs:
            warnings.warn(
                f"{self.path} has no sound: a {self._format.container} file cannot hold the {codec} audio of "
                f"{source.path}",
                stacklevel=4,
            )
            return
        self._audio = self._output.add_stream_from_template(audio)
        self._packets = container.demux(audio)
        self._packet = next(self._packets, None)

    def _copy_audio(self, until: Fraction | float) -> None:
        """Copy sound up to `until` seconds of the output, so that the container interleaves it with the pictures."""
        while self._audio is not None and self._packet is not None:
            packet = self._packet
            shift = round(self._source.start / packet.time_base)  # the first frame moves to time 0
            if packet.dts is not None:  # a flushing packet has none
                if (packet.dts - shift) * packet.time_base > until:
                    return
                packet.dts -= shift
                packet.pts = None if packet.pts is None else packet.pts - shift
                packet.stream = self._audio
                self._output.mux(packet)
            self._packet = next(self._packets, None)

    def _finish(self) -> None:
        if not self._written:
            raise ValueError(f"no frames for {self.path}")
        self._output.mux(self._video.encode())
        self._copy_audio(until=float("inf"))
        self._output.close()
        self._resources.close()  # an open source could not be replaced on Windows
        os.replace(self._partial, self.path)

    def _discard(self) -> None:
        # A container that failed may fail again to close; the first error is the one to tell.
        with contextlib.suppress(Exception):
            self._resources.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        import av

        try:
            yield
        except av.codec.codec.UnknownCodecError as error:
            raise OSError(f"cannot write {self.path}: PyAV was built without {self._format.codec}") from error
        except av.FFmpegError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from error


def torchcodec_decoder() -> type[Any] | None:
    """torchcodec's VideoDecoder, or None where it is absent or its FFmpeg libraries are."""
    try:
        from torchcodec.decoders import VideoDecoder
    except Exception:  # what a library that does not load raises differs by version and platform
        return None
    return VideoDecoder


def _torchcodec_frames(video: VideoInfo) -> Iterator[Tensor] | None:
    decoder_class = torchcodec_decoder()
    if decoder_class is None or video.rotation:  # whether it turns frames depends on its version
        return None
    try:
        decoder = decoder_class(str(video.path), stream_index=video.stream, seek_mode="exact")
        agrees = len(decoder) == video.frames and decoder[0].shape == (3, video.height, video.width)
    except Exception:  # a codec that its FFmpeg lacks, say; PyAV's has decoded the file
        return None
    return (decoder[i] for i in range(video.frames)) if agrees else None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its largest video stream."""
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
    """All frames of the largest video stream; ValueError at the first sign of damage."""
    import av

    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.options = dict(_DECODE_OPTIONS)
        count, start, end = 0, None, None
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
        if stated and start is not None and end is not None and end - start < (1 - _TRUNCATED) * stated:
            raise ValueError(
                f"{path} is damaged: its {count} frames end after {float(end - start):.2f} s of {float(stated):.2f} s"
            )
        if container.format.name == "gif" and not _reaches_trailer(path):
            raise ValueError(f"{path} is damaged: no more than {count} frames can be read before it breaks off")


def _stated_seconds(stream: VideoStream) -> Fraction | None:
    """The duration that the header gives this stream, None if unknown."""
    if stream.duration:
        return stream.duration * stream.time_base
    try:  # Matroska and WebM: a tag "00:00:01.600000000"
        hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
    except ValueError:
        return None


def _reaches_trailer(path: Path) -> bool:
    """Whether a GIF's blocks lead to its trailer. FFmpeg takes whatever is no block for the end of the file."""
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
            if block == b"\x21":  # extension: its label, data
                file.seek(1, os.SEEK_CUR)
            elif block == b"\x2c":  # picture: its place and flags, colors, code size, data
                place = file.read(9)
                if len(place) < 9:
                    return False
                skip_colors(place[8])
                file.seek(1, os.SEEK_CUR)
            else:
                return block == b";"
            skip_data()
    return False


def _audio_stream(container: InputContainer, video: VideoStream) -> AudioStream | None:
    """The sound that belongs to a video stream, if it can be copied."""
    audio = container.streams.best("audio", related=video)
    return None if audio is None or audio.codec_context is None else audio


def _time(frame: VideoFrame) -> Fraction | None:
    return None if frame.pts is None else frame.pts * frame.time_base


def _end(frame: VideoFrame) -> Fraction | None:
    return None if frame.pts is None else (frame.pts + (frame.duration or 0)) * frame.time_base


def _upright(frame: VideoFrame) -> Tensor:
    """A decoded frame as (3, H, W) uint8, turned as its file says."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90) % 4, (1, 2))


def _picture(frame: Tensor, pixels: str) -> VideoFrame:
    """A frame (3, H, W) for an encoder of this pixel format."""
    import av
    import numpy as np
    from PIL import Image

    image = frame.permute(1, 2, 0).contiguous().cpu().numpy()
    if pixels != "pal8":
        return av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
    indexed = Image.fromarray(image).quantize(256)
    colors = np.frombuffer(indexed.palette.tobytes(), np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0] = 255  # alpha
    palette[: len(colors), 1:] = colors
    return av.VideoFrame.from_ndarray((np.asarray(indexed), palette), format="pal8")
