"""The processes that decode and encode for the service: lent to requests, and replaced when one had to be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from starlette.exceptions import HTTPException
from torch import Tensor

from .limits import Limits, refusal

_START_SECONDS = 120.0  # for a process to import what it needs, on a busy machine
_ENCODE_SECONDS = 120.0
_LONGEST_REPLY = 2**16  # bytes of the line before what a process sends
_MOST_BYTES = 2**31  # that a process sends
_LONGEST_SENTENCE = 400  # characters
# What these processes see of the environment: nothing that a program could have been given as a secret.
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")
_SET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "2"}
_logger = logging.getLogger("videopure_fast.service")


class Decoded(NamedTuple):
    """frames: (F, 3, H, W) uint8; rate: frames a second."""

    frames: Tensor
    rate: float


class Codec:
    """One process, and a request's folder that it works on. What it says is checked as what a client says."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        home = str(Path(__file__).parents[2])
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _SET
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environment.get("PYTHONPATH")]))
        self._threads = threads
        self._process = subprocess.Popen(
            [sys.executable, "-m", "videopure_fast.service.codec"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # signals to the service are not its own
        )
        self._used = False
        self.fit = True  # for another request

    @property
    def ended(self) -> bool:
        """Whether the process is gone, for whatever reason."""
        return self._process.poll() is not None

    async def decode(self, folder: Path, *, size: int, limits: Limits) -> Decoded:
        """The file `video` of a folder, its frames with a short side of `size` pixels. HTTPException."""
        wanted = {name: getattr(limits, name) for name in ("seconds", "frames", "pixels", "aspect")}
        request = {"do": "decode", "folder": str(folder), "size": size, "limits": wanted}
        late = f"the video takes more than {limits.reading:g} s to decode; accepted: a shorter or smaller one"
        reply, blobs = await self._call(request, b"", limits.reading, refusal(413, late))
        try:
            shape, rate = tuple(map(int, reply["shape"])), float(reply["rate"])
            return Decoded(torch.frombuffer(blobs[0], dtype=torch.uint8).view(shape), rate)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            self.fit = False
            raise refusal(400, "the video cannot be decoded") from error

    async def encode(self, folder: Path, purified: Tensor, *, before: bool) -> list[bytearray]:
        """The video that was decoded last as an mp4, if `before` says so, and the purified frames as another.

        HTTPException: 500, as what was decoded once is not the client's fault any more.
        """
        request = {"do": "encode", "folder": str(folder), "before": before}
        frames = memoryview(purified.contiguous().numpy()).cast("B")
        late = refusal(500, f"the purified video takes more than {_ENCODE_SECONDS:g} s to encode")
        try:
            _, blobs = await self._call(request, frames, _ENCODE_SECONDS, late)
        except HTTPException as error:
            self.fit = False  # it may not have read all the frames
            _logger.error("a purified video could not be encoded: %s", error.detail)
            if error is late:
                raise
            raise refusal(500, "the purified video cannot be encoded") from error
        return blobs

    def forget(self) -> None:
        """Drop the frames of the video that was decoded last, which its client may have left before it was encoded."""
        with contextlib.suppress(OSError):  # it has ended
            assert self._process.stdin is not None
            self._process.stdin.write(b'{"do": "forget"}\n')
            self._process.stdin.flush()

    async def _call(
        self, request: dict[str, Any], payload: bytes | memoryview, seconds: float, late: Exception
    ) -> tuple[dict[str, Any], list[bytearray]]:
        """What the process answers; `late` where it does not in time. A call that does not end kills it."""
        allowed = seconds if self._used else seconds + _START_SECONDS
        self._used, self.fit = True, False
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._exchange, {**request, "seconds": seconds}, payload)
        try:
            await asyncio.wait({work}, timeout=allowed)
            if not work.done():
                raise late
            reply, blobs = work.result()
        except (OSError, ValueError) as error:  # it has ended, or talks nonsense
            raise refusal(400, f"the video cannot be decoded: its decoder {self._end_reason()}") from error
        finally:
            if not work.done():
                self.kill()
                await asyncio.wait({work})
                work.exception()
        self.fit = True
        if "status" in reply:
            raise refusal(413 if reply["status"] == 413 else 400, _sentence(reply.get("detail")))
        return reply, blobs

    def _exchange(self, request: dict[str, Any], payload: bytes | memoryview) -> tuple[dict[str, Any], list[bytearray]]:
        """Blocks until the process has answered, or has ended."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        requests.write(json.dumps(request).encode() + b"\n")
        requests.write(payload)
        requests.flush()
        reply = json.loads(answers.readline(_LONGEST_REPLY))
        sizes = reply["blobs"] if isinstance(reply, dict) else None
        if not isinstance(sizes, list) or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError("no answer")
        if sum(sizes) > _MOST_BYTES:
            raise ValueError("an answer that is too long")
        blobs = [bytearray(size) for size in sizes]
        for blob in blobs:
            if blob and answers.readinto(blob) != len(blob):  # type: ignore[attr-defined]
                raise ValueError("an answer that breaks off")
        return reply, blobs

    def _end_reason(self) -> str:
        """How the process ended, which has closed its output."""
        self.kill()
        code = self._process.wait()
        by_us = code == -signal.SIGKILL
        return "was ended for its memory or time" if by_us or code == -signal.SIGXCPU else "crashed"

    def kill(self) -> None:
        self.fit = False
        with contextlib.suppress(OSError):
            self._process.kill()

    def close(self) -> None:
        """End the process, and what belongs to it here."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a pipe that still has something to write
                assert pipe is not None
                pipe.close()


def _sentence(text: object) -> str:
    """What a process says, as one line."""
    shown = " ".join(str(text).split())
    return "".join(c for c in shown if c.isprintable())[:_LONGEST_SENTENCE]


class Codecs:
    """As many processes as requests work at once, while its block runs.

    One that could not be started again is None, and is made when it is needed.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._closed = False

    def __enter__(self) -> Codecs:
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="codec")
        self._idle: list[Codec | None] = []
        try:
            while len(self._idle) < self._count:
                self._idle.append(Codec(self._threads))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._closed = True
        for codec in self._idle:
            if codec is not None:
                codec.close()
        self._threads.shutdown()

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[Codec]:
        """A process for one request; at most as many blocks run as there are processes."""
        codec = self._idle.pop()
        try:
            if codec is not None and codec.ended:  # while nobody used it
                codec.close()
                codec = None
            codec = codec or Codec(self._threads)
            yield codec
        finally:
            self._take_back(codec)

    def _take_back(self, codec: Codec | None) -> None:
        if codec is not None and codec.fit:
            codec.forget()
        elif codec is not None:
            codec.close()
            codec = None
            if not self._closed:
                with contextlib.suppress(OSError):  # the next request tries again
                    codec = Codec(self._threads)
        self._idle.append(codec)
        if self._closed and codec is not None:  # `__exit__` may not have seen it
            codec.close()
