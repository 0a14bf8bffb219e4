"""Gradients through a purification: exact, in flat memory, and the two ways in which an attacker may approximate it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import build_purifier, clips
from torch import Tensor, nn

from videopure_fast import DefendedClassifier, Purifier

METHODS = ("videopure", "ddim_inversion", "ddim", "ddpm")
SEED = 4


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.features, self.head = nn.Conv3d(3, 6, 3, stride=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.features(x - 0.5)).mean((2, 3, 4)))


def defend(purifier: Purifier, **options) -> DefendedClassifier:
    classifier = Convolutional().requires_grad_(False)
    return DefendedClassifier(classifier, purifier, **options).to(purifier.unet.dtype).eval()


def double(**config) -> Purifier:
    return build_purifier(dtype=torch.float64, **config)


def video(*shape: int, seed: int = 0) -> Tensor:
    """Far enough from 0 and 1 that no clamp stands in a derivative's way."""
    return 0.2 + 0.6 * clips(*shape, seed=seed, dtype=torch.float64)


def loss(defended: DefendedClassifier, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return F.cross_entropy(defended(x, generator=generator), torch.arange(len(x)))


def gradient(defended: DefendedClassifier, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(defended, x), x)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_defense_matches_finite_differences(method):
    defended = defend(double(method=method, inversion_steps=0 if method == "ddpm" else 1))
    x, h = video(1, 3, 4, 16, 16), 1e-6
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    with torch.no_grad():
        numeric = (loss(defended, x + h * direction) - loss(defended, x - h * direction)) / (2 * h)
    analytic = (gradient(defended, x) * direction).sum()
    assert analytic.abs() > 1e-9
    torch.testing.assert_close(analytic, numeric, rtol=1e-4, atol=0)


@pytest.mark.parametrize("frames", [3, 11])
@pytest.mark.parametrize("settings", [{}, {"prompts": 2, "cfg_denoise": 2.0, "cfg_inversion": 1.5}])
def test_computing_again_changes_nothing(settings, frames, monkeypatch):
    """Against autograd that keeps everything; 11 frames are two windows."""
    defended, x = defend(double(**settings)), video(2, 3, frames, 16, 18)
    checkpointed = gradient(defended, x)
    monkeypatch.setattr("videopure_fast.runtime.checkpointing.checkpoint", lambda run, *inputs, **_: run(*inputs))
    monkeypatch.setattr(
        "videopure_fast.defense.classifier.checkpoint", lambda function, *inputs, **_: function(*inputs)
    )
    torch.testing.assert_close(checkpointed, gradient(defended, x), rtol=0, atol=1e-15)
    assert checkpointed.abs().sum() > 0


def test_memory_hardly_grows_with_steps():
    """What is kept for the backward pass: of each step a few tensors of the latents' size, and each vote's clip."""

    def kept(steps: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        defended = defend(double(inversion_steps=steps))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = loss(defended, video(1, 3, 8, 16, 16).requires_grad_())
        assert result.requires_grad
        return sum(sizes.values())

    latents, clip = 8 * 4 * 8 * 8 * 8, 8 * 3 * 8 * 16 * 16  # bytes
    few, many = kept(1), kept(9)
    assert (many - few) / 8 < 12 * latents + 6 * clip  # an evaluation keeps 100 times as much
    assert few < 100 * latents


def test_the_logits_are_the_same_for_every_gradient():
    purifier, x = double(), video(2, 3, 4, 16, 16)
    exact = defend(purifier).vote_logits(x)
    for name in ("exact", "bpda", "surrogate"):
        defended = defend(purifier, gradient=name)
        assert torch.equal(defended.vote_logits(x.clone().requires_grad_()).detach(), exact)
        assert defended.vote_logits(x).grad_fn is None


def test_bpda_is_the_classifiers_gradient_at_the_votes():
    purifier, x = double(), video(2, 3, 4, 16, 16)
    defended = defend(purifier, gradient="bpda")
    votes = purifier(x, return_votes=True).requires_grad_()
    logits = torch.stack([defended.classifier(vote) for vote in votes.unbind(1)], 1).mean(1)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(2)), votes)
    torch.testing.assert_close(gradient(defended, x), expected.sum(1), rtol=0, atol=1e-15)


def test_a_surrogate_like_the_purifier_has_its_gradient():
    purifier, x = double(inversion_steps=2), video(1, 3, 4, 16, 16)
    settings = {"inversion_steps": 2, "sign_temperature": 0}
    same = gradient(defend(purifier, gradient="surrogate", surrogate=settings), x)
    exact = gradient(defend(purifier), x)
    torch.testing.assert_close(same, exact, rtol=0, atol=1e-15)
    other = gradient(defend(purifier, gradient="surrogate"), x)
    assert other.abs().sum() > 0 and not torch.allclose(other, exact, rtol=1e-2, atol=0)


def test_a_softened_sign_has_a_derivative_and_sharpens():
    purifier, x = double(temporal_weight=50.0, flow=None), video(1, 3, 4, 16, 16)  # flow is a constant to gradients
    soft = purifier.with_config(sign_temperature=0.5)
    direction, h = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype), 1e-6
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    numeric = ((soft(x + h * direction) - soft(x - h * direction)) * weight).sum() / (2 * h)
    wanted = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((soft(wanted) * weight).sum(), wanted)
    torch.testing.assert_close((found * direction).sum(), numeric, rtol=1e-4, atol=0)
    sharp, hard = purifier.with_config(sign_temperature=1e-9)(x), purifier(x)
    torch.testing.assert_close(sharp, hard, rtol=0, atol=1e-6)
    assert not torch.allclose(soft(x), hard, rtol=0, atol=1e-6)


def test_variants_share_models_and_nothing_else(purifier):
    video = clips(1, 3, 4, 16, 16)
    before = purifier(video)
    other = purifier.with_config(method="ddim_inversion", inversion_steps=3)
    assert other.unet is purifier.unet and other.config.inversion_steps == 3
    expected = build_purifier(method="ddim_inversion", inversion_steps=3)(video)
    for _ in range(3):
        torch.testing.assert_close(other(video), expected, rtol=0, atol=1e-6)
        assert torch.equal(purifier(video), before)
    with pytest.raises(TypeError, match="unknown settings depth; accepted: method"):
        purifier.with_config(depth=3)


def test_a_defense_says_what_it_is():
    properties = {name: build_purifier(method=name).properties for name in METHODS}
    assert properties["videopure"] == {"randomized": False, "dynamic": True}
    assert properties["ddim_inversion"] == {"randomized": False, "dynamic": False}
    assert properties["ddim"] == properties["ddpm"] == {"randomized": True, "dynamic": False}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "true"}, ValueError, "unknown gradient 'true'; accepted: exact, bpda, surrogate"),
        ({"surrogate": {"inversion_steps": 1}}, ValueError, "surrogate settings need gradient='surrogate'"),
        ({"gradient": "surrogate", "surrogate": {"steps": 1}}, TypeError, "unknown settings steps"),
        ({"gradient": "surrogate", "surrogate": {"inversion_steps": -1}}, ValueError, "inversion_steps must satisfy"),
        (
            {"gradient": "surrogate", "surrogate": {"sign_temperature": -1}},
            ValueError,
            "must be 0, or 1e-30 or more, got -1",
        ),
    ],
)
def test_bad_options_are_refused(purifier, options, error, message):
    with pytest.raises(error, match=message):
        DefendedClassifier(Convolutional(), purifier, **options)
