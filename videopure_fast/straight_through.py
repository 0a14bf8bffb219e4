"""An operation whose gradient bypasses the computation of its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(path: Tensor, values: Tensor) -> Tensor:
    """Return `values`; in the backward pass their gradient goes to `path` unchanged (BPDA, arXiv 1802.00420).

    path, values: tensors of the same shape. The gradient is cast to the dtype and device of path.
    """
    return _StraightThrough.apply(path, values)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, path: Tensor, values: Tensor) -> Tensor:
        ctx.like = path.new_empty(0)  # empty: only the dtype and device of path are needed
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.like), None
