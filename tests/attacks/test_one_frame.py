"""One frame: which frame changes."""

import pytest
import torch
from attack_cases import case, seeded

from videopure_fast.attacks import one_frame
from videopure_fast.attacks.losses import cross_entropy


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_frame_changes_one_frame(norm):
    model, video, labels = case(6)
    given = {"eps": 0.3, "norm": norm, "restarts": 2, "generator": seeded()}
    changed = (one_frame(model, video, labels, **given, frame=2) != video).any(4).any(3).any(1)
    assert torch.equal(changed, torch.tensor([[False, False, True, False]]).expand(6, 4))
    step = one_frame(model, video, labels, eps=0.1, norm="l2", steps=1, step_size=0.1, frame=2) - video
    assert step.flatten(1).norm(dim=1).tolist() == pytest.approx([0.1] * 6, rel=1e-3)  # no length lost to other frames
    point = video.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(point), labels).sum(), point)
    largest = gradient.transpose(1, 2).flatten(2).norm(dim=2).argmax(1)
    changed = (one_frame(model, video, labels, **given) != video).any(4).any(3).any(1)
    assert changed.sum() == 6 and torch.equal(changed.int().argmax(1), largest)
