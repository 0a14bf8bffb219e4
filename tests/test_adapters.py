import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import clips
from torch import nn

from videopure_fast import DefendedClassifier, tiny
from videopure_fast.adapters import (
    VideoClassifier,
    art_preprocessor,
    autoattack_model,
    class_names,
    foolbox_model,
    load_classifier,
)

EPS = 4 / 255
HEADS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 5}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Small(nn.Module):
    """Clips of any length and size -> 5 logits, differentiable and far from linear."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.conv = nn.Conv3d(3, 8, 3, stride=(1, 4, 4), padding=1)
            self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head((10 * self.conv(x - 0.5)).tanh().mean((2, 3, 4))) * 10


def seen_by(layout="BCTHW", video=None, **options):
    """What a model is given."""
    seen = []

    def model(prepared):
        seen.append(prepared)
        return torch.zeros(len(video), 2)

    VideoClassifier(model, layout=layout, **options)(video)
    return seen[0]


def test_layouts():
    video = clips(2, 3, 8, 6, 7)
    assert torch.equal(seen_by("BCTHW", video), video)
    assert torch.equal(seen_by("BTCHW", video), video.transpose(1, 2))
    slow, fast = seen_by("slowfast", video, alpha=4)
    assert torch.equal(fast, video) and torch.equal(slow, video[:, :, [0, 7]])
    assert seen_by("slowfast", video.repeat(1, 1, 4, 1, 1), alpha=8)[0].shape == (2, 3, 4, 6, 7)


def test_values():
    video = clips(2, 3, 4, 6, 6)
    assert torch.equal(seen_by(video=video, scale=255), video * 255)
    seen = seen_by(video=video, scale=255, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(seen, (video - mean) / std)
    torch.testing.assert_close(seen_by(video=video, mean=0.5, std=0.5), 2 * video - 1)
    assert seen_by(video=video.double(), mean=0.5, std=0.5).dtype == torch.float64


@pytest.mark.parametrize(
    "given, frames, expected",
    [
        (16, 4, [0, 5, 10, 15]),
        (10, 4, [0, 3, 6, 9]),
        (32, 8, [0, 4, 8, 13, 17, 22, 26, 31]),  # pytorchvideo's, by hand
        (3, 5, [0, 0, 1, 1, 2]),
        (9, 1, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_frames(given, frames, expected):
    video = clips(1, 3, given, 4, 4)
    assert torch.equal(seen_by(video=video, frames=frames), video[:, :, expected])


@pytest.mark.parametrize("size, expected", [(8, (8, 8)), ((6, 10), (6, 10)), ([12, 16], (12, 16)), (None, (12, 16))])
def test_size(size, expected):
    video = clips(2, 3, 3, 12, 16)
    seen = seen_by(video=video, size=size)
    assert seen.shape == (2, 3, 3, *expected)
    for i in range(3):
        frame = nn.functional.interpolate(video[:, :, i], expected, mode="bilinear", antialias=True)
        assert torch.equal(seen[:, :, i], frame)


def test_every_step_is_differentiable():
    video = clips(1, 3, 6, 10, 12).double().requires_grad_()
    model = Small().double()
    adapter = VideoClassifier(model, scale=255, mean=127.5, std=127.5, frames=4, size=8)
    assert torch.autograd.gradcheck(lambda x: adapter(x * 0.8 + 0.1), video, fast_mode=True)
    slowfast = VideoClassifier(lambda pair: model(pair[0]) + model(pair[1]), layout="slowfast", alpha=2)
    (gradient,) = torch.autograd.grad(slowfast(video).sum(), video)
    assert gradient.abs().amax((0, 1, 3, 4)).min() > 0


def test_state_is_the_models():
    adapter = VideoClassifier(Small(), mean=0.5, std=0.5).train()
    assert set(adapter.state_dict()) == {f"model.{name}" for name in Small().state_dict()}
    assert adapter.model.training and adapter.double().mean.dtype == torch.float64


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "THWC"}, "layout is 'THWC'; accepted: BCTHW, BTCHW, slowfast"),
        ({"mean": 0.5}, "go together"),
        ({"mean": [1, 2], "std": [1, 2]}, "mean must be a finite number or three"),
        ({"mean": 0.5, "std": [1, 0, 1]}, "std must be more than 0"),
        ({"mean": float("nan"), "std": 1}, "mean must be a finite"),
        ({"scale": 0}, "scale must be more than 0 and finite, got 0"),
        ({"frames": 0}, "frames must be 1 to 65536, got 0"),
        ({"frames": 4.0}, "got 4.0"),
        ({"frames": True}, "got True"),
        ({"size": (8, 8, 8)}, r"size must be a side or \(height, width\)"),
        ({"size": -8}, "got -8"),
        ({"alpha": 0}, "alpha must"),
        ({"frames": 10**9}, "frames must be 1 to 65536, got 1000000000"),
        ({"mean": "a", "std": "b"}, "mean must be a number or three, got 'a'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VideoClassifier(Small(), **options)


def test_bad_clips_and_models():
    adapter = VideoClassifier(Small())
    for wrong in ([1], clips(1, 3, 4, 8, 8).mul(255).int(), clips(1, 3, 4, 8, 8).to_sparse()):
        with pytest.raises(TypeError, match=r"accepted: dense tensors \(B, 3, F, H, W\) in \[0, 1\]"):
            adapter(wrong)
    for shape in ((3, 8, 8), (4, 3, 8, 8), (1, 4, 3, 8, 8), (0, 3, 4, 8, 8)):
        with pytest.raises(ValueError, match="have shape"):
            adapter(clips(*shape))
    for wrong in (clips(1, 3, 4, 8, 8) * 255, clips(1, 3, 4, 8, 8) - 0.5, clips(1, 3, 4, 8, 8) * float("nan")):
        with pytest.raises(ValueError, match=r"values from .* accepted: dense"):
            adapter(wrong)
    with pytest.raises(TypeError, match="model must be"):
        VideoClassifier("resnet")
    with pytest.raises(TypeError, match="input_name must be a str"):
        VideoClassifier(Small(), input_name=3)
    with pytest.raises(ValueError, match="2 frames; accepted with alpha 4"):
        seen_by("slowfast", clips(1, 3, 2, 8, 8))


@pytest.mark.parametrize(
    "wrong, advice",
    [
        (
            lambda x: x.transpose(1, 2),
            "looks like (B, F, 3, H, W): pass clips.transpose(-4, -3); adapters.Video",
        ),
        (lambda x: x[0].transpose(0, 1), "looks like (B, F, 3, H, W): pass clips.transpose(-4, -3)"),
        (lambda x: x.movedim(1, -1), "looks like (B, F, H, W, 3): pass it with .movedim(-1, -4)"),
        (lambda x: x * 255, "look like 0..255: divide by 255, or pass uint8"),
        (lambda x: (x * 255).half(), "look like 0..255"),
        (
            lambda x: 2 * x - 1,
            "look normalized: pass them as they were before, adapters.VideoClassifier",
        ),
        (lambda x: x * 1.2 - 0.1, ".clamp(0, 1) removes what resizing adds"),
    ],
)
def test_other_formats_are_named_with_what_mends_them(wrong, advice, purifier):
    video = clips(2, 3, 4, 16, 16)
    video[0, 0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    for adapter in (VideoClassifier(Small()), DefendedClassifier(Small(), purifier)):
        with pytest.raises(ValueError, match=re.escape(advice)):
            adapter(wrong(video))
        with pytest.raises(ValueError, match="; accepted: dense tensors"):
            adapter(wrong(video))


def test_uint8_and_single_clips():
    adapter, video = (
        VideoClassifier(Small(), mean=0.5, std=0.5, frames=3, size=8),
        (clips(2, 3, 4, 16, 16) * 255).byte(),
    )
    expected = adapter(video.float() / 255)
    assert torch.equal(adapter(video), expected) and expected.shape == (2, 5)
    torch.testing.assert_close(adapter(video[1]), expected[1])
    torch.testing.assert_close(adapter(video[1].float() / 255), expected[1])
    assert VideoClassifier(Small(), layout="BTCHW").layout == "BTCHW" and adapter(video[0]).dtype == torch.float32


@pytest.mark.parametrize("layout", ["BCTHW", "BTCHW", "slowfast"])
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_models_get_clips_of_their_own_dtype(given, weights, layout):
    seen = []

    class Model(nn.Linear):
        def forward(self, x):
            seen.extend(x if isinstance(x, list) else [x])
            return super().forward(seen[-1].mean((3, 4)).flatten(1)[:, :12])

    video = clips(2, 3, 4, 8, 10)
    video = (video * 255).byte() if given == torch.uint8 else video.to(given)
    adapter = VideoClassifier(Model(12, 5).to(weights), layout=layout, mean=0.5, std=0.25, size=8)
    logits = adapter(video)
    assert {x.dtype for x in seen} == {weights}
    assert logits.dtype == (torch.float32 if given == torch.uint8 else given)
    floats = video.double() / 255 if given == torch.uint8 else video.double()
    exact = seen_by(layout, floats, mean=0.5, std=0.25, size=8)
    step = max(torch.finfo(dtype).eps for dtype in (weights, torch.float32 if given == torch.uint8 else given))
    for x, wide in zip(seen, exact if isinstance(exact, list) else [exact], strict=True):
        torch.testing.assert_close(x.double(), wide, rtol=step, atol=4 * step)


@pytest.mark.parametrize(
    "output, error, message",
    [
        (lambda x: (x, x), TypeError, "have .logits, got tuple"),
        (lambda x: x.flatten(), ValueError, r"logits \(2, K\), got \(1536,\)"),
        (lambda x: x[0].flatten(1), ValueError, r"got \(3, 256\)"),
        (lambda x: x.flatten(1) * float("nan"), ValueError, "logits are not finite"),
        (lambda x: x.flatten(1).long(), ValueError, "logits must be floats"),
    ],
)
def test_outputs_that_are_no_logits(output, error, message):
    with pytest.raises(error, match=message):
        VideoClassifier(output)(clips(2, 3, 4, 8, 8))


def build_huggingface(name):
    import transformers

    configs = {
        "VideoMAE": {"image_size": 32, "num_frames": 4, "intermediate_size": 16},
        "Timesformer": {"image_size": 32, "num_frames": 4, "intermediate_size": 16},
        "Vivit": {"image_size": 32, "num_frames": 4, "intermediate_size": 16},
        "VJEPA2": {
            "crop_size": 32,
            "frames_per_clip": 4,
            "num_pooler_layers": 1,
            "pred_hidden_size": 12,
            "pred_num_attention_heads": 1,
            "pred_num_hidden_layers": 1,
        },
    }
    config = getattr(transformers, f"{name}Config")(**HEADS, **configs[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return getattr(transformers, f"{name}ForVideoClassification")(config).eval()


@pytest.mark.parametrize(
    "name, input_name",
    [
        ("VideoMAE", "pixel_values"),
        ("Timesformer", "pixel_values"),
        ("Vivit", "pixel_values"),
        ("VJEPA2", "pixel_values_videos"),
    ],
)
def test_huggingface(name, input_name):
    model = build_huggingface(name)
    adapter = VideoClassifier.huggingface(model, mean=MEAN, std=STD)
    assert (adapter.frames, adapter.size, adapter.input_name) == (4, (32, 32), input_name)
    video = clips(2, 3, 7, 24, 40).requires_grad_()
    frames = video.detach()[:, :, [0, 2, 4, 6]].transpose(1, 2)
    frames = nn.functional.interpolate(frames.flatten(0, 1), (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    by_hand = model(**{input_name: ((frames - mean) / std).unflatten(0, (2, 4))}).logits
    logits = adapter(video)
    assert logits.shape == (2, 5) and torch.equal(logits, by_hand)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), video)
    assert gradient.isfinite().all() and gradient[:, :, ::2].abs().amax((1, 3, 4)).min() > 0


@pytest.mark.parametrize(
    "module, name, scale, shift",
    [
        ("videomae.image_processing_pil_videomae", "VideoMAEImageProcessorPil", 1, 0),
        ("vivit.image_processing_vivit", "VivitImageProcessor", 2, 1),
    ],
)
def test_values_are_those_of_huggingfaces_processors(module, name, scale, shift):
    processors = pytest.importorskip(f"transformers.models.{module}")
    processor = getattr(processors, name)(do_resize=False, do_center_crop=False)
    pixels = (clips(4, 32, 32, 3) * 255).byte()
    expected = processor(list(pixels.numpy()), return_tensors="pt")["pixel_values"]
    mean = [value + shift for value in processor.image_mean]
    video = pixels.permute(3, 0, 1, 2)[None] / 255
    seen = seen_by("BTCHW", video, scale=scale, mean=mean, std=processor.image_std)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


def test_huggingface_explains_what_is_missing():
    model = build_huggingface("VideoMAE")
    given = VideoClassifier.huggingface(model, mean=None, std=None, frames=2, size=16)
    assert (given.frames, given.size, given.mean) == (2, (16, 16), None)
    with pytest.raises(TypeError, match="mean"):
        VideoClassifier.huggingface(model)
    with pytest.raises(TypeError, match="must be a transformers model, got Small"):
        VideoClassifier.huggingface(Small(), mean=None, std=None)
    model = Small()
    model.config, model.main_input_name = SimpleNamespace(num_frames=4), "x"
    with pytest.raises(ValueError, match="none of image_size, crop_size: pass size="):
        VideoClassifier.huggingface(model, mean=None, std=None)


def test_class_names(purifier):
    model = build_huggingface("VideoMAE")
    adapter = VideoClassifier.huggingface(model, mean=None, std=None)
    assert (
        class_names(adapter)
        == class_names(nn.DataParallel(model))
        == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    )
    model.config = SimpleNamespace(id2label={"1": "b", "0": "a", "10": "k", **{str(i): str(i) for i in range(2, 10)}})
    assert class_names(model) == ("a", "b", *"23456789", "k") == class_names(adapter)
    defended = DefendedClassifier(nn.DataParallel(adapter), purifier)
    for wrapped in (defended, nn.DataParallel(defended), nn.DataParallel(nn.DataParallel(adapter))):
        assert class_names(wrapped) == class_names(model)
    assert class_names(tiny.load_classifier()) == tiny.CLASSES
    assert class_names(Small()) is None
    for table, label in (({1: "a", 2: "b"}, "2"), ({"x": "a"}, "x"), ({0: "a", 2: "b"}, "2")):
        model.config = SimpleNamespace(id2label=table)
        with pytest.raises(ValueError, match=f"id2label has the label '{label}'; accepted: 0 to {len(table) - 1}"):
            class_names(model)


def test_an_adapted_classifier_is_defended(purifier):
    adapter = VideoClassifier.huggingface(build_huggingface("VideoMAE"), mean=MEAN, std=STD)
    video = clips(1, 3, 4, 16, 16).requires_grad_()
    defended = DefendedClassifier(adapter, purifier)
    defended(video).sum().backward()
    assert video.grad.abs().sum() > 0 and defended.predict(video).shape == (1,)


# ART


def art_classifier(model, **preprocessing):
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(reduction="sum"),
        input_shape=(3, 4, 16, 16),
        nb_classes=5,
        clip_values=(0.0, 1.0),
        device_type="cpu",
        **preprocessing,
    )


@pytest.fixture
def batch():
    return clips(3, 3, 4, 16, 16, seed=3)


def test_art_predicts_purified_clips(purifier, batch):
    model, art_purifier = Small(), art_preprocessor(purifier, batch_size=2)
    with torch.no_grad():
        expected, purified = model(purifier(batch)), purifier(batch)
    classifier = art_classifier(model, preprocessing_defences=[art_purifier])
    np.testing.assert_allclose(classifier.predict(batch.numpy()), expected, atol=1e-5)
    given, labels = art_purifier(batch.numpy(), np.arange(3))
    np.testing.assert_allclose(given, purified, atol=1e-6)
    assert labels.tolist() == [0, 1, 2] and art_purifier.device.type == "cpu"
    assert art_purifier.apply_predict and not art_purifier.apply_fit


@pytest.mark.parametrize("options", [{"gradient": "bpda"}, {"gradient": "exact"}, {}], ids=str)
def test_art_gradients(options, purifier, batch):
    model, labels = Small(), torch.tensor([0, 1, 2])
    classifier = art_classifier(model, preprocessing_defences=[art_preprocessor(purifier, **options)])
    found = classifier.loss_gradient(batch.numpy(), np.eye(5)[labels])
    video = batch.clone().requires_grad_()
    purified = purifier(video)
    at = purified.detach().requires_grad_()
    loss = nn.functional.cross_entropy
    (straight,) = torch.autograd.grad(loss(model(at), labels, reduction="sum"), at)
    (exact,) = torch.autograd.grad(loss(model(purified), labels, reduction="sum"), video)
    expected = straight if options == {"gradient": "bpda"} else exact
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.abs().max())
    assert (exact - straight).abs().max() > 0.1 * straight.abs().max()


@pytest.mark.parametrize("gradient", ["bpda", "exact"])
def test_art_gradients_beside_a_numpy_preprocessor(gradient, purifier, batch):
    """ART's other chain, through estimate_gradient."""
    preprocessor, upstream = art_preprocessor(purifier, gradient=gradient), clips(*batch.shape, seed=4)
    video = batch.clone().requires_grad_()
    expected = upstream if gradient == "bpda" else torch.autograd.grad(purifier(video), video, upstream)[0]
    found = preprocessor.estimate_gradient(batch.numpy(), upstream.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("gradient", ["bpda", "exact"])
@pytest.mark.parametrize("attack", ["FastGradientMethod", "ProjectedGradientDescent"])
def test_art_attacks(attack, gradient, purifier, batch):
    import art.attacks.evasion

    options = {"max_iter": 3, "eps_step": EPS / 2, "verbose": False} if attack.startswith("Proj") else {}
    model = Small()
    classifier = art_classifier(model, preprocessing_defences=[art_preprocessor(purifier, gradient=gradient)])
    labels = classifier.predict(batch.numpy()).argmax(1)
    attacked = getattr(art.attacks.evasion, attack)(classifier, eps=EPS, **options).generate(batch.numpy(), labels)
    assert attacked.shape == batch.shape and attacked.min() >= 0 and attacked.max() <= 1
    assert np.abs(attacked - batch.numpy()).max() <= EPS + 1e-6
    both, labels = (batch, torch.from_numpy(attacked)), torch.from_numpy(labels)
    before, after = (nn.functional.cross_entropy(model(purifier(video)), labels) for video in both)
    assert after > before or gradient == "bpda"


def test_art_refuses(purifier):
    with pytest.raises(ValueError, match="gradient is 'none'; accepted: exact, bpda"):
        art_preprocessor(purifier, gradient="none")
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        art_preprocessor(purifier, batch_size=0)
    with pytest.raises(TypeError, match="must be a Purifier, got str"):
        art_preprocessor("tiny")


# foolbox


@pytest.mark.parametrize("attack, options", [("LinfFastGradientAttack", {}), ("LinfPGD", {"steps": 3})])
def test_foolbox_attacks(attack, options, purifier, batch):
    import foolbox

    defended = DefendedClassifier(Small(), purifier).train()
    model = foolbox_model(defended)
    assert not defended.classifier.training and model.bounds == (0, 1) and model.device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(model(batch), defended(batch))
    labels = defended(batch).argmax(1)
    _, attacked, _ = getattr(foolbox.attacks, attack)(**options)(model, batch, labels, epsilons=EPS)
    assert attacked.min() >= 0 and attacked.max() <= 1 and (attacked - batch).abs().max() <= EPS + 1e-6
    loss = nn.functional.cross_entropy
    assert loss(defended(attacked), labels) > loss(defended(batch), labels)


# auto-attack


def test_autoattack_model_takes_frames_as_channels(purifier, batch):
    defended = DefendedClassifier(Small(), purifier).eval()
    images = batch.flatten(1, 2)
    assert images.ndim == 4 and torch.equal(images.unflatten(1, (3, -1)), batch)
    with torch.no_grad():
        assert torch.equal(autoattack_model(defended)(images), defended(batch))
    with pytest.raises(ValueError, match=r"accepted: \(B, 3 \* F, H, W\)"):
        autoattack_model(defended)(batch)


def test_autoattack_attacks(batch):
    autoattack = pytest.importorskip("autoattack")
    model, images = autoattack_model(Small().eval()), batch.flatten(1, 2)
    labels = model(images).argmax(1)
    attacks = ["apgd-ce", "apgd-dlr", "fab", "square"]
    for attack in attacks:
        adversary = autoattack.AutoAttack(
            model, norm="Linf", eps=EPS, version="custom", attacks_to_run=[attack], device="cpu", verbose=False
        )
        adversary.apgd.n_iter = adversary.fab.n_iter = 3
        adversary.square.n_queries = 20
        attacked = adversary.run_standard_evaluation(images, labels, bs=len(images))
        assert attacked.shape == images.shape and (attacked - images).abs().max() <= EPS + 1e-6


@pytest.mark.parametrize("wrong", [lambda x: x, None])
def test_models_of_libraries_are_modules(wrong):
    for adapt in (foolbox_model, autoattack_model):
        with pytest.raises(TypeError, match="must be a torch.nn.Module"):
            adapt(wrong)


def test_missing_libraries_are_named(monkeypatch, purifier):
    monkeypatch.setitem(sys.modules, "art.defences.preprocessor.preprocessor", None)
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ImportError, match=r"pip install 'videopure-fast\[art\]'"):
        art_preprocessor(purifier)
    with pytest.raises(ImportError, match=r"pip install 'videopure-fast\[foolbox\]'"):
        foolbox_model(Small())


# Classifiers by name


def test_classifiers_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "some_models.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(2, 2)\ndef wrong():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = load_classifier("some_models:make")
    assert isinstance(made, nn.Linear) and not made.training and not made.weight.requires_grad
    assert load_classifier("tiny")(clips(1, 3, 16, 32, 32)).shape == (1, 8)
    with pytest.raises(TypeError, match="'some_models:wrong' is a int; accepted: a torch.nn.Module"):
        load_classifier("some_models:wrong")
    for name in ("some_models:missing", "no_such_models:make"):
        with pytest.raises(ValueError, match=f"classifier '{name}' cannot be made"):
            load_classifier(name)


def test_a_transformers_folder_is_a_classifier(tmp_path):
    model = build_huggingface("VideoMAE")
    model.save_pretrained(tmp_path)
    found, x = load_classifier(str(tmp_path), mean=MEAN, std=STD), clips(1, 3, 8, 32, 32)
    torch.testing.assert_close(found(x), VideoClassifier.huggingface(model, mean=MEAN, std=STD)(x))
