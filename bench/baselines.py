"""The ways to purify that the benchmarks compare, all with the weights of one purifier.

`PATHS[name](purifier)` makes a function: clips (B, 3, F, H, W), floats in [0, 1] on the models' device, with
F <= max_frames and sides that are multiples of the VAE's factor -> votes (B, V, 3, F, H, W). The numbers (1) to (3c)
are those of the report's tables.
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

    unet, vae: run in place of the purifier's own modules.
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
    """(2) The authors' algorithm with xformers' attention. ModuleNotFoundError without xformers."""
    if find_spec("xformers") is None:
        raise ModuleNotFoundError("xformers is not installed here; pip install 'videopure-fast[xformers]' adds it")
    unet, vae = _copy_sharing_weights(purifier.unet), _copy_sharing_weights(purifier.vae)
    for module in (unet, vae):
        module.enable_xformers_memory_efficient_attention()
    return authors(purifier, unet, vae)


def authors_compiled(purifier: Purifier, compiler: str = "inductor") -> Path:
    """(3a) The authors' algorithm, its modules channels last and compiled by torch.compile."""
    return authors(purifier, *_compiled(purifier, compiler))


def algebra(purifier: Purifier) -> Path:
    """The exact savings on diffusers' own modules, run eagerly.

    No doubled batch for equal prompts, frames decoded in batches, the guidance's gradient in closed form.
    """
    return _eagerly(_over(purifier, purifier.unet, purifier.vae, fast=False))


def algebra_captured(purifier: Purifier) -> Path:
    """`algebra`, its sampling loop captured as one CUDA graph; the same as `algebra` on a CPU."""
    return _votes(_over(purifier, purifier.unet, purifier.vae, fast=False))


def algebra_compiled(purifier: Purifier, compiler: str = "inductor") -> Path:
    """(3b) `algebra`, its modules channels last and compiled by torch.compile: what our own kernels have to beat."""
    # Decoding chunks have one size, as torch.compile compiles each size anew.
    return _eagerly(_over(purifier, *_compiled(purifier, compiler), fast=False, decode_chunk=16))


def algebra_inductor(purifier: Purifier, compiler: str = "inductor") -> Path:
    """(3c) `algebra_compiled` without the search for the fastest products: cuBLAS and cuDNN keep theirs."""
    compiled = _compiled(purifier, compiler, mode="reduce-overhead")
    return _eagerly(_over(purifier, *compiled, fast=False, decode_chunk=16))


def ours_eager(purifier: Purifier) -> Path:
    """`ours` without capturing its sampling loop."""
    return _eagerly(_over(purifier, purifier.unet, purifier.vae, fast=True))


def ours(purifier: Purifier) -> Path:
    """The purifier as a user calls it."""
    return _votes(_over(purifier, purifier.unet, purifier.vae, fast=True))


PATHS: dict[str, Callable[..., Path]] = {
    "authors": authors,
    "authors-xformers": authors_xformers,
    "authors-compiled": authors_compiled,
    "algebra": algebra,
    "algebra-captured": algebra_captured,
    "algebra-compiled": algebra_compiled,
    "algebra-inductor": algebra_inductor,
    "ours-eager": ours_eager,
    "ours": ours,
}


def _over(like: Purifier, unet: nn.Module, vae: nn.Module, *, fast: bool, **settings: Any) -> Purifier:
    """A purifier with these modules and everything else of another; settings: replaced in its config."""
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


def _copy_sharing_weights(module: nn.Module) -> nn.Module:
    """A copy that shares the weights."""
    weights = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(weight): weight for weight in weights})


def _compiled(purifier: Purifier, compiler: str, mode: str = "max-autotune") -> tuple[nn.Module, nn.Module]:
    """Copies of UNet and VAE with compiled forwards; weights are shared, but convolutions have theirs channels last."""
    unet, vae = _copy_sharing_weights(purifier.unet), _copy_sharing_weights(purifier.vae)
    for module in (*unet.modules(), *vae.modules()):
        if layout := _CHANNELS_LAST.get(type(module)):
            weight = module.weight.detach().contiguous(memory_format=layout)
            module.weight = nn.Parameter(weight, requires_grad=False)
    options = {"mode": mode} if compiler == "inductor" else {}
    for module in (vae.encoder, vae.decoder):
        module.forward = _cloning_output(torch.compile(module.forward, backend=compiler, dynamic=False, **options))

    predict = _cloning_output(torch.compile(unet.forward, backend=compiler, dynamic=False, **options))

    @cache
    def on_device(timestep: int) -> Tensor:  # torch.compile would compile each number anew
        return torch.tensor(timestep, device=unet.device)

    def forward(sample: Tensor, timestep: Tensor | int, prompt: Tensor) -> Any:
        timestep = timestep if isinstance(timestep, Tensor) else on_device(timestep)
        # torch.compile would compile each memory layout anew, and the first sample's may differ from the others'.
        return SimpleNamespace(sample=predict(sample.contiguous(), timestep, prompt, return_dict=False))

    unet.forward = forward
    return unet, vae


def _cloning_output(compiled: Callable[..., Any]) -> Callable[..., Tensor]:
    """The compiled function, its result (the first of a tuple) cloned: its next CUDA graph overwrites the original."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*arguments, **options)
        return (result[0] if isinstance(result, tuple) else result).clone()

    return call
