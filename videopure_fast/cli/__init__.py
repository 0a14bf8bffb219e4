"""The command line `videopure-fast`: demo, evaluate, purify, bench, info.

Commands import what they need when they run.
"""

from __future__ import annotations

import platform
import signal
import sys
import time
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from . import evaluate as cli_evaluate
from .evaluate import Dtype
from .report import console

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.video import VideoInfo
    from ..measure.benchmark import Pair
    from ..purifier import Purifier

app = typer.Typer(
    help="Removes adversarial perturbations from videos with a text-to-video diffusion model (arXiv 2501.14999).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (cli_evaluate.demo, cli_evaluate.evaluate):
    app.command()(_command)


class Method(str, Enum):
    videopure = "videopure"
    ddim_inversion = "ddim_inversion"
    ddim = "ddim"
    ddpm = "ddpm"


class Votes(str, Enum):
    all = "all"
    last = "last"


class FlowName(str, Enum):
    dis = "dis"
    raft = "raft"
    none = "none"


@app.command()
def purify(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A video: mp4, avi, gif or webm; 2 frames or more.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="mp4, avi, gif or webm file to write.")],
    model: Annotated[str, typer.Option(help='"tiny", a folder, or a Hugging Face text-to-video repository.')] = "tiny",
    size: Annotated[
        int | None,
        typer.Option(
            show_default="64 for tiny, else 224", help="Short side of the purified video in pixels; even, 16 or more."
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="videopure, or one of its baselines.")] = Method.videopure,
    steps: Annotated[
        int | None,
        typer.Option(
            show_default="the model's own",
            help="Depth T of the purification, 0 to 49: T + 1 evaluations of the UNet each way (ddpm: 20 T + 1).",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(show_default="the accelerator, else cpu", help='"cpu", "cuda", "cuda:1", "mps".'),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(show_default="float16 on an accelerator, else float32", help="Precision of the model."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Randomness of ddim and ddpm; the others have none.")] = 0,
    flow: Annotated[
        FlowName | None,
        typer.Option(show_default="the model's own", help="Optical flow: OpenCV's, torchvision's, or none."),
    ] = None,
) -> None:
    """Purify a video file of any length, in bounded memory.

    The result has the working size of the model (see --size), the frame rate of IN, and its sound where the format
    of OUT can hold it. OUT appears when it is complete, and may be IN; a failure or Ctrl-C leaves nothing.

    Examples:

    ```
      videopure-fast purify clip.mp4 -o purified.mp4
      videopure-fast purify clip.gif -o purified.webm --size 96
      videopure-fast purify clip.mp4 -o out.mp4 --model ali-vilab/text-to-video-ms-1.7b --device cuda --dtype float16
    ```
    """
    import torch

    from ..data.video import VideoWriter, check_output, probe, read_frames, working_size
    from ..purifier import Purifier
    from ..streaming import purify_stream

    check_output(output)
    video = probe(source)
    if size is None:
        size = 64 if model == "tiny" else 224
    height, width = working_size(video.height, video.width, size)
    overrides: dict[str, Any] = {"method": method.value}
    if steps is not None:
        overrides["inversion_steps"] = steps
    purifier = Purifier.from_pretrained(
        model,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype.value),
        flow=None if flow is None else flow.value,
        **overrides,
    )
    console.print(_facts(video, height, width))
    if model == "tiny":
        console.print(
            "The tiny prior was trained on drawn sprites: on real videos it is a demonstration, and it blurs them."
        )
    started = time.perf_counter()
    with (
        VideoWriter(output, height=height, width=width, rate=video.rate, source=video) as writer,
        _Pace(purifier, video.frames) as pace,
    ):
        frames = read_frames(video, size)
        generator = torch.Generator().manual_seed(seed)
        try:
            for frame in purify_stream(purifier, frames, video.frames, callback=pace, generator=generator):
                writer.write(frame)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{width}x{height} does not fit in the accelerator's memory; try a smaller --size"
            ) from error
    console.print(f"Wrote {output} in {_clock(time.perf_counter() - started)}.")


@app.command()
def bench(
    model: Annotated[str, typer.Option(help='"tiny", a folder, or a Hugging Face text-to-video repository.')] = "tiny",
    batch: Annotated[str, typer.Option(help="Clips a call; like the next three, one or several: 1,4,8.")] = "1,4,8",
    frames: Annotated[str | None, typer.Option(show_default="16 for tiny, else 32", help="Frames of a clip.")] = None,
    size: Annotated[
        str | None,
        typer.Option(show_default="32x32 for tiny, else 224x224", help="HEIGHTxWIDTH of a clip, each 16 or more."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            show_default="float16 on an accelerator, else float32", help="float32, float16, bfloat16 or float64."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            show_default="auto",
            help='Code of the ops: auto, reference, cpu, triton, or in order "cuda,triton". May be given repeatedly.',
        ),
    ] = None,
    decoder: Annotated[
        list[str] | None,
        typer.Option(
            show_default="full",
            help="Decoder of the votes: full, or the lossy taesd, a folder or a repository. May be given repeatedly.",
        ),
    ] = None,
    votes: Annotated[
        Votes, typer.Option(help="Decode all votes, as a defended classifier needs them, or the last alone.")
    ] = Votes.all,
    method: Annotated[Method, typer.Option(help="videopure, or one of its baselines.")] = Method.videopure,
    steps: Annotated[
        int | None, typer.Option(show_default="the model's own", help="Depth T of the purification, 0 to 49.")
    ] = None,
    flow: Annotated[
        FlowName | None,
        typer.Option(show_default="the model's own", help="Optical flow: OpenCV's, torchvision's, or none."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(show_default="the accelerator, else cpu", help='"cpu", "cuda", "cuda:1", "mps".'),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Most calls that a setting is timed for.")] = 50,
    seconds: Annotated[
        float, typer.Option(min=0, help="Most seconds that a setting is timed for; three calls at least.")
    ] = 10,
    stages: Annotated[bool, typer.Option(help="Also profile the stages of each setting.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Save the run here, to be compared later.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw latency and throughput: .svg or .png.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Measure nothing; compare two saved runs.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare runs of different machines or settings too.")
    ] = False,
) -> None:
    """Measure throughput and latency on this machine.

    Every combination of the options is a setting, timed on clips of noise. A setting's first call, which may compile
    and capture, stands apart as the warm-up. A setting has figures only if its first clip came out as the reference
    backend's; where it has none, the table says why.

    Examples:

    ```
      videopure-fast bench
      videopure-fast bench --batch 1,2,4,8 --backend auto --backend reference --json run.json --plot run.svg
      videopure-fast bench --model ali-vilab/text-to-video-ms-1.7b --frames 16,32 --dtype float16,bfloat16
      videopure-fast bench --model ali-vilab/text-to-video-ms-1.7b --decoder full --decoder taesd
      videopure-fast bench --compare before.json after.json
    ```
    """
    from ..files import check_writable
    from ..measure import benchmark
    from ..measure.plot import check_picture

    if compare is not None:
        a, b = map(benchmark.load, compare)
        console.print(_comparison_table(benchmark.compare(a, b, anyway=anyway)))
        return
    for path, check in ((json_file, check_writable), (plot_file, check_picture)):
        if path is not None:
            check(path)
    if steps is not None and not 0 <= steps <= 49:
        raise ValueError(f"--steps must be 0 to 49, got {steps}")
    tiny = model == "tiny"
    settings = benchmark.sweep(
        backends=backend or ["auto"],
        dtypes=_listed(dtype) if dtype else [_usual_dtype(device)],
        decoders=decoder or [benchmark.FULL_DECODER],
        sizes=[_size(text) for text in _listed(size or ("32x32" if tiny else "224x224"))],
        frames=_numbers("frames", frames or ("16" if tiny else "32")),
        batches=_numbers("batch", batch),
    )
    measured = benchmark.measure(
        model,
        settings,
        limits=benchmark.Limits(repeats, seconds),
        return_votes=votes is Votes.all,
        stages=stages,
        progress=True,
        device=device,
        flow=None if flow is None else flow.value,
        method=method.value,
        **({} if steps is None else {"inversion_steps": steps}),
    )
    run = next(measured)
    for row in measured:
        run["rows"].append(row)
        if json_file is not None:
            benchmark.save(run, json_file)
    console.print(_bench_table(run))
    if any(row.get("profile") for row in run["rows"]):
        console.print(_stage_table(run))
    if not any("calls" in row for row in run["rows"]):
        raise ValueError("nothing was measured: the table says why")
    if json_file is not None:
        console.print(f"Numbers: {json_file}")
    if plot_file is not None:
        benchmark.plot(run, plot_file)
        console.print(f"Picture: {plot_file}")


@app.command()
def info() -> None:
    """Show versions, devices and backends, what is missing, and how to get it.

    Example:

    ```
      videopure-fast info
    ```
    """
    import torch

    from ..data.video import torchcodec_decoder
    from ..machine import installed
    from ..ops.backend import backends

    table = Table("what", "state", box=None, pad_edge=False)
    table.add_row("videopure-fast", installed("videopure-fast") or "not installed; running from its source")
    table.add_row("python", platform.python_version())
    for name in ("torch", "diffusers", "av"):
        table.add_row(name, installed(name) or f"missing; pip install {name}")
    table.add_row(
        "opencv", installed("opencv-python-headless") or installed("opencv-python") or "missing: no flow 'dis'"
    )
    for name, what in _OPTIONAL.items():
        state = installed(name) or f"missing, {what}"
        if name == "torchcodec" and installed(name) and torchcodec_decoder() is None:
            state = f"{installed(name)}, but its libraries do not load here; PyAV decodes instead"
        table.add_row(name, state)
    table.add_section()
    table.add_row("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for name in _accelerators() or ["none"]:
        table.add_row("accelerator", name)
    table.add_section()
    for name, state in backends().items():
        table.add_row(f"backend {name}", state)
    console.print(table)


_OPTIONAL = {
    "torchcodec": "optional: PyAV decodes instead; pip install torchcodec",
    "torchvision": "optional, for flow 'raft'; pip install torchvision",
    "transformers": "optional, for models with a text encoder; pip install transformers accelerate",
    "triton": "optional, for the Triton kernels; pip install triton",
    "xformers": "optional, for its attention on NVIDIA GPUs; pip install xformers",
}


def main() -> None:
    """Entry point: bad input ends in one sentence on stderr and exit status 1."""
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # batch systems end jobs so: clean up as for Ctrl-C
    try:
        app(prog_name="videopure-fast")
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


class _Pace:
    """A progress bar over the UNet's evaluations that first says how long all will take. Callback of a Purifier."""

    def __init__(self, purifier: Purifier, frames: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from ..windows import window_starts

        self._evaluations = purifier.evaluations  # of one window
        self._windows = len(window_starts(frames, purifier.max_frames, purifier.config.window_overlap))
        self._length = min(frames, purifier.max_frames)
        self._times: list[float] = []
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._task = self._bar.add_task("UNet evaluations", total=self._windows * self._evaluations)

    def __enter__(self) -> _Pace:
        self._times.append(time.perf_counter())
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, step: int, timestep: int, latents: Tensor) -> None:
        if len(self._times) < 3:
            self._times.append(time.perf_counter())
            if len(self._times) == 3:
                self._announce(*self._times)
        self._bar.advance(self._task)

    def _announce(self, started: float, first: float, second: float) -> None:
        # Until the first evaluation ends, a window is also encoded; decoding takes about as long as that.
        seconds = self._windows * (2 * (first - started) + (self._evaluations - 2) * (second - first))
        self._bar.console.print(
            f"This will take about {_clock(seconds)}: {self._windows} window{'s' * (self._windows > 1)} "
            f"of {self._length} frames, {self._evaluations} UNet evaluations each."
        )


def _facts(video: VideoInfo, height: int, width: int) -> str:
    return (
        f"{video.path}: {video.frames} frames of {video.width}x{video.height} at {float(video.rate):.5g} per second, "
        f"{'with' if video.has_audio else 'no'} sound; purified at {width}x{height}."
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _accelerators() -> list[str]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    name = getattr(torch.get_device_module(accelerator), "get_device_name", lambda index: "")
    return [f"{accelerator.type}:{i} {name(i)}".strip() for i in range(torch.accelerator.device_count())]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _listed(text)]
    except ValueError:
        raise ValueError(f"--{option} must be whole numbers, such as 1,4,8; got {text!r}") from None


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"--size must be HEIGHTxWIDTH, such as 224x224; got {text!r}") from None
    return height, width


def _usual_dtype(device: str | None) -> str:
    """What `from_pretrained` chooses for this device."""
    import torch

    accelerated = torch.accelerator.is_available() if device is None else not device.startswith("cpu")
    return "float16" if accelerated else "float32"


def _bench_table(run: dict[str, Any]) -> Table:
    settings = run["settings"]
    table = Table(
        title=f"{settings['model']}, {settings['method']}, T={settings['inversion_steps']}, {settings['votes']} votes "
        f"decoded, on {run['machine']['device']}, {run['machine']['threads']} CPU threads"
    )
    for column in ("backend", "dtype", "decoder"):
        table.add_column(column)
    lossy = any(row.get("mean_difference_from_full_decoder") is not None for row in run["rows"])
    last = ("calls", "peak MiB", *(("decoder's error",) if lossy else ()))
    for column in ("clip", "batch", "warm-up s", "clips/s", "p50", "p95", "p99 s/clip", *last):
        table.add_column(column, justify="right")
    for row in run["rows"]:
        shape = f"{row['frames']}x{row['height']}x{row['width']}"
        name = (row["backend"], row["dtype"], row["decoder"], shape, str(row["batch"]))
        if "not_measured" in row:
            table.add_row(*name, "not measured")
            continue
        table.add_row(
            *name,
            f"{row['first_call_seconds']:.3g}",
            f"{row['clips_per_second']:.4g}",
            *(f"{row['seconds_per_clip'][p]:.4g}" for p in ("p50", "p95", "p99")),
            str(row["calls"]),
            "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            *([f"{row['mean_difference_from_full_decoder'] or 0:.3g}"] if lossy else []),
        )
    if reasons := {row["not_measured"] for row in run["rows"] if "not_measured" in row}:
        table.caption = "not measured: " + "; ".join(sorted(reasons))
    return table


def _stage_table(run: dict[str, Any]) -> Table:
    """Milliseconds of each stage, one after another, of one call."""
    from ..measure.benchmark import Setting
    from ..measure.profile import STAGES

    table = Table("setting", title="Milliseconds of a call's stages, each run to its end; percent of the floor")
    for stage in STAGES:
        table.add_column(stage, justify="right")
    for row in run["rows"]:
        if not row.get("profile"):
            continue
        found = {stage["name"]: stage for stage in row["profile"]["stages"]}
        cells = []
        for stage in STAGES:
            seen = found.get(stage)
            percent = f" ({seen['of_floor']:.0%})" if seen and seen["flops"] else ""
            cells.append(f"{seen['seconds'] * 1e3:.4g}{percent}" if seen else "-")
        table.add_row(str(Setting(**{axis: row[axis] for axis in Setting._fields})), *cells)
    return table


def _comparison_table(pairs: list[Pair]) -> Table:
    table = Table("setting", title="A and B; a ratio is B's figure over A's")
    for column in ("clips/s A", "B", "ratio", "p50 s/clip A", "B", "ratio", "p95 ratio", "p99 ratio", "peak ratio"):
        table.add_column(column, justify="right")
    for name, a, b in pairs:
        throughput = a["clips_per_second"], b["clips_per_second"]
        latency = {p: (a["seconds_per_clip"][p], b["seconds_per_clip"][p]) for p in ("p50", "p95", "p99")}
        table.add_row(
            name,
            *(f"{value:.4g}" for value in throughput),
            _ratio(*throughput),
            *(f"{value:.4g}" for value in latency["p50"]),
            *(_ratio(*latency[p]) for p in ("p50", "p95", "p99")),
            _ratio(a["peak_bytes"], b["peak_bytes"]),
        )
    return table


def _ratio(a: float | None, b: float | None) -> str:
    return f"{b / a:.3g}" if a and b else "-"
