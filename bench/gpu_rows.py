"""The rows of whole purifications and of their stages, and the ceilings of the machine.

A row is made only if what was timed is correct: its votes are as near to float32's as the gate of gpu_models.py asks.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import PATHS
from diffusers import AutoencoderTiny
from gpu_models import DTYPE, BenchModels, Workload, describe, name_of
from gpu_runner import GateFailed, Row
from gpu_timing import count_launches, graph_of, seconds_of, timed, turn
from torch import Tensor, nn

from videopure_fast import DefendedClassifier, Purifier
from videopure_fast.machine import PeakMemory, synchronize
from videopure_fast.measure.profile import measure_roofline
from videopure_fast.realtime.stream import StreamPurifier
from videopure_fast.realtime.study import measure_service
from videopure_fast.sampling import vote
from videopure_fast.schedule import Schedule

STREAMED_BATCHES = 3  # so many times the clips that share an evaluation are timed together
FIRST_CALLS = ("plain", "by function")
MOST_FUNCTIONS = 60  # of a profile that a row keeps
COMPILED_PATHS = ("algebra-inductor", "algebra-compiled", "authors-compiled")


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
    purifier = models.purifier(workload, fast=path.startswith("ours"))
    compiler = {"compiler": "eager"} if models.quick and path in COMPILED_PATHS else {}
    purify = PATHS[path](purifier, **compiler)
    clips = models.clips(workload)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first_call = seconds_of(lambda: purify(clips).cpu())
        votes = purify(clips)
    errors = models.check_votes(workload, votes)
    del votes
    timing = timed(lambda: purify(clips), device, seconds=4, quick=models.quick)
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


def first_call(models: BenchModels, workload: Workload, how: str = "plain") -> Row:
    """The first call of `ours` in a process of its own; it is not checked.

    how, of FIRST_CALLS: "plain", whose Triton has compiled nothing before; or "by function", which finds the kernels
    that earlier rows have compiled, and says which functions of Python took the time.
    """
    given = str(models.device), models.quick, tuple(workload), how
    code = f"import gpu_rows; gpu_rows.print_first_seconds(*{given!r})"
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"TRITON_CACHE_DIR": empty} if how == "plain" else {}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return {**describe(workload), **json.loads(done.stdout.splitlines()[-1])}


def print_first_seconds(device: str, quick: bool, workload: tuple[Any, ...], how: str) -> None:
    """Prints the seconds of a process's first two calls as JSON, and where those of the first went."""
    models, work = BenchModels(torch.device(device), quick), Workload(*workload)
    purifier, clips = models.purifier(work, fast=True), models.clips(work)
    purify = PATHS["ours"](purifier)
    profiler, found = cProfile.Profile(), {}
    if how == "by function":
        first = seconds_of(lambda: profiler.runcall(lambda: purify(clips).cpu()))
        found = {"own": longest(profiler, "tottime"), "with_callees": longest(profiler, "cumtime")}
    else:
        first = seconds_of(lambda: purify(clips).cpu())
    second = seconds_of(lambda: purify(clips).cpu())
    print(json.dumps({"first_call": first, "second_call": second, **found}))


def longest(profiler: cProfile.Profile, order: str) -> list[tuple[str, int, float]]:
    """(function, calls, seconds) of a profile: "tottime", its own, or "cumtime", with what it calls."""
    column = {"tottime": 2, "cumtime": 3}[order]
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = [
        (f"{Path(file).name}:{line} {name}", taken[1], taken[column]) for (file, line, name), taken in stats.items()
    ]
    return sorted(rows, key=lambda row: -row[2])[:MOST_FUNCTIONS]


def label(models: BenchModels, workload: Workload) -> Row:
    """A classifier's label by `ours`, votes decoded until it is settled. Its own time is next to nothing."""
    device, purifier = models.device, models.purifier(workload, fast=True)
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 10)).to(device).requires_grad_(False)
    clips = models.clips(workload)
    early = DefendedClassifier(classifier.eval(), purifier)
    expected = DefendedClassifier(classifier, purifier, early_stop=False).predict(clips)
    if not torch.equal(early.predict(clips), expected):
        raise GateFailed("the labels differ from those of all votes")
    timing = timed(lambda: early.predict(clips), device, seconds=2, quick=models.quick)
    return {**describe(workload), **timing._asdict()}


def stream(models: BenchModels, workload: Workload, most: int) -> Row:
    """Clips through a StreamPurifier, `most` of them at once: clips a second, and what its stages take by batch size.

    service: seconds of each stage by how many clips share it, for a model of the load.
    """
    device, purifier = models.device, models.purifier(workload, fast=True)
    sizes = [2**i for i in range(most.bit_length())]
    clip = models.clips(workload)[0].cpu()
    depth, count = purifier.config.inversion_steps, STREAMED_BATCHES * most
    settings = {"max_batch": most, "queue_size": count, "return_votes": True, "batch_sizes": sizes}
    with StreamPurifier(purifier, **settings) as server:
        server.warmup(clip.shape)
        answer = server.submit(clip).result()
        errors = models.check_votes(workload, answer.votes[None])
        service = measure_service(server, clip, depth=depth, batches=sizes, repeats=1 if models.quick else 3)
        synchronize(device)
        with turn():
            seconds = seconds_of(lambda: [one.result() for one in [server.submit(clip) for _ in range(count)]])
    return {**describe(workload), "clips_per_second": count / seconds, "service": service._asdict(), **errors}


def stages(models: BenchModels, path: str, workload: Workload) -> Row:
    """The stages of a call, each timed alone on what the stages before it made: on a GPU as a CUDA graph.

    Without a graph, a stage's time has that of its launches in it. What a call adds to its stages, such as checks of
    its input, is in none of them.
    """
    device, purifier = models.device, models.purifier(workload, fast=path == "ours")
    clips = models.clips(workload)
    errors = models.check_votes(workload, purifier(clips, return_votes=True))
    row: Row = {"path": path, **describe(workload), **errors, "stages": {}}
    with purifier._inference(clips):
        for stage, call in stage_calls(purifier, clips).items():
            call()
            replay = graph_of(call) if device.type == "cuda" else None
            timing = timed(replay or call, device, seconds=1, quick=models.quick)
            row["stages"][stage] = {**timing._asdict(), "captured": replay is not None}
    return row


def stage_calls(purifier: Purifier, clips: Tensor) -> dict[str, Callable[[], Any]]:
    """Stage -> a call that runs it, without the checks of the public method. "chain": inversion and denoising."""
    target, flow = purifier._encode(clips), purifier._latent_flow(clips)
    states, noise_preds = purifier._run_chain(target, [], None, False)
    coefficients, config = Schedule(purifier.config).vote_coefficients(), purifier.config
    votes = vote(states, noise_preds, target, flow, coefficients, config)
    return {
        "encode": lambda: purifier._encode(clips),
        "chain": lambda: purifier._run_chain(target, [], None, False),
        "flow": lambda: purifier._latent_flow(clips),
        "guidance": lambda: vote(states, noise_preds, target, flow, coefficients, config),
        "decode": lambda: purifier._decode(votes),
    }


def lossy(models: BenchModels, workload: Workload) -> Row:
    """`ours` with a decoder that is lossy by design: only its shape and finite values are checked.

    The decoder has the shape of TAESD, with as many levels as the VAE.
    """
    device, exact = models.device, models.purifier(workload, fast=True)
    torch.manual_seed(0)
    levels = len(exact.vae.config.block_out_channels)
    widths, blocks = (64,) * levels, (3,) * (levels - 1)
    decoder = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, *blocks),
        num_decoder_blocks=(*blocks, 1),
    )
    decoder = decoder.to(device, DTYPE).eval().requires_grad_(False)
    purifier = models.purifier(workload, fast=True, decoder=decoder)
    clips = models.clips(workload)
    memory = PeakMemory(device)
    votes = purifier(clips, return_votes=True)
    if votes.shape[3:] != clips.shape[2:] or not votes.isfinite().all():
        raise GateFailed(f"votes are {tuple(votes.shape)}, or not finite")
    timing = timed(lambda: purifier(clips, return_votes=True), device, seconds=2, quick=models.quick)
    return {"path": "ours, taesd", **describe(workload), **timing._asdict(), "peak_memory": memory.read()}
