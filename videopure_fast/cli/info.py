"""The command `info`: versions, devices and backends."""

from __future__ import annotations

import platform

from rich.table import Table

from .console import console
from .environment import wait_policy

# Package -> what it is good for, and how to get it.
_OPTIONAL = {
    "matplotlib": "optional, for plots; pip install 'videopure-fast[plot]'",
    "torchcodec": "optional: PyAV decodes instead; pip install torchcodec",
    "torchvision": "optional, for flow 'raft'; pip install torchvision",
    "transformers": "optional, for models with a text encoder; pip install transformers accelerate",
    "triton": "optional, for the Triton kernels; pip install triton",
    "xformers": "optional, for its attention on NVIDIA GPUs; pip install xformers",
}


def info() -> None:
    """Show versions, devices and backends, what is missing, and how to get it.

    Example:

    ```
      videopure-fast info
    ```
    """
    import torch

    from ..machine import accelerators
    from ..ops.backend import backends

    table = Table("what", "state", box=None, pad_edge=False)
    for name, state in _versions().items():
        table.add_row(name, state)
    table.add_section()
    table.add_row("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    table.add_row("waiting threads", wait_policy())
    for name in accelerators() or ["none"]:
        table.add_row("accelerator", name)
    table.add_section()
    for name, state in backends().items():
        table.add_row(f"backend {name}", state)
    console.print(table)


def _versions() -> dict[str, str]:
    """Package -> its version, or what its absence means and how to get it."""
    from ..data.video import torchcodec_decoder
    from ..machine import installed

    found = {
        "videopure-fast": installed("videopure-fast") or "not installed; running from its source",
        "python": platform.python_version(),
    }
    for name in ("torch", "diffusers", "av"):
        found[name] = installed(name) or f"missing; pip install {name}"
    opencv = installed("opencv-python-headless") or installed("opencv-python")
    found["opencv"] = opencv or "missing: no flow 'dis'; pip install opencv-python-headless"
    for name, advice in _OPTIONAL.items():
        found[name] = installed(name) or f"missing, {advice}"
    if installed("torchcodec") and torchcodec_decoder() is None:
        found["torchcodec"] += ", but its libraries do not load here; PyAV decodes instead"
    return found
