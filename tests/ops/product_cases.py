"""Shared by the tests of the ops that are products of matrices: which backends, and how Triton's kernel loads tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from op_cases import INTERPRETED

# Without a form for the CPU, an op runs there as its reference.
triton_or_reference = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("triton", "cuda", marks=pytest.mark.gpu, id="triton-gpu"),
        pytest.param("triton", "cpu", id="triton-interpreted")
        if INTERPRETED
        else pytest.param("reference", "cpu", id="reference"),
    ],
)
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
            patch.setattr("videopure_fast.kernels.matrix_product.architecture", lambda: 90)
        yield
