"""A classifier as an evaluation needs it: tried on clips, with the labels of the data set, for clips of any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import class_names
from ..data.classes import match_classes
from ..defense.classifier import adapter_advice, in_dtype_of, layout_advice, weights_dtype


class Aligned(NamedTuple):
    """A classifier with a data set's labels.

    Attributes:
        classifier: the given one, or a module around it.
        classes: name of each of its labels: first the data set's, then those that only the classifier knows; None
            where there are no names.
        order: the given classifier's label for each of these; None where they are equal.
    """

    classifier: nn.Module
    classes: Sequence[str] | None
    order: tuple[int, ...] | None


def align_classifier(role: str, classifier: nn.Module, sample: Tensor, classes: Sequence[str] | None) -> Aligned:
    """Compare a classifier's class names with those of a data set, try it on clips, and give it the data set's labels.

    role: what messages call it. sample: clips (B, 3, F, H, W) on the device of the evaluation, perhaps none. classes:
    names of the data set's labels, if it has any.
    ValueError for other class names, a device that is not the clips', and a classifier that returns no logits (B, K).
    """
    names, order = class_names(classifier), None
    if names is not None and classes is not None:
        try:
            order = match_classes(classes, names)
        except ValueError as error:
            raise ValueError(f"the {role} ({type(classifier).__name__}) has other classes: {error}") from error
    if names is not None and order is not None and classes is not None:
        order += tuple(label for label in range(len(names)) if label not in set(order))
        classes = (*classes, *(names[label] for label in order[len(classes) :]))
        order = None if order == tuple(range(len(order))) else order
    if len(sample):
        _check_classifier(role, classifier, sample, None if classes is None else len(classes))
    if order is None and weights_dtype(classifier) in (None, sample.dtype):
        return Aligned(classifier, classes, order)
    return Aligned(_AlignedClassifier(classifier, order).to(sample.device).eval(), classes, order)


class _AlignedClassifier(nn.Module):
    """A classifier's logits (B, K) in another order, in the wider of its dtype and the clips'."""

    any_dtype = True  # of clips: the classifier is given its own

    def __init__(self, classifier: nn.Module, order: Sequence[int] | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        logits = self.classifier(in_dtype_of(self.classifier, clips))
        logits = logits.to(torch.promote_types(logits.dtype, clips.dtype))
        return logits if self.order is None else logits.index_select(1, self.order)


def _check_classifier(role: str, module: nn.Module, clips: Tensor, classes: int | None) -> None:
    """ValueError unless a classifier is on the device of the clips (B, 3, F, H, W) and returns logits (B, classes)."""
    weights = next(chain(module.parameters(), module.buffers()), None)
    if weights is not None and weights.device != clips.device:
        raise ValueError(f"the {role} is on {weights.device} and the purifier on {clips.device}: move one of them")
    name = f"the {role} ({type(module).__name__})"
    try:
        with torch.no_grad():
            logits = module(in_dtype_of(module, clips))
    except Exception as error:  # a classifier of the caller's may raise anything
        advice = layout_advice(module, clips)
        seen = f"{name} fails on clips {tuple(clips.shape)}: {type(error).__name__}: {error}"
        raise ValueError(f"{seen}; {advice}" if advice else seen) from error
    seen = str(tuple(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
    wrong = not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(clips)
    if wrong or (classes is not None and logits.shape[-1] != classes):
        wanted = "K" if classes is None else classes
        order = "" if classes is None else f" of {classes} classes, in the order of the class names"
        advice = adapter_advice(module, logits)
        if not wrong:
            advice = "where it knows other classes, pass the names of all its labels as the classes"
        accepted = f"accepted: logits ({len(clips)}, {wanted}){order}"
        raise ValueError(
            f"{name} returns {seen} for {len(clips)} clips; {accepted}" + (f"; {advice}" if advice else "")
        )
