"""Optical flow from each frame to the next: estimators, and the resize to latent resolution.

An estimator is a callable `(prev, next) -> flow`: frames (N, 3, H, W), float32 in [0, 1]; flow (N, 2, H, W), float32,
(x, y) displacements in pixels from prev to next. Flow belongs to a prior: each prior names the one it was tuned with.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import brief

Flow = Callable[[Tensor, Tensor], Tensor]

_DIS_LEAST_SIDE = 32  # below it OpenCV's coarsest pyramid level reads outside the picture


def no_flow(prev: Tensor, next: Tensor) -> Tensor:
    """Zero motion: the temporal term compares each pixel with the same pixel of the next frame."""
    return prev.new_zeros(len(prev), 2, *prev.shape[-2:])


def dis_flow(prev: Tensor, next: Tensor) -> Tensor:
    """Dense Inverse Search (Kroeger et al., ECCV 2016) by OpenCV, on the CPU, at its medium preset."""
    cv2 = _opencv()
    import numpy as np

    height, width = prev.shape[-2:]
    pad = (0, max(0, _DIS_LEAST_SIDE - width), 0, max(0, _DIS_LEAST_SIDE - height))

    def gray(frames: Tensor) -> np.ndarray:
        luma = (frames.float() * frames.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(3, 1, 1)).sum(1)
        luma = F.pad(luma[:, None], pad, mode="replicate")[:, 0] if any(pad) else luma
        return (luma * 255).round().to(torch.uint8).cpu().numpy()

    # A new estimator for every pair: OpenCV's starts from what its last pair left behind.
    flows = [
        cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(a, b, None)
        for a, b in zip(gray(prev), gray(next), strict=True)
    ]
    flow = torch.from_numpy(np.stack(flows))[:, :height, :width].permute(0, 3, 1, 2)
    return flow.contiguous().to(prev.device)


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "flow='dis' needs OpenCV (pip install opencv-python-headless); flow='none' is no flow at all"
        ) from error
    return cv2


class RaftFlow:
    """RAFT (Teed and Deng, ECCV 2020), the large model of torchvision with its "things" weights, 10 iterations.

    `model` is a RAFT network, or None for torchvision's with weights that it downloads on first use. The method feeds
    it frames in [0, 1], unlike the [-1, 1] of its training; `normalize=True` maps them there.
    """

    _LEAST_SIDE = 128  # the correlation pyramid needs 16 features along each side
    _ITERATIONS = 10

    def __init__(self, model: torch.nn.Module | None = None, *, normalize: bool = False) -> None:
        self._model = (_torchvision_raft() if model is None else model).eval().requires_grad_(False)
        self._normalize = normalize
        self.is_default = model is None and not normalize

    def __call__(self, prev: Tensor, next: Tensor) -> Tensor:
        height, width = prev.shape[-2:]
        right, bottom = (max(self._LEAST_SIDE - side, -side % 8) for side in (width, height))
        frames = [2 * x - 1 if self._normalize else x for x in (prev, next)]
        frames = [F.pad(x, (0, right, 0, bottom), mode="replicate") for x in frames]
        flow = self._model.to(prev.device)(*frames, num_flow_updates=self._ITERATIONS)[-1]
        return flow[..., :height, :width]


def _torchvision_raft() -> torch.nn.Module:
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch fails with RuntimeError
        raise ImportError(
            "flow='raft' needs torchvision built for this torch (pip install torchvision); "
            "flow='dis' uses OpenCV instead, flow='none' no flow at all"
        ) from error
    try:
        return raft_large(weights=Raft_Large_Weights.C_T_V1)
    except OSError as error:
        raise OSError(
            "could not download RAFT's weights; flow='dis' uses OpenCV instead, flow='none' no flow at all"
        ) from error


FLOWS: dict[str, Flow | type[RaftFlow]] = {"dis": dis_flow, "raft": RaftFlow, "none": no_flow}


def load_flow(flow: str | Flow) -> Flow:
    """The estimator of a name ("dis", "raft", "none"), or the callable itself."""
    if callable(flow):
        return flow
    if not isinstance(flow, str) or flow not in FLOWS:
        accepted = f"{', '.join(FLOWS)}, or a callable (prev, next) -> flow"
        raise ValueError(f"unknown flow {brief(flow)}; accepted: {accepted}")
    if flow == "dis":
        _opencv()  # now rather than in the middle of a purification
    return RaftFlow() if flow == "raft" else FLOWS[flow]


def flow_name(flow: Flow) -> str | None:
    """The name under which `load_flow` finds this estimator, None for a callable of the user's own."""
    if isinstance(flow, RaftFlow):
        return "raft" if flow.is_default else None
    return next((name for name, known in FLOWS.items() if flow is known), None)


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """Flow (N, 2, H, W) in pixels -> (N, 2, height, width) in the smaller grid's pixels.

    Bilinear with align_corners=False; each component shrinks by the ratio of its own axis.
    """
    resized = F.interpolate(flow, (height, width), mode="bilinear", align_corners=False)
    x, y = resized.split(1, 1)
    return torch.cat([x * (width / flow.shape[-1]), y * (height / flow.shape[-2])], 1)
