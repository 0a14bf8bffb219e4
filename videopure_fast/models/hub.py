"""Repositories of the Hugging Face hub: what is downloaded of them, and where it lies."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..config import brief

# The names that diffusers and transformers give to weights: whole or in shards, and of a variant such as "fp16".
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.(safetensors|bin)"
)
_LISTING_SECONDS = 10  # to wait for the hub


class HubOptions(NamedTuple):
    """Which files of a repository to take, as in diffusers' `from_pretrained`.

    revision: a branch, tag or commit. token: for private repositories; True is the one that is stored on this machine.
    cache_dir: the folder of downloads. local_files_only: take earlier downloads alone. variant: of the weights, such as
    "fp16" for the files named *.fp16.*.
    """

    revision: str = "main"
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    variant: str | None = None


class MissingWeights(ValueError):
    """A folder or repository without the weights that are asked for; the message says which there are."""


def check_options(options: HubOptions) -> None:
    """TypeError or ValueError for options of other types, and for names that no revision and no variant can have."""
    if not isinstance(options.revision, str) or not re.fullmatch(r"(?!.*\.\.)[\w./+-]{1,250}", options.revision):
        raise ValueError(f"revision must be the name of a branch, tag or commit, got {brief(options.revision)}")
    if options.variant is not None and not re.fullmatch(r"\w{1,50}", str(options.variant)):
        raise ValueError(f"variant must be a word such as 'fp16', or None, got {brief(options.variant)}")
    for name, kinds in (
        ("token", (str, bool)),
        ("cache_dir", (str, os.PathLike)),
        ("local_files_only", (bool,)),
        ("variant", (str,)),
    ):
        value = getattr(options, name)
        if not isinstance(value, kinds) and not (value is None and name != "local_files_only"):
            raise TypeError(f"{name} must be of type {kinds[0].__name__}, got {type(value).__name__}")


def pick_weights(names: Iterable[str], variant: str | None, *, where: str) -> list[str]:
    """The files of one set of weights among a folder's files: of the variant, and safetensors if there are both.

    where: the folder's name, for the message of MissingWeights.
    """
    found = defaultdict(list)
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            found[match[1] or match[2], match[3]].append(name)
    for form in ("safetensors", "bin"):
        if (variant, form) in found:
            return sorted(found[variant, form])
    if variant is None and not found:
        raise MissingWeights(f"{where} has no weights; accepted: diffusion_pytorch_model.safetensors, or a .bin")
    others = sorted({"none (variant=None)" if other is None else repr(other) for other, _ in found})
    raise MissingWeights(f"{where} has no weights of variant {variant!r}; there are: {', '.join(others) or 'none'}")


def download(name: str, options: HubOptions, parts: tuple[str, ...]) -> Path:
    """Download a repository, unless it is in the local cache; returns its folder there.

    parts: folders with weights, the first of which must have some: "unet/", or "" for the repository's own. Without
    network, an earlier download of the revision serves. Raises whatever the hub's client raises, and MissingWeights.
    """
    import huggingface_hub

    place = {"revision": options.revision, "cache_dir": options.cache_dir}
    reason: Exception = FileNotFoundError(f"revision {options.revision!r} is not in the cache, and local_files_only")
    if not options.local_files_only:
        try:
            listed = huggingface_hub.HfApi().model_info(
                name, revision=options.revision, token=options.token, timeout=_LISTING_SECONDS
            )
        except Exception as error:  # no network or no such repository, of many types
            reason = error
        else:
            files = _wanted([file.rfilename for file in listed.siblings or []], name, options.variant, parts)
            return Path(huggingface_hub.snapshot_download(name, token=options.token, allow_patterns=files, **place))
    cached = huggingface_hub.try_to_load_from_cache(name, f"{parts[0]}config.json", **place)
    if not isinstance(cached, str):
        raise reason
    return Path(cached).parents[parts[0].count("/")]


def _wanted(files: list[str], name: str, variant: str | None, parts: tuple[str, ...]) -> list[str]:
    """The files to download of those in a repository: configurations, tokenizer, and one set of weights a part."""
    wanted = [*fnmatch.filter(files, "*.json"), *fnmatch.filter(files, "tokenizer/*"), "prompt_embeds.safetensors"]
    for part in parts:
        inside = [file.removeprefix(part) for file in files if file.startswith(part)]
        try:
            picked, _ = pick_part(inside, variant, where=f"{name}/{part}".rstrip("/"), needed=part == parts[0])
        except MissingWeights:
            if part == parts[0]:
                raise
            continue  # a part that the repository does without, such as its text encoder
        wanted += [part + file for file in picked]
    return wanted


def pick_part(names: Iterable[str], variant: str | None, *, where: str, needed: bool) -> tuple[list[str], str | None]:
    """`pick_weights`, and their variant; where it is not needed, the plain weights serve a part that lacks it."""
    names = list(names)
    try:
        return pick_weights(names, variant, where=where), variant
    except MissingWeights:
        if needed or variant is None:
            raise
        return pick_weights(names, None, where=where), None


def commit_hash(folder: Path) -> str | None:
    """The commit of a repository's folder in the hub's cache, 40 hex digits; None for any other folder."""
    known = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if known else None
