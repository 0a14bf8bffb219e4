"""The executor of a purifier's models: which forms it takes, when it makes them anew, and what it says."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY_DECODER, build_purifier, clips, rebuilt
from diffusers import AutoencoderTiny

from videopure_fast import Purifier
from videopure_fast.models.executor import ModelExecutor
from videopure_fast.models.unet import FastUNet, PlainUNet
from videopure_fast.models.vae import FastVAE


def test_fast_and_plain_forms_agree(purifier):
    plain = rebuilt(purifier, fast=False)
    video = clips(2, 3, 5, 18, 16)
    expected = plain.double()(video.double(), return_votes=True)
    torch.testing.assert_close(purifier(video.double(), return_votes=True), expected, rtol=0, atol=1e-9)
    assert isinstance(purifier._executor.unet, FastUNet) and isinstance(purifier._executor.vae, FastVAE)
    assert isinstance(plain._executor.unet, PlainUNet)


def test_an_unknown_model_runs_in_diffusers_own_forward_with_one_warning(purifier):
    expected = purifier(clips(3, 4, 16, 16))
    purifier.unet.enable_forward_chunking(1, 1)
    odd = rebuilt(purifier)
    with pytest.warns(
        UserWarning, match="UNet3DConditionModel: .*_chunk_dim set to 1; diffusers' own forward runs"
    ) as seen:
        torch.testing.assert_close(odd(clips(3, 4, 16, 16)), expected, rtol=0, atol=1e-2)
        odd(clips(3, 4, 16, 16))
    assert len(seen) == 1
    assert isinstance(odd._executor.unet, PlainUNet) and isinstance(odd._executor.vae, FastVAE)


def test_changed_weights_are_read_anew(purifier):
    video = clips(3, 4, 16, 16)
    before = purifier(video)
    with torch.no_grad():
        for parameter in purifier.vae.decoder.parameters():
            parameter.mul_(0.5)
    after = purifier(video)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, rebuilt(purifier)(video), rtol=0, atol=0)


def replace_weight(purifier):
    conv = purifier.unet.conv_in
    conv.weight = torch.nn.Parameter(conv.weight.detach(), requires_grad=False)  # the same values in the same memory


def replace_data(purifier):
    purifier.vae.post_quant_conv.bias.data = purifier.vae.post_quant_conv.bias.detach().clone()


def reinterpret_data(purifier):
    weight = purifier.unet.conv_out.weight
    weight.data = weight.detach().view(torch.int32)


def load_weights(purifier):
    purifier.unet.load_state_dict(purifier.unet.state_dict())


def write_one_value(purifier):
    purifier.unet.mid_block.resnets[0].norm1.weight[0] = 2


def replace_module(purifier):
    purifier.unet.up_blocks[0].resnets[0] = copy.deepcopy(purifier.unet.up_blocks[0].resnets[0])


def replace_module_without_weights(purifier):
    purifier.unet.conv_act = torch.nn.GELU()


def add_module(purifier):
    purifier.vae.decoder.mid_block.attentions.append(torch.nn.Identity())


def add_weight(purifier):
    purifier.unet.conv_out.extra = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


def remove_bias(purifier):
    purifier.unet.conv_out.bias = None


def write_prompt(purifier):
    purifier.prompt_embeds.mul_(2)


CHANGES = [
    replace_weight,
    replace_data,
    reinterpret_data,
    load_weights,
    write_one_value,
    replace_module,
    replace_module_without_weights,
    add_module,
    add_weight,
    remove_bias,
    write_prompt,
    Purifier.double,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen_once(purifier, change):
    executor = ModelExecutor(purifier.unet, purifier.vae)
    look = lambda: executor.refresh((purifier.prompt_embeds,)).changed  # noqa: E731
    assert [look(), look()] == [True, False]
    before = executor.unet
    assert executor.unet is before
    change(purifier)
    assert [look(), look(), look()] == [True, False, False]


def test_a_call_never_lets_diffusers_search_its_modules(purifier, monkeypatch):
    """diffusers finds the device and the dtype of a model in milliseconds, where the model is large."""
    video = clips(2, 3, 20, 16, 18)  # windows of two lengths
    purifier(video, return_votes=True)
    searched = []
    for model in (purifier.unet, purifier.vae):
        for name in ("device", "dtype"):
            found = getattr(model, name)
            monkeypatch.setattr(type(model), name, property(lambda _, n=name, f=found: searched.append(n) or f))
    for options in ({}, {"return_votes": True}, {"capture": False}):
        purifier(video, **options)
    purifier.denoise(purifier.encode(clips(1, 3, 4, 16, 16)))
    assert not searched
    with torch.no_grad():
        purifier.unet.conv_in.weight.add_(1)
    purifier(video)
    assert {"device", "dtype"} <= set(searched)  # after a change


def test_the_forms_follow_a_cast(purifier):
    assert purifier.double().encode(clips(1, 3, 4, 16, 16)).dtype == torch.float64
    assert purifier._executor.dtype == purifier._executor.vae_dtype == torch.float64
    assert purifier.half().encode(clips(1, 3, 4, 16, 16)).dtype == torch.float32
    assert purifier._executor.unet.dtype == torch.float16 and purifier._executor.device == torch.device("cpu")


def test_nothing_made_in_inference_mode_shuts_gradients_out(purifier):
    video = clips(1, 3, 4, 16, 16)
    with torch.inference_mode():
        latents = purifier.encode(video)
        purifier.denoise(latents)
    video.requires_grad_()
    purifier(video).sum().backward()
    assert video.grad.abs().sum() > 0


def test_a_copy_works_and_shares_nothing_made(purifier):
    video = clips(3, 4, 16, 16)
    expected = purifier(video)
    twin = copy.deepcopy(purifier)
    assert twin._executor is not purifier._executor and twin.unet is not purifier.unet
    assert torch.equal(twin(video), expected)
    with torch.no_grad():
        twin.unet.conv_in.weight.zero_()
    assert not torch.equal(twin(video), expected)
    assert torch.equal(purifier(video), expected)


def test_a_tiny_decoder_decodes_in_the_place_of_the_vae(purifier):
    torch.manual_seed(0)
    decoder = AutoencoderTiny(**TINY_DECODER).eval()
    lossy = rebuilt(purifier, decoder=decoder)
    video = clips(2, 3, 4, 16, 18)
    assert lossy(video, return_votes=True).shape == (2, 3, 3, 4, 16, 18)
    latents = lossy.encode(clips(1, 3, 4, 16, 16))
    expected = (decoder.decode(latents[0].transpose(0, 1)).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(lossy.decode(latents)[0].transpose(0, 1), expected)
    assert lossy.double().decoder.dtype == torch.float64


@pytest.mark.parametrize(
    ("decoder", "error", "message"),
    [
        (AutoencoderTiny(), ValueError, "the VAE has 2 levels, the decoder 4"),
        (AutoencoderTiny(**TINY_DECODER, latent_channels=3), ValueError, "4 latent channels, the decoder 3"),
        (torch.nn.Identity(), TypeError, "decoder must be a diffusers AutoencoderTiny, got Identity"),
    ],
)
def test_decoders_of_other_latents_are_refused(purifier, decoder, error, message):
    with pytest.raises(error, match=message):
        rebuilt(purifier, decoder=decoder)


def test_a_decoder_is_loaded_from_a_folder(tmp_path):
    AutoencoderTiny(**TINY_DECODER).save_pretrained(tmp_path / "decoder")
    purifier = Purifier.from_pretrained("tiny", device="cpu", decoder=tmp_path / "decoder")
    assert type(purifier.decoder).__name__ == "AutoencoderTiny"
    with pytest.raises(ValueError, match="cannot be read"):
        Purifier.from_pretrained("tiny", device="cpu", decoder=tmp_path)


def test_attention_is_chosen_by_name(purifier):
    with pytest.raises(ValueError, match="unknown attention 'flash'; accepted: 'sdpa', 'xformers'"):
        rebuilt(purifier, attention="flash")
    try:
        import xformers  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'videopure-fast\[xformers\]'"):
            rebuilt(purifier, attention="xformers")


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_no_result(purifier, chunk):
    video = clips(2, 3, 5, 16, 16).double()
    expected = purifier.double()(video)
    assert purifier._frames_at_once(16, 16) > 2 * 5 * 3 and purifier._frames_at_once(2048, 2048) == 1
    chunked = build_purifier(dtype=torch.float64, decode_chunk=chunk)
    torch.testing.assert_close(chunked(video), expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_a_captured_graph_replays_bit_for_bit():
    purifier = build_purifier().cuda()
    video = clips(2, 3, 5, 16, 18).cuda()
    eager = purifier(video, return_votes=True, capture=False)
    first, second = (purifier(video, return_votes=True) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, eager, rtol=0, atol=2e-3)  # where a residual is near zero its sign may turn
    other = purifier(clips(2, 3, 5, 16, 18, seed=1).cuda(), return_votes=True)
    assert not torch.equal(other, first)
    assert len(purifier._captures.made) == 1 and None not in purifier._captures.made.values()
