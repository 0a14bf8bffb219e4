"""The one door to fast code: every op checks its tensors, then runs on one of cuda, triton, cpu or reference.

"cuda" and "cpu" are the compiled extension, "triton" serves GPUs where the extension was built without nvcc, and
"reference" is plain torch. By default the fastest that can serve a call does. `use_backend`, or else the environment
variable VIDEOPURE_FAST_BACKEND, forces one; a forced backend that cannot serve a call raises RuntimeError.
Where autograd needs a gradient the reference runs, whatever is forced: it alone is differentiable.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .schedule import VoteCoefficients

BACKENDS = ("cuda", "triton", "cpu", "reference")
BACKEND_VARIABLE = "VIDEOPURE_FAST_BACKEND"
NATIVE_NOISE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_full_float32_lock = threading.Lock()
_full_float32_depth = 0
_full_float32_saved: list[tuple[Any, str]] = []
_override: ContextVar[str | None] = ContextVar("videopure_fast_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend, or "auto", within a with block; wins over VIDEOPURE_FAST_BACKEND. ValueError if unknown."""
    token = _override.set(_known(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """float32 means float32 within this block: no TF32, no reduced CPU products, no autocast on `device`.

    torch's switches belong to the process. The first block to begin saves the caller's settings, and the last to end,
    of all threads, puts them back.
    """
    global _full_float32_depth, _full_float32_saved
    with _full_float32_lock:
        if _full_float32_depth == 0:
            _full_float32_saved = [(switch, switch.fp32_precision) for switch in _float32_switches()]
            for switch, precision in _full_float32_saved:
                if precision not in ("ieee", "none"):
                    switch.fp32_precision = "ieee"
        _full_float32_depth += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _full_float32_lock:
            _full_float32_depth -= 1
            if _full_float32_depth == 0:
                for switch, precision in _full_float32_saved:
                    if precision not in ("ieee", "none"):
                        switch.fp32_precision = precision


def _float32_switches() -> tuple[Any, ...]:
    backends = torch.backends
    # cudnn.rnn has no part in this, but torch's older flag for cuDNN can be read only while both agree.
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv


def backends() -> dict[str, str]:
    """Each backend's name with "available", or a sentence on what it lacks on this machine and how to get it."""
    return {name: _lacks(name) or "available" for name in BACKENDS}


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Sequence[VoteCoefficients],
    *,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """Guided spatial-temporal optimisation of all votes of all clips, as reference.guided_update.

    latents, noise: (V, B, C, F, h, w), state and noise prediction of each vote; noise may be of a narrower dtype.
    target: (B, C, F, h, w), the encoded clip. flow: (B, F-1, 2, h, w), from frame j to j+1 in latent pixels.
    coefficients: V of them. Returns the votes (V, B, C, F, h, w), contiguous, in the latents' dtype.

    Any strides will do. float32 latents take the fast backends, other dtypes the reference. ValueError for tensors
    whose shapes, dtypes or devices do not fit together.
    """
    _check_guided_update(latents, noise, target, flow, coefficients)
    weights = {"spatial_weight": spatial_weight, "temporal_weight": temporal_weight}
    backend = _choose(latents, noise, target, flow)
    if backend == "reference":
        return reference.guided_update(latents, noise, target, flow, coefficients, **weights)

    latents, noise, target, flow = (tensor.detach() for tensor in (latents, noise, target, flow))
    noise = noise if backend != "cpu" and noise.dtype in NATIVE_NOISE_DTYPES else noise.float()
    latents, noise, target = map(_with_contiguous_frames, (latents, noise, target))
    flow = flow.contiguous()
    if backend == "triton":
        from .kernels import guided_update as kernel

        return kernel.guided_update(latents, noise, target, flow, coefficients, **weights)

    output = torch.empty(latents.shape, dtype=torch.float32, device=latents.device)
    arguments: dict[str, Any] = {
        "latents": latents.data_ptr(),
        "noise": noise.data_ptr(),
        "target": target.data_ptr(),
        "flow": flow.data_ptr(),
        "output": output.data_ptr(),
        "sizes": latents.shape,
        "latents_strides": latents.stride()[:4],
        "noise_strides": noise.stride()[:4],
        "target_strides": (0, *target.stride()[:3]),
        "coefficients": coefficients,
        **weights,
    }
    extension = _extension()
    if backend == "cpu":
        extension.guided_update_cpu(**arguments, threads=torch.get_num_threads())
    else:
        extension.guided_update_cuda(
            **arguments,
            noise_dtype=str(noise.dtype).removeprefix("torch."),
            device=latents.get_device(),
            stream=torch.cuda.current_stream(latents.device).cuda_stream,
        )
    return output


def _check_guided_update(
    latents: Tensor, noise: Tensor, target: Tensor, flow: Tensor, coefficients: Sequence[VoteCoefficients]
) -> None:
    if latents.ndim != 6 or latents.numel() == 0 or min(latents.shape[-2:]) < 2:
        raise ValueError(
            f"latents must be (V, B, C, F, h, w), not empty and 2x2 pixels or larger, got {tuple(latents.shape)}"
        )
    votes, clips, channels, frames, height, width = latents.shape
    for name, tensor, shape in (
        ("noise", noise, (votes, clips, channels, frames, height, width)),
        ("target", target, (clips, channels, frames, height, width)),
        ("flow", flow, (clips, frames - 1, 2, height, width)),
    ):
        if tuple(tensor.shape) != shape:
            beside = f"beside latents of {tuple(latents.shape)}"
            raise ValueError(f"{name} must be {shape} {beside}, got {tuple(tensor.shape)}")
        if tensor.device != latents.device:
            raise ValueError(f"{name} must be on the latents' device, {latents.device}, got {tensor.device}")
        if not tensor.dtype.is_floating_point or (tensor.dtype != latents.dtype and name != "noise"):
            accepted = "a floating-point dtype" if name == "noise" else f"the latents' dtype, {latents.dtype}"
            raise ValueError(f"{name} must be of {accepted}, got {tensor.dtype}")
    if len(coefficients) != votes:
        raise ValueError(f"coefficients must be {votes}, one for each vote, got {len(coefficients)}")


def _choose(latents: Tensor, *others: Tensor) -> str:
    """The backend that serves this call. RuntimeError if a forced one cannot."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (latents, *others)):
        return "reference"
    forced = _override.get() or _known(os.environ.get(BACKEND_VARIABLE) or "auto", BACKEND_VARIABLE)
    if forced != "auto":
        if obstacle := _obstacle(forced, latents):
            raise RuntimeError(f"backend {forced!r} cannot serve this call: {obstacle}")
        return forced
    for name in ("cuda", "triton") if latents.is_cuda else ("cpu",):
        if _obstacle(name, latents) is None:
            return name
    return "reference"


def _obstacle(name: str, latents: Tensor) -> str | None:
    """What keeps the backend from serving these latents, or None."""
    if name == "reference":
        return None
    if lacks := _lacks(name):
        return lacks
    if latents.dtype != torch.float32:
        return f"it computes in float32, the latents are {latents.dtype}; 'auto' and 'reference' take them"
    served = "cpu" if name == "cpu" or (name == "triton" and _interpreted()) else "cuda"
    if latents.device.type != served:
        return f"it takes {served} tensors, these are on {latents.device}"
    if name == "cuda":
        return _device_obstacle(latents.get_device())
    return None


def _lacks(name: str) -> str | None:
    """What the backend lacks on this machine and how to get it, or None."""
    if name == "reference":
        return None
    if name == "triton":
        if find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        return None if _interpreted() or torch.cuda.is_available() else _NO_GPU
    extension = _extension()
    if extension is None:
        return _extension_error()
    if name == "cpu":
        return None
    if not extension.has_cuda:
        return "the extension was built without CUDA; put nvcc on PATH and install videopure-fast again"
    return _device_obstacle(torch.cuda.current_device()) if torch.cuda.is_available() else _NO_GPU


_NO_GPU = "torch sees no CUDA GPU; it needs an NVIDIA GPU with its driver and a CUDA build of torch"


@cache
def _device_obstacle(device: int) -> str | None:
    """Why the extension's kernels cannot run on a GPU: an older driver than nvcc's, or an architecture left out."""
    if error := _extension().cuda_error(device):
        return f"GPU {device} cannot run the extension's kernels ({error}); install videopure-fast anew on this machine"
    return None


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        from . import _C
    except ImportError as error:
        return None, str(error)
    return _C, ""


def _extension() -> ModuleType | None:
    return _load()[0]


def _extension_error() -> str:
    return f"the compiled extension did not load ({_load()[1]}); install videopure-fast again where a C++ compiler is"


def _interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors, slowly; triton reads this variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _known(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown {source} {name!r}; accepted: auto, {', '.join(BACKENDS)}")
    return name


def _with_contiguous_frames(tensor: Tensor) -> Tensor:
    """(..., h, w) with any strides but those of h and w, which the kernels take as contiguous."""
    return tensor if tensor.stride()[-2:] == (tensor.shape[-1], 1) else tensor.contiguous()
