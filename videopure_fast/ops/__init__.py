"""The one door to fast code: every op checks its tensors here, then runs on one of cuda, triton, cpu or reference.

Latents are (B, C, F, h, w), activations of the models (B, F, H, W, C), channels last; both may have any strides, and
results are contiguous. Every op equals the function of its name in reference.py for finite values; a NaN or infinity
may spread to neighboring pixels. `backend.choose` picks the code; `backend.SUPPORTED_DTYPES` lists the dtypes that have
native forms, others run in the reference.

The ops are torch.library operators of the namespace `videopure_fast`: they have shapes without values and FLOP counts
(of matrix products alone, as torch counts its own), and pass through torch.compile and CUDA graphs whole. Gradients
are the reference's: a backward pass computes the op once more there. There is no forward-mode differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op, infer_schema
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import native
from .backend import choose


def ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor, *, first_frame_noise: bool = False) -> Tensor:
    """One deterministic step of a sampler, z' = scale z + noise_scale e (DDIM, eq. 12 without x0).

    latents: (B, C, F, h, w). noise: the same shape, any floating dtype. coefficients: (B, 2), scale and noise_scale of
    each clip, in the latents' dtype. first_frame_noise: frame 0's noise serves every frame (temporal inversion).

    Returns the latents' shape and dtype. ValueError for tensors that do not fit together.
    """
    _check_ddim_step(latents, noise, coefficients)
    return _ddim_step(latents, noise, coefficients, first_frame_noise)


def ddim_step_(latents: Tensor, noise: Tensor, coefficients: Tensor, *, first_frame_noise: bool = False) -> Tensor:
    """`ddim_step` in place: overwrites and returns `latents`, which must not overlap themselves or need a gradient."""
    _check_ddim_step(latents, noise, coefficients)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (latents, noise, coefficients)):
        raise ValueError("ddim_step_ works in place and hands on no gradient; use ddim_step")
    negated = not torch.compiler.is_compiling() and latents.is_neg()  # no compiler makes such a view
    if _overlaps_itself(latents) or negated:
        seen = f"{tuple(latents.shape)} with strides {latents.stride()}"
        raise ValueError(f"latents to overwrite must have a place for each value, and no negated view; got {seen}")
    _ddim_step_(latents, noise, coefficients, first_frame_noise)
    return latents


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    *,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """Guided spatial-temporal optimization of all votes of all clips (arXiv 2501.14999, section 3), in closed form.

    latents, noise: (V, B, C, F, h, w), state and noise prediction of each vote; noise of any floating dtype.
    target: (B, C, F, h, w), the encoded clip. flow: (B, F-1, 2, h, w), from frame j to j+1 in latent pixels.
    coefficients: (V, B, 4), a schedule.VoteCoefficients for each vote of each clip, in the latents' dtype.

    Returns the votes (V, B, C, F, h, w), in the latents' dtype. ValueError for tensors that do not fit together.
    """
    _check_tensor("latents", latents)
    if latents.ndim != 6 or latents.numel() == 0 or min(latents.shape[-2:]) < 2:
        raise ValueError(
            f"latents must be (V, B, C, F, h, w), not empty and 2x2 pixels or larger, got {tuple(latents.shape)}"
        )
    votes, clips, channels, frames, height, width = latents.shape
    _check_noise(latents, noise)
    _check(
        latents,
        "latents",
        target=(target, (clips, channels, frames, height, width)),
        flow=(flow, (clips, frames - 1, 2, height, width)),
        coefficients=(coefficients, (votes, clips, 4)),
    )
    return _guided_update(latents, noise, target, flow, coefficients, float(spatial_weight), float(temporal_weight))


def temporal_attention(qkv: Tensor, *, heads: int) -> Tensor:
    """Self-attention over the frames of every pixel (arXiv 1706.03762, eq. 1, scale 1/sqrt(head size)).

    qkv: (B, F, H, W, 3C), queries, keys and values one after another, each split into heads of C/heads channels.
    Returns (B, F, H, W, C). ValueError for another shape, or heads that do not divide C.
    """
    _check_activations("qkv", qkv)
    _check_heads("qkv's channels", qkv.shape[-1], heads)
    return _temporal_attention(qkv, heads)


def norm_temporal_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    position: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """`temporal_attention` of the queries, keys and values that `weight` makes of LayerNorm(x).

    x: (B, F, H, W, C). norm_weight, norm_bias: (C,). weight: (3D, C), three Linear weights one after another.
    position: (F, C) or None, an embedding of each frame's position, added after the norm (AnimateDiff).

    Returns (B, F, H, W, D). ValueError for tensors that do not fit together, or heads that do not divide D.
    """
    _check_activations("x", x)
    frames, channels = x.shape[1], x.shape[-1]
    _check(
        x,
        "x",
        norm_weight=(norm_weight, (channels,)),
        norm_bias=(norm_bias, (channels,)),
        weight=(weight, (_length("weight", weight), channels)),
        position=(position, (frames, channels)),
    )
    _check_heads("weight's rows", weight.shape[0], heads)
    _check_eps(eps)
    return _norm_temporal_attention(x, norm_weight, norm_bias, weight, position, heads, eps)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x weight^T + bias: the linear layer that ends an attention or feed-forward block.

    x: (..., K). weight: (N, K). bias: (N,) or None. residual: (..., N). Returns (..., N).
    ValueError for tensors that do not fit together.
    """
    _check_tokens(x)
    outputs = _length("weight", weight)
    _check(
        x,
        "x",
        weight=(weight, (outputs, x.shape[-1])),
        bias=(bias, (outputs,)),
        residual=(residual, (*x.shape[:-1], outputs)),
    )
    return _linear_residual(x, weight, bias, residual)


def geglu(x: Tensor) -> Tensor:
    """The first half of the channels times the GELU, with erf, of the second (arXiv 2002.05202).

    x: (..., 2D). Returns (..., D). ValueError for an odd number of channels.
    """
    _check_tokens(x)
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of channels, got {tuple(x.shape)}")
    return _geglu(x)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`geglu` of x weight^T + bias: the first layer of a feed-forward block.

    x: (..., K). weight: (2D, K). bias: (2D,) or None. Returns (..., D). ValueError for tensors that do not fit.
    """
    _check_tokens(x)
    outputs = _length("weight", weight)
    if outputs % 2:
        raise ValueError(f"weight must have an even number of rows, got {tuple(weight.shape)}")
    _check(x, "x", weight=(weight, (outputs, x.shape[-1])), bias=(bias, (outputs,)))
    return _linear_geglu(x, weight, bias)


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """A transformer's feed-forward block: x + out_bias + (`linear_geglu` of LayerNorm(x)) out_weight^T.

    x: (..., C). norm_weight, norm_bias, out_bias: (C,). weight: (2D, C), bias: (2D,), out_weight: (C, D).

    Returns (..., C). ValueError for tensors that do not fit together.
    """
    _check_tokens(x)
    channels, gated = x.shape[-1], _length("bias", bias)
    if gated % 2:
        raise ValueError(f"bias must have an even number of values, got {gated}")
    _check(
        x,
        "x",
        norm_weight=(norm_weight, (channels,)),
        norm_bias=(norm_bias, (channels,)),
        weight=(weight, (gated, channels)),
        bias=(bias, (gated,)),
        out_weight=(out_weight, (channels, gated // 2)),
        out_bias=(out_bias, (channels,)),
    )
    _check_eps(eps)
    return _feed_forward(x, norm_weight, norm_bias, weight, bias, out_weight, out_bias, eps)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embedding: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    over_frames: bool = False,
    silu: bool = True,
) -> Tensor:
    """SiLU(GroupNorm(x + embedding)) (arXiv 1803.08494), the activation left out where `silu` is off.

    x: (B, F, H, W, C). weight, bias: (C,). embedding: (B, C) or None, the time embedding of each clip.
    over_frames: statistics of the whole clip, else of each frame.

    Returns (B, F, H, W, C). ValueError for tensors that do not fit together, or groups that do not divide C.
    """
    _check_activations("x", x)
    clips, channels = x.shape[0], x.shape[-1]
    _check(
        x,
        "x",
        weight=(weight, (channels,)),
        bias=(bias, (channels,)),
        embedding=(embedding, (clips, channels)),
    )
    _check_groups(x, groups)
    _check_eps(eps)
    return _group_norm_silu(x, weight, bias, embedding, groups, eps, over_frames, silu)


def temporal_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
) -> Tensor:
    """residual + bias + the (3, 1, 1) convolution of SiLU(GroupNorm(x)), with zero frames before and after the clip.

    x: (B, F, H, W, C); statistics are of the whole clip. norm_weight, norm_bias: (C,). weight: (3, N, C), a Conv3d's
    (N, C, 3, 1, 1) with the taps first; fast when contiguous. bias: (N,). residual: (B, F, H, W, N) or None.

    Returns (B, F, H, W, N). ValueError for tensors that do not fit together, or groups that do not divide C.
    """
    _check_activations("x", x)
    channels = x.shape[-1]
    outputs = _length("bias", bias)
    _check(
        x,
        "x",
        norm_weight=(norm_weight, (channels,)),
        norm_bias=(norm_bias, (channels,)),
        weight=(weight, (3, outputs, channels)),
        bias=(bias, (outputs,)),
        residual=(residual, (*x.shape[:-1], outputs)),
    )
    _check_groups(x, groups)
    _check_eps(eps)
    return _temporal_conv(x, norm_weight, norm_bias, weight, bias, residual, groups, eps)


# Checks


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two values may share a place in memory: a dimension steps less far than those inside it reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def _check_eps(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    # An operator without such a formula would drop the tangent silently.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(f"{name} carries a tangent; the ops have no forward-mode differentiation")


def _check(x: Tensor, name: str, **others: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """ValueError unless each tensor of `others` that is there has its shape, and x's dtype and device."""
    for other, (tensor, shape) in others.items():
        if tensor is None and other in _OPTIONAL:
            continue
        _check_tensor(other, tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{other} must be {shape} beside {name} of {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise ValueError(f"{other} must be of {name}'s dtype, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{other} must be on {name}'s device, {x.device}, got {tensor.device}")


_OPTIONAL = ("bias", "embedding", "position", "residual")


def _check_noise(latents: Tensor, noise: Tensor) -> None:
    _check_tensor("noise", noise)
    if not latents.is_floating_point():
        raise ValueError(f"latents must be of a floating-point dtype, got {latents.dtype}")
    if noise.shape != latents.shape:
        raise ValueError(f"noise must have the latents' shape, {tuple(latents.shape)}, got {tuple(noise.shape)}")
    if not noise.is_floating_point():
        raise ValueError(f"noise must be of a floating-point dtype, got {noise.dtype}")
    if noise.device != latents.device:
        raise ValueError(f"noise must be on the latents' device, {latents.device}, got {noise.device}")


def _check_ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor) -> None:
    _check_tensor("latents", latents)
    if latents.ndim != 5 or latents.numel() == 0:
        raise ValueError(f"latents must be (B, C, F, h, w) and not empty, got {tuple(latents.shape)}")
    _check_noise(latents, noise)
    _check(latents, "latents", coefficients=(coefficients, (len(latents), 2)))


def _check_tokens(x: Tensor) -> None:
    _check_tensor("x", x)
    if x.ndim < 1 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (..., channels), floats and not empty, got {tuple(x.shape)} of {x.dtype}")


def _check_activations(name: str, x: Tensor) -> None:
    _check_tensor(name, x)
    if x.ndim != 5 or x.numel() == 0 or not x.is_floating_point():
        seen = f"{tuple(x.shape)} of {x.dtype}"
        raise ValueError(f"{name} must be (B, F, H, W, channels), floats and not empty, got {seen}")


def _check_heads(what: str, size: int, heads: int) -> None:
    _check_count("heads", heads)
    if size % (3 * heads):
        raise ValueError(f"{what} must be three times a multiple of {heads} heads, got {size}")


def _check_groups(x: Tensor, groups: int) -> None:
    _check_count("groups", groups)
    if x.shape[-1] % groups:
        raise ValueError(f"groups must divide the {x.shape[-1]} channels, got {groups}")


def _length(name: str, tensor: Tensor) -> int:
    """The number of an op's outputs, as a weight or bias of them tells."""
    _check_tensor(name, tensor)
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        raise ValueError(f"{name} must have a row for each output, got {tuple(tensor.shape)}")
    return tensor.shape[0]


# Registration


def _register(
    truth: Callable[..., Tensor],
    *,
    shape: Callable[..., Sequence[int]] = lambda x, *_: x.shape,
    flops: Callable[..., int] = lambda *_: 0,
) -> Callable[..., Tensor]:
    """A call of a torch operator with the arguments of `truth`, a function of reference.py; its first is a tensor.

    shape: the result's, from the same arguments; its dtype is the first tensor's. flops: of the matrix products, from
    the same arguments with shapes in place of tensors.
    """
    name = truth.__name__

    def run(*arguments: Any) -> Tensor:
        with _no_autocast(arguments[0]):
            return choose(name, arguments[0])(*arguments).contiguous()

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.inputs = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if value is None else value[0] for value in ctx.inputs]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        again = torch.is_grad_enabled()  # the gradient is to be differentiated too: stay in its graph
        for i in wanted:
            inputs[i] = inputs[i].view_as(inputs[i]) if again else inputs[i].detach().requires_grad_()
        sources = [inputs[i] for i in wanted]
        with _no_autocast(gradient):
            with torch.enable_grad():
                output = truth(*inputs)
            found = torch.autograd.grad(output, sources, gradient, allow_unused=True, create_graph=again)
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, value in zip(wanted, found, strict=True):
            gradients[i] = value
        return tuple(gradients)

    op = custom_op(f"videopure_fast::{name}", run, mutates_args=(), schema=infer_schema(truth, mutates_args=()))
    op.register_fake(lambda *arguments: arguments[0].new_empty(shape(*arguments)))
    op.register_autograd(backward, setup_context=keep)
    register_flop_formula(getattr(torch.ops.videopure_fast, name))(lambda *shapes, out_shape, **_: flops(*shapes))
    return lambda *arguments: op(*arguments) if _watched(arguments) else run(*arguments)


def _watched(arguments: Sequence[Any]) -> bool:
    """Whether anyone wants to see the operator and not its result alone. Going through torch costs 20 us and more."""
    if torch.compiler.is_compiling():
        return True
    if native.is_recording():
        return False
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return (
        watched()
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or any(tensor.is_meta or _keys(tensor) not in _plain_keys(tensor.device) for tensor in tensors)
    )


def _keys(tensor: Tensor) -> int:
    """What torch's dispatcher has to look at: subclasses, negated views and functorch's wrappers each have a key."""
    return torch._C._dispatch_keys(tensor).raw_repr()


@cache
def _plain_keys(device: torch.device) -> set[int]:
    """Those of an ordinary tensor, made in inference mode or not."""
    keys = set()
    for mode in (False, True):
        with torch.inference_mode(mode):
            keys.add(_keys(torch.empty(0, device=device)))
    return keys


def watched() -> bool:
    """Whether a compiler, a profiler, a function transform or a mode that counts or changes operators looks on."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or is_in_torch_dispatch_mode()
    )


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """An op has the dtype of its tensors, whatever the caller's autocast would make of the products in it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _attention_flops(qkv: Sequence[int], heads: int) -> int:
    frames, channels = qkv[1], qkv[-1] // 3
    return 4 * math.prod(qkv[:-1]) * frames * channels


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _norm_attention_flops(
    x: Sequence[int], _w: Any, _b: Any, weight: Sequence[int], _p: Any, heads: int, *_: Any
) -> int:
    return _linear_flops(x, weight) + _attention_flops((*x[:-1], weight[0]), heads)


_ddim_step = _register(reference.ddim_step)
_guided_update = _register(reference.guided_update)
_temporal_attention = _register(
    reference.temporal_attention, shape=lambda qkv, _: (*qkv.shape[:-1], qkv.shape[-1] // 3), flops=_attention_flops
)
_norm_temporal_attention = _register(
    reference.norm_temporal_attention,
    shape=lambda x, _w, _b, weight, *_: (*x.shape[:-1], weight.shape[0] // 3),
    flops=_norm_attention_flops,
)
_linear_residual = _register(
    reference.linear_residual, shape=lambda x, _w, _b, residual: residual.shape, flops=_linear_flops
)
_geglu = _register(reference.geglu, shape=lambda x: (*x.shape[:-1], x.shape[-1] // 2))
_linear_geglu = _register(
    reference.linear_geglu, shape=lambda x, weight, _: (*x.shape[:-1], weight.shape[0] // 2), flops=_linear_flops
)
_feed_forward = _register(
    reference.feed_forward,
    flops=lambda x, _nw, _nb, weight, _b, out_weight, *_: 6 * math.prod(x) * out_weight[1],
)
_group_norm_silu = _register(reference.group_norm_silu)
_temporal_conv = _register(
    reference.temporal_conv,
    shape=lambda x, _nw, _nb, weight, *_: (*x.shape[:-1], weight.shape[1]),
    flops=lambda x, _nw, _nb, weight, *_: 6 * math.prod(x) * weight[1],
)


@custom_op("videopure_fast::ddim_step_", mutates_args=("latents",))
def _ddim_step_(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool) -> None:
    # A step reads noise after it has written latents.
    if latents.untyped_storage().data_ptr() == noise.untyped_storage().data_ptr():
        noise = noise.clone()
    choose("ddim_step_", latents)(latents, noise, coefficients, first_frame_noise)


@_ddim_step_.register_fake
def _(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool) -> None:
    return None
