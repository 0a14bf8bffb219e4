"""Defend a classifier of your own, attack it with a packaged attack and one of your own, and judge the defense.

python -m videopure_fast.examples.defend_and_attack
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videopure_fast import DefendedClassifier, Purifier, tiny
from videopure_fast.attacks import apgd, register_attack
from videopure_fast.attacks.base import Best, Model, prepare
from videopure_fast.evaluation import Threat, benchmark, standard_threat


class MotionClassifier(nn.Module):
    """Clips (B, 3, F, 32, 32) in [0, 1] -> logits (B, 8): which way patches move, and a linear layer fitted to that.

    clips, labels: the examples to fit; they may have any number of frames from 3 on.
    """

    def __init__(self, clips: Tensor, labels: Tensor) -> None:
        super().__init__()
        features = self.features(clips)
        targets = F.one_hot(labels, len(tiny.CLASSES)).float() - 1 / len(tiny.CLASSES)
        ridge = 1e-3 * torch.eye(features.shape[1])
        self.weight = nn.Parameter(torch.linalg.solve(features.T @ features + ridge, features.T @ targets), False)
        self.eval()

    def features(self, clips: Tensor) -> Tensor:
        """Correlations of each frame with the next but one, for shifts of a pixel, in 4x4 patches: (B, 144)."""
        gray = clips.mean(1)  # [B, F, 32, 32]
        gray = gray - F.avg_pool2d(gray, 9, stride=1, padding=4)
        shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        products = [gray[:, :-2] * gray[:, 2:].roll(shift, (-2, -1)) for shift in shifts]
        patches = F.adaptive_avg_pool2d(torch.stack(products, 1).mean(2), 4)  # [B, 9, 4, 4]
        return F.normalize(patches.flatten(1))

    def forward(self, clips: Tensor) -> Tensor:
        return 10 * self.features(clips) @ self.weight


@register_attack
def random_signs(
    model: Model, clips: Tensor, labels: Tensor, *, eps: float, generator: torch.Generator | None = None, tries: int = 8
) -> Tensor:
    """Try random patterns of +eps and -eps, and keep the one with the largest loss."""
    task = prepare(model, clips, labels, eps, generator=generator)  # checks all arguments
    best = Best(task.ball.clips, *task.target.score(task.ball.clips))
    for _ in range(tries):
        signs = 2 * torch.randint(2, clips.shape, generator=generator) - 1
        attacked = task.ball.project(task.ball.clips + eps * signs.to(clips))
        best.update(attacked, *task.target.score(attacked))
    return best.clips


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=4, help="clips to attack")
    parser.add_argument("--fit", type=int, default=512, help="clips that the classifier is fitted to")
    parser.add_argument("--steps", type=int, default=3, help="depth T of the purification, and steps of apgd and pgd")
    options = parser.parse_args(argv)

    classifier = MotionClassifier(*tiny.sample_clips(options.fit, seed=1))
    purifier = Purifier.from_pretrained("tiny", device="cpu", inversion_steps=options.steps)
    clips, labels = tiny.sample_clips(options.clips, seed=2)

    # One attack by hand: APGD with the gradient of the whole defense, on the logits of all votes.
    defended = DefendedClassifier(classifier, purifier, gradient="exact")
    attacked = apgd(defended.vote_logits, clips[:1], labels[:1], eps=4 / 255, steps=options.steps)
    print(f"label {labels[0]}, clean {defended.predict(clips[:1])[0]}, attacked {defended.predict(attacked)[0]}")

    # The same defense beside others, under several attacks.
    threats = [
        Threat("gray-box", "random_signs", {"tries": 4}),
        standard_threat("gray-box", options.clips, steps=options.steps),
        standard_threat("bpda", options.clips, steps=options.steps),
    ]
    defenses = ["none", "mean of 5 frames", "videopure"]
    print(benchmark(classifier, purifier, clips, labels, threats=threats, eps=4 / 255, defenses=defenses, checks=False))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # a sentence says what is wrong
        raise SystemExit(f"error: {error}") from error
