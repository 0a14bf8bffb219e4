"""The checks of an evaluation pass for what is sound, and fail for what is broken in the way they look for."""

from __future__ import annotations

import pytest
import torch
from conftest import build_purifier, clips
from torch import Tensor, nn

from videopure_fast.checks import effort_check, gradient_check, order_checks, reach_check, source_check
from videopure_fast.evaluation import Accuracy, wilson_interval


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


@pytest.mark.parametrize("method", ["videopure", "ddim"])
def test_the_exact_gradient_passes(method):
    purifier = build_purifier(method=method, prompts=2, cfg_denoise=2.0)
    check = gradient_check(purifier, CLASSIFIER, *(part[:1] for part in batch()))
    assert check.passed and "by differences" in check.seen
    assert purifier.unet.dtype is torch.float32 and CLASSIFIER.head.weight.dtype is torch.float32


def test_a_gradient_with_a_piece_missing_fails(monkeypatch):
    purifier = build_purifier()
    encode = type(purifier).encode
    monkeypatch.setattr(type(purifier), "encode", lambda self, x: (encode(self, x) + encode(self, x).detach()) / 2)
    assert not gradient_check(purifier, CLASSIFIER, *batch()).passed


def test_an_attack_that_goes_on_must_gain():
    check = effort_check(CLASSIFIER, *batch(), eps=8 / 255, steps=6)
    assert check.passed and "half way" in check.seen
    assert not effort_check(reversed_gradient, *batch(), eps=8 / 255, steps=6).passed


def test_the_attackers_own_classifier_must_be_accurate_and_fooled():
    x, labels = batch()
    check = source_check(CLASSIFIER, x, labels, eps=1.0)
    assert check.passed and check.seen == "right on 1.00 of clean clips, on 0.00 of those attacked at 255/255"
    assert not source_check(CLASSIFIER, x, (labels + 1) % 5, eps=1.0).passed
    assert not source_check(reversed_gradient, x, labels, eps=8 / 255).passed


def test_without_bounds_accuracy_must_reach_zero():
    check = reach_check(CLASSIFIER, *batch(), eps=(0.5 / 255, 1.0), steps=5)
    assert check.passed and check.seen.endswith("0.00 at 255/255")
    assert not reach_check(reversed_gradient, *batch(), eps=(8 / 255,), steps=5).passed


def row(access: str, accuracy: float, attack: str = "pgd, steps=10", n: int = 100, eps: float = 4 / 255) -> Accuracy:
    interval = wilson_interval(accuracy, n)
    return Accuracy(access, f"{access} {attack}", eps, "videopure", n, accuracy, *interval, accuracy, 1.0, None)


def test_who_knows_more_must_not_do_worse():
    sound = [row("gray-box", 0.9), row("bpda", 0.5), row("exact", 0.55), row("query", 0.8), row("transfer", 0.95)]
    names = [check.name for check in order_checks(sound)]
    assert all(check.passed for check in order_checks(sound))
    assert [name.removeprefix("videopure, 4/255: ").replace("is at least as strong as", "<=") for name in names] == [
        *("exact <= bpda", "exact <= gray-box", "bpda <= gray-box", "bpda <= query", "bpda <= transfer"),
    ]
    # 0.5 is not below 0.3 of 100 clips; of 10 it may be.
    assert [check.passed for check in order_checks([row("exact", 0.5), row("bpda", 0.3)])] == [False]
    assert [check.passed for check in order_checks([row("exact", 0.5, n=10), row("bpda", 0.3, n=10)])] == [True]
    assert [check.passed for check in order_checks([row("bpda", 0.9), row("query", 0.3)])] == [False]


def test_only_equal_budgets_and_eps_are_compared():
    assert not order_checks([row("exact", 0.9), row("bpda", 0.1, "pgd, steps=20")])
    assert not order_checks([row("exact", 0.9), row("bpda", 0.1, eps=8 / 255)])
    assert not order_checks([row("none", 1.0), row("adaptive", 0.0), row("gray-box", 0.5)])
