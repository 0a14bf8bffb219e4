"""Adversarial purification of video clips: `purify(clip)` in front of a classifier."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import tiny
    from .config import PurifyConfig
    from .defense.classifier import DefendedClassifier
    from .ops.backend import use_backend
    from .purifier import Purifier, purify

__version__ = "0.1.0"
__all__ = ["DefendedClassifier", "Purifier", "PurifyConfig", "purify", "tiny", "use_backend"]

# Imported at first use: torch and what else it takes would cost every `--help` a second.
_HOMES = {
    "DefendedClassifier": "defense.classifier",
    "Purifier": "purifier",
    "PurifyConfig": "config",
    "purify": "purifier",
    "use_backend": "ops.backend",
}


def __getattr__(name: str) -> Any:
    if name == "tiny":
        return importlib.import_module(".tiny", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
