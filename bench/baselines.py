"""The ways to purify that the benchmarks compare, all over the models of one purifier.

`PATHS[name](purifier)` makes a callable: clips (B, 3, F, H, W), floats in [0, 1] on the models' device, with
F <= max_frames and sides that are multiples of the VAE's factor -> votes (B, V, 3, F, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from videopure_fast import Purifier, reference

Path = Callable[[Tensor], Tensor]

_CHANNELS_LAST = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}


def authors(purifier: Purifier, unet: nn.Module | None = None, vae: nn.Module | None = None) -> Path:
    """(1) The authors' algorithm as written, clip by clip, on diffusers' modules and with torch's own settings.

    unet, vae: other forms of the purifier's modules.
    """
    modules = unet or purifier.unet, vae or purifier.vae

    def purify(clips: Tensor) -> Tensor:
        flows = purifier.latent_flow(clips)
        votes = [
            reference.videopure(*modules, purifier.prompt_embeds, clip, flow, purifier.config)
            for clip, flow in zip(clips, flows, strict=True)
        ]
        return torch.stack(votes)

    return purify


def authors_xformers(purifier: Purifier) -> Path:
    """(2) The authors' algorithm with xformers' attention. Raises where that cannot be had."""
    if find_spec("xformers") is None:
        raise ModuleNotFoundError("xformers is not installed here")
    unet, vae = _twin(purifier.unet), _twin(purifier.vae)
    for module in (unet, vae):
        module.enable_xformers_memory_efficient_attention()
    return authors(purifier, unet, vae)


def authors_compiled(purifier: Purifier, compiler: str = "inductor") -> Path:
    """(3a) The authors' algorithm, its modules channels last and under torch.compile."""
    return authors(purifier, *_compiled(purifier, compiler))


def algebra(purifier: Purifier) -> Path:
    """The exact savings alone, on diffusers' modules: no doubled batch, frames decoded in batches, closed form."""
    return _eagerly(_over(purifier, purifier.unet, purifier.vae, fast=False))


def algebra_captured(purifier: Purifier) -> Path:
    """The algebra with its loop as one CUDA graph; off CUDA the same as `algebra`."""
    return _votes(_over(purifier, purifier.unet, purifier.vae, fast=False))


def algebra_compiled(purifier: Purifier, compiler: str = "inductor") -> Path:
    """(3b) The algebra, its modules channels last and under torch.compile: what hand-written kernels have to beat."""
    # Chunks of one size: another size would be compiled anew.
    return _eagerly(_over(purifier, *_compiled(purifier, compiler), fast=False, decode_chunk=16))


def ours_eager(purifier: Purifier) -> Path:
    """Ours without its CUDA graph; off CUDA the same as `ours`."""
    return _eagerly(_over(purifier, purifier.unet, purifier.vae, fast=True))


def ours(purifier: Purifier) -> Path:
    """What a user gets."""
    return _votes(_over(purifier, purifier.unet, purifier.vae, fast=True))


PATHS: dict[str, Callable[..., Path]] = {
    "authors": authors,
    "authors-xformers": authors_xformers,
    "authors-compiled": authors_compiled,
    "algebra": algebra,
    "algebra-captured": algebra_captured,
    "algebra-compiled": algebra_compiled,
    "ours-eager": ours_eager,
    "ours": ours,
}


def _over(like: Purifier, unet: nn.Module, vae: nn.Module, *, fast: bool, **settings: Any) -> Purifier:
    """A purifier over these modules with another's settings."""
    return Purifier(
        unet,
        vae,
        like.prompt_embeds,
        negative_prompt_embeds=like.negative_prompt_embeds,
        flow=like.flow,
        config=replace(like.config, **settings),
        max_frames=like.max_frames,
        fast=fast,
    )


def _votes(purifier: Purifier) -> Path:
    return lambda clips: purifier(clips, return_votes=True)


def _eagerly(purifier: Purifier) -> Path:
    return lambda clips: purifier(clips, return_votes=True, capture=False)


def _twin(module: nn.Module) -> nn.Module:
    """A copy that shares the weights."""
    weights = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(weight): weight for weight in weights})


def _compiled(purifier: Purifier, compiler: str) -> tuple[nn.Module, nn.Module]:
    """UNet and VAE whose forwards are compiled, with convolutions' weights of their own, channels last."""
    unet, vae = _twin(purifier.unet), _twin(purifier.vae)
    for module in (*unet.modules(), *vae.modules()):
        if layout := _CHANNELS_LAST.get(type(module)):
            weight = module.weight.detach().contiguous(memory_format=layout)
            module.weight = nn.Parameter(weight, requires_grad=False)
    options = {"mode": "max-autotune"} if compiler == "inductor" else {}
    for module in (vae.encoder, vae.decoder):
        module.forward = _keeping(torch.compile(module.forward, backend=compiler, dynamic=False, **options))

    predict = _keeping(torch.compile(unet.forward, backend=compiler, dynamic=False, **options))

    @cache
    def on_device(timestep: int) -> Tensor:  # a number would be compiled in, one graph for each
        return torch.tensor(timestep, device=unet.device)

    def forward(sample: Tensor, timestep: Tensor | int, prompt: Tensor) -> Any:
        timestep = timestep if isinstance(timestep, Tensor) else on_device(timestep)
        # The first sample of a walk may lie in memory as no other does, which would be compiled anew.
        return SimpleNamespace(sample=predict(sample.contiguous(), timestep, prompt, return_dict=False))

    unet.forward = forward
    return unet, vae


def _keeping(compiled: Callable[..., Any]) -> Callable[..., Tensor]:
    """The compiled function's result, or its first, in memory that the next call's CUDA graph does not overwrite."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*arguments, **options)
        return (result[0] if isinstance(result, tuple) else result).clone()

    return call
