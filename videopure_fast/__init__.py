"""Adversarial purification of video clips: `purify(clip)` in front of a classifier."""

from . import tiny
from .config import PurifyConfig
from .defense import DefendedClassifier
from .purifier import Purifier, purify

__version__ = "0.1.0"
__all__ = ["DefendedClassifier", "Purifier", "PurifyConfig", "purify", "tiny"]
