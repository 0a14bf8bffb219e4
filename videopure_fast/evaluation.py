"""Accuracy of defences under attack, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attacks import pgd
from .defense import majority
from .filters import reconstruct, temporal_mean
from .purifier import Purifier

_BATCH = 16  # clips in memory at once


class Row(NamedTuple):
    """One defence: accuracy on clean and on attacked clips, and the seconds that one clip takes."""

    defence: str
    clean: float
    attacked: float
    seconds_per_clip: float


class Comparison(NamedTuple):
    """What `compare` found. Clips are (n, 3, F, H, W), labels (n,); `purified` are the attacked clips' last votes."""

    rows: list[Row]
    clean_clips: Tensor
    attacked_clips: Tensor
    purified_clips: Tensor
    labels: Tensor
    attacked_labels: Tensor
    purified_labels: Tensor


def compare(
    clips: Tensor,
    labels: Tensor,
    classifier: nn.Module,
    purifier: Purifier,
    *,
    eps: float,
    step_size: float,
    steps: int,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Gray-box comparison: PGD on the bare classifier, whose attacked clips then meet each defence.

    clips: (n, 3, F, H, W) in [0, 1]; labels: (n,); eps and step_size in the clips' units.
    """
    generator = torch.Generator().manual_seed(seed)  # of the attack's start, and of a random purifier
    batches = list(zip(clips.split(_BATCH), labels.split(_BATCH), strict=True))
    attacked = [
        pgd(classifier, x, y, eps=eps, step_size=step_size, steps=steps, generator=generator)
        for x, y in tqdm(batches, desc="attack", disable=not progress)
    ]
    defences: dict[str, Callable[[Tensor], Tensor]] = {  # clips -> votes (B, V, 3, F, H, W)
        "none": lambda x: x[:, None],
        "VAE round trip": lambda x: reconstruct(purifier, x)[:, None],
        "mean of 5 frames": lambda x: temporal_mean(x, 5)[:, None],
        purifier.config.method: lambda x: purifier(x, return_votes=True, generator=generator),
    }
    rows, last_labels, last_clips = [], {}, []
    for name, defend in defences.items():
        predicted: dict[str, list[Tensor]] = {"clean": [], "attacked": []}
        last_clips, start = [], time.perf_counter()
        for i, (x, _) in enumerate(tqdm(batches, desc=name, disable=not progress)):
            for kind, given in (("clean", x), ("attacked", attacked[i])):
                with torch.no_grad():
                    votes = defend(given)
                    ballot = torch.stack([classifier(vote.contiguous()).argmax(-1) for vote in votes.unbind(1)], 1)
                    predicted[kind].append(majority(ballot))
            last_clips.append(votes[:, -1])
        seconds = (time.perf_counter() - start) / (2 * len(clips))
        found = {kind: torch.cat(parts) for kind, parts in predicted.items()}
        accuracy = {kind: (found[kind] == labels).float().mean().item() for kind in found}
        rows.append(Row(name, accuracy["clean"], accuracy["attacked"], seconds))
        last_labels[name] = found["attacked"]
    return Comparison(
        rows=rows,
        clean_clips=clips,
        attacked_clips=torch.cat(attacked),
        purified_clips=torch.cat(last_clips),
        labels=labels,
        attacked_labels=last_labels["none"],
        purified_labels=last_labels[purifier.config.method],
    )


def wilson_interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of an accuracy observed on n clips (Wilson 1927)."""
    centre = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
