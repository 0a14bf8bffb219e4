"""The compiled extension: loading it, recording its calls, and what every op needs to call it.

The extension knows no torch. Tensors reach it as addresses, sizes and strides, which ops/<op>.py has checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Dtypes of noise that the CUDA kernels read; other noise is cast to float32.
_CUDA_NOISE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why it did not load."""
    try:
        from .. import _C
    except ImportError as error:
        return None, str(error)
    return _C, ""


_calls: ContextVar[list[Callable[[], None]] | None] = ContextVar("videopure_fast_calls", default=None)


@contextmanager
def recorded_to(calls: list[Callable[[], None]]) -> Iterator[None]:
    """Every call of the extension within this block of this thread is also appended to `calls`, to be made again."""
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)


def call(name: str, *arguments: Any, **settings: Any) -> None:
    """Call a function of the extension, which must have loaded, and record the call where that is wanted."""
    function = getattr(load()[0], name)
    function(*arguments, **settings)
    if (calls := _calls.get()) is not None:
        calls.append(partial(function, *arguments, **settings))


def call_with_latents(op: str, latents: Tensor, noise: Tensor, *others: Tensor, **settings: Any) -> None:
    """Call <op>_cpu, or <op>_cuda on the current stream of the latents' GPU.

    All tensors have up to six dimensions, aligned at the last; the last tensor is the output.
    """
    if noise.dtype not in (_CUDA_NOISE_DTYPES if latents.is_cuda else (torch.float32,)):
        noise = noise.float()
    if latents.is_cuda:
        settings["noise_dtype"] = str(noise.dtype).removeprefix("torch.")
        settings["device"] = latents.get_device()
        settings["stream"] = torch.cuda.current_stream(latents.device).cuda_stream
    else:
        settings["threads"] = torch.get_num_threads()
    sizes = (1,) * (6 - latents.ndim) + tuple(latents.shape)
    tensors = [(tensor.data_ptr(), (0,) * (6 - tensor.ndim) + tensor.stride()) for tensor in (latents, noise, *others)]
    call(f"{op}_{latents.device.type}", *tensors, sizes=sizes, **settings)


def as_pixels(coefficients: Tensor) -> Tensor:
    """Coefficients (..., n) as latents (..., 1, 1, 1, n): the extension reads them along a row of pixels."""
    return coefficients[..., None, None, None, :]


@cache
def vector_width() -> int:
    """How many floats the widest vector of this processor holds."""
    extension, _ = load()
    assert extension is not None
    width: int = extension.vector_width
    return width


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def address(tensor: Tensor | None) -> int:
    """Where the tensor's first value lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def merge_pixels(x: Tensor) -> Tensor:
    """(B, F, H, W, C) as (B, F, HW, C) with a channel stride of 1; a copy where strides do not allow a view."""
    return with_adjacent_channels(x.flatten(2, 3))


def with_adjacent_channels(x: Tensor) -> Tensor:
    """x with a stride of 1 along its last dimension; a copy where it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()
