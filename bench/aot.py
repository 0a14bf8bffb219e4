"""Compile every kernel for GPUs that are not here, and fail on what would be slow or would not start: `make aot`.

Launches the real launchers of kernels/ on tensors of the meta device, for sm_80 and sm_90, at every shape that the
models give them (aot_cases.py). Triton compiles what each launch asks for, with its own choice of types, tiles and
options; nothing runs. The sources in csrc/ are compiled by nvcc, for sm_100 too. The machine code then says what it
needs (aot_machine_code.py): registers, shared memory, spills, stack, tensor-core instructions, occupancy.

A row fails that has spills, needs more shared memory than a block can have, multiplies half-precision tiles outside the
tensor cores (on sm_90, of 64 rows or more, without HGMMA), whose HGMMA ptxas has serialized, that keeps no promise of
its source (tensor descriptors: TMA; several stages: cp.async), or that did not launch or compile. With any such row the
exit status is 1; it is 2 where triton or its tools are missing and nothing could be checked.

`make aot-3.6` does the same with triton 3.6.0 and the ptxas in it, the oldest version that is supported: what ptxas
makes of a kernel differs between versions, and so does what it serializes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import aot_machine_code
import torch
from aot_cases import Case, cases
from aot_launches import TritonKernel, compile_kernel, launches, triton
from aot_machine_code import Needs, Promises, demangled, failures, half_precision_dot_rows, inspect, occupancy
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from videopure_fast.files import atomic_write
from videopure_fast.ops import backend

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "aot.json"

TRITON_ARCHITECTURES = (80, 90)
CUDA_ARCHITECTURES = (80, 90, 100)
Row = dict[str, Any]


class CudaSource(NamedTuple):
    architecture: int
    path: Path


class Job(NamedTuple):
    """Code to compile; the first case that launches it, its dtypes, and the ops and shapes of all cases that do."""

    code: TritonKernel | CudaSource
    case: str
    dtype: str
    shapes: list[str]


def triton_jobs(wanted: list[Case], architectures: list[int]) -> tuple[list[Job], list[Row]]:
    """A job for each different kernel; and a row for each case that does not launch."""
    jobs: dict[TritonKernel, Job] = {}
    broken: list[Row] = []
    for architecture in architectures:
        for case in wanted:
            with launches(architecture) as kernels:
                try:
                    backend.implementation(case.op, "triton")(*case.arguments)
                except Exception as error:
                    broken.append(broken_row(case.op, architecture, str(case), case.dtype(), "launch", error))
            for kernel in kernels:
                shapes = jobs.setdefault(kernel, Job(kernel, str(case), case.dtype(), [])).shapes
                if case.shape() not in shapes:
                    shapes.append(case.shape())
    return list(jobs.values()), broken


def broken_row(kernel: str, architecture: int, config: str, dtype: str, act: str, error: Exception) -> Row:
    reason = f"does not {act}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return {"kernel": kernel, "arch": architecture, "config": config, "dtype": dtype, "failures": [reason]}


def compiled(job: Job) -> tuple[list[Row], float]:
    """The rows of a job, and its seconds of processor time."""
    began = sum(os.times()[:4])
    code = job.code
    try:
        rows = triton_rows(job, code) if isinstance(code, TritonKernel) else cuda_rows(code)
    except Exception as error:
        rows = [broken_job(job, error)]
    return rows, sum(os.times()[:4]) - began


def broken_job(job: Job, error: Exception) -> Row:
    return broken_row(name_of(job.code), job.code.architecture, job.case, job.dtype, "compile", error)


def name_of(code: TritonKernel | CudaSource) -> str:
    if isinstance(code, CudaSource):
        return code.path.name
    return f"{code.module.rpartition('.')[2]}.{code.function}"


def triton_rows(job: Job, kernel: TritonKernel) -> list[Row]:
    binary = compile_kernel(kernel)
    specialization = json.loads(kernel.specialization)
    config = f"{job.case} {job.dtype}; {configuration(specialization)}"
    kept = promises(specialization, half_precision_dot_rows(binary.asm["ttir"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        (needs,) = inspect(path, kernel.architecture).values()
    needs = needs._replace(shared=needs.shared + binary.metadata.shared)
    return [row(name_of(kernel), kernel.architecture, config, job.dtype, needs, kept, job.shapes)]


def cuda_rows(source: CudaSource) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "source.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{source.architecture}", "-Werror=all-warnings", "-cubin"]
        done = subprocess.run([*command, "-o", str(cubin), str(source.path)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found = inspect(cubin, source.architecture)
    rows = []
    for mangled, needs in found.items():
        name = demangled(mangled)
        dtype = re.search(r"<(.*)>", name)
        config = f"{name}, {needs.warps} warps"
        kernel = f"{source.path.name} {name}"
        rows.append(row(kernel, source.architecture, config, dtype[1] if dtype else "", needs, Promises(), []))
    return rows


def configuration(specialization: dict[str, Any]) -> str:
    """The constants by the names of the kernel's parameters, then warps and stages."""
    names = list(specialization["signature"])
    constants = zip(specialization["constant_keys"], specialization["constant_vals"], strict=True)
    tile = " ".join(f"{names[path[0]]}={value}" for path, value in constants)
    options = specialization["options"]
    return f"{tile}; {options['num_warps']} warps, {options['num_stages']} stages"


def promises(specialization: dict[str, Any], dots: list[int]) -> Promises:
    """What the types and options of a launch promise. Rows are aligned where their strides are multiples of 16.

    Triton writes down which numbers are; a number 1 is a constant, and the stride of a broadcast row.
    """
    types = specialization["signature"]
    names = list(types)
    divisible = {
        names[path[0]]
        for path, attributes in zip(specialization["attrs_keys"], specialization["attrs_vals"], strict=True)
        if ["tt.divisibility", 16] in attributes
    }
    strides = {name for name in names if "_stride_" in name and types[name] != "constexpr"}
    staged = specialization["options"]["num_stages"] > 1
    return Promises(
        dots=dots,
        tma=any(str(kind).startswith("tensordesc") for kind in types.values()),
        cp_async=bool(dots) and staged and strides <= divisible,
    )


def row(
    kernel: str, architecture: int, config: str, dtype: str, needs: Needs, kept: Promises, shapes: list[str]
) -> Row:
    return {
        "kernel": kernel,
        "arch": architecture,
        "config": config,
        "dtype": dtype,
        "registers": needs.registers,
        "shared": needs.shared,
        "spills": needs.spills,
        "stack": needs.stack,
        "matrix": needs.matrix,
        "wgmma": needs.wgmma._asdict(),
        "tma": needs.tma._asdict(),
        "cp_async": needs.cp_async,
        "occupancy": occupancy(needs, architecture),
        "shapes": shapes,
        "failures": failures(needs, architecture, kept),
    }


def write(rows: list[Row], path: Path) -> None:
    """The versions of the compilers, and one row a line, as JSON."""
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else ""
    release = re.search(r"release [\d.]+, V([\d.]+)", nvcc)
    versions = {"triton": triton.__version__, "torch": torch.__version__, "nvcc": release and release[1]}
    lines = ",\n".join(json.dumps(row) for row in rows)
    with atomic_write(path) as partial:
        partial.write_text(f'{{"versions": {json.dumps(versions)},\n"rows": [\n{lines}\n]}}\n')


def show(rows: list[Row], seconds: dict[str, float], num_worst: int = 12) -> None:
    """Print a table of each kernel's totals, then one of the worst rows."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    totals = Table(title="Kernels")
    for heading in ("kernel", "compiled", "failing", "registers", "shared KiB", "occupancy", "CPU s"):
        totals.add_column(heading, justify="left" if heading == "kernel" else "right")
    for kernel in sorted({row["kernel"].split()[0] for row in rows}):
        own = [row for row in rows if row["kernel"].split()[0] == kernel]
        compiled_rows = [row for row in own if "registers" in row]
        totals.add_row(
            kernel,
            str(len(own)),
            str(sum(bool(row["failures"]) for row in own)),
            str(max((row["registers"] for row in compiled_rows), default="")),
            str(max((row["shared"] // 1024 for row in compiled_rows), default="")),
            str(min((row["occupancy"] for row in compiled_rows if row["occupancy"]), default="")),
            f"{seconds.get(kernel, 0):.0f}",
        )
    console.print(totals)

    worst = Table(title=f"The {min(num_worst, len(rows))} worst of {len(rows)} rows")
    columns = ("registers", "shared", "spills", "stack", "matrix", "occupancy")
    for heading in ("kernel", "sm", *columns, "config"):
        worst.add_column(heading, justify="right" if heading in columns else "left", overflow="fold")
    for entry in sorted(rows, key=badness, reverse=True)[:num_worst]:
        values = (str(entry.get(column, "")) for column in columns)
        worst.add_row(entry["kernel"], str(entry["arch"]), *values, entry["config"])
    console.print(worst)


def badness(row: Row) -> tuple[float, ...]:
    """The order of rows from the best to the worst: failures, spills, low occupancy, registers."""
    return len(row["failures"]), row.get("spills", 0), -(row.get("occupancy") or 0.0), row.get("registers", 0)


def run(jobs: list[Job], processes: int) -> Iterator[tuple[Job, list[Row], float]]:
    """Each job with its rows and seconds of processor time, in the order in which they finish."""
    if processes == 1:
        yield from ((job, *compiled(job)) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compiled, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                rows, seconds = future.result()
            except BrokenProcessPool as error:  # the compiler crashed, in this job or in another one running
                rows, seconds = [broken_job(job, error)], 0.0
            yield job, rows, seconds


def missing() -> str | None:
    """What this machine lacks to compile kernels and read their machine code, as a sentence, or None."""
    if triton is None:
        return "triton is not installed; pip install triton"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, with which nothing is compiled; unset it"
    for name in ("cuobjdump", "nvdisasm"):
        if aot_machine_code.find_tool(name) is None:
            return f"{name} is neither in triton's wheel nor on PATH; install triton from its wheel or CUDA's tools"
    return None


def main(arguments: list[str] | None = None) -> int:
    ops = [op for op, forms in backend.SUPPORTED_DTYPES.items() if "triton" in forms]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python bench/aot.py                           every case: half an hour of processor time\n"
        "  python bench/aot.py --sample                  one case of each op: a quick check\n"
        "  python bench/aot.py --kernel geglu --arch 90  one op on one architecture",
    )
    parser.add_argument("--kernel", metavar="NAME", choices=ops, help=f"only this op: {', '.join(ops)}")
    parser.add_argument(
        "--arch", type=int, choices=CUDA_ARCHITECTURES, help="only this architecture; 100 is for csrc/ only"
    )
    parser.add_argument(
        "--sample", action="store_true", help="the first case of each op only, and csrc/ for sm_90 only"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"the rows as JSON (a full run: {RESULTS.relative_to(ROOT)})"
    )
    options = parser.parse_args(arguments)
    if lacks := missing():
        print(f"Nothing was checked: {lacks}", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    whole = not (options.kernel or options.arch or options.sample)

    wanted = [case for case in cases() if options.kernel in (None, case.op)]
    if options.sample:
        wanted = list({case.op: case for case in reversed(wanted)}.values())
    jobs, rows = triton_jobs(wanted, [a for a in TRITON_ARCHITECTURES if options.arch in (None, a)])
    if shutil.which("nvcc"):
        sources = [path for path in sorted((ROOT / "csrc").glob("*.cu")) if options.kernel in (None, path.stem)]
        chosen = [a for a in CUDA_ARCHITECTURES if options.arch in (None, a) and (a == 90 or not options.sample)]
        jobs += [Job(CudaSource(a, path), "", "", []) for path in sources for a in chosen]
    else:
        print("nvcc is not on PATH: the sources in csrc/ are left out", file=sys.stderr)

    seconds: dict[str, float] = {}
    for job, found, taken in tqdm(run(jobs, options.jobs), total=len(jobs), unit="kernel", disable=None):
        rows += found
        seconds[name_of(job.code)] = seconds.get(name_of(job.code), 0.0) + taken
    rows.sort(key=lambda row: (row["kernel"], row["arch"], row["dtype"], row["config"]))
    if out := options.out or (RESULTS if whole else None):
        write(rows, out)
    show(rows, seconds)
    failing = [row for row in rows if row["failures"]]
    for entry in failing:
        where = f"{entry['kernel']} sm_{entry['arch']} {entry['config']}"
        print(f"FAILED {where}: {'; '.join(entry['failures'])}")
    print(f"{len(rows)} kernels, {len(failing)} of them failing")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
