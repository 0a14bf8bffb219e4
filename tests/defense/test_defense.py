import itertools

import pytest
import torch
from conftest import build_purifier, clips
from torch import nn

from videopure_fast import DefendedClassifier, Purifier
from videopure_fast.adapters import VideoClassifier
from videopure_fast.attacks import pgd
from videopure_fast.attacks.base import majority_vote
from videopure_fast.defense.classifier import settled
from videopure_fast.evaluation.tables import wilson_interval
from videopure_fast.purifier import LatentVotes


class Linear(nn.Module):
    """Clips -> 5 logits, with a dropout that only training wakes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 16 * 16, 5), nn.Dropout(0.5))

    def forward(self, x):
        return self.head(x - 0.5)


@pytest.fixture
def defended(purifier):
    return DefendedClassifier(Linear(), purifier).eval()


def test_logits_are_the_mean_over_votes(defended):
    video = clips(2, 3, 4, 16, 16)
    votes = defended.purifier(video, return_votes=True)
    logits = torch.stack([defended.classifier(one) for one in votes.unbind(1)], 1)
    torch.testing.assert_close(defended(video), logits.mean(1))
    assert torch.equal(defended.vote_labels(video), logits.argmax(-1))
    assert torch.equal(defended.predict(video), majority_vote(logits))
    assert defended(video).shape == (2, 5) and defended.vote_labels(video).shape == (2, 3)


def majority(labels):
    return max(range(3), key=lambda label: (labels.count(label), -label))


def test_settled_is_what_every_ending_agrees_on():
    """Against all ways in which the remaining votes can fall."""
    for labels in itertools.product(range(3), repeat=4):
        for seen in range(5):
            counts = torch.tensor([[labels[:seen].count(label) for label in range(3)]])
            endings = itertools.product(range(3), repeat=4 - seen)
            answers = {majority([*labels[:seen], *ending]) for ending in endings}
            assert settled(counts, 4 - seen).item() == (len(answers) == 1)


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_early_stop_predicts_the_same_from_fewer_votes(depth, monkeypatch):
    purifier = build_purifier(inversion_steps=depth)
    patient, hasty = (DefendedClassifier(Linear(), purifier, early_stop=early).eval() for early in (False, True))
    decoded, decode = [], Purifier._decode
    monkeypatch.setattr(Purifier, "_decode", lambda self, z: decoded.append(len(z)) or decode(self, z))
    for seed in range(4):
        video = clips(2, 3, 4, 16, 16, seed=seed)
        decoded.clear()
        expected = patient.predict(video)
        everything = sum(decoded)
        decoded.clear()
        assert torch.equal(hasty.predict(video), expected)
        assert (depth + 2) // 2 + 1 <= sum(decoded) <= everything == depth + 2


class Painted(nn.Module):
    """Reads the label that a clip is painted with."""

    def forward(self, x):
        return nn.functional.one_hot((4 * x[:, 0, 0, 0, 0]).round().long(), 3).float()


@pytest.mark.parametrize("votes", [1, 2, 3, 4, 5, 6, 7])
def test_early_stop_predicts_the_same_for_every_sequence_of_labels(votes, defended, monkeypatch):
    """Ties between two and three labels among them, one clip a call and all in one batch."""
    labels = torch.tensor(list(itertools.product(range(3), repeat=votes)))
    painted = (labels / 4)[:, :, None, None, None, None]
    asked = []

    def decode_votes(self, denoised, votes=slice(None)):
        asked.append(votes)
        return denoised.video[:, votes]

    def latent_votes(self, clips, **_):
        chosen = clips[:, 0, 0, 0, 0].mul(len(labels)).round().long()
        return LatentVotes(painted[chosen], ((0, torch.empty(votes)),))

    monkeypatch.setattr(Purifier, "latent_votes", latent_votes)
    monkeypatch.setattr(Purifier, "decode_votes", decode_votes)
    names = (torch.arange(len(labels)) / len(labels))[:, None, None, None, None].expand(-1, 3, 1, 1, 1)
    patient, hasty = (DefendedClassifier(Painted(), defended.purifier, **o) for o in ({"early_stop": False}, {}))
    expected = torch.tensor([majority(sequence.tolist()) for sequence in labels])
    assert torch.equal(patient.predict(names), expected) and asked == [slice(0, votes)]
    assert torch.equal(hasty.predict(names), expected)
    asked.clear()
    assert torch.equal(torch.cat([hasty.predict(names[i : i + 1]) for i in range(0, len(names), 5)]), expected[::5])
    if votes > 2:
        assert len(asked) < len(names[::5]) * (votes - votes // 2)  # some are settled before the last vote


def test_train_wakes_the_classifier_alone(defended):
    defended.train()
    assert defended.classifier.training
    assert not any(module.training for module in defended.purifier.modules())


def test_gradients_reach_the_clip(defended):
    video = clips(1, 3, 4, 16, 16).requires_grad_()
    defended(video).sum().backward()
    assert video.grad.abs().sum() > 0
    assert defended.predict(video).grad_fn is None


def test_random_methods_take_a_generator():
    defended = DefendedClassifier(Linear(), build_purifier(method="ddim")).eval()
    video = clips(1, 3, 4, 16, 16)
    first, second = (defended(video, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


class Split(nn.Module):
    def forward(self, x):
        return x.flatten(1).split(2, dim=1)


class Growing(nn.Module):
    """A class more at each call."""

    classes = 1

    def forward(self, x):
        self.classes += 1
        return x.flatten(1)[:, : self.classes]


def test_bad_input(defended):
    for wrong, error in (
        (clips(4, 3, 16, 16), ValueError),
        (clips(1, 3, 4, 16, 16) * 2, ValueError),
        ((clips(1, 3, 4, 16, 16) * 255).int(), TypeError),
        ([1], TypeError),
    ):
        with pytest.raises(error, match=r"\(B, 3, F, H, W\)"):
            defended(wrong)
    flat = DefendedClassifier(nn.Flatten(0), defended.purifier)
    with pytest.raises(ValueError, match=r"logits \(1, K\), got"):
        flat(clips(1, 3, 4, 16, 16))
    with pytest.raises(TypeError, match=r"must return logits \(1, K\), got tuple"):
        DefendedClassifier(Split(), defended.purifier)(clips(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match=r"of several shapes for votes of one: \[\(1, 2\), \(1, 3\)"):
        DefendedClassifier(Growing(), defended.purifier)(clips(1, 3, 4, 16, 16))
    with pytest.raises(TypeError, match="classifier must be a torch.nn.Module, got function"):
        DefendedClassifier(lambda x: x, defended.purifier)
    with pytest.raises(TypeError, match="purifier must be a Purifier, got str"):
        DefendedClassifier(Linear(), "tiny")
    with pytest.raises(TypeError, match="surrogate must be a mapping of settings, got int"):
        DefendedClassifier(Linear(), defended.purifier, gradient="surrogate", surrogate=3)
    with pytest.raises(TypeError, match="early_stop must be a bool, got 'no'"):
        DefendedClassifier(Linear(), defended.purifier, early_stop="no")


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gradient", ["exact", "bpda", "surrogate"])
def test_a_classifier_gets_clips_of_its_dtype(weights, gradient, purifier):
    seen = []

    class Watched(Linear):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    defended = DefendedClassifier(Watched().to(weights), purifier, gradient=gradient).eval()
    video = clips(2, 3, 4, 16, 16).requires_grad_()
    votes = purifier(video.detach(), return_votes=True)
    expected = torch.stack([defended.classifier(vote.to(weights)) for vote in votes.unbind(1)], 1).float()
    logits = defended.vote_logits(video)
    assert set(seen) == {weights} and logits.dtype == torch.float32 == defended(video).dtype
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(defended.predict(video), majority_vote(expected))
    (found,) = torch.autograd.grad(logits[..., 0].sum(), video)
    assert found.dtype == torch.float32 and found.isfinite().all() and found.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_clips_of_any_dtype_meet_a_float32_classifier(dtype, defended):
    video = clips(2, 3, 4, 16, 16).to(dtype)
    votes = defended.purifier(video, return_votes=True).float()
    expected = torch.stack([defended.classifier(vote) for vote in votes.unbind(1)], 1)
    logits = defended.vote_logits(video)
    assert logits.dtype == dtype == defended(video).dtype
    torch.testing.assert_close(logits, expected.to(dtype))
    assert torch.equal(defended.vote_labels(video), expected.argmax(-1))
    assert torch.equal(defended.predict(video), majority_vote(expected))


def test_logits_beyond_a_narrow_dtype_are_refused_but_not_their_labels(purifier):
    class Loud(Linear):
        def forward(self, x):
            return 1e6 * super().forward(x)

    defended, video = DefendedClassifier(Loud(), purifier).eval(), clips(1, 3, 4, 16, 16).half()
    with pytest.raises(ValueError, match="logits are not finite"):
        defended(video)
    assert torch.equal(defended.predict(video), majority_vote(defended.vote_logits(video.float())))


def test_uint8_and_single_clips(defended):
    video = (clips(2, 3, 4, 16, 16) * 255).byte()
    floats = video.float() / 255
    for method in (defended, defended.vote_logits, defended.vote_labels, defended.predict):
        expected = method(floats)
        assert torch.equal(method(video), expected)
        for one in (video[1], floats[1]):
            torch.testing.assert_close(method(one), expected[1])
            assert method(one).shape == expected.shape[1:]
    random = DefendedClassifier(defended.classifier, build_purifier(method="ddim")).eval()
    drawn = [random(clip, generator=torch.Generator().manual_seed(1)) for clip in (video[:1], video[0])]
    torch.testing.assert_close(drawn[0][0], drawn[1])


class Frames(nn.Module):
    """(B, F, 3, H, W) -> 5 logits, by a convolution of frames."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x.flatten(0, 1)).mean((2, 3)).unflatten(0, x.shape[:2]).mean(1)


def test_a_classifier_of_another_format_is_told_its_adapter(purifier):
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    video = clips(1, 3, 4, 16, 16)
    with pytest.raises(
        ValueError, match=r"\(Frames\) fails on clips .*takes \(B, F, 3, H, W\): .*layout='BTCHW'\) adapts"
    ):
        DefendedClassifier(Frames(), purifier)(video)
    sizes = {"num_frames": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = VideoMAEForVideoClassification(VideoMAEConfig(image_size=16, patch_size=8, intermediate_size=16, **sizes))
    with pytest.raises(ValueError, match=r"fails on clips .*VideoClassifier.huggingface\(model, mean=..., std=...\)"):
        DefendedClassifier(model.eval(), purifier).predict(video)
    with pytest.raises(RuntimeError, match="of one's own"):
        DefendedClassifier(Fails(), purifier)(video)
    with pytest.raises(torch.OutOfMemoryError):
        DefendedClassifier(Fails(torch.OutOfMemoryError), purifier)(video)
    defended = DefendedClassifier(VideoClassifier(Frames(), layout="BTCHW"), purifier)
    assert defended(video).shape == (1, 5)


class Fails(nn.Module):
    def __init__(self, kind=RuntimeError):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        raise self.kind("of one's own")


@pytest.mark.parametrize("early_stop", [False, True])
def test_answers_that_are_none_are_refused(defended, early_stop):
    class Broken(Linear):
        def forward(self, x):
            return super().forward(x) * float("nan")

    broken = DefendedClassifier(Broken(), defended.purifier, early_stop=early_stop)
    for ask in (broken, broken.predict, broken.vote_labels):
        with pytest.raises(ValueError, match="logits are not finite"):
            ask(clips(1, 3, 4, 16, 16))


# The attack and the interval of the comparison


def test_pgd_stays_in_the_ball_and_raises_the_loss():
    model, video = Linear().eval(), clips(4, 3, 4, 16, 16)
    labels = model(video).argmax(1)
    before = video.clone()
    attacked = pgd(model, video, labels, eps=4 / 255, step_size=1 / 255, steps=8)
    assert torch.equal(video, before) and not attacked.requires_grad
    assert (attacked - video).abs().max() <= 4 / 255
    assert attacked.min() >= 0 and attacked.max() <= 1
    cross_entropy = nn.functional.cross_entropy
    assert cross_entropy(model(attacked), labels) > cross_entropy(model(video), labels) + 0.1
    seeds = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    runs = [pgd(model, video, labels, eps=0.1, step_size=0.001, steps=1, generator=g) for g in seeds]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(pgd(model, video, labels, eps=0.1, step_size=0.1, steps=0, random_start=False), video)


def test_wilson_interval():
    # Wilson (1927) for 81 of 100.
    assert wilson_interval(0.81, 100) == pytest.approx((0.7222, 0.8749), abs=1e-4)
    assert wilson_interval(0.0, 64)[0] == 0.0 and wilson_interval(1.0, 64)[1] == 1.0
