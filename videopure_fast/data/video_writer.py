"""Writing video files: mp4, avi, gif and webm, from frames (3, H, W) uint8 RGB."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..files import atomic_write, check_writable
from .video import VideoInfo, audio_stream, open_video

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.audio import AudioStream


class _Format(NamedTuple):
    container: str
    codec: str
    pixels: str
    options: dict[str, str]


# Visually lossless: about 45 dB for H.264 and VP9. MPEG-4 has no constant quality, but a quantizer of 2 or 3.
_FORMATS = {
    ".mp4": _Format("mp4", "libx264", "yuv420p", {"crf": "17"}),
    ".avi": _Format("avi", "mpeg4", "yuv420p", {"qmin": "2", "qmax": "3", "b": "20M"}),
    ".webm": _Format("webm", "libvpx-vp9", "yuv420p", {"crf": "17", "b": "0", "cpu-used": "4", "row-mt": "1"}),
    ".gif": _Format("gif", "gif", "pal8", {}),
}


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if a video can be written there; ValueError for an unknown extension, or as `check_writable` says."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"cannot write {path}: accepted extensions are {', '.join(_FORMATS)}")
    check_writable(path)
    return path


class VideoWriter:
    """Encodes frames into a video file; the file appears, or replaces an older one, only when it is complete.

    Use as a context manager. Frames go to a hidden file in the same folder, which is renamed when the block ends, and
    removed when the block fails. mp4 is H.264, avi MPEG-4, webm VP9, gif a palette of 256 colors for each frame.

    Args:
        path: the file; its extension chooses the format.
        height, width: size of the frames in pixels, even (H.264, MPEG-4 and VP9 halve the color planes).
        rate: frames per second. GIF rounds time stamps to 1/100 s.
        source: a video whose sound is copied, not re-encoded, and whose pixel aspect is kept. A UserWarning is
            given if the format cannot hold the sound. It may be the file that is being replaced.

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

    def __enter__(self) -> VideoWriter:
        self._file, self._resources = contextlib.ExitStack(), contextlib.ExitStack()
        self._partial = self._file.enter_context(atomic_write(self.path))
        try:
            with self._failures():
                self._start()
        except BaseException as error:
            self.__exit__(type(error), error, None)
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
        with self._file:  # whose end replaces the path, or deletes the partial file where this raises
            try:
                if error is not None:
                    raise error
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
        container, stream = self._resources.enter_context(open_video(source.path))
        audio = audio_stream(container, stream)
        assert audio is not None  # `probe` found it
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
        """Copy audio packets up to `until` seconds of the output, so that they are interleaved with the frames."""
        while self._source is not None and self._audio is not None and self._packet is not None:
            packet = self._packet
            shift = round(self._source.start / packet.time_base)  # in time base units: the first frame moves to time 0
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


def _picture(frame: Tensor, pixels: str) -> VideoFrame:
    """A frame (3, H, W) uint8 as a PyAV frame of the pixel format that an encoder takes."""
    import av
    import numpy as np
    from PIL import Image

    image = frame.permute(1, 2, 0).contiguous().cpu().numpy()
    if pixels != "pal8":
        return av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
    indexed = Image.fromarray(image).quantize(256)
    colors = np.frombuffer(indexed.palette.tobytes(), np.uint8).reshape(-1, 3)
    palette: Any = np.zeros((256, 4), np.uint8)  # one row of alpha, red, green, blue for each color
    palette[:, 0] = 255
    palette[: len(colors), 1:] = colors
    return av.VideoFrame.from_ndarray((np.asarray(indexed), palette), format="pal8")
