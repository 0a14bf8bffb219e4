"""Robust accuracy of every defense on packaged clips: `python bench/study.py`, many hours on two cores.

Interrupt it when you like: the outcome of every clip stays in bench/results/study, and the next run goes on from there.
bench/results/robustness-tiny.json then holds all that is done in full, robustness-tiny.svg draws accuracy against eps
and seconds, and `make report` makes the README's tables. --only works on one part; --only nothing just writes the
result. --share 0.02 tries the whole way on few clips, in build. Seconds a clip are those of the part "cost", which
wants the machine for itself, and the threads that are to be told of.

The records at hand are of a PGD whose l_inf box was rounded to nearest: a pixel could leave it by its own rounding, at
most 2**-25.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from videopure_fast import DefendedClassifier, Purifier, tiny, use_backend
from videopure_fast.evaluation.checks import (
    effort_check,
    gradient_check,
    order_checks,
    reach_check,
    source_check,
    stand_in_check,
)
from videopure_fast.evaluation.figures import draw_accuracy
from videopure_fast.evaluation.record import Access, Plan, Record, Threat, weights_digest
from videopure_fast.evaluation.runner import Defense, Setup, defenses, evaluate
from videopure_fast.evaluation.tables import table
from videopure_fast.files import atomic_write
from videopure_fast.tiny.models import ActionClassifier
from videopure_fast.tiny.train import train_classifier

ROOT = Path(__file__).resolve().parent.parent
RESULT, WORK = ROOT / "bench" / "results" / "robustness-tiny.json", ROOT / "bench" / "results" / "study"
OTHER = ROOT / "build" / "other-classifier.safetensors"
SEED = 31_000_000  # of the clips: these serve no training and no choice
EPS = (4 / 255, 8 / 255)
OTHER_STEPS = 1500  # of training the attacker's own classifier, as many as the packaged one had

FILTERS = (
    *("none", "mean of 3 frames", "mean of 5 frames", "median of 3 frames", "median of 5 frames"),
    *("temporal shuffling", "JPEG 75", "H.264 crf 23", "VAE round trip"),
)
VARIANTS = ("videopure without guidance", "videopure without voting", "videopure with feedback")
DEPTHS = (2, 10)  # beside the prior's own 5
RANDOMIZED = tuple(f"{name}{depth}" for name in ("ddpm", "ddim") for depth in ("", *(f", T={T}" for T in DEPTHS)))
PARITY = tuple(
    f"videopure, crafted on {crafted}, judged on {judged}"
    for crafted in ("fast", "reference")
    for judged in ("fast", "reference")
)
# The parts over which the headline is the minimum.
ATTACKS = ("gray-box", "transfer", "bpda", "exact", "exact apgd", "curve", "query")
PGD10 = {"steps": 10, "step_size": 2 / 255}
PGD20 = {"steps": 20, "step_size": 1 / 255}


def plans() -> dict[str, Plan]:
    """By name, cheap ones first. ddpm takes a hundred evaluations a clip: one seed, once."""

    def threat(access: Access, clips: int, attack: str = "pgd", **settings: float | str) -> Threat:
        return Threat(access, attack, settings or PGD10, clips)

    def plan(
        names: tuple[str, ...], *threats: Threat, eps: tuple[float, ...] = EPS, seeds: int = 1, repeats: int = 3
    ) -> Plan:
        source = f"packaged clips of seeds {SEED} and on, the packaged classifier and prior"
        return Plan(source, threats, names, eps, tuple(range(seeds)), repeats=repeats)

    diffusing = ("ddim_inversion", "ddim", "videopure")
    strong = ("ddim", "videopure")
    few = ("none", "mean of 5 frames", "VAE round trip", *strong)
    clean, gray = Threat("none", clips=256), threat("gray-box", 256)
    transfer = threat("transfer", 128, "temporal_translation", steps=10, step_size=2 / 255, max_shift=2)
    through = plan((*FILTERS, *diffusing), transfer)
    deep = tuple(f"{name}, T={depth}" for depth in DEPTHS for name in strong)
    depths = (replace(clean, clips=128), replace(gray, clips=128))
    curve = [threat(access, 32, "apgd", steps=10) for access in ("gray-box", "bpda")]
    return {
        "gray-box": plan((*FILTERS, *diffusing, *VARIANTS), clean, gray, seeds=3, repeats=1),
        "transfer": replace(through, source=f"{through.source}, and another trained for {OTHER_STEPS} steps"),
        "bpda": plan((*FILTERS, *diffusing), threat("gray-box", 64, **PGD20), threat("bpda", 64, **PGD20), eps=EPS[:1]),
        "exact": plan((*strong, "VAE round trip", "mean of 5 frames"), threat("exact", 32, **PGD20), eps=EPS[:1]),
        "exact apgd": plan(
            ("videopure", "VAE round trip", *(name for name in FILTERS if name.startswith(("mean", "median", "temp")))),
            threat("exact", 32, "apgd", steps=20, loss="margin"),
            eps=EPS[:1],
        ),
        "depths": plan(deep, *depths, eps=EPS[:1], repeats=1),
        "chance": plan(("ddim",), threat("gray-box", 64), eps=EPS[:1], repeats=10),
        "curve": plan(few, *curve, eps=tuple(2**k / 255 for k in range(7)), repeats=1),
        "parity": plan(PARITY, threat("bpda", 32), eps=(EPS[0], 12 / 255)),  # the second, so that some are fooled
        "gray-box ddpm": plan(("ddpm",), clean, gray, repeats=1),
        "query": plan(("none", "mean of 5 frames", *strong), threat("query", 32, "square", queries=200), eps=EPS[:1]),
        # In several batches, of which the first two warm up and are recorded.
        "cost": replace(
            plan((*FILTERS, *diffusing, *VARIANTS, *deep, "ddpm"), replace(clean, clips=20), repeats=1), batch=4
        ),
    }


def shrunk(plan: Plan, share: float) -> Plan:
    threats = tuple(replace(threat, clips=math.ceil(share * threat.clips)) for threat in plan.threats)
    return replace(plan, threats=threats)


def draw(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    clips, labels = tiny.sample_clips(start + count, seed=SEED + seed)
    return clips[start:], labels[start:]


def crossed(fast: Defense, **settings: Any) -> dict[str, Defense]:
    """videopure attacked through one path of its evaluation and judged on another: diffusers' modules with the ops'
    reference, and ours."""
    purifier = Purifier.from_pretrained("tiny", device="cpu", dtype=torch.float32, fast=False, **settings)
    plain = defenses(purifier)["videopure"]

    def votes(clips: Tensor, generator: torch.Generator) -> Tensor:
        with use_backend("reference"):
            return plain.votes(clips, generator)

    def logits(*arguments: Any) -> Callable[[Tensor], Tensor]:
        def run(clips: Tensor) -> Tensor:
            with use_backend("reference"):
                return call(clips)

        call = plain.logits(*arguments)
        return run

    paths = {"fast": fast, "reference": Defense(votes, logits)}
    pairs = [(crafted, judged) for crafted in paths.values() for judged in paths.values()]
    return {name: Defense(judged.votes, crafted.logits) for name, (crafted, judged) in zip(PARITY, pairs, strict=True)}


def check_models(path: Path, **models: nn.Module) -> None:
    """ValueError where the records beside `path` are of other weights; the first run of a model writes down its own."""
    known = json.loads(path.read_text()) if path.exists() else {}
    digests = {name: weights_digest(model) for name, model in models.items()}
    if others := [name for name, digest in digests.items() if known.get(name, digest) != digest]:
        raise ValueError(f"the records in {path.parent} are of another {', '.join(others)}: move them away")
    if not digests.items() <= known.items():
        with atomic_write(path) as file:
            file.write_text(json.dumps(known | digests, indent=1) + "\n")


def other_classifier() -> nn.Module:
    """The attacker's own: of the same form, from another start, on clips that the packaged one saw in part."""
    if not OTHER.exists():
        torch.manual_seed(SEED)
        model = train_classifier(OTHER_STEPS)
        OTHER.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(OTHER) as file:
            save_file(model.state_dict(), file)
    model = ActionClassifier()
    model.load_state_dict(load_file(OTHER))
    return model.eval().requires_grad_(False)


def sanity(purifier: Purifier, classifier: nn.Module, path: Path) -> list[dict[str, Any]]:
    """The checks that need work, kept in a file once they are done."""
    if not path.exists():
        clips, labels = draw(0, 0, 8)
        targets = [DefendedClassifier(classifier, purifier, gradient=how).vote_logits for how in ("exact", "bpda")]
        checks = [
            source_check(other_classifier(), clips, labels, eps=EPS[0]),
            gradient_check(purifier, classifier, clips[:1], labels[:1]),
            stand_in_check(*targets, clips, labels),
            effort_check(targets[0], clips, labels, eps=EPS[0]),
            reach_check(targets[1], clips, labels),  # BPDA's: the exact gradient would take half an hour
        ]
        with atomic_write(path) as file:
            file.write_text(json.dumps([check._asdict() for check in checks], indent=1) + "\n")
    return json.loads(path.read_text())


def record_of(name: str, folder: Path) -> Path:
    return folder / f"{name.replace(' ', '-')}.json"


def recorded(todo: dict[str, Plan], folder: Path) -> dict[str, Record]:
    """By name, the parts that have been begun."""
    return {name: Record(path, plan) for name, plan in todo.items() if (path := record_of(name, folder)).exists()}


def write(records: dict[str, Record], sane: list[dict[str, Any]], path: Path) -> None:
    """The rows of all that is done, and the checks."""
    rows = [row._asdict() | {"part": name} for name, record in records.items() for row in table(record)]
    everything = table(*(records[name] for name in ATTACKS if name in records), randomized=RANDOMIZED)
    rows += [row._asdict() | {"part": "adaptive"} for row in everything if row.access == "adaptive"]
    result = {
        "kind": "robustness",
        "rows": rows,
        "checks": sane + [check._asdict() for check in order_checks(*records.values())],
        "plans": {name: {"hash": record.plan.hash, **asdict(record.plan)} for name, record in records.items()},
        "machines": {name: record.machines for name, record in records.items()},
    }
    with atomic_write(path) as file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    if "curve" in records and "cost" in records:
        costs, curve = table(records["cost"]), [row for row in table(records["curve"]) if row.access != "adaptive"]
        names = {row.defense for row in curve}
        # The curve's own minimum would lack the exact attacks, which are of one eps alone.
        least = [row for row in everything if (row.access, row.eps) == ("adaptive", EPS[0]) and row.defense in names]
        if names <= {row.defense for row in costs}:
            options = {"eps": EPS[0], "note": "bars: 95 % intervals"}
            draw_accuracy([*costs, *curve, *least], path.with_suffix(".svg"), **options)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the clips, more than 0 and at most 1")
    parser.add_argument("--only", choices=[*plans(), "checks", "nothing"], help="work on this part alone")
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1:
        parser.error(f"--share must be more than 0 and at most 1, got {options.share}")
    whole = options.share == 1
    work = WORK if whole else ROOT / "build" / f"study-{options.share:g}"
    work.mkdir(parents=True, exist_ok=True)
    purifier, classifier = Purifier.from_pretrained("tiny", device="cpu", dtype=torch.float32), tiny.load_classifier()
    available = defenses(purifier, depths=DEPTHS)
    available |= crossed(available["videopure"])
    check_models(work / "models.json", purifier=purifier, classifier=classifier)
    todo = {name: plan if whole else shrunk(plan, options.share) for name, plan in plans().items()}
    for name in todo if options.only is None else todo.keys() & {options.only}:
        other = other_classifier() if name == "transfer" else None
        if other is not None:
            check_models(work / "models.json", attacker=other)
        evaluate(todo[name], Setup(classifier, available, draw, other), record_of(name, work), progress=True)
    checks = work / "checks.json"
    sane = sanity(purifier, classifier, checks) if options.only in (None, "checks") or checks.exists() else []
    write(recorded(todo, work), sane, RESULT if whole else work / RESULT.name)


if __name__ == "__main__":
    main()
