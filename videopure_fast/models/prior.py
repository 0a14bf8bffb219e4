"""Priors: the frozen models and constants of a purifier, read from and written to a folder.

A folder holds the diffusers modules `unet/` and `vae/`, and either a text encoder (`text_encoder/`, `tokenizer/`), with
which the empty prompt is encoded once, or stored embeddings (`prompt_embeds.safetensors`). Optional files are
`purifier.json`, the prior's own settings, and `scheduler/scheduler_config.json`, its noise schedule.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import PurifyConfig, brief
from ..inputs import MOST_FRAMES, check_count
from ..schedule import Schedule, read_scheduler
from .checkpoint import check_layers, file_names, first_line, load_module, read_json, stored_sizes
from .hub import HubOptions, MissingWeights, check_options, download, pick_part
from .state import departure

_PACKAGED = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
_DECODERS = {"taesd": "madebyollin/taesd"}


class Models(NamedTuple):
    """The modules and constants of a prior."""

    unet: nn.Module
    vae: nn.Module
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None


class Settings(NamedTuple):
    """A prior's own settings. flow: the name of an estimator; None if the folder was saved with a callable."""

    config: PurifyConfig
    flow: str | None
    max_frames: int | None
    scheduler_config: dict[str, Any] | None = None


def find_prior(name: str | os.PathLike[str], options: HubOptions) -> Path:
    """The folder of a prior. name: a packaged prior, a folder, or a Hugging Face repository, which is downloaded.

    options: for a repository. Raises FileNotFoundError if there is no such model or no network, ValueError for a folder
    that is not a prior.
    """
    check_options(options)
    folder = _find(name, options)
    for part in ("unet", "vae"):
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"{folder} is not a text-to-video prior: it has no {part}/config.json")
    return folder


def read_settings(folder: Path) -> Settings:
    """The settings in a prior's folder; by default those of the full-size models. ValueError if they are invalid."""
    path = folder / "purifier.json"
    given = read_json(path) or {"flow": "raft"}
    config = given.get("config", {})
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config must be an object, got {brief(config)}")
    unknown = set(config) - {field.name for field in fields(PurifyConfig)}
    if unknown:
        raise ValueError(f"{path} has unknown settings: {brief(sorted(unknown))}")
    max_frames = given.get("max_frames")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    try:
        if max_frames is not None:
            check_count("max_frames", max_frames, least=2, most=MOST_FRAMES)
        settings = Settings(PurifyConfig(**config), given.get("flow"), max_frames, read_json(scheduler))
        path = scheduler
        Schedule(read_scheduler(settings.config, settings.scheduler_config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def load_models(folder: Path, *, dtype: torch.dtype, variant: str | None = None) -> Models:
    """Load the modules of a prior's folder. ValueError if its files do not make whole modules.

    variant: of the UNet's weights, and of the others where they have it.
    """
    from diffusers import AutoencoderKL, UNet3DConditionModel, UNetMotionModel

    prompt_embeds, negative_prompt_embeds = _embeddings(folder, variant)
    unet = load_module((UNet3DConditionModel, UNetMotionModel), folder / "unet", dtype, variant=variant)
    vae = load_module((AutoencoderKL,), folder / "vae", dtype, variant=variant, needed=False)
    return Models(unet, vae, prompt_embeds, negative_prompt_embeds)


def load_decoder(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    options: HubOptions = HubOptions(),  # noqa: B008  (immutable)
) -> nn.Module:
    """A diffusers AutoencoderTiny: "taesd" (Stable Diffusion's latents), a folder, or a Hugging Face repository.

    FileNotFoundError if it cannot be found or downloaded, ValueError if its files do not make a whole module.
    """
    from diffusers import AutoencoderTiny

    if os.path.isdir(name):
        return load_module((AutoencoderTiny,), Path(name), dtype)
    repository = _DECODERS.get(str(name), str(name))
    try:
        folder = download(repository, options, parts=("",))
    except MissingWeights:
        raise
    except Exception as error:  # the hub's client raises many types, also those of its HTTP library
        accepted = "accepted: 'taesd', a folder, or the name of a Hugging Face repository"
        raise FileNotFoundError(f"no decoder {brief(str(name))} ({first_line(error)}); {accepted}") from error
    return load_module((AutoencoderTiny,), folder, dtype)


def models_of_pipe(pipe: Any, prompt_embeds: Tensor | None = None) -> Models:
    """The UNet and VAE of a diffusers text-to-video pipeline, shared, and its embedding of the empty prompt.

    prompt_embeds: in place of what the pipeline's text encoder would make. TypeError or ValueError for other pipelines.
    """
    accepted = "accepted: a diffusers TextToVideoSDPipeline or AnimateDiffPipeline with its "
    needed = ["unet", "vae", "scheduler", *(() if prompt_embeds is not None else ("text_encoder", "tokenizer"))]
    missing = [name for name in needed if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(f"the {type(pipe).__name__} has no {', '.join(missing)}; {accepted}{', '.join(needed)}")
    kind = type(pipe.unet).__name__
    if kind not in ("UNet3DConditionModel", "UNetMotionModel"):
        raise TypeError(f"the {type(pipe).__name__} has a {kind}, which is no model of videos; {accepted}parts")
    if prompt_embeds is None:
        prompt_embeds = encode_empty_prompt(pipe.tokenizer, pipe.text_encoder)
    return Models(pipe.unet, pipe.vae, prompt_embeds, None)


@torch.no_grad()
def encode_empty_prompt(tokenizer: Any, encoder: Any) -> Tensor:
    """The text encoder's last hidden state of an empty prompt, (1, tokens, dim), float32, as diffusers' pipelines do.

    The prompt is padded to the tokenizer's length, or the encoder's where the tokenizer sets none.
    """
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    masked = getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(encoder.device) if masked else None
    embeds: Tensor = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
    return embeds.float()


def save_prior(models: Models, settings: Settings, folder: str | os.PathLike[str]) -> None:
    """Write a folder that `find_prior` accepts and that needs neither network nor text encoder to be loaded.

    The folder is renamed into place when it is complete. FileExistsError if it exists already; ValueError for models
    that are not what their configuration makes, as with hooks, wrapped layers or FreeU.
    """
    for model in (models.unet, models.vae):
        if reason := departure(model):
            raise ValueError(
                f"a {type(model).__name__} with more than weights and configuration is not saved: {reason}"
            )
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part, module in (("unet", models.unet), ("vae", models.vae)):
            module.save_pretrained(unfinished / part)
            config = read_json(unfinished / part / "config.json")
            assert config is not None, "save_pretrained of a diffusers model writes config.json"
            config.pop("_name_or_path", None)  # the path from which the module was loaded on this machine
            _write_json(unfinished / part / "config.json", config)
        embeddings = {"prompt_embeds": models.prompt_embeds, "negative_prompt_embeds": models.negative_prompt_embeds}
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in embeddings.items() if value is not None},
            unfinished / "prompt_embeds.safetensors",
        )
        content = {"config": asdict(settings.config), "flow": settings.flow, "max_frames": settings.max_frames}
        _write_json(unfinished / "purifier.json", content)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _find(name: str | os.PathLike[str], options: HubOptions) -> Path:
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"model must be a name or a path, got {name!r}")
    if name in _PACKAGED:
        return _PACKAGED[name]
    if str(name) and os.path.isdir(name):
        return Path(name)
    accepted = f"accepted: {', '.join(map(repr, _PACKAGED))}, a folder, or the name of a Hugging Face repository"
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no model {brief(str(name))}; {accepted}")
    try:
        return download(str(name), options, parts=("unet/", "vae/", "text_encoder/"))
    except MissingWeights:
        raise
    except Exception as error:  # the hub's client raises many types, also those of its HTTP library
        raise FileNotFoundError(
            f"no folder {brief(str(name))}, and the Hugging Face repository of that name is not available "
            f"({first_line(error)}); {accepted}"
        ) from error


def _embeddings(folder: Path, variant: str | None) -> tuple[Tensor, Tensor | None]:
    stored = folder / "prompt_embeds.safetensors"
    if stored.is_file():
        try:
            tensors = load_file(stored)
            return tensors["prompt_embeds"], tensors.get("negative_prompt_embeds")
        except Exception as error:  # SafetensorError, or what a dtype unknown to torch raises
            raise ValueError(f"{stored} cannot be read: {first_line(error)}") from error
    if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
        raise ValueError(f"{folder} has neither prompt_embeds.safetensors nor text_encoder/ and tokenizer/")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "encoding the empty prompt of this model needs transformers: pip install transformers accelerate"
        ) from error
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        return encode_empty_prompt(tokenizer, _text_encoder(folder / "text_encoder", variant)), None
    except Exception as error:
        raise ValueError(f"the text encoder in {folder} cannot be used: {first_line(error)}") from error


def _text_encoder(folder: Path, variant: str | None) -> nn.Module:
    """The CLIPTextModel in a folder, in float32. ValueError if its files do not make a whole one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = read_json(folder / "config.json") or {}
    files, chosen = pick_part(file_names(folder), variant, where=str(folder), needed=False)
    sizes = stored_sizes(folder, files)
    check_layers(config, len(sizes), folder)
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in CLIPTextModel(CLIPTextConfig(**config)).parameters())
    if described > sum(sizes):
        raise ValueError(f"its config.json describes {described} numbers, its files hold {sum(sizes)}")
    encoder: nn.Module
    encoder, report = CLIPTextModel.from_pretrained(
        folder, variant=chosen, output_loading_info=True, attn_implementation="sdpa"
    )
    if wrong := sorted(map(str, report["missing_keys"])):
        raise ValueError(f"it lacks {len(wrong)} of its weights, the first being {wrong[0]}")
    return encoder.float().eval()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
