"""Changes of models: which a call sees, before its first result and after, and what it computes then."""

from __future__ import annotations

import copy
import functools
import timeit

import pytest
import torch
from conftest import build_purifier, clips, rebuilt
from diffusers import AutoencoderKL, UNet3DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from videopure_fast.models import state
from videopure_fast.models.state import StateWatch, departure
from videopure_fast.models.unet import FastUNet, PlainUNet
from videopure_fast.models.vae import FastVAE, PlainVAE

# What a user may do to a module, and that an evaluation over weights alone would not honor.


class Halved(AttnProcessor2_0):
    def __call__(self, *args, **options):
        return 0.5 * super().__call__(*args, **options)


class Linear(nn.Module):
    """A layer with a low-rank addition, of the same name as the one that it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(torch.full((1, base.in_features), 0.1), requires_grad=False)

    def forward(self, x):
        return self.base(x) + (x @ self.down.T)


class Doubled(ResnetBlock2D):
    def forward(self, *args, **options):
        return 2 * super().forward(*args, **options)


def attention(unet):
    return unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1


def replace_forward(module):
    own = module.forward
    module.forward = lambda *args, **options: own(*args, **options)


def replace_top_forward(unet):
    own = unet.forward

    def forward(*args, **options):
        result = own(*args, **options)
        result.sample = result.sample * 0.5
        return result

    unet.forward = forward


def replace_inner_forward(unet):
    own = unet.mid_block.resnets[0].forward
    unet.mid_block.resnets[0].forward = lambda *args, **options: own(*args, **options) * 0.5


def hook_the_result(unet):
    unet.register_forward_hook(lambda module, inputs, result: type(result)(result.sample * 0.5))


def hook_an_inner_module(unet):
    unet.mid_block.resnets[0].register_forward_hook(lambda module, inputs, result: result * 0.5)


def hook_the_inputs(unet):
    unet.conv_in.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))


def hook_the_gradients(unet):
    unet.conv_in.register_full_backward_hook(lambda module, gradients, others: None)


def wrap_a_linear(unet):
    attention(unet).to_q = Linear(attention(unet).to_q)


def change_a_class(unet):
    unet.mid_block.resnets[0].__class__ = Doubled


def cast_the_storage(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantize(unet):
    torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, dtype=torch.qint8, inplace=True)


def pad_in_circles(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


UNET_CHANGES = [
    hook_the_result,
    hook_an_inner_module,
    hook_the_inputs,
    hook_the_gradients,
    replace_top_forward,
    replace_inner_forward,
    wrap_a_linear,
    change_a_class,
    cast_the_storage,
    pad_in_circles,
    pytest.param(quantize, marks=pytest.mark.filterwarnings("ignore")),
    pytest.param(lambda unet: unet.set_attn_processor(Halved()), id="every processor"),
    pytest.param(lambda unet: attention(unet).set_processor(Halved()), id="one processor"),
    pytest.param(lambda unet: unet.enable_freeu(0.9, 0.2, 1.5, 1.6), id="FreeU"),
    pytest.param(lambda unet: unet.enable_forward_chunking(1, 1), id="chunks"),
    pytest.param(lambda unet: setattr(unet.conv_norm_out, "eps", 1.0), id="an epsilon"),
    pytest.param(lambda unet: setattr(attention(unet), "scale", 0.1), id="a scale"),
    pytest.param(lambda unet: setattr(unet.mid_block.resnets[0], "nonlinearity", nn.GELU()), id="an activation"),
    pytest.param(lambda unet: parametrizations.orthogonal(attention(unet).to_q), id="a parametrization"),
    pytest.param(lambda unet: weight_norm(unet.conv_in), id="a norm", marks=pytest.mark.filterwarnings("ignore")),
]


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
@pytest.mark.parametrize("change", UNET_CHANGES)
def test_a_changed_unet_runs_as_diffusers_runs_it(change):
    purifier, video = build_purifier(inversion_steps=0), clips(3, 4, 16, 16)
    for _ in range(3):  # the second is recorded, the third replayed
        purifier(video)
    assert isinstance(purifier._executor.unet, FastUNet)
    change(purifier.unet)
    expected = rebuilt(purifier, fast=False, capture=False)(video, return_votes=True)
    for one in (purifier, purifier, rebuilt(purifier)):  # the last meets the change before its first call
        torch.testing.assert_close(one(video, return_votes=True), expected, rtol=0, atol=2e-3)
        assert type(one._executor.unet) is PlainUNet


VAE_CHANGES = [
    pytest.param(lambda vae: vae.enable_slicing(), id="slices"),
    pytest.param(lambda vae: vae.enable_tiling(), id="tiles"),
    pytest.param(lambda vae: vae.decoder.register_forward_hook(lambda module, _, result: result * 0.5), id="a hook"),
    pytest.param(lambda vae: replace_forward(vae.encoder.mid_block), id="a forward"),
    pytest.param(lambda vae: vae.set_attn_processor(Halved()), id="processors"),
    pytest.param(lambda vae: setattr(vae.decoder.conv_out, "padding_mode", "reflect"), id="padding"),
]


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
@pytest.mark.parametrize("change", VAE_CHANGES)
def test_a_changed_vae_runs_as_diffusers_runs_it(change):
    purifier, video = build_purifier(inversion_steps=0), clips(3, 4, 16, 16)
    purifier(video)
    assert isinstance(purifier._executor.vae, FastVAE)
    change(purifier.vae)
    expected = rebuilt(purifier, fast=False, capture=False)(video, return_votes=True)
    for one in (purifier, rebuilt(purifier)):
        torch.testing.assert_close(one(video, return_votes=True), expected, rtol=0, atol=2e-3)
        assert type(one._executor.vae) is PlainVAE


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
def test_a_hook_runs_at_every_evaluation(monkeypatch):
    monkeypatch.setattr("videopure_fast.runtime.captures._replay_pays", lambda *_: True)
    purifier, video, calls = build_purifier(), clips(3, 4, 16, 16), []
    purifier.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        purifier(video)
    assert len(calls) == 4 * purifier.evaluations


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
def test_a_change_that_is_taken_back():
    purifier, video = build_purifier(), clips(3, 4, 16, 16)
    expected = purifier(video)
    handle = purifier.unet.conv_in.register_forward_hook(lambda *_: None)
    purifier.unet.enable_freeu(0.9, 0.2, 1.5, 1.6)
    purifier(video)
    handle.remove()
    purifier.unet.disable_freeu()
    assert torch.equal(purifier(video), expected) and isinstance(purifier._executor.unet, FastUNet)


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
def test_a_class_whose_forward_was_replaced(monkeypatch):
    purifier, video = build_purifier(), clips(3, 4, 16, 16)
    purifier(video)
    own = ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *args, **options: 0.5 * own(self, *args, **options))
    expected = rebuilt(purifier, fast=False)(video)
    torch.testing.assert_close(purifier(video), expected, rtol=0, atol=2e-3)
    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, latents: decode(self, 0.5 * latents))
    torch.testing.assert_close(purifier(video), rebuilt(purifier, fast=False)(video), rtol=0, atol=2e-3)


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_weights():
    purifier, video = build_purifier(), clips(3, 4, 16, 16)
    layer = attention(purifier.unet).to_q
    dense = layer.weight.detach()
    expected = purifier(video)
    layer.weight = nn.Parameter(dense.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(purifier(video), expected, rtol=0, atol=2e-3)


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
def test_a_wrapped_forward_of_a_class(monkeypatch):
    purifier, video = build_purifier(), clips(3, 4, 16, 16)
    purifier(video)
    own = ResnetBlock2D.forward
    halved = functools.wraps(own)(lambda self, *args, **options: 0.5 * own(self, *args, **options))
    monkeypatch.setattr(ResnetBlock2D, "forward", halved)
    for one in (purifier, rebuilt(purifier)):
        torch.testing.assert_close(one(video), rebuilt(purifier, fast=False)(video), rtol=0, atol=2e-3)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("model", ["unet", "vae"])
def test_models_that_are_assigned(model, used):
    purifier, video = build_purifier(), clips(3, 4, 16, 16)
    twin = purifier.with_config(spatial_weight=1.0)
    if used:
        purifier(video), twin(video)
    other = copy.deepcopy(getattr(purifier, model)).train().requires_grad_(True)
    scale_data(other.parameters())
    setattr(purifier, model, other)
    for one in (purifier, twin):
        assert torch.equal(one(video), rebuilt(one)(video))
    assert not other.training and not any(weight.requires_grad for weight in other.parameters())
    purifier.double()
    assert purifier.encode(video[None]).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
def test_models_stay_in_eval_mode():
    purifier, video = build_purifier(), clips(3, 4, 16, 16)
    purifier.unet.conv_in.register_forward_hook(lambda *_: None)
    expected = purifier(video)
    purifier.unet.train()
    purifier.vae.encoder.train()
    assert torch.equal(purifier(video), expected) and torch.equal(purifier(video), expected)
    assert not any(module.training for module in purifier.modules())


@pytest.mark.filterwarnings("ignore:.*diffusers' own forward")
def test_hooks_for_every_module():
    purifier, video, calls = build_purifier(), clips(3, 4, 16, 16), []
    purifier(video)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        purifier(video)
    finally:
        handle.remove()
    assert calls.count(purifier.unet.conv_in) == purifier.evaluations


def test_the_warning_says_what_departs():
    purifier = build_purifier()
    attention(purifier.unet).set_processor(Halved())
    with pytest.warns(UserWarning, match="UNet3DConditionModel: .*attn1 has processor set to .*Halved"):
        purifier(clips(3, 4, 16, 16))


def test_what_changes_no_result_departs_in_nothing():
    purifier = build_purifier()
    unet = purifier.unet
    unet.set_attn_processor(AttnProcessor())
    unet.down_blocks[0].gradient_checkpointing = True
    unet.train()
    assert departure(unet) is None and departure(copy.deepcopy(purifier.vae)) is None


# Values


def scale_data(parameters):
    for parameter in parameters:
        parameter.data.mul_(1.05)


def scale_one(parameters):
    parameters[-1].data.mul_(1.05)


def add_low_rank(parameters):
    weight = next(parameter for parameter in parameters if parameter.ndim == 2)
    weight.data += torch.ones(len(weight), 1) @ torch.full((1, weight.shape[1]), 0.01)


def average(parameters):
    ema = EMAModel(parameters, decay=0.5)
    for shadow in ema.shadow_params:
        shadow.mul_(0.9)
    ema.copy_to(parameters)


def write_through_numpy(parameters):
    parameters[0].detach().numpy()[...] *= 1.05


VALUE_CHANGES = [scale_data, scale_one, add_low_rank, average, write_through_numpy]


@pytest.mark.parametrize("model", ["unet", "vae"])
@pytest.mark.parametrize("change", VALUE_CHANGES, ids=lambda change: change.__name__)
def test_values_that_no_version_counts(change, model):
    used, fresh, video = *(build_purifier(inversion_steps=0) for _ in range(2)), clips(3, 4, 16, 16)
    for _ in range(3):
        before = used(video, return_votes=True)
    for purifier in (used, fresh):
        change(list(getattr(purifier, model).parameters()))
    after = used(video, return_votes=True)
    assert torch.equal(after, fresh(video, return_votes=True)) and not torch.equal(after, before)


def test_a_refresh_sees_what_samples_do_not():
    used, fresh, video = build_purifier(), build_purifier(), clips(3, 4, 16, 16)
    used(video)
    for purifier in (used, fresh):
        purifier.unet.conv_in.weight.data.view(-1)[-1] += 1
    used.refresh()
    assert torch.equal(used(video), fresh(video))


@pytest.mark.parametrize("config", [{}, {"method": "ddim"}, {"feedback": True}], ids=str)
def test_a_change_that_is_read_back_late_is_computed_again(config, monkeypatch):
    """As on a GPU, where the samples are compared while the host goes on."""
    own = state._Samples.differ
    monkeypatch.setattr(state._Samples, "differ", lambda samples: torch.tensor(own(samples)))
    used, fresh, video = build_purifier(**config), build_purifier(**config), clips(3, 4, 16, 16)
    used(video)
    for purifier in (used, fresh):
        scale_data(purifier.unet.parameters())
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    results = [one(video, generator=generator) for one, generator in zip((used, fresh), generators, strict=True)]
    assert torch.equal(*results)
    assert generators[0].get_state().equal(generators[1].get_state())
    latents = used.encode(video[None])
    scale_data(used.vae.parameters())
    scale_data(fresh.vae.parameters())
    assert torch.equal(used.encode(video[None]), fresh.encode(video[None]))
    assert not torch.equal(used.encode(video[None]), latents)


def test_a_twin_sees_what_its_other_has_seen():
    purifier, video = build_purifier(prompts=2, cfg_inversion=2.0), clips(3, 4, 16, 16)
    twin = purifier.with_config(spatial_weight=1.0)
    purifier(video), twin(video)
    purifier.negative_prompt_embeds = purifier.prompt_embeds.clone()
    fresh = build_purifier(prompts=2, cfg_inversion=2.0)
    fresh.negative_prompt_embeds = fresh.prompt_embeds.clone()
    twin(video)
    assert torch.equal(purifier(video), fresh(video))


def test_weights_in_memory_of_any_order():
    module = nn.Linear(4, 6)
    module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)  # columns lie beside one another
    module.bias = nn.Parameter(torch.zeros(1).expand(6))  # one value in memory
    module.register_buffer("empty", torch.empty(0, 3))
    watch = StateWatch([module])
    assert [watch.look().changed, watch.look().changed] == [True, False]
    module.weight.data[5, 3] = 7  # the last
    assert [watch.look().changed, watch.look().changed] == [True, False]
    module.bias.data[:1] += 1
    assert [watch.look().changed, watch.look().changed] == [True, False]


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        module = nn.Linear(4, 6)
    watch = StateWatch([module])
    assert [watch.look().changed, watch.look().changed] == [True, False]
    with torch.inference_mode():
        module.weight.mul_(2)
    assert watch.look().changed


def test_a_look_at_as_many_weights_as_a_full_size_model_has():
    narrow = {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": 32}
    unet = UNet3DConditionModel(**narrow).eval()
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 64, 128, 128],
        layers_per_block=2,
    )
    assert len([*unet.parameters(), *vae.parameters()]) == 1728 and len([*unet.modules(), *vae.modules()]) == 1901
    watch = StateWatch((unet, vae))
    assert watch.look().changed and not watch.look().changed
    walk = min(timeit.repeat(lambda: [*unet.parameters(), *vae.parameters()], number=1, repeat=20))
    look = min(timeit.repeat(watch.look, number=1, repeat=20))
    assert look < 1.2 * walk
