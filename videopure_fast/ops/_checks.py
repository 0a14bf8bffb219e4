"""Checks of tensors and settings that several ops share. Each raises a sentence with what was seen and is accepted."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_tensor(name: str, tensor: Tensor) -> None:
    """TypeError unless it is a tensor; NotImplementedError if it carries a tangent of forward-mode differentiation."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    # An operator without a forward-mode formula would drop the tangent silently.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(f"{name} carries a tangent; the ops have no forward-mode differentiation")


def check_fit(
    x: Tensor, name: str, *, optional: Collection[str] = (), **others: tuple[Tensor | None, tuple[int, ...]]
) -> None:
    """ValueError unless each tensor of `others` has the shape named beside it, and the dtype and device of x.

    name: what to call x in the sentence. optional: the names of those that may be None.
    """
    for other, (tensor, shape) in others.items():
        if tensor is None and other in optional:
            continue
        check_tensor(other, tensor)
        assert tensor is not None
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{other} must be {shape} beside {name} of {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise ValueError(f"{other} must be of {name}'s dtype, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{other} must be on {name}'s device, {x.device}, got {tensor.device}")


def check_noise(latents: Tensor, noise: Tensor) -> None:
    """ValueError unless both are floating-point, and noise has the latents' shape and device; its dtype may differ."""
    check_tensor("noise", noise)
    if not latents.is_floating_point():
        raise ValueError(f"latents must be of a floating-point dtype, got {latents.dtype}")
    if noise.shape != latents.shape:
        raise ValueError(f"noise must have the latents' shape, {tuple(latents.shape)}, got {tuple(noise.shape)}")
    if not noise.is_floating_point():
        raise ValueError(f"noise must be of a floating-point dtype, got {noise.dtype}")
    if noise.device != latents.device:
        raise ValueError(f"noise must be on the latents' device, {latents.device}, got {noise.device}")


def check_tokens(x: Tensor) -> None:
    """ValueError unless x is (..., channels), floating-point and not empty."""
    check_tensor("x", x)
    if x.ndim < 1 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (..., channels), floats and not empty, got {tuple(x.shape)} of {x.dtype}")


def check_activations(name: str, x: Tensor) -> None:
    """ValueError unless x is (B, F, H, W, channels), floating-point and not empty."""
    check_tensor(name, x)
    if x.ndim != 5 or x.numel() == 0 or not x.is_floating_point():
        seen = f"{tuple(x.shape)} of {x.dtype}"
        raise ValueError(f"{name} must be (B, F, H, W, channels), floats and not empty, got {seen}")


def check_heads(what: str, size: int, heads: int) -> None:
    """ValueError unless queries, keys and values of together `size` channels can be split into `heads`."""
    _check_count("heads", heads)
    if size % (3 * heads):
        raise ValueError(f"{what} must be three times a multiple of {heads} heads, got {size}")


def check_skip(x: Tensor, skip: Tensor | None) -> int:
    """How many channels a skip connection has, 0 without one. ValueError unless its dimensions are as many as x's."""
    if skip is None:
        return 0
    check_tensor("skip", skip)
    if skip.ndim != x.ndim or skip.shape[-1] == 0:
        leading = ", ".join(map(str, x.shape[:-1]))
        raise ValueError(f"skip must be ({leading}, channels) beside x, not empty, got {tuple(skip.shape)}")
    return skip.shape[-1]


def check_groups(channels: int, groups: int) -> None:
    """ValueError unless `groups` divides the channels."""
    _check_count("groups", groups)
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")


def check_flags(**flags: bool) -> None:
    """TypeError unless each setting is True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_eps(eps: float) -> None:
    """TypeError unless eps, the addend of a norm's variance, is a number; ValueError unless 0 <= eps < infinity."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def count_outputs(name: str, tensor: Tensor) -> int:
    """The op's number of outputs: the first dimension of a weight or bias. ValueError if it has none."""
    check_tensor(name, tensor)
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        raise ValueError(f"{name} must have a row for each output, got {tuple(tensor.shape)}")
    return tensor.shape[0]


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
