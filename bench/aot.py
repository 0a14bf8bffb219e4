"""Compile every kernel for GPUs that are not here, and fail on what would be slow or would not start: `make aot`.

Launches the real launchers of kernels/ on tensors of the meta device, for sm_80 and sm_90, at every shape that the
models give them. Triton compiles what each launch asks for, with its own choice of types, tiles and options; nothing
runs. The sources in csrc/ are compiled by nvcc, for sm_100 too. The machine code then says what it needs:

registers   of a thread
shared      bytes of shared memory a block, without the KiB that the system takes of it from sm_90 on
spills      instructions that load from or store to local memory (LDL, STL)
stack       bytes of local memory a thread
matrix      the instructions of the tensor cores, and how many of them stand in the code
occupancy   the share of an SM's 64 warps that can be resident: the blocks for which registers (65,536 an SM, given to
            each warp in units of 256), shared memory (164 KiB on sm_80, else 228, less 1 KiB a block) and the limit of
            32 blocks suffice, times the warps of one

A row fails that has spills, needs more shared memory than a block can have, multiplies half-precision tiles of 64 rows
or more on sm_90 without HGMMA, or did not launch or compile. With any such row the exit status is 1; it is 2 where
triton or its tools are missing and nothing could be checked.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from videopure_fast.ops import backend
from videopure_fast.tiny.models import UNET_CONFIG, VAE_CONFIG

try:
    import triton
    from triton.backends.compiler import GPUTarget
except ImportError:
    triton = None

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "aot.json"

TRITON_ARCHITECTURES = (80, 90)
CUDA_ARCHITECTURES = (80, 90, 100)
# Of one block, in bytes. An SM has 1 KiB more, and takes 1 KiB of each block.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_RESERVED = 1024
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of an SM
HGMMA_ROWS = 64

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The default window, shorter clips, a first frame alone, and as many as an attention tile holds.
FRAMES = (32, 24, 16, 1, 64)
# As many clips make tensors of more than 2^31 values, whose sizes are int64 arguments.
MANY_CLIPS = 384


class Level(NamedTuple):
    """One resolution of a model: pixels a side, channels, and the other widths that its resnets normalize there."""

    side: int
    channels: int
    head_size: int
    groups: int
    others: tuple[int, ...] = ()


# text-to-video-ms-1.7b on latents of 28x28: what comes from the level above, and skip connections joined on.
UNET = (
    Level(28, 320, 64, 32, (640, 960)),
    Level(14, 640, 64, 32, (320, 960, 1280, 1920)),
    Level(7, 1280, 64, 32, (640, 1920, 2560)),
    Level(4, 1280, 64, 32, (2560,)),
)
TRANSFORMER_IN = Level(28, 512, 64, 32)
# No model's: heads of 32, and channels that are no multiple of 16.
SMALL_HEADS, ODD = Level(14, 320, 32, 32), Level(7, 150, 50, 5)
# AnimateDiff's motion modules, on Stable Diffusion's UNet: eight heads everywhere.
ANIMATEDIFF = tuple(Level(level.side, level.channels, level.channels // 8, 32) for level in UNET)
# (side, channels) of the VAE, encoder and decoder, for frames of 224x224.
VAE = ((28, 512), (56, 256), (56, 512), (112, 128), (112, 256), (112, 512), (224, 128), (224, 256))
_narrow, _wide = UNET_CONFIG["block_out_channels"]
_tiny = UNET_CONFIG["attention_head_dim"], UNET_CONFIG["norm_num_groups"]
_joined = _narrow + _wide
TINY_UNET = (
    Level(16, _narrow, *_tiny, (2 * _narrow, _joined)),
    Level(8, _wide, *_tiny, (_narrow, _joined, 2 * _wide)),
)
TINY_VAE = tuple((side, channels) for side in (16, 32) for channels in VAE_CONFIG["block_out_channels"])


class Case(NamedTuple):
    """A call of an op's launcher, its tensors on the meta device."""

    op: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        shown = (tuple(value.shape) if isinstance(value, Tensor) else value for value in self.arguments)
        return f"{self.op}({', '.join(map(str, shown))})"

    def shape(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.arguments[0].shape))}"

    def dtype(self) -> str:
        dtypes = dict.fromkeys(value.dtype for value in self.arguments if isinstance(value, Tensor))
        return "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def cases() -> Iterator[Case]:
    """Every op at every width and length, the real UNet's first level in half precision first."""
    for frames in FRAMES:
        yield from latent_cases(frames)
        for dtype in DTYPES:
            for clips, level in [(1, level) for level in (*UNET, TRANSFORMER_IN, SMALL_HEADS, ODD, *TINY_UNET)] + [
                (MANY_CLIPS, UNET[0])
            ]:
                yield from temporal_cases(clips, frames, level, dtype)
                yield from norm_cases(clips, frames, level, dtype)
            for level in ANIMATEDIFF:
                yield from attention_cases(1, frames, level, dtype, with_position=True)
            for groups, sizes in ((32, VAE), (VAE_CONFIG["norm_num_groups"], TINY_VAE)):
                for side, channels in sizes:
                    x = meta(dtype, 1, frames, side, side, channels)
                    affine = meta(dtype, channels), meta(dtype, channels)
                    # Without the activation before the attention, which stands where the frames are smallest.
                    for silu in (True, False) if side == sizes[0][0] else (True,):
                        yield Case("group_norm_silu", (x, *affine, None, groups, 1e-6, False, silu))
                    for outputs in {channels, channels // 2, 2 * channels} & {channels for _, channels in sizes}:
                        yield linear_residual(frames * side * side, channels, outputs, dtype)


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def latent_cases(frames: int) -> Iterator[Case]:
    """float32 latents of the real and the tiny VAE, seven and three votes, noise of any dtype."""
    single = torch.float32
    for votes, clips, side in ((7, 1, 28), (3, 4, 16), (7, 2**17, 28)):
        latents, target = meta(single, votes, clips, 4, frames, side, side), meta(single, clips, 4, frames, side, side)
        flow = meta(single, clips, frames - 1, 2, side, side)
        for dtype in DTYPES:
            noise = meta(dtype, *latents.shape)
            yield Case("guided_update", (latents, noise, target, flow, meta(single, votes, clips, 4), 1.0, 0.1))
            noise = meta(dtype, *target.shape)
            for op in ("ddim_step", "ddim_step_"):
                for first_frame_noise in (False, True):
                    yield Case(op, (target, noise, meta(single, clips, 2), first_frame_noise))


def temporal_cases(clips: int, frames: int, level: Level, dtype: torch.dtype) -> Iterator[Case]:
    """What stands in a temporal transformer and in a temporal convolution."""
    side, channels = level.side, level.channels
    yield from attention_cases(clips, frames, level, dtype, with_position=False)
    tokens = clips * frames * side * side
    x = meta(dtype, tokens, channels)
    for bias in (meta(dtype, 8 * channels), None):
        yield Case("linear_geglu", (x, meta(dtype, 8 * channels, channels), bias))
    yield Case("geglu", (meta(dtype, tokens, 8 * channels),))
    first, last = (meta(dtype, 8 * channels, channels), meta(dtype, 8 * channels)), meta(dtype, channels, 4 * channels)
    vector = meta(dtype, channels)
    yield Case("feed_forward", (x, vector, vector, *first, last, vector, 1e-5))
    # After an attention and a feed-forward, without a bias, and in the shortcut of a resnet.
    yield linear_residual(tokens, channels, channels, dtype)
    yield linear_residual(tokens, channels, channels, dtype, bias=False)
    for inputs in (4 * channels, *level.others):
        yield linear_residual(tokens, inputs, channels, dtype)
    if level is TRANSFORMER_IN:
        yield linear_residual(tokens, channels, UNET[0].channels, dtype)
    if level is not TRANSFORMER_IN:
        x = meta(dtype, clips, frames, side, side, channels)
        vector, weight = meta(dtype, channels), meta(dtype, 3, channels, channels)
        for residual in (None, x):
            yield Case("temporal_conv", (x, vector, vector, weight, vector, residual, level.groups, 1e-5))


def linear_residual(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> Case:
    weight, biases = meta(dtype, outputs, inputs), meta(dtype, outputs) if bias else None
    return Case("linear_residual", (meta(dtype, tokens, inputs), weight, biases, meta(dtype, tokens, outputs)))


def attention_cases(
    clips: int, frames: int, level: Level, dtype: torch.dtype, *, with_position: bool
) -> Iterator[Case]:
    side, channels, heads = level.side, level.channels, level.channels // level.head_size
    yield Case("temporal_attention", (meta(dtype, clips, frames, side, side, 3 * channels), heads))
    x, vector, weight = (
        meta(dtype, clips, frames, side, side, channels),
        meta(dtype, channels),
        meta(dtype, 3 * channels, channels),
    )
    position = meta(dtype, frames, channels) if with_position else None
    yield Case("norm_temporal_attention", (x, vector, vector, weight, position, heads, 1e-5))


def norm_cases(clips: int, frames: int, level: Level, dtype: torch.dtype) -> Iterator[Case]:
    """Of resnets, with the time embedding and without; and without the activation, of both transformers."""

    def case(channels: int, embedding: Tensor | None, eps: float, over_frames: bool, silu: bool) -> Case:
        x = meta(dtype, clips, frames, level.side, level.side, channels)
        affine = meta(dtype, channels), meta(dtype, channels)
        return Case("group_norm_silu", (x, *affine, embedding, level.groups, eps, over_frames, silu))

    for channels in (level.channels, *level.others):
        yield case(channels, None, 1e-5, False, True)
    # Embeddings are columns of those of all resnets.
    yield case(level.channels, meta(dtype, clips, 2 * level.channels)[:, : level.channels], 1e-5, False, True)
    yield case(level.channels, None, 1e-6, False, False)
    yield case(level.channels, None, 1e-6, True, False)


class Target:
    """In place of Triton's driver: an architecture, which serves as the number of the device too, and no GPU."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


class TritonKernel(NamedTuple):
    """What one launch asked Triton to compile. `specialization` is Triton's own JSON of types, constants, options."""

    architecture: int
    module: str
    function: str
    specialization: str


class CudaSource(NamedTuple):
    architecture: int
    path: Path


class Job(NamedTuple):
    """Code to compile; the first case that launches it, its dtypes, and the ops and shapes of all that do."""

    code: TritonKernel | CudaSource
    case: str
    dtype: str
    shapes: list[str]


@contextmanager
def launches() -> Iterator[list[TritonKernel]]:
    """Within this block a launch compiles and runs nothing; what it would have compiled is appended."""
    found = []

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        architecture = triton.runtime.driver.active.get_current_device()
        found.append(TritonKernel(architecture, fn.module, fn.name, compile["specialization_data"]))
        return True  # to Triton: do not compile

    triton.knobs.runtime.jit_cache_hook = record
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = None


def triton_jobs(wanted: list[Case], architectures: list[int]) -> tuple[list[Job], list[dict[str, Any]]]:
    """Each different kernel once; and a row for each case that does not launch."""
    jobs: dict[TritonKernel, Job] = {}
    broken = []
    for architecture in architectures:
        triton.runtime.driver.set_active(Target(architecture))
        for case in wanted:
            with launches() as kernels:
                try:
                    backend.implementation(case.op, "triton")(*case.arguments)
                except Exception as error:
                    broken.append(broken_row(case.op, architecture, str(case), case.dtype(), "launch", error))
            for kernel in kernels:
                shapes = jobs.setdefault(kernel, Job(kernel, str(case), case.dtype(), [])).shapes
                if case.shape() not in shapes:
                    shapes.append(case.shape())
    return list(jobs.values()), broken


def broken_row(kernel: str, architecture: int, config: str, dtype: str, act: str, error: Exception) -> dict[str, Any]:
    reason = f"does not {act}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return {"kernel": kernel, "arch": architecture, "config": config, "dtype": dtype, "failures": [reason]}


def compiled(job: Job) -> tuple[list[dict[str, Any]], float]:
    """The rows of a job, and its seconds of processor time."""
    began = sum(os.times()[:4])
    code = job.code
    try:
        rows = triton_rows(job) if isinstance(code, TritonKernel) else cuda_rows(code)
    except Exception as error:
        rows = [broken_job(job, error)]
    return rows, sum(os.times()[:4]) - began


def broken_job(job: Job, error: Exception) -> dict[str, Any]:
    return broken_row(name_of(job.code), job.code.architecture, job.case, job.dtype, "compile", error)


def name_of(code: TritonKernel | CudaSource) -> str:
    if isinstance(code, CudaSource):
        return code.path.name
    return f"{code.module.rpartition('.')[2]}.{code.function}"


def triton_rows(job: Job) -> list[dict[str, Any]]:
    kernel = job.code
    triton.runtime.driver.set_active(Target(kernel.architecture))
    function = getattr(import_module(kernel.module), kernel.function)
    binary = function.preload(kernel.specialization)
    function.device_caches.clear()  # of hundreds of kernels, a gigabyte
    config = f"{job.case} {job.dtype}; {configuration(json.loads(kernel.specialization))}"
    dots = half_precision_dot_rows(binary.asm["ttir"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        (needs,) = inspect(path, kernel.architecture).values()
    needs = needs._replace(shared=needs.shared + binary.metadata.shared)
    return [row(name_of(kernel), kernel.architecture, config, job.dtype, needs, dots, job.shapes)]


def cuda_rows(source: CudaSource) -> list[dict[str, Any]]:
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
        rows.append(row(kernel, source.architecture, config, dtype[1] if dtype else "", needs, [], []))
    return rows


def demangled(symbol: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters; the symbol if there is no c++filt."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |\b\w+::|\(.*$", "", name.replace("(anonymous namespace)::", ""))


def configuration(specialization: dict[str, Any]) -> str:
    """Tile, warps and stages: the constants by the names of the kernel's arguments, and two options."""
    names = list(specialization["signature"])
    constants = zip(specialization["constant_keys"], specialization["constant_vals"], strict=True)
    tile = " ".join(f"{names[path[0]]}={value}" for path, value in constants)
    options = specialization["options"]
    return f"{tile}; {options['num_warps']} warps, {options['num_stages']} stages"


def half_precision_dot_rows(ttir: str) -> list[int]:
    """The rows of each matrix product of float16 or bfloat16 in Triton's first intermediate form."""
    operands = re.findall(r"= tt\.dot .*: tensor<((?:\d+x)+)b?f16\b.*> \* ", ttir)
    return [int(shape.split("x")[-3]) for shape in operands]


class Needs(NamedTuple):
    """Of one kernel, read from its machine code; see the top of this file. Shared memory is the static part."""

    registers: int
    shared: int
    stack: int
    spills: int
    matrix: str
    warps: int | None


def inspect(cubin: Path, architecture: int) -> dict[str, Needs]:
    """What each kernel of a cubin needs, by its symbol."""
    return parse(tool("cuobjdump", "-res-usage", cubin), tool("nvdisasm", cubin), architecture)


def parse(usage: str, assembly: str, architecture: int) -> dict[str, Needs]:
    """From the output of `cuobjdump -res-usage` and that of `nvdisasm`."""
    needs = {}
    for name, registers, stack, shared in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        code = section(assembly, f".text.{name}")
        block = re.search(
            r"EIATTR_(?:MAX_THREADS|REQNTID)\s(?:.*\n)*?" + r".*\.word\s+(\w+)\n" * 3,
            section(assembly, f".nv.info.{name}"),
        )
        threads = math.prod(int(size, 16) for size in block.groups()) if block else None
        opcodes = re.findall(r"\b(HGMMA|HMMA|IMMA|DMMA|UTC\w*MMA|LDL|STL)\b", code)
        matrix = {opcode: opcodes.count(opcode) for opcode in dict.fromkeys(opcodes) if opcode.endswith("MMA")}
        needs[name] = Needs(
            registers=int(registers),
            # From sm_90 on the tool counts the system's part, where a kernel has one of its own.
            shared=max(0, int(shared) - SHARED_RESERVED) if architecture >= 90 else int(shared),
            stack=int(stack),
            spills=opcodes.count("LDL") + opcodes.count("STL"),
            matrix=" ".join(f"{opcode} x{count}" for opcode, count in matrix.items()),
            warps=threads and threads // 32,
        )
    return needs


def section(assembly: str, name: str) -> str:
    """The text of one section of nvdisasm's output."""
    match = re.search(rf"^\t\.section\t{re.escape(name)},.*?(?=^\t\.section\t|\Z)", assembly, re.MULTILINE | re.DOTALL)
    return match[0] if match else ""


def tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([find_tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def find_tool(name: str) -> str | None:
    """Of NVIDIA's binary tools, the one in triton's wheel or else the one on PATH."""
    wheel = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return shutil.which(name, path=wheel) or shutil.which(name)


def row(
    kernel: str, architecture: int, config: str, dtype: str, needs: Needs, dots: list[int], shapes: list[str]
) -> dict[str, Any]:
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
        "occupancy": occupancy(needs, architecture),
        "shapes": shapes,
        "failures": failures(needs, architecture, dots),
    }


def failures(needs: Needs, architecture: int, dots: list[int]) -> list[str]:
    """Why a kernel does not pass, in sentences."""
    found = []
    if needs.spills or needs.stack:
        found.append(f"spills: {needs.spills} loads and stores of local memory, a stack of {needs.stack} bytes")
    if needs.shared > SHARED_LIMIT[architecture]:
        limit = SHARED_LIMIT[architecture] // 1024
        found.append(f"needs {needs.shared / 1024:.0f} KiB of shared memory, a block has {limit} on sm_{architecture}")
    if architecture >= 90 and max(dots, default=0) >= HGMMA_ROWS and "HGMMA" not in needs.matrix:
        found.append(f"multiplies half-precision tiles of {max(dots)} rows without HGMMA ({needs.matrix or 'none'})")
    return found


def occupancy(needs: Needs, architecture: int) -> float | None:
    """The formula at the top of this file; None for a kernel without a bound on its threads."""
    if not needs.warps:
        return None
    registers_a_warp = math.ceil(needs.registers * 32 / 256) * 256
    blocks = min(
        REGISTERS // (registers_a_warp * needs.warps),
        (SHARED_LIMIT[architecture] + SHARED_RESERVED) // (needs.shared + SHARED_RESERVED),
        WARPS // needs.warps,
        BLOCKS,
    )
    return round(blocks * needs.warps / WARPS, 3)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """One row a line, whole or not at all."""
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else ""
    release = re.search(r"release [\d.]+, V([\d.]+)", nvcc)
    versions = {"triton": triton.__version__, "torch": torch.__version__, "nvcc": release and release[1]}
    lines = ",\n".join(json.dumps(row) for row in rows)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f'{{"versions": {json.dumps(versions)},\n"rows": [\n{lines}\n]}}\n')
    os.replace(partial, path)


def show(rows: list[dict[str, Any]], seconds: dict[str, float], most: int = 12) -> None:
    """Each kernel's totals, then the worst rows."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    totals = Table(title="Kernels")
    for heading in ("kernel", "compiled", "failing", "registers", "shared KiB", "occupancy", "CPU s"):
        totals.add_column(heading, justify="left" if heading == "kernel" else "right")
    for kernel in sorted({row["kernel"].split()[0] for row in rows}):
        own = [row for row in rows if row["kernel"].split()[0] == kernel]
        sound = [row for row in own if "registers" in row]
        totals.add_row(
            kernel,
            str(len(own)),
            str(sum(bool(row["failures"]) for row in own)),
            str(max((row["registers"] for row in sound), default="")),
            str(max((row["shared"] // 1024 for row in sound), default="")),
            str(min((row["occupancy"] for row in sound if row["occupancy"]), default="")),
            f"{seconds.get(kernel, 0):.0f}",
        )
    console.print(totals)

    worst = Table(title=f"The {min(most, len(rows))} worst of {len(rows)} rows")
    columns = ("registers", "shared", "spills", "stack", "matrix", "occupancy")
    for heading in ("kernel", "sm", *columns, "config"):
        worst.add_column(heading, justify="right" if heading in columns else "left", overflow="fold")
    for entry in sorted(rows, key=badness, reverse=True)[:most]:
        values = (str(entry.get(column, "")) for column in columns)
        worst.add_row(entry["kernel"], str(entry["arch"]), *values, entry["config"])
    console.print(worst)


def badness(row: dict[str, Any]) -> tuple[float, ...]:
    return len(row["failures"]), row.get("spills", 0), -(row.get("occupancy") or 0.0), row.get("registers", 0)


def run(jobs: list[Job], processes: int) -> Iterator[tuple[Job, list[dict[str, Any]], float]]:
    """Each job with its rows and seconds, as they come."""
    if processes == 1:
        yield from ((job, *compiled(job)) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compiled, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                rows, seconds = future.result()
            except BrokenProcessPool as error:  # the compiler crashed, in this job or in one beside it
                rows, seconds = [broken_job(job, error)], 0.0
            yield job, rows, seconds


def missing() -> str | None:
    """What this machine lacks for the gate, or None."""
    if triton is None:
        return "triton is not installed; pip install triton"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, with which nothing is compiled; unset it"
    for name in ("cuobjdump", "nvdisasm"):
        if find_tool(name) is None:
            return f"{name} is neither in triton's wheel nor on PATH; install triton from its wheel or CUDA's tools"
    return None


def main(arguments: list[str] | None = None) -> int:
    ops = [op for op, forms in backend.SUPPORTED_DTYPES.items() if "triton" in forms]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python bench/aot.py                      everything: half an hour of processor time\n"
        "  python bench/aot.py --sample             one case of each op: the quick test\n"
        "  python bench/aot.py --kernel geglu --arch 90  while you work on one op",
    )
    parser.add_argument("--kernel", metavar="NAME", choices=ops, help=f"this op alone: {', '.join(ops)}")
    parser.add_argument(
        "--arch", type=int, choices=CUDA_ARCHITECTURES, help="this architecture alone; 100 is for csrc/ alone"
    )
    parser.add_argument("--sample", action="store_true", help="of each op only the first case, of csrc/ only sm_90")
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
