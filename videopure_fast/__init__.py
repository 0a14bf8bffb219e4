"""Adversarial purification of video clips: `purify(clip)` in front of a classifier."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import tiny
    from .config import PurifyConfig
    from .defense.classifier import DefendedClassifier
    from .functional import purify
    from .ops.backend import use_backend
    from .purifier import Purifier
    from .realtime.stream import StreamPurifier

__version__ = "0.1.0"
__all__ = ["DefendedClassifier", "Purifier", "PurifyConfig", "StreamPurifier", "purify", "tiny", "use_backend"]

# Public name -> its module, imported at first use: importing torch here would add a second to every `--help`.
_MODULES = {
    "DefendedClassifier": "defense.classifier",
    "Purifier": "purifier",
    "PurifyConfig": "config",
    "StreamPurifier": "realtime.stream",
    "purify": "functional",
    "use_backend": "ops.backend",
}


def __getattr__(name: str) -> Any:
    if name == "tiny":
        return importlib.import_module(".tiny", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
