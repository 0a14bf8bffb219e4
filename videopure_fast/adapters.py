"""Adapters: other video classifiers as modules of clips in [0, 1], and the purifier inside attack libraries.

Layout, value range and normalization are arguments; nothing is guessed from the data.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tiny
from .defense.classifier import DefendedClassifier, weights_dtype
from .inputs import check_count, check_logits, check_number, float_clips
from .purifier import Purifier
from .straight_through import straight_through

if TYPE_CHECKING:
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
    from foolbox import PyTorchModel

LAYOUTS = ("BCTHW", "BTCHW", "slowfast")
_MAX_FRAMES, _MAX_SIDE = 2**16, 2**14  # sizes may come from a downloaded config


class VideoClassifier(nn.Module):
    """Clips (B, 3, F, H, W), floats in [0, 1] -> logits (B, K), differentiable, by a model that takes another format.

    Clips may also be uint8, or one clip (3, F, H, W) with logits (K,). The steps, in order: choose frames, resize,
    multiply by `scale`, normalize, change the layout, and cast to the dtype of the model's weights. Logits have the
    clips' dtype, float32 for uint8.

    Args:
        model: takes the prepared clips; returns logits (B, K) as a tensor or as the attribute `.logits`.
        layout: "BCTHW" (torchvision, pytorchvideo), "BTCHW" (Hugging Face), or "slowfast": a list of the slow and the
            fast pathway, both BCTHW (pytorchvideo).
        scale: factor of the values; 255 for mmaction2.
        mean, std: normalize the scaled values: each a number, or three for R, G and B. Both or neither.
        frames: how many frames to choose, evenly from the first to the last (pytorchvideo's UniformTemporalSubsample);
            frames repeat where a clip has fewer. None keeps all.
        size: pixels of a frame for the model: the side of a square, or (height, width); bilinear with antialias, the
            aspect ratio is not kept. None keeps the clip's size.
        alpha: the fast pathway of "slowfast" has this many times the slow one's frames.
        input_name: keyword argument by which the model takes its clips; None: its first argument.

    TypeError or ValueError for settings or clips that differ from the above, and for outputs that are no logits.
    """

    any_dtype = True  # of clips: the model is given its own

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
        check_count("frames", 1 if frames is None else frames, most=_MAX_FRAMES)
        check_count("alpha", alpha)
        self.scale, self.frames, self.alpha = scale, frames, alpha
        self.size = None if size is None else _sides(size)
        # The buffers stay out of the state dict, which so has the model's weights alone.
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
        """Wrap a transformers model for video classification, such as VideoMAE, TimeSformer, ViViT or V-JEPA 2.

        The input's name comes from the model; `frames` and `size` come from its config, unless given here. A config
        has no normalization, so it must be given: `mean=processor.image_mean, std=processor.image_std` for most models;
        None and None for none. ViViT's processor first maps values to [-1, 1]: there, pass `scale=2` and
        `image_mean` + 1, or 1 and 1 if its `do_normalize` is off.
        """
        config = getattr(model, "config", None)
        input_name = getattr(model, "main_input_name", None)
        if config is None or input_name is None:
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        frames = _config_value(config, "frames", "num_frames", "frames_per_clip") if frames is None else frames
        size = _config_value(config, "size", "image_size", "crop_size") if size is None else size
        return cls(
            model, layout="BTCHW", scale=scale, mean=mean, std=std, frames=frames, size=size, input_name=input_name
        )

    def forward(self, clips: Tensor) -> Tensor:
        batch = float_clips(clips)
        dtype = weights_dtype(self.model) or batch.dtype
        # Clips are prepared in float32 or more, and narrowed when they are normalized.
        wide = torch.promote_types(torch.promote_types(batch.dtype, dtype), torch.float32)
        prepared = self.prepare(batch.to(wide))
        given = prepared.to(dtype) if isinstance(prepared, Tensor) else [pathway.to(dtype) for pathway in prepared]
        output = self.model(given) if self.input_name is None else self.model(**{self.input_name: given})
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise TypeError(f"the model must return a tensor or have .logits, got {type(output).__name__}")
        check_logits(logits, len(batch))
        if logits.dtype != batch.dtype:
            logits = logits.to(batch.dtype)
            check_logits(logits, len(batch))  # a narrower dtype may overflow
        return logits if clips.ndim == 5 else logits[0]

    def prepare(self, clips: Tensor) -> Tensor | list[Tensor]:
        """Clips (B, 3, F, H, W) -> the model's input: one tensor, or the pathways [slow, fast]."""
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
    """A classifier of clips (B, 3, F, H, W) in [0, 1] by name: on the CPU, without parameter gradients, in eval mode.

    name: "tiny", the packaged one; "package.module:function", which is imported, so that its code runs, and called
        without arguments to return a module; or a folder or Hugging Face repository with a transformers model for video
        classification, whose weights are read from safetensors files only.
    mean, std, scale: for the transformers model, as in `VideoClassifier.huggingface`.

    ValueError where importing or loading fails, TypeError for anything but a module.
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
    except Exception as error:  # imported code may raise anything
        raise ValueError(f"classifier {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"classifier {name!r} is a {type(model).__name__}; accepted: a torch.nn.Module")
    return model.eval().requires_grad_(False)


def class_names(classifier: nn.Module) -> tuple[str, ...] | None:
    """The names of a classifier's labels, from the `config.id2label` of a transformers model, which VideoClassifier,
    DefendedClassifier and DataParallel may wrap in any order; None where it has none.

    ValueError for an id2label that does not number its names from 0 on.
    """
    wrappers = {DefendedClassifier: "classifier", nn.DataParallel: "module", VideoClassifier: "model"}
    while kind := next((kind for kind in wrappers if isinstance(classifier, kind)), None):
        classifier = getattr(classifier, wrappers[kind])
    if isinstance(classifier, tiny.ActionClassifier):
        return tiny.CLASSES
    table = getattr(getattr(classifier, "config", None), "id2label", None)
    if not isinstance(table, Mapping) or not table:
        return None
    numbered = {str(label): str(name) for label, name in table.items()}  # the keys of a file of JSON are texts
    labels = [str(label) for label in range(len(numbered))]
    if unknown := [label for label in numbered if label not in labels]:
        raise ValueError(f"the classifier's id2label has the label {unknown[0]!r}; accepted: 0 to {len(labels) - 1}")
    return tuple(numbered[label] for label in labels)


def art_preprocessor(purifier: Purifier, *, gradient: str = "exact", batch_size: int = 8) -> PreprocessorPyTorch:
    """The purifier as ART's preprocessor: `PyTorchClassifier(..., clip_values=(0, 1), preprocessing_defences=[...])`.

    ART differentiates through `forward` where all preprocessors are PyTorch's, else through `estimate_forward`. Both
    have the gradient chosen here; only `forward` returns the values of purified clips.

    Args:
        purifier: the classifier sees its last vote. DefendedClassifier gives the majority over all votes.
        gradient: "exact", the purification's own, or "bpda", the identity, which is cheap but may lower the attack's
            loss against a purifier, so that accuracy under it does not measure robustness.
        batch_size: clips purified at once; ART passes whole data sets.

    It is applied in predictions and attacks, not in `fit`, since the defense needs no training. ImportError without
    ART.
    """
    base: Any = _library("art.defences.preprocessor.preprocessor", "art").PreprocessorPyTorch
    if not isinstance(purifier, Purifier):
        raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    if gradient not in ("exact", "bpda"):
        raise ValueError(f"gradient is {gradient!r}; accepted: exact, bpda")
    check_count("batch_size", batch_size)

    def purify(clips: Tensor) -> Tensor:
        return torch.cat([purifier(part) for part in clips.split(batch_size)])

    class PurifierPreprocessor(base):
        """Purifies clips (B, 3, F, H, W) in [0, 1]; labels are returned unchanged."""

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
    """A module from clips in [0, 1] to logits as a foolbox model, on the module's device. Puts the module in eval mode.

    FGSM, LinfPGD, L2PGD, CW and DeepFool take clips (B, 3, F, H, W). Foolbox counts success by the mean logits; for the
    majority of a DefendedClassifier, count with its `predict`. ImportError without foolbox.
    """
    library = _library("foolbox", "foolbox")
    _check_module(module)
    weights = next(itertools.chain(module.parameters(), module.buffers()), None)
    return library.PyTorchModel(module.eval(), bounds=(0, 1), device="cpu" if weights is None else weights.device)


def autoattack_model(module: nn.Module) -> nn.Module:
    """A module of images (B, 3 * F, H, W) for auto-attack, whose Square attack takes images only.

    Attack `clips.flatten(1, 2)`; `images.unflatten(1, (3, -1))` are clips again. Distances in the l_inf, l2 and l1
    norms are the same. Square's windows then span all frames, with a sign for each frame and channel. Auto-attack
    counts accuracy by the mean logits; for the majority of a DefendedClassifier, count with its `predict`.
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
    """Choose `frames` frames of each clip, evenly from first to last, positions rounded down; 1 frame is the first."""
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
        check_count("size", side, most=_MAX_SIDE)
    return sides


def _channels(name: str, value: float | Sequence[float]) -> Tensor:
    """A number, or three, as a tensor (3, 1, 1, 1)."""
    try:
        values = torch.as_tensor(value, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or three, got {value!r}") from None
    if len(values) not in (1, 3) or not values.isfinite().all():
        raise ValueError(f"{name} must be a finite number or three, got {value!r}")
    return values.expand(3).clone().view(3, 1, 1, 1)


def _config_value(config: Any, option: str, *names: str) -> Any:
    """The first of the config's values `names` that is not None; ValueError without one."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ValueError(f"the model's config has none of {', '.join(names)}: pass {option}=...")
