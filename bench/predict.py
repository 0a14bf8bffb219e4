"""Predict the time of a purification on one H200 from what it would launch: `python bench/predict.py`.

Counts operations, FLOPs and bytes of the full-size models on the meta device (full_size.py), and gives each operation
the time that the first profile of an H200 (results/nvidia-h200-profile.json) supports:

  convolution        its FLOPs at the rate of cuDNN's convolutions in the same stage of the profile
  upsampling         as a transposed convolution, its FLOPs at the rate that the same H200 had for three of them
  attention          its FLOPs at the rate of cuDNN's attention in the profile
  product            the longer of its FLOPs at 550 TFLOP/s and its bytes at 80 % of copy speed, two thirds of copy
                     speed where a row has 320 values or fewer; attention over frames in one kernel also no less than
                     reading its tokens and weights from the L2 cache for each head, at 8 TB/s
  pass over memory   its bytes at 80 % of copy speed; a norm of two launches reads its input twice

and no launch less than 2 us. Nothing here was timed with today's kernels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # these sources are counted, installed or not

from full_size import FullSize, Operation, operations_of  # noqa: E402

from videopure_fast.files import atomic_write  # noqa: E402

PROFILE = ROOT / "bench" / "results" / "nvidia-h200-profile.json"
RESULTS = ROOT / "bench" / "results" / "nvidia-h200-prediction.json"

COPY = 4.3e12  # bytes a second that an H200 copies, read and written; an estimate from its memory's 4.8
PRODUCT = 550e12  # FLOP a second of our products, at most: an aim
SHARE_OF_COPY, SHARE_AT_SMALL_K, SMALL_K = 0.8, 2 / 3, 320
# FLOP a second of an H200 for the three upsamplers of a decoder and 167 frames: 2.2, 9.0 and 12.4 ms.
UPSAMPLING = 410e12
L2 = 8e12  # bytes a second from its L2 cache; an estimate, as no profile says
LEAST = 2e-6  # seconds of a launch within a graph
EVALUATIONS, DECODES = 6, 7  # each of inversion, which predicts one frame, and of denoising; chunks of 32 frames
GUIDANCE, HOST = 0.25e-3, 8e-3  # seconds: measured; of the host before the first kernel and between stages, aimed at


class Kind(NamedTuple):
    """A line of the table. kernels: parts of the names of its kernels in the profile. operations: those of today."""

    name: str
    kernels: tuple[str, ...]
    operations: tuple[str, ...]


# The first that fits a kernel or an operation counts.
KINDS = (
    Kind(
        "attention over pixels and text",
        ("sdpa", "fmha"),
        ("_scaled_dot_product_flash_attention",),
    ),
    Kind("convolutions and upsampling", ("fprop", "upsample_nearest"), ("convolution", "upsample_nearest2d")),
    Kind("biases of convolutions", ("gpu_kernel_impl_nocast<at::native::CUDAFunctor_add",), ()),
    Kind(
        "GroupNorm, residual additions",
        ("_statistics_kernel", "_apply_kernel", "_one_pass_kernel", "CUDAFunctor_add<c10::Half>, std::array<char*, 3"),
        ("group_norm_silu", "add_group_norm_silu", "residual_add"),
    ),
    Kind("LayerNorm", ("layer_norm",), ()),
    Kind("feed-forward, first product and GEGLU", ("_linear_geglu_kernel", "_geglu_kernel"), ("folded_linear_geglu",)),
    Kind("attention over frames", ("temporal_attention",), ("folded_temporal_attention",)),
    Kind("convolutions over frames", ("_temporal_conv_kernel",), ("temporal_conv",)),
    Kind(
        "other products",
        ("_linear_residual_kernel", "nvjet", "gemm"),
        ("linear_residual", "linear_moments", "folded_linear", "addmm", "mm", "bmm"),
    ),
    Kind("copies and the rest", ("",), ()),
)


def profiled(stage: str) -> list[tuple[str, int, float]]:
    """The kernels of a stage in the profile: name, launches, microseconds together."""
    kernels: list[tuple[str, int, float]] = json.loads(PROFILE.read_text())["stages"][stage]["kernels"]
    return kernels


class Rates(NamedTuple):
    """FLOP a second of cuDNN's kernels: what a stage does of a kind, over the time that the profile has for it."""

    convolution: float
    attention: float

    @classmethod
    def measured(cls, stage: str, operations: list[Operation]) -> Rates:
        """The profile was made with nearest neighbors and convolutions of 9 products where there are 4 now."""
        flops, seconds = {"sdpa": 0.0, "fprop": 0.0}, {"sdpa": 0.0, "fprop": 0.0}
        for operation in operations:
            if kind := _kind_of_cudnn(operation):
                flops[kind] += operation.flops * (9 / 4 if _upsamples(operation) else 1)
        for name, _, microseconds in profiled(stage):
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
        cached = 0.0
        if operation.name == "folded_temporal_attention":
            if len(operation.launches) > 1:
                moved += 2 * 3 * operation.written  # queries, keys and values are written and read
            else:  # each head of 64 channels reads the tokens, and three blocks of the weight for every 64 of them
                cached = 4 * operation.shapes[0][-1] / 64 * operation.written / L2
        return max(least, operation.flops / PRODUCT, moved / (share * COPY), cached)
    if "norm" in operation.name and len(operation.launches) > 1:
        moved += operation.written  # x, or the sum, once more
    return max(least, moved / (SHARE_OF_COPY * COPY))


def predict() -> dict[str, Any]:
    """Seconds of each stage of a purification by kind: in the profile, and as they are predicted, with launches."""
    models = FullSize()
    first = operations_of(lambda: models.evaluate(first_frame=True))
    stages = {
        "encode": (operations_of(models.encode), "encode"),
        "chain": (EVALUATIONS * (first + operations_of(models.evaluate)), "chain_graph"),
        "decode": (DECODES * operations_of(models.decode), "decode"),
    }
    result: dict[str, Any] = {"gpu": "NVIDIA H200", "stages": {}}
    for stage, (operations, name) in stages.items():
        rates, kernels = Rates.measured(name, operations), profiled(name)
        kinds = {kind.name: {"profile": 0.0, "predicted": 0.0, "launches": 0, "flops": 0} for kind in KINDS}
        for kernel, _, microseconds in kernels:
            kind = next(kind for kind in KINDS if any(part in kernel for part in kind.kernels))
            kinds[kind.name]["profile"] += microseconds / 1e6
        for operation in operations:
            row = kinds[next((kind for kind in KINDS if operation.name in kind.operations), KINDS[-1]).name]
            row["predicted"] += seconds_of(operation, rates)
            row["launches"] += len(operation.launches)
            row["flops"] += operation.flops
        totals = {key: sum(row[key] for row in kinds.values()) for key in ("profile", "predicted", "launches")}
        result["stages"][stage] = {**totals, "kinds": kinds}
    result["guidance"], result["host"] = GUIDANCE, HOST
    result["seconds"] = GUIDANCE + HOST + sum(stage["predicted"] for stage in result["stages"].values())
    return result


def main() -> None:
    result = predict()
    with atomic_write(RESULTS) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    for name, stage in result["stages"].items():
        print(f"{name:40} {1e3 * stage['profile']:7.1f} -> {1e3 * stage['predicted']:6.1f} ms")
        for kind, row in stage["kinds"].items():
            before, after = 1e3 * row["profile"], 1e3 * row["predicted"]
            print(f"  {kind:38} {before:7.1f} -> {after:6.1f} ms {row['launches']:6} launches")
    beside = 1e3 * (GUIDANCE + HOST)
    print(f"{'together':40}            {1e3 * result['seconds']:6.1f} ms, of which guidance and host {beside:.1f}")


if __name__ == "__main__":
    main()
