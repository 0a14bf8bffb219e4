"""The checks of an evaluation pass for what is sound, and fail for what is broken in the way they look for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import build_purifier, clips
from torch import Tensor, nn

from videopure_fast.evaluation.checks import (
    _EFFORT_STEPS,
    effort_check,
    gradient_check,
    order_checks,
    reach_check,
    source_check,
    stand_in_check,
)
from videopure_fast.evaluation.plan import Plan, Threat
from videopure_fast.evaluation.record import Record


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.features, self.head = nn.Conv3d(3, 6, 3, stride=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return 20 * self.head(torch.tanh(self.features(x - 0.5)).mean((2, 3, 4)))


CLASSIFIER = Classifier().requires_grad_(False)


def batch() -> tuple[Tensor, Tensor]:
    x = 0.2 + 0.6 * clips(2, 3, 4, 16, 16)
    return x, CLASSIFIER(x).argmax(-1)


def reversed_gradient(x: Tensor) -> Tensor:
    """CLASSIFIER(x), whose gradient leads an attacker astray."""
    return CLASSIFIER(2 * x.detach() - x)


def no_gradient(x: Tensor) -> Tensor:
    return CLASSIFIER(x.detach()) + 0 * x.sum()


def random_gradient(x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(1e6 * x.sum().item())))
    return CLASSIFIER(x.detach()) + ((x - x.detach()) * noise).sum((1, 2, 3, 4))[:, None] * torch.arange(5)


@pytest.mark.parametrize("method", ["videopure", "ddim"])
def test_the_exact_gradient_passes(method):
    purifier = build_purifier(method=method, prompts=2, cfg_denoise=2.0)
    with pytest.raises(TypeError, match="purifier must be a Purifier, got NoneType"):
        gradient_check(None, CLASSIFIER, *batch())
    check = gradient_check(purifier, CLASSIFIER, *(part[:1] for part in batch()))
    assert check.passed and check.seen.count(" for ") == 3
    assert purifier.unet.dtype is torch.float32 and CLASSIFIER.head.weight.dtype is torch.float32


def halved(z: Tensor) -> Tensor:
    return (z + z.detach()) / 2


def of_one_frame(z: Tensor) -> Tensor:
    """z, whose gradient reaches frame 0 alone: its own sign would not see what is missing."""
    return torch.cat([z[:, :, :1], z[:, :, 1:].detach()], 2)


@pytest.mark.parametrize("broken", [halved, of_one_frame])
def test_a_gradient_with_a_piece_missing_fails(broken, monkeypatch):
    purifier = build_purifier()
    encode = type(purifier)._encode
    monkeypatch.setattr(type(purifier), "_encode", lambda self, x: broken(encode(self, x)))
    assert not gradient_check(purifier, CLASSIFIER, *batch()).passed


@pytest.mark.parametrize("broken", [reversed_gradient, no_gradient, random_gradient])
def test_an_attack_that_goes_on_must_gain_more_than_noise(broken):
    check = effort_check(CLASSIFIER, *batch(), eps=8 / 255, steps=6)
    assert check.passed and "half way" in check.seen
    assert not effort_check(broken, *batch(), eps=8 / 255, steps=6).passed
    with pytest.raises(ValueError, match="steps must be 2 or more, got 1"):
        effort_check(CLASSIFIER, *batch(), eps=8 / 255, steps=1)


@pytest.mark.parametrize("steps", [2, 3, _EFFORT_STEPS, 10])
def test_the_last_loss_of_an_attack_that_goes_on_is_at_the_full_eps(steps):
    """Else an attack of less than eps would be compared with noise of eps."""
    x, labels = batch()
    attacked = []

    def straight(given: Tensor) -> Tensor:
        if given.requires_grad:
            attacked.append((given.detach() - x).abs())
        return given.mean((2, 3, 4)) * torch.tensor([1.0, 2, 3])

    effort_check(straight, x, labels % 3, eps=8 / 255, steps=steps)
    assert len(attacked) == steps and attacked[0].max() == 0
    torch.testing.assert_close(attacked[-1], torch.full_like(x, 8 / 255))


def fragile(x: Tensor) -> Tensor:
    """Right on clips as they are, wrong on any other: noise breaks it as soon as an attack does."""
    moved = (x - batch()[0]).abs().amax((1, 2, 3, 4), keepdim=True)[..., 0, 0, 0]
    right = F.one_hot(batch()[1], 5)
    return torch.where(moved < 32 / 255, right, 1 - right) + random_gradient(x) - random_gradient(x).detach()


def test_what_noise_breaks_as_soon_shows_no_attack():
    check = reach_check(fragile, *batch(), steps=2)
    assert not check.passed and check.seen.endswith("0.00 at 64/255 (noise 0.00), 0.00 at 255/255 (noise 0.00)")


def test_a_confident_classifier_has_a_gradient_to_check():
    class Confident(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return 1e3 * super().forward(x)

    x, labels = batch()
    assert F.cross_entropy(Confident()(x), labels) == 0
    assert gradient_check(build_purifier(), Confident().requires_grad_(False), x, labels).passed


@pytest.mark.parametrize("broken", [reversed_gradient, no_gradient, random_gradient])
def test_without_bounds_accuracy_must_reach_zero(broken):
    check = reach_check(CLASSIFIER, *batch(), steps=5)
    assert check.passed and "0.00 at 255/255 (noise" in check.seen
    assert not reach_check(broken, *batch(), steps=5).passed


def test_a_gradient_that_points_away_cannot_stand_in():
    check = stand_in_check(CLASSIFIER, CLASSIFIER, *batch())
    assert check.passed and check.seen == "its cosine with the exact one is 1.00, 1.00"
    assert not stand_in_check(CLASSIFIER, reversed_gradient, *batch()).passed


def test_the_attackers_own_classifier_must_be_accurate_and_fooled():
    x, labels = batch()
    check = source_check(CLASSIFIER, x, labels, eps=1.0)
    assert check.passed and check.seen == "right on 1.00 of clean clips, on 0.00 of those attacked at 255/255"
    assert source_check(CLASSIFIER, x, labels, eps=1.0, batch=1) == check
    assert not source_check(CLASSIFIER, x, (labels + 1) % 5, eps=1.0).passed
    assert not source_check(reversed_gradient, x, labels, eps=8 / 255).passed


def record(folder: Path, threat_model: str, right: list[int], **given) -> Record:
    """The record of one attack on videopure; right: which of the clips it left right."""
    pgd = {"attack": "pgd", "settings": {"steps": 10, "step_size": 0.1}}
    attack = ({"attack": "square"} if threat_model == "query" else pgd) | given
    threat = Threat(threat_model, **attack, clips=len(right))
    plan = Plan("test", (threat,), ("none", "videopure"), seeds=(0,), batch=len(right))
    found = Record(folder / f"{threat_model} {plan.hash}.json", plan)
    for batch in plan.batches():
        for name in plan.defenses:
            found.add(batch.name(name), {"right": right, "repeats": 1, "seconds": 1.0, "peak_bytes": None})
    return found


def test_who_knows_more_must_not_do_worse(tmp_path):
    half, most = [1, 0] * 16, [1, 1, 1, 0] * 8
    attacks = {"gray-box": most, "bpda": half, "exact": half[:-1] + [1], "query": most, "transfer": [1] * 32}
    checks = order_checks(*(record(tmp_path, *item) for item in attacks.items()))
    assert all(check.passed for check in checks)
    assert [check.name.split(": ")[1].replace("is at least as strong as", "<=") for check in checks] == [
        *("exact <= bpda", "exact <= gray-box", "bpda <= gray-box", "bpda <= query", "bpda <= transfer"),
    ]
    assert checks[0].seen == ("leaves 0.531 against 0.500 of 32 clips, 1 of 1 that differ (p = 0.5)")
    # Eight clips withstand what is meant to be the stronger attack, and none the other alone.
    (check,) = order_checks(record(tmp_path, "exact", most + [1]), record(tmp_path, "bpda", half))
    assert not check.passed and check.seen.endswith(", 8 of 8 that differ (p = 0.0039)")


@pytest.mark.parametrize(("against", "in_favor", "passed"), [(5, 0, True), (6, 0, False), (7, 1, True), (8, 1, False)])
def test_few_clips_break_no_order(against, in_favor, passed, tmp_path):
    """One-sided sign test at 0.025: 1/32 and 9/256 are more, 1/64 and 10/512 less."""
    exact = record(tmp_path, "exact", [1] * against + [0] * in_favor)
    (check,) = order_checks(exact, record(tmp_path, "bpda", [0] * against + [1] * in_favor))
    assert check.passed == passed


def test_only_what_can_be_compared_is(tmp_path):
    exact = record(tmp_path, "exact", [1] * 8)
    assert not order_checks(exact, record(tmp_path, "bpda", [0] * 8, settings={"steps": 20, "step_size": 0.1}))
    assert not order_checks(exact, record(tmp_path, "bpda", [0] * 8, attack="apgd", settings={"steps": 10}))
    assert not order_checks(record(tmp_path, "gray-box", [1] * 8), record(tmp_path, "query", [0] * 8))
