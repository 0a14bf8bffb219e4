"""The full-size models on the meta device, and what their evaluation would launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from aot_launches import launches as launches_on
from diffusers import AutoencoderKL, UNet3DConditionModel
from gpu_models import FULL_UNET, FULL_VAE, TOKENS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from videopure_fast.models.unet import Constants, FastUNet
from videopure_fast.models.vae import FastVAE
from videopure_fast.ops.backend import NAMESPACE, implementation

FRAMES, SIDE = 32, 224
ARCHITECTURE = 90  # for which Triton's launches are recorded
# Operations of torch's that launch nothing.
_VIEWS = {"view", "permute", "transpose", "t", "unbind", "slice", "select", "split", "split_with_sizes", "expand"}
_VIEWS |= {
    "unsqueeze",
    "squeeze",
    "reshape",
    "flatten",
    "alias",
    "detach",
    "_unsafe_view",
    "_reshape_alias",
    "as_strided",
}
_NOTHING = {*_VIEWS, "empty", "new_empty", "empty_like", "empty_strided"}


class Operation(NamedTuple):
    """One operation of torch's or of ours, as a GPU would run it.

    launches: its kernels; what a library launches within is one. flops: of matrix products. read, written: bytes of its
    tensors. shapes: of its tensor arguments. bias: a convolution adds a bias in a kernel of its own.
    """

    name: str
    launches: tuple[str, ...]
    flops: int
    read: int
    written: int
    shapes: tuple[tuple[int, ...], ...]
    bias: bool = False


class Operations(TorchDispatchMode):
    """Lists the operations on tensors of the meta device; ours run their Triton forms, which compile nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours, name = func.namespace == NAMESPACE, func._opname
        if ours:
            with launches_on(ARCHITECTURE) as kernels, _Inner() as inner:
                result = implementation(name, "triton")(*args)
            launches = [*(kernel.function for kernel in kernels), *inner.found]
        else:
            result, launches = func(*args, **(kwargs or {})), [name]
            if name in _NOTHING:
                return result
        if name == "convolution":
            result = torch.empty_like(result, memory_format=torch.channels_last)  # as cuDNN returns it
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        count = flop_registry.get(func._overloadpacket)
        self.found.append(
            Operation(
                name,
                tuple(launches),
                0 if count is None else count(*args, **(kwargs or {}), out_val=result),
                sum(tensor.nbytes for tensor in tensors),
                sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor)),
                tuple(tuple(tensor.shape) for tensor in tensors),
                name == "convolution" and args[2] is not None,
            )
        )
        return result


class _Inner(TorchDispatchMode):
    """Lists what a form of ours calls of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname not in _NOTHING:
            self.found.append(func._opname)
        return func(*args, **(kwargs or {}))


class FullSize:
    """text-to-video-ms-1.7b's UNet and Stable Diffusion's VAE in float16, for one clip of 32 frames of 224x224."""

    @cached_property
    def unet(self) -> FastUNet:
        with torch.device("meta"):
            model = UNet3DConditionModel(**FULL_UNET)
        return FastUNet(model.half().eval().requires_grad_(False), _attention, for_gpu=True)

    @cached_property
    def vae(self) -> FastVAE:
        with torch.device("meta"):
            model = AutoencoderKL(**FULL_VAE)
        return FastVAE(model.half().eval().requires_grad_(False), _attention, for_gpu=True)

    @cached_property
    def constants(self) -> Constants:
        with torch.device("meta"):
            return self.unet.constants(torch.empty(1, TOKENS, 1024), torch.ones(6))

    def evaluate(self, *, first_frame: bool = False) -> Tensor:
        sample = _half(1, 4, FRAMES, SIDE // 8, SIDE // 8)
        return self.unet(sample, self.constants.texts, self.constants.embeddings[:1], first_frame=first_frame)

    def encode(self) -> Tensor:
        return self.vae.encode(_half(FRAMES, 3, SIDE, SIDE))

    def decode(self) -> Tensor:
        return self.vae.decode(_half(FRAMES, 4, SIDE // 8, SIDE // 8))


def operations_of(call: Callable[[], Any]) -> list[Operation]:
    """What a call does the second time: at the first it makes what follows from the weights."""
    with torch.no_grad():
        call()
        with Operations() as operations:
            call()
    return operations.found


def _half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.half, device="meta")


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as a single operation; on the meta device torch's own falls apart into its parts."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
