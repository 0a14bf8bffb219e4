"""Writing video files: mp4, avi, gif and webm, from frames (3, H, W) uint8 RGB."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..files import REPEATABLE_H264, atomic_write, check_writable
from .picture import HD_LINES
from .timing import FrameClock
from .video import VideoInfo, audio_stream, open_video

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.audio import AudioStream
    from av.video.codeccontext import VideoCodecContext

Quality: TypeAlias = int | Literal["lossless"]


class _Format(NamedTuple):
    container: str
    codec: str
    pixels: str
    options: dict[str, str]
    tick: Fraction | None = None  # seconds; None for a tick that is chosen for each file
    least: int = 1  # ticks between two frames
    most: int = 6 * 3600  # seconds between two frames
    varying: bool = True  # whether the rate may vary


# Visually lossless: about 45 dB for H.264 and VP9. MPEG-4 has no constant quality, but a quantizer of 2 or 3.
_MPEG4 = {"qmin": "2", "qmax": "3", "b": "20M", "threads": "1"}
_VP9 = {"crf": "17", "b": "0", "cpu-used": "4", "threads": "1"}
_FORMATS = {
    ".mp4": _Format("mp4", "libx264", "yuv420p", {"crf": "17", **REPEATABLE_H264}),
    ".avi": _Format("avi", "mpeg4", "yuv420p", _MPEG4, varying=False),
    ".webm": _Format("webm", "libvpx-vp9", "yuv420p", _VP9, tick=Fraction(1, 1000)),
    # Players show frames of a delay below 0.02 s for 0.1 s; the longest delay is a number of 16 bits.
    ".gif": _Format("gif", "gif", "pal8", {}, tick=Fraction(1, 100), least=2, most=655),
}
_MOST_CRF = {".mp4": 51, ".webm": 63}
# What differs in a file that holds the pixels of RGB as they are.
_LOSSLESS: dict[str, dict[str, Any]] = {
    ".mp4": {"codec": "libx264rgb", "pixels": "rgb24", "options": {"qp": "0", **REPEATABLE_H264}},
    ".webm": {"pixels": "gbrp", "options": {"lossless": "1", "cpu-used": "4", "threads": "1"}},
}
_SHORTEST_TICK = Fraction(1, 90000)  # seconds; the ticks of a frame's time fit 31 bits, as mp4 demands
_MPEG4_UNITS = 65535  # parts of a second in which MPEG-4 can count
_MAX_LEAD = Fraction(1, 10)  # seconds by which sound may start before the pictures without moving them: its priming
_MAX_OFFSET = 6 * 3600  # seconds between the starts of sound and pictures; more is damage


_LIMITED_RANGE, _FULL_RANGE = 1, 2  # FFmpeg's AVCOL_RANGE_MPEG and AVCOL_RANGE_JPEG


class Color(NamedTuple):
    """Tags of a color space, as numbers of H.273, which FFmpeg uses, and swscale's name for the matrix."""

    primaries: int
    transfer: int
    matrix: int
    swscale: str
    range: int = _LIMITED_RANGE

    def tag(self, codec: VideoCodecContext) -> None:
        """State this color space in what an encoder writes."""
        codec.color_primaries, codec.color_trc, codec.colorspace = self[:3]
        codec.color_range = self.range


_BT709 = Color(1, 1, 1, "ITU709")
_BT601 = Color(6, 6, 6, "ITU601")
_RGB = Color(1, 13, 0, "DEFAULT", _FULL_RANGE)  # sRGB, without a matrix
_BITEXACT = {"fflags": "+bitexact"}  # webm would have a random number, by which other files could refer to it
_FRAME_DURATION = 1 << 8  # FFmpeg's AV_CODEC_FLAG_FRAME_DURATION: packets last as long as their frames


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if a video can be written there; ValueError for an unknown extension, or as `check_writable` says."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"cannot write {path}: accepted extensions are {', '.join(_FORMATS)}")
    check_writable(path)
    return path


def check_quality(suffix: str, quality: Quality | None) -> None:
    """ValueError unless a video of this extension can be written in this quality, as `VideoWriter` takes it."""
    if quality is None:
        return
    if suffix not in _MOST_CRF:
        raise ValueError(f"{suffix} has one quality alone; accepted: {', '.join(_MOST_CRF)}")
    if quality != "lossless" and (isinstance(quality, bool) or not 0 <= quality <= _MOST_CRF[suffix]):
        raise ValueError(f"quality of {suffix} must be lossless or a CRF of 0 to {_MOST_CRF[suffix]}, got {quality}")


class VideoWriter:
    """Encodes frames into a video file; the file appears, or replaces an older one, only when it is complete.

    Use as a context manager. Frames go to a hidden file in the same folder, which is renamed when the block ends, and
    removed when the block fails. mp4 is H.264, avi MPEG-4, webm VP9, gif a palette of 256 colors for each frame.
    Equal frames with equal settings make equal files, on any number of cores.

    Colors are converted to BT.709 from HD_LINES lines on, else to BT.601, and tagged so where the format has tags;
    lossless files hold RGB.

    Args:
        path: the file; its extension chooses the format.
        height, width: size of the frames in pixels, even (H.264, MPEG-4 and VP9 halve the color planes).
        rate: frames per second; by default the source's.
        source: a video whose sound is copied, not re-encoded, and whose pixel aspect is kept. If `rate` is its rate,
            frames are those of the source, and each keeps its time; avi has a constant rate, and gif at most 50 frames
            a second. A UserWarning is given with the largest shift if the format cannot hold the times, and if it
            cannot hold the sound or when it starts. It may be the file that is being replaced.
        quality: of mp4 and webm, "lossless" or a constant rate factor (CRF), less is better; None: visually lossless.

    The earlier of pictures and sound starts at time 0.

    Raises ValueError for a path or size that cannot be written, OSError if writing fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        height: int,
        width: int,
        rate: Fraction | float | None = None,
        source: VideoInfo | None = None,
        quality: Quality | None = None,
    ) -> None:
        self.path = check_output(path)
        suffix = self.path.suffix.lower()
        check_quality(suffix, quality)
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise ValueError(f"frames must have even sides, got {height}x{width}")
        if rate is None:
            if source is None:
                raise ValueError("rate must be given where there is no source")
            rate = source.rate
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate must be more than 0 frames per second, got {rate}")
        self._format = _FORMATS[suffix]
        self._height, self._width = height, width
        self._color = color_of(height)
        if quality == "lossless":
            self._format, self._color = self._format._replace(**_LOSSLESS[suffix]), _RGB
        elif quality is not None:
            self._format = self._format._replace(options={**self._format.options, "crf": str(quality)})
        self._rate = _limited(rate)
        self._source = source
        self._keeps_times = source is not None and self._rate == _limited(source.rate)
        if not self._format.varying:
            self._rate = 1 / ((1 / self._rate).limit_denominator(_MPEG4_UNITS) or Fraction(1, _MPEG4_UNITS))
        self._written = 0

    def __enter__(self) -> VideoWriter:
        self._file, self._resources = contextlib.ExitStack(), contextlib.ExitStack()
        self._partial = self._file.enter_context(atomic_write(self.path))
        try:
            with self._failures():
                self._start()
            for warning in self._warnings:
                warnings.warn(warning, stacklevel=2)
        except BaseException as error:  # also a warning that is raised
            self.__exit__(type(error), error, None)
            raise
        return self

    def write(self, frame: Tensor) -> None:
        """Append one frame, (3, height, width) uint8."""
        expected = (3, self._height, self._width)
        if frame.dtype != torch.uint8 or frame.shape != expected:
            raise ValueError(f"frame is {frame.dtype} {tuple(frame.shape)}; accepted: torch.uint8 {expected}")
        picture = encoder_frame(frame, self._format.pixels, self._color)
        tick, following = self._clock(self._written), self._clock(self._written + 1)
        picture.pts, picture.duration, picture.time_base = tick, following - tick, self._clock.tick_seconds
        with self._failures():
            self._output.mux(self._video.encode(picture))
            self._written += 1
            self._copy_audio(until=following * self._clock.tick_seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:  # whose end replaces the path, or deletes the partial file where this raises
            try:
                if error is not None:
                    raise error
                with self._failures():
                    self._finish()
            finally:
                self._discard()

    def _start(self) -> None:
        """Open the output and write its header."""
        import av

        self._warnings: list[str] = []
        self._output = self._resources.enter_context(
            av.open(f"file:{self._partial}", "w", format=self._format.container, container_options=_BITEXACT)
        )
        self._audio: AudioStream | None = None
        self._packets: Iterator[Packet] = iter(())
        self._packet: Packet | None = None
        # The decoding time of the last packet. Sound before time 0, its priming, would move the pictures of an AVI.
        self._audio_dts = -(2**62) if self._format.varying else -1
        self._origin = Fraction(0) if self._source is None else self._source.start  # becomes the output's time 0
        audio = None
        if self._source is not None and self._source.has_audio:
            audio = self._open_audio(self._source)
        self._clock = self._start_clock()
        self._start_video()
        if audio is not None:
            self._audio = self._output.add_stream_from_template(audio)
        self._output.start_encoding()

    def _start_clock(self) -> FrameClock:
        """Place the frames of the source on the format's clock, and warn if it cannot hold their times."""
        form = self._format
        start = Fraction(0) if self._source is None else self._source.start - self._origin
        tick = form.tick or (_SHORTEST_TICK if start else 1 / self._rate)
        clock = FrameClock.constant(start, tick, self._rate, form.least)
        if self._source is None or not self._keeps_times:
            if form.least * clock.tick_seconds * self._rate > 1:
                most = 1 / (form.least * clock.tick_seconds)
                self._warn(f"{self.path} plays slower: {form.container} has {most} frames a second at most")
            return clock
        stamps, length = self._source.stamps, float(self._source.time_base)
        seconds = (stamps - stamps[0]) * length + float(start)
        if form.varying:
            tick = form.tick or max(self._source.time_base, _SHORTEST_TICK)
            end = seconds[-1] + min(float(self._source.last_duration), form.most)
            clock = FrameClock.placed(np.append(seconds, end), tick, self._rate, form.least, form.most)
        shift = clock.largest_shift(seconds)
        if shift > 1 / (2 * self._rate):
            able = "only varies within limits" if form.varying else "is constant"
            self._warn(
                f"pictures of {self.path} move by up to {shift:.3g} s from their times in {self._source.path}: "
                f"the rate of {form.container} {able}"
            )
        return clock

    def _start_video(self) -> None:
        self._video = self._output.add_stream(self._format.codec, rate=self._rate, options=dict(self._format.options))
        self._video.height, self._video.width = self._height, self._width
        self._video.pix_fmt = self._format.pixels
        codec = self._video.codec_context
        codec.time_base = self._clock.tick_seconds
        codec.flags |= _FRAME_DURATION
        if self._format.pixels != "pal8":
            self._color.tag(codec)
        if self._source is not None and self._source.pixel_aspect != 1:
            codec.sample_aspect_ratio = self._source.pixel_aspect

    def _open_audio(self, source: VideoInfo) -> AudioStream | None:
        """Read the first packet of the source's sound, and set the origin; None, with a warning, if the output cannot
        hold it."""
        container, stream = self._resources.enter_context(open_video(source.path))
        audio = audio_stream(container, stream)
        assert audio is not None  # `probe` found it
        self._packets = container.demux(audio)
        self._packet = next(self._packets, None)
        if abs(self._audio_offset(source)) > _MAX_OFFSET:
            reason = f"that of {source.path} starts hours before or after its pictures"
        elif not self._holds_audio(source):
            codec = audio.codec_context.name
            reason = f"a file of {self._format.container} cannot hold the {codec} audio of {source.path} as it is"
        else:
            self._align_audio(source)
            return audio
        self._warn(f"{self.path} has no sound: {reason}")
        return None

    def _holds_audio(self, source: VideoInfo) -> bool:
        """Whether the format takes the source's sound, tried with its first packet: a bad header shows at the end."""
        import av

        try:
            with (
                open_video(source.path) as (container, stream),
                av.open(io.BytesIO(), "w", format=self._format.container) as trial,
            ):
                audio = audio_stream(container, stream)
                packet = next(container.demux(audio))
                packet.stream = trial.add_stream_from_template(audio)
                packet.pts = packet.dts = 0
                trial.mux(packet)
        except (av.FFmpegError, ValueError):  # ValueError for a codec that the container does not know
            return False
        return True

    def _align_audio(self, source: VideoInfo) -> None:
        """Set the origin such that sound keeps its offset to the pictures, or warn that it does not."""
        offset = self._audio_offset(source)
        if offset < -_MAX_LEAD and self._format.varying:
            self._origin += offset
        elif offset < -_MAX_LEAD:
            self._warn(f"{self.path} is without the {float(-offset):.3g} s of sound before the first picture")
            while self._audio_offset(source) < 0:
                self._packet = next(self._packets, None)
        elif offset > _MAX_LEAD and not self._format.varying:
            self._warn(
                f"the sound of {self.path} is {float(offset):.3g} s early: {self._format.container} starts pictures "
                "and sound together"
            )

    def _audio_offset(self, source: VideoInfo) -> Fraction:
        """Seconds from the first picture of the source to the current packet of its sound; 0 if there is none."""
        packet = self._packet
        return Fraction(0) if packet is None or packet.pts is None else packet.pts * packet.time_base - source.start

    def _warn(self, message: str) -> None:
        """Give a warning when the output is open, where the `with` block begins."""
        self._warnings.append(message)

    def _copy_audio(self, until: Fraction | float) -> None:
        """Copy audio packets up to `until` seconds of the output, so that they are interleaved with the frames."""
        while self._audio is not None and self._packet is not None:
            packet = self._packet
            shift = round(self._origin / packet.time_base)
            if packet.dts is not None:  # a flushing packet has none
                if (packet.dts - shift) * packet.time_base > until:
                    return
                # Muxers refuse packets that go back in time, which damaged sound does.
                packet.dts = self._audio_dts = max(packet.dts - shift, self._audio_dts + 1)
                packet.pts = None if packet.pts is None else max(packet.pts - shift, packet.dts)
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

    def _discard(self) -> None:
        # Closing a container may fail again after a failed write; the caller should see the first error.
        with contextlib.suppress(Exception):
            self._resources.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn errors of FFmpeg into an OSError that names the file."""
        import av

        try:
            yield
        except av.codec.codec.UnknownCodecError as error:
            raise OSError(f"cannot write {self.path}: PyAV was built without {self._format.codec}") from error
        except av.FFmpegError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from error


def color_of(height: int) -> Color:
    """The color space in which pictures of so many lines are written."""
    return _BT709 if height >= HD_LINES else _BT601


def _limited(rate: Fraction | float) -> Fraction:
    """A rate whose parts fit any container; one so low that it would become 0 is kept."""
    return Fraction(rate).limit_denominator(1001) or Fraction(rate).limit_denominator(2**30)


def encoder_frame(frame: Tensor, pixels: str, color: Color) -> VideoFrame:
    """A frame (3, H, W) uint8 as a PyAV frame of the pixel format that an encoder takes."""
    import av
    from PIL import Image

    image = frame.permute(1, 2, 0).contiguous().cpu().numpy()
    if pixels != "pal8":
        return av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels, dst_colorspace=color.swscale)
    indexed = Image.fromarray(image).quantize(256)
    colors = np.frombuffer(indexed.palette.tobytes(), np.uint8).reshape(-1, 3)
    palette: Any = np.zeros((256, 4), np.uint8)  # one row of alpha, red, green, blue for each color
    palette[:, 0] = 255
    palette[: len(colors), 1:] = colors
    return av.VideoFrame.from_ndarray((np.asarray(indexed), palette), format="pal8")
