"""The machine that something runs on: its names and versions, its memory, and the end of its work."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait for all that the device was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_device(device: torch.device) -> str:
    """ "cpu (its model)" or "cuda (its name)"."""
    if device.type == "cpu":
        return f"cpu ({_processor()})"
    name = getattr(torch.get_device_module(device), "get_device_name", lambda _: "")(device)
    return f"{device.type} ({name})" if name else device.type


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where and with what something was measured, for its record."""
    versions = {name: installed(name) for name in ("videopure-fast", "torch", "diffusers")}
    return {"device": describe_device(device), "threads": torch.get_num_threads(), **versions}


def nvidia_smi(device: torch.device, **fields: str) -> dict[str, str | None]:
    """nvidia-smi's fields of a GPU, without units, by names of the caller's own; None where it does not tell."""
    nothing = dict.fromkeys(fields)
    if device.type != "cuda":
        return nothing
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(fields.values())}"
    command = ["nvidia-smi", "-i", which, query, "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return nothing
    return nothing | dict(zip(fields, said.strip().split(", "), strict=False))


def installed(name: str) -> str | None:
    """The version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


class PeakMemory:
    """The most memory held since this was made: torch's on a CUDA GPU; on the CPU, on Linux, the process's resident."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is held now
                self._readable = True
            except OSError:
                self._readable = False

    def read(self) -> int | None:
        """Bytes; None where it cannot be known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._device.type != "cpu" or not self._readable:
            return None
        mark = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(mark[1]) * 1024 if mark else None
