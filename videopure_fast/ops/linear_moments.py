"""A linear layer that also measures its result's rows, for a LayerNorm that follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_fit, check_tokens, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES
from .linear_residual import linear_flops

# Columns of which a part of a row's moments is taken: the first that divides a row, or else the last. Blocks of 160
# cover the widths of the models, 320, 640 and 1280, without a rest.
PART_COLUMNS = (160, 128)


def linear_moments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """residual + x weight^T + bias, and the moments of its rows, from which `folded_linear` normalizes them.

    x: (..., K). weight: (N, K). bias: (N,) or None. residual: (..., N) or None.

    Returns (..., N), and float32 moments (..., parts, 2): of each part of a row, `part_columns(N)` values wide, the
    mean and the sum of squared deviations from it. No gradient flows through the moments. ValueError for tensors that
    do not fit together.
    """
    check_tokens(x)
    outputs = count_outputs("weight", weight)
    check_fit(
        x,
        "x",
        optional=("bias", "residual"),
        weight=(weight, (outputs, x.shape[-1])),
        bias=(bias, (outputs,)),
        residual=(residual, (*x.shape[:-1], outputs)),
    )
    y, moments = _linear_moments(x, weight, bias, residual)
    return y, moments


def part_columns(outputs: int) -> int:
    """How many columns a part of the moments of a row of `outputs` values has; the last part may have fewer."""
    return next((columns for columns in PART_COLUMNS if outputs % columns == 0), PART_COLUMNS[-1])


def row_moments(x: Tensor) -> Tensor:
    """The moments of the rows of x, (..., N) -> (..., parts, 2), in float32."""
    means, deviations = [], []
    for part in x.detach().float().split(part_columns(x.shape[-1]), -1):
        mean = part.mean(-1, keepdim=True)
        means.append(mean[..., 0])
        deviations.append((part - mean).square().sum(-1))
    return torch.stack([torch.stack(means, -1), torch.stack(deviations, -1)], -1)


def moments_shape(rows: Tensor, outputs: int) -> tuple[int, ...]:
    """The shape of the moments of rows (..., K) whose results have `outputs` values."""
    return *rows.shape[:-1], -(-outputs // part_columns(outputs)), 2


def linear_moments_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = F.linear(x, weight, bias)
    y = y if residual is None else residual + y
    return y, row_moments(y)


def _fake(x: Tensor, weight: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = weight.shape[0]
    return x.new_empty(*x.shape[:-1], outputs), x.new_empty(moments_shape(x, outputs), dtype=torch.float32)


_linear_moments = register(
    "linear_moments",
    reference=linear_moments_reference,
    dtypes={"triton": ACTIVATION_DTYPES["triton"]},
    kernel="linear_residual",
    fake=_fake,
    flops=linear_flops,
)
