"""A process that decodes and encodes videos for the service: `python -m videopure_fast.service.codec`.

An uploaded video may be made to crash a decoder, to fill the memory, or to keep it busy for ever. Here that ends this
process, which is replaced, and not the service. It has no secrets and no GPU, its memory and processor time are
bounded, and whoever started it kills it when time is up.

Requests come by standard input, each a line of JSON and the bytes that belong to it; answers leave by standard output
alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.video import VideoInfo

_MEMORY = 4 << 30  # bytes of address space beyond what the process has when it starts
_FILE = 1 << 30  # bytes of a file that is written
_VIDEO = Path("video")  # in the folder of a request: the name stands in messages


class TooLarge(ValueError):
    """A video that exceeds a limit."""


class _Video(NamedTuple):
    """A decoded video; frames: (F, 3, H, W) uint8, in the size in which they are purified."""

    info: VideoInfo
    frames: Tensor


def main() -> int:
    """Answer requests until standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "r+b") as nothing:  # what libraries print or read is none of the answers and requests
        for standard in (0, 1):
            os.dup2(nothing.fileno(), standard)
    sys.modules["torchcodec"] = None  # type: ignore[assignment]  # it opens files without a list of formats
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the service ends the input
    import torch

    from ..data import video_writer  # noqa: F401  (with all that it needs, before memory is bounded)

    torch.set_num_threads(1)
    _bound()
    video: _Video | None = None
    for line in iter(requests.readline, b""):
        request, blobs = json.loads(line), list[Any]()
        if request["do"] == "forget":
            video = None
            continue
        os.chdir(request["folder"])
        try:
            with _processor_time(request["seconds"]):
                if request["do"] == "decode":
                    video = None
                    video = _decode(request)
                    reply, blobs = _described(video), [video.frames.numpy()]
                else:
                    reply, blobs = {}, _encode(video, requests, before=request["before"])
        except ValueError as error:
            reply, blobs = {"status": 413 if isinstance(error, TooLarge) else 400, "detail": str(error)}, []
        except Exception as error:  # memory, or what a damaged video makes libraries raise
            reason = f"the video cannot be {request['do']}d ({type(error).__name__})"
            reply, blobs = {"status": 400, "detail": reason}, []
        _answer(answers, reply, blobs)
    return 0


def _bound() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """The block may take so many seconds of processor time, of each core; else the process ends, watched or not."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) + seconds * (os.cpu_count() or 1))
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def _answer(answers: BinaryIO, reply: dict[str, Any], blobs: Sequence[Any]) -> None:
    sizes = [memoryview(blob).nbytes for blob in blobs]
    answers.write(json.dumps({**reply, "blobs": sizes}).encode() + b"\n")
    for blob in blobs:
        answers.write(blob)
    answers.flush()


def _decode(request: dict[str, Any]) -> _Video:
    """The video of a folder; TooLarge, or ValueError for what is none."""
    import torch

    from ..data.video import TooManyPixels, probe, read_frames

    limits = request["limits"]
    _check_head(limits)
    try:
        info = probe(_VIDEO, max_pixels=limits["pixels"])  # of as many frames as there are packets, which were counted
    except TooManyPixels as error:
        raise TooLarge(str(error)) from error
    _check_length(info.frames, float(info.time(info.frames - 1) - info.start + info.last_duration), limits)
    sides = sorted((info.height, info.width))
    if sides[1] > limits["aspect"] * sides[0]:
        raise TooLarge(
            f"the video has frames of {info.width}x{info.height}; accepted: a longer side of at most "
            f"{limits['aspect']:g} times the shorter one"
        )
    return _Video(info, torch.stack(list(read_frames(info, request["size"]))))


def _check_head(limits: dict[str, Any]) -> None:
    """Refuse by what the container says, and by the packets in it, before anything is decoded.

    A container may state any size and any length; but a frame takes a packet, and each packet a part of the file.
    """
    import av

    from ..data.video import open_video

    with open_video(_VIDEO) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > limits["pixels"]:
            accepted = f"accepted: {limits['pixels']} pixels a frame at most"
            raise TooLarge(f"the video has frames of {width}x{height}; {accepted}")
        tick, stamps, count = float(stream.time_base or 0), list[float](), 0
        with contextlib.suppress(av.FFmpegError):  # `probe` says what is damaged
            for packet in container.demux(stream):
                count += packet.size > 0
                stamps += [] if packet.pts is None else [packet.pts * tick]
                if count > limits["frames"]:
                    break
        _check_length(count, max(stamps, default=0.0) - min(stamps, default=0.0), limits)


def _check_length(frames: int, seconds: float, limits: dict[str, Any]) -> None:
    if frames > limits["frames"]:
        raise TooLarge(f"the video has more than {limits['frames']} frames; accepted: as many at most")
    if seconds > limits["seconds"]:
        raise TooLarge(f"the video plays for {seconds:.1f} s; accepted: {limits['seconds']:g} s at most")


def _described(video: _Video) -> dict[str, Any]:
    return {"shape": list(video.frames.shape), "rate": float(video.info.rate)}


def _encode(video: _Video | None, requests: BinaryIO, *, before: bool) -> list[bytes]:
    """Read the purified frames, and encode them and, if wanted, those before: mp4 with the video's times and sound."""
    import torch

    from ..data.video_writer import VideoWriter

    if video is None:
        raise RuntimeError("no video was decoded")
    content = bytearray(video.frames.numel())
    requests.readinto(content)  # type: ignore[attr-defined]
    purified = torch.frombuffer(content, dtype=torch.uint8).view_as(video.frames)
    height, width = video.frames.shape[-2:]
    encoded = []
    for frames in [*([video.frames] if before else []), purified]:
        with warnings.catch_warnings(), VideoWriter("out.mp4", height=height, width=width, source=video.info) as writer:
            warnings.simplefilter("ignore")  # of sound that mp4 cannot hold
            for frame in frames:
                writer.write(frame)
        encoded.append(Path("out.mp4").read_bytes())
        Path("out.mp4").unlink()
    return encoded


if __name__ == "__main__":
    sys.exit(main())
