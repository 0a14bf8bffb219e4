"""Defenses of a classifier: purification with a vote, the cheap filters it has to beat, and the registry of both."""

from .classifier import DefendedClassifier
from .registry import (
    Defense,
    build_defenses,
    defense_names,
    filter_defense,
    find_defense,
    purification_defense,
    register_defense,
)

__all__ = [
    "DefendedClassifier",
    "Defense",
    "build_defenses",
    "defense_names",
    "filter_defense",
    "find_defense",
    "purification_defense",
    "register_defense",
]
