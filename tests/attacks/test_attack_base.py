"""The ball, the best clips, averages over calls and votes, and the checks of models and losses."""

import pytest
import torch
from attack_cases import Noisy, Votes, case, seeded

from videopure_fast.attacks import apgd, fgsm, pgd, square
from videopure_fast.attacks.base import Ball, Best, Target, majority_vote
from videopure_fast.attacks.losses import cross_entropy


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
    box, ball = (Ball(video, 0.2, norm).sample(seeded()) - 0.5 for norm in ("linf", "l2"))
    assert box.abs().max() > 0.19 and abs(box.mean()) < 0.01 and box.std() == pytest.approx(0.4 / 12**0.5, rel=0.02)
    # A uniform point of a ball in n dimensions lies at eps times the n-th root of a uniform number.
    lengths = ball.flatten(1).norm(dim=1) / 0.2
    assert (lengths**96).mean() == pytest.approx(0.5, abs=0.12) and abs(ball.mean()) < 0.001


def test_eot_quiets_the_gradient_of_a_random_model():
    _, video, labels = case()

    def spread(eot):
        targets = (Target(Noisy(seed), labels, cross_entropy, eot) for seed in range(8))
        return torch.stack([target.gradient(video) for target in targets]).std(0).mean()

    assert spread(16) < 0.4 * spread(1)  # 0.25 in expectation


def test_a_restart_that_fools_wins_over_a_larger_loss():
    best = Best(torch.zeros(3, 1), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([9.0, 1.0, 1.0]))
    best.update(torch.ones(3, 1), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 9.0, 2.0]))
    assert best.clips.flatten().tolist() == [1, 0, 1] and best.loss.tolist() == [0, 1, 2]


def test_a_vote_takes_the_most_frequent_label_and_the_smallest_of_equals():
    logits = torch.randint(0, 3, (200, 4, 3), generator=seeded()).float()
    labels = logits.argmax(-1).tolist()
    expected = [max(range(3), key=lambda label: (row.count(label), -label)) for row in labels]
    assert majority_vote(logits).tolist() == expected


def test_an_attack_on_votes_raises_each_and_turns_the_majority():
    model, video, labels = case(8, Votes())
    attacked = apgd(model, video, labels, eps=0.1, steps=10, generator=seeded())
    assert (majority_vote(model(attacked)) != labels).sum() >= 6
    before, after = (cross_entropy(model.nets[1](x), labels).mean() for x in (video, attacked))
    assert after > before
    found = square(model, video, labels, eps=0.5, queries=60, generator=seeded())
    assert (majority_vote(model(found)) != labels).any()


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
