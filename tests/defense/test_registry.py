"""Defenses by name: the packaged ones, and how another one joins them."""

from __future__ import annotations

import pytest
import torch
from conftest import build_purifier, clips
from torch import nn

from videopure_fast.defense import (
    Defense,
    build_defenses,
    defense_names,
    filter_defense,
    find_defense,
    purification_defense,
    register_defense,
    registry,
)

PACKAGED = (
    *("none", "mean of 3 frames", "mean of 5 frames", "median of 3 frames", "median of 5 frames", "JPEG 75"),
    *("H.264 crf 23", "temporal shuffling", "VAE round trip", "ddpm", "ddim", "ddim_inversion", "videopure"),
    *("videopure without guidance", "videopure without voting", "videopure with feedback"),
)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def brighter(purifier):
    return filter_defense(lambda x: x.sqrt())


def test_the_packaged_defenses():
    assert defense_names() == PACKAGED
    assert defense_names((2,)) == (*PACKAGED, *(f"{name}, T=2" for name in PACKAGED[-7:]))


def test_a_function_is_registered(purifier):
    assert register_defense("brighter")(brighter) is brighter
    assert defense_names()[-1] == "brighter" and "brighter, T=2" not in defense_names((2,))
    x = clips(2, 3, 4, 16, 16)
    (defense,) = build_defenses(purifier, ["brighter"]).values()
    assert torch.equal(defense.votes(x, torch.Generator()), x.sqrt()[:, None]) and not defense.randomized
    register_defense("brighter")(brighter)  # a notebook's cell may run twice


def test_a_class_is_registered(purifier):
    @register_defense("shallow", diffuses=True)
    class Shallow(Defense):
        def __init__(self, purifier):
            made = purification_defense(purifier.with_config(method="ddim"))
            super().__init__(made.votes, made.logits, made.randomized, made.purifier)

    found = build_defenses(purifier, ["shallow", "shallow, T=3"])
    assert [defense.purifier.config.inversion_steps for defense in found.values()] == [1, 3]
    assert all(isinstance(defense, Shallow) and defense.randomized for defense in found.values())


def test_a_defense_is_imported(purifier, tmp_path, monkeypatch):
    (tmp_path / "my_defenses.py").write_text(
        "from videopure_fast.defense import filter_defense, register_defense\n"
        "@register_defense('darker')\n"
        "def darker(purifier):\n"
        "    return filter_defense(lambda clips: clips.square())\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    x = clips(1, 3, 2, 16, 16)
    found = build_defenses(purifier, ["my_defenses:darker", "none"])
    assert torch.equal(found["my_defenses:darker"].votes(x, torch.Generator())[:, 0], x.square())
    assert "darker" in defense_names()
    with pytest.raises(TypeError, match="defense 'my_defenses:number' is a int; accepted: a function"):
        find_defense("my_defenses:number")
    for name in ("my_defenses:lighter", "no_such_module:make", ":"):
        with pytest.raises(ValueError, match=f"defense '{name}' cannot be imported"):
            find_defense(name)


def test_a_depth_is_that_of_the_purifier():
    purifier = build_purifier()
    found = build_defenses(purifier, ["videopure, T=2", "videopure without voting", "videopure with feedback, T=0"])
    deep, silent, feedback = (defense.purifier.config for defense in found.values())
    assert (deep.method, deep.inversion_steps, silent.inversion_steps) == ("videopure", 2, 1)
    assert feedback.feedback and feedback.inversion_steps == 0
    x = clips(1, 3, 4, 16, 16)
    votes = [defense.votes(x, torch.Generator().manual_seed(0)).shape[1] for defense in found.values()]
    assert votes == [4, 1, 2]


def test_gradients_of_a_filter():
    model = nn.Flatten()
    defense, codec = filter_defense(torch.square), filter_defense(torch.round, differentiable=False)
    x = clips(1, 3, 2, 16, 16).requires_grad_()
    exact, bpda = (defense.logits(model, gradient, torch.Generator()) for gradient in ("exact", "bpda"))
    assert torch.equal(exact(x), bpda(x))
    assert torch.equal(torch.autograd.grad(exact(x).sum(), x)[0], 2 * x)
    assert torch.equal(torch.autograd.grad(bpda(x).sum(), x)[0], torch.ones_like(x))
    assert codec.logits(model, "exact", torch.Generator()) is None
    assert codec.logits(model, "bpda", torch.Generator()) is not None


@pytest.mark.parametrize("name", ["", "all", "a:b", "videopure, T=2"])
def test_names_with_a_meaning_are_refused(name):
    with pytest.raises(ValueError, match="cannot name a defense"):
        register_defense(name)


def test_what_is_no_defense_is_refused(purifier):
    with pytest.raises(TypeError, match="the name of a defense must be a str, got function"):
        register_defense(brighter)
    with pytest.raises(TypeError, match="a defense must be a function or a class, got int"):
        register_defense("three")(3)
    with pytest.raises(
        ValueError, match="the name 'none' is taken by the defense videopure_fast.defense.registry _none"
    ):
        register_defense("none")(brighter)
    register_defense("nothing")(lambda _: None)
    with pytest.raises(TypeError, match="the defense 'nothing' is a NoneType; accepted: a defense.Defense"):
        build_defenses(purifier, ["nothing"])
    with pytest.raises(TypeError, match="purifier must be a Purifier, got NoneType"):
        build_defenses(None)
    for name in ("prayer", "VAE round trip, T=2", "prayer, T=2"):
        with pytest.raises(ValueError, match=f"unknown defense '{name}'; accepted: none, mean of 3 frames"):
            find_defense(name)


@pytest.mark.parametrize("make", [lambda: None, lambda purifier, more: None])
def test_a_defense_takes_a_purifier_alone(make):
    with pytest.raises(TypeError, match="must take a purifier alone"):
        register_defense("of another signature")(make)
