"""Time whole purifications, their stages and their ops on one GPU: python bench/gpu.py, or `make gpu`.

Random weights in the shape of ModelScope's text-to-video UNet and Stable Diffusion's VAE, made on the GPU in float16;
random clips; T=5. Nothing is downloaded.

Stages:
  test     the test suite's GPU cases: pytest -m gpu tests
  bench    ceilings of the machine, each op, each way to purify that needs no compiler, and the stages of a call
  compile  the ways to purify under torch.compile(mode="max-autotune")

A row is kept only if what was timed is right: an op agrees with its float32 reference, and the votes of a purification
are no further from a float32 run than 1.25 times those of the authors' algorithm in the same precision. A row that
fails says why, and does not stop the rest. Every row is written as soon as it is there; a later run goes on where the
last one ended, unless the sources have changed or --again is given.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# What was compiled and tuned by a run that was cut off serves the next.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))
sys.path.insert(0, str(ROOT))  # these sources are measured, installed or not

import torch  # noqa: E402  (reads the variable)
import torch.nn.functional as F  # noqa: E402
from baselines import PATHS  # noqa: E402
from bench_ops import ACTIVATIONS, MAX_SHARE_APART, OPS, TOLERANCE  # noqa: E402
from diffusers import AutoencoderKL, UNet3DConditionModel  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from videopure_fast import Purifier, PurifyConfig, ops, reference  # noqa: E402
from videopure_fast.machine import installed, nvidia_smi  # noqa: E402
from videopure_fast.models.flow import RaftFlow  # noqa: E402
from videopure_fast.ops.backend import SUPPORTED_DTYPES, full_float32, use_backend  # noqa: E402
from videopure_fast.schedule import Schedule  # noqa: E402

STAGES = ("test", "bench", "compile")
SMI_FIELDS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "most_sm_mhz": "clocks.max.sm",
    "most_memory_mhz": "clocks.max.mem",
}
SOURCES = ("videopure_fast", "kernels", "csrc", "bench/*.py")

# Half precision: mean error and share of large errors, against the authors' own.
MOST_ERROR = 1.25
LARGE_ERROR, SHARE_SLACK = 0.05, 1e-4
# A gate whose own yardstick is this far off, or whose truth is this flat, tells nothing.
WORST_YARDSTICK, LEAST_DEVIATION = 0.05, 1e-3

DTYPE = torch.float16
FULL_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
QUICK_UNET = {
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
QUICK_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TOKENS = 77
MOST_NOTE = 90  # characters in the table; the file has all


class Work(NamedTuple):
    clips: int
    frames: int
    height: int
    width: int
    flow: str = "given"

    def __str__(self) -> str:
        shape = "x".join(map(str, self[:4]))
        return shape if self.flow == "given" else f"{self.flow} flow, {shape}"


class Timing(NamedTuple):
    """Of one call: seconds, the interquartile range of the rounds, and how many they were."""

    median: float
    iqr: float
    rounds: int


class Error(NamedTuple):
    """Of votes against float32: the mean, and the share above LARGE_ERROR."""

    mean: float
    share: float


class Task(NamedTuple):
    """One row: its name and what measures it."""

    name: str
    stage: str
    run: Callable[[], dict[str, Any]]


class Wrong(Exception):
    """What was to be timed is not right."""


class OutOfTime(BaseException):  # not an Exception: a library that is working must not swallow it
    pass


# The models and what they are given


def redraw(module: nn.Module) -> nn.Module:
    """Frozen, and without layers that start at zero and would hide what stands before them."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def calibrate(unet: nn.Module, vae: nn.Module, prompt: Tensor, frames: Tensor) -> None:
    """Scale the last layers so that latents and noise have deviation 1, and images 0.25, as trained models' have.

    Else guidance would be as large as the latents, and its signs, which precision flips, all that a vote shows.
    frames: (F, 3, H, W).
    """
    latents = vae.encode(2 * frames - 1).latent_dist.mode()
    _scale(vae.quant_conv, 1 / (vae.config.scaling_factor * latents.std()))
    latents = vae.encode(2 * frames - 1).latent_dist.mode() * vae.config.scaling_factor
    _scale(unet.conv_out, 1 / unet(latents.transpose(0, 1)[None], 1, prompt).sample.std())
    _scale(vae.decoder.conv_out, 0.5 / vae.decode(latents / vae.config.scaling_factor).sample.std())


def _scale(layer: nn.Module, factor: Tensor) -> None:
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


def given_flow(prev: Tensor, next: Tensor) -> Tensor:
    """A turn of a few pixels about the middle, whatever the frames: an estimator that costs next to nothing."""
    height, width = prev.shape[-2:]
    y = torch.linspace(-4, 4, height, device=prev.device)[:, None].expand(height, width)
    x = torch.linspace(-4, 4, width, device=prev.device).expand(height, width)
    return torch.stack([-y, x]).expand(len(prev), 2, height, width)


class Subject:
    """The models under test and what they are given, made when first asked for."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick

    @cached_property
    def models(self) -> tuple[nn.Module, nn.Module, Tensor]:
        """UNet, VAE and prompt embeddings."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            with self.device:
                unet = redraw(UNet3DConditionModel(**(QUICK_UNET if self.quick else {})))
                vae = redraw(AutoencoderKL(**(QUICK_VAE if self.quick else FULL_VAE)))
                prompt = torch.randn(1, TOKENS, unet.config.cross_attention_dim)
                calibrate(unet, vae, prompt, torch.rand(2, 3, 64, 64))
        finally:
            torch.set_default_dtype(before)
        return unet, vae, prompt

    @cached_property
    def raft(self) -> RaftFlow:
        from torchvision.models.optical_flow import raft_large

        torch.manual_seed(0)
        return RaftFlow(raft_large(weights=None).to(self.device))

    def purifier(self, work: Work, dtype: torch.dtype = DTYPE) -> Purifier:
        """On diffusers' modules; in another dtype on copies of them."""
        unet, vae, prompt = self.models
        if dtype != DTYPE:
            unet, vae = (copy.deepcopy(module).to(dtype) for module in (unet, vae))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        config = PurifyConfig(inversion_steps=1 if self.quick else 5, window_overlap=0)
        if self.quick:  # so few latents that one flipped sign would decide the check
            config = replace(config, temporal_weight=0.1 * config.temporal_weight)
        return Purifier(
            unet,
            vae,
            prompt,
            flow=self.raft if work.flow == "raft" else given_flow,
            config=config.rescaled(work.frames, work.height // factor, work.width // factor),
            max_frames=work.frames,
            fast=False,
        )

    def clips(self, work: Work, which: range | tuple[int, ...] | None = None) -> Tensor:
        """Clip i is the same in every batch."""
        shape = (3, *work[1:4])
        seeds = range(work.clips) if which is None else which
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    @cache  # noqa: B019  (there is one subject, for the whole run)
    def truth(self, work: Work, clip: int) -> tuple[Tensor, Error]:
        """One clip's votes in float32, on the CPU, and how far the authors' algorithm in half precision is off."""
        video = self.clips(work, (clip,))
        votes = self.purifier(work, torch.float32)(video, return_votes=True).cpu()
        self.forget()
        if not votes.isfinite().all() or votes.std() < LEAST_DEVIATION:
            raise Wrong(f"the float32 votes have a standard deviation of {votes.std():.1e}: they can tell nothing")
        error = error_of(PATHS["authors"](self.purifier(work))(video), votes)
        if not error.mean <= WORST_YARDSTICK:
            raise Wrong(f"the authors' algorithm in half precision is off by {error.mean:.1e}: a gate of it is none")
        return votes, error

    def forget(self) -> None:
        """Give back what a row left, so that the next row's peak is its own."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def error_of(votes: Tensor, truth: Tensor) -> Error:
    error = (votes.float().cpu() - truth).abs()
    return Error(error.mean().item(), (error > LARGE_ERROR).float().mean().item())


def check_votes(subject: Subject, work: Work, votes: Tensor) -> dict[str, float]:
    """Wrong unless the first and the last clip's votes are right."""
    worst = {"mean_error": 0.0, "mean_error_of_authors": 0.0}
    for clip in sorted({0, work.clips - 1}):
        truth, theirs = subject.truth(work._replace(clips=1), clip)
        if votes[clip].shape != truth[0].shape:
            raise Wrong(f"votes of a clip are {tuple(votes[clip].shape)}, expected {tuple(truth[0].shape)}")
        error = error_of(votes[clip : clip + 1], truth)
        for name, seen, limit in (
            ("mean error", error.mean, MOST_ERROR * theirs.mean),
            (f"share of errors over {LARGE_ERROR}", error.share, MOST_ERROR * theirs.share + SHARE_SLACK),
        ):
            if not seen <= limit:
                raise Wrong(f"clip {clip}: {name} against float32 is {seen:.3g}, accepted: {limit:.3g}")
        if error.mean >= worst["mean_error"]:
            worst = {"mean_error": error.mean, "mean_error_of_authors": theirs.mean}
    return worst


# Clocks


def timed(call: Callable[[], Any], subject: Subject, *, seconds: float) -> Timing:
    """5 to 30 rounds, as many as fit into `seconds`, or 3 of a quick run. The call must be warm."""
    cuda = subject.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    first = _seconds(lambda: (call(), wait()))
    rounds = 3 if subject.quick else max(5, min(30, int(seconds / first)))
    if not cuda:
        return _summary([_seconds(call) for _ in range(rounds)])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        call()
        end.record()
    wait()
    return _summary([start.elapsed_time(end) / 1e3 for start, end in events])


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _summary(samples: list[float]) -> Timing:
    low, _, high = statistics.quantiles(samples, n=4)
    return Timing(statistics.median(samples), high - low, len(samples))


def launches(call: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """What the host enqueued in one call (kernels, copies, whole graphs), and the kernels that ran."""
    if device.type != "cuda":
        return {"launches": None, "kernels": None}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    counts = Counter()
    for event in trace.events():
        on_gpu = event.device_type == DeviceType.CUDA
        counts["kernels"] += on_gpu and not event.name.startswith(("Memcpy", "Memset"))
        counts["launches"] += not on_gpu and bool(re.match(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)", event.name))
    return {name: counts[name] for name in ("launches", "kernels")}


def peak_memory(device: torch.device) -> int | None:
    """Bytes of tensors since the last `forget`, weights included."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


# Rows


def ceiling_of_copies(subject: Subject) -> dict[str, Any]:
    size = 2**24 if subject.quick else 2**31
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=subject.device)
    target = torch.empty_like(source)
    target.copy_(source)
    timing = timed(lambda: target.copy_(source), subject, seconds=1)
    return {**timing._asdict(), "bytes_per_second": 2 * size / timing.median}


def ceiling_of_products(subject: Subject) -> dict[str, Any]:
    n = 256 if subject.quick else 8192
    a, b = (torch.randn(n, n, dtype=DTYPE, device=subject.device) for _ in range(2))
    out = a @ b
    timing = timed(lambda: torch.mm(a, b, out=out), subject, seconds=1)
    return {**timing._asdict(), "side": n, "dtype": name_of(DTYPE), "flops_per_second": 2 * n**3 / timing.median}


def purification(subject: Subject, name: str, work: Work) -> dict[str, Any]:
    subject.truth(work._replace(clips=1), 0)
    subject.forget()
    compiler = {"compiler": "eager"} if subject.quick and name.endswith("compiled") else {}
    purifier = subject.purifier(work)
    path = PATHS[name](purifier, **compiler)
    clips = subject.clips(work)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first_call = _seconds(lambda: path(clips).cpu())
        votes = path(clips)
    errors = check_votes(subject, work, votes)
    del votes
    timing = timed(lambda: path(clips), subject, seconds=8)
    row = {
        "path": name,
        **describe(work),
        "steps": purifier.config.inversion_steps,
        **timing._asdict(),
        "clips_per_second": work.clips / timing.median,
        "first_call": first_call,
        "peak_memory": peak_memory(subject.device),
        **errors,
        "warnings": sorted({str(warning.message).splitlines()[0] for warning in said})[:3],
    }
    return row | (launches(lambda: path(clips), subject.device) if work.clips == 1 else {})


def stages(subject: Subject, name: str, work: Work) -> dict[str, Any]:
    """The parts of a call one after another, each from what the part before it made."""
    purifier = Purifier(
        *subject.models,
        flow=given_flow,
        config=subject.purifier(work).config,
        max_frames=work.frames,
        fast=name == "ours",
    )
    clips = subject.clips(work)
    errors = check_votes(subject, work, purifier(clips, return_votes=True))
    row: dict[str, Any] = {"path": name, **describe(work), **errors, "stages": {}}
    with torch.no_grad(), full_float32(subject.device):
        target, flow = purifier.encode(clips), purifier.latent_flow(clips)

        def chain() -> tuple[Tensor, Tensor]:
            return purifier._engine.captured(purifier.config, purifier._denoise, target)

        states, noises = chain()
        votes = purifier.vote(states, noises, target, flow, votes=len(states))
        for stage, call in (
            ("encode", lambda: purifier.encode(clips)),
            ("chain", chain),
            ("flow", lambda: purifier.latent_flow(clips)),
            ("guidance", lambda: purifier.vote(states, noises, target, flow, votes=len(states))),
            ("decode", lambda: purifier.decode(votes)),
        ):
            call()
            row["stages"][stage] = timed(call, subject, seconds=3)._asdict()
    return row


# Each op as torch's own operators do it best, where that is not its reference: arguments -> result.


def _attention(qkv: Tensor, heads: int) -> Tensor:
    leading = qkv.shape[:1] + qkv.shape[2:4]
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(4, 0, 2, 3, 5, 1, 6).flatten(1, 3).contiguous()
    attended = F.scaled_dot_product_attention(q, k, v)  # [BHW, heads, F, d]
    return attended.unflatten(0, leading).permute(0, 4, 1, 2, 3, 5).flatten(-2)


def _norm_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: None, heads: int, eps: float
) -> Tensor:
    return _attention(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight), heads)


def _group_norm(images: Tensor, weight: Tensor, bias: Tensor, embedding: None, groups: int, eps: float, **_) -> Tensor:
    return F.silu(F.group_norm(images, groups, weight, bias, eps))


def _convolution(
    clips: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    y = F.silu(F.group_norm(clips, groups, norm_weight, norm_bias, eps))
    return residual + F.conv3d(y, weight, bias, padding=(1, 0, 0))


def _loop(
    latents: Tensor, noise: Tensor, target: Tensor, flow: Tensor, coefficients: Tensor, **weights: float
) -> Tensor:
    """Vote by vote and frame by frame, by autograd."""
    config = PurifyConfig(**weights)
    votes = []
    for z, e, step in zip(latents, noise, Schedule(config).vote_coefficients(), strict=True):
        optimized = reference.guidance_by_autograd(z, e, target, flow, step, config)
        votes.append((optimized - step.sqrt_beta * e) / step.sqrt_alpha if step.predicts_x0 else optimized)
    return torch.stack(votes)


LIBRARY: dict[str, Callable[..., Tensor]] = {
    "guided_update": _loop,
    "temporal_attention": _attention,
    "norm_temporal_attention": _norm_attention,
    "group_norm_silu": _group_norm,
    "temporal_conv": _convolution,
}


def in_library_layout(op: str, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Channels first where torch's operators want it, so that no copy is charged to them."""
    if op == "group_norm_silu":
        return tensors[0].flatten(0, 1).movedim(-1, 1).contiguous(), *tensors[1:]
    if op == "temporal_conv":
        x, norm_weight, norm_bias, weight, bias, residual = tensors
        x, residual = (t.movedim(-1, 1).contiguous() for t in (x, residual))
        return x, norm_weight, norm_bias, weight.permute(1, 2, 0)[..., None, None].contiguous(), bias, residual
    return tensors


def from_library_layout(op: str, result: Tensor, like: Tensor) -> Tensor:
    if op == "group_norm_silu":
        return result.movedim(1, -1).unflatten(0, like.shape[:2])
    return result.movedim(1, -1) if op == "temporal_conv" else result


def op_row(subject: Subject, make: Callable[..., Any], size: str, form: str) -> dict[str, Any]:
    device = subject.device
    dtype = DTYPE if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    op, tensors, settings = make(size, str(device), dtype)
    wide = (None if t is None else t.float() for t in tensors)
    with torch.no_grad(), full_float32(device):
        expected = getattr(reference, op)(*wide, **settings)
    library = form == "library"
    bytes_moved = sum(t.nbytes for t in tensors if t is not None) + expected.numel() * tensors[0].element_size()
    # One input over and over would be read from the cache.
    sets = [tensors, *(make(size, str(device), dtype)[1] for _ in range(copies_beyond_cache(device, bytes_moved) - 1))]
    if library:
        sets = [in_library_layout(op, each) for each in sets]
    run = partial(LIBRARY[op] if library else getattr(ops, op), **settings)
    row = {"op": op, "form": form, "size": size, "shape": list(expected.shape), "dtype": name_of(dtype)}

    def every() -> None:
        for each in sets:
            run(*each)

    with torch.no_grad(), use_backend("auto" if library else form):
        result = run(*sets[0])
        result = from_library_layout(op, result, tensors[0]) if library else result
        apart = ~((result - expected).abs() / (1 + expected.abs()) <= TOLERANCE[dtype])
        if apart.float().mean() > (MAX_SHARE_APART if op == "guided_update" else 0):
            raise Wrong(f"{apart.sum().item()} of {apart.numel()} values differ by more than {TOLERANCE[dtype]}")
        every()
        eager = timed(every, subject, seconds=0.3)
        replay = graph_of(every) if device.type == "cuda" and run.func is not _loop else None
        timing = eager if replay is None else timed(replay, subject, seconds=0.3)
    median, iqr = timing.median / len(sets), timing.iqr / len(sets)
    row |= {"median": median, "iqr": iqr, "rounds": timing.rounds, "captured": replay is not None}
    return row | {
        "eager_median": eager.median / len(sets),
        "bytes": bytes_moved,
        "bytes_per_second": bytes_moved / median,
    }


def copies_beyond_cache(device: torch.device, size: int) -> int:
    """How many inputs of so many bytes are four times what the GPU's last cache holds; enough calls for a clock."""
    if device.type != "cuda":
        return 2
    cache_size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20)
    return max(8, min(64, math.ceil(4 * cache_size / size)))


def graph_of(call: Callable[[], Any]) -> Callable[[], None] | None:
    """The call as a CUDA graph, which leaves the host's part out; None where it cannot be one."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def gpu_tests() -> dict[str, Any]:
    """Run the GPU cases of the test suite; Wrong if any fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        if not report.exists():
            raise Wrong("pytest ended without a report")
        suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    if counts["failures"] or counts["errors"] or counts["tests"] == counts["skipped"]:
        raise Wrong(", ".join(f"{count} {name}" for name, count in counts.items()))
    return {**counts, "seconds": float(suite.get("time", 0))}


def describe(work: Work) -> dict[str, Any]:
    return {**work._asdict(), "dtype": name_of(DTYPE)}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The list of rows


def tasks(subject: Subject, chosen: tuple[str, ...], batches: list[int]) -> list[Task]:
    frames, side = (4, 16) if subject.quick else (32, 224)
    usual = [Work(n, frames, side, side) for n in batches]
    single = [work for work in usual if work.clips == 1]
    other = [Work(1, frames // 2, side * 8 // 7, side * 8 // 7)] if single else []
    raft = [work._replace(flow="raft") for work in single]
    found = []

    def add(stage: str, name: str, run: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        if stage in chosen:
            found.append(Task(name, stage, partial(run, *arguments)))

    if subject.device.type == "cuda":
        add("test", "gpu tests", gpu_tests)
    add("bench", "ceiling: copies", ceiling_of_copies, subject)
    add("bench", "ceiling: matrix products", ceiling_of_products, subject)
    for work, paths in (
        *(
            (work, ("authors", "authors-xformers", "algebra", "algebra-captured", "ours-eager", "ours"))
            for work in usual
        ),
        *((work, ("authors", "algebra", "ours")) for work in (*other, *raft)),
    ):
        for name in paths:
            add("bench", f"purification: {name}, {work}", purification, subject, name, work)
    for work in usual:
        for name in ("algebra", "ours"):
            add("bench", f"stages: {name}, {work}", stages, subject, name, work)
    for size in ("small",) if subject.quick else ACTIVATIONS:
        for make in OPS:
            native = (
                form for form in SUPPORTED_DTYPES[make.__name__] if (form == "cpu") == (subject.device.type == "cpu")
            )
            library = ("library",) if make.__name__ in LIBRARY else ()
            for form in ("reference", *library, *native):
                add("bench", f"op: {make.__name__}, {size}, {form}", op_row, subject, make, size, form)
    for work in usual[:1] if subject.quick else usual:
        for name in ("algebra-compiled", "authors-compiled"):
            add("compile", f"purification: {name}, {work}", purification, subject, name, work)
    return found


# The results file


def machine(device: torch.device) -> dict[str, Any]:
    """What every row says of where it was measured."""
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        **nvidia_smi(device, **SMI_FIELDS),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: installed(name) for name in ("triton", "diffusers", "xformers")},
        "python": platform.python_version(),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@cache
def commit() -> str:
    """The last commit that touched the sources, with a digest of them where they differ from it or git is not there."""
    files = sorted(path for pattern in SOURCES for path in _sources(pattern))
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    tree = digest.hexdigest()[:8]
    try:
        log, changed = (
            subprocess.run(["git", *arguments, "--", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True)
            for arguments in (("log", "-1", "--format=%h", "--abbrev=12"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return f"tree-{tree}"
    return f"{log.stdout.strip()}+{tree}" if changed.stdout or not log.stdout else log.stdout.strip()


def _sources(pattern: str) -> Iterator[Path]:
    for path in ROOT.glob(pattern):
        inside = path.rglob("*") if path.is_dir() else (path,)
        yield from (p for p in inside if p.suffix in (".py", ".cpp", ".cu", ".h", ".safetensors", ".json"))


def read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {"kind": "gpu", "rows": {}}
    found = json.loads(file.read_text())
    if found.get("kind") != "gpu":
        raise ValueError(f"{file} holds other results; accepted: a new file, or one that this script wrote")
    return found


def write(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(whole, file)


# Running


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """OutOfTime after so many seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(task: Task, seconds: float) -> dict[str, Any]:
    """The task's row, or what kept it from being one."""
    try:
        with within(seconds):
            return task.run()
    except OutOfTime:
        return {"error": f"stopped after {seconds:.0f} s; the next run tries again"}
    except Wrong as error:
        return {"error": str(error), "wrong": True}
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"error": f"{type(error).__name__}: {said}"}


def run_all(todo: list[Task], subject: Subject, file: Path, *, again: bool, seconds: float) -> dict[str, Any]:
    """Measure what is not yet in the file; every row that is in it."""
    results = read(file)
    where, deadline = machine(subject.device), time.monotonic() + seconds

    def state(task: Task) -> str:
        row = results["rows"].get(task.name)
        if again or row is None or row["commit"] != where["commit"] or task.name.startswith("ceiling"):
            return "new"
        return "failed" if "error" in row else "done"

    # What failed before may fail again and take the GPU with it: it comes last.
    order = {task: ("new", "failed", "done").index(state(task)) for task in todo}
    todo = sorted((task for task in todo if order[task] < 2), key=order.__getitem__)
    with tqdm(todo, unit="row", disable=None) as bar:
        for task in bar:
            left = deadline - time.monotonic()
            if left <= 0:
                bar.write(f"{len(todo) - bar.n} rows are left; run the same command again to go on")
                break
            bar.set_description(task.name)
            row = attempt(task, left)
            subject.forget()
            row = {"stage": task.stage, "model": "small" if subject.quick else "full", **row, **where}
            row |= nvidia_smi(subject.device, sm_mhz_just_after="clocks.sm")
            results["rows"][task.name] = row
            write(file, results)
            if "CUDA error" in row.get("error", "") and "out of memory" not in row["error"]:
                bar.write(
                    f"{task.name}: {row['error']}\nthe GPU's context is lost; run the same command again to go on"
                )
                break
    return results["rows"]


def table(rows: dict[str, dict[str, Any]], names: list[str]) -> None:
    """A line for each row; times in milliseconds, and as a share of the authors' for the same work."""
    header = ("row", "ms", "IQR", "x (1)", "peak GiB", "launches", "error / (1)'s", "note")
    lines = [(name, *_cells(name, rows)) for name in names if name in rows]
    lines = [(*line[:-1], line[-1][:MOST_NOTE]) for line in lines]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for name, *cells in (header, *lines):
            print(f"{name:52}", *(f"{cell:>10}" for cell in cells))
        return
    shown = Table(box=None)
    for title in header:
        at_left = title in ("row", "note")
        shown.add_column(title, justify="left" if at_left else "right", no_wrap=True, min_width=len(title))
    for line in lines:
        shown.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 200).print(shown)


def _cells(name: str, rows: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    row = rows[name]
    if "error" in row:
        return ("-", "", "", "", "", "", row["error"])
    error = f"{row['mean_error']:.2g} / {row['mean_error_of_authors']:.2g}" if "mean_error" in row else ""
    if "stages" in row:
        parts = (f"{stage} {timing['median'] * 1e3:.3g}" for stage, timing in row["stages"].items())
        return ("", "", "", "", "", error, ", ".join(parts))
    if "median" not in row:
        return ("", "", "", "", "", "", f"{row['tests'] - row['skipped']} passed")
    first = rows.get(name.replace(row["path"], "authors", 1), {}) if "path" in row else {}
    peak, count = row.get("peak_memory"), row.get("launches")
    return (
        f"{row['median'] * 1e3:.4g}",
        f"{row['iqr'] * 1e3:.2g}",
        f"{first['median'] / row['median']:.2f}" if "median" in first else "",
        "" if peak is None else f"{peak / 2**30:.2f}",
        "" if count is None else str(count),
        error,
        "; ".join(row.get("warnings", ())),
    )


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="which rows; default: all")
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name has this text, such as 'ours' or 'op:'")
    parser.add_argument("--clips", type=int, nargs="+", help="clips in a batch; default: 1 and 8, with --quick 1 and 2")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script; its times mean nothing")
    parser.add_argument("--device", help="cuda (the default), cuda:1, ..., or cpu to try the script without a GPU")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    parser.add_argument("--minutes", type=float, default=7.5, help="stop after so many; run again to go on")
    parser.add_argument("--out", type=Path, help="results file; default: bench/results/<gpu>.json, --quick in build/")
    given = parser.parse_args()
    logging.set_verbosity_error()  # it warns of every cast
    batches = sorted(set(given.clips or ((1, 2) if given.quick else (1, 8))))
    if batches[0] < 1 or not 0 < given.minutes < math.inf:
        parser.error(f"--clips must be 1 or more and --minutes more than 0, got {batches} and {given.minutes}")
    try:
        device = torch.empty(0, device=given.device or "cuda").device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"no such device here ({str(error).splitlines()[0]}); --device cpu --quick tries the script")
    if device.type != "cuda" and not given.quick:
        parser.error("the full-size model is for a GPU; add --quick")

    name = slug(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    usual = ROOT / "build" / f"{name}-quick.json" if given.quick else ROOT / "bench" / "results" / f"{name}.json"
    subject = Subject(device, given.quick)
    chosen = STAGES if given.stage == "all" else (given.stage,)
    todo = [task for task in tasks(subject, chosen, batches) if (given.only or "") in task.name]
    if not todo:
        parser.error(f"no row is named like {given.only!r}; a run without --only names them all")
    file = given.out or usual
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rows = run_all(todo, subject, file, again=given.again, seconds=60 * given.minutes)
    table(rows, [task.name for task in todo])
    print(f"\n{file}")
    sys.exit(any(rows.get(task.name, {}).get("wrong") for task in todo))


if __name__ == "__main__":
    main()
