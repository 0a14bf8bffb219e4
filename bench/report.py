"""Write README.md's tables from the results in bench/results/: `python bench/report.py` (`--check` only compares)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from videopure_fast.evaluation import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"


def accuracy_table(result: dict) -> str:
    """Markdown of one `videopure-fast demo --json` file."""
    settings = result["settings"]
    n, eps = settings["clips"], round(settings["eps"] * 255)

    def share(accuracy: float) -> str:
        low, high = wilson_interval(accuracy, n)
        return f"{accuracy:.3f} ({low:.2f} to {high:.2f})"

    rows = [
        f"| {row['defence']} | {share(row['clean'])} | {share(row['attacked'])} | {row['seconds_per_clip']:.2f} |"
        for row in result["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            f"PGD-{settings['steps']}, l_inf {eps}/255, step {round(settings['step_size'] * 255)}/255; {n} clips (seed "
            f"{settings['seed']}) that served neither training nor any choice; 95 % intervals.",
            "",
            "| defence | clean accuracy | attacked accuracy | seconds a clip |",
            "|---|--:|--:|--:|",
            *rows,
            "",
            f"`make score` on {result['device']}, {versions}.",
        ]
    )


def render(readme: str) -> str:
    """The README with its generated parts made anew."""
    tables = {"accuracy": accuracy_table(json.loads((RESULTS / "tiny-prior.json").read_text()))}
    for name, table in tables.items():
        part = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
        readme, found = part.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", readme)
        if found != 1:
            raise ValueError(f"README.md has {found} parts named {name}; expected 1")
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where README.md differs, and write nothing")
    written = README.read_text()
    rendered = render(written)
    if parser.parse_args().check:
        sys.exit("README.md differs from bench/results/: run make report" if rendered != written else 0)
    README.write_text(rendered)


if __name__ == "__main__":
    main()
