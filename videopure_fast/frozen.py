"""The models of a purifier: frozen, watched, and computed with as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .inputs import check_decoder, check_embeddings, check_flag, check_models
from .models.executor import ModelExecutor
from .models.transformers import attention_function
from .ops.backend import full_float32
from .runtime import readback
from .runtime.captures import Captures, Recent
from .sampling import Chain

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_CHAINS = 16
Result = TypeVar("Result")


class FrozenModels(nn.Module):
    """A UNet, a VAE and prompts in eval mode, and what is made of them; arguments as for `stages.PurifierStages`."""

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None,
        decoder: nn.Module | None,
        *,
        fast: bool,
        attention: str,
    ) -> None:
        super().__init__()
        check_flag("fast", fast)
        check_models(unet, vae)
        check_decoder(vae, decoder)
        check_embeddings(unet, prompt_embeds, negative_prompt_embeds)
        self.unet, self.vae, self.decoder = unet, vae, decoder
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.detach().clone().to(unet.device)
        self.register_buffer("prompt_embeds", prompt_embeds.detach().clone().to(unet.device))
        self.register_buffer("negative_prompt_embeds", negative_prompt_embeds)
        self._executor = ModelExecutor(unet, vae, fast=fast, attention_fn=attention_function(attention))
        self._chains: Recent[Chain] = Recent(_MOST_CHAINS)
        self._captures = Captures()
        self.requires_grad_(False)
        self.eval()
        self._refresh()

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever `mode`: dropout in the UNet would change the method."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts reach the models here: what was made of their weights is made anew."""
        super()._apply(fn, recurse)
        self._refresh()
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise RuntimeError(
            "a Purifier cannot be replicated by nn.DataParallel: its replicas would go on with the tables and captured "
            "graphs of one GPU; make one Purifier for each GPU, in a process (torchrun) or thread of its own"
        )

    def refresh(self) -> None:
        """Make whatever was made of the models anew at the next call, as after a change that no call can see."""
        self._refresh(anew=True)

    def _refresh(self, *, anew: bool = False) -> None:
        """Drop what was made of models or prompts that have changed since. anew: as if they had."""
        if self._executor.models != (self.unet, self.vae):  # others were assigned
            check_models(self.unet, self.vae)
            check_decoder(self.vae, self.decoder)
            self.requires_grad_(False)
            self._executor = self._executor.of(self.unet, self.vae)
        prompts = [prompt for prompt in (self.prompt_embeds, self.negative_prompt_embeds) if prompt is not None]
        with self._executor.lock:
            look = self._executor.refresh(prompts, anew=anew)
            if look.changed:
                if any(module.training for module in self.modules()):
                    self.eval()
                    self._executor.refresh(prompts)
                self._chains.clear()
                self._captures.clear()
        readback.flag_change(*look.doubts)

    def _computed(self, compute: Callable[[], Result], *tensors: Tensor, anew: bool = False) -> Result:
        """compute(), of the models as they are; again, if they are found to have changed when its results are there.

        FloatingPointError if what left a stage is not finite. tensors: as for `_inference`.
        """
        with readback.collecting() as flags:
            self._refresh(anew=anew)
            with self._inference(*tensors):
                result = compute()
        if flags.read():
            return result
        del result  # before another takes as much memory
        return self._computed(compute, *tensors, anew=True)

    def _checked(self, compute: Callable[[], Result], *tensors: Tensor) -> Result:
        """compute(), which needs no look at the models; else as `_computed`."""
        with readback.collecting() as flags, self._inference(*tensors):
            result = compute()
        flags.read()
        return result

    @contextmanager
    def _inference(self, *tensors: Tensor) -> Iterator[None]:
        """A graph only if grad mode is on and one of the tensors needs it; float32 is float32."""
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        # Leaving inference mode makes the results ordinary tensors, fit for a later backward.
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable), full_float32(self._executor.device):
            yield

    @property
    def _prompts(self) -> tuple[Tensor, ...]:
        """The prompt, and the negative one if they differ: for equal ones classifier-free guidance is the identity."""
        prompt, negative = self.prompt_embeds, self.negative_prompt_embeds
        guided = negative is not None and (negative.is_meta or not torch.equal(negative.to(prompt), prompt))
        return (prompt, negative) if guided else (prompt,)

    @property
    def _state_dtype(self) -> torch.dtype:
        return torch.promote_types(self._executor.dtype, torch.float32)
