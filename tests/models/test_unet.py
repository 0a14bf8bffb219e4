"""FastUNet and FastVAE against diffusers' modules: values, gradients, and what they cost at full size."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import UNET, VAE
from diffusers import AutoencoderKL, UNet3DConditionModel, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch.utils._python_dispatch import TorchDispatchMode

from videopure_fast.models.layers import Unsupported
from videopure_fast.models.unet import FastMotionUNet, FastUNet
from videopure_fast.models.vae import FastVAE
from videopure_fast.ops.backend import full_float32, use_backend

# Relative to 1 + |reference|.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
UNETS = {
    "two levels": {},
    "three levels": {
        "down_block_types": ["CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"],
        "block_out_channels": [8, 16, 16],
        "layers_per_block": 2,
    },
    "no attention at the top": {
        "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D"],
        "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D"],
    },
    "odd settings": {"downsample_padding": 0, "mid_block_scale_factor": 2.0, "attention_head_dim": 8, "norm_eps": 1e-3},
}
VAES = {
    "plain": {},
    "no middle attention": {"mid_block_add_attention": False},
    "no quantization": {"use_quant_conv": False, "use_post_quant_conv": False, "layers_per_block": 2},
}


@pytest.fixture(autouse=True)
def exact_products():
    """A purifier calls these forms within its own block; convolutions on a GPU are TF32 outside."""
    with full_float32(torch.device("cpu")):
        yield


def redrawn(model: torch.nn.Module) -> torch.nn.Module:
    """Frozen, and without layers that start at zero and would hide what stands before them."""
    for parameter in model.parameters():
        if parameter.count_nonzero() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def build_unet(**config) -> UNet3DConditionModel:
    torch.manual_seed(0)
    return redrawn(UNet3DConditionModel(**{**UNET, **config}))


def build_vae(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return redrawn(AutoencoderKL(**{**VAE, **config}))


def prompt(tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, tokens, UNET["cross_attention_dim"], generator=torch.Generator().manual_seed(1)).to(dtype)


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def evaluate(unet, sample, timesteps, embeds, *, for_gpu=None, **options):
    fast = FastUNet(unet, for_gpu=for_gpu)
    constants = fast.constants(embeds, timesteps)
    return fast(sample, constants.texts, constants.embeddings, **options)


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert ((actual - expected).abs() / (1 + expected.abs())).max() <= TOLERANCE[dtype]


# Both arrangements run anywhere, by the ops' references where there is no GPU.
both_arrangements = pytest.mark.parametrize("for_gpu", [False, True], ids=["as on a CPU", "as on a GPU"])


@both_arrangements
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shape", [(2, 4, 3, 8, 8), (1, 4, 5, 7, 9), (3, 4, 2, 4, 6)], ids=str)
@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_equals_diffusers(config, shape, tokens, dtype, for_gpu, device):
    unet = build_unet(**config).to(device, dtype)
    sample, embeds = noise(*shape, dtype=dtype).to(device), prompt(tokens, dtype).to(device)
    timesteps = torch.tensor([1, 41, 101][: shape[0]], device=device)  # each clip at its own
    expected = unet(sample, timesteps, embeds.expand(len(sample), -1, -1)).sample
    assert_close(evaluate(unet, sample, timesteps, embeds, for_gpu=for_gpu), expected, dtype)
    first = evaluate(unet, sample, timesteps, embeds, for_gpu=for_gpu, first_frame=True)
    assert_close(first, expected[:, :, :1], dtype)


@both_arrangements
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_equals_diffusers(config, dtype, for_gpu, device):
    vae = build_vae(**config).to(device, dtype)
    fast = FastVAE(vae, for_gpu=for_gpu)
    images = noise(3, 3, 16, 12, dtype=dtype).to(device)
    latents = vae.encode(images).latent_dist.mode()
    assert_close(fast.encode(images), latents, dtype)
    assert_close(fast.decode(latents), vae.decode(latents).sample, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 3, 8, 8), (1, 4, 5, 4, 6)], ids=str)
def test_motion_unet_equals_diffusers(shape, dtype, device):
    """AnimateDiff's UNet, its motion modules by our ops; the caller's model stays as it is."""
    torch.manual_seed(0)
    config = {
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        **{"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8},
        **{"num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 6},
    }
    unet = redrawn(UNetMotionModel(**config)).to(device, dtype)
    kinds = [type(module) for module in unet.modules()]
    sample, embeds = noise(*shape, dtype=dtype).to(device), prompt(3, dtype).to(device)
    timesteps = torch.tensor([1, 41][: shape[0]], device=device)
    expected = unet(sample, timesteps, embeds.expand(shape[0] * shape[2], -1, -1)).sample
    fast = FastMotionUNet(unet)
    constants = fast.constants(embeds, timesteps)
    with Calls() as calls:
        assert_close(fast(sample, constants.texts, constants.embeddings), expected, dtype)
    assert calls.counts[torch.ops.videopure_fast.norm_temporal_attention.default] == 2 * kinds.count(
        AnimateDiffTransformer3D
    )
    assert [type(module) for module in unet.modules()] == kinds


def test_a_batch_equals_its_clips():
    unet = build_unet().double()
    sample, timesteps = noise(3, 4, 4, 6, 5), torch.tensor([1, 61, 21])
    together = evaluate(unet, sample, timesteps, prompt(3))
    for i in range(3):
        alone = evaluate(unet, sample[i : i + 1], timesteps[i : i + 1], prompt(3))
        assert_close(together[i : i + 1], alone, torch.float64)


@both_arrangements
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_good_as_diffusers(dtype, for_gpu, device):
    unet, vae = build_unet(), build_vae()
    sample, timesteps, embeds = noise(2, 4, 4, 8, 8), torch.tensor([21, 81]), prompt(3)
    images, latents = noise(8, 3, 16, 16), noise(8, 4, 8, 8)
    with torch.no_grad():
        truths = [
            unet.double()(sample, timesteps, embeds.expand(2, -1, -1)).sample,
            vae.double().encode(images).latent_dist.mode(),
            vae.decode(latents).sample,
        ]
        unet.to(device, dtype), vae.to(device, dtype)
        sample, embeds, images, latents = (t.to(device, dtype) for t in (sample, embeds, images, latents))
        timesteps = timesteps.to(device)
        theirs = [
            unet(sample, timesteps, embeds.expand(2, -1, -1)).sample,
            vae.encode(images).latent_dist.mode(),
            vae.decode(latents).sample,
        ]
        fast = FastVAE(vae, for_gpu=for_gpu)
        ours = [
            evaluate(unet, sample, timesteps, embeds, for_gpu=for_gpu),
            fast.encode(images),
            fast.decode(latents),
        ]
    for truth, their, our in zip(truths, theirs, ours, strict=True):
        assert our.dtype == dtype
        their_error, our_error = ((x.cpu().double() - truth).square().mean().sqrt() for x in (their, our))
        assert our_error <= 1.25 * their_error


@both_arrangements
def test_gradients_equal_diffusers(for_gpu):
    unet, vae = build_unet().double(), build_vae().double()
    sample, timesteps = noise(2, 4, 3, 6, 5).requires_grad_(), torch.tensor([1, 41])
    images = noise(2, 3, 16, 12).requires_grad_()
    fast = FastVAE(vae, for_gpu=for_gpu)
    pairs = [
        (
            sample,
            unet(sample, timesteps, prompt(3).expand(2, -1, -1)).sample,
            evaluate(unet, sample, timesteps, prompt(3), for_gpu=for_gpu),
        ),
        (images, vae.encode(images).latent_dist.mode(), fast.encode(images)),
        (images, vae.decode(noise(2, 4, 4, 6) + images.mean()).sample, fast.decode(noise(2, 4, 4, 6) + images.mean())),
    ]
    for source, theirs, ours in pairs:
        weight = noise(*theirs.shape, seed=5)
        (expected,) = torch.autograd.grad((weight * theirs).sum(), source)
        (actual,) = torch.autograd.grad((weight * ours).sum(), source)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda unet: unet.enable_freeu(1, 1, 1.2, 1.4), "b1 set to 1.2"),
        (lambda unet: unet.enable_forward_chunking(1, 1), "_chunk_dim set to 1"),
        (lambda unet: unet.conv_in.register_forward_hook(lambda *_: None), "hooks"),
        (
            lambda unet: setattr(unet, "conv_in", torch.nn.utils.parametrizations.weight_norm(unet.conv_in)),
            "parametrizations",
        ),
        (lambda unet: setattr(unet.mid_block.resnets[0], "nonlinearity", torch.nn.GELU()), "nonlinearity is a"),
        (lambda unet: unet.fuse_qkv_projections(), "to_qkv is more"),
    ],
)
def test_what_it_does_not_know_it_refuses(change, reason):
    unet = build_unet()
    change(unet)
    with pytest.raises(Unsupported, match=reason):
        FastUNet(unet)


def test_vae_refuses_what_it_does_not_know():
    vae = build_vae()
    vae.enable_slicing()
    with pytest.raises(Unsupported, match="slicing"):
        FastVAE(vae)


class Calls(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def test_nothing_is_permuted_in_memory():
    """On real tensors: the meta device does not model the layout of a convolution's result."""
    unet, vae = build_unet(), FastVAE(build_vae())
    fast = FastUNet(unet)
    constants = fast.constants(prompt(3, torch.float32), torch.tensor([1]))
    images = noise(8, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad(), use_backend("cpu"), Calls() as calls:
        fast(noise(1, 4, 8, 8, 8, dtype=torch.float32), constants.texts, constants.embeddings)
        vae.decode(vae.encode(images))
    assert not [func for func in calls.counts if func._opname in ("clone", "copy_", "contiguous", "_to_copy")]
