"""What a full-size purification costs on a GPU, counted on the meta device: products, launches, and nothing wasted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from videopure_fast.models.unet import Constants, FastUNet
from videopure_fast.models.vae import FastVAE
from videopure_fast.ops.backend import implementation

triton = pytest.importorskip("triton")

FRAMES, SIDE = 32, 224
# Operations that launch nothing.
VIEWS = {
    "view",
    "permute",
    "transpose",
    "t",
    "unbind",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "expand",
    "alias",
}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach", "_reshape_alias"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch: an operation of torch's once, one of ours as often as its Triton form launches.

    What a library launches within an operation is left out. counts: by operation, or kernel of ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.biases = 0  # of convolutions, that a kernel of its own adds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "videopure_fast":
            return self._ours(func._opname, args)
        result = func(*args, **(kwargs or {}))
        if func._opname == "convolution":
            self.biases += args[2] is not None
            result = torch.empty_like(result, memory_format=torch.channels_last)  # as cuDNN returns it
        if func._opname not in VIEWS | ALLOCATIONS:
            self.counts[func._opname] += 1
        return result

    def _ours(self, op: str, arguments: tuple[Any, ...]) -> Any:
        """The op's Triton form on meta tensors, whose launches are recorded in place of compiled."""

        def record(*, fn: Any, **_: Any) -> bool:
            self.counts[f"{op}: {fn.name}"] += 1
            return True

        triton.knobs.runtime.jit_cache_hook = record
        try:
            with self:
                return implementation(op, "triton")(*arguments)
        finally:
            triton.knobs.runtime.jit_cache_hook = None


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes this machine's GPU for one of sm_90, whether there is one or not."""
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as a single operation; on the meta device torch's own falls apart into its parts."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@pytest.fixture(scope="module")
def vae() -> FastVAE:
    levels = 4
    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
        )
    return FastVAE(model.half().eval().requires_grad_(False), attention)


@pytest.fixture(scope="module")
def unet() -> FastUNet:
    with torch.device("meta"):
        model = UNet3DConditionModel()
    return FastUNet(model.half().eval().requires_grad_(False), attention)


@pytest.fixture(scope="module")
def constants(unet: FastUNet) -> Constants:
    with torch.device("meta"):
        return unet.constants(torch.empty(1, 77, 1024), torch.ones(6))


@contextmanager
def launches_of(call: Callable[[], Any]) -> Iterator[Launches]:
    """What the second call launches: the first makes what follows from the weights."""
    with torch.no_grad():
        call()
        with Launches() as launches:
            call()
    yield launches


def evaluation(unet: FastUNet, constants: Constants, *, first_frame: bool = False) -> Tensor:
    sample = torch.empty(1, 4, FRAMES, SIDE // 8, SIDE // 8, dtype=torch.half, device="meta")
    return unet(sample, constants.texts, constants.embeddings[:1], first_frame=first_frame)


def decoded(vae: FastVAE) -> Tensor:
    return vae.decode(torch.empty(FRAMES, 4, SIDE // 8, SIDE // 8, dtype=torch.half, device="meta"))


def encoded(vae: FastVAE) -> Tensor:
    return vae.encode(torch.empty(FRAMES, 3, SIDE, SIDE, dtype=torch.half, device="meta"))


def test_products_of_a_purification(vae, unet, constants):
    """32 frames of 224x224 at depth 5: encode, 6 evaluations each way, 7 decodes. As the paper has it, 296 TFLOP."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoded(vae)
        for _ in range(6):
            evaluation(unet, constants, first_frame=True)
            evaluation(unet, constants)
        for _ in range(7):
            decoded(vae)
    assert 180e12 <= counter.get_total_flops() <= 187e12
