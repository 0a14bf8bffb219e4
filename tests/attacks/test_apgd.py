"""Auto-PGD against its algorithm and PGD."""

import itertools

import pytest
import torch
from attack_cases import Net, case, losses, seeded

from videopure_fast.attacks import apgd, pgd
from videopure_fast.attacks.losses import cross_entropy


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.4)])
def test_apgd_is_at_least_as_strong_as_pgd(norm, eps):
    ours, theirs = [], []
    for seed in range(4):
        model, video, labels = case(8, Net(seed), seed)
        strong = apgd(model, video, labels, eps=eps, steps=20, norm=norm, generator=seeded(seed))
        plain = pgd(model, video, labels, eps=eps, step_size=eps / 4, steps=20, norm=norm, generator=seeded(seed))
        ours.append(losses(model, strong, labels).mean())
        theirs.append(losses(model, plain, labels).mean())
    assert sum(ours) >= sum(theirs)


def slow_apgd(model, video, labels, eps, steps, loss_of):
    """Algorithm 1 of arXiv 2003.01690 for one clip in l_inf, from whole histories: the clips it looks at."""
    low, high = (video - eps).clamp(min=0), (video + eps).clamp(max=1)
    points, values, signs = [], [], []

    def look(x):
        point = x.clone().requires_grad_()
        loss = loss_of(model(point), labels).sum()
        signs.append(torch.autograd.grad(loss, point)[0].sign())
        points.append(x), values.append(loss.item())

    look(video)
    step, last, best_then, halved = 2 * eps, 0, values[0], True
    width = int(0.22 * steps)
    x, sign, before = video, signs[0], None
    for k in range(1, steps + 1):
        moved = (x + step * sign).clamp(low, high)
        if before is not None:
            moved = (x + 0.75 * (moved - x) + 0.25 * (x - before)).clamp(low, high)
        look(moved)
        before, x, sign = x, moved, signs[-1]
        if k == last + width:
            rises = sum(values[j] > values[j - 1] for j in range(last + 1, k + 1))
            halved = rises <= 0.75 * width or (not halved and max(values) <= best_then)
            if halved:
                peak = values.index(max(values))
                step, x, sign = step / 2, points[peak], signs[peak]
            last, best_then, width = k, max(values), max(width - int(0.03 * steps), int(0.06 * steps))
    return torch.cat(points)


def rising_below_its_start():
    """A loss that falls at its second call and rises from there without reaching its start again."""
    count = itertools.count()
    return lambda z, y: cross_entropy(z, y) + (next(count) or 1e6)


@pytest.mark.parametrize("make_loss", [lambda: cross_entropy, rising_below_its_start])
@pytest.mark.parametrize(("eps", "steps"), [(0.2, 60), (0.03, 40)])
def test_apgd_is_its_algorithm(eps, steps, make_loss):
    model, video, labels = case(4, dtype=torch.float64)
    slow = [slow_apgd(model, video[i : i + 1], labels[i : i + 1], eps, steps, make_loss()) for i in range(4)]
    seen = []
    given = {"eps": eps, "steps": steps, "random_start": False, "loss": make_loss()}
    found = apgd(lambda x: seen.append(x.detach()) or model(x), video, labels, **given)
    torch.testing.assert_close(torch.stack(seen), torch.stack(slow, 1), rtol=0, atol=1e-9)
    if make_loss is not rising_below_its_start:
        raised = torch.stack([losses(model, x, labels) for x in seen])
        torch.testing.assert_close(losses(model, found, labels), raised.amax(0))


def test_apgd_keeps_its_best_clip():
    """On a loss that falls from a point on, the last clip is worse than the best; steps of a fixed size overshoot."""
    seen = []

    def peaked(x):
        height = -(x.flatten(1).mean(1) - 0.53).abs()
        seen.append(height.detach())
        return torch.stack([-height, torch.zeros_like(height), height - 1], 1)

    video = torch.full((2, 3, 2, 3, 3), 0.5)
    labels = torch.zeros(2, dtype=torch.int64)
    found = apgd(peaked, video, labels, eps=0.1, steps=30, loss=lambda z, y: -z[:, 0], random_start=False)
    visited = torch.stack(seen)
    assert torch.equal(peaked(found)[:, 0], -visited.amax(0))
    assert visited[-1].min() > -0.004  # halved steps close in on the peak: the first are of 0.1
    assert visited[:3].amax(0).max() < -0.02
