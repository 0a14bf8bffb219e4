"""Robust accuracy of every defence on packaged clips: `python bench/study.py`, some hours on two cores.

Interrupt it when you like: what is done stays in build/study, and the next run goes on from there. When all is done it
writes bench/results/robustness-tiny.json, of which `make report` makes the README's table. --share 0.02 tries the whole
way on few clips and writes into build/study alone.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from videopure_fast import Purifier, tiny
from videopure_fast.evaluation import Access, Plan, Threat, defences, evaluate, table
from videopure_fast.profiling import describe_device, replacing
from videopure_fast.tiny.models import ActionClassifier
from videopure_fast.tiny.train import train_classifier

ROOT = Path(__file__).resolve().parent.parent
RESULT, WORK = ROOT / "bench" / "results" / "robustness-tiny.json", ROOT / "build" / "study"
SEED = 31_000_000  # of the clips: these serve no training and no choice
EPS = (4 / 255, 8 / 255)
OTHER_STEPS = 400  # of training the attacker's own classifier

FILTERS = (
    *("none", "mean of 3 frames", "mean of 5 frames", "median of 3 frames", "median of 5 frames"),
    *("temporal shuffling", "JPEG 75", "H.264 crf 23", "VAE round trip"),
)
VARIANTS = ("videopure without guidance", "videopure without voting", "videopure with feedback")
DEPTHS = (2, 10)  # beside the prior's own 5
PGD10 = {"steps": 10, "step_size": 2 / 255}
PGD20 = {"steps": 20, "step_size": 1 / 255}


def plans() -> dict[str, Plan]:
    """By name, cheap ones first. ddpm takes a hundred evaluations a clip: one seed, once."""

    def threat(access: Access, clips: int, attack: str = "pgd", **settings: float) -> Threat:
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
    deep = tuple(f"{name}, T={depth}" for depth in DEPTHS for name in strong)
    depths = (replace(clean, clips=128), replace(gray, clips=128))
    curve = [threat(access, 32, "apgd", steps=10) for access in ("gray-box", "bpda")]
    return {
        "gray-box": plan((*FILTERS, *diffusing, *VARIANTS), clean, gray, seeds=3, repeats=1),
        "transfer": plan((*FILTERS, *diffusing), transfer),
        "bpda": plan((*FILTERS, *diffusing), threat("gray-box", 64, **PGD20), threat("bpda", 64, **PGD20), eps=EPS[:1]),
        "exact": plan((*strong, "VAE round trip", "mean of 5 frames"), threat("exact", 32, **PGD20), eps=EPS[:1]),
        "depths": plan(deep, *depths, eps=EPS[:1], repeats=1),
        "chance": plan(("ddim",), threat("gray-box", 64), eps=EPS[:1], repeats=10),
        "curve": plan(few, *curve, eps=tuple(2**k / 255 for k in range(7)), repeats=1),
        "gray-box ddpm": plan(("ddpm",), clean, gray, repeats=1),
        "query": plan(("none", "mean of 5 frames", *strong), threat("query", 32, "square", queries=200), eps=EPS[:1]),
    }


def shrunk(plan: Plan, share: float) -> Plan:
    threats = tuple(replace(threat, clips=math.ceil(share * threat.clips)) for threat in plan.threats)
    return replace(plan, threats=threats)


def draw(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    clips, labels = tiny.sample_clips(start + count, seed=SEED + seed)
    return clips[start:], labels[start:]


def other_classifier(path: Path) -> nn.Module:
    """The attacker's own: of the same form, from another start, on clips that the packaged one saw in part."""
    if not path.exists():
        torch.manual_seed(SEED)
        model = train_classifier(OTHER_STEPS)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            save_file(model.state_dict(), file)
    model = ActionClassifier()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the clips, more than 0 and at most 1")
    parser.add_argument("--work", type=Path, default=WORK, help="the folder of what is done so far")
    parser.add_argument("--only", choices=plans(), help="work on this part alone, and write no result")
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1:
        parser.error(f"--share must be more than 0 and at most 1, got {options.share}")
    work = options.work if options.share == 1 else options.work / f"share-{options.share:g}"
    purifier = Purifier.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    available = defences(purifier, depths=DEPTHS)
    other = other_classifier(options.work / "other-classifier.safetensors")
    parts = {}
    for name, plan in plans().items():
        if options.only in (None, name):
            plan = plan if options.share == 1 else shrunk(plan, options.share)
            path = work / f"{name.replace(' ', '-')}.json"
            record = evaluate(plan, tiny.load_classifier(), available, draw, path, other=other, progress=True)
            parts[name] = {
                "hash": plan.hash,
                "seeds": len(plan.seeds),
                "rows": [row._asdict() for row in table(record)],
            }
    if options.only:
        return
    result = {
        "kind": "robustness",
        "parts": parts,
        "plans": {name: asdict(plan) for name, plan in plans().items()},
        "device": describe_device(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    with replacing(RESULT if options.share == 1 else work / RESULT.name) as file:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
