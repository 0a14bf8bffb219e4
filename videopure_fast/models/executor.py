"""A purifier's UNet and VAE in the forms that evaluate them, made anew when their weights have changed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Unsupported
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
        self._seen: tuple[Any, ...] = ()
        self._forms: tuple[Any, Any] | None = None
        self.lock = threading.RLock()  # held while forms, or what was made of them, are dropped or made

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own forms when it needs them."""
        return {**self.__dict__, "_seen": (), "_forms": None, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def refresh(self, constants: Iterable[Tensor] = ()) -> bool:
        """Whether weights, or `constants` beside them, have changed since the last call: the forms are made anew."""
        tensors = [*constants, *(parameter for module in self._modules for parameter in module.parameters())]
        seen = tuple((id(t), t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)
        with self.lock:
            if seen == self._seen:
                return False
            self._seen, self._forms = seen, None
            return True

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
