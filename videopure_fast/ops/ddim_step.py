"""One deterministic step of a sampler, as a new tensor or in place."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from ._checks import check_fit, check_noise, check_tensor
from ._register import register, register_in_place
from .backend import LATENT_DTYPES, choose


def ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor, *, first_frame_noise: bool = False) -> Tensor:
    """One deterministic step of a sampler, z' = scale z + noise_scale e (DDIM, eq. 12 without x0).

    latents: (B, C, F, h, w). noise: the same shape, any floating dtype. coefficients: (B, 2), scale and noise_scale of
    each clip, in the latents' dtype. first_frame_noise: frame 0's noise serves every frame (temporal inversion).

    Returns the latents' shape and dtype. ValueError for tensors that do not fit together.
    """
    _check(latents, noise, coefficients)
    return _ddim_step(latents, noise, coefficients, first_frame_noise)


def ddim_step_(latents: Tensor, noise: Tensor, coefficients: Tensor, *, first_frame_noise: bool = False) -> Tensor:
    """`ddim_step` in place: overwrites and returns `latents`, which must not overlap themselves or need a gradient."""
    _check(latents, noise, coefficients)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (latents, noise, coefficients)):
        raise ValueError("ddim_step_ works in place and hands on no gradient; use ddim_step")
    negated = not torch.compiler.is_compiling() and latents.is_neg()  # a compiler has no such views
    if _overlaps_itself(latents) or negated:
        seen = f"{tuple(latents.shape)} with strides {latents.stride()}"
        raise ValueError(f"latents to overwrite must have a place for each value, and no negated view; got {seen}")
    _ddim_step_(latents, noise, coefficients, first_frame_noise)
    return latents


def ddim_step_reference(
    latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False
) -> Tensor:
    """scale z + noise_scale e, each clip at its own step."""
    scale, noise_scale = coefficients[:, :, None, None, None, None].unbind(1)
    noise = (noise[:, :, :1] if first_frame_noise else noise).to(latents.dtype)
    return scale * latents + noise_scale * noise


def ddim_step_in_place_reference(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool) -> None:
    latents.copy_(ddim_step_reference(latents, noise, coefficients, first_frame_noise))


def ddim_step_native(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    output = latents.new_empty(latents.shape)
    _step_into(output, latents, noise, coefficients, first_frame_noise)
    return output


def ddim_step_in_place_native(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool) -> None:
    _step_into(latents, latents, noise, coefficients, first_frame_noise)


def _step_into(output: Tensor, latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool) -> None:
    if first_frame_noise:
        noise = noise[:, :, :1].expand(noise.shape)
    native.call_with_latents("ddim_step", latents, noise, native.as_pixels(coefficients), output)


def _run_in_place(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool) -> None:
    # The first frame's noise is still read after the latents in its place have been written.
    if latents.untyped_storage().data_ptr() == noise.untyped_storage().data_ptr():
        noise = noise.clone()
    choose("ddim_step_", latents)(latents, noise, coefficients, first_frame_noise)


def _check(latents: Tensor, noise: Tensor, coefficients: Tensor) -> None:
    check_tensor("latents", latents)
    if latents.ndim != 5 or latents.numel() == 0:
        raise ValueError(f"latents must be (B, C, F, h, w) and not empty, got {tuple(latents.shape)}")
    check_noise(latents, noise)
    check_fit(latents, "latents", coefficients=(coefficients, (len(latents), 2)))


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may share a place in memory: one dimension's stride is within the reach of smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


_ddim_step = register("ddim_step", reference=ddim_step_reference, native=ddim_step_native, dtypes=LATENT_DTYPES)
_ddim_step_ = register_in_place(
    "ddim_step_",
    _run_in_place,
    reference=ddim_step_in_place_reference,
    native=ddim_step_in_place_native,
    dtypes=LATENT_DTYPES,
    kernel="ddim_step",
)
