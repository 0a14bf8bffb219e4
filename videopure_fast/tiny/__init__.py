"""The packaged small prior: procedural action clips, a classifier of them, and a VAE and a UNet trained on them."""

from .clips import CLASSES, sample_clips
from .models import ActionClassifier, load_classifier

__all__ = ["CLASSES", "ActionClassifier", "load_classifier", "sample_clips"]
