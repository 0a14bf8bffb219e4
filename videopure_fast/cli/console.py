"""The console that commands print to, and how they write a time."""

from __future__ import annotations

from rich.console import Console

# Markup is off: brackets in file names and versions are printed as they are.
console = Console(markup=False, highlight=False, soft_wrap=True)


def format_seconds(seconds: float) -> str:
    """Rounded to a whole second: "1:15", or with hours "2:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
