"""Patch: which pixels change."""

import torch
from attack_cases import case, seeded

from videopure_fast.attacks import patch


def test_patch_changes_one_square_at_all_frames():
    model, video, labels = case(6)
    attacked = patch(model, video, labels, size=3, corner=(2, 5), generator=seeded())
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 5:8] = True
    assert torch.equal(attacked[..., ~inside], video[..., ~inside])
    assert (attacked != video)[..., inside].float().mean() > 0.9
    assert attacked[..., inside].min() == 0 and attacked[..., inside].max() == 1
    drawn = (patch(model, video, labels, size=3, generator=seeded()) != video).any(1)
    places = {tuple(torch.stack([where.any(0).any(d) for d in (0, 1)]).flatten().tolist()) for where in drawn}
    assert drawn.any(1).sum((1, 2)).tolist() == [9] * 6 and len(places) > 2
