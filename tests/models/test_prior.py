"""Loading as Hugging Face users know it, and folders that anybody may have written."""

import json
import math
import os
import shutil
import struct
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_DECODER, build_purifier, clips
from diffusers import AutoencoderTiny, DDIMScheduler, UNetMotionModel
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from videopure_fast import Purifier, PurifyConfig
from videopure_fast.models.hub import commit_hash, pick_weights

COMMITS = {"main": "0123456789abcdef" * 2 + "01234567", "v2": "fedcba9876543210" * 2 + "fedcba98"}
SHARDED = "diffusion_pytorch_model-00001-of-00002"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A prior's folder; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "prior"
    build_purifier(flow="none").save_pretrained(folder)
    return folder


@pytest.fixture
def prior(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "prior")


@pytest.fixture
def cache(saved, tmp_path):
    """A folder laid out as the hub's cache, with two revisions of a repository that differ in their max_frames."""
    repository = tmp_path / "cache" / "models--someone--model"
    for frames, (revision, commit) in enumerate(COMMITS.items(), 4):
        snapshot = shutil.copytree(saved, repository / "snapshots" / commit)
        edit(snapshot / "purifier.json", max_frames=frames)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return tmp_path / "cache"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(path, change):
    """Save other tensors in a file's place: those that `change` makes of its own."""
    tensors = load_file(path)
    save_file(change(tensors), path)


def refusal(folder, error=ValueError, **arguments):
    """What `from_pretrained` says, in one line, in a second of processor time: others may use the cores as well."""
    began = time.process_time()
    with pytest.raises(error) as caught:
        Purifier.from_pretrained(folder, device="cpu", **arguments)
    assert time.process_time() - began < 1
    assert "\n" not in str(caught.value) and "unsafe" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


# The hub


def test_a_cached_revision_is_loaded_without_network(cache):
    where = {"cache_dir": cache, "local_files_only": True, "device": "cpu"}
    main = Purifier.from_pretrained("someone/model", **where)
    assert (main.max_frames, main.commit_hash) == (4, COMMITS["main"])
    tagged = Purifier.from_pretrained("someone/model", revision="v2", **where)
    assert (tagged.max_frames, tagged.commit_hash) == (5, COMMITS["v2"])
    by_commit = Purifier.from_pretrained("someone/model", revision=COMMITS["v2"], **where)
    assert by_commit.commit_hash == COMMITS["v2"] and by_commit.with_config(inversion_steps=0).commit_hash
    folder = cache / "models--someone--model" / "snapshots" / COMMITS["v2"]
    assert Purifier.from_pretrained(folder, device="cpu").commit_hash == COMMITS["v2"]


def test_what_is_not_cached_is_named(cache, tmp_path):
    where = {"cache_dir": cache, "local_files_only": True}
    assert "revision 'v3' is not in the cache" in refusal("someone/model", FileNotFoundError, revision="v3", **where)
    assert "local_files_only" in refusal("someone/other", FileNotFoundError, **where)
    elsewhere = {"cache_dir": tmp_path / "empty", "local_files_only": True}
    assert "not in the cache" in refusal("someone/model", FileNotFoundError, **elsewhere)
    shutil.rmtree(cache / "models--someone--model" / "snapshots" / COMMITS["v2"] / "vae")  # of a broken download
    assert "no vae/config.json" in refusal("someone/model", revision="v2", **where)


def test_the_hub_is_asked_as_the_caller_says(cache, monkeypatch, tmp_path):
    asked = []

    def model_info(self, name, **options):
        asked.append((name, options))
        files = ["unet/config.json", f"unet/{WEIGHTS}", "unet/diffusion_pytorch_model.fp16.safetensors"]
        files += [f"vae/{WEIGHTS}", "vae/diffusion_pytorch_model.bin", "text_encoder/model.safetensors", "README.md"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(cache / "models--someone--model" / "snapshots" / COMMITS["main"])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    given = {"revision": "refs/pr/3", "token": "a token", "cache_dir": tmp_path}
    purifier = Purifier.from_pretrained("someone/model", device="cpu", **given)
    (listed, listing), (downloaded, download) = asked
    assert listed == downloaded == "someone/model" and purifier.commit_hash == COMMITS["main"]
    assert {key: listing[key] for key in ("revision", "token")} == {"revision": "refs/pr/3", "token": "a token"}
    assert {key: download[key] for key in given} == given
    weights = [name for name in download["allow_patterns"] if name.endswith((".safetensors", ".bin"))]
    assert sorted(weights) == [
        "prompt_embeds.safetensors",
        "text_encoder/model.safetensors",
        f"unet/{WEIGHTS}",
        f"vae/{WEIGHTS}",
    ]
    assert "a token" not in repr(purifier.__dict__)
    with pytest.raises(
        ValueError, match=r"someone/model/unet has no weights of variant 'int8'; there are: 'fp16', none"
    ):
        Purifier.from_pretrained("someone/model", device="cpu", variant="int8")
    asked.clear()
    with pytest.raises(ValueError, match="variant 'fp16'"):  # what came has none
        Purifier.from_pretrained("someone/model", device="cpu", variant="fp16")
    weights = [name for name in asked[1][1]["allow_patterns"] if name.startswith(("unet/d", "vae/d"))]
    assert weights == ["unet/diffusion_pytorch_model.fp16.safetensors", f"vae/{WEIGHTS}"]


def test_without_network_an_earlier_download_serves(cache, monkeypatch):
    def no_network(self, name, **options):
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    assert Purifier.from_pretrained("someone/model", device="cpu", cache_dir=cache).commit_hash == COMMITS["main"]
    assert "no route to host" in refusal("someone/other", FileNotFoundError, cache_dir=cache)
    assert "no route to host" in refusal(
        cache / "models--someone--model" / "snapshots" / COMMITS["main"],
        FileNotFoundError,
        decoder="taesd",
        cache_dir=cache,
    )


def test_a_decoder_of_a_repository_has_the_callers_cache(cache, saved):
    snapshot = cache / "models--someone--decoder" / "snapshots" / COMMITS["v2"]
    AutoencoderTiny(**TINY_DECODER).save_pretrained(snapshot)
    refs = cache / "models--someone--decoder" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMITS["v2"])
    where = {"cache_dir": cache, "local_files_only": True, "device": "cpu"}
    purifier = Purifier.from_pretrained(saved, decoder="someone/decoder", **where)
    assert type(purifier.decoder) is AutoencoderTiny and purifier.commit_hash is None
    both = Purifier.from_pretrained("someone/model", revision="v2", decoder="someone/decoder", **where)
    assert both.decoder is not None and both.commit_hash == COMMITS["v2"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"revision": ""}, ValueError, "revision"),
        ({"revision": "../../etc"}, ValueError, "revision"),
        ({"revision": None}, ValueError, "revision"),
        ({"variant": "../fp16"}, ValueError, "variant"),
        ({"variant": 16}, TypeError, "variant"),
        ({"token": 5}, TypeError, "token must be of type str"),
        ({"cache_dir": 5}, TypeError, "cache_dir"),
        ({"local_files_only": "yes"}, TypeError, "local_files_only"),
        ({"local_files_only": None}, TypeError, "local_files_only"),
        ({"dtype": torch.float32, "torch_dtype": torch.float16}, ValueError, "torch_dtype, its other name"),
        ({"torch_dtype": "auto"}, ValueError, "dtype must be torch.float16"),
    ],
)
def test_bad_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Purifier.from_pretrained("tiny", device="cpu", **options)


def test_torch_dtype_is_another_name_of_dtype(saved):
    purifier = Purifier.from_pretrained(saved, device="cpu", torch_dtype=torch.float64)
    assert purifier.unet.dtype == purifier.vae.dtype == torch.float64
    same = Purifier.from_pretrained(saved, device="cpu", torch_dtype=torch.bfloat16, dtype=torch.bfloat16)
    assert same.unet.dtype == torch.bfloat16


def test_a_commit_is_of_the_hubs_cache_alone(tmp_path):
    assert commit_hash(tmp_path / "snapshots" / COMMITS["v2"]) == COMMITS["v2"]
    for other in (tmp_path / COMMITS["v2"], tmp_path / "snapshots" / "main", tmp_path / "snapshots"):
        assert commit_hash(other) is None


# Variants, and formats


def test_a_variant_is_loaded_and_a_missing_one_says_which_exist(prior):
    unet = prior / "unet"
    purifier = Purifier.from_pretrained(prior, device="cpu")
    purifier.unet.to(torch.float16).save_pretrained(unet, variant="fp16")
    tensors = load_file(unet / "diffusion_pytorch_model.fp16.safetensors")
    rewrite(unet / WEIGHTS, lambda found: {name: tensor + 1 for name, tensor in found.items()})
    loaded = Purifier.from_pretrained(prior, device="cpu", variant="fp16")
    assert all(torch.equal(value, tensors[name].float()) for name, value in loaded.unet.state_dict().items())
    other = refusal(prior, variant="ema")
    assert "unet has no weights of variant 'ema'; there are: 'fp16', none (variant=None)" in other
    (unet / WEIGHTS).unlink()
    assert "there are: 'fp16'" in refusal(prior)
    (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert "unet has no weights; accepted: diffusion_pytorch_model.safetensors" in refusal(prior)


def test_names_of_weights_are_those_of_diffusers_and_transformers():
    names = [WEIGHTS, "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "config.json", "x.safetensors"]
    names += [f"{SHARDED}.fp16.safetensors", "diffusion_pytorch_model.fp16-00002-of-00002.safetensors", "model.onnx"]
    assert pick_weights(names, None, where="it") == [WEIGHTS]
    assert pick_weights(names, "fp16", where="it") == [
        f"{SHARDED}.fp16.safetensors",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    ]
    assert pick_weights(names[2:4], "fp16", where="it") == ["diffusion_pytorch_model.fp16.bin"]
    assert pick_weights(["pytorch_model.bin", "model.safetensors"], None, where="it") == ["model.safetensors"]


def test_shards_are_loaded_and_must_be_those_of_the_index(prior):
    before = Purifier.from_pretrained(prior, device="cpu")
    (prior / "unet" / WEIGHTS).unlink()
    before.unet.save_pretrained(prior / "unet", max_shard_size="50KB")
    index = prior / "unet" / f"{WEIGHTS}.index.json"
    assert index.is_file()
    again = Purifier.from_pretrained(prior, device="cpu")
    video = clips(1, 3, 3, 16, 16)
    assert torch.equal(again(video), before(video))
    (prior / "unet" / "other.safetensors").write_bytes((prior / "vae" / WEIGHTS).read_bytes())
    named = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=dict.fromkeys(named, "other.safetensors"))
    assert "does not name the files" in refusal(prior)
    edit(index, weight_map=[])
    assert "does not name the files" in refusal(prior)
    edit(index, weight_map=named)
    next((prior / "unet").glob(f"{SHARDED[:-9]}*.safetensors")).unlink()
    assert "unet" in refusal(prior)


def test_a_motion_model_is_loaded_by_its_class(prior):
    blocks = {"down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"], "block_out_channels": [8]}
    heads = {"norm_num_groups": 4, "cross_attention_dim": 8, "num_attention_heads": 2, "motion_num_attention_heads": 2}
    unet = UNetMotionModel(**blocks, **heads)
    shutil.rmtree(prior / "unet")
    unet.save_pretrained(prior / "unet")
    loaded = Purifier.from_pretrained(prior, device="cpu")
    assert type(loaded.unet) is UNetMotionModel
    UNetMotionModel(**blocks, **heads, motion_max_seq_length=6).save_pretrained(prior / "unet")
    (prior / "purifier.json").unlink()
    assert Purifier.from_pretrained(prior, device="cpu", flow="none", window_overlap=2).max_frames == 6
    unet.save_pretrained(prior / "unet")
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in loaded.unet.state_dict().items())


# Hostile folders

HOSTILE_CONFIGS = {
    "a million layers": ("unet", {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
    "a thousand layers": ("unet", {"layers_per_block": 1000}, "describes 2000 layers"),
    "more layers than tensors": ("vae", {"layers_per_block": 240}, "describes 480 layers"),
    "wide": ("unet", {"block_out_channels": [10**9, 10**9]}, "block_out_channels"),
    "fairly wide": ("unet", {"block_out_channels": [2**16, 2**16]}, "conv_in.weight has shape"),
    "cross attention": ("unet", {"cross_attention_dim": 2**18}, "has shape"),
    "heads": ("unet", {"attention_head_dim": 2**18}, "unet"),
    "many blocks": ("unet", {"down_block_types": ["DownBlock3D"] * 10**4}, "down_block_types"),
    "blocks within bounds": ("vae", {"block_out_channels": [4] * 60, "layers_per_block": 60}, "3600 layers"),
    "deep nesting": ("unet", {"attention_head_dim": [[[[[[4]]]]]]}, "nested"),
    "a huge integer": ("unet", {"norm_num_groups": 10**400}, "an integer of 1329 bits"),
    "not a number": ("unet", {"norm_eps": math.nan}, "norm_eps"),
    "an infinity": ("vae", {"scaling_factor": math.inf}, "scaling_factor"),
    "no epsilon": ("unet", {"norm_eps": 0.0}, "norm_eps is 0.0"),
    "no scale": ("unet", {"mid_block_scale_factor": 0}, "mid_block_scale_factor"),
    "wide padding": ("unet", {"downsample_padding": 60000}, "downsample_padding"),
    "another class": ("unet", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    "no class": ("vae", {"_class_name": [1]}, "accepted: AutoencoderKL"),
    "quantized": ("unet", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
    "an unknown activation": ("unet", {"act_fn": "magic"}, "unet cannot be read"),
    "no groups": ("unet", {"norm_num_groups": 0}, "unet cannot be read"),
    "a string of a number": ("vae", {"layers_per_block": "1"}, "vae cannot be read"),
    "a condition": ("unet", {"time_cond_proj_dim": 8}, "lacks 1 of its weights"),
    "a shift that is a word": ("vae", {"shift_factor": "0.5"}, "shift_factor"),
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_a_hostile_configuration_is_refused_in_a_second(prior, name):
    part, values, words = HOSTILE_CONFIGS[name]
    edit(prior / part / "config.json", **values)
    assert words in refusal(prior)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("purifier.json", {"config": {"spatial_weight": 1e300}, "flow": "none"}, "purifier.json: spatial_weight"),
        ("purifier.json", {"config": {"cfg_denoise": 10**400}, "flow": "none"}, "purifier.json: cfg_denoise"),
        ("purifier.json", {"config": {"temporal_weight": math.nan}, "flow": "none"}, "temporal_weight"),
        ("purifier.json", {"max_frames": 10**400, "flow": "none"}, "max_frames must be 2 to 1024"),
        ("purifier.json", {"config": {"sign_temperature": -1e300}, "flow": "none"}, "sign_temperature"),
        ("purifier.json", {"config": {"x" * 5000: 1}, "flow": "none"}, "unknown settings"),
        ("purifier.json", {"flow": "x" * 5000}, "unknown flow 'xxx"),
        ("purifier.json", {"flow": ["none"] * 5000}, "unknown flow ['none', "),
        ("scheduler/scheduler_config.json", {"beta_end": 1e300}, "scheduler_config.json: beta_end"),
        ("scheduler/scheduler_config.json", {"beta_start": "0.1"}, "scheduler_config.json: beta_start"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**400}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"beta_start": 1e-300}, "scheduler_config.json"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type"),
    ],
)
def test_settings_of_a_folder_are_checked_at_their_door(prior, file, content, words):
    (prior / file).parent.mkdir(exist_ok=True)
    (prior / file).write_text(json.dumps(content))
    assert words in refusal(prior, **({} if file == "purifier.json" else {"flow": "none"}))


def set_value(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("part", "name"), [("unet", "conv_out.bias"), ("vae", "decoder.conv_in.weight")])
def test_weights_that_are_not_finite_are_named(prior, part, name, value):
    rewrite(prior / part / WEIGHTS, set_value(name, value))
    assert f"{part}: {name} has values that are not finite in torch.float32" in refusal(prior)


def test_weights_and_prompts_that_overflow_in_half_precision_are_named(prior):
    rewrite(prior / "unet" / WEIGHTS, set_value("conv_in.bias", 1e6))
    assert "conv_in.bias has values that are not finite in torch.float16" in refusal(prior, dtype=torch.float16)
    assert Purifier.from_pretrained(prior, device="cpu", dtype=torch.bfloat16).unet.conv_in.bias[-1] == 999424
    rewrite(prior / "unet" / WEIGHTS, set_value("conv_in.bias", 1.0))
    rewrite(prior / "prompt_embeds.safetensors", set_value("prompt_embeds", -1e30))
    assert "prompt_embeds must hold finite floats, also in torch.float16" in refusal(prior, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: {**found, "conv_in.bias": found["conv_in.bias"].long()}, "conv_in.bias holds no floats"),
        (lambda found: {**found, "conv_in.bias": found["conv_in.bias"].to(torch.complex64)}, "holds no floats"),
        (lambda found: {**found, "conv_in.bias": found["conv_in.bias"][:-1].clone()}, r"has shape (7,) in the file"),
        (lambda found: {**found, "conv_in.bias": torch.zeros(())}, "has shape ()"),
        (lambda found: {name: value[:0].clone() for name, value in found.items()}, "has shape (0,"),
        (lambda found: dict(list(found.items())[:10]), "lacks"),
        (lambda found: {f"model.{name}": value for name, value in found.items()}, "lacks"),
        (lambda found: {}, "layers"),
    ],
)
def test_weights_of_another_kind_are_refused(prior, change, words):
    rewrite(prior / "unet" / WEIGHTS, change)
    assert words in refusal(prior)


def test_swapped_parts_and_broken_files_are_refused(prior, saved):
    for name in (WEIGHTS, "config.json"):
        (prior / "unet" / name).write_bytes((saved / "vae" / name).read_bytes())
        assert "unet" in refusal(prior)
        (prior / "unet" / name).write_bytes((saved / "unet" / name).read_bytes())
    file = prior / "vae" / WEIGHTS
    whole = file.read_bytes()
    for broken in (b"", whole[:7], whole[:-1], struct.pack("<Q", 2**63) + whole[8:], whole + b"x", b"\0" * 100):
        file.write_bytes(broken)
        assert "vae cannot be read" in refusal(prior)
    file.unlink()
    os.mkfifo(file)
    assert "vae has no weights" in refusal(prior)


# Text encoders


def text_encoder(folder, **config):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=7)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=2, max_position_embeddings=7, **small, **config)).eval()
    return tokenizer, encoder


@pytest.fixture
def encoding(prior, tmp_path):
    """A prior whose prompt is encoded when it is loaded."""
    (prior / "prompt_embeds.safetensors").unlink()
    for name, part in zip(("tokenizer", "text_encoder"), text_encoder(tmp_path / "vocabulary"), strict=True):
        part.save_pretrained(prior / name)
    return prior


def test_the_length_of_a_prompt_is_bounded_by_the_encoder(encoding):
    expected = Purifier.from_pretrained(encoding, device="cpu").prompt_embeds
    assert expected.shape == (1, 7, 8)
    edit(encoding / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    assert torch.equal(Purifier.from_pretrained(encoding, device="cpu").prompt_embeds, expected)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": 400}, "400 layers"),
        ({"hidden_size": 2**18, "num_attention_heads": 1}, "numbers, its files hold"),
        ({"vocab_size": 2**18}, "numbers, its files hold"),
        ({"num_attention_heads": 0}, "cannot be used"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps"),
    ],
)
def test_a_hostile_text_encoder_is_refused(encoding, values, words):
    import transformers  # noqa: F401  (which takes seconds)

    edit(encoding / "text_encoder" / "config.json", **values)
    assert words in refusal(encoding)


def test_a_text_encoder_is_never_filled_up_with_random_weights(encoding):
    rewrite(
        encoding / "text_encoder" / "model.safetensors",
        lambda found: (
            {name: value for name, value in found.items() if "final_layer_norm" not in name}
            | {"padding": torch.zeros(1000)}
        ),
    )
    assert "lacks 2 of its weights" in refusal(encoding)


def test_an_attention_mask_is_used_where_the_encoder_asks_for_it(encoding):
    plain = Purifier.from_pretrained(encoding, device="cpu").prompt_embeds
    edit(encoding / "text_encoder" / "config.json", use_attention_mask=True)
    masked = Purifier.from_pretrained(encoding, device="cpu").prompt_embeds
    tokenizer, encoder = text_encoder(encoding.parent / "vocabulary")
    tokens = tokenizer("", padding="max_length", max_length=7, return_tensors="pt")
    with torch.no_grad():
        expected = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    torch.testing.assert_close(masked, expected)
    assert not torch.allclose(masked, plain, atol=1e-3)


# Pipelines


def pipeline(tmp_path, **parts):
    from diffusers import TextToVideoSDPipeline

    purifier = build_purifier()
    tokenizer, encoder = text_encoder(tmp_path / "vocabulary")
    scheduler = DDIMScheduler(
        beta_start=1e-3, beta_end=0.02, beta_schedule="scaled_linear", steps_offset=2, clip_sample=False
    )
    given = {"unet": purifier.unet, "vae": purifier.vae, "scheduler": scheduler, "tokenizer": tokenizer}
    return TextToVideoSDPipeline(**given | {"text_encoder": encoder} | parts)


def test_a_pipeline_becomes_a_purifier_that_shares_its_parts(tmp_path):
    pipe = pipeline(tmp_path)
    purifier = Purifier.from_pipe(pipe, flow="none", inversion_steps=1, window_overlap=2, max_frames=8)
    assert purifier.unet is pipe.unet and purifier.vae is pipe.vae
    expected, _ = pipe.encode_prompt("", "cpu", 1, False)
    torch.testing.assert_close(purifier.prompt_embeds, expected)
    wanted = PurifyConfig(inversion_steps=1, window_overlap=2, beta_start=1e-3, beta_end=0.02, steps_offset=2)
    assert purifier.config == wanted and purifier.max_frames == 8 and purifier.commit_hash is None
    video = clips(1, 3, 3, 16, 16)
    same = Purifier(pipe.unet, pipe.vae, expected, config=wanted, max_frames=8)
    torch.testing.assert_close(purifier(video), same(video), rtol=0, atol=1e-6)
    purifier.save_pretrained(tmp_path / "saved")
    assert Purifier.from_pretrained(tmp_path / "saved", device="cpu").config == wanted


def test_settings_of_a_pipelines_purifier_come_before_its_schedulers(tmp_path):
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    pipe = pipeline(tmp_path, scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    purifier = Purifier.from_pipe(pipe, flow="none", max_frames=4, window_overlap=1, steps_offset=1)
    assert (purifier.max_frames, purifier.config.window_overlap, purifier.config.steps_offset) == (4, 1, 1)
    assert purifier.config.beta_start == pipe.scheduler.config.beta_start
    pipe = pipeline(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler' has no betas"):
        Purifier.from_pipe(pipe, flow="none")


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: prune.l1_unstructured(unet.conv_in, "weight", 0.5),
        lambda unet: unet.enable_freeu(0.9, 0.2, 1.5, 1.6),
        lambda unet: unet.conv_in.register_forward_hook(lambda *_: None),
    ],
)
def test_models_with_more_than_weights_are_not_saved(change, tmp_path):
    purifier = build_purifier()
    change(purifier.unet)
    with pytest.raises(
        ValueError, match="UNet3DConditionModel with more than weights and configuration is not saved: "
    ):
        purifier.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_of_animatediff_becomes_a_purifier(tmp_path):
    from diffusers import AnimateDiffPipeline

    blocks = {"down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"], "block_out_channels": [8]}
    heads = {"norm_num_groups": 4, "cross_attention_dim": 8, "num_attention_heads": 2, "motion_num_attention_heads": 2}
    parts = pipeline(tmp_path).components | {"unet": UNetMotionModel(**blocks, **heads, motion_max_seq_length=6)}
    pipe = AnimateDiffPipeline(**parts, motion_adapter=None)
    purifier = Purifier.from_pipe(pipe, flow="none", inversion_steps=0)
    assert purifier.unet is pipe.unet and purifier.max_frames == 6
    assert purifier(clips(1, 3, 7, 16, 16)).shape == (1, 3, 7, 16, 16)
    with pytest.raises(ValueError, match="max_frames must be 2 to 6, got 7"):
        Purifier.from_pipe(pipe, flow="none", max_frames=7)


def test_a_pipeline_without_the_parts_is_refused(tmp_path):
    for part in ("text_encoder", "tokenizer", "scheduler", "unet", "vae"):
        pipe = SimpleNamespace(**pipeline(tmp_path).components | {part: None})
        with pytest.raises(ValueError, match=f"has no {part}; accepted: a diffusers TextToVideoSDPipeline"):
            Purifier.from_pipe(pipe, flow="none")
    pipe = pipeline(tmp_path, text_encoder=None, tokenizer=None)
    purifier = Purifier.from_pipe(pipe, flow="none", prompt_embeds=torch.ones(1, 3, 8))
    assert torch.equal(purifier.prompt_embeds, torch.ones(1, 3, 8))
    with pytest.raises(TypeError, match="Linear, which is no model of videos"):
        Purifier.from_pipe(SimpleNamespace(**pipeline(tmp_path).components | {"unet": torch.nn.Linear(1, 1)}))
    with pytest.raises(ValueError, match="str has no unet, vae"):
        Purifier.from_pipe("someone/model")
    with pytest.raises(ValueError, match="prediction_type"):
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False)
        Purifier.from_pipe(pipeline(tmp_path, scheduler=scheduler), flow="none")
    with pytest.raises(TypeError, match="magic"):
        Purifier.from_pipe(pipeline(tmp_path), flow="none", magic=1)
