"""A purifier's UNet and VAE in the forms that evaluate them, made anew when the models have changed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Unsupported
from .state import Look, StateWatch, departure
from .transformers import AttentionFn
from .unet import FastMotionUNet, FastUNet, PlainUNet
from .vae import FastVAE, PlainVAE


class ModelExecutor:
    """Evaluates a UNet and a VAE over their own weights.

    fast: use the channels-last forms where they know the model; else, or where they do not, diffusers' own forward.
    attention_fn: for spatial and cross-attention in the fast forms.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        *,
        fast: bool = True,
        attention_fn: AttentionFn = F.scaled_dot_product_attention,
    ) -> None:
        self._modules = unet, vae
        self._fast = fast
        self._attention_fn = attention_fn
        self._watch = StateWatch(self._modules)
        self._forms: tuple[Any, Any] | None = None
        self._place: tuple[torch.device, torch.dtype, torch.dtype] | None = None
        self._capturable: bool | None = None
        self.lock = threading.RLock()  # held while forms, or what was made of them, are dropped or made

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        return self._modules

    def of(self, unet: nn.Module, vae: nn.Module) -> ModelExecutor:
        """An executor of other models, with the same settings."""
        return ModelExecutor(unet, vae, fast=self._fast, attention_fn=self._attention_fn)

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own modules, and makes its own forms, when it needs them."""
        made: dict[str, Any] = {"_watch": None, "_forms": None, "_place": None, "_capturable": None, "lock": None}
        return {**self.__dict__, **made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _watch=StateWatch(state["_modules"]), lock=threading.RLock())

    def refresh(self, constants: Iterable[Tensor] = (), *, anew: bool = False) -> Look:
        """Whether the models, or `constants` beside them, have changed since the last call; if so, forms are made anew.

        anew: take everything as changed.
        """
        with self.lock:
            if anew:
                self._watch.forget()
            look = self._watch.look(constants)
            if look.changed:
                self._forms = self._place = self._capturable = None
            return look

    @property
    def capturable(self) -> bool:
        """Whether the UNet's evaluation runs known code alone, that does the same each time.

        What hooks, processors of one's own and replaced forwards do, a captured graph would do once.
        """
        if self._capturable is None:
            self._capturable = isinstance(self.unet, FastUNet) or departure(self._modules[0]) is None
        return self._capturable

    @property
    def device(self) -> torch.device:
        """The UNet's, as it was at the last `refresh`; diffusers' own `device` and `dtype` walk through all modules."""
        return self._placed()[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._placed()[1]

    @property
    def vae_dtype(self) -> torch.dtype:
        return self._placed()[2]

    def _placed(self) -> tuple[torch.device, torch.dtype, torch.dtype]:
        place = self._place
        if place is None:
            unet, vae = self._modules
            self._place = place = unet.device, unet.dtype, vae.dtype
        return place

    @property
    def unet(self) -> FastUNet | PlainUNet:
        unet: FastUNet | PlainUNet = self._made()[0]
        return unet

    @property
    def vae(self) -> FastVAE | PlainVAE:
        vae: FastVAE | PlainVAE = self._made()[1]
        return vae

    def _made(self) -> tuple[Any, Any]:
        with self.lock:
            if self._forms is None:
                unet, vae = self._modules
                fast_unet = FastMotionUNet if type(unet).__name__ == "UNetMotionModel" else FastUNet
                with torch.inference_mode(False):  # what is made in it would shut autograd out of every later call
                    self._forms = self._form(unet, fast_unet, PlainUNet), self._form(vae, FastVAE, PlainVAE)
            return self._forms

    def _form(self, module: nn.Module, fast: type, plain: type) -> Any:
        if self._fast:
            try:
                return fast(module, self._attention_fn)
            except Unsupported as reason:
                what = f"{type(module).__name__}: {reason}; diffusers' own forward runs instead, which is slower"
                warnings.warn(what, stacklevel=2)
        return plain(module)
