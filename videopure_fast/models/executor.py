"""A purifier's UNet and VAE in the forms that evaluate them, made anew when their weights have changed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Unsupported
from .transformers import AttentionFn
from .unet import FastMotionUNet, FastUNet, PlainUNet
from .vae import FastVAE, PlainVAE

_VERSION, _DTYPE = attrgetter("_version"), attrgetter("dtype")


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
        # By name, the children and the weights of each module in both trees; and all children one after another.
        self._children_of: list[dict[str, nn.Module | None]] = []
        self._weights_of: list[dict[str, nn.Parameter | None]] = []
        self._children: list[nn.Module | None] = []
        self._seen: list[list[Any]] = []
        self._forms: tuple[Any, Any] | None = None
        self._place: tuple[torch.device, torch.dtype, torch.dtype] | None = None
        self.lock = threading.RLock()  # held while forms, or what was made of them, are dropped or made

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own modules, and makes its own forms, when it needs them."""
        lists: dict[str, Any] = {"_children_of": [], "_weights_of": [], "_children": [], "_seen": []}
        return {**self.__dict__, **lists, "_forms": None, "_place": None, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def refresh(self, constants: Iterable[Tensor] = ()) -> bool:
        """Whether modules, weights, or `constants` beside them, have changed since the last call.

        If so, the forms are made anew. Every call asks, so thousands of modules and weights are read by iterators in C.
        """
        with self.lock:
            same = list(chain.from_iterable(map(dict.values, self._children_of))) == self._children
            if not same or not self._children:
                tree = [child for module in self._modules for child in module.modules()]
                self._children_of, self._weights_of = [m._modules for m in tree], [m._parameters for m in tree]
                self._children = list(chain.from_iterable(map(dict.values, self._children_of)))
            weights = chain.from_iterable(map(dict.values, self._weights_of))
            tensors = [*constants, *(weight for weight in weights if weight is not None)]
            # Moving to another device changes an address.
            seen = [list(map(look, tensors)) for look in (id, Tensor.data_ptr, _VERSION, _DTYPE)]
            if same and seen == self._seen:
                return False
            self._seen, self._forms, self._place = seen, None, None
            return True

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
