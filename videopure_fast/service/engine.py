"""What is behind the service's addresses: videos through windows of a StreamPurifier, one after another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from starlette.exceptions import HTTPException
from torch import Tensor, nn

from ..adapters import class_names
from ..data.video import working_size
from ..purifier import Purifier
from ..realtime.serving import DeadlineMissed, Progress, QueueFull, Refused
from ..realtime.stream import StreamPurifier, check_stream_models
from ..windows import CrossFade, window_starts
from .limits import Limits, Line, check_limits, refusal
from .live import CLIPS_WAITING, Frames, check_sources, source_frames
from .metrics import Metrics, stage_seconds
from .uploads import Upload, UploadFolder
from .workers import Codecs

Emit = Callable[[dict[str, Any]], None]
_TOGETHER = 4  # clips in flight on a GPU at most; on a CPU, clips that share it are each as late as the last of them
_WARM_RETRY = 5.0  # seconds after which to ask again whether it is warm
_logger = logging.getLogger("videopure_fast.service")


class Purified(NamedTuple):
    """What became of a video. votes: their number by label; times: seconds by stage; before, after: mp4 files."""

    label: str | None
    votes: dict[str, int] | None
    times: dict[str, float]
    before: bytes | None
    after: bytes


class Engine:
    """A purifier at work for the service, between `start` and `stop`.

    Votes are all decoded, where there is a classifier: the majority over several windows could be another if those of
    one of them were left out. A full queue of clips refuses new ones, and has room for all that this class hands in.
    """

    def __init__(
        self,
        purifier: Purifier,
        classifier: nn.Module | None,
        *,
        model: str,
        size: int,
        limits: Limits,
        sources: Mapping[str, str | Frames],
    ) -> None:
        check_limits(limits)
        check_sources(sources)
        working_size(size, size, size)
        check_stream_models(purifier, classifier)
        self.limits, self.size, self.model = limits, size, model
        self.classes = None if classifier is None else class_names(classifier)
        self.votes = classifier is not None
        self.steps, self.window = purifier.config.inversion_steps, purifier.max_frames
        self.metrics, self.line = Metrics(), Line(limits.working, limits.waiting)
        self.uploading = self.viewing = 0
        self.closing = asyncio.Event()  # when nothing new is begun any more
        self.uploads = UploadFolder()
        self.live: dict[str, Frames] = {}
        self._purifier, self._classifier, self._sources = purifier, classifier, sources
        self._overlap = purifier.config.window_overlap
        self._state = "it is warming up"  # why it is not ready; "" where it is
        self._warming: asyncio.Task[None] | None = None
        self.failure: Exception | None = None  # that kept it from beginning

    def start(self) -> None:
        """Begin, and warm up in the background. Where that fails, what has begun is ended."""
        try:
            with ExitStack() as begun:
                self._start(begun)
                self._begun = begun.pop_all()
        except Exception as error:
            self.failure = error
            raise

    def _start(self, begun: ExitStack) -> None:
        begun.enter_context(self.uploads)
        self._codecs = begun.enter_context(Codecs(self.limits.working))
        on_gpu = self._purifier.unet.device.type == "cuda"
        self.stream = StreamPurifier(
            self._purifier,
            self._classifier,
            max_batch=_TOGETHER if on_gpu else 1,
            queue_size=self.limits.working + CLIPS_WAITING * len(self._sources),
            policy="reject",
            early_stop=False,
        )
        begun.callback(self.stream.close, cancel=True)
        clips = {"window": self.window, "overlap": self._overlap, "size": self.size}
        self.live = {
            name: source_frames(source, self.stream, prepare=self.stream.warmup if on_gpu else None, **clips)
            if isinstance(source, str)
            else source
            for name, source in self._sources.items()
        }
        self.metrics.show("ready", "Whether it is warm.", lambda: not self._state)
        self.metrics.show("working", "Videos that are worked on now.", lambda: self.line.working)
        self.metrics.show("waiting", "Videos that wait now.", lambda: self.line.waiting)
        self.metrics.show_clips(lambda: self.stream.counts)
        self._warming = asyncio.create_task(self._warm())

    async def warmed(self) -> None:
        """Wait until it is warm, or cannot be."""
        if self._warming is not None:
            await asyncio.wait({self._warming})

    async def stop(self) -> None:
        """End, and leave nothing behind; what is still in flight is canceled."""
        self.closing.set()
        await asyncio.gather(*(frames.close() for frames in self.live.values()))
        await asyncio.to_thread(self.stream.close, cancel=True)
        await self.warmed()
        await asyncio.to_thread(self._begun.close)

    def check_ready(self) -> None:
        """503 while nothing can be purified."""
        if self.closing.is_set():
            raise refusal(503, "the service is ending; it takes nothing new", _WARM_RETRY)
        if self._state:
            raise refusal(503, f"the service is not ready: {self._state}", _WARM_RETRY)

    async def _warm(self) -> None:
        try:
            await asyncio.to_thread(self.stream.warmup, (3, self.window, self.size, self.size))
            self._state = ""
        except Exception as error:
            self._state = f"it could not be warmed up ({type(error).__name__})"
            if not self.closing.is_set():
                _logger.exception("the service could not be warmed up")

    def check_steps(self, steps: int | None) -> None:
        """400 for steps that the purifier does not take."""
        if steps is not None:
            try:
                self._purifier.with_config(inversion_steps=steps)
            except ValueError as error:
                raise refusal(400, str(error)) from error

    def label_name(self, label: int) -> str:
        return self.classes[label] if self.classes is not None and label < len(self.classes) else str(label)

    async def purify(self, upload: Upload, emit: Emit, *, before: bool) -> Purified:
        """A video that was uploaded, as soon as it is its turn. HTTPException; canceling it frees its place.

        emit: told the events of the service's contract up to the last vote. before: whether the video as the purifier
        saw it is wanted too.
        """
        deadline = self.limits.answer if upload.deadline is None else upload.deadline
        self.check_steps(upload.steps)
        try:
            return await asyncio.wait_for(self._purify(upload, emit, time.monotonic() + deadline, before), deadline)
        except (DeadlineMissed, asyncio.TimeoutError) as error:
            raise refusal(504, f"the answer was not there within {deadline:g} s; the video was given up") from error
        except QueueFull as error:
            raise refusal(503, "the service is busy: live sources take all it can do", self.line.retry_after) from error
        except Refused as error:
            raise refusal(503, "the service is ending; the video was given up", _WARM_RETRY) from error
        except HTTPException:
            raise
        except Exception as error:
            _logger.exception("a video could not be purified")
            raise refusal(500, f"the video could not be purified ({type(error).__name__})") from error

    async def _purify(self, upload: Upload, emit: Emit, due: float, before: bool) -> Purified:
        began = time.monotonic()
        place = self.line.join()
        if place.ahead:
            emit({"event": "queued", "ahead": place.ahead})
        async with place:
            waited = time.monotonic() - began
            async with self._codecs.lend() as codec:
                frames, rate = await codec.decode(upload.folder, size=self.size, limits=self.limits)
                starts = window_starts(len(frames), self.window, self._overlap)
                height, width = frames.shape[-2:]
                shape = {"windows": len(starts), "frames": len(frames), "height": height, "width": width}
                emit({"event": "started", **shape, "rate": rate})
                purified, votes, times = await self._windows(frames, starts, upload.steps, due, emit)
                clips = await codec.encode(upload.folder, purified, before=before)
        times["queue"] += waited
        times["total"] = time.monotonic() - began
        self.metrics.took(times)
        counts = {self.label_name(label): votes[label] for label in sorted(votes)} if self.votes else None
        label = None if counts is None else max(counts, key=lambda name: counts[name])  # of equals the first label
        return Purified(label, counts, times, bytes(clips[0]) if before else None, bytes(clips[-1]))

    async def _windows(
        self, frames: Tensor, starts: Sequence[int], steps: int | None, due: float, emit: Emit
    ) -> tuple[Tensor, Counter[int], dict[str, float]]:
        """Frames (F, 3, H, W) uint8 purified, the number of votes by label, and seconds by stage."""
        loop, length = asyncio.get_running_loop(), min(len(frames), self.window)
        fade, pieces = CrossFade(self._overlap), list[Tensor]()
        votes, times = Counter[int](), dict[str, float]()
        for i, start in enumerate(starts):
            window = frames[start : start + length].transpose(0, 1).float() / 255
            answer = await self.stream.answer(
                window,
                deadline=max(0.0, due - time.monotonic()),
                steps=steps,
                progress=partial(self._tell, loop, emit, i),
            )
            fade.add(answer.clip.float().cpu())
            piece = fade.release(starts[i + 1] - start if i + 1 < len(starts) else len(fade))
            # Piece by piece: all at once, long videos would hold up the event loop, and take four times their bytes.
            pieces.append((piece * 255).round().clamp(0, 255).to(torch.uint8).transpose(0, 1))
            votes.update([] if answer.logits is None else answer.logits.argmax(-1).tolist())
            times = {stage: times.get(stage, 0.0) + spent for stage, spent in stage_seconds(answer.times).items()}
        return torch.cat(pieces), votes, times

    def _tell(self, loop: asyncio.AbstractEventLoop, emit: Emit, window: int, progress: Progress) -> None:
        """Called by the thread of the models with each step of a clip: hand it on to the event loop."""
        place = {"window": window, "stage": progress.stage, "done": progress.done, "total": progress.total}
        events: list[dict[str, Any]] = [{"event": "progress", **place}]
        if progress.label is not None:
            label = self.label_name(progress.label)
            events.append({"event": "vote", "window": window, "vote": progress.done - 1, "label": label})
        with suppress(RuntimeError):  # the loop was closed
            for event in events:
                loop.call_soon_threadsafe(emit, event)
