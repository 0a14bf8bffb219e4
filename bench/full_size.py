"""The full-size models on the meta device, and what their evaluation would launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from videopure_fast.models.unet import Constants, FastUNet
from videopure_fast.models.vae import FastVAE
from videopure_fast.ops.backend import NAMESPACE, implementation

FRAMES, SIDE = 32, 224
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
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
            with _recorded_launches() as launches, _Inner(launches):
                result = implementation(name, "triton")(*args)
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
    """Adds what a form of ours calls of torch's to its launches."""

    def __init__(self, launches: list[str]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname not in _NOTHING:
            self._launches.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextmanager
def _recorded_launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched in this block, as on a GPU of sm_90; none is compiled or runs."""
    found: list[str] = []

    def record(*, fn: Any, **_: Any) -> bool:
        found.append(fn.name)
        return True  # tells Triton not to compile

    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    config, knobs = triton.runtime.driver, triton.knobs.runtime
    before = config._active, knobs.jit_cache_hook
    config._active, knobs.jit_cache_hook = driver, record
    try:
        yield found
    finally:
        config._active, knobs.jit_cache_hook = before


class FullSize:
    """text-to-video-ms-1.7b's UNet and Stable Diffusion's VAE in float16, for one clip of 32 frames of 224x224."""

    @cached_property
    def unet(self) -> FastUNet:
        with torch.device("meta"):
            model = UNet3DConditionModel()
        return FastUNet(model.half().eval().requires_grad_(False), _attention, for_gpu=True)

    @cached_property
    def vae(self) -> FastVAE:
        with torch.device("meta"):
            model = AutoencoderKL(**VAE)
        return FastVAE(model.half().eval().requires_grad_(False), _attention, for_gpu=True)

    @cached_property
    def constants(self) -> Constants:
        with torch.device("meta"):
            return self.unet.constants(torch.empty(1, 77, 1024), torch.ones(6))

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
