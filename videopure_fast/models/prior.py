"""Priors: the frozen models and constants of a purifier, read from and written to a folder.

A folder holds the diffusers modules `unet/` and `vae/`, and either a text encoder (`text_encoder/`, `tokenizer/`), with
which the empty prompt is encoded once, or stored embeddings (`prompt_embeds.safetensors`). Optional files are
`purifier.json`, the prior's own settings, and `scheduler/scheduler_config.json`, its noise schedule.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import PurifyConfig
from ..inputs import MOST_FRAMES, check_count

_PACKAGED = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
_DECODERS = {"taesd": "madebyollin/taesd"}
_LARGEST_JSON = 1 << 20  # bytes; a configuration is a few kilobytes


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
    max_frames: int
    scheduler_config: dict[str, Any] | None = None


def find_prior(name: str | os.PathLike[str]) -> Path:
    """The folder of a prior. name: a packaged prior, a folder, or a Hugging Face repository, which is downloaded.

    Raises FileNotFoundError if there is no such model or no network, ValueError for a folder that is not a prior.
    """
    folder = _find(name)
    for part in ("unet", "vae"):
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"{folder} is not a text-to-video prior: it has no {part}/config.json")
    return folder


def read_settings(folder: Path) -> Settings:
    """The settings in a prior's folder; by default those of the full-size models. ValueError if they are invalid."""
    given = _read_json(folder / "purifier.json") or {"flow": "raft"}
    config = given.get("config", {})
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'purifier.json'}: config must be an object, got {config!r}")
    unknown = set(config) - {field.name for field in fields(PurifyConfig)}
    if unknown:
        raise ValueError(f"{folder / 'purifier.json'} has unknown settings: {', '.join(sorted(unknown))}")
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json")
    max_frames = given.get("max_frames", 32)
    try:
        check_count("max_frames", max_frames, least=2, most=MOST_FRAMES)
        return Settings(PurifyConfig(**config), given.get("flow"), max_frames, scheduler_config)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / 'purifier.json'}: {error}") from error


def load_models(folder: Path, *, dtype: torch.dtype) -> Models:
    """Load the modules of a prior's folder. ValueError if its files do not make whole modules."""
    from diffusers import AutoencoderKL, UNet3DConditionModel

    prompt_embeds, negative_prompt_embeds = _embeddings(folder)
    unet = _load_module(UNet3DConditionModel, folder / "unet", dtype)
    vae = _load_module(AutoencoderKL, folder / "vae", dtype)
    return Models(unet, vae, prompt_embeds, negative_prompt_embeds)


def load_decoder(name: str | os.PathLike[str], *, dtype: torch.dtype) -> nn.Module:
    """A diffusers AutoencoderTiny: "taesd" (Stable Diffusion's latents), a folder, or a Hugging Face repository.

    FileNotFoundError if it cannot be found or downloaded, ValueError if its files do not make a whole module.
    """
    from diffusers import AutoencoderTiny

    if os.path.isdir(name):
        return _load_module(AutoencoderTiny, Path(name), dtype)
    repository = _DECODERS.get(str(name), str(name))
    try:
        folder = _download(repository, parts=("",))
    except Exception as error:  # the hub's client raises many types, also those of its HTTP library
        accepted = "accepted: 'taesd', a folder, or the name of a Hugging Face repository"
        raise FileNotFoundError(f"no decoder {str(name)!r} ({_first_line(error)}); {accepted}") from error
    return _load_module(AutoencoderTiny, folder, dtype)


def _load_module(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """An instance of `kind`, a class of diffusers models, from a folder. ValueError if its files do not make one."""
    try:
        # Safetensors, or a .bin that torch reads with weights_only.
        module: nn.Module
        module, report = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            low_cpu_mem_usage=find_spec("accelerate") is not None,
            output_loading_info=True,
        )
    except Exception as error:  # a bad configuration may raise anything in a constructor
        raise ValueError(f"{folder} cannot be read: {_first_line(error)}") from error
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{folder} lacks {len(wrong)} of its weights, the first being {wrong[0]}")
    return module


def save_prior(models: Models, settings: Settings, folder: str | os.PathLike[str]) -> None:
    """Write a folder that `find_prior` accepts and that needs neither network nor text encoder to be loaded.

    The folder is renamed into place when it is complete. FileExistsError if it exists already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part, module in (("unet", models.unet), ("vae", models.vae)):
            module.save_pretrained(unfinished / part)
            config = _read_json(unfinished / part / "config.json")
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


def _find(name: str | os.PathLike[str]) -> Path:
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"model must be a name or a path, got {name!r}")
    if name in _PACKAGED:
        return _PACKAGED[name]
    if str(name) and os.path.isdir(name):
        return Path(name)
    accepted = f"accepted: {', '.join(map(repr, _PACKAGED))}, a folder, or the name of a Hugging Face repository"
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no model {str(name)!r}; {accepted}")
    try:
        return _download(str(name))
    except Exception as error:  # the hub's client raises many types, also those of its HTTP library
        raise FileNotFoundError(
            f"no folder {str(name)!r}, and the Hugging Face repository of that name is not available "
            f"({_first_line(error)}); {accepted}"
        ) from error


def _download(name: str, parts: tuple[str, ...] = ("unet/", "vae/", "text_encoder/")) -> Path:
    """Download a repository of the hub, unless it is in the local cache; returns its folder there.

    parts: prefixes of the weights to download. Repositories store them in several formats: safetensors are preferred.
    """
    import huggingface_hub

    try:
        listed = huggingface_hub.HfApi().model_info(name, timeout=10).siblings or []
    except Exception as error:  # no network or no such repository: use an earlier download, if there is one
        try:
            return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        except Exception:
            raise error from None
    files = [file.rfilename for file in listed if ".fp16." not in file.rfilename]
    wanted = fnmatch.filter(files, "*.json") + fnmatch.filter(files, "tokenizer/*") + ["prompt_embeds.safetensors"]
    for part in parts:
        wanted += fnmatch.filter(files, f"{part}*.safetensors") or fnmatch.filter(files, f"{part}*.bin")
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))


def _embeddings(folder: Path) -> tuple[Tensor, Tensor | None]:
    stored = folder / "prompt_embeds.safetensors"
    if stored.is_file():
        try:
            tensors = load_file(stored)
            return tensors["prompt_embeds"], tensors.get("negative_prompt_embeds")
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{stored} cannot be read: {_first_line(error)}") from error
    if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
        raise ValueError(f"{folder} has neither prompt_embeds.safetensors nor text_encoder/ and tokenizer/")
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError(
            "encoding the empty prompt of this model needs transformers: pip install transformers accelerate"
        ) from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        with torch.no_grad():
            return encoder(tokens.input_ids)[0], None
    except Exception as error:
        raise ValueError(f"the text encoder in {folder} cannot be used: {_first_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file."""
    if not path.is_file():
        return None
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {_LARGEST_JSON}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
