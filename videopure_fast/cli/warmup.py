"""The command `warmup`: whatever a first call would wait for, before it comes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .console import console
from .options import Device, Dtype, Flow, Method, Model, Steps, Votes

_TINY_CLIP, _USUAL_CLIP = (16, 32), (32, 224)  # default frames, and height and width in pixels


def warmup(
    model: Model = "tiny",
    batch: Annotated[int, typer.Option(min=1, help="Clips a call.")] = 1,
    frames: Annotated[
        int | None, typer.Option(min=2, show_default="16 for tiny, else 32", help="Frames of a clip.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=16, show_default="32 for tiny, else 224", help="Height of a clip in pixels.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=16, show_default="32 for tiny, else 224", help="Width of a clip in pixels.")
    ] = None,
    votes: Votes = "all",
    method: Method = "videopure",
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
    flow: Flow = None,
) -> None:
    """Compile the GPU kernels that calls on such clips need, before the first one has to wait for them.

    They are compiled side by side, and Triton keeps them in its folder on disk (TRITON_CACHE_DIR, by default
    ~/.triton/cache): run this once on each machine, with its GPU, and with the model and the clips of your service.
    What lives in a process, such as a captured graph, every process makes for itself: a service calls
    `Purifier.warmup`. Without a GPU nothing is kept.

    Examples:

    ```
      videopure-fast warmup
      videopure-fast warmup --model ali-vilab/text-to-video-ms-1.7b --batch 4
    ```
    """
    import torch

    from ..purifier import Purifier

    overrides: dict[str, Any] = {"method": method}
    if steps is not None:
        overrides["inversion_steps"] = steps
    purifier = Purifier.from_pretrained(
        model, device=device, dtype=None if dtype is None else getattr(torch, dtype), flow=flow, **overrides
    )
    usual_frames, usual_side = _TINY_CLIP if model == "tiny" else _USUAL_CLIP
    shape = (batch, 3, frames or usual_frames, height or usual_side, width or usual_side)
    done = purifier.warmup(shape, return_votes=votes == "all", progress=True)
    console.print(
        f"Compiled {done.kernels} GPU kernels and ran {done.calls} call{'s' * (done.calls > 1)} on clips of "
        f"{'x'.join(map(str, shape))} on {purifier.unet.device}, in {done.seconds:.1f} s."
    )
    if purifier.unet.device.type != "cuda":
        console.print("No CUDA GPU was used: nothing is kept for another process.")
