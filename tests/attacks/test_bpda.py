"""BPDA: its values and its gradients."""

import pytest
import torch
from attack_cases import CLASSES, case, losses, seeded

from videopure_fast.attacks import bpda, pgd


def test_bpda_passes_the_classifiers_gradient_at_the_purified_clip():
    model, video, _ = case(2)

    def purify(x):
        assert not torch.is_grad_enabled()
        return (x * 8).round() / 8

    point, purified = video.clone().requires_grad_(), purify_outside(purify, video).requires_grad_()
    weights = torch.randn(2, CLASSES, generator=seeded())
    defended, plain = bpda(purify, model)(point), model(purified)
    assert torch.equal(defended, plain)
    (ours,) = torch.autograd.grad((defended * weights).sum(), point)
    (exact,) = torch.autograd.grad((plain * weights).sum(), purified)
    assert torch.equal(ours, exact) and ours.abs().max() > 0


def purify_outside(purify, video):
    with torch.no_grad():
        return purify(video)


def test_bpda_passes_the_gradient_of_every_vote():
    model, video, labels = case(2)

    def purify(x):
        return torch.stack([(x * n).round() / n for n in (4, 8, 16)], 1)

    point, purified = video.clone().requires_grad_(), purify(video).requires_grad_()
    weights = torch.randn(2, 3, CLASSES, generator=seeded())
    defended = bpda(purify, model)(point)
    plain = torch.stack([model(one) for one in purified.unbind(1)], 1)
    assert defended.shape == (2, 3, CLASSES) and torch.equal(defended, plain)
    (ours,) = torch.autograd.grad((defended * weights).sum(), point)
    (exact,) = torch.autograd.grad((plain * weights).sum(), purified)
    torch.testing.assert_close(ours, exact.sum(1))
    attacked = pgd(bpda(purify, model), video, labels, eps=0.1, step_size=0.02, steps=5, generator=seeded())
    assert losses(bpda(purify, model), attacked, labels).mean() > losses(bpda(purify, model), video, labels).mean()
    with pytest.raises(ValueError, match=r"purify must return clips \(2, 3, 4, 8, 8\)"):
        bpda(lambda x: x[:, :, :2], model)(video)
