"""GroupNorm of channels-last activations, with the time embedding before it and SiLU after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_activations, check_eps, check_fit, check_flags, check_groups, check_skip
from ._register import register
from .backend import ACTIVATION_DTYPES


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embedding: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    over_frames: bool = False,
    silu: bool = True,
) -> Tensor:
    """SiLU(GroupNorm(x + embedding)) (arXiv 1803.08494), the activation left out where `silu` is off.

    x: (B, F, H, W, C), or the first of C channels with a skip. skip: (B, F, H, W, D) or None, the last of C channels:
    x and skip need not be concatenated. weight, bias: (C,). embedding: (B, C) or None, the time embedding of each clip.
    over_frames: statistics of the whole clip, else of each frame.

    Returns (B, F, H, W, C). ValueError for tensors that do not fit together, or groups that do not divide C.
    """
    check_activations("x", x)
    extra = check_skip(x, skip)
    clips, channels = x.shape[0], x.shape[-1] + extra
    check_fit(
        x,
        "x",
        optional=("embedding", "skip"),
        weight=(weight, (channels,)),
        bias=(bias, (channels,)),
        embedding=(embedding, (clips, channels)),
        skip=(skip, (*x.shape[:-1], extra)),
    )
    check_groups(channels, groups)
    check_eps(eps)
    check_flags(over_frames=over_frames, silu=silu)
    return _group_norm_silu(x, weight, bias, embedding, skip, groups, eps, over_frames, silu)


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embedding: Tensor | None,
    skip: Tensor | None,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], -1)
    if embedding is not None:
        x = x + embedding[:, None, None, None]
    samples = x.movedim(-1, 1) if over_frames else x.flatten(0, 1).movedim(-1, 1)  # [B, C, F, H, W] or [BF, C, H, W]
    y = torch.group_norm(samples, groups, weight, bias, eps)  # F.group_norm refuses groups of one value
    y = y.movedim(1, -1) if over_frames else y.movedim(1, -1).unflatten(0, x.shape[:2])
    return F.silu(y) if silu else y


def group_norm_silu_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embedding: Tensor | None,
    skip: Tensor | None,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], -1)
    output = x.new_empty(x.shape)
    x = native.merge_pixels(x)
    constants = [native.contiguous(tensor) for tensor in (weight, bias, embedding)]
    native.call(
        "group_norm_silu_cpu",
        x.data_ptr(),
        *map(native.address, constants),
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


_group_norm_silu = register(
    "group_norm_silu",
    reference=group_norm_silu_reference,
    native=group_norm_silu_native,
    dtypes=ACTIVATION_DTYPES,
    fake=lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)),
)
