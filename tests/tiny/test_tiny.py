"""The packaged prior: its clips, its weights, and that it defends."""

from dataclasses import replace

import pytest
import torch

from videopure_fast import DefendedClassifier, Purifier, PurifyConfig, purify, tiny
from videopure_fast.defense import build_defenses
from videopure_fast.evaluation.plan import Plan, Threat
from videopure_fast.evaluation.runner import EvalContext, evaluate
from videopure_fast.evaluation.tables import table
from videopure_fast.ops.guided_update import warp
from videopure_fast.tiny.models import WEIGHTS


@pytest.fixture(scope="module")
def purifier():
    return Purifier.from_pretrained("tiny", device="cpu")


def test_clips_are_seeded_and_extend():
    clips, labels = tiny.sample_clips(6, seed=3)
    assert clips.shape == (6, 3, 16, 32, 32) and clips.dtype == torch.float32
    assert clips.min() >= 0 and clips.max() <= 1
    assert labels.shape == (6,) and labels.dtype == torch.int64
    fewer, fewer_labels = tiny.sample_clips(2, seed=3)
    torch.testing.assert_close(fewer, clips[:2], rtol=0, atol=1e-6)
    assert torch.equal(fewer_labels, labels[:2])
    assert not torch.equal(tiny.sample_clips(2, seed=4)[0], fewer)
    assert torch.bincount(tiny.sample_clips(200, seed=5)[1], minlength=8).min() > 8
    with pytest.raises(ValueError, match="at least 1"):
        tiny.sample_clips(0)


def test_one_frame_tells_nothing():
    classifier = tiny.load_classifier()
    clips, labels = tiny.sample_clips(96, seed=11)

    def accuracy(x):
        return (classifier(x).argmax(1) == labels).float().mean()

    assert accuracy(clips) >= 0.98
    assert accuracy(clips[:, :, 8:9].expand_as(clips)) <= 0.35  # chance is 0.125
    assert accuracy(clips.flip(2)) <= 0.05  # time reversed: every motion is another one


def test_weights_are_small_and_safe():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert {path.suffix for path in files if path.name != "README.md"} == {".json", ".safetensors"}


def test_its_own_settings(purifier):
    scaled = PurifyConfig().rescaled(16, 16, 16)
    weights = {"spatial_weight": scaled.spatial_weight / 2, "temporal_weight": scaled.temporal_weight / 2}
    assert purifier.config == replace(scaled, window_overlap=2, **weights)
    assert purifier.max_frames == 16 and purifier.vae_factor == 2
    assert Purifier.from_pretrained("tiny", inversion_steps=2, method="ddim").config.method == "ddim"
    given = PurifyConfig(method="ddpm")
    assert Purifier.from_pretrained("tiny", config=given, inversion_steps=1).config == PurifyConfig(
        method="ddpm", inversion_steps=1
    )
    with pytest.raises(TypeError, match="magic"):
        Purifier.from_pretrained("tiny", magic=1)


@pytest.mark.slow
def test_a_fooled_classifier_is_right_again(purifier, tmp_path):
    """A broken purifier fails: none 0.0, the VAE alone far below, and even chance would be 0.125."""
    threats = (Threat("none", clips=16), Threat("gray-box", "pgd", {"steps": 10, "step_size": 2 / 255}, 16))
    plan = Plan("packaged", threats, ("none", "VAE round trip", "videopure"), eps=(4 / 255,), seeds=(21,))
    context = EvalContext(tiny.load_classifier(), build_defenses(purifier), sample)
    rows = table(evaluate(plan, context, tmp_path / "record.json"))
    accuracy = {(row.threat_model, row.defense): row.accuracy for row in rows}
    assert accuracy["none", "none"] >= 0.95 and accuracy["gray-box", "none"] <= 0.05
    assert accuracy["gray-box", "videopure"] >= 0.8 and accuracy["none", "videopure"] >= 0.85
    assert accuracy["gray-box", "videopure"] - accuracy["gray-box", "VAE round trip"] > 0.5
    clips, _ = sample(21, 0, 4)
    # Purified clips stay close to the clips.
    assert (purifier(clips) - clips).square().mean() < 0.005


def sample(seed, start, count):
    clips, labels = tiny.sample_clips(start + count, seed)
    return clips[start:], labels[start:]


def test_a_batch_equals_its_clips_in_float32(purifier):
    clips, _ = tiny.sample_clips(3, seed=31)
    votes, ambiguous = latent_votes(purifier, clips)
    alone = torch.cat([latent_votes(purifier, clip[None])[0] for clip in clips], 1)
    error = (votes - alone).abs() / (1 + alone.abs())
    assert error[~ambiguous].max() <= 1e-5 and ambiguous.float().mean() < 1e-3
    # Without temporal guidance no sign is taken, and all pixels agree.
    signless = Purifier.from_pretrained("tiny", device="cpu", temporal_weight=0.0)
    batch = signless(clips, return_votes=True)
    singles = torch.stack([signless(clip, return_votes=True) for clip in clips])
    assert ((batch - singles).abs() / (1 + singles.abs())).max() <= 1e-5


@torch.no_grad()
def latent_votes(purifier, clips):
    """The votes before decoding (V, B, 4, F, h, w), and where float32 cannot tell the sign of a residual."""
    flow, target = purifier.latent_flow(clips), purifier.encode(clips)
    states, noises = purifier.denoise(target)
    ambiguous = []
    for z, e, step in zip(states, [*noises, noises[-1]], purifier._schedule.vote_coefficients(), strict=True):
        p = (z - step.sqrt_beta * e) / step.sqrt_alpha
        following = p[:, :, 1:].transpose(1, 2).flatten(0, 1)
        warped = warp(following, flow.flatten(0, 1)).unflatten(0, flow.shape[:2]).transpose(1, 2)
        unclear = (warped - p[:, :, :-1]).abs() <= 2e-5
        ambiguous.append(torch.cat([unclear, torch.zeros_like(unclear[:, :, :1])], 2))
    votes = purifier.vote(states, noises, target, flow)
    return votes, torch.stack(ambiguous)


def test_purify_is_one_call(purifier):
    clips, _ = tiny.sample_clips(1, seed=41)
    once = purify(clips, inversion_steps=0)
    assert once.shape == clips.shape
    assert torch.equal(purify(clips, inversion_steps=0), once)
    pixels = (clips[0] * 255).byte()
    assert purify(pixels, inversion_steps=0).dtype == torch.uint8
    with pytest.raises(TypeError, match="list"):
        purify([clips])
    with pytest.raises(ValueError, match="unknown method"):
        purify(clips, method="magic")
    for wrong in ({"flow": []}, {"model": (["tiny"],)}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} is a .* no hash to keep the model by"):
            purify(clips, **wrong)


def test_defended_classifier_votes(purifier):
    clips, labels = tiny.sample_clips(2, seed=51)
    defended = DefendedClassifier(tiny.load_classifier(), purifier)
    assert defended.vote_labels(clips).shape == (2, 7)
    assert defended(clips).shape == (2, 8)
    assert torch.equal(defended.predict(clips), labels)
