"""Defenses by name. `@register_defense` adds one from any module, inside the package or outside.

A defense of your own needs one file:

    from videopure_fast.defense import filter_defense, register_defense

    @register_defense("mean of all frames")
    def mean_of_all_frames(purifier):
        return filter_defense(lambda clips: clips.mean(2, keepdim=True).expand_as(clips))

`evaluation.benchmark(..., defenses=["none", "mean of all frames"])` then compares it, once that file is imported. On
the command line, `--defense my_module:mean_of_all_frames` imports it by itself.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..attacks import bpda
from ..inputs import check_count, check_flag
from ..purifier import Purifier
from .classifier import DefendedClassifier
from .filters import FILTERS, WITHOUT_GRADIENT, reconstruct

DefenseGradient = Literal["bpda", "exact"]
LogitsFn = Callable[[Tensor], Tensor]  # clips (B, 3, F, H, W) -> logits (B, K) or (B, V, K)


@dataclass(frozen=True)
class Defense:
    """A way to treat clips before they are classified.

    Attributes:
        votes: clips (B, 3, F, H, W) in [0, 1] and a CPU generator -> votes (B, V, 3, F, H, W), each to be classified.
        logits: classifier, "bpda" or "exact", and a CPU generator -> a differentiable function from clips to logits
            (B, K) or (B, V, K), which an adaptive attack queries; None where the defense has no such gradient.
        randomized: equal clips may get unequal votes, so that attacks should average over draws (EOT).
        purifier: the purifier of a purification, whose exact gradient can be checked; None for other defenses.
    """

    votes: Callable[[Tensor, torch.Generator], Tensor]
    logits: Callable[[nn.Module, DefenseGradient, torch.Generator], LogitsFn | None]
    randomized: bool = False
    purifier: Purifier | None = None


class _Registered(NamedTuple):
    make: Callable[[Purifier], Defense]
    diffuses: bool


_REGISTRY: dict[str, _Registered] = {}
_Make = TypeVar("_Make", bound=Callable[[Purifier], Defense])


def register_defense(name: str, *, diffuses: bool = False) -> Callable[[_Make], _Make]:
    """Decorator: make a function from a Purifier to a Defense, or a subclass of Defense that takes one, known by name.

    diffuses: its result depends on the purifier's `inversion_steps`, so that it is also offered at other depths, as
        "name, T=2".

    ValueError for a name that is taken by another function, or that cannot be told from "all", "module:function" or
    "name, T=2".
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a defense must be a str, got {type(name).__name__}")
    if not name or name == "all" or ":" in name or _split_depth(name)[1] is not None:
        raise ValueError(f"{name!r} cannot name a defense; accepted: not empty, 'all', with ':', or ending in ', T=2'")

    def register(make: _Make) -> _Make:
        if not callable(make):
            raise TypeError(f"a defense must be a function or a class, got {type(make).__name__}")
        try:
            inspect.signature(make).bind(None)
        except TypeError:
            seen = f"{getattr(make, '__name__', make)}{inspect.signature(make)}"
            raise TypeError(f"a defense must take a purifier alone, got {seen}") from None
        check_flag("diffuses", diffuses)
        known = _REGISTRY.get(name)
        if known is not None and _identity(known.make) != _identity(make):  # a notebook's cell may run again
            raise ValueError(f"the name {name!r} is taken by the defense {' '.join(_identity(known.make))}")
        _REGISTRY[name] = _Registered(make, diffuses)
        return make

    return register


def defense_names(depths: Sequence[int] = ()) -> tuple[str, ...]:
    """The names of all registered defenses, then of those that diffuse at each of the other depths."""
    deep = (f"{name}, T={depth}" for depth in depths for name, found in _REGISTRY.items() if found.diffuses)
    return (*_REGISTRY, *deep)


def find_defense(name: str) -> Callable[[Purifier], Defense]:
    """The function that makes a defense from a purifier; ValueError for a name that is not known.

    name: a registered name; one with a depth, as "ddim, T=2"; or "module:function", which is imported, so that its
        code runs.
    """
    if name in _REGISTRY:
        return _REGISTRY[name].make
    if ":" in name:
        return _import_defense(name)
    base, depth = _split_depth(name)
    if depth is not None and base in _REGISTRY and _REGISTRY[base].diffuses:
        check_count("the depth T", depth, least=0, most=49)
        return partial(_at_depth, _REGISTRY[base].make, depth)
    raise ValueError(f"unknown defense {name!r}; accepted: {', '.join(_REGISTRY)}, or module:function")


def build_defenses(
    purifier: Purifier, names: Sequence[str] | None = None, *, depths: Sequence[int] = ()
) -> dict[str, Defense]:
    """Defenses by name. names: those to make, as for `find_defense`; None: all of `defense_names(depths)`.

    TypeError where a registered function returns anything but a Defense.
    """
    if not isinstance(purifier, Purifier):
        raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    makers = {name: find_defense(name) for name in (defense_names(depths) if names is None else names)}
    found = {name: make(purifier) for name, make in makers.items()}
    for name, defense in found.items():
        if not isinstance(defense, Defense):
            raise TypeError(f"the defense {name!r} is a {type(defense).__name__}; accepted: a defense.Defense")
    return found


def filter_defense(run: Callable[[Tensor], Tensor], *, differentiable: bool = True) -> Defense:
    """A defense with one vote: run(clips), of the clips' shape, deterministic.

    differentiable: False where gradients do not pass through `run`; "exact" attacks then have no access.
    """

    def logits(classifier: nn.Module, gradient: DefenseGradient, _: torch.Generator) -> LogitsFn | None:
        if gradient == "bpda":
            return bpda(run, classifier)
        return (lambda clips: classifier(run(clips))) if differentiable else None

    return Defense(lambda clips, _: run(clips)[:, None], logits)


def purification_defense(purifier: Purifier, *, all_votes: bool = True) -> Defense:
    """A purifier as a defense. all_votes: classify every vote; False: the last one alone."""

    def votes(clips: Tensor, generator: torch.Generator) -> Tensor:
        purified = purifier(clips, return_votes=all_votes, generator=generator)
        return purified if all_votes else purified[:, None]

    def logits(classifier: nn.Module, gradient: DefenseGradient, generator: torch.Generator) -> LogitsFn:
        defended = DefendedClassifier(classifier, purifier, gradient=gradient)
        vote_logits = partial(defended.vote_logits, generator=generator)
        return vote_logits if all_votes else (lambda clips: vote_logits(clips)[:, -1:])

    return Defense(votes, logits, purifier.properties["randomized"], purifier)


def _identity(make: Callable[..., Any]) -> tuple[str, str]:
    """The module and the name of a function or class."""
    return getattr(make, "__module__", ""), getattr(make, "__qualname__", repr(make))


def _split_depth(name: str) -> tuple[str, int | None]:
    """ "ddim, T=2" -> ("ddim", 2); other names -> (name, None)."""
    found = re.fullmatch(r"(.+), T=([0-9]{1,9})", name)
    return (name, None) if found is None else (found[1], int(found[2]))


def _at_depth(make: Callable[[Purifier], Defense], depth: int, purifier: Purifier) -> Defense:
    return make(purifier.with_config(inversion_steps=depth))


def _import_defense(name: str) -> Callable[[Purifier], Defense]:
    module, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the imported code may raise anything
        raise ValueError(f"defense {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(make):
        raise TypeError(f"defense {name!r} is a {type(make).__name__}; accepted: a function from Purifier to Defense")
    return make


# The packaged defenses, in the order of the tables


@register_defense("none")
def _none(_: Purifier) -> Defense:
    return filter_defense(lambda clips: clips)


def _filter(name: str, _: Purifier) -> Defense:
    return filter_defense(FILTERS[name], differentiable=name not in WITHOUT_GRADIENT)


def _purification(settings: dict[str, Any], all_votes: bool, purifier: Purifier) -> Defense:
    return purification_defense(purifier.with_config(**settings), all_votes=all_votes)


for _name in FILTERS:
    register_defense(_name)(partial(_filter, _name))


@register_defense("VAE round trip")
def _vae_round_trip(purifier: Purifier) -> Defense:
    return filter_defense(partial(reconstruct, purifier))


for _name in ("ddpm", "ddim", "ddim_inversion", "videopure"):
    register_defense(_name, diffuses=True)(partial(_purification, {"method": _name}, True))

_VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {  # settings beside the method, and whether all votes count
    "videopure without guidance": ({"update_scale": 0.0}, True),
    "videopure without voting": ({}, False),
    "videopure with feedback": ({"feedback": True}, True),
}
for _name, (_settings, _all_votes) in _VARIANTS.items():
    register_defense(_name, diffuses=True)(partial(_purification, {"method": "videopure", **_settings}, _all_votes))
