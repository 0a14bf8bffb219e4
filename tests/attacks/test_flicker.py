"""Flicker: its offsets and their penalty."""

import pytest
import torch
from attack_cases import case

from videopure_fast.attacks import flicker
from videopure_fast.attacks.flicker import _penalty


def test_flicker_is_one_smooth_offset_a_frame():
    model, video, labels = case(4)
    rough, smooth = (
        flicker(model, video, labels, eps=0.1, steps=30, thickness=0.0, roughness=weight) - video for weight in (0, 50)
    )
    for delta in (rough, smooth):
        assert delta.std((3, 4)).max() < 1e-6 and delta.abs().max() > 0.01
    assert rough.mean((3, 4)).diff(dim=2).square().mean() > 4 * smooth.mean((3, 4)).diff(dim=2).square().mean()
    u = torch.tensor([0.0, 1.0, 0.0, 0.0]).view(1, 1, 4, 1, 1)
    # Thickness 1; first differences 1, -1; second differences 1, -2, 1: means over 4 frames.
    assert _penalty(u, 1.0, 10.0).item() == pytest.approx((1 + 10 * (2 + 6)) / 4)
    thin = flicker(model, video, labels, eps=0.1, steps=30, thickness=100.0) - video
    assert thin.abs().mean() < 0.5 * rough.abs().mean()
