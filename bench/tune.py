"""Times every distinct call of a purification in every way to compute it, and makes the kernels' table of the fastest.

The calls are recorded from one purification (tune_calls.py). The ways of an operator of videopure_fast are its forms
that run here, the reference (torch's own operators) among them, and each candidate of every choice that its Triton form
has (kernels/tuned.py); those of torch's convolutions and attention are the settings that torch has for them. All
kernels are compiled first, in as many processes as there are cores. Each way is compared with the float32 reference,
then timed as a CUDA graph, on inputs that are not in the cache.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from aot_launches import TritonKernel, fill_cache, launches
from gpu_ops import check_op
from gpu_runner import GateFailed, Row, lost_context
from gpu_timing import copies_beyond_cache, graph_of, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tune_calls import Call, Inputs

from videopure_fast.files import atomic_write
from videopure_fast.kernels import tuned
from videopure_fast.kernels.tuned import Choice, as_json, forced, recorded
from videopure_fast.ops.backend import BACKENDS, full_float32, implementation, is_available, use_backend

SECONDS = 0.02  # of rounds for one way; 5 rounds are the least
LEAST_CALLS = 4  # in a graph: its launch takes as long as a small call
LEAST_GAIN = 1.02  # a candidate takes the place of the reasoned one if it is at least this many times as fast
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class Way(NamedTuple):
    """One way to compute a call. setting: the context that it runs in. form: a backend, or None for torch's own."""

    name: str
    function: Callable[..., Any]
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext
    form: str | None = None

    def __call__(self, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        with self.setting(), use_backend(self.form or "auto"):
            return self.function(*arguments, **keywords)


class Ways(NamedTuple):
    """All ways to compute a call, the first as it is shipped; and of each choice the ways of its candidates.

    note: why no choices are known, where the kernels could not be asked.
    """

    ways: list[Way]
    choices: list[dict[str, Any]]
    note: str = ""


def ways_of(call: Call, device: torch.device) -> Ways:
    if not call.is_op:
        return Ways([Way("as called", call.function), *library_ways(call, device)], [])
    op, first = call.signature.op, call.inputs(device)[0][0]
    forms = [form for form in BACKENDS if form == "reference" or serves(form, op, first)]
    ways = Ways([Way(form, implementation(op, form), form=form) for form in forms], [])
    if "triton" not in forms:
        return ways
    try:
        found = choices_of(call, device)
    except Exception as error:
        return ways._replace(note=f"{type(error).__name__}: {error}"[:200])
    for choice in found:
        candidates = candidate_ways(op, choice)
        ways.ways.extend(candidates.values())
        reasoned, named = as_json(choice.reasoned), [[as_json(c), way.name] for c, way in candidates.items()]
        ways.choices.append({"op": choice.op, "key": list(choice.key), "reasoned": reasoned, "candidates": named})
    return ways


def candidate_ways(op: str, choice: Choice) -> dict[Any, Way]:
    """Each candidate of a choice, with the way to compute the op that takes it."""
    return {
        candidate: Way(
            f"{choice.op} {' '.join(map(str, choice.key))}: {candidate}",
            implementation(op, "triton"),
            partial(forced, choice.op, choice.key, candidate),
            "triton",
        )
        for candidate in choice.candidates
    }


def serves(form: str, op: str, x: Tensor) -> bool:
    with use_backend(form):
        return is_available(form, op, x)


def library_ways(call: Call, device: torch.device) -> Iterator[Way]:
    if device.type != "cuda":
        return
    if "conv" in call.signature.op:
        yield Way("cudnn.benchmark", call.function, cudnn_benchmark)
    if call.signature.op == "scaled_dot_product_attention":
        for name, backend in SDPA_BACKENDS.items():
            yield Way(name, call.function, partial(sdpa_kernel, backend))


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Within this block cuDNN times its algorithms at the first call of a shape, and takes the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def choices_of(call: Call, device: torch.device) -> list[Choice]:
    """The distinct choices that the launches of a call's Triton form have."""
    with recorded() as found:
        launched(call, device)
    return list({(choice.op, choice.key): choice for choice in found}.values())


def launched(call: Call, device: torch.device) -> list[TritonKernel]:
    """The kernels that a call's Triton form launches. Nothing is compiled; in the interpreter they run instead."""
    triton_form = implementation(call.signature.op, "triton")
    if device.type != "cuda":
        arguments, keywords = call.inputs(device)
        triton_form(*arguments, **keywords)
        return []
    arguments, keywords = call.inputs(torch.device("meta"))
    major, minor = torch.cuda.get_device_capability(device)
    with launches(10 * major + minor) as kernels:
        triton_form(*arguments, **keywords)
    return kernels


def compile_all(found: list[tuple[Call, Ways]], device: torch.device) -> Row:
    """Fills Triton's disk cache with the kernels of all ways."""
    kernels: dict[TritonKernel, None] = {}
    failed = {}
    for call, ways in found if device.type == "cuda" else ():
        for way in ways.ways:
            if way.form == "triton":
                try:
                    with way.setting():
                        kernels.update(dict.fromkeys(launched(call, device)))
                except Exception as error:
                    failed[f"{call.signature.op} {way.name}"] = f"{type(error).__name__}: {error}"[:200]
    began = time.perf_counter()
    failed |= fill_cache(kernels)
    return {"calls": len(found), "kernels": len(kernels), "failed": failed, "seconds": time.perf_counter() - began}


# Times


def call_row(call: Call, ways: Ways, device: torch.device, quick: bool) -> Row:
    """The times of all ways of a call, in seconds; "error" in place of a time where a way is wrong or does not run."""
    with torch.no_grad(), full_float32(device):
        arguments, keywords = call.inputs(device, wide=True)
        reference = implementation(call.signature.op, "reference") if call.is_op else call.function
        expected = reference(*arguments, **keywords)
        del arguments, keywords
        inputs = [call.inputs(device) for _ in range(copies_beyond_cache(device, call.size, least=2))]
        measured = {way.name: way_row(call, way, inputs, expected, device, quick) for way in ways.ways}
    shipped = next(iter(measured.values()))
    return {
        **{"op": call.signature.op, "counts": dict(call.counts), "bytes": call.size},
        **{"ways": measured, "choices": ways.choices, "fastest": fastest_of(measured)},
        **({"note": ways.note} if ways.note else {}),
        **({"error": shipped["error"]} if "error" in shipped else shipped),
    }


def fastest_of(measured: dict[str, Row]) -> str | None:
    right = {name: row["median"] for name, row in measured.items() if "median" in row}
    return min(right, key=lambda name: right[name], default=None)


def way_row(call: Call, way: Way, inputs: list[Inputs], expected: Any, device: torch.device, quick: bool) -> Row:
    rounds = math.ceil(LEAST_CALLS / len(inputs))

    def run_all() -> None:
        for _ in range(rounds):
            for given in inputs:
                way(*given)

    try:
        check_op(call.signature.op, way(*inputs[0]), expected, inputs[0][0][0].dtype)
        replay = graph_of(run_all) if device.type == "cuda" else None
        timing = timed(replay or run_all, device, seconds=SECONDS, quick=quick)
    except Exception as error:
        if lost_context(str(error)):
            raise
        return {"error": str(error) if isinstance(error, GateFailed) else f"{type(error).__name__}: {error}"[:200]}
    calls = rounds * len(inputs)
    return {"median": timing.median / calls, "iqr": timing.iqr / calls, "captured": replay is not None}


# The table


def fastest_choices(rows: dict[str, Row]) -> list[list[Any]]:
    """[op, key, candidate] of every choice: the candidate that takes the least time over all calls with that choice.

    A candidate that is wrong in one call, or was not timed in all, is none.
    """
    totals: dict[str, dict[str, list[float]]] = {}
    reasoned, calls = {}, {}
    for row in rows.values():
        for choice in row.get("choices", ()):
            name = json.dumps([choice["op"], choice["key"]])
            reasoned[name], calls[name] = json.dumps(choice["reasoned"]), calls.get(name, 0) + 1
            for candidate, way in choice["candidates"]:
                seconds = row["ways"][way].get("median", math.inf) * sum(row["counts"].values())
                totals.setdefault(name, {}).setdefault(json.dumps(candidate), []).append(seconds)
    found = []
    for name, candidates in sorted(totals.items()):
        sums = {candidate: sum(taken) for candidate, taken in candidates.items() if len(taken) == calls[name]}
        best = min(sums, key=lambda candidate: sums[candidate], default=None)
        if best is None or math.isinf(sums[best]):
            continue
        if sums.get(reasoned[name], math.inf) < LEAST_GAIN * sums[best]:
            best = reasoned[name]
        found.append([*json.loads(name), json.loads(best)])
    return found


def write_table(rows: dict[str, Row], architecture: int, gpu: str) -> int:
    """Brings the fastest choices into the kernels' table, beside those of other GPUs; returns how many there are."""
    table = tuned.read(tuned.TABLE) if tuned.TABLE.exists() else {}
    before = table.get(str(architecture), {}).get("choices", ())
    found = fastest_choices(rows)
    if not found:
        return 0
    new = {json.dumps(choice[:2]): choice for choice in (*before, *found)}
    table[str(architecture)] = {"gpu": gpu, "choices": [new[name] for name in sorted(new)]}
    write_lines(table, tuned.TABLE)
    tuned.reload()
    return len(found)


def write_lines(table: dict[str, Any], path: Path) -> None:
    """JSON with a choice a line."""
    parts = []
    for architecture, found in sorted(table.items()):
        choices = ",\n".join(f"  {json.dumps(choice)}" for choice in found["choices"])
        parts.append(f'"{architecture}": {{"gpu": {json.dumps(found["gpu"])}, "choices": [\n{choices}\n]}}')
    with atomic_write(path) as partial_file:
        partial_file.write_text("{" + ",\n".join(parts) + "}\n")
