"""The gated GELU of a feed-forward block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_tokens
from ._register import register
from .backend import ACTIVATION_DTYPES


def geglu(x: Tensor) -> Tensor:
    """The first half of the channels times the GELU, with erf, of the second (arXiv 2002.05202).

    x: (..., 2D). Returns (..., D). ValueError for an odd number of channels.
    """
    check_tokens(x)
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of channels, got {tuple(x.shape)}")
    return _geglu(x)


def geglu_reference(x: Tensor) -> Tensor:
    values, gate = x.chunk(2, -1)
    return values * F.gelu(gate)


def geglu_native(x: Tensor) -> Tensor:
    output = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    rows = native.with_adjacent_channels(x.reshape(-1, x.shape[-1]))
    native.call(
        "geglu_cpu",
        rows.data_ptr(),
        output.data_ptr(),
        rows=rows.shape[0],
        channels=output.shape[-1],
        row_stride=rows.stride(0),
        threads=torch.get_num_threads(),
    )
    return output


_geglu = register(
    "geglu",
    reference=geglu_reference,
    native=geglu_native,
    dtypes=ACTIVATION_DTYPES,
    fake=lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
)
