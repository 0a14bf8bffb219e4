"""The register of attacks: `@register_attack` makes an attack known to evaluations and to the command line by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypeVar, overload

from torch import Tensor

from .base import Shared

AttackFunction = Callable[..., Tensor]
_F = TypeVar("_F", bound=AttackFunction)


class Attack(NamedTuple):
    """A registered attack: its function, and the first line of its docstring."""

    run: AttackFunction
    help: str


class AttackSettings(NamedTuple):
    """Names of the settings that an attack accepts, and of those without a default; eps, generator and progress aside,
    which an evaluation sets itself."""

    known: frozenset[str]
    required: frozenset[str]


ATTACKS: dict[str, Attack] = {}  # by name, in the order of registration

_POSITIONAL = ["model", "clips", "labels"]
_ACCEPTED = "accepted: (model, clips, labels, *, eps, generator, ...)"


@overload
def register_attack(attack: _F, *, name: str | None = None) -> _F: ...


@overload
def register_attack(attack: None = None, *, name: str | None = None) -> Callable[[_F], _F]: ...


def register_attack(attack: _F | None = None, *, name: str | None = None) -> _F | Callable[[_F], _F]:
    """Decorator that adds an attack to ATTACKS, and returns it unchanged.

        @register_attack                      # or @register_attack(name="another_name")
        def my_attack(model, clips, labels, *, eps, generator=None, steps=10, **shared: Unpack[Shared]):
            \"\"\"One line of help, which ends with a period.\"\"\"

    name: key in ATTACKS, a Python identifier; by default the function's own name.

    An attack takes (model, clips, labels) by position and all else by keyword, `eps` and `generator` at least; those
    that it takes by ** are the keywords of `attacks.base.Shared`. It returns clips of the shape of the given ones.

    Raises TypeError for what is no function or has another signature, ValueError for a name that is taken or no
    identifier, and for a function without a docstring.
    """
    if attack is None:
        return lambda function: register_attack(function, name=name)
    if not callable(attack):
        raise TypeError(f"register_attack takes a function, got {type(attack).__name__}; a name is given as name=")
    key = getattr(attack, "__name__", "") if name is None else name
    if not isinstance(key, str) or not key.isidentifier():
        raise ValueError(f"the name of an attack must be an identifier such as my_attack, got {key!r}")
    if key in ATTACKS:
        raise ValueError(f"an attack named {key} is registered already; choose another with register_attack(name=...)")
    _check_signature(key, attack)
    help_line = (inspect.getdoc(attack) or "").partition("\n")[0]
    if not help_line:
        raise ValueError(f"attack {key} has no docstring; its first line is the help that the command line prints")
    ATTACKS[key] = Attack(attack, help_line)
    return attack


def attack_settings(name: str) -> AttackSettings:
    """The settings of a registered attack. ValueError for a name that is not registered."""
    if name not in ATTACKS:
        raise ValueError(f"there is no attack {name!r}; accepted: {', '.join(ATTACKS)}")
    parameters = inspect.signature(ATTACKS[name].run).parameters.values()
    own = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    known = {p.name for p in own}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known |= set(Shared.__annotations__)
    required = {p.name for p in own if p.default is p.empty}
    set_by_evaluation = {"eps", "generator", "progress"}
    return AttackSettings(frozenset(known - set_by_evaluation), frozenset(required - set_by_evaluation))


def _check_signature(name: str, attack: AttackFunction) -> None:
    signature = inspect.signature(attack)
    parameters = signature.parameters.values()
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_keyword = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    takes_shared = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if by_position != _POSITIONAL or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        problem = "it must take model, clips and labels by position, and all else by keyword"
    elif "eps" not in by_keyword:
        problem = "it has no keyword eps"
    elif "generator" not in by_keyword and not takes_shared:
        problem = "it has no keyword generator"
    else:
        return
    raise TypeError(f"attack {name} has the signature {signature}: {problem}; {_ACCEPTED}")
