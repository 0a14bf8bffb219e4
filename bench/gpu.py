"""Time whole purifications, their stages and their ops on one GPU: python bench/gpu.py, or `make gpu`.

Random weights in the shape of ModelScope's text-to-video UNet and Stable Diffusion's VAE, made on the GPU in float16;
random clips; T=5. Nothing is downloaded.

Stages:
  test     the test suite's GPU cases: pytest -m gpu tests
  bench    ceilings of the machine, each op, each way to purify that needs no compiler, and the stages of a call
  compile  the ways to purify under torch.compile(mode="max-autotune")

A row is kept only if what was timed is correct: an op agrees with its float32 reference, and the votes of a
purification are no further from a float32 run than 1.25 times those of the authors' algorithm in the same precision. A
row that fails says why, and does not stop the rest. Every row is written as soon as it is measured; a later run goes on
where the last one ended, unless the sources have changed or --again is given.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a run that was cut off has compiled and tuned serves the next one. torch reads the variable.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))
sys.path.insert(0, str(ROOT))  # these sources are measured, installed or not

import torch  # noqa: E402
from baselines import PATHS  # noqa: E402
from bench_ops import ACTIVATIONS, MAX_SHARE_APART, OPS, TOLERANCE  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from gpu_models import DTYPE, BenchModels, Workload  # noqa: E402
from gpu_runner import GateFailed, Row, Task, run_tasks  # noqa: E402
from gpu_table import print_table  # noqa: E402
from gpu_timing import count_launches, graph_of, seconds_of, timed  # noqa: E402
from op_baselines import LIBRARY, from_library_layout, in_library_layout  # noqa: E402
from torch import Tensor  # noqa: E402

from videopure_fast import Purifier, ops  # noqa: E402
from videopure_fast.machine import PeakMemory  # noqa: E402
from videopure_fast.measure.profile import measure_roofline  # noqa: E402
from videopure_fast.ops.backend import SUPPORTED_DTYPES, full_float32, implementation, use_backend  # noqa: E402

STAGES = ("test", "bench", "compile")
USUAL_PATHS = ("authors", "authors-xformers", "algebra", "algebra-captured", "ours-eager", "ours")
COMPARED_PATHS = ("authors", "algebra", "ours")  # at another size, and with another flow
STAGED_PATHS = ("algebra", "ours")
COMPILED_PATHS = ("algebra-compiled", "authors-compiled")


def tasks(models: BenchModels, chosen: tuple[str, ...], batches: list[int]) -> list[Task]:
    """The rows of the chosen stages, in the order in which they are measured."""
    frames, side = (4, 16) if models.quick else (32, 224)
    usual = [Workload(n, frames, side, side) for n in batches]
    single = [workload for workload in usual if workload.clips == 1]
    other = [Workload(1, frames // 2, side * 8 // 7, side * 8 // 7)] if single else []
    raft = [workload._replace(flow="raft") for workload in single]
    on_cpu = models.device.type == "cpu"
    found = []

    def add(stage: str, name: str, run: Callable[..., Row], *arguments: Any) -> None:
        if stage in chosen:
            found.append(Task(name, stage, partial(run, *arguments)))

    if not on_cpu:
        add("test", "gpu tests", gpu_tests)
    add("bench", "ceiling: copies", copy_ceiling, models)
    add("bench", "ceiling: matrix products", matrix_ceiling, models)
    purified = [(workload, path) for workload in usual for path in USUAL_PATHS]
    purified += [(workload, path) for workload in (*other, *raft) for path in COMPARED_PATHS]
    for workload, path in purified:
        add("bench", f"purification: {path}, {workload}", purification, models, path, workload)
    for workload in usual:
        for path in STAGED_PATHS:
            add("bench", f"stages: {path}, {workload}", stages, models, path, workload)
    for size in ("small",) if models.quick else ACTIVATIONS:
        for make in OPS:
            op = make.__name__
            native = [form for form in SUPPORTED_DTYPES[op] if (form == "cpu") == on_cpu]
            for form in ("reference", *(("library",) if op in LIBRARY else ()), *native):
                add("bench", f"op: {op}, {size}, {form}", op_row, models, make, size, form)
    for workload in usual[:1] if models.quick else usual:
        for path in COMPILED_PATHS:
            add("compile", f"purification: {path}, {workload}", purification, models, path, workload)
    return found


# The rows


def gpu_tests() -> Row:
    """Runs the GPU cases of the test suite; GateFailed if one fails, or if none ran."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        if not report.exists():
            raise GateFailed("pytest ended without a report")
        suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    if counts["failures"] or counts["errors"] or counts["tests"] == counts["skipped"]:
        raise GateFailed(", ".join(f"{count} {name}" for name, count in counts.items()))
    return {**counts, "seconds": float(suite.get("time", 0))}


def copy_ceiling(models: BenchModels) -> Row:
    return {"bytes_per_second": measure_roofline(models.device, DTYPE).copy}


def matrix_ceiling(models: BenchModels) -> Row:
    return {"flops_per_second": measure_roofline(models.device, DTYPE).matrix, "dtype": name_of(DTYPE)}


def purification(models: BenchModels, path: str, workload: Workload) -> Row:
    """One way to purify, from clips to all votes. peak_memory: bytes, weights included."""
    device = models.device
    models.expected(workload)  # cached: must not be made while memory is measured
    models.free_memory()
    memory = PeakMemory(device)
    purifier = models.purifier(workload)
    compiler = {"compiler": "eager"} if models.quick and path in COMPILED_PATHS else {}
    purify = PATHS[path](purifier, **compiler)
    clips = models.clips(workload)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first_call = seconds_of(lambda: purify(clips).cpu())
        votes = purify(clips)
    errors = models.check_votes(workload, votes)
    del votes
    timing = timed(lambda: purify(clips), device, seconds=8, quick=models.quick)
    row = {
        "path": path,
        **describe(workload),
        "steps": purifier.config.inversion_steps,
        **timing._asdict(),
        "clips_per_second": workload.clips / timing.median,
        "first_call": first_call,
        "peak_memory": memory.read(),
        **errors,
        "warnings": sorted({str(warning.message).splitlines()[0] for warning in caught})[:3],
    }
    return row | (count_launches(lambda: purify(clips), device) if workload.clips == 1 else {})


def stages(models: BenchModels, path: str, workload: Workload) -> Row:
    """The stages of a call, each timed alone on what the stages before it made."""
    purifier = models.purifier(workload, fast=path == "ours")
    clips = models.clips(workload)
    errors = models.check_votes(workload, purifier(clips, return_votes=True))
    row: Row = {"path": path, **describe(workload), **errors, "stages": {}}
    with torch.no_grad(), full_float32(models.device):
        for stage, call in stage_calls(purifier, clips).items():
            call()
            row["stages"][stage] = timed(call, models.device, seconds=3, quick=models.quick)._asdict()
    return row


def stage_calls(purifier: Purifier, clips: Tensor) -> dict[str, Callable[[], Any]]:
    """Stage -> a call that runs it. "chain": inversion and denoising, captured where the purifier captures them."""
    target, flow = purifier.encode(clips), purifier.latent_flow(clips)
    states, noise_preds = purifier.denoise(target)
    votes = purifier.vote(states, noise_preds, target, flow)
    return {
        "encode": lambda: purifier.encode(clips),
        "chain": lambda: purifier.denoise(target),
        "flow": lambda: purifier.latent_flow(clips),
        "guidance": lambda: purifier.vote(states, noise_preds, target, flow),
        "decode": lambda: purifier.decode(votes),
    }


def op_row(models: BenchModels, make: Callable[..., Any], size: str, form: str) -> Row:
    """One form of an op: "library", or a backend. Times are of one call, as a CUDA graph where it can be one.

    make: one of bench_ops.OPS. bytes: what the op must read and write.
    """
    device, library = models.device, form == "library"
    dtype = DTYPE if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    op, tensors, settings = make(size, str(device), dtype)
    wide = (None if t is None else t.float() for t in tensors)
    with torch.no_grad(), full_float32(device):
        expected = implementation(op, "reference")(*wide, **settings)
    bytes_moved = sum(t.nbytes for t in tensors if t is not None) + expected.numel() * tensors[0].element_size()
    # One input over and over would be read from the cache.
    copies = copies_beyond_cache(device, bytes_moved)
    inputs = [tensors, *(make(size, str(device), dtype)[1] for _ in range(copies - 1))]
    if library:
        inputs = [in_library_layout(op, each) for each in inputs]
    run = partial(LIBRARY[op] if library else getattr(ops, op), **settings)

    def run_all() -> None:
        for each in inputs:
            run(*each)

    with torch.no_grad(), use_backend("auto" if library else form):
        result = run(*inputs[0])
        check_op(op, from_library_layout(op, result, tensors[0]) if library else result, expected, dtype)
        run_all()
        eager = timed(run_all, device, seconds=0.3, quick=models.quick)
        capturable = device.type == "cuda" and not (library and op == "guided_update")  # autograd cannot be captured
        replay = graph_of(run_all) if capturable else None
        timing = eager if replay is None else timed(replay, device, seconds=0.3, quick=models.quick)
    median = timing.median / copies
    return {
        **{"op": op, "form": form, "size": size, "shape": list(expected.shape), "dtype": name_of(dtype)},
        **{"median": median, "iqr": timing.iqr / copies, "rounds": timing.rounds, "captured": replay is not None},
        "eager_median": eager.median / copies,
        "bytes": bytes_moved,
        "bytes_per_second": bytes_moved / median,
    }


def check_op(op: str, result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """GateFailed where values differ from the float32 reference's by more than the tolerance of the dtype."""
    apart = ~((result - expected).abs() / (1 + expected.abs()) <= TOLERANCE[dtype])
    if apart.float().mean() > (MAX_SHARE_APART if op == "guided_update" else 0):
        raise GateFailed(f"{apart.sum().item()} of {apart.numel()} values differ by more than {TOLERANCE[dtype]}")


def copies_beyond_cache(device: torch.device, size: int) -> int:
    """The number of inputs of `size` bytes that fill the GPU's L2 cache four times; 8 to 64, or 2 on a CPU."""
    if device.type != "cuda":
        return 2
    cache_size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20)
    return max(8, min(64, math.ceil(4 * cache_size / size)))


def describe(workload: Workload) -> Row:
    return {**workload._asdict(), "dtype": name_of(DTYPE)}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The command


def results_file(device: torch.device, quick: bool) -> Path:
    """bench/results/<gpu>.json; a quick run's in build/."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "build" / f"{slug}-quick.json" if quick else ROOT / "bench" / "results" / f"{slug}.json"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="which rows; default: all")
    options.add_argument("--only", metavar="TEXT", help="only rows whose name has this text, such as 'ours' or 'op:'")
    options.add_argument(
        "--clips", type=int, nargs="+", help="clips in a batch; default: 1 and 8, with --quick 1 and 2"
    )
    options.add_argument("--quick", action="store_true", help="a tiny model, to try the script; its times mean nothing")
    options.add_argument("--device", help="cuda (the default), cuda:1, ..., or cpu to try the script without a GPU")
    options.add_argument("--again", action="store_true", help="measure rows anew that are in the file already")
    options.add_argument("--minutes", type=float, default=7.5, help="stop after so many; run again to go on")
    options.add_argument("--out", type=Path, help="results file; default: bench/results/<gpu>.json, --quick in build/")
    return options


def main() -> None:
    options = parser()
    given = options.parse_args()
    logging.set_verbosity_error()  # diffusers warns of every cast
    batches = sorted(set(given.clips or ((1, 2) if given.quick else (1, 8))))
    if batches[0] < 1 or not 0 < given.minutes < math.inf:
        options.error(f"--clips must be 1 or more and --minutes more than 0, got {batches} and {given.minutes}")
    try:
        device = torch.empty(0, device=given.device or "cuda").device
    except (RuntimeError, AssertionError) as error:
        options.error(f"no such device here ({str(error).splitlines()[0]}); --device cpu --quick tries the script")
    if device.type != "cuda" and not given.quick:
        options.error("the full-size model is for a GPU; add --quick")
    if device.type == "cuda":
        torch.cuda.set_device(device)

    models = BenchModels(device, given.quick)
    chosen = STAGES if given.stage == "all" else (given.stage,)
    todo = [task for task in tasks(models, chosen, batches) if (given.only or "") in task.name]
    if not todo:
        options.error(f"no row is named like {given.only!r}; a run without --only names them all")
    file = given.out or results_file(device, given.quick)
    rows = run_tasks(
        todo,
        file,
        device,
        seconds=60 * given.minutes,
        again=given.again,
        shared={"model": "small" if given.quick else "full"},
        cleanup=models.free_memory,
    )
    print_table(rows, [task.name for task in todo])
    print(f"\n{file}")
    sys.exit(any(rows.get(task.name, {}).get("gate_failed") for task in todo))


if __name__ == "__main__":
    main()
