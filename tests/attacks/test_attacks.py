"""Attacks on a small random classifier, in which every frame and pixel counts."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from conftest import clips
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from videopure_fast import attacks
from videopure_fast.attacks import ATTACKS, apgd, bpda, fgsm, flicker, mim, one_frame, patch, pgd, square
from videopure_fast.attacks import base as attack_parts

CLASSES = 5
MINIMAL = {"pgd": {"step_size": 0.01, "steps": 2}, "patch": {"size": 3}, "square": {"queries": 8}}
SHORT = ("mim", "apgd", "temporal_translation", "flicker", "one_frame", "patch")  # attacks whose steps have a default
NORMS = ("fgsm", "pgd", "mim", "apgd", "temporal_translation", "one_frame")


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d((2, 4, 4)), nn.Flatten()
            )
            self.head = nn.Linear(8 * 32, CLASSES)

    def forward(self, x):
        return 10 * self.head(self.body(x - 0.5))


class Votes(nn.Module):
    """Three votes (B, 3, K), of three nets."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(Net(seed) for seed in range(3))

    def forward(self, x):
        return torch.stack([net(x) for net in self.nets], 1)


class Noisy(nn.Module):
    """A net behind noise that is drawn anew at each call."""

    def __init__(self, seed=0):
        super().__init__()
        self.net, self.generator = Net(), torch.Generator().manual_seed(seed)

    def forward(self, x):
        return self.net(x + 0.5 * torch.randn(x.shape, generator=self.generator, dtype=x.dtype))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(count=4, model=None, seed=0, dtype=torch.float32):
    """A model, clips inside (0.2, 0.8), and the labels that the model gives them."""
    model = (model or Net()).to(dtype)
    video = 0.2 + 0.6 * clips(count, 3, 4, 8, 8, seed=seed, dtype=dtype)
    with torch.no_grad():
        return model, video, attack_parts.majority_vote(model(video))


def arguments(name, **given):
    """What the attack needs at least, kept short, and what is given."""
    return {"eps": 0.03, **({"steps": 2} if name in SHORT else {}), **MINIMAL.get(name, {}), **given}


def losses(model, video, labels):
    with torch.no_grad():
        return attack_parts.cross_entropy(model(video), labels)


def slow_pgd(model, video, labels, *, eps, step_size, steps, random_start=True, generator=None):
    """Its algorithm, with the bounds of every ball."""
    low, high = (attack_parts.shift(video, torch.full_like(video, reach)) for reach in (-eps, eps))
    attacked = video.clone()
    if random_start:
        attacked = low + (high - low) * torch.rand(video.shape, generator=generator, dtype=video.dtype)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(attacked), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = (attacked.detach() + step_size * gradient.sign()).clamp(low, high)
    return attacked


# Balls


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(ATTACKS)),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(1e-7, 0.9),
    shape=st.tuples(st.integers(1, 2), st.just(3), st.integers(1, 3), st.integers(3, 6), st.integers(3, 6)),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_balls_hold_after_rounding(name, norm, eps, shape, seed, dtype):
    model, video = Net().to(dtype), torch.rand(shape, generator=seeded(seed)).to(dtype)
    video[:, 0] = video[:, 0].round() * 1e-9 + (video[:, 0] > 0.5)  # about 0 and 1, where rounding is uneven
    norm = norm if name in NORMS else "linf"
    given = arguments(name, eps=eps) | ({"norm": norm} if name in NORMS else {})
    if "random_start" in inspect.signature(ATTACKS[name].run).parameters:
        given["random_start"] = True
    labels = torch.zeros(len(video), dtype=torch.int64)
    attacked = ATTACKS[name].run(model, video.clamp(0, 1), labels, **given, generator=seeded(seed))
    delta = attacked - video.clamp(0, 1)
    assert 0 <= attacked.min() and attacked.max() <= 1 and attacked.dtype == dtype
    if norm == "linf":
        assert delta.abs().max() <= eps
    else:
        assert delta.double().flatten(1).norm(dim=1).max() <= eps * (1 + 1e-6)


@pytest.mark.parametrize("eps", [1e-3, 4 / 255, 0.3])
def test_balls_are_filled(eps):
    """An attack that moved nothing would hold any ball."""
    model, video, labels = case()
    boxed = pgd(model, video, labels, eps=eps, step_size=eps, steps=2, generator=seeded())
    assert eps * 0.99 <= (boxed - video).abs().amax((1, 2, 3, 4)).min()
    assert (boxed - video).abs().max() <= eps
    round_ball = pgd(model, video, labels, eps=eps, step_size=eps, steps=3, norm="l2", generator=seeded())
    assert eps * 0.99 <= (round_ball - video).flatten(1).norm(dim=1).min()


def test_random_starts_fill_the_ball():
    video = torch.full((64, 3, 2, 4, 4), 0.5)
    box, ball = (attack_parts.Ball(video, 0.2, norm).draw(seeded()) - 0.5 for norm in ("linf", "l2"))
    assert box.abs().max() > 0.19 and abs(box.mean()) < 0.01 and box.std() == pytest.approx(0.4 / 12**0.5, rel=0.02)
    # A uniform point of a ball in n dimensions lies at eps times the n-th root of a uniform number.
    lengths = ball.flatten(1).norm(dim=1) / 0.2
    assert (lengths**96).mean() == pytest.approx(0.5, abs=0.12) and abs(ball.mean()) < 0.001


# What the attacks achieve


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


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_fools_with_a_large_budget(name):
    model, video, labels = case(8)
    given = arguments(name, eps=0.6, **({"steps": 10} if name in SHORT else {}))
    given |= {"queries": 150} if name == "square" else {"size": 8} if name == "patch" else {}
    given |= {"step_size": 0.1, "steps": 10} if name == "pgd" else {}
    attacked = ATTACKS[name].run(model, video, labels, **given, generator=seeded())
    assert (model(attacked).argmax(1) != labels).sum() >= 6
    assert losses(model, attacked, labels).mean() > losses(model, video, labels).mean() + 0.5


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
    return lambda z, y: attack_parts.cross_entropy(z, y) + (next(count) or 1e6)


@pytest.mark.parametrize("make_loss", [lambda: attack_parts.cross_entropy, rising_below_its_start])
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


def test_momentum_is_the_sum_of_gradients_of_mean_size_one():
    model, video, labels = case()
    x, momentum = video, 0
    for _ in range(4):
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(attack_parts.cross_entropy(model(point), labels).sum(), point)
        momentum = 0.9 * momentum + gradient / gradient.abs().mean((1, 2, 3, 4), keepdim=True)
        x = torch.minimum(torch.maximum(x + 0.01 * momentum.sign(), video - 0.025), video + 0.025)
    torch.testing.assert_close(mim(model, video, labels, eps=0.025, step_size=0.01, steps=4, decay=0.9), x)


def test_eot_quiets_the_gradient_of_a_random_model():
    _, video, labels = case()

    def spread(eot):
        targets = (attack_parts.Target(Noisy(seed), labels, attack_parts.cross_entropy, eot) for seed in range(8))
        return torch.stack([target.gradient(video) for target in targets]).std(0).mean()

    assert spread(16) < 0.4 * spread(1)  # 0.25 in expectation


@pytest.mark.parametrize("name", ["pgd", "apgd", "mim", "one_frame"])
def test_restarts_are_never_weaker(name):
    model, video, labels = case(8)
    given = arguments(name, eps=0.01)
    given |= {"steps": 6, "step_size": 0.005} if name in ("mim", "one_frame") else {}
    one, five = (ATTACKS[name].run(model, video, labels, **given, restarts=n, generator=seeded()) for n in (1, 5))
    fooled = [model(x).argmax(1) != labels for x in (one, five)]
    raised = [losses(model, x, labels) for x in (one, five)]
    assert ((fooled[1] & ~fooled[0]) | ((fooled[1] == fooled[0]) & (raised[1] >= raised[0]))).all()
    assert not torch.equal(one, five)


def test_a_restart_that_fools_wins_over_a_larger_loss():
    best = attack_parts.Best(torch.zeros(3, 1), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([9.0, 1.0, 1.0]))
    best.offer(torch.ones(3, 1), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 9.0, 2.0]))
    assert best.clips.flatten().tolist() == [1, 0, 1] and best.loss.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"square", "patch"}))
def test_a_batch_equals_its_clips(name):
    model, video, labels = case(3, dtype=torch.float64)
    given = arguments(name) | ({"random_start": False} if name in ("pgd", "apgd") else {})
    together = ATTACKS[name].run(model, video, labels, **given)
    alone = [ATTACKS[name].run(model, video[i : i + 1], labels[i : i + 1], **given) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


# Votes


def test_losses_of_votes_are_means():
    logits, labels = torch.randn(4, 3, CLASSES, generator=seeded()), torch.tensor([0, 1, 2, 4])
    for loss in (attack_parts.cross_entropy, attack_parts.dlr, attack_parts.margin):
        torch.testing.assert_close(
            loss(logits, labels), torch.stack([loss(z, labels) for z in logits.unbind(1)]).mean(0)
        )


def test_losses_by_hand():
    logits, labels = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0]]), torch.tensor([0, 1])
    assert attack_parts.margin(logits, labels).tolist() == [-1, 2]
    assert attack_parts.dlr(logits, labels).tolist() == pytest.approx([-0.5, 1.0])
    with pytest.raises(ValueError, match="2 classes"):
        attack_parts.dlr(logits[:, :2], labels)


def test_a_vote_takes_the_most_frequent_label_and_the_smallest_of_equals():
    logits = torch.randint(0, 3, (200, 4, 3), generator=seeded()).float()
    labels = logits.argmax(-1).tolist()
    expected = [max(range(3), key=lambda label: (row.count(label), -label)) for row in labels]
    assert attack_parts.majority_vote(logits).tolist() == expected


def test_an_attack_on_votes_raises_each_and_turns_the_majority():
    model, video, labels = case(8, Votes())
    attacked = apgd(model, video, labels, eps=0.1, steps=10, generator=seeded())
    assert (attack_parts.majority_vote(model(attacked)) != labels).sum() >= 6
    before, after = (attack_parts.cross_entropy(model.nets[1](x), labels).mean() for x in (video, attacked))
    assert after > before
    found = square(model, video, labels, eps=0.5, queries=60, generator=seeded())
    assert (attack_parts.majority_vote(model(found)) != labels).any()


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


# Queries, and the shapes of perturbations


def test_square_asks_for_no_gradient_and_keeps_its_budget():
    net, video, labels = case(6)
    asked = []

    def model(x):
        assert not torch.is_grad_enabled() and not x.requires_grad
        asked.append(len(x))
        return net(x)

    square(model, video, labels, eps=1e-4, queries=25, generator=seeded())
    assert asked == [6] * 25
    asked.clear()
    attacked = square(model, video, labels, eps=0.5, queries=60, generator=seeded())
    fooled = net(attacked).argmax(1) != labels
    assert len(asked) <= 60 and asked == sorted(asked, reverse=True) and fooled.sum() >= 4
    assert asked[-1] < 6
    asked.clear()
    wrong = (labels + 1) % CLASSES
    assert torch.equal(square(model, video, wrong, eps=0.5, queries=60), video) and asked == [6]


def test_square_goes_on_while_a_random_model_is_right_at_times():
    video, labels = clips(6, 3, 4, 8, 8), torch.zeros(6, dtype=torch.int64)
    draws, asked = seeded(3), []

    def model(x):  # wrong in half of its calls, whatever it sees
        asked.append(len(x))
        return nn.functional.one_hot((torch.rand(len(x), generator=draws) < 0.5).long(), 5).float()

    square(model, video, labels, eps=0.1, queries=20, generator=seeded())
    luck = len(asked)
    asked.clear()
    square(model, video, labels, eps=0.1, queries=20, eot=8, generator=seeded())
    assert luck < 20 and len(asked) == 8 * 20


@pytest.mark.parametrize("whole_clip", [True, False])
def test_squares_are_squares(whole_clip):
    shown = []

    def model(x):
        shown.append(x.clone())
        return torch.zeros(len(x), 3) + torch.tensor([1.0, 0.0, 0.0]) * len(shown)  # never better

    video = torch.full((1, 3, 6, 8, 10), 0.5)
    square(
        model, video, torch.zeros(1, dtype=torch.int64), eps=0.1, queries=30, whole_clip=whole_clip, generator=seeded()
    )
    stretches, rising = set(), set()
    for proposal in shown[2:]:
        touched = (proposal != 0.5)[0]
        frames, rows, columns = (touched.any(0).any(d).any(e) for d, e in ((2, 1), (2, 0), (1, 0)))
        assert touched.sum() == 3 * frames.sum() * rows.sum() * columns.sum() and rows.sum() == columns.sum()
        assert all(channel[channel != 0.5].unique().numel() == 1 for channel in proposal[0])
        stretches.add(int(frames.sum()))
        rising.add(tuple((proposal[0] > 0.5).flatten(1).any(1).tolist()))
    assert len(rising) == 8  # each channel has a sign of its own
    assert stretches == {6} if whole_clip else len(stretches) > 3
    assert (shown[1] - 0.5).abs().min() > 0.09 and (shown[1] == shown[1][..., :1, :]).all()  # stripes
    assert (shown[1] == shown[1][:, :, :1]).all() == whole_clip


def test_temporal_translation_averages_shifted_gradients():
    model, video, labels = case(2, dtype=torch.float64)
    expected = 0
    for shift, weight in {-1: 0.25, 0: 0.5, 1: 0.25}.items():
        point = video.roll(shift, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(attack_parts.cross_entropy(model(point), labels).sum(), point)
        expected = expected + weight * gradient.roll(-shift, 2)
    given = {"eps": 0.01, "steps": 1, "max_shift": 1, "weights": "linear", "norm": "l2"}
    step = attacks.temporal_translation(model, video, labels, **given) - video
    torch.testing.assert_close(step, 0.01 * expected / expected.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1))
    given = {"eps": 0.01, "steps": 3}
    still = attacks.temporal_translation(model, video, labels, **given, max_shift=0)
    plain = pgd(model, video, labels, **given, step_size=0.01 / 3, random_start=False)
    torch.testing.assert_close(still, plain, rtol=0, atol=1e-12)
    bell = attacks._shift_weights("gaussian", 7)  # 7 frames are 3 sigma
    assert sum(bell.values()) == pytest.approx(1) and bell[-7] / bell[0] == pytest.approx(np.exp(-4.5))


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
    assert attacks._flicker_price(u, 1.0, 10.0).item() == pytest.approx((1 + 10 * (2 + 6)) / 4)
    thin = flicker(model, video, labels, eps=0.1, steps=30, thickness=100.0) - video
    assert thin.abs().mean() < 0.5 * rough.abs().mean()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_frame_changes_one_frame(norm):
    model, video, labels = case(6)
    given = {"eps": 0.3, "norm": norm, "restarts": 2, "generator": seeded()}
    changed = (one_frame(model, video, labels, **given, frame=2) != video).any(4).any(3).any(1)
    assert torch.equal(changed, torch.tensor([[False, False, True, False]]).expand(6, 4))
    step = one_frame(model, video, labels, eps=0.1, norm="l2", steps=1, step_size=0.1, frame=2) - video
    assert step.flatten(1).norm(dim=1).tolist() == pytest.approx([0.1] * 6, rel=1e-3)  # no length lost to other frames
    point = video.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attack_parts.cross_entropy(model(point), labels).sum(), point)
    largest = gradient.transpose(1, 2).flatten(2).norm(dim=2).argmax(1)
    changed = (one_frame(model, video, labels, **given) != video).any(4).any(3).any(1)
    assert changed.sum() == 6 and torch.equal(changed.int().argmax(1), largest)


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


# The contract


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_leaves_everything_as_it_was(name):
    model, video, labels = case(2)
    model.train()
    before, state = video.clone(), torch.get_rng_state()
    first, again, other = (
        ATTACKS[name].run(model, video, labels, **arguments(name), generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, video) and not first.requires_grad
    random = name in ("pgd", "apgd", "square", "patch")
    assert torch.equal(first, other) != random
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(video, before) and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inner = ATTACKS[name].run(model, video.clone(), labels.clone(), **arguments(name), generator=seeded(1))
            assert torch.equal(inner, first) and not torch.is_grad_enabled()


BAD = [
    ({"eps": 0.0}, ValueError, "eps must be more than 0 and finite"),
    ({"eps": float("nan")}, ValueError, "eps must be more than 0 and finite"),
    ({"eps": "4"}, TypeError, "eps must be a number"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must be \(2,\)"),
    ({"labels": torch.zeros(2)}, TypeError, "labels must be dense int64, got torch.float32"),
    ({"labels": torch.zeros(2, dtype=torch.int64).to_sparse()}, TypeError, "labels must be dense int64"),
    ({"labels": torch.tensor([0, -1])}, ValueError, "of 0 or more"),
    ({"labels": [0, 1]}, TypeError, "labels must be a tensor"),
    ({"clips": clips(2, 3, 4, 8, 8) * 2}, ValueError, r"values from .* in \[0, 1\]"),
    ({"clips": clips(2, 3, 4, 8, 8) * float("nan")}, ValueError, "values from nan"),
    ({"clips": clips(2, 3, 8, 8)}, ValueError, r"shape \(2, 3, 8, 8\)"),
    ({"clips": clips(2, 4, 3, 8, 8)}, ValueError, r"\(B, 3, F, H, W\)"),
    ({"clips": clips(2, 3, 4, 8, 8).half()}, TypeError, "float32 or float64"),
    ({"loss": "cw"}, ValueError, "one of ce, dlr, margin, got 'cw'"),
    ({"model": 3}, TypeError, "model must be callable"),
    ({"eps": 4}, ValueError, r"eps must be at most 1 in l_inf, in the clips' units \(4/255, not 4\), got 4"),
    ({"clips": clips(2, 3, 4, 8, 8).to_sparse()}, TypeError, "sparse_coo on cpu; accepted: dense tensors"),
    ({"generator": 0}, TypeError, "generator must be a torch.Generator on the CPU, got int"),
]


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input_is_refused_before_any_work(name, wrong, error, message):
    def model(x):
        raise AssertionError("the model was called")

    given = {"model": model, "clips": clips(2, 3, 4, 8, 8), "labels": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        ATTACKS[name].run(**given | arguments(name) | wrong)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("pgd", {"steps": -1}, "steps must be 0 or more"),
        ("pgd", {"step_size": 0.0}, "step_size must be more than 0 and finite"),
        ("apgd", {"steps": 0}, "steps must be 1 or more, got 0"),
        ("mim", {"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ("fgsm", {"restarts": 0}, "restarts must be 1 or more"),
        ("fgsm", {"eot": 0}, "eot must be 1 or more"),
        ("square", {"queries": 0}, "queries must be 1 or more"),
        ("square", {"p_init": 0.0}, "p_init"),
        ("square", {"eot": 0}, "eot must be 1 or more"),
        ("mim", {"decay": float("nan")}, "decay must be 0 or more and finite, got nan"),
        ("temporal_translation", {"decay": -1}, "decay must be 0 or more and finite, got -1"),
        ("flicker", {"thickness": float("inf")}, "thickness must be 0 or more and finite"),
        ("patch", {"corner": (1.5, 2)}, r"got \(1.5, 2\)"),
        ("patch", {"corner": 3}, "got 3"),
        ("one_frame", {"frame": 4}, "frame must be 0 to 3, got 4"),
        ("patch", {"size": 9}, "size must be 1 to 8, got 9"),
        ("patch", {"corner": (6, 0)}, r"\(0, 0\)\.\.\(5, 5\), got \(6, 0\)"),
        ("temporal_translation", {"weights": "square"}, "gaussian, linear, uniform"),
        ("temporal_translation", {"weights": []}, r"gaussian, linear, uniform, got \[\]"),
        ("temporal_translation", {"max_shift": -1}, "max_shift must be 0 or more"),
    ],
)
def test_bad_options(name, wrong, message):
    model, video, labels = case(2)
    with pytest.raises(ValueError, match=message):
        ATTACKS[name].run(model, video, labels, **arguments(name) | wrong)


@pytest.mark.parametrize(("name", "option"), [("one_frame", "frame"), ("patch", "size")])
def test_options_of_other_types(name, option):
    with pytest.raises(TypeError, match=f"{option} must be an int, got True"):
        ATTACKS[name].run(*case(2), **arguments(name) | {option: True})


def test_bad_models_and_losses():
    model, video, labels = case(2)
    given = {"eps": 0.1}
    for wrong in (lambda x: model(x)[:1], lambda x: model(x)[0], lambda x: model(x).flatten()):
        with pytest.raises(ValueError, match=r"\(2, K\)"):
            fgsm(wrong, video, labels, **given)
    with pytest.raises(TypeError, match="must return logits .*, got tuple"):
        fgsm(lambda x: (model(x),), video, labels, **given)
    with pytest.raises(ValueError, match="reach 7, but the model returns 5"):
        fgsm(model, video, labels * 0 + 7, **given)
    for wrong, seen in ((lambda z, y: z.sum(), r"float32 \(\)"), (lambda z, y: z.argmax(-1), r"int64 \(2,\)")):
        with pytest.raises(ValueError, match=rf"loss must be floats \(2,\), got torch.{seen}"):
            square(model, video, labels, **given, loss=wrong)
    with pytest.raises(ValueError, match="the loss is NaN"):
        square(model, video, labels, **given, loss=lambda z, y: z.sum(-1) * float("nan"))
    with pytest.raises(ValueError, match="no gradient leads"):
        fgsm(lambda x: model(x).detach(), video, labels, **given)
    with pytest.raises(ValueError, match="not finite"):
        fgsm(lambda x: model(x) * float("inf"), video, labels, **given)
    with pytest.raises(ValueError, match="logits are not finite"):
        square(lambda x: model(x) * float("nan"), video, labels, **given)
    with pytest.raises(ValueError, match="logits must be floats of 2 classes or more, got torch.int64 of 5"):
        square(lambda x: model(x).long(), video, labels, **given)
    with pytest.raises(ValueError, match="2 classes or more, got torch.float32 of 1"):
        fgsm(lambda x: model(x)[:, :1], video, labels * 0, **given)
    with pytest.raises(TypeError, match="epsilon"):
        fgsm(model, video, labels, **given, epsilon=3)


def test_the_register_helps():
    for name, attack in ATTACKS.items():
        assert attack.run is getattr(attacks, name) and 20 < len(attack.help) < 120 and attack.help.endswith(".")


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_progress_shows_a_bar(name, capsys):
    model, video, labels = case(2)
    quiet = ATTACKS[name].run(model, video, labels, **arguments(name), generator=seeded())
    assert capsys.readouterr().err == ""
    shown = ATTACKS[name].run(model, video, labels, **arguments(name), generator=seeded(), progress=True)
    assert name.replace("_", " ") in capsys.readouterr().err and torch.equal(quiet, shown)


# Against the code of others


def test_fgsm_equals_arts():
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    model, video, labels = case(4)
    for norm, order in (("linf", np.inf), ("l2", 2)):
        wrapped = estimators.PyTorchClassifier(
            model, nn.CrossEntropyLoss(), (3, 4, 8, 8), CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
        )
        theirs = evasion.FastGradientMethod(wrapped, norm=order, eps=0.03).generate(video.numpy(), labels.numpy())
        ours = fgsm(model, video, labels, eps=0.03, norm=norm)
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=2e-6)
        assert not torch.allclose(ours, video, atol=1e-4)


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
