"""Shared by the tests of the ops that are products of matrices: how Triton's kernel loads tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from op_cases import INTERPRETED
from torch import Tensor

MAX_ROW_STRIDE = 2**24  # of kernels/launch.py: rows farther apart are copied

# Tiles as any GPU loads them, and by the tensor descriptors of sm_90, which the interpreter knows too.
LOADS = ("pointers", "descriptors")


def loads(backend: str, device: str) -> tuple[str, ...]:
    """The ways of loading tiles to check a backend with. A GPU chooses by itself."""
    return LOADS if (backend, device) == ("triton", "cpu") else LOADS[:1]


@contextmanager
def loading(way: str) -> Iterator[None]:
    """Within this block, the interpreter loads tiles in this way, where the tensors allow it."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED and way == "descriptors":
            patch.setattr("videopure_fast.kernels.launch.architecture", lambda: 90)
        yield


def far_rows(x: Tensor) -> Tensor:
    """The values of x (rows, columns) in rows so far apart that the last begins beyond 2^31 values."""
    apart = 2**23
    memory = torch.empty((len(x) - 1) * apart + x.shape[1], dtype=x.dtype, device=x.device)
    far = memory.as_strided(x.shape, (apart, 1)).copy_(x)
    assert len(x) * apart > 2**31 and apart < MAX_ROW_STRIDE
    return far
