"""Losses that attacks raise."""

import pytest
import torch
from attack_cases import CLASSES, seeded

from videopure_fast.attacks.losses import cross_entropy, dlr, margin


def test_losses_of_votes_are_means():
    logits, labels = torch.randn(4, 3, CLASSES, generator=seeded()), torch.tensor([0, 1, 2, 4])
    for loss in (cross_entropy, dlr, margin):
        torch.testing.assert_close(
            loss(logits, labels), torch.stack([loss(z, labels) for z in logits.unbind(1)]).mean(0)
        )


def test_losses_by_hand():
    logits, labels = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0]]), torch.tensor([0, 1])
    assert margin(logits, labels).tolist() == [-1, 2]
    assert dlr(logits, labels).tolist() == pytest.approx([-0.5, 1.0])
    with pytest.raises(ValueError, match="2 classes"):
        dlr(logits[:, :2], labels)
