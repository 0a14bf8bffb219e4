"""diffusers modules from folders that anybody may have written: looked at before anything is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import brief
from ..inputs import FLOATS, MOST_FRAMES
from .hub import MissingWeights, pick_part

_LARGEST_JSON = 1 << 20  # bytes; a configuration is a few kilobytes
_LARGEST_INDEX = 1 << 26  # bytes of an index of shards
# Bounds of a configuration, several times what the largest published models have.
_MOST_NUMBER = 1 << 18  # a width, a size, a vocabulary
_MOST_ITEMS = 64  # of a list
_MOST_DEPTH = 4  # lists in lists
_MOST_LAYERS = 512  # blocks times the layers of each
# Fields that say how often a part is repeated.
_REPEATS = (
    "layers_per_block",
    "num_encoder_blocks",
    "num_decoder_blocks",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "temporal_transformer_layers_per_block",
    "reverse_temporal_transformer_layers_per_block",
    "transformer_layers_per_mid_block",
    "temporal_transformer_layers_per_mid_block",
    "mid_block_layers",
    "num_hidden_layers",
)
# Fields with bounds of their own: least and most.
_BOUNDS = {
    "norm_eps": (1e-12, 1.0),
    "mid_block_scale_factor": (1e-3, 1e3),
    "downsample_padding": (0, 1),
    "motion_max_seq_length": (1, MOST_FRAMES),
}
_FLOAT_NAMES = frozenset(("F16", "BF16", "F32", "F64"))  # as safetensors calls FLOATS


class RefusedFolder(ValueError):
    """A folder of which no module is made; the message is a whole sentence."""


class Stored(NamedTuple):
    """A tensor in a file: its shape, and whether its values are floats."""

    shape: tuple[int, ...]
    floats: bool


def load_module(
    kinds: tuple[Any, ...], folder: Path, dtype: torch.dtype, *, variant: str | None = None, needed: bool = True
) -> nn.Module:
    """An instance of one of `kinds`, classes of diffusers models, from a folder. ValueError if it does not hold one.

    variant: of the weights; where it is not `needed`, plain ones serve instead.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise RefusedFolder(f"{folder} cannot be read: it has no config.json")
    kind = _kind(kinds, config, folder)
    try:
        files, chosen = pick_part(file_names(folder), variant, where=str(folder), needed=needed)
        stored = _stored([folder / file for file in files])
        _check_index(folder, files, chosen)
        check_layers(config, len(stored), folder)
        with torch.device("meta"):
            skeleton = kind.from_config(config)
        # Released weights of attention have older names.
        skeleton._fix_state_dict_keys_on_load(stored)
        _compare(skeleton, stored, folder)
        module: nn.Module
        module, report = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=chosen,
            use_safetensors=files[0].endswith(".safetensors"),  # else a .bin, which torch reads with weights_only
            low_cpu_mem_usage=find_spec("accelerate") is not None,
            output_loading_info=True,
        )
    except (RefusedFolder, MissingWeights):
        raise
    except Exception as error:  # a bad configuration may raise anything in a constructor
        raise RefusedFolder(f"{folder} cannot be read: {first_line(error)}") from error
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise RefusedFolder(f"{folder} lacks {len(wrong)} of its weights, the first being {wrong[0]}")
    _check_finite(module, folder)
    return module


def file_names(folder: Path) -> list[str]:
    """The names of a folder's files: no folder, no pipe, no broken link."""
    return [path.name for path in folder.iterdir() if path.is_file()]


def _check_numbers(config: dict[str, Any], folder: Path) -> None:
    """ValueError for numbers, lists and nesting beyond what any model has. Nothing is made of the configuration."""
    for name, value in config.items():
        least, most = _BOUNDS.get(name, (-_MOST_NUMBER, _MOST_NUMBER))
        for leaf in _leaves(value):
            if isinstance(leaf, int | float) and not least <= leaf <= most:  # NaN fails both
                raise RefusedFolder(f"{folder}/config.json: {name} is {brief(value)}; accepted: {least:g} to {most:g}")
            if leaf is _TOO_MUCH:
                bounds = f"lists of at most {_MOST_ITEMS}, nested at most {_MOST_DEPTH} deep"
                raise RefusedFolder(f"{folder}/config.json: {name} is {brief(value)}; accepted: {bounds}")


_TOO_MUCH = object()  # the leaf that stands for a list too long or too deep


def _leaves(value: Any, depth: int = 0) -> Iterator[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if items is None:
        yield value
    elif len(items) > _MOST_ITEMS or depth >= _MOST_DEPTH:
        yield _TOO_MUCH
    else:
        for item in items:
            yield from _leaves(item, depth + 1)


def check_layers(config: dict[str, Any], tensors: int, folder: Path) -> None:
    """ValueError for such numbers, and for more layers than `tensors`, which the folder's files hold, could fill."""
    _check_numbers(config, folder)
    lengths = [len(value) for value in config.values() if isinstance(value, list)]
    repeats = ([leaf for leaf in _leaves(config.get(name)) if isinstance(leaf, int)] for name in _REPEATS)
    layers = max(lengths, default=1) * prod(max(1, *counts) for counts in repeats if counts)
    if layers > min(_MOST_LAYERS, tensors):
        raise RefusedFolder(
            f"{folder}/config.json describes {brief(layers)} layers; accepted: at most {_MOST_LAYERS}, and its files "
            f"have {tensors} tensors"
        )


def _kind(kinds: tuple[Any, ...], config: dict[str, Any], folder: Path) -> Any:
    """The class that a configuration names; the first if it names none. ValueError unless it is one of `kinds`."""
    named = config.get("_class_name", kinds[0].__name__)
    accepted = {kind.__name__: kind for kind in kinds}
    if not isinstance(named, str) or named not in accepted:
        raise RefusedFolder(f"{folder} has a {brief(named)}; accepted: {' or '.join(accepted)}")
    if config.get("quantization_config") is not None:
        raise RefusedFolder(f"{folder} has quantized weights; accepted: plain ones, of floats of 16 bits or more")
    return accepted[named]


def stored_sizes(folder: Path, files: list[str]) -> list[int]:
    """How many numbers each tensor in some files of a folder has."""
    return [prod(tensor.shape) for tensor in _stored([folder / file for file in files]).values()]


def _stored(files: list[Path]) -> dict[str, Stored]:
    """The tensors in files of weights, of which no value is read."""
    from safetensors import safe_open

    stored: dict[str, Stored] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
                stored |= {
                    name: Stored(tuple(part.get_shape()), part.get_dtype() in _FLOAT_NAMES)
                    for name, part in slices.items()
                }
        else:
            try:
                content = torch.load(file, map_location="meta", weights_only=True)
            except Exception as error:  # torch's own message tells how to run what is in the file
                raise RefusedFolder(f"{file} cannot be read: it is no file of tensors alone") from error
            tensors = content.items() if isinstance(content, dict) else ()
            stored |= {n: Stored(tuple(t.shape), t.dtype in FLOATS) for n, t in tensors if isinstance(t, Tensor)}
    return stored


def _check_index(folder: Path, files: list[str], variant: str | None) -> None:
    """ValueError unless an index of shards, which diffusers follows, names the files that are there."""
    form = files[0].rpartition(".")[2]
    for ending in ("index.json",) if variant is None else (f"index.{variant}.json", f"{variant}.index.json"):
        path = folder / f"diffusion_pytorch_model.{form}.{ending}"
        index = read_json(path, _LARGEST_INDEX)
        if index is None:
            continue
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or sorted({str(shard) for shard in shards.values()}) != files:
            raise RefusedFolder(f"{path} does not name the files of weights that are there: {brief(files)}")


def _compare(skeleton: nn.Module, stored: dict[str, Stored], folder: Path) -> None:
    """ValueError unless every tensor of a module's state is stored in its own shape, as floats."""
    state = skeleton.state_dict()
    missing = [name for name in state if name not in stored]
    if missing:
        held = sum(prod(tensor.shape) for tensor in stored.values())
        raise RefusedFolder(
            f"{folder} lacks {len(missing)} of its weights, the first being {missing[0]}: its config.json describes "
            f"{sum(tensor.numel() for tensor in state.values())} numbers, its files hold {held}"
        )
    for name, tensor in state.items():
        if stored[name].shape != tuple(tensor.shape):
            seen, wanted = stored[name].shape, tuple(tensor.shape)
            raise RefusedFolder(f"{folder}: {name} has shape {seen} in the file, and {wanted} by config.json")
        if not stored[name].floats:
            raise RefusedFolder(f"{folder}: {name} holds no floats of 16 bits or more")


def _check_finite(module: nn.Module, folder: Path) -> None:
    """ValueError that names the first tensor of a module with NaN or an infinity among its values.

    Least and largest value are found in one pass; NaN is both.
    """
    for name, tensor in module.state_dict().items():
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise RefusedFolder(f"{folder}: {name} has values that are not finite in {tensor.dtype}")


def read_json(path: Path, largest: int = _LARGEST_JSON) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file."""
    if not path.is_file():
        return None
    if path.stat().st_size > largest:
        raise RefusedFolder(f"{path} has {path.stat().st_size} bytes; a configuration has at most {largest}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RefusedFolder(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise RefusedFolder(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def first_line(error: BaseException) -> str:
    """An error in one line: the first of its message, and its type where that alone would say nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {lines[0]}"
