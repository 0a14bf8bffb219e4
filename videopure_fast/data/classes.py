"""The class names of a data set and of a classifier, which may differ in order, case, blanks and punctuation."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence


def match_classes(classes: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """The classifier's label for each class of a data set; None where either side has no names but numbers.

    A class has the label of its own name or, if there is none, of the name that is equal but for case, blanks and
    punctuation: "ApplyEyeMakeup" is "apply eye makeup". The classifier may have more names than the data set.

    classes: names of the data set's labels. names: of the classifier's.
    ValueError where a class has no label or several, or shares its label.
    """
    found = _labels_by_name(classes, names)
    if not all(found):
        if _are_numbers(classes) or _are_numbers(names):
            return None
        raise ValueError(_missing(classes, names, found))
    several = "equal but for case, blanks and punctuation: give each a name of its own"
    for name, labels in zip(classes, found, strict=True):
        if len(labels) > 1:
            first, second = (names[label] for label in labels[:2])
            raise ValueError(f"the classifier's {first!r} and {second!r} both fit the class {name!r}, {several}")
    order = tuple(labels[0] for labels in found)
    for i, label in enumerate(order):
        if (j := order.index(label)) < i:
            raise ValueError(
                f"the classes {classes[j]!r} and {classes[i]!r} both fit the classifier's {names[label]!r}, {several}"
            )
    return order


def _labels_by_name(classes: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """The labels that fit each class, those of equal names before others."""
    exact: defaultdict[str, list[int]] = defaultdict(list)
    folded: defaultdict[str, list[int]] = defaultdict(list)
    for label, name in enumerate(names):
        exact[name].append(label)
        folded[_fold(name)].append(label)
    return [exact.get(name) or folded.get(_fold(name), []) for name in classes]


def _fold(name: str) -> str:
    """A name without case, blanks, punctuation and invisible characters; one that consists of these as it is."""
    letters = unicodedata.normalize("NFKC", name).casefold()
    return "".join(letter for letter in letters if unicodedata.category(letter)[0] not in "CPZ") or name


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are labels and no more, such as "LABEL_0", which transformers gives to models without names."""
    return all(re.fullmatch(rf"((label|class)[ _-]?)?0*{label}", name, re.I) for label, name in enumerate(names))


def _missing(classes: Sequence[str], names: Sequence[str], found: Sequence[list[int]]) -> str:
    """What is wrong where some classes have no label."""
    missing = [label for label, labels in enumerate(found) if not labels]
    label, fitting = missing[0], len(classes) - len(missing)
    there = f"its label {label} is {names[label]!r}" if label < len(names) else "it has no such label"
    return (
        f"label {label} of the data set, {classes[label]!r}, is none of the classifier's classes ({there}); "
        f"{fitting} of the data set's {len(classes)} classes are among the classifier's {len(names)}; accepted: "
        "equal names in any order, but for case, blanks and punctuation; where names differ, pass the data set's "
        "classes in the classifier's words"
    )
