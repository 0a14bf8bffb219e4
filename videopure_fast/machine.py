"""The machine that code runs on: device names, package versions, peak memory, and waiting for a device."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work queued on it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_device(device: torch.device) -> str:
    """ "cpu (its model)" or "cuda (its name)"."""
    if device.type == "cpu":
        return f"cpu ({_processor()})"
    name = _accelerator_name(device)
    return f"{device.type} ({name})" if name else device.type


def accelerators() -> list[str]:
    """ "cuda:0 its name" for each accelerator that torch can use; empty where there is none."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    devices = [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    return [f"{device} {_accelerator_name(device)}".strip() for device in devices]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, CPU threads and package versions, for the record of a measurement."""
    versions = {name: installed(name) for name in ("videopure-fast", "torch", "diffusers")}
    return {"device": describe_device(device), "threads": torch.get_num_threads(), **versions}


def nvidia_smi(device: torch.device, **fields: str) -> dict[str, str | None]:
    """Query nvidia-smi about a GPU: `nvidia_smi(device, driver="driver_version")` -> {"driver": "580.65"}.

    Values have no units. They are None on other devices, and where nvidia-smi is missing or fails.
    """
    unknown = dict.fromkeys(fields)
    if device.type != "cuda":
        return unknown
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(fields.values())}"
    command = ["nvidia-smi", "-i", gpu, query, "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return unknown
    return unknown | dict(zip(fields, output.strip().split(", "), strict=False))


def installed(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerator_name(device: torch.device) -> str:
    """Empty where torch does not know a name."""
    get_name = getattr(torch.get_device_module(device), "get_device_name", lambda _: "")
    return str(get_name(device))


def _processor() -> str:
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


class PeakMemory:
    """Peak memory since this object was made: torch's allocations on a CUDA GPU, the process's resident set on Linux.

    Another PeakMemory of the same device resets it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._readable = device.type == "cuda"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # 5 resets the high-water mark of the resident set
                self._readable = True
            except OSError:
                pass  # not Linux, or not permitted

    def read(self) -> int | None:
        """Peak bytes; None where they cannot be measured."""
        if not self._readable:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(peak[1]) * 1024 if peak else None
