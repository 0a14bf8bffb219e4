"""What a service is made of, by names: a value that can be sent to another process, and made into an application."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI
    from torch import nn

    from ..purifier import Purifier
    from .limits import Limits
    from .live import Frames

_ON_GPU = 5  # videos that are worked on at once where a GPU shares evaluations: four in flight, and one being decoded


@dataclass(frozen=True)
class Settings:
    """The arguments of `Purifier.from_pretrained` and `create_app`, with the classifier and the dtype by their names.

    folder: where a classifier "module:function" is looked for, beside Python's path.
    """

    model: str
    size: int
    limits: Limits
    classifier: str | None = None
    device: str | None = None
    dtype: str | None = None
    flow: str | None = None
    steps: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)  # an address may have a password
    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] | None = None
    folder: str = ""


def load(settings: Settings) -> tuple[Purifier, nn.Module | None]:
    """The purifier, and the classifier if there is one."""
    import torch

    from ..adapters import load_classifier
    from ..purifier import Purifier

    overrides = {} if settings.steps is None else {"inversion_steps": settings.steps}
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    purifier = Purifier.from_pretrained(
        settings.model, device=settings.device, dtype=dtype, flow=settings.flow, **overrides
    )
    if settings.classifier is None:
        return purifier, None
    if ":" in settings.classifier and settings.folder not in sys.path:
        sys.path.append(settings.folder)
    return purifier, load_classifier(settings.classifier).to(purifier.unet.device)


def make_app(settings: Settings, sources: Mapping[str, Frames] | None = None) -> FastAPI:
    """The application. sources: in the place of the settings' own, where these are opened elsewhere."""
    from .app import create_app

    purifier, classifier = load(settings)
    limits = settings.limits
    if purifier.unet.device.type == "cuda":
        limits = limits._replace(working=max(limits.working, _ON_GPU))
    live: Mapping[str, Any] = settings.sources if sources is None else sources
    return create_app(
        purifier,
        classifier,
        model=settings.model,
        size=settings.size,
        limits=limits,
        sources=live,
        token=settings.token,
        hosts=settings.hosts,
    )
