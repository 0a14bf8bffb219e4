"""Compiling the Triton kernels of a call before it runs: in processes side by side, into Triton's cache on disk.

A call compiles its kernels one after another, as it comes to them. `recorded` finds out what a call would launch, from
tensors of the meta device and without running it; `compile_kernels` hands what the cache lacks to processes; the call
then loads it all in milliseconds. Nothing depends on any of this: a kernel that is not in the cache is compiled at its
launch. Processes are started by `python -m videopure_fast.runtime.compile_ahead`, which imports no script of the user.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..ops import backend

# Fewer kernels than this are compiled sooner by their own launches: a process imports torch and triton first.
LEAST_KERNELS = 8
_ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for an address that is no multiple
_PACKAGE = Path(__file__).resolve().parents[2]


class Kernel(NamedTuple):
    """What one launch asks Triton to compile.

    target: the GPU's backend, architecture and threads of a warp. specialization: Triton's own JSON of types, constants
    and options. cached: whether Triton's cache on disk has it.
    """

    target: tuple[str, int, int]
    module: str
    function: str
    specialization: str
    cached: bool = False


def serves(device: torch.device) -> bool:
    """Whether ops on this device may run in Triton, compiled for a GPU."""
    asked = backend.in_use() or ("triton",)
    return device.type == "cuda" and "triton" in asked and backend.compiles()


@contextmanager
def recorded(device: torch.device) -> Iterator[list[Kernel]]:
    """Within this block of this thread, ops on tensors of the meta device launch nothing; their kernels are listed.

    The forms are those that serve tensors of `device`, a GPU. Each different kernel is listed once. Other threads may
    launch and compile at the same time.
    """
    import triton
    from triton.runtime import _async_compile

    # On a CUDA GPU its index is that of the current device, by which Triton finds the architecture.
    current = torch.cuda.device(device) if torch.cuda.is_available() else nullcontext()
    with _recording, current, backend.meta_stands_for(device):
        driver, hook = triton.runtime.driver.active, triton.knobs.runtime.jit_cache_hook
        recorder = _Recorder(driver, hook)
        token = _async_compile.active_mode.set(recorder)
        triton.runtime.driver.set_active(_DriverWithoutDevice(driver))
        triton.knobs.runtime.jit_cache_hook = recorder.seen
        try:
            with _LaunchesOfOps():
                yield recorder.kernels
        finally:
            triton.knobs.runtime.jit_cache_hook = hook
            triton.runtime.driver.set_active(driver)
            _async_compile.active_mode.reset(token)


_recording = threading.Lock()  # Triton's driver and hook belong to the process


class _LaunchesOfOps(TorchDispatchMode):
    """Runs the forms of our operators in place of their shapes alone: once for all calls that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[tuple[Any, ...], Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != backend.NAMESPACE:
            return func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        call = (op, *(_layout(value) if isinstance(value, Tensor) else value for value in args))
        if call not in self._results:
            self._results[call] = self._run(op, args)
        return tree_map_only(Tensor, torch.empty_like, self._results[call])

    def _run(self, op: str, arguments: Any) -> Any:
        form = backend.choose(op, arguments[0])
        if form is backend.OPS[op].native:  # the extension would take addresses from the tensors
            return getattr(getattr(torch.ops, backend.NAMESPACE), op)(*arguments)
        with self:
            return form(*arguments)


def _layout(x: Tensor) -> tuple[Any, ...]:
    """What a launch can depend on: the offset in bytes decides whether the address is aligned."""
    return tuple(x.shape), x.stride(), x.dtype, x.storage_offset() * x.itemsize % _ALIGNMENT


class _DriverWithoutDevice:
    """Triton's driver; to the thread that makes it, with a device on which nothing was ever compiled or runs.

    On a real device, a launch with a kernel that is compiled already would run it, on addresses that are none.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def get_current_device(self) -> int:
        device: int = self._driver.get_current_device()
        return -1 - device if threading.get_ident() == self._thread else device

    def get_current_stream(self, device: int) -> Any:
        return 0 if device < 0 else self._driver.get_current_stream(device)


class _Recorder:
    """Lists the kernels that the launches of the thread that makes it ask for, and lets none be compiled.

    Before a compilation Triton first calls a hook, which is told the specialization, and then the active mode of
    compiling later, which is told the key in the cache and returns no kernel: then nothing is launched.
    """

    def __init__(self, driver: Any, hook: Callable[..., Any] | None) -> None:
        target = driver.get_current_target()
        self.kernels: list[Kernel] = []
        self._target = target.backend, target.arch, target.warp_size
        self._hook = hook
        self._thread = threading.get_ident()
        self._known: set[Kernel] = set()

    def seen(self, *, fn: Any, compile: dict[str, Any], **others: Any) -> bool | None:
        if threading.get_ident() != self._thread:
            return self._hook(fn=fn, compile=compile, **others) if self._hook is not None else None
        self._kernel = Kernel(self._target, fn.module, fn.name, compile["specialization_data"])
        known = self._kernel in self._known
        self._known.add(self._kernel)
        return known

    def submit(self, key: str, *_: Any) -> None:
        from triton.runtime.cache import get_cache_manager

        cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        found = cache.get_group(f"{self._kernel.function[:150]}.json")
        self.kernels.append(self._kernel._replace(cached=bool(found)))


def compile_kernels(kernels: list[Kernel], done: Callable[[], object] = lambda: None) -> int:
    """Compile kernels into Triton's cache on disk, in as many processes as this one may use cores for.

    done: called after each. Returns how many compiled; their launches tell what is wrong with the others.
    """
    import triton

    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",  # a process of its own would take half a gigabyte of a GPU's memory
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",  # modules in the current folder are not what torch and triton mean to import
        "TRITON_CACHE_DIR": triton.knobs.cache.dir,
    }
    work = {"processes": min(len(kernels), _cores()), "kernels": kernels}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,  # so that its own processes can be ended along with it
    )
    compiled = 0
    try:
        assert process.stdin is not None and process.stdout is not None
        with process.stdin, process.stdout:
            process.stdin.write(json.dumps(work) + "\n")
            process.stdin.flush()
            for _ in process.stdout:
                compiled += 1
                done()
    except BrokenPipeError:
        pass  # it ended before it had read its work
    finally:
        if process.poll() is None and compiled < len(kernels):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return compiled


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _DriverOfTarget:
    """Stands for Triton's driver in a process that compiles and has no GPU."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0


def _compile(kernel: Kernel) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    triton.runtime.driver.set_active(_DriverOfTarget(GPUTarget(*kernel.target)))
    function = getattr(import_module(kernel.module), kernel.function)
    binary = function.preload(kernel.specialization)
    function.device_caches.clear()  # hundreds of compiled kernels take a gigabyte
    if kernel.target[0] == "cuda" and hasattr(nvidia, "make_launcher"):
        # Older versions of Triton, such as 3.6, compile C code too when a signature is first launched, and cache it.
        with suppress(Exception):  # it wants the driver's library, which a launch will find or report
            nvidia.CudaLauncher(binary.src, binary.metadata)


def main() -> None:
    """Read work from stdin, compile it, and write a line for each kernel that is in the cache."""
    work = json.loads(sys.stdin.readline())
    kernels = [Kernel(tuple(target), *rest) for target, *rest in work["kernels"]]
    for module in {kernel.module for kernel in kernels}:
        import_module(module)  # once, before the process is copied
    method = "fork" if "fork" in get_all_start_methods() else None
    with ProcessPoolExecutor(work["processes"], mp_context=get_context(method)) as pool:
        for future in as_completed([pool.submit(_compile, kernel) for kernel in kernels]):
            if future.exception() is None:
                print("compiled", flush=True)


if __name__ == "__main__":
    main()
