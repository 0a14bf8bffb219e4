"""The sum that ends a residual block, alone and with the norm that follows it."""

from __future__ import annotations

from torch import Tensor

from ._checks import check_activations, check_eps, check_fit, check_flags, check_groups
from ._register import register
from .backend import ACTIVATION_DTYPES
from .group_norm_silu import group_norm_silu_native, group_norm_silu_reference


def residual_add(x: Tensor, addend: Tensor, addend_bias: Tensor | None = None) -> Tensor:
    """x + addend + addend_bias: the end of a residual block whose last convolution has left out its bias.

    x, addend: (B, F, H, W, C). addend_bias: (C,) or None.

    Returns (B, F, H, W, C). ValueError for tensors that do not fit together.
    """
    check_activations("x", x)
    check_fit(
        x, "x", optional=("addend_bias",), addend=(addend, tuple(x.shape)), addend_bias=(addend_bias, (x.shape[-1],))
    )
    return _residual_add(x, addend, addend_bias)


def residual_add_reference(x: Tensor, addend: Tensor, addend_bias: Tensor | None) -> Tensor:
    return x + (addend if addend_bias is None else addend + addend_bias)


def add_group_norm_silu(
    x: Tensor,
    addend: Tensor,
    addend_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float = 1e-5,
    over_frames: bool = False,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """The sum of `residual_add`, and `group_norm_silu` of it: the statistics are taken as the sum is written.

    x, addend: (B, F, H, W, C). addend_bias: (C,) or None. The other arguments are those of `group_norm_silu`.

    Returns the sum and its norm, (B, F, H, W, C) each. ValueError for tensors that do not fit together, or groups that
    do not divide C.
    """
    check_activations("x", x)
    vector = (x.shape[-1],)
    check_fit(
        x,
        "x",
        optional=("addend_bias",),
        addend=(addend, tuple(x.shape)),
        addend_bias=(addend_bias, vector),
        weight=(weight, vector),
        bias=(bias, vector),
    )
    check_groups(x.shape[-1], groups)
    check_eps(eps)
    check_flags(over_frames=over_frames, silu=silu)
    total, normalized = _add_group_norm_silu(x, addend, addend_bias, weight, bias, groups, eps, over_frames, silu)
    return total, normalized


def add_group_norm_silu_reference(
    x: Tensor,
    addend: Tensor,
    addend_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    total = residual_add_reference(x, addend, addend_bias)
    return total, group_norm_silu_reference(total, weight, bias, None, None, groups, eps, over_frames, silu)


def add_group_norm_silu_native(
    x: Tensor,
    addend: Tensor,
    addend_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    total = residual_add_reference(x, addend, addend_bias)
    return total, group_norm_silu_native(total, weight, bias, None, None, groups, eps, over_frames, silu)


_residual_add = register(
    "residual_add",
    reference=residual_add_reference,
    native=residual_add_reference,  # torch adds as fast as we could
    dtypes=ACTIVATION_DTYPES,
    kernel="residual_add",
)
_add_group_norm_silu = register(
    "add_group_norm_silu",
    reference=add_group_norm_silu_reference,
    native=add_group_norm_silu_native,
    dtypes=ACTIVATION_DTYPES,
    kernel="residual_add",
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
