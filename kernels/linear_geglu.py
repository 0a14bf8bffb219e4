"""GEGLU in the epilogue of the linear layer before it, in Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geglu import geglu
from .launch import as_matrix, precision
from .matrix_product import matrix_product
from .tuned import choose, nearby

# The widest input, K, for which one kernel computes both the product and GEGLU. Chosen by reasoning, not measured: up
# to 640, writing and reading 2D values a row takes about as long as the product in half precision; at 1280 the product
# outweighs them, and cuBLAS computes it faster. In float32 cuBLAS is faster at any width, but the time of a tiny model
# is that of its launches.
MAX_FUSED_INPUTS = {"half": 640, "float32": 128}


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    kind = precision(x.dtype)
    key = nearby(x.shape[:-1].numel()), len(weight), x.shape[-1], kind
    reasoned = "library" if x.shape[-1] > MAX_FUSED_INPUTS[kind] else "kernel"
    with torch.cuda.device_of(x):
        way = choose("linear_geglu", key, ("kernel", "library"), reasoned)
    if way == "library":
        return geglu(F.linear(x, weight, bias))
    output = x.new_empty(*x.shape[:-1], len(weight) // 2)
    matrix_product(as_matrix(output)[None], as_matrix(x)[None], weight[None], bias, gates=True)
    return output
