"""The state of models: whether it is what it was at the last look, and what their configuration makes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The first values of each weight are compared: SAMPLED_VALUES of all together, but of each LEAST_SAMPLED at least.
SAMPLED_VALUES, LEAST_SAMPLED = 2**15, 16
_ENTRIES = ("forward", "encode", "decode")  # the methods by which a module is entered
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VERSION, _DTYPE = attrgetter("_version"), attrgetter("dtype")


class Look(NamedTuple):
    """What a look at models found: a change, or on a device a flag, which is read back later, that is true for one."""

    changed: bool
    doubts: tuple[Tensor, ...] = ()


class StateWatch:
    """Sees whether models are as they were at the last look; each call of a purifier takes one.

    Seen are modules, their classes and those classes' forwards, all attributes and hooks, and of each weight object,
    address, version, dtype and, as versions do not count writes through `.data`, its first values. Not seen are such
    writes to other values alone, and what lies within an attribute: a processor's own state.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models
        self.forget()

    def forget(self) -> None:
        """Let the next look find a change."""
        self._modules: list[nn.Module] = []
        self._kinds: list[Any] = []  # their classes
        # Each module's attributes; by name, its weights; its children and hooks; of these dictionaries, the empty ones.
        self._attributes_of: list[dict[str, Any]] = []
        # What reads those that are not of every module, and the modules that have the same ones.
        self._own: list[tuple[Any, list[dict[str, Any]]]] = []
        self._weights_of: list[dict[str, Any]] = []
        self._parts_of: list[dict[Any, Any]] = []
        self._empty: list[dict[Any, Any]] = []
        self._state: list[list[Any]] = []
        self._addresses: list[list[Any]] = []
        self._samples: list[_Samples] = []

    def look(self, beside: Iterable[Tensor] = ()) -> Look:
        """Whether there is a change since the last look. beside: tensors to watch along with the weights.

        Thousands of modules and weights are read by iterators in C.
        """
        try:
            state = self._read_state()
            same = bool(self._modules) and _equal(state, self._state)
        except KeyError:  # an attribute is gone
            same = False
        if not same:
            self._list_modules()
            state = self._read_state()
        weights = chain.from_iterable(map(dict.values, self._weights_of))
        tensors = [*beside, *(weight for weight in weights if weight is not None)]
        # Moving to another device changes an address.
        addresses = [list(map(id, tensors)), _pointers(tensors), _versions(tensors), list(map(_DTYPE, tensors))]
        if same and addresses == self._addresses:
            differ = [samples.differ() for samples in self._samples]
            if not any(known is True for known in differ):
                return Look(False, tuple(doubt for doubt in differ if isinstance(doubt, Tensor)))
        self._state, self._addresses, self._samples = state, addresses, _sampled(tensors)
        return Look(True)

    def _list_modules(self) -> None:
        modules = [module for model in self._models for module in model.modules()]
        self._modules, self._kinds = modules, list(dict.fromkeys(map(type, modules)))
        self._attributes_of = [vars(module) for module in modules]
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for attributes in self._attributes_of:
            names = tuple(name for name in attributes if name == "training" or name not in _INTERNAL)
            alike.setdefault(names, []).append(attributes)
        self._own = [(itemgetter(*names), group) for names, group in alike.items()]
        weights = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
        parts = [getattr(module, name) for module in modules for name in ("_modules", *_HOOKS)]
        self._weights_of, self._parts_of = [one for one in weights if one], [one for one in parts if one]
        self._empty = [one for one in (*weights, *parts) if not one]

    def _read_state(self) -> list[list[Any]]:
        return [
            list(map(type, self._modules)),
            [getattr(kind, name, None) for kind in self._kinds for name in _ENTRIES],
            list(map(len, self._attributes_of)),
            *(list(map(own, group)) for own, group in self._own),
            list(chain.from_iterable(map(dict.values, self._parts_of))),
            [any(self._empty), *_hooks_of_every_module()],
        ]


def _hooks_of_every_module() -> list[Any]:
    """Without those of torch's own counters and profilers, which change no result."""
    hooks = [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.")]


def _equal(a: list[list[Any]], b: list[list[Any]]) -> bool:
    """Whether all objects are identical or equal; those that cannot be compared, such as arrays, are not."""
    try:
        return a == b
    except Exception:
        return False


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # tensors made in inference mode count none
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # sparse tensors have none
        return [tensor.data_ptr() if tensor.layout == torch.strided else 0 for tensor in tensors]


class _Samples:
    """Values of weights of one device and dtype, as bits, when this was made."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self._views = views
        self._then = torch.cat(list(views))
        self._now = torch.empty_like(self._then)

    def differ(self) -> bool | Tensor:
        """Whether the weights have other values now; on a device a flag there, so that nobody waits for it."""
        with torch.inference_mode():
            torch.cat(list(self._views), out=self._now)
            return not torch.equal(self._now, self._then) if self._now.is_cpu else (self._now != self._then).any()


@torch.inference_mode(False)
@torch.no_grad()
def _sampled(tensors: Sequence[Tensor]) -> list[_Samples]:
    readable = [t for t in tensors if _is_plain(t) and not t.is_meta and t.itemsize in _BITS]
    most = max(LEAST_SAMPLED, SAMPLED_VALUES // max(1, len(readable)))
    views: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in readable:
        bits = tensor.detach().view(_BITS[tensor.itemsize])
        # The first in memory, whatever the order of the axes; one alone where there are gaps.
        dense = sum((n - 1) * stride for n, stride in zip(bits.shape, bits.stride(), strict=True)) == bits.numel() - 1
        first = bits.as_strided((min(most if dense else 1, bits.numel()),), (1,))
        views.setdefault((first.device, first.dtype), []).append(first)
    return [_Samples(group) for group in views.values()]


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor of torch's own kind, not a quantized, sharded or sparse one."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized


def departure(model: Any) -> str | None:
    """How a diffusers model departs from what its configuration makes; None if it does not.

    Hooks, replaced forwards, processors of one's own, FreeU, tiling, quantized, wrapped, cast or added layers, and
    attributes that were set afterwards, all make it compute something else than an evaluation over its weights would.
    """
    try:
        settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
        kind: Any = type(model)
        made = _made(kind, json.dumps(settings, sort_keys=True, default=repr))
    except Exception as error:  # a constructor may raise anything
        return f"its configuration does not make it: {str(error) or type(error).__name__}"
    if _hooks_of_every_module():
        return "hooks are registered for every module"
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if other := sorted(modules.keys() ^ made.keys()):
        return f"{other[0]} is {'more' if other[0] in modules else 'less'} than its configuration makes"
    for name, module in modules.items():
        if reason := _departure(module, *made[name]):
            return f"{name or 'the model'} {reason}"
    dtypes = {tensor.dtype for tensor in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        return f"its weights are {' and '.join(sorted(map(str, dtypes)))}"
    return None


def _departure(module: nn.Module, kind: Any, attributes: dict[str, Any]) -> str | None:
    if type(module) is not kind:
        return f"is a {type(module).__module__}.{type(module).__name__}"
    for name in _ENTRIES:
        entry = getattr(kind, name, None)
        # Where it was defined: what wraps a method bears that method's name and module.
        home = getattr(entry, "__globals__", {}).get("__name__", "torch.")
        if not home.startswith(("torch.", "diffusers.", kind.__module__)):
            return f"is a {kind.__name__}, whose {name} was replaced"
    if any(getattr(module, name) for name in _HOOKS):
        return "has hooks"
    weights = (*module._parameters.values(), *module._buffers.values())
    if not all(weight is None or _is_plain(weight) for weight in weights):
        return "has weights that are not plain tensors"
    found = _attributes(module)
    for name in sorted(found.keys() | attributes.keys()):
        if not _alike(found.get(name), attributes.get(name)):
            return f"has {name} set to {found.get(name)!r:.80}"
    return None


@functools.lru_cache(maxsize=8)
def _made(kind: Any, config: str) -> dict[str, tuple[type, dict[str, Any]]]:
    """By name, the class and the attributes of each module that a configuration makes; nothing of its weights."""
    with torch.device("meta"):
        model = kind.from_config(json.loads(config))
    return {name: (type(module), _attributes(module)) for name, module in model.named_modules()}


_INTERNAL = frozenset(vars(nn.Module()))
# What changes no result of a model in eval mode, and what names the configuration itself.
_HARMLESS = frozenset("gradient_checkpointing _gradient_checkpointing_func _compiled_call_impl _internal_dict".split())
_COMPARED = (bool, int, float, str, torch.dtype, torch.Size, FunctionType, BuiltinFunctionType, type(None))
# diffusers' ways to compute one and the same attention.
_PROCESSORS = frozenset({"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor"})


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _INTERNAL and name not in _HARMLESS}


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):  # JSON has no tuples
        return len(a) == len(b) and all(map(_alike, a, b))
    if type(a) is not type(b):
        names = {type(a).__name__, type(b).__name__}
        return names <= _PROCESSORS and all(type(one).__module__.startswith("diffusers.") for one in (a, b))
    return a == b if isinstance(a, _COMPARED) else True
