"""Square: its queries and its squares."""

import pytest
import torch
from attack_cases import CLASSES, case, seeded
from conftest import clips
from torch import nn

from videopure_fast.attacks import square


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
