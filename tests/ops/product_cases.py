"""Shared by the tests of the ops that are products of matrices: how Triton's kernel loads tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from op_cases import INTERPRETED

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
