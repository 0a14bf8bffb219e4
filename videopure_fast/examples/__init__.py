"""Short programs to copy from: `python -m videopure_fast.examples.NAME --help`, for each module NAME of this folder."""
