"""`python -m videopure_fast` runs the command line."""

from .cli import main

main()
