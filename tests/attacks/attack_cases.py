"""A small random classifier, in which every frame and pixel counts, and arguments that keep attacks short."""

import torch
from conftest import clips
from torch import nn

from videopure_fast.attacks.base import majority_vote
from videopure_fast.attacks.losses import cross_entropy

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
        return model, video, majority_vote(model(video))


def arguments(name, **given):
    """What the attack needs at least, kept short, and what is given."""
    return {"eps": 0.03, **({"steps": 2} if name in SHORT else {}), **MINIMAL.get(name, {}), **given}


def losses(model, video, labels):
    with torch.no_grad():
        return cross_entropy(model(video), labels)
