"""What a launch of a Triton kernel asks to be compiled, and its compilation where nothing runs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import active_children, get_context
from typing import Any, NamedTuple

try:
    import triton
    from triton.backends.compiler import GPUTarget
except ImportError:
    triton = None


class Target:
    """Stands for Triton's driver where there is no GPU. The architecture is also the number of its only device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


class TritonKernel(NamedTuple):
    """What one launch asked Triton to compile. specialization: Triton's own JSON of types, constants and options."""

    architecture: int
    module: str
    function: str
    specialization: str


@contextmanager
def launches(architecture: int) -> Iterator[list[TritonKernel]]:
    """Within this block a launch neither compiles nor runs; what it would have compiled is appended to the list.

    Launches are on tensors of the meta device, and for GPUs of this architecture.
    """
    found: list[TritonKernel] = []

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(TritonKernel(architecture, fn.module, fn.name, compile["specialization_data"]))
        return True  # tells Triton not to compile

    triton.runtime.driver.set_active(Target(architecture))
    triton.knobs.runtime.jit_cache_hook = record
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = None
        triton.runtime.driver.set_active(None)  # the machine's own, when it is asked for next


def compile_kernel(kernel: TritonKernel) -> Any:
    """Triton's binary of a kernel, from its disk cache or into it. No GPU is needed, and none is used."""
    triton.runtime.driver.set_active(Target(kernel.architecture))
    function = getattr(import_module(kernel.module), kernel.function)
    binary = function.preload(kernel.specialization)
    function.device_caches.clear()  # hundreds of compiled kernels take a gigabyte
    return binary


def fill_cache(kernels: Collection[TritonKernel]) -> dict[str, str]:
    """Compile kernels into Triton's disk cache, on all cores; returns why those failed that did, by function."""
    failed = {}
    pool = ProcessPoolExecutor(min(len(kernels), os.cpu_count() or 1) or 1, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(_compile_into_cache, kernel): kernel for kernel in kernels}
        for future in as_completed(futures):
            if error := future.exception():
                failed[futures[future].function] = f"{type(error).__name__}: {error}"[:200]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():  # busy ones, where time ran out
            process.terminate()
    return failed


def _compile_into_cache(kernel: TritonKernel) -> None:
    compile_kernel(kernel)
