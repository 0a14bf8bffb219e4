"""The command `bench`: throughput and latency on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console
from .options import Device, Flow, Method, Model, Steps, Votes


def bench(
    model: Model = "tiny",
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
    votes: Votes = "all",
    method: Method = "videopure",
    steps: Steps = None,
    flow: Flow = None,
    device: Device = None,
    repeats: Annotated[int, typer.Option(min=1, help="Most calls that a setting is timed for.")] = 50,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="Most seconds that a setting is timed for, or checked; three calls at least."),
    ] = 10,
    stages: Annotated[bool, typer.Option(help="Also profile the stages of each setting.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Save the run here, to be compared later.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw latency and throughput: .svg or .png; needs matplotlib."),
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
    and capture, is reported apart, as the warm-up. A setting has figures only if its first clip equals the reference
    backend's within a tolerance; where it has none, the table says why.

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
    from ..measure import benchmark, tables
    from ..measure.plot import check_picture

    if compare is not None:
        a, b = map(benchmark.load, compare)
        console.print(tables.comparison_table(benchmark.compare(a, b, anyway=anyway)))
        return
    if json_file is not None:
        check_writable(json_file)
    if plot_file is not None:
        check_picture(plot_file)
    if steps is not None and not 0 <= steps <= 49:
        raise ValueError(f"--steps must be 0 to 49, got {steps}")
    tiny = model == "tiny"
    settings = benchmark.sweep(
        backends=backend or ["auto"],
        dtypes=_split(dtype) if dtype else [_default_dtype(device)],
        decoders=decoder or [benchmark.FULL_DECODER],
        sizes=[_size(text) for text in _split(size or ("32x32" if tiny else "224x224"))],
        frames=_integers("frames", frames or ("16" if tiny else "32")),
        batches=_integers("batch", batch),
    )
    measured = benchmark.measure(
        model,
        settings,
        limits=benchmark.Limits(repeats, seconds),
        return_votes=votes == "all",
        stages=stages,
        progress=True,
        device=device,
        flow=flow,
        method=method,
        **({} if steps is None else {"inversion_steps": steps}),
    )
    run = next(measured)
    for row in measured:
        run["rows"].append(row)
        if json_file is not None:
            benchmark.save(run, json_file)
    console.print(tables.run_table(run))
    if any(row.get("profile") for row in run["rows"]):
        console.print(tables.stage_table(run))
    if not any("calls" in row for row in run["rows"]):
        raise ValueError("nothing was measured: the table says why")
    if json_file is not None:
        console.print(f"Numbers: {json_file}")
    if plot_file is not None:
        benchmark.plot(run, plot_file)
        console.print(f"Picture: {plot_file}")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _split(text)]
    except ValueError:
        raise ValueError(f"--{option} must be whole numbers, such as 1,4,8; got {text!r}") from None


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"--size must be HEIGHTxWIDTH, such as 224x224; got {text!r}") from None
    return height, width


def _default_dtype(device: str | None) -> str:
    """The dtype that `Purifier.from_pretrained` chooses for this device."""
    import torch

    accelerated = torch.accelerator.is_available() if device is None else not device.startswith("cpu")
    return "float16" if accelerated else "float32"
