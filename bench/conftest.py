"""Fields of every pytest-benchmark row, and the results file: medians and spread without the raw samples."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch


@pytest.fixture
def row(benchmark: Any) -> Any:
    """pytest-benchmark's fixture, whose row carries the torch version, the threads and the machine."""
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["machine"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    )
    return benchmark


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep the median and the spread of each row; leave out the samples and the names of host and user."""
    output_json["benchmarks"] = [
        {
            "group": bench["group"],
            "name": bench["name"],
            **bench["extra_info"],
            **{key: bench["stats"][key] for key in ("median", "iqr", "min", "max", "rounds")},
        }
        for bench in output_json["benchmarks"]
    ]
    cpu = output_json["machine_info"]["cpu"]
    output_json["machine_info"] = {
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "python": platform.python_version(),
    }
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "dirty")}
