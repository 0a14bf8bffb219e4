"""The register of attacks."""

import inspect

import pytest
import torch
from attack_cases import case, seeded

from videopure_fast import attacks
from videopure_fast.attacks import ATTACKS, attack_settings, pgd, register_attack
from videopure_fast.attacks.base import Shared
from videopure_fast.evaluation.plan import Threat


@pytest.fixture(autouse=True)
def registered():
    """Forget after each test what it registered."""
    before = dict(ATTACKS)
    yield
    ATTACKS.clear()
    ATTACKS.update(before)


def darken(model, clips, labels, *, eps, generator=None):
    """Every pixel lower by eps.

    More lines.
    """
    return (clips - eps).clamp(min=0)


def test_the_register_helps():
    for name, attack in ATTACKS.items():
        assert attack.run is getattr(attacks, name) and 20 < len(attack.help) < 120 and attack.help.endswith(".")


def test_the_order_is_fixed():
    """The command line lists attacks in this order."""
    assert list(ATTACKS) == [
        *("fgsm", "pgd", "mim", "apgd", "temporal_translation", "square", "flicker", "one_frame", "patch"),
    ]


def test_an_attack_of_ones_own():
    assert register_attack(darken) is darken
    assert list(ATTACKS)[-1] == "darken" and ATTACKS["darken"] == (darken, "Every pixel lower by eps.")
    assert attack_settings("darken") == (frozenset(), frozenset())
    assert Threat("gray-box", "darken").attack == "darken"
    with pytest.raises(ValueError, match="steps"):
        Threat("gray-box", "darken", {"steps": 3})


def test_an_attack_by_another_name():
    @register_attack(name="careful_pgd")
    def wrapper(model, clips, labels, *, eps, steps=3, factor, **shared):
        """PGD with small steps."""
        return pgd(model, clips, labels, eps=eps, step_size=eps / factor, steps=steps, **shared)

    assert "wrapper" not in ATTACKS and ATTACKS["careful_pgd"].help == "PGD with small steps."
    known, required = attack_settings("careful_pgd")
    assert known == {"steps", "factor", "norm", "loss", "restarts", "eot"} and required == {"factor"}
    model, video, labels = case(2)
    attacked = ATTACKS["careful_pgd"].run(model, video, labels, eps=0.1, factor=5, generator=seeded())
    plain = pgd(model, video, labels, eps=0.1, step_size=0.02, steps=3, generator=seeded())
    assert torch.equal(attacked, plain)


@pytest.mark.parametrize("name", ATTACKS)
def test_settings_are_those_that_an_attack_takes(name):
    known, required = attack_settings(name)
    parameters = inspect.signature(ATTACKS[name].run).parameters
    assert required <= known <= set(parameters) | set(Shared.__annotations__)
    assert not known & {"eps", "generator", "progress", "model", "clips", "labels", "shared"}
    assert required == {"pgd": {"step_size", "steps"}, "patch": {"size"}}.get(name, set())
    assert ("restarts" in known) == (name not in ("square", "flicker")) and "loss" in known and "eot" in known


def test_names_that_are_not_registered():
    with pytest.raises(ValueError, match="there is no attack 'magic'; accepted: fgsm, pgd, mim"):
        attack_settings("magic")


def test_a_name_is_given_once():
    def fgsm(model, clips, labels, *, eps, generator=None):
        """Another attack."""

    with pytest.raises(ValueError, match="an attack named fgsm is registered already"):
        register_attack(fgsm)
    register_attack(fgsm, name="other_fgsm")
    with pytest.raises(ValueError, match="an attack named other_fgsm is registered already"):
        register_attack(fgsm, name="other_fgsm")
    assert ATTACKS["fgsm"].run is attacks.fgsm


@pytest.mark.parametrize("name", ["", "my attack", "3d", "my-attack", 3])
def test_names_are_identifiers(name):
    with pytest.raises(ValueError, match=f"an identifier such as my_attack, got {name!r}"):
        register_attack(darken, name=name)


def test_other_things_than_functions():
    with pytest.raises(TypeError, match="takes a function, got str; a name is given as name="):
        register_attack("my_attack")
    with pytest.raises(ValueError, match="has no docstring"):
        register_attack(lambda model, clips, labels, *, eps, generator: clips, name="silent")
    assert "silent" not in ATTACKS


@pytest.mark.parametrize(
    ("attack", "problem"),
    [
        (lambda clips, labels, *, eps, generator: clips, "model, clips and labels by position"),
        (lambda model, labels, clips, *, eps, generator: clips, "model, clips and labels by position"),
        (lambda model, clips, labels, eps, generator: clips, "all else by keyword"),
        (lambda model, clips, labels, *more, eps, generator: clips, "all else by keyword"),
        (lambda model, clips, labels, *, generator: clips, "no keyword eps"),
        (lambda model, clips, labels, **options: clips, "no keyword eps"),
        (lambda model, clips, labels, *, eps, steps: clips, "no keyword generator"),
    ],
)
def test_other_signatures(attack, problem):
    attack.__doc__ = "One line."
    with pytest.raises(TypeError, match=rf"attack mine has the signature \(.*{problem}.*; accepted: \(model, clips"):
        register_attack(attack, name="mine")
    assert "mine" not in ATTACKS
