"""Robust accuracy of every defense on packaged clips: `python bench/study.py`, many hours on two cores.

It may be interrupted: the outcome of every clip stays in bench/results/study, and the next run continues there.
bench/results/robustness-tiny.json holds the rows of everything that is done in full, robustness-tiny.svg plots accuracy
against eps and seconds, and `make report` writes the tables of README.md and bench/STUDY.md. --only runs one part;
--only nothing writes the results without running any. --share 0.02 tries all parts on few clips, in the folder build.
Seconds a clip come from the part "cost", which should run with nothing else on the machine.

The committed records were made with a PGD that rounded its l_inf box to nearest, so that a pixel could leave the box by
its own rounding error, at most 2**-25.
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
from videopure_fast.defense import Defense, build_defenses
from videopure_fast.evaluation.checks import (
    effort_check,
    gradient_check,
    order_checks,
    reach_check,
    source_check,
    stand_in_check,
)
from videopure_fast.evaluation.figures import draw_accuracy
from videopure_fast.evaluation.plan import Plan, Threat, ThreatModel
from videopure_fast.evaluation.record import Record, weights_digest
from videopure_fast.evaluation.runner import EvalContext, evaluate, evaluation_bar
from videopure_fast.evaluation.runner import work as evaluation_work
from videopure_fast.evaluation.tables import table
from videopure_fast.files import atomic_write
from videopure_fast.tiny.models import ActionClassifier
from videopure_fast.tiny.train import train_classifier

ROOT = Path(__file__).resolve().parent.parent
RESULT, WORK = ROOT / "bench" / "results" / "robustness-tiny.json", ROOT / "bench" / "results" / "study"
SURROGATE = ROOT / "build" / "other-classifier.safetensors"
SEED = 31_000_000  # seed of the clips; neither training nor any choice of settings used them
EPS = (4 / 255, 8 / 255)
SURROGATE_STEPS = 1500  # training steps of the attacker's own classifier, as many as the packaged one had

FILTERS = (
    *("none", "mean of 3 frames", "mean of 5 frames", "median of 3 frames", "median of 5 frames"),
    *("temporal shuffling", "JPEG 75", "H.264 crf 23", "VAE round trip"),
)
VARIANTS = ("videopure without guidance", "videopure without voting", "videopure with feedback")
DEPTHS = (2, 10)  # depths T in addition to the prior's own, 5
RANDOMIZED = tuple(f"{name}{depth}" for name in ("ddpm", "ddim") for depth in ("", *(f", T={T}" for T in DEPTHS)))
PARITY = tuple(
    f"videopure, crafted on {crafted}, judged on {judged}"
    for crafted in ("fast", "reference")
    for judged in ("fast", "reference")
)
# The parts that the column "minimum" is taken over.
ATTACKS = ("gray-box", "transfer", "bpda", "exact", "exact apgd", "curve", "query")
PGD10 = {"steps": 10, "step_size": 2 / 255}
PGD20 = {"steps": 20, "step_size": 1 / 255}


def plans() -> dict[str, Plan]:
    """The study's parts by name, cheap ones first. ddpm takes 101 UNet evaluations, so it runs on one seed, once."""

    def threat(threat_model: ThreatModel, clips: int, attack: str = "pgd", **settings: float | str) -> Threat:
        return Threat(threat_model, attack, settings or PGD10, clips)

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
    curve = [threat("gray-box", 32, "apgd", steps=10), threat("bpda", 32, "apgd", steps=10)]
    return {
        "gray-box": plan((*FILTERS, *diffusing, *VARIANTS), clean, gray, seeds=3, repeats=1),
        "transfer": replace(through, source=f"{through.source}, and another trained for {SURROGATE_STEPS} steps"),
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
        "parity": plan(PARITY, threat("bpda", 32), eps=(EPS[0], 12 / 255)),  # at 12/255 some clips are fooled
        "gray-box ddpm": plan(("ddpm",), clean, gray, repeats=1),
        "query": plan(("none", "mean of 5 frames", *strong), threat("query", 32, "square", queries=200), eps=EPS[:1]),
        # Several batches, since the first two are a warm-up; the median over batches is reported.
        "cost": replace(
            plan((*FILTERS, *diffusing, *VARIANTS, *deep, "ddpm"), replace(clean, clips=20), repeats=1), batch=4
        ),
    }


def shrunk(plan: Plan, share: float) -> Plan:
    """The plan on that share of its clips, rounded up."""
    threats = tuple(replace(threat, clips=math.ceil(share * threat.clips)) for threat in plan.threats)
    return replace(plan, threats=threats)


def draw(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Clips (count, 3, F, H, W) and labels (count,) of the study."""
    clips, labels = tiny.sample_clips(start + count, seed=SEED + seed)
    return clips[start:], labels[start:]


def crossed(fast: Defense, **settings: Any) -> dict[str, Defense]:
    """Defenses by the names of PARITY: videopure, attacked through one implementation and classified by another.

    "fast" is this package's; "reference" is diffusers' modules with the ops' reference. settings: of the purifier.
    """
    purifier = Purifier.from_pretrained("tiny", device="cpu", dtype=torch.float32, fast=False, **settings)
    plain = build_defenses(purifier, ["videopure"])["videopure"]

    def votes(clips: Tensor, generator: torch.Generator) -> Tensor:
        with use_backend("reference"):
            return plain.votes(clips, generator)

    def logits(*arguments: Any) -> Callable[[Tensor], Tensor]:
        call = plain.logits(*arguments)
        assert call is not None  # a purification has both gradients

        def run(clips: Tensor) -> Tensor:
            with use_backend("reference"):
                return call(clips)

        return run

    paths = {"fast": fast, "reference": Defense(votes, logits)}
    pairs = [(crafted, judged) for crafted in paths.values() for judged in paths.values()]
    return {name: Defense(judged.votes, crafted.logits) for name, (crafted, judged) in zip(PARITY, pairs, strict=True)}


def check_models(path: Path, **models: nn.Module) -> None:
    """ValueError where the records in the folder of `path` are of other weights; a model's first run saves its digest.

    path: a JSON file, model name -> digest of its weights.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    digests = {name: weights_digest(model) for name, model in models.items()}
    if changed := [name for name, digest in digests.items() if known.get(name, digest) != digest]:
        raise ValueError(f"the records in {path.parent} are of another {', '.join(changed)}: move them away")
    if not digests.items() <= known.items():
        with atomic_write(path) as file:
            file.write_text(json.dumps(known | digests, indent=1) + "\n")


def surrogate_classifier() -> nn.Module:
    """The attacker's own classifier: the packaged one's architecture, another initialization, partly the same clips."""
    if not SURROGATE.exists():
        torch.manual_seed(SEED)
        trained = train_classifier(SURROGATE_STEPS)
        SURROGATE.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(SURROGATE) as file:
            save_file(trained.state_dict(), file)
    model = ActionClassifier()
    model.load_state_dict(load_file(SURROGATE))
    return model.eval().requires_grad_(False)


def sanity(purifier: Purifier, classifier: nn.Module, path: Path) -> list[dict[str, Any]]:
    """The checks that need work, as dicts; they are made once and kept in the file `path`."""
    if not path.exists():
        clips, labels = draw(0, 0, 8)
        targets = [DefendedClassifier(classifier, purifier, gradient=how).vote_logits for how in ("exact", "bpda")]
        checks = [
            source_check(surrogate_classifier(), clips, labels, eps=EPS[0]),
            gradient_check(purifier, classifier, clips[:1], labels[:1]),
            stand_in_check(*targets, clips, labels),
            effort_check(targets[0], clips, labels, eps=EPS[0]),
            reach_check(targets[1], clips, labels),  # by BPDA: the exact gradient would take half an hour
        ]
        with atomic_write(path) as file:
            file.write_text(json.dumps([check._asdict() for check in checks], indent=1) + "\n")
    return json.loads(path.read_text())


def record_of(name: str, folder: Path) -> Path:
    return folder / f"{name.replace(' ', '-')}.json"


def recorded(todo: dict[str, Plan], folder: Path) -> dict[str, Record]:
    """The records of the parts that have been begun, by name."""
    return {name: Record(path, plan) for name, plan in todo.items() if (path := record_of(name, folder)).exists()}


def write(records: dict[str, Record], sane: list[dict[str, Any]], path: Path) -> None:
    """Write the rows of everything that is done in full, and the checks, to a JSON file, and plot them beside it."""
    rows = [row._asdict() | {"part": name} for name, record in records.items() for row in table(record)]
    everything = table(*(records[name] for name in ATTACKS if name in records), randomized=RANDOMIZED)
    rows += [row._asdict() | {"part": "adaptive"} for row in everything if row.threat_model == "adaptive"]
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
        costs, curve = (
            table(records["cost"]),
            [row for row in table(records["curve"]) if row.threat_model != "adaptive"],
        )
        names = {row.defense for row in curve}
        # The minimum over all parts is drawn: the curve's own would lack the exact attacks, which ran at one eps.
        least = [row for row in everything if (row.threat_model, row.eps) == ("adaptive", EPS[0])]
        least = [row for row in least if row.defense in names]
        if names <= {row.defense for row in costs}:
            rows_drawn = [*costs, *curve, *least]
            draw_accuracy(rows_drawn, path.with_suffix(".svg"), eps=EPS[0], note="bars: 95 % intervals")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of the clips, more than 0 and at most 1")
    parser.add_argument("--only", choices=[*plans(), "checks", "nothing"], help="run this part alone")
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1:
        parser.error(f"--share must be more than 0 and at most 1, got {options.share}")
    whole = options.share == 1
    work = WORK if whole else ROOT / "build" / f"study-{options.share:g}"
    work.mkdir(parents=True, exist_ok=True)
    purifier, classifier = Purifier.from_pretrained("tiny", device="cpu", dtype=torch.float32), tiny.load_classifier()
    available = build_defenses(purifier, depths=DEPTHS)
    available |= crossed(available["videopure"])
    check_models(work / "models.json", purifier=purifier, classifier=classifier)
    todo = {name: plan if whole else shrunk(plan, options.share) for name, plan in plans().items()}
    for name in todo if options.only is None else todo.keys() & {options.only}:
        surrogate = surrogate_classifier() if name == "transfer" else None
        if surrogate is not None:
            check_models(work / "models.json", attacker=surrogate)
        context = EvalContext(classifier, available, draw, surrogate)
        with evaluation_bar(evaluation_work(todo[name], context), enabled=True) as bar:
            evaluate(todo[name], context, record_of(name, work), bar=bar)
    checks = work / "checks.json"
    sane = sanity(purifier, classifier, checks) if options.only in (None, "checks") or checks.exists() else []
    write(recorded(todo, work), sane, RESULT if whole else work / RESULT.name)


if __name__ == "__main__":
    main()
