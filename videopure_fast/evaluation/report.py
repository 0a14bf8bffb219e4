"""The result of an evaluation, to be printed, plotted and exported: table, notes on weak attacks, and checks."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ..files import atomic_write, check_writable, make_folder
from .checks import Check, order_checks
from .plan import ADAPTIVE, Plan, Threat
from .record import Record
from .runner import EvalContext, Examples, examples
from .tables import Accuracy, inaccessible, rescued, table


class Report:
    """What `benchmark` returns. `print(report)` shows the table, the notes and the checks.

    Attributes:
        rows: the accuracy for each threat, eps and defense, then the minima over attacks.
        checks: the order of attacks, and the sanity checks if they were made.
        notes: why an attack may be weaker than it could be, and which attacks and clips are missing.
        record: the outcome of each clip.
        context: the models and clips.
        classes: names by label, for the pictures' captions; None: the labels themselves.
    """

    def __init__(
        self,
        record: Record,
        context: EvalContext,
        *,
        classes: Sequence[str] | None = None,
        checks: Sequence[Check] = (),
    ) -> None:
        self.record, self.context, self.classes = record, context, classes
        randomized = [name for name in record.plan.defenses if context.defenses[name].randomized]
        self.rows = table(record, randomized=randomized)
        self.checks = [*order_checks(record), *checks]
        missing = inaccessible(record).items()
        self.notes = [
            f"No {threat_model} attack on {', '.join(names)}: no gradient." for threat_model, names in missing
        ]
        self.notes += [f"Note: {note}" for note in weaknesses(record.plan, randomized)]
        if record.skipped:
            self.notes.append(f"{len(record.skipped)} videos could not be read; the JSON report names them.")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield accuracy_table(self.rows)
        yield from map(Text, self.notes)
        if self.checks:
            yield check_table(self.checks)

    def __str__(self) -> str:
        width = shutil.get_terminal_size((120, 24)).columns
        console = Console(file=io.StringIO(), width=width, color_system=None, soft_wrap=True)
        with console.capture() as printed:
            console.print(self)
        return printed.get().rstrip("\n")

    def __repr__(self) -> str:
        passed = sum(check.passed for check in self.checks)
        return f"<Report: {len(self.rows)} rows, {passed} of {len(self.checks)} checks passed>"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw accuracy against eps and against seconds a clip. ValueError where nothing was attacked."""
        from .figures import draw_accuracy

        draw_accuracy(self.rows, path, note="bars: 95 % intervals")

    def strip(self, path: str | os.PathLike[str], *, attack: str | None = None) -> None:
        """Draw a clip clean, attacked and purified, and the perturbation. attack: words for the caption.

        It is the clip that the plan's last defense keeps right most clearly, under the first threat of which it has
        one, at the first eps. ValueError where no attack was done in full.
        """
        from .figures import write_strip

        found, threat = self._examples(1)
        name, eps = self.record.plan.defenses[-1], self.record.plan.eps[0]
        caption = f"{threat.title}, {255 * eps:g}/255" if attack is None else attack
        write_strip(found, self._class_names(found), path, threat=caption, defense=name)

    def video(self, path: str | os.PathLike[str], *, clips: int = 4) -> None:
        """Write a video of several such clips, one after another: clean, attacked and purified side by side."""
        from .figures import write_side_by_side

        found, _ = self._examples(clips)
        write_side_by_side(found, self._class_names(found), path)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write plan, machines, rows, checks and skipped videos. ValueError where there is no such folder."""
        check_writable(path)
        report = {
            "plan": asdict(self.record.plan),
            "hash": self.record.plan.hash,
            "machines": self.record.machines,
            "rows": [row._asdict() for row in self.rows],
            "checks": [check._asdict() for check in self.checks],
            "skipped": self.record.skipped,
        }
        with atomic_write(path) as file:
            file.write_text(json.dumps(report, indent=2) + "\n")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows; the header has the fields of `tables.Accuracy`. ValueError where there is no such folder."""
        check_writable(path)
        with atomic_write(path) as file, file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(Accuracy._fields)
            writer.writerows(self.rows)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write report.json, table.csv and, where an attack was done in full, strip.png and accuracy.svg.

        Without matplotlib, which draws accuracy.svg, there is a warning in its place.
        """
        make_folder(folder)
        self.to_json(Path(folder, "report.json"))
        self.to_csv(Path(folder, "table.csv"))
        if self._pictured() is not None:
            self.strip(Path(folder, "strip.png"))
        if self._attacked():
            try:
                self.plot(Path(folder, "accuracy.svg"))
            except ImportError as error:
                warnings.warn(f"accuracy.svg is not drawn: {error}", stacklevel=2)

    def _attacked(self) -> bool:
        return any(row.threat_model not in ("none", "adaptive") for row in self.rows)

    def _pictured(self) -> Threat | None:
        """The first threat under which the last defense was attacked in full."""
        plan = self.record.plan
        attacks = (threat for threat in plan.threats if threat.threat_model != "none")
        found = (threat for threat in attacks if rescued(self.record, threat, plan.eps[0], plan.defenses[-1]))
        return next(found, None)

    def _examples(self, clips: int) -> tuple[Examples, Threat]:
        plan, threat = self.record.plan, self._pictured()
        if threat is None:
            raise ValueError(f"no attack on {plan.defenses[-1]} was done in full: there is no clip to show")
        return examples(self.record, threat, plan.eps[0], plan.defenses[-1], clips, self.context), threat

    def _class_names(self, found: Examples) -> Sequence[str]:
        if self.classes is not None:
            return self.classes
        largest = max(int(labels.max()) for labels in (found.labels, found.attacked_labels, found.purified_labels))
        return [str(label) for label in range(largest + 1)]


def weaknesses(plan: Plan, randomized: Sequence[str]) -> Iterator[str]:
    """Why the plan's attacks may be weaker than they could be. randomized: names of the randomized defenses."""
    attacks = [threat for threat in plan.threats if threat.threat_model != "none"]
    adaptive = [threat for threat in attacks if threat.threat_model in ADAPTIVE]
    if randomized and any(threat.settings.get("eot", 1) == 1 for threat in adaptive):
        yield f"{', '.join(randomized)}: random at each call; a larger eot averages the attack over several calls."
    if all(threat.threat_model != "exact" for threat in attacks):
        yield "no attack used a defense's own gradients, which break most defenses: the threat model exact does."
    distances = [threat.settings.get("steps", 1) * threat.settings.get("step_size", math.inf) for threat in attacks]
    if (distance := min(distances, default=math.inf)) < 2 * max(plan.eps):
        yield f"steps times step size is {255 * distance:g}/255, less than twice the largest eps, its ball's width."


def accuracy_table(rows: Sequence[Accuracy]) -> Table:
    """The rows grouped by threat and eps."""
    shown = Table("defense", box=None, title="Accuracy, its 95 % interval, and the share right in every repeat")
    shown.caption = "MiB: the most memory held, on a CPU by the whole process"
    shown.caption_justify = "left"
    for column in ("clips", "accuracy", "interval", "worst", "s/clip", "MiB"):
        shown.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in rows:
        title = "minimum over all of these attacks" if row.threat_model == "adaptive" else row.threat
        if (title, row.eps) != last:
            shown.add_section()
            shown.add_row(Text(title + (f", eps {255 * row.eps:g}/255" if row.eps else "")))
            last = (title, row.eps)
        shown.add_row(
            Text(f"  {row.defense}"),
            str(row.n),
            f"{row.accuracy:.3f}",
            f"{row.low:.2f}-{row.high:.2f}",
            f"{row.worst:.3f}",
            "-" if row.seconds_per_clip is None else f"{row.seconds_per_clip:.2g}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        )
    return shown


def check_table(checks: Sequence[Check]) -> Table:
    """Each check's name, verdict and measured values."""
    shown = Table("check", "", "seen", box=None, title="Sanity checks of attacks and gradients")
    for check in checks:
        shown.add_row(Text(check.name), "pass" if check.passed else "FAIL", Text(check.seen))
    return shown
