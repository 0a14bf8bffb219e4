"""The purification as one function."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import torch
from torch import Tensor

from .config import PurifyConfig
from .inputs import check_flag, check_video, replace_config
from .models.flow import Flow
from .purifier import Purifier


def purify(
    video: Tensor,
    model: str | os.PathLike[str] = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    flow: str | Flow | None = None,
    decoder: str | os.PathLike[str] | None = None,
    config: PurifyConfig | None = None,
    layout: str = "BCTHW",
    return_votes: bool = False,
    **overrides: Any,
) -> Tensor:
    """Purify clips in one call; the loaded model is kept for the next.

    Args:
        video: (B, 3, F, H, W) or (3, F, H, W), floats in [0, 1] or uint8.
        layout: "BTCHW" for videos (B, F, 3, H, W) or (F, 3, H, W), as Hugging Face's; the result has the same.
        return_votes: as in a call of a Purifier.

    `model`, `device`, `dtype`, `flow`, `decoder` and `config` are as in `Purifier.from_pretrained`; `overrides` are
    fields of PurifyConfig.
    """
    check_video(video, layout=layout)
    check_flag("return_votes", return_votes)
    replace_config(PurifyConfig() if config is None else config, overrides)
    options: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "flow": flow, "decoder": decoder}
    for name, value in options.items():
        try:
            hash(value)
        except TypeError as error:
            seen = f"{name} is a {type(value).__name__}, which has no hash to keep the model by"
            raise TypeError(f"{seen}; Purifier.from_pretrained needs none") from error
    # A copy shares the models, and its settings are its own.
    purifier = copy.copy(_loaded(**options))
    purifier.config = replace_config(purifier.config if config is None else config, overrides)
    if layout == "BCTHW":
        return purifier(video, return_votes=return_votes)
    return purifier(video.transpose(-4, -3), return_votes=return_votes).transpose(-4, -3).contiguous()


@functools.lru_cache(maxsize=2)
def _loaded(model: Any, **options: Any) -> Purifier:
    return Purifier.from_pretrained(model, **options)
