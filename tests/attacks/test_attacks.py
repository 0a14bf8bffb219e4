"""What every attack in ATTACKS has in common, on a small random classifier."""

import inspect

import pytest
import torch
from attack_cases import NORMS, SHORT, Net, arguments, case, losses, seeded
from conftest import clips
from hypothesis import given, settings
from hypothesis import strategies as st

from videopure_fast.attacks import ATTACKS


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(ATTACKS)),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(1e-7, 0.9),
    shape=st.tuples(st.integers(1, 2), st.just(3), st.integers(1, 3), st.integers(3, 6), st.integers(3, 6)),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_balls_hold_after_rounding(name, norm, eps, shape, seed, dtype):
    model, video = Net().to(dtype), torch.rand(shape, generator=seeded(seed)).to(dtype)
    video[:, 0] = video[:, 0].round() * 1e-9 + (video[:, 0] > 0.5)  # about 0 and 1, where rounding is uneven
    norm = norm if name in NORMS else "linf"
    given = arguments(name, eps=eps) | ({"norm": norm} if name in NORMS else {})
    if "random_start" in inspect.signature(ATTACKS[name].run).parameters:
        given["random_start"] = True
    labels = torch.zeros(len(video), dtype=torch.int64)
    attacked = ATTACKS[name].run(model, video.clamp(0, 1), labels, **given, generator=seeded(seed))
    delta = attacked - video.clamp(0, 1)
    assert 0 <= attacked.min() and attacked.max() <= 1 and attacked.dtype == dtype
    if norm == "linf":
        assert delta.abs().max() <= eps
    else:
        assert delta.double().flatten(1).norm(dim=1).max() <= eps * (1 + 1e-6)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_fools_with_a_large_budget(name):
    model, video, labels = case(8)
    given = arguments(name, eps=0.6, **({"steps": 10} if name in SHORT else {}))
    given |= {"queries": 150} if name == "square" else {"size": 8} if name == "patch" else {}
    given |= {"step_size": 0.1, "steps": 10} if name == "pgd" else {}
    attacked = ATTACKS[name].run(model, video, labels, **given, generator=seeded())
    assert (model(attacked).argmax(1) != labels).sum() >= 6
    assert losses(model, attacked, labels).mean() > losses(model, video, labels).mean() + 0.5


@pytest.mark.parametrize("name", ["pgd", "apgd", "mim", "one_frame"])
def test_restarts_are_never_weaker(name):
    model, video, labels = case(8)
    given = arguments(name, eps=0.01)
    given |= {"steps": 6, "step_size": 0.005} if name in ("mim", "one_frame") else {}
    one, five = (ATTACKS[name].run(model, video, labels, **given, restarts=n, generator=seeded()) for n in (1, 5))
    fooled = [model(x).argmax(1) != labels for x in (one, five)]
    raised = [losses(model, x, labels) for x in (one, five)]
    assert ((fooled[1] & ~fooled[0]) | ((fooled[1] == fooled[0]) & (raised[1] >= raised[0]))).all()
    assert not torch.equal(one, five)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"square", "patch"}))
def test_a_batch_equals_its_clips(name):
    model, video, labels = case(3, dtype=torch.float64)
    given = arguments(name) | ({"random_start": False} if name in ("pgd", "apgd") else {})
    together = ATTACKS[name].run(model, video, labels, **given)
    alone = [ATTACKS[name].run(model, video[i : i + 1], labels[i : i + 1], **given) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_leaves_everything_as_it_was(name):
    model, video, labels = case(2)
    model.train()
    before, state = video.clone(), torch.get_rng_state()
    first, again, other = (
        ATTACKS[name].run(model, video, labels, **arguments(name), generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, video) and not first.requires_grad
    random = name in ("pgd", "apgd", "square", "patch")
    assert torch.equal(first, other) != random
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(video, before) and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inner = ATTACKS[name].run(model, video.clone(), labels.clone(), **arguments(name), generator=seeded(1))
            assert torch.equal(inner, first) and not torch.is_grad_enabled()


BAD = [
    ({"eps": 0.0}, ValueError, "eps must be more than 0 and finite"),
    ({"eps": float("nan")}, ValueError, "eps must be more than 0 and finite"),
    ({"eps": 1e300}, ValueError, r"eps must be more than 0 and at most 1e\+09, got 1e\+300"),
    ({"eps": 10**400}, ValueError, r"eps must be more than 0 and at most 1e\+09, got an integer of 1329 bits"),
    ({"eps": "4"}, TypeError, "eps must be a number"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must be \(2,\)"),
    ({"labels": torch.zeros(2)}, TypeError, "labels must be dense int64, got torch.float32"),
    ({"labels": torch.zeros(2, dtype=torch.int64).to_sparse()}, TypeError, "labels must be dense int64"),
    ({"labels": torch.tensor([0, -1])}, ValueError, "of 0 or more"),
    ({"labels": [0, 1]}, TypeError, "labels must be a tensor"),
    ({"clips": clips(2, 3, 4, 8, 8) * 2}, ValueError, r"values from .* in \[0, 1\]"),
    ({"clips": clips(2, 3, 4, 8, 8) * float("nan")}, ValueError, "values from nan"),
    ({"clips": clips(2, 3, 8, 8)}, ValueError, r"shape \(2, 3, 8, 8\)"),
    ({"clips": clips(2, 4, 3, 8, 8)}, ValueError, r"\(B, 3, F, H, W\)"),
    ({"clips": clips(2, 3, 4, 8, 8).half()}, TypeError, "float32 or float64"),
    ({"loss": "cw"}, ValueError, "one of ce, dlr, margin, got 'cw'"),
    ({"model": 3}, TypeError, "model must be callable"),
    ({"eps": 4}, ValueError, r"eps must be at most 1 in l_inf, in the clips' units \(4/255, not 4\), got 4"),
    ({"clips": clips(2, 3, 4, 8, 8).to_sparse()}, TypeError, "sparse_coo on cpu; accepted: dense tensors"),
    ({"generator": 0}, TypeError, "generator must be a torch.Generator on the CPU, got int"),
]


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input_is_refused_before_any_work(name, wrong, error, message):
    def model(x):
        raise AssertionError("the model was called")

    given = {"model": model, "clips": clips(2, 3, 4, 8, 8), "labels": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        ATTACKS[name].run(**given | arguments(name) | wrong)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("pgd", {"steps": -1}, "steps must be 0 or more"),
        ("pgd", {"step_size": 0.0}, "step_size must be more than 0 and finite"),
        ("pgd", {"step_size": 1e300}, r"step_size must be more than 0 and at most 1e\+09"),
        ("apgd", {"steps": 0}, "steps must be 1 or more, got 0"),
        ("mim", {"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ("fgsm", {"restarts": 0}, "restarts must be 1 or more"),
        ("fgsm", {"eot": 0}, "eot must be 1 or more"),
        ("square", {"queries": 0}, "queries must be 1 or more"),
        ("square", {"p_init": 0.0}, "p_init"),
        ("square", {"eot": 0}, "eot must be 1 or more"),
        ("mim", {"decay": float("nan")}, "decay must be 0 or more and finite, got nan"),
        ("temporal_translation", {"decay": -1}, "decay must be 0 or more and finite, got -1"),
        ("flicker", {"thickness": float("inf")}, "thickness must be 0 or more and finite"),
        ("patch", {"corner": (1.5, 2)}, r"got \(1.5, 2\)"),
        ("patch", {"corner": 3}, "got 3"),
        ("one_frame", {"frame": 4}, "frame must be 0 to 3, got 4"),
        ("patch", {"size": 9}, "size must be 1 to 8, got 9"),
        ("patch", {"corner": (6, 0)}, r"\(0, 0\)\.\.\(5, 5\), got \(6, 0\)"),
        ("temporal_translation", {"weights": "square"}, "gaussian, linear, uniform"),
        ("temporal_translation", {"weights": []}, r"gaussian, linear, uniform, got \[\]"),
        ("temporal_translation", {"max_shift": -1}, "max_shift must be 0 or more"),
    ],
)
def test_bad_options(name, wrong, message):
    model, video, labels = case(2)
    with pytest.raises(ValueError, match=message):
        ATTACKS[name].run(model, video, labels, **arguments(name) | wrong)


@pytest.mark.parametrize(("name", "option"), [("one_frame", "frame"), ("patch", "size")])
def test_options_of_other_types(name, option):
    with pytest.raises(TypeError, match=f"{option} must be an int, got True"):
        ATTACKS[name].run(*case(2), **arguments(name) | {option: True})


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_progress_shows_a_bar(name, capsys):
    model, video, labels = case(2)
    quiet = ATTACKS[name].run(model, video, labels, **arguments(name), generator=seeded())
    assert capsys.readouterr().err == ""
    shown = ATTACKS[name].run(model, video, labels, **arguments(name), generator=seeded(), progress=True)
    assert name.replace("_", " ") in capsys.readouterr().err and torch.equal(quiet, shown)
