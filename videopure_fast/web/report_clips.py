"""Packaged clips, attacked and purified, as pictures that a page plays."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

CLIPS, SEED = 6, 0  # the first ones of that seed, whatever becomes of them
EPS, STEPS = 4 / 255, 10


class View(NamedTuple):
    """A form of a clip.

    seen: the class that the classifier takes it for; None where it is not asked. votes: how many of the votes agree,
    and of how many. frames: a PNG of all frames side by side, as a data URI.
    """

    name: str
    seen: str | None
    right: bool
    votes: tuple[int, int] | None
    frames: str


class Shown(NamedTuple):
    """A clip: the name of its class, and its forms."""

    truth: str
    views: list[View]


class Demo(NamedTuple):
    """Clips of so many frames, and what befell them."""

    clips: list[Shown]
    frames: int


def attack_and_purify() -> Demo:
    """Attack packaged clips in the gray box, purify them, and classify all of them: some seconds on a CPU."""
    import torch

    from .. import tiny
    from ..attacks import pgd
    from ..attacks.base import majority_vote
    from ..defense.classifier import classify_votes
    from ..evaluation.figures import AMPLIFICATION, amplified
    from ..purifier import Purifier

    clips, labels = tiny.sample_clips(CLIPS, SEED)
    classifier, purifier = tiny.load_classifier(), Purifier.from_pretrained("tiny", device="cpu")
    start = torch.Generator().manual_seed(SEED)
    attacked = pgd(classifier, clips, labels, eps=EPS, step_size=EPS / 2, steps=STEPS, generator=start)
    with torch.no_grad():
        votes = purifier(attacked, return_votes=True)
        seen, fooled = (classifier(form).argmax(-1) for form in (clips, attacked))
        logits = classify_votes(classifier, votes)
        purified = majority_vote(logits)
        agreed = (logits.argmax(-1) == purified[:, None]).sum(-1)
    forms = {
        "clean": (clips, seen),
        "attacked": (attacked, fooled),
        "purified": (votes[:, -1], purified),
        f"change ×{AMPLIFICATION}": (amplified(attacked - clips), None),
    }
    shown = []
    for i, truth in enumerate(labels.tolist()):
        views = []
        for name, (form, found) in forms.items():
            label = None if found is None else int(found[i])
            counted = (int(agreed[i]), votes.shape[1]) if name == "purified" else None
            said = None if label is None else tiny.CLASSES[label]
            views.append(View(name, said, label == truth, counted, _picture(form[i])))
        shown.append(Shown(tiny.CLASSES[truth], views))
    return Demo(shown, clips.shape[2])


def _picture(clip: Tensor) -> str:
    """(3, F, H, W) in [0, 1] -> a PNG of the frames side by side, which loses nothing but the rounding to 8 bits."""
    from PIL import Image

    frames = (clip.clamp(0, 1) * 255).round().byte().permute(2, 1, 3, 0).flatten(1, 2)  # [H, F * W, 3]
    packed = io.BytesIO()
    Image.fromarray(frames.contiguous().numpy()).save(packed, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
