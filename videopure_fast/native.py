"""The compiled extension's forms of the ops: tensors become addresses, sizes and strides, on the CPU or a CUDA GPU.

Each function takes and returns what reference.py's of the same name does; ops.py has checked the tensors.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the CUDA kernels of the ops on latents; noise of another dtype is cast to float32.
_NOISE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why it did not load."""
    try:
        from . import _C
    except ImportError as error:
        return None, str(error)
    return _C, ""


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    output = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
    weights = {"spatial_weight": spatial_weight, "temporal_weight": temporal_weight}
    _run("guided_update", latents, noise, [target, flow.transpose(1, 2), _steps(coefficients), output], **weights)
    return output


def ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    output = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
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
    extension = load()[0]
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
    getattr(extension, f"{op}_{latents.device.type}")(*tensors, sizes=sizes, **settings)


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    output = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    qkv = _merge_pixels(qkv)
    load()[0].temporal_attention_cpu(
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
    tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    if position is not None:
        tokens += position[:, None, None]
    return temporal_attention(_linear(tokens, weight), heads)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return _linear(x, weight, bias, residual)


def geglu(x: Tensor) -> Tensor:
    output = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _geglu(_adjacent(x.reshape(-1, x.shape[-1])), output)
    return output


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs = weight.shape[0]
    output = x.new_empty(*x.shape[:-1], outputs // 2)
    rows = max(1, _CACHED_VALUES // outputs)
    blocks = x.reshape(-1, x.shape[-1]).split(rows), output.view(-1, outputs // 2).split(rows)
    for source, target in zip(*blocks, strict=True):
        _geglu(_linear(source, weight, bias), target)
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
    output = torch.empty(x.shape, dtype=x.dtype)
    x, weight, bias = _merge_pixels(x), weight.contiguous(), bias.contiguous()
    embedding = None if embedding is None else embedding.contiguous()
    load()[0].group_norm_silu_cpu(
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        0 if embedding is None else embedding.data_ptr(),
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
    y = group_norm_silu(x, norm_weight, norm_bias, None, groups, eps, True, True)
    before, at, after = weight
    output = _linear(y, at, bias, residual)
    for source, target in zip(y.flatten(2, 3), output.flatten(2, 3), strict=True):  # [F, HW, C], [F, HW, N]
        target[1:].flatten(0, 1).addmm_(source[:-1].flatten(0, 1), before.t())
        target[:-1].flatten(0, 1).addmm_(source[1:].flatten(0, 1), after.t())
    return output


# The output of a linear layer that is made and used up at once: 4 MiB.
_CACHED_VALUES = 2**20


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """residual + bias + x weight^T. Under autocast too: it leaves products into a given output alone."""
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, products = x.reshape(-1, x.shape[-1]), output.view(-1, weight.shape[0])
    if bias is None and residual is None:
        torch.mm(rows, weight.t(), out=products)
        return output
    if bias is not None and residual is not None:
        torch.add(residual, bias, out=output)
    else:
        output.copy_(bias if residual is None else residual)
    products.addmm_(rows, weight.t())
    return output


def _geglu(rows: Tensor, output: Tensor) -> None:
    """`geglu` of (N, 2D), each row's values side by side, into contiguous memory."""
    load()[0].geglu_cpu(
        rows.data_ptr(),
        output.data_ptr(),
        rows=rows.shape[0],
        channels=rows.shape[1] // 2,
        row_stride=rows.stride(0),
        threads=torch.get_num_threads(),
    )


def _merge_pixels(x: Tensor) -> Tensor:
    """(B, F, H, W, C) as (B, F, HW, C), the channels of a pixel side by side."""
    return _adjacent(x.flatten(2, 3))


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
