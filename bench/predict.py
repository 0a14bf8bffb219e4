"""Predict the time of a purification on one H200 from what it would launch: `python bench/predict.py`.

Counts operations, FLOPs and bytes of the full-size models on the meta device (full_size.py), and gives each operation
the time that the first profile of an H200 (results/nvidia-h200-profile.json) supports:

  convolution        its FLOPs at the rate of cuDNN's convolutions in the same stage of the profile
  upsampling         as a transposed convolution, its FLOPs at the rate that the same H200 had for three of them
  attention          its FLOPs at the rate of cuDNN's attention in the profile
  product            the longer of its FLOPs at 550 TFLOP/s and its bytes at 80 % of copy speed, two thirds of copy
                     speed where a row has 320 values or fewer
  pass over memory   its bytes at 80 % of copy speed; a norm of two launches reads its input twice

and no launch less than 2 us. Nothing here was timed with today's kernels: NOTES.md sets outcomes beside it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # these sources are counted, installed or not

from full_size import FullSize, Operation, operations_of  # noqa: E402

from videopure_fast.files import atomic_write  # noqa: E402

PROFILE = ROOT / "bench" / "results" / "nvidia-h200-profile.json"
RESULTS = ROOT / "bench" / "results" / "nvidia-h200-prediction.json"

COPY = 4.3e12  # bytes a second that an H200 copies, read and written
PRODUCT = 550e12  # FLOP a second of our products, at most
SHARE_OF_COPY, SHARE_AT_SMALL_K, SMALL_K = 0.8, 2 / 3, 320
UPSAMPLING = 410e12  # FLOP a second of an H200 for 512@56, 512@112 and 256@224 of 167 frames: 2.2, 9.0, 12.4 ms
LEAST = 2e-6  # seconds of a launch within a graph
EVALUATIONS, DECODES = 6, 7  # each of inversion, which predicts one frame, and of denoising; chunks of 32 frames
GUIDANCE, HOST = 0.25e-3, 8e-3  # seconds: measured; of the host before the first kernel and between stages, aimed at
KINDS = {
    "_scaled_dot_product_flash_attention": "attention over pixels and text (cuDNN)",
    "folded_linear": "products with a norm",
    "folded_linear_geglu": "products with a norm and GEGLU",
    "folded_temporal_attention": "attention over frames",
    "linear_moments": "products with a residual",
    "linear_residual": "products with a residual",
    "temporal_conv": "convolutions over frames",
    "group_norm_silu": "GroupNorm",
    "add_group_norm_silu": "GroupNorm",
    "residual_add": "residual additions",
}


class Rates(NamedTuple):
    """FLOP a second of cuDNN's kernels: what a stage does of a kind, over the time that the profile has for it."""

    convolution: float
    attention: float

    @classmethod
    def measured(cls, stage: str, operations: list[Operation]) -> Rates:
        """The profile was made with nearest neighbors and convolutions of 9 products where there are 4 now."""
        kernels = json.loads(PROFILE.read_text())["stages"][stage]["kernels"]
        flops, seconds = {"sdpa": 0.0, "fprop": 0.0}, {"sdpa": 0.0, "fprop": 0.0}
        for operation in operations:
            if kind := _kind_of_cudnn(operation):
                flops[kind] += operation.flops * (9 / 4 if _upsamples(operation) else 1)
        for name, _, microseconds in kernels:
            kind = "sdpa" if "sdpa" in name or "fmha" in name else "fprop" if "fprop" in name else None
            if kind:
                seconds[kind] += microseconds / 1e6
        return cls(flops["fprop"] / seconds["fprop"], flops["sdpa"] / seconds["sdpa"])


def _kind_of_cudnn(operation: Operation) -> str | None:
    return {"convolution": "fprop", "_scaled_dot_product_flash_attention": "sdpa"}.get(operation.name)


def _upsamples(operation: Operation) -> bool:
    return operation.name == "convolution" and operation.shapes[1][-1] == 4


def seconds_of(operation: Operation, rates: Rates) -> float:
    """What one operation should take, by the rules above."""
    least = LEAST * len(operation.launches)
    moved = operation.read + operation.written
    if operation.name == "convolution":
        rate = UPSAMPLING if _upsamples(operation) else rates.convolution
        added = 2 * operation.written / (SHARE_OF_COPY * COPY) if operation.bias else 0.0
        return max(least, operation.flops / rate) + added
    if operation.name == "_scaled_dot_product_flash_attention":
        return max(least, operation.flops / rates.attention)
    if operation.flops:
        share = SHARE_AT_SMALL_K if operation.shapes[0][-1] <= SMALL_K else SHARE_OF_COPY
        if operation.name == "folded_temporal_attention" and len(operation.launches) > 1:
            moved += 2 * 3 * operation.written  # queries, keys and values are written and read
        return max(least, operation.flops / PRODUCT, moved / (share * COPY))
    if "norm" in operation.name and len(operation.launches) > 1:
        moved += operation.written  # x, or the sum, once more
    return max(least, moved / (SHARE_OF_COPY * COPY))


def predict() -> dict[str, Any]:
    """Seconds and launches of each stage of a purification, by kind of operation."""
    models = FullSize()
    first = operations_of(lambda: models.evaluate(first_frame=True))
    stages = {
        "encode": (operations_of(models.encode), 1, "encode"),
        "chain": (EVALUATIONS * (first + operations_of(models.evaluate)), 1, "chain_graph"),
        "decode": (operations_of(models.decode), DECODES, "decode"),
    }
    result: dict[str, Any] = {"gpu": "NVIDIA H200", "stages": {}}
    for stage, (operations, times, name) in stages.items():
        rates = Rates.measured(name, times * operations)
        kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "launches": 0, "flops": 0})
        for operation in operations:
            kind = kinds[kind_of(operation)]
            kind["seconds"] += times * seconds_of(operation, rates)
            kind["launches"] += times * len(operation.launches)
            kind["flops"] += times * operation.flops
        result["stages"][stage] = {"seconds": sum(kind["seconds"] for kind in kinds.values()), "kinds": dict(kinds)}
    result["guidance"], result["host"] = GUIDANCE, HOST
    result["seconds"] = GUIDANCE + HOST + sum(stage["seconds"] for stage in result["stages"].values())
    return result


def kind_of(operation: Operation) -> str:
    """The line of the table that an operation counts for."""
    if operation.name == "convolution":
        return "upsampling" if _upsamples(operation) else "convolutions (cuDNN)"
    if operation.name in KINDS:
        return KINDS[operation.name]
    return "products (cuBLAS)" if operation.flops else "the rest, by torch"


def main() -> None:
    result = predict()
    with atomic_write(RESULTS) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    for name, stage in result["stages"].items():
        print(f"{name:10} {1e3 * stage['seconds']:7.1f} ms")
        for kind, row in sorted(stage["kinds"].items(), key=lambda item: -item[1]["seconds"]):
            took, launches, flops = 1e3 * row["seconds"], row["launches"], row["flops"] / 1e12
            print(f"  {kind:40} {took:7.1f} ms {launches:6} launches {flops:6.1f} TFLOP")
    beside = 1e3 * (GUIDANCE + HOST)
    print(f"{'together':10} {1e3 * result['seconds']:7.1f} ms, of which guidance and host {beside:.1f}")


if __name__ == "__main__":
    main()
