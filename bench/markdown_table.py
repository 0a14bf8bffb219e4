"""Tables of the generated pages."""

from __future__ import annotations


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return [f"|{'|'.join(rule)}|" if row is rule else f"| {' | '.join(row)} |" for row in (header, rule, *lines)]
