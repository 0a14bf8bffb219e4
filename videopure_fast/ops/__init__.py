"""The ops: each checks its tensors, then runs on one of cuda, triton, cpu or reference.

An op has one file here, ops/<op>.py, or shares that of its sibling, with its public function, its reference in plain
torch, its call of the compiled extension, and its registration; its other forms lie in kernels/ and csrc/, as a rule
under the same name. A name below is the public function: it hides the module of the same name, from which `from
videopure_fast.ops.geglu import geglu_reference` still imports. `backend.OPS` holds the forms of all ops by name.

Latents are (B, C, F, h, w), activations of the models (B, F, H, W, C), channels last; both may have any strides, and
results are contiguous. Every form of an op equals its reference for finite values; a NaN or infinity may spread to
neighboring pixels. There is no forward-mode differentiation.
"""

from .ddim_step import ddim_step, ddim_step_
from .feed_forward import feed_forward
from .folded_linear import folded_linear, folded_linear_geglu
from .folded_temporal_attention import folded_temporal_attention
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .guided_update import guided_update
from .linear_geglu import linear_geglu
from .linear_moments import linear_moments
from .linear_residual import linear_residual
from .norm_temporal_attention import norm_temporal_attention
from .residual_add import add_group_norm_silu, residual_add
from .temporal_attention import temporal_attention
from .temporal_conv import temporal_conv

__all__ = [
    "add_group_norm_silu",
    "ddim_step",
    "ddim_step_",
    "feed_forward",
    "folded_linear",
    "folded_linear_geglu",
    "folded_temporal_attention",
    "geglu",
    "group_norm_silu",
    "guided_update",
    "linear_geglu",
    "linear_moments",
    "linear_residual",
    "norm_temporal_attention",
    "residual_add",
    "temporal_attention",
    "temporal_conv",
]
