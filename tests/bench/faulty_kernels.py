"""Kernels that the checks of bench/aot.py are tried on: each is sound or at fault, as its constants say.

`launch(name, **constants)` launches one on tensors of the meta device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

SIDE, INPUTS, BLOCK_K = 128, 320, 32


@triton.jit
def chained_kernel(
    x_ptr: tl.tensor,  # (BLOCK, inputs)
    weight_ptr: tl.tensor,  # (2 * BLOCK, inputs)
    output_ptr: tl.tensor,  # (BLOCK, BLOCK)
    inputs: tl.tensor,
    ASSUME: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Scores of two projections of doubled tokens. ASSUME: the loop runs at least once, or else it is serialized."""
    if ASSUME:
        tl.assume(inputs > 0)
    row = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    queries = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    keys = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=3):
        x = tl.load(x_ptr + row[:, None] * inputs + start + k[None, :])
        query_weight = tl.load(weight_ptr + row[None, :] * inputs + start + k[:, None])
        key_weight = tl.load(weight_ptr + (row + BLOCK)[None, :] * inputs + start + k[:, None])
        x = (2.0 * x.to(tl.float32)).to(x.dtype)
        queries = tl.dot(x, query_weight, queries)
        keys = tl.dot(x, key_weight, keys)
    scores = tl.dot(queries.to(tl.float16), keys.to(tl.float16).T)
    tl.store(output_ptr + row[:, None] * BLOCK + row[None, :], scores.to(tl.float16))


@triton.jit
def described_kernel(
    x: tl.tensor,  # descriptor of (BLOCK, inputs)
    weight: tl.tensor,  # descriptor of (BLOCK, inputs)
    output_ptr: tl.tensor,  # (BLOCK, BLOCK)
    inputs: tl.tensor,
    LOAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A product of tiles that descriptors load; without LOAD they load nothing."""
    tl.assume(inputs > 0)
    row = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    if LOAD:
        for start in tl.range(0, inputs, BLOCK_K):
            total = tl.dot(x.load([0, start]), weight.load([0, start]).T, total)
    tl.store(output_ptr + row[:, None] * BLOCK + row[None, :], total.to(tl.float16))


def launch(name: str, **constants: bool) -> None:
    def meta(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.float16, device="meta")

    x, weight, output = meta(SIDE, INPUTS), meta(2 * SIDE, INPUTS), meta(SIDE, SIDE)
    shared = {**constants, "BLOCK": SIDE, "BLOCK_K": BLOCK_K, "num_warps": 8, "num_stages": 3}
    if name == "chained_kernel":
        chained_kernel[(1,)](x, weight, output, INPUTS, **shared)
    else:
        described = [TensorDescriptor.from_tensor(tensor, [SIDE, BLOCK_K]) for tensor in (x, weight[:SIDE])]
        described_kernel[(1,)](*described, output, INPUTS, **shared)
