"""A run over a folder by two workers that count, on Ray: kill_driver.py VIDEOS OUT LOG [ADDRESS].

It imports no torch, and so begins soon."""

import functools
import sys
from pathlib import Path

from videopure_fast.scale.cluster import Pool, connected, run_on_ray
from videopure_fast.scale.driver import purify_dataset
from videopure_fast.scale.sources import folder_jobs

WORKERS = 2


def make_worker(out, log):
    from scale_files import CountingWorker, small_recipe

    return CountingWorker(small_recipe(out, threads=1), log)


def main(videos, out, log, address=None):
    with connected(address, cpus=WORKERS):
        make = functools.partial(make_worker, Path(out), log)
        run = functools.partial(run_on_ray, make_worker=make, pool=Pool(WORKERS, 1, 0))
        print(purify_dataset(folder_jobs(Path(videos), ".mp4"), Path(out), {"tests": "alike"}, run))


if __name__ == "__main__":
    main(*sys.argv[1:])
