"""What an evaluation shows and writes: its table, report and pictures, what weakens it, and the checks of its attacks.

Imports what it needs when it runs, as the commands do.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..evaluation.checks import Check
    from ..evaluation.record import Plan, Record
    from ..evaluation.runner import Setup
    from ..evaluation.tables import Accuracy

# Brackets in file names are no markup.
console = Console(markup=False, highlight=False, soft_wrap=True)

_CHECKED_CLIPS = 2
_SOURCE_CLIPS = 32


def report(record: Record, setup: Setup, classes: Sequence[str], out: Path, *, thorough: bool) -> None:
    """Table, report, CSV file and pictures; then, if thorough, the checks that need work, and the report with them."""
    from ..evaluation.checks import order_checks
    from ..evaluation.tables import inaccessible, table

    randomized = [name for name in record.plan.defenses if setup.defenses[name].randomized]
    rows, checks = table(record, randomized=randomized), order_checks(record)

    def write() -> None:
        found = [check._asdict() for check in checks]
        write_report(out / "report.json", record, rows, checks=found, skipped=record.skipped)

    console.print(accuracy_table(rows))
    for access, names in inaccessible(record).items():
        console.print(f"No {access} attack on {', '.join(names)}: no gradient.")
    for note in weaknesses(record.plan, randomized):
        console.print(f"Mind: {note}")
    if record.skipped:
        console.print(f"{len(record.skipped)} videos could not be read; report.json names them.")
    write()
    _write_csv(out / "table.csv", rows)
    _draw_pictures(record, rows, setup, classes, out)
    if thorough:
        checks += sanity_checks(record.plan, setup)
        write()
    if checks:
        console.print(_check_table(checks))
    console.print(f"Table, report and pictures: {out}")


def weaknesses(plan: Plan, randomized: Sequence[str]) -> Iterator[str]:
    """What makes these attacks, or what they leave, less than it seems."""
    from ..evaluation.record import ADAPTIVE

    attacks = [threat for threat in plan.threats if threat.access != "none"]
    if randomized and any(threat.settings.get("eot", 1) == 1 for threat in attacks if threat.access in ADAPTIVE):
        yield f"{', '.join(randomized)} draw anew at each call; --eot averages over several of them."
    if all(threat.access != "exact" for threat in attacks):
        yield "no attack used a defense's own gradients, which break most: --threat exact does."
    reach = min(threat.settings.get("steps", 1) * threat.settings.get("step_size", math.inf) for threat in attacks)
    if reach < 2 * max(plan.eps):
        yield f"--steps of --step-size reach {255 * reach:g}/255, less than from side to side of the largest eps."


def accuracy_table(rows: Sequence[Accuracy]) -> Table:
    table = Table("defense", box=None, title="Accuracy, its 95 % interval, and the share right in every repeat")
    table.caption = "MiB: the most memory held, on a CPU by the whole process"
    table.caption_justify = "left"
    for column in ("clips", "accuracy", "interval", "worst", "s/clip", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in rows:
        title = "the least that any of these attacks left" if row.access == "adaptive" else row.threat
        if (title, row.eps) != last:
            table.add_section()
            table.add_row(title + (f", eps {255 * row.eps:g}/255" if row.eps else ""))
            last = (title, row.eps)
        table.add_row(
            f"  {row.defense}",
            str(row.n),
            f"{row.accuracy:.3f}",
            f"{row.low:.2f}-{row.high:.2f}",
            f"{row.worst:.3f}",
            "-" if row.seconds_per_clip is None else f"{row.seconds_per_clip:.2g}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        )
    return table


def _check_table(checks: Sequence[Check]) -> Table:
    table = Table("check", "", "seen", box=None, title="Can this be believed?")
    for check in checks:
        table.add_row(check.name, "pass" if check.passed else "FAIL", check.seen)
    return table


def sanity_checks(plan: Plan, setup: Setup) -> list[Check]:
    """Of the plan's last defense: of its exact gradient where it has one, else of BPDA's."""
    import torch

    from ..evaluation.checks import Check, effort_check, gradient_check, reach_check, source_check, stand_in_check

    name, eps = plan.defenses[-1], plan.eps[-1]
    defense, classifier, count = setup.defenses[name], setup.classifier, plan.threats[0].clips
    batches = (setup.draw(seed, 0, min(count, _CHECKED_CLIPS)) for seed in plan.seeds)
    clips, labels = next((batch for batch in batches if len(batch[1])), (None, None))
    if clips is None:
        return [Check(f"{name}: checks", False, "not made: none of the first clips could be read")]
    exact, bpda = (defense.logits(classifier, how, torch.Generator().manual_seed(0)) for how in ("exact", "bpda"))
    target = exact or bpda
    todo = {"an attack that goes on": lambda: effort_check(target, clips, labels, eps=eps, steps=6)}
    todo["an attack without bounds"] = lambda: reach_check(target, clips, labels)
    if exact is not None:
        todo["BPDA's gradient"] = lambda: stand_in_check(exact, bpda, clips, labels)
    if defense.purifier is not None:
        todo["the exact gradient"] = lambda: gradient_check(defense.purifier, classifier, clips[:1], labels[:1])
    if setup.other is not None:
        more = setup.draw(plan.seeds[0], 0, min(count, _SOURCE_CLIPS))  # it is small, and two clips tell little
        todo["the attacker's own classifier"] = lambda: source_check(setup.other, *more, eps=eps, batch=plan.batch)
    found = []
    with console.status("") as status:
        for what, run in todo.items():
            status.update(f"checking {name}: {what}")
            try:
                check = run()
            except Exception as error:  # a classifier without float64, too little memory, ...
                check = Check(what, False, f"not made: {type(error).__name__}: {str(error).splitlines()[0]}")
            found.append(check._replace(name=f"{name}: {check.name}"))
    return found


def _draw_pictures(record: Record, rows: Sequence[Accuracy], setup: Setup, classes: Sequence[str], out: Path) -> None:
    """The last defense's: of the first threat that has one, the clip that it rescues most clearly."""
    from ..evaluation import figures as pictures
    from ..evaluation.runner import examples
    from ..evaluation.tables import rescued

    if all(row.access in ("none", "adaptive") for row in rows):
        return
    pictures.draw_accuracy(rows, out / "accuracy.svg", note="bars: 95 % intervals")
    name = record.plan.defenses[-1]
    for threat in record.plan.threats[1:]:
        cell = (threat, record.plan.eps[0], name)
        if rescued(record, *cell):
            found = examples(record, *cell, 1, setup)
            met = f"{threat.title}, {255 * record.plan.eps[0]:g}/255"
            pictures.write_strip(found, classes, out / "strip.png", threat=met, defense=name)
            return


def write_report(path: Path, record: Record, rows: Sequence[Accuracy], **more: Any) -> None:
    from ..files import atomic_write

    report = {
        "plan": asdict(record.plan),
        "hash": record.plan.hash,
        "machines": record.machines,
        "rows": [row._asdict() for row in rows],
        **more,
    }
    with atomic_write(path) as file:
        file.write_text(json.dumps(report, indent=2) + "\n")


def _write_csv(path: Path, rows: Sequence[Accuracy]) -> None:
    from ..evaluation.tables import Accuracy
    from ..files import atomic_write

    with atomic_write(path) as file, file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(Accuracy._fields)
        writer.writerows(rows)
