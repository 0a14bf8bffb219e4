"""A LayerNorm and the linear layer after it as one product: the norm's affine map is folded into the layer's weight.

With a row's mean m and standard deviation s, LayerNorm(x) W^T + b = (x - m) / s (gamma W)^T + (beta W^T + b). The mean
of each row of gamma W is taken off it, which changes nothing, as the values x - m sum to zero; then the product of x
with the folded weight is small however large m is, and little is lost when m times its row's sum is taken off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_eps, check_fit, check_tensor, check_tokens, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES
from .geglu import geglu_reference
from .linear_moments import moments_shape
from .linear_residual import linear_flops


class FoldedNorm(NamedTuple):
    """A LayerNorm's affine map and a linear layer as one.

    weight: (N, K). weight_sums: (N,) in float32, the sums of the weight's rows as they are rounded. bias: (N,).
    """

    weight: Tensor
    weight_sums: Tensor
    bias: Tensor


def widened(x: Tensor) -> Tensor:
    """x in float64, for sums that are rounded once; in float32 on Apple's and Intel's GPUs, which may have no more."""
    return x.float() if x.device.type in ("mps", "xpu") else x.double()


def fold_norm(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None) -> FoldedNorm:
    """norm_weight, norm_bias: (K,). weight: (N, K). bias: (N,) or None. Computed in float64, and rounded once."""
    wide = widened(weight)
    folded = wide * widened(norm_weight)
    folded = (folded - folded.mean(1, keepdim=True)).to(weight.dtype)
    offset = wide @ widened(norm_bias)
    offset = offset if bias is None else offset + widened(bias)
    return FoldedNorm(folded, widened(folded).sum(1).float(), offset.to(weight.dtype))


def folded_linear(
    x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """The linear layer of LayerNorm(x), whose affine map `fold_norm` has folded into weight and bias.

    x: (..., K). moments: those of its rows, from `linear_moments`. weight: (N, K). weight_sums: (N,) in float32.
    bias: (N,).

    Returns (..., N). ValueError for tensors that do not fit together.
    """
    check_folded(x, moments, weight, weight_sums, bias, eps)
    return _folded_linear(x, moments, weight, weight_sums, bias, eps)


def folded_linear_geglu(
    x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """`geglu` of a `folded_linear`, whose arguments it takes: (..., K) and weight (2D, K) -> (..., D)."""
    check_folded(x, moments, weight, weight_sums, bias, eps)
    if len(weight) % 2:
        raise ValueError(f"weight must have an even number of rows, got {tuple(weight.shape)}")
    return _folded_linear_geglu(x, moments, weight, weight_sums, bias, eps)


def check_folded(x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, eps: float) -> None:
    """ValueError unless the tensors of a folded norm fit x and one another."""
    check_tokens(x)
    outputs = count_outputs("weight", weight)
    check_fit(x, "x", weight=(weight, (outputs, x.shape[-1])), bias=(bias, (outputs,)))
    for name, tensor, shape in (
        ("moments", moments, moments_shape(x, x.shape[-1])),
        ("weight_sums", weight_sums, (outputs,)),
    ):
        check_tensor(name, tensor)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != x.device:
            seen = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be {shape} of torch.float32 on {x.device}, got {seen}")
    check_eps(eps)


def folded_linear_reference(
    x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Normalizes x anew: neither the moments nor the sums are needed for that."""
    return F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), weight, bias)


def folded_linear_geglu_reference(
    x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, eps: float
) -> Tensor:
    return geglu_reference(folded_linear_reference(x, moments, weight, weight_sums, bias, eps))


_folded_linear = register(
    "folded_linear",
    reference=folded_linear_reference,
    dtypes={"triton": ACTIVATION_DTYPES["triton"]},
    fake=lambda x, _m, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    flops=lambda x, _m, weight, *_: linear_flops(x, weight),
)
_folded_linear_geglu = register(
    "folded_linear_geglu",
    reference=folded_linear_geglu_reference,
    dtypes={"triton": ACTIVATION_DTYPES["triton"]},
    kernel="folded_linear",
    fake=lambda x, _m, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0] // 2),
    flops=lambda x, _m, weight, *_: linear_flops(x, weight),
)
