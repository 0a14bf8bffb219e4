"""Drop-ins: any video classifier as a module of clips in [0, 1], and the purifier inside libraries of attacks.

Nothing is guessed from the data: layouts, value ranges and normalization are stated by whoever builds the adapter.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tiny
from .inputs import check_clips, check_count, check_logits, check_number
from .purifier import Purifier
from .straight_through import straight_through

if TYPE_CHECKING:
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
    from foolbox import PyTorchModel

LAYOUTS = ("BCTHW", "BTCHW", "slowfast")
_MOST_FRAMES, _MOST_SIDE = 2**16, 2**14  # a downloaded config may name any number


class VideoClassifier(nn.Module):
    """Clips (B, 3, F, H, W), floats in [0, 1] -> logits (B, K), differentiable, from a model with habits of its own.

    The steps, in order: frames are chosen, resized, multiplied by `scale`, normalized, and laid out for the model.

    Args:
        model: takes the prepared clips; returns logits (B, K) as a tensor or as the attribute `.logits`.
        layout: "BCTHW" (torchvision, pytorchvideo), "BTCHW" (Hugging Face), or "slowfast": a list of the slow and the
            fast pathway, both BCTHW, as of pytorchvideo.
        scale: values are multiplied by it: 255 for mmaction2.
        mean, std: of the scaled values: a number, or three for R, G and B. Both or neither.
        frames: choose that many, spread evenly from the first to the last (pytorchvideo's UniformTemporalSubsample);
            frames repeat where a clip has fewer. None keeps all.
        size: of a frame for the model in pixels: a side of a square, or (height, width); bilinear with antialias, the
            aspect is not kept. None keeps it.
        alpha: the fast pathway of "slowfast" has this many times the slow one's frames.
        input_name: keyword under which the model takes its clips; None is its first argument.

    TypeError or ValueError for settings or clips that differ from the above, and for outputs that are no logits.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: str = "BCTHW",
        scale: float = 1.0,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        frames: int | None = None,
        size: int | Sequence[int] | None = None,
        alpha: int = 4,
        input_name: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be a module or a function of clips, got {type(model).__name__}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; accepted: {', '.join(LAYOUTS)}")
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std go together, got mean={mean} and std={std}")
        if input_name is not None and not isinstance(input_name, str):
            raise TypeError(f"input_name must be a str or None, got {type(input_name).__name__}")
        self.model, self.layout, self.input_name = model, layout, input_name
        check_number("scale", scale, zero=False)
        check_count("frames", 1 if frames is None else frames, most=_MOST_FRAMES)
        check_count("alpha", alpha)
        self.scale, self.frames, self.alpha = scale, frames, alpha
        self.size = None if size is None else _sides(size)
        # Not in the state: a classifier's own checkpoint still fits `.model`.
        self.register_buffer("mean", None if mean is None else _channels("mean", mean), persistent=False)
        self.register_buffer("std", None if std is None else _channels("std", std), persistent=False)
        if self.std is not None and not (self.std > 0).all():
            raise ValueError(f"std must be more than 0, got {std}")

    @classmethod
    def huggingface(
        cls,
        model: nn.Module,
        *,
        mean: float | Sequence[float] | None,
        std: float | Sequence[float] | None,
        scale: float = 1.0,
        frames: int | None = None,
        size: int | Sequence[int] | None = None,
    ) -> VideoClassifier:
        """A transformers model for video classification: VideoMAE, TimeSformer, ViViT, V-JEPA 2 and their like.

        The model names its input, and its config the frames and sides it was made for, unless they are given here.
        Normalization is no part of a config and must be given: `mean=processor.image_mean, std=processor.image_std`
        for most; None and None for none. ViViT's processor first maps values to [-1, 1]: there, pass `scale=2` and
        `image_mean` + 1, or 1 and 1 if its `do_normalize` is off.
        """
        config = getattr(model, "config", None)
        input_name = getattr(model, "main_input_name", None)
        if config is None or input_name is None:
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        frames = _of_config(config, "frames", "num_frames", "frames_per_clip") if frames is None else frames
        size = _of_config(config, "size", "image_size", "crop_size") if size is None else size
        options = {"layout": "BTCHW", "scale": scale, "mean": mean, "std": std, "frames": frames, "size": size}
        return cls(model, **options, input_name=input_name)

    def forward(self, clips: Tensor) -> Tensor:
        check_clips(clips)
        prepared = self.prepare(clips)
        output = self.model(prepared) if self.input_name is None else self.model(**{self.input_name: prepared})
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise TypeError(f"the model must return a tensor or have .logits, got {type(output).__name__}")
        check_logits(logits, len(clips))
        return logits

    def prepare(self, clips: Tensor) -> Tensor | list[Tensor]:
        """What the model gets: one tensor, or the pathways [slow, fast]."""
        if self.frames is not None:
            clips = _spread(clips, self.frames)
        if self.size is not None and self.size != tuple(clips.shape[-2:]):
            images = clips.transpose(1, 2).flatten(0, 1)  # [B * F, 3, H, W]
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
            clips = images.unflatten(0, (len(clips), -1)).transpose(1, 2)
        clips = clips * self.scale
        if self.mean is not None:
            clips = (clips - self.mean.to(clips)) / self.std.to(clips)
        if self.layout == "BTCHW":
            return clips.transpose(1, 2).contiguous()
        if self.layout == "BCTHW":
            return clips.contiguous()
        if clips.shape[2] < self.alpha:
            raise ValueError(f"clips have {clips.shape[2]} frames; accepted with alpha {self.alpha}: as many or more")
        return [_spread(clips, clips.shape[2] // self.alpha), clips.contiguous()]


def load_classifier(
    name: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float = 1.0,
) -> nn.Module:
    """A classifier of clips (B, 3, F, H, W) in [0, 1] by name, on the CPU, frozen, in eval mode.

    name: "tiny", the packaged one; "package.module:function", which is imported, so that its code runs, and returns a
        module when it is called without arguments; or a folder or Hugging Face repository with a transformers model
        for video classification, read from safetensors alone.
    mean, std, scale: of the transformers model, as for `VideoClassifier.huggingface`.
    """
    if name == "tiny":
        return tiny.load_classifier()
    try:
        if ":" in name:
            home, _, attribute = name.partition(":")
            model = getattr(importlib.import_module(home), attribute)()
        else:
            automatic = _library("transformers", "pretrained").AutoModelForVideoClassification
            model = automatic.from_pretrained(name, use_safetensors=True)
            model = VideoClassifier.huggingface(model, mean=mean, std=std, scale=scale)
    except Exception as error:  # whatever the code of others does
        raise ValueError(f"classifier {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"classifier {name!r} is a {type(model).__name__}; accepted: a torch.nn.Module")
    return model.eval().requires_grad_(False)


def art_preprocessor(purifier: Purifier, *, gradient: str = "exact", batch_size: int = 8) -> PreprocessorPyTorch:
    """The purifier as ART's preprocessor: `PyTorchClassifier(..., clip_values=(0, 1), preprocessing_defences=[it])`.

    ART differentiates through `forward` where all preprocessors are of PyTorch, else through `estimate_forward`; both
    have the gradient named here, and of both only `forward` has the values of purified clips.

    Args:
        purifier: its last vote is what the classifier sees. The vote over all is a DefendedClassifier.
        gradient: "exact", the purification's own, or "bpda", the identity: cheap, and no measure, for against a
            purifier it may lead to safer clips.
        batch_size: clips purified at once; ART hands over whole data sets.

    It is applied in predictions and attacks, not in `fit`: the defense needs no training. ImportError without ART.
    """
    base = _library("art.defences.preprocessor.preprocessor", "art").PreprocessorPyTorch
    if not isinstance(purifier, Purifier):
        raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    if gradient not in ("exact", "bpda"):
        raise ValueError(f"gradient is {gradient!r}; accepted: exact, bpda")
    check_count("batch_size", batch_size)

    def purify(clips: Tensor) -> Tensor:
        return torch.cat([purifier(part) for part in clips.split(batch_size)])

    class PurifierPreprocessor(base):
        """Purifies clips (B, 3, F, H, W) in [0, 1]; labels pass."""

        def __init__(self) -> None:
            super().__init__(device_type="cpu", is_fitted=True, apply_fit=False, apply_predict=True)
            self.purifier = purifier

        @property
        def device(self) -> torch.device:
            return purifier.unet.device

        def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
            if gradient == "exact":
                return purify(x), y
            with torch.no_grad():
                purified = purify(x)
            return straight_through(x, purified), y

        def estimate_forward(self, x: Tensor, y: Any = None) -> Tensor:
            return x if gradient == "bpda" else purify(x)

    return PurifierPreprocessor()


def foolbox_model(module: nn.Module) -> PyTorchModel:
    """A module from clips in [0, 1] to logits as foolbox's model, put in eval mode, on its own device.

    FGSM, LinfPGD, L2PGD, CW and DeepFool take clips (B, 3, F, H, W). Their success is the mean logits' own: of a
    DefendedClassifier, count with `predict`, the majority. ImportError without foolbox.
    """
    library = _library("foolbox", "foolbox")
    _check_module(module)
    weights = next(itertools.chain(module.parameters(), module.buffers()), None)
    return library.PyTorchModel(module.eval(), bounds=(0, 1), device="cpu" if weights is None else weights.device)


def autoattack_model(module: nn.Module) -> nn.Module:
    """A module of images (B, 3 * F, H, W) for auto-attack, whose Square attack knows no fifth dimension.

    Attack `clips.flatten(1, 2)`; `images.unflatten(1, (3, -1))` are clips again. Distances in the l_inf, l2 and l1
    norms are the same. Square's windows then span all frames, with a sign for each frame and channel. Its accuracy is
    the mean logits' own: of a DefendedClassifier, count with `predict`, the majority.
    """
    _check_module(module)
    return _Unfolded(module)


class _Unfolded(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] % 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; accepted: (B, 3 * F, H, W)")
        return self.module(images.unflatten(1, (3, -1)))


def _library(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.split(".")[0]
        raise ImportError(f"{root} does not import ({error}); pip install 'videopure-fast[{extra}]'") from error


def _spread(clips: Tensor, frames: int) -> Tensor:
    """`frames` of a clip's frames, evenly from the first to the last, rounded down; one alone is the first."""
    last = clips.shape[2] - 1
    chosen = [i * last // max(1, frames - 1) for i in range(frames)]
    return clips if chosen == list(range(last + 1)) else torch.stack([clips[:, :, i] for i in chosen], 2)


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module from clips to logits, got {type(module).__name__}")


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size must be a side or (height, width), got {size!r}")
    for side in sides:
        check_count("size", side, most=_MOST_SIDE)
    return sides


def _channels(name: str, value: float | Sequence[float]) -> Tensor:
    """A number, or three, as (3, 1, 1, 1)."""
    try:
        values = torch.as_tensor(value, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or three, got {value!r}") from None
    if len(values) not in (1, 3) or not values.isfinite().all():
        raise ValueError(f"{name} must be a finite number or three, got {value!r}")
    return values.expand(3).clone().view(3, 1, 1, 1)


def _of_config(config: Any, option: str, *names: str) -> Any:
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ValueError(f"the model's config has none of {', '.join(names)}: pass {option}=...")
