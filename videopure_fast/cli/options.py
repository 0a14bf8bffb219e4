"""Options that several commands share, as annotated types: `device: Device = None` declares --device."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..config import Method as MethodName

DtypeName = Literal["float32", "float16", "bfloat16"]  # of the model; `bench` accepts lists, checked by `sweep`
FlowName = Literal["dis", "raft", "none"]
VotesName = Literal["all", "last"]
_TINY_SIDE, _USUAL_SIDE = 64, 224  # default --size, in pixels

Model = Annotated[str, typer.Option(help='"tiny", a folder, or a Hugging Face text-to-video repository.')]
Method = Annotated[MethodName, typer.Option(help="videopure, or one of its baselines.")]
Steps = Annotated[
    int | None,
    typer.Option(
        show_default="the model's own",
        help="Depth T of the purification, 0 to 49: T + 1 evaluations of the UNet each way (ddpm: 20 T + 1).",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(show_default="the accelerator, else cpu", help='"cpu", "cuda", "cuda:1", "mps".'),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(show_default="float16 on an accelerator, else float32", help="Precision of the model."),
]
Size = Annotated[
    int | None,
    typer.Option(
        show_default=f"{_TINY_SIDE} for tiny, else {_USUAL_SIDE}",
        help="Short side of the purified frames in pixels; even, 16 or more.",
    ),
]
Votes = Annotated[
    VotesName, typer.Option(help="Decode all votes, as a defended classifier needs them, or the last alone.")
]
Flow = Annotated[
    FlowName | None,
    typer.Option(show_default="the model's own", help="Optical flow: OpenCV's, torchvision's, or none."),
]


def default_size(model: str, size: int | None) -> int:
    """The short side of purified frames in pixels: `size`, or what suits the model."""
    if size is not None:
        return size
    return _TINY_SIDE if model == "tiny" else _USUAL_SIDE
