"""Gradients through a call that keeps nothing but its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops.backend import full_float32


def checkpointed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), the first a tensor. Where a gradient is wanted the backward pass computes it once more."""
    if not torch.is_grad_enabled():
        return function(*inputs)

    def run(*inputs: Any) -> Tensor:
        with full_float32(inputs[0].device):  # the backward pass runs under the caller's settings
            return function(*inputs)

    result: Tensor = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
