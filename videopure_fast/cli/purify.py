"""The command `purify`: a video file in, a video file out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import console, format_seconds
from .options import Device, Dtype, Flow, Method, Model, Size, Steps, default_size

if TYPE_CHECKING:
    from ..data.video import VideoInfo
    from ..purifier import Purifier

_LONG = 3600  # seconds beyond which a purification is warned of


def purify(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A video: mp4, mov, avi, gif, webm, mkv or ts; 2 frames or more.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="mp4, avi, gif or webm file to write.")],
    model: Model = "tiny",
    size: Size = None,
    method: Method = "videopure",
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of ddim and ddpm; the other methods draw nothing.")] = 0,
    flow: Flow = None,
) -> None:
    """Purify a video file of any length, in bounded memory.

    The result has the working size of the model (see --size), the times of the pictures of IN, and its sound, where
    the format of OUT can hold them; else a warning says so. OUT appears when it is complete, and may be IN; a failure
    or Ctrl-C leaves nothing.

    Examples:

    ```
      videopure-fast purify clip.mp4 -o purified.mp4
      videopure-fast purify clip.gif -o purified.webm --size 96
      videopure-fast purify clip.mp4 -o out.mp4 --model ali-vilab/text-to-video-ms-1.7b --device cuda --dtype float16
    ```
    """
    import torch

    from ..data.video import probe, working_size
    from ..data.video_writer import check_output
    from ..purifier import Purifier
    from ..runtime.spans import EvaluationCounter, listening
    from ..streaming import purify_file

    check_output(output)
    video = probe(source)
    size = default_size(model, size)
    height, width = working_size(video.height, video.width, size)
    overrides: dict[str, Any] = {"method": method}
    if steps is not None:
        overrides["inversion_steps"] = steps
    purifier = Purifier.from_pretrained(
        model, device=device, dtype=None if dtype is None else getattr(torch, dtype), flow=flow, **overrides
    )
    console.print(_describe(video, height, width))
    if model == "tiny":
        console.print(
            "The tiny prior was trained on drawn sprites: on real videos it is a demonstration, and it blurs them."
        )
    _announce_estimate(purifier, video.frames, height, width)
    started = time.perf_counter()
    with _Pace(purifier, video.frames) as pace, listening(EvaluationCounter(pace.advance)):
        purify_file(purifier, video, output, size=size, seed=seed)
    console.print(f"Wrote {output} in {format_seconds(time.perf_counter() - started)}.")


def _announce_estimate(purifier: Purifier, frames: int, height: int, width: int) -> None:
    """Say before the first evaluation how long all of them may take, and warn if that is very long."""
    from ..measure.estimate import estimate_seconds

    seconds = estimate_seconds(purifier, frames, height, width)
    if seconds is None:
        console.print("How long this takes is known after two evaluations: this model's work cannot be counted before.")
        return
    console.print(f"By its FLOPs this may take about {format_seconds(seconds)}; two evaluations will show it better.")
    if seconds > _LONG:
        console.print("Warning: this is more than an hour; a GPU, a smaller --size or fewer --steps take less.")


class _Pace:
    """A progress bar over UNet evaluations, which estimates the whole duration once it has seen enough of it.

    On a CPU two evaluations are enough. On a GPU a captured window counts as a whole, and the first two windows compile
    and capture: the third is measured.
    """

    def __init__(self, purifier: Purifier, frames: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from ..windows import window_starts

        self._evaluations = purifier.evaluations  # of one window
        self._windows = len(window_starts(frames, purifier.max_frames, purifier.config.window_overlap))
        self._length = min(frames, purifier.max_frames)
        self._by_window = purifier.unet.device.type == "cuda"
        self._done = 0
        self._times: dict[int, float] = {}  # when so many evaluations were done
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._task = self._bar.add_task("UNet evaluations", total=self._windows * self._evaluations)

    def __enter__(self) -> _Pace:
        self._times[0] = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def advance(self, evaluations: int) -> None:
        """So many more evaluations are done."""
        self._done += evaluations
        self._times[self._done] = time.perf_counter()
        self._bar.advance(self._task, evaluations)
        one = self._evaluations if self._by_window else 1
        if self._done == (3 * one if self._by_window else 2):
            self._announce(*(self._times[done] for done in (0, self._done - one, self._done)))

    def _announce(self, started: float, before: float, now: float) -> None:
        if self._by_window:
            seconds = self._windows * (now - before)
        else:
            # The time up to the end of the first evaluation includes encoding a window; decoding takes about as long.
            seconds = self._windows * (2 * (before - started) + (self._evaluations - 2) * (now - before))
        self._bar.console.print(
            f"This will take about {format_seconds(seconds)}: {self._windows} window{'s' * (self._windows > 1)} "
            f"of {self._length} frames, {self._evaluations} UNet evaluations each."
        )


def _describe(video: VideoInfo, height: int, width: int) -> str:
    return (
        f"{video.path}: {video.frames} frames of {video.width}x{video.height} at {float(video.rate):.5g} per second, "
        f"{'with' if video.has_audio else 'no'} sound; purified at {width}x{height}."
    )
