"""The compiled extension's forms of the ops: tensors become addresses, sizes and strides, on the CPU or a CUDA GPU.

Each function takes and returns what reference.py's of the same name does; ops.py has checked the tensors.
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

# Of the CUDA kernels of the ops on latents; noise of another dtype is cast to float32.
_NOISE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    """Within this block of this thread every call of the extension is also noted down, to be made again."""
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)


def is_recording() -> bool:
    return _calls.get() is not None


def _call(name: str, *arguments: Any, **settings: Any) -> None:
    function = getattr(load()[0], name)
    function(*arguments, **settings)
    if (calls := _calls.get()) is not None:
        calls.append(partial(function, *arguments, **settings))


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    output = latents.new_empty(latents.shape)
    weights = {"spatial_weight": spatial_weight, "temporal_weight": temporal_weight}
    _run("guided_update", latents, noise, [target, flow.transpose(1, 2), _steps(coefficients), output], **weights)
    return output


def ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    output = latents.new_empty(latents.shape)
    return _ddim_step(latents, noise, coefficients, first_frame_noise, output)


def ddim_step_(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    return _ddim_step(latents, noise, coefficients, first_frame_noise, latents)


def _ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool, output: Tensor) -> Tensor:
    if first_frame_noise:
        noise = noise[:, :, :1].expand(noise.shape)
    _run("ddim_step", latents, noise, [_steps(coefficients), output])
    return output


def _steps(coefficients: Tensor) -> Tensor:
    """Coefficients (..., n), for the extension in a row of n pixels."""
    return coefficients[..., None, None, None, :]


def _run(op: str, latents: Tensor, noise: Tensor, others: list[Tensor], **settings: Any) -> None:
    """Run an op on latents with the extension: where they are, on their device's current stream."""
    if noise.dtype not in (_NOISE_DTYPES if latents.is_cuda else (torch.float32,)):
        noise = noise.float()
    if latents.is_cuda:
        settings["noise_dtype"] = str(noise.dtype).removeprefix("torch.")
        settings["device"] = latents.get_device()
        settings["stream"] = torch.cuda.current_stream(latents.device).cuda_stream
    else:
        settings["threads"] = torch.get_num_threads()
    sizes = (1,) * (6 - latents.ndim) + tuple(latents.shape)
    tensors = [(tensor.data_ptr(), (0,) * (6 - tensor.ndim) + tensor.stride()) for tensor in (latents, noise, *others)]
    _call(f"{op}_{latents.device.type}", *tensors, sizes=sizes, **settings)


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    output = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    qkv = _merge_pixels(qkv)
    _call(
        "temporal_attention_cpu",
        qkv.data_ptr(),
        output.data_ptr(),
        sizes=(*qkv.shape[:3], output.shape[-1]),
        strides=qkv.stride()[:3],
        heads=heads,
        threads=torch.get_num_threads(),
    )
    return output


def norm_temporal_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: Tensor | None, heads: int, eps: float
) -> Tensor:
    channels = weight.shape[0] // 3
    output = x.new_empty(*x.shape[:-1], channels)
    x = _merge_pixels(x)
    constants = [_contiguous(tensor) for tensor in (norm_weight, norm_bias, weight, position)]
    _call(
        "norm_temporal_attention_cpu",
        x.data_ptr(),
        *map(_address, constants),
        output.data_ptr(),
        sizes=x.shape,
        strides=x.stride()[:3],
        channels=channels,
        heads=heads,
        eps=eps,
        width=vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    output = x.new_empty(residual.shape)
    rows, residual = _adjacent(x.reshape(-1, inputs)), _adjacent(residual.reshape(-1, outputs))
    weight, bias = _contiguous(weight), _contiguous(bias)
    _call(
        "linear_residual_cpu",
        rows.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        residual.data_ptr(),
        output.data_ptr(),
        rows=rows.shape[0],
        inputs=inputs,
        outputs=outputs,
        row_stride=rows.stride(0),
        residual_stride=residual.stride(0),
        width=vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


def geglu(x: Tensor) -> Tensor:
    output = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    rows = _adjacent(x.reshape(-1, x.shape[-1]))
    _call(
        "geglu_cpu",
        rows.data_ptr(),
        output.data_ptr(),
        rows=rows.shape[0],
        channels=output.shape[-1],
        row_stride=rows.stride(0),
        threads=torch.get_num_threads(),
    )
    return output


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
    rows = _adjacent(x.reshape(-1, x.shape[-1]))
    weight, bias = _contiguous(weight), _contiguous(bias)
    _call(
        "linear_geglu_cpu",
        rows.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        output.data_ptr(),
        rows=rows.shape[0],
        inputs=rows.shape[1],
        channels=output.shape[-1],
        row_stride=rows.stride(0),
        width=vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
) -> Tensor:
    output = x.new_empty(x.shape)
    rows = _adjacent(x.reshape(-1, x.shape[-1]))
    constants = [_contiguous(tensor) for tensor in (norm_weight, norm_bias, weight, bias, out_weight, out_bias)]
    _call(
        "feed_forward_cpu",
        rows.data_ptr(),
        *map(_address, constants),
        output.data_ptr(),
        rows=rows.shape[0],
        channels=rows.shape[1],
        hidden=out_weight.shape[1],
        row_stride=rows.stride(0),
        eps=eps,
        width=vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embedding: Tensor | None,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> Tensor:
    output = x.new_empty(x.shape)
    x = _merge_pixels(x)
    constants = [_contiguous(tensor) for tensor in (weight, bias, embedding)]
    _call(
        "group_norm_silu_cpu",
        x.data_ptr(),
        *map(_address, constants),
        output.data_ptr(),
        sizes=x.shape,
        strides=x.stride()[:3],
        groups=groups,
        eps=eps,
        over_frames=over_frames,
        silu=silu,
        threads=torch.get_num_threads(),
    )
    return output


def temporal_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    normed = group_norm_silu(x, norm_weight, norm_bias, None, groups, eps, True, True).flatten(2, 3)
    output = x.new_empty(*x.shape[:-1], len(bias))
    weight, bias = _contiguous(weight), _contiguous(bias)
    residual = None if residual is None else _merge_pixels(residual)
    _call(
        "temporal_conv_cpu",
        normed.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        _address(residual),
        output.data_ptr(),
        sizes=normed.shape,
        residual_strides=(0, 0, 0) if residual is None else residual.stride()[:3],
        outputs=len(bias),
        width=vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


@cache
def vector_width() -> int:
    """How many floats the widest vector of this processor holds."""
    return load()[0].vector_width


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _merge_pixels(x: Tensor) -> Tensor:
    """(B, F, H, W, C) as (B, F, HW, C), the channels of a pixel side by side."""
    return _adjacent(x.flatten(2, 3))


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
