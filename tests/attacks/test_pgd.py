"""PGD against its algorithm and the code of others."""

import pytest
import torch
from attack_cases import case, losses, seeded
from torch import nn

from videopure_fast.attacks import pgd
from videopure_fast.attacks.base import perturb


def slow_pgd(model, video, labels, *, eps, step_size, steps, random_start=True, generator=None):
    """Its algorithm, with the bounds of every ball."""
    low, high = (perturb(video, torch.full_like(video, reach)) for reach in (-eps, eps))
    attacked = video.clone()
    if random_start:
        attacked = low + (high - low) * torch.rand(video.shape, generator=generator, dtype=video.dtype)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(attacked), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = (attacked.detach() + step_size * gradient.sign()).clamp(low, high)
    return attacked


@pytest.mark.parametrize("seed", range(3))
def test_pgd_is_its_algorithm(seed):
    model, video, labels = case(seed=seed)
    for start in (True, False):
        given = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 5, "random_start": start}
        slow = slow_pgd(model, video, labels, **given, generator=seeded(seed))
        assert torch.equal(pgd(model, video, labels, **given, generator=seeded(seed)), slow)
    assert torch.equal(pgd(model, video, labels, eps=0.1, step_size=0.1, steps=0, random_start=False), video)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", lambda z, y: -z.gather(1, y[:, None])[:, 0]])
def test_loss_rises_with_steps_and_budget(norm, loss):
    model, video, labels = case(16)
    eps = {"linf": 0.01, "l2": 0.3}[norm]
    given = {"norm": norm, "loss": loss, "random_start": False}

    def reached(steps, eps):
        attacked = pgd(model, video, labels, eps=eps, step_size=eps / 4, steps=steps, **given)
        return losses(model, attacked, labels).mean(), (model(attacked).argmax(1) != labels).sum()

    (once, _), (often, few), (wide, many) = reached(1, eps), reached(6, eps), reached(6, 5 * eps)
    assert losses(model, video, labels).mean() < once < often < wide
    assert few < many and many >= 14


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.5)])
def test_pgd_equals_foolboxs(norm, eps):
    foolbox = pytest.importorskip("foolbox")
    model, video, labels = case(4)
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    theirs = kind(abs_stepsize=eps / 4, steps=6, random_start=False).run(
        wrapped, video, foolbox.criteria.Misclassification(labels), epsilon=eps
    )
    ours = pgd(model, video, labels, eps=eps, step_size=eps / 4, steps=6, norm=norm, random_start=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert not torch.allclose(ours, video, atol=1e-3)
