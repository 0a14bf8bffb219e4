"""The rows of single ops: their forms and the libraries' best, checked against the float32 reference, then timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_ops import MAX_SHARE_APART, TOLERANCE
from gpu_models import DTYPE, BenchModels, name_of
from gpu_runner import GateFailed, Row
from gpu_timing import copies_beyond_cache, graph_of, timed
from op_baselines import LIBRARY, from_library_layout, in_library_layout
from torch import Tensor
from torch.utils._pytree import tree_leaves

from videopure_fast import ops
from videopure_fast.ops.backend import full_float32, implementation, use_backend


def op_row(models: BenchModels, make: Callable[..., Any], size: str, form: str) -> Row:
    """One form of an op: "library", or a backend. Times are of one call, as a CUDA graph where it can be one.

    make: one of bench_ops.OPS. bytes: what the op must read and write.
    """
    device, library = models.device, form == "library"
    dtype = DTYPE if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    op, tensors, settings = make(size, str(device), dtype)
    wide = (None if t is None else t.float() for t in tensors)
    with torch.no_grad(), full_float32(device):
        expected = implementation(op, "reference")(*wide, **settings)
    shape = tree_leaves(expected)[0].shape
    written = sum(leaf.numel() for leaf in tree_leaves(expected)) * tensors[0].element_size()
    bytes_moved = sum(t.nbytes for t in tensors if t is not None) + written
    copies = copies_beyond_cache(device, bytes_moved, least=8)
    inputs = [tensors, *(make(size, str(device), dtype)[1] for _ in range(copies - 1))]
    if library:
        inputs = [in_library_layout(op, each) for each in inputs]
    run = partial(LIBRARY[op] if library else getattr(ops, op), **settings)

    def run_all() -> None:
        for each in inputs:
            run(*each)

    with torch.no_grad(), use_backend("auto" if library else form):
        result = run(*inputs[0])
        check_op(op, from_library_layout(op, result, tensors[0]) if library else result, expected, dtype)
        run_all()
        eager = timed(run_all, device, seconds=0.3, quick=models.quick)
        capturable = device.type == "cuda" and not (library and op == "guided_update")  # autograd cannot be captured
        replay = graph_of(run_all) if capturable else None
        timing = eager if replay is None else timed(replay, device, seconds=0.3, quick=models.quick)
    median = timing.median / copies
    return {
        **{"op": op, "form": form, "size": size, "shape": list(shape), "dtype": name_of(dtype)},
        **{"median": median, "iqr": timing.iqr / copies, "rounds": timing.rounds, "captured": replay is not None},
        "eager_median": eager.median / copies,
        "bytes": bytes_moved,
        "bytes_per_second": bytes_moved / median,
    }


def check_op(op: str, result: Any, expected: Any, dtype: torch.dtype) -> None:
    """GateFailed where values differ from the float32 reference's by more than the tolerance of the dtype.

    result, expected: a tensor, or a tuple of them.
    """
    if not isinstance(expected, Tensor):
        for each, other in zip(result, expected, strict=True):
            check_op(op, each, other, dtype)
        return
    apart = ~((result - expected).abs() / (1 + expected.abs()) <= TOLERANCE[dtype])
    if apart.float().mean() > (MAX_SHARE_APART if op == "guided_update" else 0):
        raise GateFailed(f"{apart.sum().item()} of {apart.numel()} values differ by more than {TOLERANCE[dtype]}")
