"""Checks of inputs: clips, logits, numbers, models, embeddings, settings, devices.

They raise TypeError or ValueError with a sentence that says what was given and what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import MOST_FLOAT, PurifyConfig, brief

LEAST_SIDE = 16  # smallest height and width of a video, in pixels
_MOST_WARMED = 2**32  # values of a gray video: 16 GiB
MOST_FRAMES = 1024  # largest number of frames of a window
_LEAST_SCALE = 1e-6  # of latents; the largest is its inverse: with more, they would overflow in half precision
# Who reads which field of diffusers' configurations; a scheduler's are in schedule.py.
#   all: block types, widths, layers, heads, norms, activations, paddings, quant_conv, mid_block_*, use_*: modules are
#     made of them, and the fast forms look at the modules.
#   UNet3DConditionModel, UNetMotionModel: in_channels, out_channels, cross_attention_dim are checked here; CONDITIONS
#     are refused; sample_size is a pipeline's default size; motion_max_seq_length bounds max_frames here.
#   AutoencoderKL: scaling_factor, shift_factor, latents_mean, latents_std are honored by models/vae.py; sample_size is
#     of tiles, which are off. force_upcast is read by image pipelines alone, and is on by default, also for VAEs that
#     half precision serves: a VAE that overflows in it ends in an error, and runs in bfloat16 or float32.
#   AutoencoderTiny: scaling_factor, shift_factor as above; upsampling_scaling_factor is 2; latent_magnitude and
#     latent_shift are for latents stored as pictures.
# Fields of a UNet's configuration that stand for an input beside the prompt; None where it has no such input.
CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


VIDEO_LAYOUTS = ("BCTHW", "BTCHW")  # (B, 3, F, H, W), this package's, and (B, F, 3, H, W), that of Hugging Face


def check_video(video: Tensor, *, layout: str = "BCTHW") -> None:
    """TypeError or ValueError unless a video is (B, 3, F, H, W) or (3, F, H, W), floats in [0, 1] or uint8, with F >= 2
    frames and sides of LEAST_SIDE pixels or more.

    layout: "BTCHW" where it should be (B, F, 3, H, W) or (F, 3, H, W) instead.
    """
    if layout not in VIDEO_LAYOUTS:
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(VIDEO_LAYOUTS)}")
    channels, frames = (-4, -3) if layout == "BCTHW" else (-3, -4)
    axes = "3, F, H, W" if layout == "BCTHW" else "F, 3, H, W"
    accepted = f"accepted: (B, {axes}) or ({axes}) with F >= 2 frames and sides of 16 pixels or more"
    if not isinstance(video, Tensor):
        raise TypeError(f"video must be a torch.Tensor, got {type(video).__name__}; {accepted}")
    if video.layout != torch.strided or video.is_nested or video.is_meta:
        raise TypeError(f"video is a {video.layout} tensor on {video.device}; accepted: dense tensors with values")
    if video.dtype not in (torch.uint8, *FLOATS):
        raise TypeError(f"video is {video.dtype}; accepted: floats of 16 bits or more in [0, 1], or uint8 in 0..255")
    shape = tuple(video.shape)
    if video.ndim not in (4, 5) or shape[channels] != 3:
        raise ValueError(f"video has shape {shape}; {accepted}{_shape_advice(shape, layout)}")
    if video.ndim == 5 and not len(video):
        raise ValueError(f"video has shape {shape}, an empty batch; {accepted}")
    if shape[frames] < 2 or min(shape[-2:]) < LEAST_SIDE:
        raise ValueError(f"video has shape {shape}; {accepted}{_shape_advice(shape, layout)}")
    if video.is_floating_point():
        low, high = torch.stack(torch.aminmax(video.detach())).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("video has NaN or infinite values; accepted: floats in [0, 1]")
        if low < 0 or high > 1:
            seen = f"video has values from {low} to {high}; accepted: floats in [0, 1], or uint8"
            raise ValueError(seen + _value_advice(low, high))


def gray_video(shape: Sequence[int]) -> Tensor:
    """A video of this shape. TypeError or ValueError unless it is one that a purifier takes."""
    accepted = "accepted: the video's, (B, 3, F, H, W) or (3, F, H, W)"
    if not isinstance(shape, Sequence) or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise TypeError(f"shape must be integers, got {shape!r}; {accepted}")
    if min(shape, default=0) < 1 or math.prod(shape) > _MOST_WARMED:
        raise ValueError(f"shape is {tuple(shape)}; {accepted}, of 1 to 2^32 values")
    video = torch.full(tuple(shape), 0.5, device="cpu")
    check_video(video)
    return video


def check_clips(clips: Tensor, dtypes: Sequence[torch.dtype] = FLOATS, *, single: bool = False) -> None:
    """TypeError or ValueError unless clips are dense, (B, 3, F, H, W), of one of the dtypes, and in [0, 1] if floats.

    single: whether one clip (3, F, H, W) is accepted too.
    """
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    one = ", or one of them (3, F, H, W)" if single else ""
    accepted = f"accepted: dense tensors (B, 3, F, H, W) in [0, 1] of {names}, no axis empty{one}"
    if not isinstance(clips, Tensor):
        raise TypeError(f"clips must be a torch.Tensor, got {type(clips).__name__}; {accepted}")
    if clips.layout != torch.strided or clips.is_nested or clips.is_meta or clips.dtype not in dtypes:
        raise TypeError(f"clips are {clips.dtype}, {clips.layout} on {clips.device}; {accepted}")
    if clips.ndim not in ((4, 5) if single else (5,)) or clips.shape[-4] != 3 or not clips.numel():
        raise ValueError(f"clips have shape {tuple(clips.shape)}; {accepted}{_shape_advice(tuple(clips.shape))}")
    if clips.dtype == torch.uint8:
        return
    low, high = torch.stack(torch.aminmax(clips.detach())).tolist()
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise ValueError(f"clips have values from {low} to {high}; {accepted}{_value_advice(low, high)}")


def as_floats(clips: Tensor) -> Tensor:
    """float32 in [0, 1], from uint8 or from floats in [0, 1]."""
    return clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()


def float_clips(clips: Tensor) -> Tensor:
    """A batch (B, 3, F, H, W) of floats in [0, 1]: from such clips or uint8 ones, which become float32, or from one of
    them (3, F, H, W). TypeError or ValueError for anything else."""
    check_clips(clips, (*FLOATS, torch.uint8), single=True)
    batch = clips if clips.ndim == 5 else clips[None]
    return as_floats(batch) if clips.dtype == torch.uint8 else batch


def _shape_advice(shape: tuple[int, ...], layout: str | None = None) -> str:
    """What clips of a refused shape look like, and what mends them.

    layout: the one that was expected of a video; None: the clips are a classifier's, or an attack's.
    """
    if len(shape) not in (4, 5):
        return ""
    if layout == "BTCHW":
        return "; this looks like (B, 3, F, H, W), layout='BCTHW'" if shape[-4] == 3 else ""
    if shape[-3] == 3 and shape[-4] != 3:
        mend = "pass layout='BTCHW' to purify, or video.transpose(-4, -3)"
        if layout is None:
            mend = "pass clips.transpose(-4, -3); adapters.VideoClassifier(model, layout='BTCHW') adapts a classifier"
        return f"; this looks like (B, F, 3, H, W): {mend}"
    if shape[-1] == 3:
        return "; this looks like (B, F, H, W, 3): pass it with .movedim(-1, -4)"
    return ""


def _value_advice(low: float, high: float) -> str:
    """What values outside [0, 1] look like, and what mends them."""
    if low >= 0 and 2 < high <= 255:
        adapts = "adapters.VideoClassifier(model, scale=255) adapts a classifier of such values"
        return f"; these look like 0..255: divide by 255, or pass uint8; {adapts}"
    if -10 < low < -0.25 and high < 10:
        normalizes = "adapters.VideoClassifier(model, mean=..., std=...) normalizes for a classifier"
        return f"; these look normalized: pass them as they were before, {normalizes}"
    if low >= -0.25 and high <= 2:
        return "; .clamp(0, 1) removes what resizing adds"
    return ""


def like_video(clips: Tensor, video: Tensor) -> Tensor:
    """Decoded clips (..., 3, F, H, W), in [0, 1], in the size, the dtype, the range and on the device of a video."""
    clips = clips[..., : video.shape[-2], : video.shape[-1]]
    if video.dtype == torch.uint8:
        clips = (clips * 255).round().to(torch.uint8)
    elif video.itemsize < clips.itemsize:  # narrowed before it is copied to another device
        clips = clips.to(video.dtype)
    return clips.to(video.device, video.dtype).contiguous()


def check_logits(logits: Tensor, clips: int, *, votes: bool = False) -> None:
    """TypeError or ValueError unless logits are finite floats (clips, K) with K >= 2, or with votes also (clips, V, K).

    clips: number of clips. NaN is refused because argmax would return the first NaN's index as a label.
    """
    accepted = f"({clips}, K) or ({clips}, V, K)" if votes else f"({clips}, K)"
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model must return logits {accepted}, got {type(logits).__name__}")
    if logits.ndim not in ((2, 3) if votes else (2,)) or len(logits) != clips or 0 in logits.shape:
        raise ValueError(f"the model must return logits {accepted}, got {tuple(logits.shape)}")
    if not logits.is_floating_point() or logits.shape[-1] < 2:
        raise ValueError(f"logits must be floats of 2 classes or more, got {logits.dtype} of {logits.shape[-1]}")
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite")


def check_number(name: str, value: float, *, zero: bool = True, most: float = math.inf) -> None:
    """TypeError or ValueError unless value is a finite number from 0 to `most`, which is MOST_FLOAT at most.

    name: the name of the argument, for the message. zero: whether 0 is accepted.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    limit = min(most, MOST_FLOAT)
    if not 0 <= value <= limit or not (value or zero):
        least = "0 or more" if zero else "more than 0"
        top = f"at most {limit:g}" if most < math.inf or limit < value < math.inf else "finite"
        raise ValueError(f"{name} must be {least} and {top}, got {brief(value)}")


def check_count(name: str, value: int, *, least: int = 1, most: int | None = None) -> None:
    """TypeError or ValueError unless value is an int from `least` to `most`. name: of the argument, for the message."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {brief(value)}")
    if value < least or (most is not None and value > most):
        accepted = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be {accepted}, got {brief(value)}")


def check_generator(generator: torch.Generator) -> None:
    """TypeError or ValueError unless generator is a torch.Generator on the CPU, whose draws do not depend on the device
    of the clips."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator on the CPU, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be a torch.Generator on the CPU, got one on {generator.device}")


def check_generators(generator: Any, clips: int) -> None:
    """TypeError or ValueError unless it is None, a torch.Generator, or a list of them, one for each clip."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, (list, tuple)):
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) != clips:
        raise ValueError(f"got {len(generator)} generators for {clips} clips; accepted: one, or one for each clip")
    if not all(isinstance(one, torch.Generator) for one in generator):
        raise TypeError(f"generators must be torch.Generator, got {[type(one).__name__ for one in generator]}")


def check_latents(name: str, latents: Tensor, channels: int, *, least_dims: int = 5, most_dims: int = 5) -> None:
    """TypeError or ValueError unless latents are floats (..., channels, F, h, w) of that many dimensions, not empty."""
    accepted = f"accepted: floats (..., {channels}, F, h, w) with {least_dims} dimensions" + (
        f" to {most_dims}" if most_dims > least_dims else ""
    )
    if not isinstance(latents, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(latents).__name__}; {accepted}")
    if latents.dtype not in FLOATS:
        raise TypeError(f"{name} must be floats, got {latents.dtype}; {accepted}")
    if not least_dims <= latents.ndim <= most_dims or latents.shape[-4] != channels or not latents.numel():
        raise ValueError(f"{name} has shape {tuple(latents.shape)}; {accepted}")


def check_callback(callback: Any) -> None:
    """TypeError unless it is None or can be called."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")


def check_flag(name: str, value: bool) -> bool:
    """The value; TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def check_models(unet: nn.Module, vae: nn.Module) -> None:
    """TypeError or ValueError unless these are diffusers modules for the same latents, whose configurations ask for
    nothing that a purification does not do."""
    for name, module, settings in (
        ("unet", unet, ("in_channels", "out_channels", "cross_attention_dim")),
        ("vae", vae, ("in_channels", "out_channels", "latent_channels", "scaling_factor", "block_out_channels")),
    ):
        if not isinstance(module, nn.Module) or not all(hasattr(getattr(module, "config", None), s) for s in settings):
            seen = type(module).__name__
            raise TypeError(f"{name} must be a diffusers module whose config has {', '.join(settings)}; got {seen}")
    if type(vae).__name__ == "AutoencoderTiny":
        raise TypeError("vae must be a diffusers AutoencoderKL, got an AutoencoderTiny; pass that one as decoder")
    for setting in ("in_channels", "out_channels"):
        if getattr(unet.config, setting) != vae.config.latent_channels:
            verb = "takes" if setting == "in_channels" else "returns"
            raise ValueError(
                f"the VAE has {vae.config.latent_channels} latent channels, the UNet {verb} "
                f"{getattr(unet.config, setting)}"
            )
    for setting in CONDITIONS:
        if getattr(unet.config, setting, None) is not None:
            raise ValueError(
                f"the UNet's {setting} is {brief(getattr(unet.config, setting))}: it wants a condition beside the "
                "prompt, and a purification has none; accepted: None"
            )
    _check_pictures("VAE", vae.config)
    check_latent_scale("VAE", vae.config, vae.config.latent_channels)


def check_latent_scale(name: str, config: Any, channels: int) -> None:
    """ValueError unless a configuration's scale and shift of latents are usable numbers, and it has one shift."""
    scale, shift = config.scaling_factor, getattr(config, "shift_factor", None)
    if not _is_number(scale) or not _LEAST_SCALE <= scale <= 1 / _LEAST_SCALE:
        raise ValueError(f"the {name}'s scaling_factor must be a positive number, got {brief(scale)}")
    if shift is not None and not (_is_number(shift) and abs(shift) <= 1 / _LEAST_SCALE):
        raise ValueError(f"the {name}'s shift_factor must be a finite number or None, got {brief(shift)}")
    given = {key: getattr(config, key, None) for key in ("latents_mean", "latents_std")}
    if all(value is None for value in given.values()):
        return
    for key, value in given.items():
        numbers = value if isinstance(value, Sequence) and all(map(_is_number, value)) else ()
        least = -1 / _LEAST_SCALE if key == "latents_mean" else _LEAST_SCALE
        if len(numbers) != channels or not all(least <= number <= 1 / _LEAST_SCALE for number in numbers):
            kind = "finite" if key == "latents_mean" else "positive"
            raise ValueError(
                f"the {name}'s {key} is {brief(value)}; accepted: {channels} {kind} numbers, one a latent channel, "
                "beside the other of latents_mean and latents_std"
            )
    if shift:
        raise ValueError(f"the {name} has a shift_factor, {shift}, and a latents_mean: accepted: one of them")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_pictures(name: str, config: Any) -> None:
    for setting in ("in_channels", "out_channels"):
        if getattr(config, setting) != 3:
            raise ValueError(f"the {name}'s {setting} must be 3, for RGB, got {brief(getattr(config, setting))}")


def check_decoder(vae: nn.Module, decoder: nn.Module | None) -> None:
    """TypeError or ValueError unless decoder is None or an AutoencoderTiny for the VAE's latents: with as many channels
    and levels."""
    if decoder is None:
        return
    if not isinstance(decoder, nn.Module) or type(decoder).__name__ != "AutoencoderTiny":
        raise TypeError(f"decoder must be a diffusers AutoencoderTiny, got {type(decoder).__name__}")
    for name, vae_value, decoder_value in (
        ("latent channels", vae.config.latent_channels, decoder.config.latent_channels),
        ("levels", len(vae.config.block_out_channels), len(decoder.config.decoder_block_out_channels)),
    ):
        if vae_value != decoder_value:
            raise ValueError(
                f"the VAE has {vae_value} {name}, the decoder {decoder_value}: it is not for these latents"
            )
    if decoder.config.upsampling_scaling_factor != 2:
        seen = brief(decoder.config.upsampling_scaling_factor)
        raise ValueError(f"the decoder's upsampling_scaling_factor must be 2, as the VAE's is, got {seen}")
    _check_pictures("decoder", decoder.config)
    check_latent_scale("decoder", decoder.config, decoder.config.latent_channels)


def check_embeddings(unet: nn.Module, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None) -> None:
    """TypeError or ValueError unless prompts are finite floats (1, tokens, cross_attention_dim of the UNet), of equal
    shapes. negative_prompt_embeds may be None."""
    dim = unet.config.cross_attention_dim
    dim = dim[0] if isinstance(dim, Sequence) and len(set(dim)) == 1 else dim
    for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if embeds is None and name == "negative_prompt_embeds":
            continue
        if not isinstance(embeds, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(embeds).__name__}")
        if embeds.ndim != 3 or len(embeds) != 1 or embeds.shape[1] < 1 or embeds.shape[-1] != dim:
            raise ValueError(f"{name} has shape {tuple(embeds.shape)}; accepted: (1, tokens, {dim})")
        # They take the UNet's dtype, in which large ones overflow.
        if embeds.dtype not in FLOATS or not embeds.to(unet.dtype).isfinite().all():
            raise ValueError(f"{name} must hold finite floats, also in {unet.dtype}, got {embeds.dtype}")
    if negative_prompt_embeds is not None and negative_prompt_embeds.shape != prompt_embeds.shape:
        raise ValueError(
            f"negative_prompt_embeds has shape {tuple(negative_prompt_embeds.shape)}, "
            f"prompt_embeds {tuple(prompt_embeds.shape)}; they must be equal"
        )


def replace_config(config: PurifyConfig, overrides: Mapping[str, Any]) -> PurifyConfig:
    """A copy of config with some settings replaced. TypeError for unknown settings, ValueError for bad values."""
    if not isinstance(config, PurifyConfig):
        raise TypeError(f"config must be a PurifyConfig, got {type(config).__name__}")
    accepted = [field.name for field in fields(PurifyConfig)]
    if unknown := set(overrides) - set(accepted):
        raise TypeError(f"unknown settings {', '.join(sorted(unknown))}; accepted: {', '.join(accepted)}")
    return replace(config, **overrides)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device with its index; None is the accelerator if there is one, else the CPU. ValueError if torch cannot run
    a convolution there: "meta" has no values, and other names stand for devices that are not here."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        image = torch.ones(1, 1, 2, 2, device=device)
        torch.nn.functional.conv2d(image, image).item()
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:  # it differs by backend
        seen = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {seen}") from error
    return image.device


def resolve_dtype(dtype: Any, other: Any, device: torch.device) -> torch.dtype:
    """The dtype of models: float16 on an accelerator, else float32, if `dtype` is None. other: by its other name.

    ValueError for two that differ, or one of another kind.
    """
    if other is not None and dtype != other:
        raise ValueError(f"dtype is {dtype!r} and torch_dtype, its other name, {other!r}: give one of them")
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {brief(dtype)}")
    chosen: torch.dtype = dtype
    return chosen
