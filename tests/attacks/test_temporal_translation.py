"""Temporal translation against its algorithm."""

import numpy as np
import pytest
import torch
from attack_cases import case

from videopure_fast.attacks import pgd, temporal_translation
from videopure_fast.attacks.losses import cross_entropy
from videopure_fast.attacks.temporal_translation import _shift_weights


def test_temporal_translation_averages_shifted_gradients():
    model, video, labels = case(2, dtype=torch.float64)
    expected = 0
    for shift, weight in {-1: 0.25, 0: 0.5, 1: 0.25}.items():
        point = video.roll(shift, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(point), labels).sum(), point)
        expected = expected + weight * gradient.roll(-shift, 2)
    given = {"eps": 0.01, "steps": 1, "max_shift": 1, "weights": "linear", "norm": "l2"}
    step = temporal_translation(model, video, labels, **given) - video
    torch.testing.assert_close(step, 0.01 * expected / expected.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1))
    given = {"eps": 0.01, "steps": 3}
    still = temporal_translation(model, video, labels, **given, max_shift=0)
    plain = pgd(model, video, labels, **given, step_size=0.01 / 3, random_start=False)
    torch.testing.assert_close(still, plain, rtol=0, atol=1e-12)
    bell = _shift_weights("gaussian", 7)  # 7 frames are 3 sigma
    assert sum(bell.values()) == pytest.approx(1) and bell[-7] / bell[0] == pytest.approx(np.exp(-4.5))
