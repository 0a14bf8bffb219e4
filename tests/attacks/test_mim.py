"""MIM against its algorithm."""

import torch
from attack_cases import case

from videopure_fast.attacks import mim
from videopure_fast.attacks.losses import cross_entropy


def test_momentum_is_the_sum_of_gradients_of_mean_size_one():
    model, video, labels = case()
    x, momentum = video, 0
    for _ in range(4):
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(point), labels).sum(), point)
        momentum = 0.9 * momentum + gradient / gradient.abs().mean((1, 2, 3, 4), keepdim=True)
        x = torch.minimum(torch.maximum(x + 0.01 * momentum.sign(), video - 0.025), video + 0.025)
    torch.testing.assert_close(mim(model, video, labels, eps=0.025, step_size=0.01, steps=4, decay=0.9), x)
