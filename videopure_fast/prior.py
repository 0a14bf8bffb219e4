"""Priors: the frozen models and constants that a purifier stands on, read from and written to a folder.

A folder holds the diffusers modules `unet/` and `vae/`, `scheduler/scheduler_config.json`, and either a text encoder
(`text_encoder/`, `tokenizer/`), with which the empty prompt is encoded once, or stored embeddings
(`prompt_embeds.safetensors`). `purifier.json`, where present, states the prior's own settings.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import PurifyConfig

_PACKAGED = {"tiny": Path(__file__).with_name("tiny") / "weights"}
_LARGEST_JSON = 1 << 20  # bytes; a configuration is a few kilobytes


class Prior(NamedTuple):
    """What `Purifier` is made of. `flow` is the name of an estimator, None where the folder does not tell."""

    unet: nn.Module
    vae: nn.Module
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    scheduler_config: dict[str, Any]
    config: PurifyConfig
    flow: str | None
    max_frames: int


def load_prior(name: str | os.PathLike[str], *, dtype: torch.dtype) -> Prior:
    """Load a packaged prior, a folder, or a Hugging Face repository of a diffusers text-to-video model.

    Raises FileNotFoundError where there is no such model or no network, ValueError for a folder that is not a prior.
    """
    folder = _find(name)
    for part in ("unet", "vae"):
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"{folder} is not a text-to-video prior: it has no {part}/config.json")
    settings = _read_json(folder / "purifier.json", default={"flow": "raft"})
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json", default={})
    config = _read_config(folder, settings.get("config", {}))

    from diffusers import AutoencoderKL, UNet3DConditionModel

    try:
        # Both take safetensors, or a .bin that torch reads with weights_only.
        unet = UNet3DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
        prompt_embeds, negative_prompt_embeds = _embeddings(folder)
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the prior in {folder} cannot be read: {_first_line(error)}") from error
    max_frames = settings.get("max_frames", 32)
    return Prior(
        unet, vae, prompt_embeds, negative_prompt_embeds, scheduler_config, config, settings.get("flow"), max_frames
    )


def save_prior(prior: Prior, folder: str | os.PathLike[str]) -> None:
    """Write a prior so that `load_prior` reads it back without a network or a text encoder.

    The folder appears whole or not at all. FileExistsError where it is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        prior.unet.save_pretrained(unfinished / "unet")
        prior.vae.save_pretrained(unfinished / "vae")
        embeddings = {"prompt_embeds": prior.prompt_embeds, "negative_prompt_embeds": prior.negative_prompt_embeds}
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in embeddings.items() if value is not None},
            unfinished / "prompt_embeds.safetensors",
        )
        (unfinished / "scheduler").mkdir()
        _write_json(unfinished / "scheduler" / "scheduler_config.json", prior.scheduler_config)
        settings = {"config": asdict(prior.config), "flow": prior.flow, "max_frames": prior.max_frames}
        _write_json(unfinished / "purifier.json", settings)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _find(name: str | os.PathLike[str]) -> Path:
    if name in _PACKAGED:
        return _PACKAGED[name]
    if Path(name).is_dir():
        return Path(name)
    accepted = f"accepted: {', '.join(map(repr, _PACKAGED))}, a folder, or the name of a Hugging Face repository"
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no model {str(name)!r}; {accepted}")
    try:
        return _download(str(name))
    except Exception as error:  # the hub's client raises many kinds, its HTTP library's among them
        raise FileNotFoundError(
            f"no folder {str(name)!r}, and the Hugging Face repository of that name cannot be had "
            f"({_first_line(error)}); {accepted}"
        ) from error


def _download(name: str) -> Path:
    """The hub's repository in the local cache: of the weights, which are stored several times over, one copy."""
    import huggingface_hub

    try:
        files = [file for file in huggingface_hub.list_repo_files(name) if ".fp16." not in file]
    except Exception:  # no network, or no such repository: it may have been downloaded before
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    wanted = fnmatch.filter(files, "*.json") + fnmatch.filter(files, "tokenizer/*") + ["prompt_embeds.safetensors"]
    for part in ("unet", "vae", "text_encoder"):
        wanted += fnmatch.filter(files, f"{part}/*.safetensors") or fnmatch.filter(files, f"{part}/*.bin")
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))


def _embeddings(folder: Path) -> tuple[Tensor, Tensor | None]:
    stored = folder / "prompt_embeds.safetensors"
    if stored.is_file():
        tensors = load_file(stored)
        return tensors["prompt_embeds"], tensors.get("negative_prompt_embeds")
    if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
        raise ValueError(f"{folder} has neither prompt_embeds.safetensors nor text_encoder/ and tokenizer/")
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError(
            "encoding the empty prompt of this model needs transformers: pip install 'videopure-fast[pretrained]'"
        ) from error
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        return encoder(tokens.input_ids)[0], None


def _read_config(folder: Path, given: Mapping[str, Any]) -> PurifyConfig:
    unknown = set(given) - {field.name for field in fields(PurifyConfig)}
    if unknown:
        raise ValueError(f"{folder / 'purifier.json'} has unknown settings: {', '.join(sorted(unknown))}")
    return PurifyConfig(**given)


def _read_json(path: Path, *, default: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return default
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {_LARGEST_JSON}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
