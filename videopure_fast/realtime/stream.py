"""A purifier for clips that arrive at any time, from any thread."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, get_args

from torch import Tensor, nn

from ..inputs import LEAST_SIDE, check_count, check_flag, check_number, check_video, gray_video
from ..purifier import Purifier
from .batching import Batch
from .flights import Clock, Ended, Request
from .queueing import Order, Policy, Waiting
from .serving import Answer, Closed, DeadlineMissed, Dropped, Listener, QueueFull

if TYPE_CHECKING:
    from typing_extensions import Self

_logger = logging.getLogger(__name__)
_ROOM_POLL = 0.03  # seconds between two looks of a coroutine at a full queue
_OUTCOMES: dict[type, str] = {Answer: "answered", Dropped: "dropped", DeadlineMissed: "missed", Closed: "canceled"}


class Counts(NamedTuple):
    """What has become of the clips so far, and how many wait and are in flight now.

    submitted is the sum of the others; rejected ones, which raised QueueFull, are not in it.
    """

    submitted: int
    answered: int
    dropped: int
    missed: int
    canceled: int
    failed: int
    waiting: int
    in_flight: int
    rejected: int


class StreamPurifier:
    """Purifies clips as they come, several at a time, each at a step of its own (step-wise continuous batching).

    One thread owns the models. A clip that is submitted waits in a queue for one of `max_batch` places; then it is
    encoded, and takes one step with each iteration: an evaluation of the UNet, or the decoding of a vote. Clips that
    come later join at the next iteration; so a shallow or an urgent clip does not wait for the end of a deep one. The
    answer equals `purifier(clip)`, bit for bit where clips share no evaluation, as on a CPU.

    It pays for fairness, and for throughput where one clip does not fill the device. Clips of another shape wait until
    those in flight have ended. The purifier may be used elsewhere at the same time. Where its models change,
    or are moved or converted as by `to`, clips in flight begin again.

    Args:
        purifier: of a deterministic method, without `feedback`. Its settings are taken as they are now.
        classifier: a module of clips (B, 3, F, H, W) in [0, 1] on the purifier's device that returns logits (B, K);
            every answer then has the majority's label.
        max_batch: clips in flight at most.
        queue_size: clips that wait at most.
        policy: what a full queue does with a new clip: "block" its caller until there is room, "reject" it
            (QueueFull), or take it and "drop-oldest", whose future ends in Dropped: cameras want the newest.
        order: of the clips that wait: "fifo", first come, or "edf", earliest deadline first, where those without one
            come last, and under a lasting load never.
        return_votes: answers have all votes.
        early_stop: decode votes only until the label is settled; the labels are those of all votes.
        batch_sizes: sizes of the groups of clips that share an evaluation, from 1 on; by default the powers of two up
            to `max_batch` on a GPU, where each is captured, and 1 on a CPU, where sharing gains nothing.
        clock: seconds, as time.monotonic.

    A context manager, also for `async with`; leaving it finishes what was submitted, or cancels it where an error is on
    its way. The end of the program cancels what is left. A process that is forked needs a stream of its own, and none
    can be copied.
    """

    def __init__(
        self,
        purifier: Purifier,
        classifier: nn.Module | None = None,
        *,
        max_batch: int = 4,
        queue_size: int = 16,
        policy: Policy = "block",
        order: Order = "fifo",
        return_votes: bool = False,
        early_stop: bool = True,
        batch_sizes: Sequence[int] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        check_stream_models(purifier, classifier)
        check_count("max_batch", max_batch)
        check_count("queue_size", queue_size)
        for name, value, accepted in (("policy", policy, get_args(Policy)), ("order", order, get_args(Order))):
            if value not in accepted:
                raise ValueError(f"unknown {name} {value!r}; accepted: {', '.join(accepted)}")
        check_flag("return_votes", return_votes)
        check_flag("early_stop", early_stop)
        if not callable(clock):
            raise TypeError(f"clock must be a function that returns seconds, got {type(clock).__name__}")
        self._purifier = purifier = purifier.with_config()  # whose settings nobody else can change
        self._queue_size, self._policy, self._clock = queue_size, policy, clock
        self._batch = Batch(
            purifier,
            classifier,
            all_votes=return_votes,
            early_stop=early_stop,
            sizes=_checked_sizes(batch_sizes, max_batch, purifier._executor.device.type == "cuda"),
            clock=clock,
        )
        self._changed = threading.Condition()  # guards everything below
        self._waiting = Waiting(self._batch, queue_size, max_batch, policy, order, clock)
        self._warmups: list[Callable[..., None]] = []
        self._counts = dict.fromkeys(Counts._fields, 0)
        self._closing: Literal["finish", "cancel"] | None = None
        self._broken: BaseException | None = None
        # The worker sees the caller's context, such as the backend that was chosen.
        run = contextvars.copy_context().run
        self._worker = threading.Thread(target=run, args=(self._work,), name="StreamPurifier", daemon=True)
        self._process = os.getpid()
        # A thread that is still computing when the interpreter ends would abort the process.
        atexit.register(self.close, cancel=True)
        self._worker.start()

    def submit(
        self,
        clip: Tensor,
        *,
        deadline: float | None = None,
        steps: int | None = None,
        progress: Listener | None = None,
    ) -> Future[Answer]:
        """Hand in a clip; returns the future of its answer.

        Args:
            clip: (3, F, H, W), floats in [0, 1] or uint8, of no more frames than the purifier's `max_frames`. It must
                not be changed before the answer is there.
            deadline: seconds from now until the answer is of use. A clip that can no longer make it is not computed:
                its future ends in DeadlineMissed. Nor do clips join others that would then miss theirs.
            steps: its depth T, in the place of the purifier's `inversion_steps`.
            progress: is told of each step of the clip, by the thread that computes, which waits for it. Where a clip
                begins again, so do its steps. What it raises ends this clip.

        TypeError or ValueError for other arguments, QueueFull, and Closed are raised here. `future.cancel()` works
        until the answer is there, and frees the clip's place at the next step.
        """
        request = self._request(clip, deadline, steps, progress)
        self._enqueue(request)
        return request.future

    async def answer(
        self,
        clip: Tensor,
        *,
        deadline: float | None = None,
        steps: int | None = None,
        progress: Listener | None = None,
    ) -> Answer:
        """`submit` for asyncio: the answer, or what the future ends in. Canceling the task cancels the clip.

        Tasks that wait for room in a full queue take no thread, and get it in no order.
        """
        request = self._request(clip, deadline, steps, progress)
        while not self._enqueue(request, wait=False):
            await asyncio.sleep(_ROOM_POLL)
        return await asyncio.wrap_future(request.future)

    def warmup(self, shape: Sequence[int], *, steps: int | None = None) -> None:
        """Make what clips of this shape (3, F, H, W) need, for every batch size: kernels, captures. Waits for its end.

        Clips that are submitted meanwhile wait. RuntimeError in a callback of a future, which would wait for itself.
        """
        if threading.current_thread() is self._worker:
            raise RuntimeError("a future's callback cannot wait for a warmup: the thread that calls it makes it")
        clip = gray_video(shape)
        requests = [self._request(clip, None, steps) for _ in range(self._batch.sizes[-1])]
        done: Future[None] = Future()

        def warm(reason: BaseException | None = None) -> None:
            try:
                if reason is not None:
                    raise reason
                self._batch.warm(requests)
            except BaseException as error:  # the caller's, not the worker's
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._changed:
            self._raise_if_closed()
            self._warmups.append(warm)
            self._changed.notify_all()
        done.result()

    @property
    def counts(self) -> Counts:
        with self._changed:
            in_flight = 0 if self._batch.warming else len(self._batch.flights)
            now = {"waiting": len(self._waiting.requests), "in_flight": in_flight}
            return Counts(**{**self._counts, **now})

    def close(self, *, cancel: bool = False) -> None:
        """End: finish all clips that were submitted, or with `cancel` end their futures in Closed. Waits for it."""
        if os.getpid() != self._process:  # forked: the thread is not here, and the lock may be held for ever
            return
        with self._changed:
            if self._closing is None or cancel:
                self._closing = "cancel" if cancel else "finish"
            self._changed.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(cancel=kind is not None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        await asyncio.to_thread(self.close, cancel=kind is not None)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a StreamPurifier has a thread: it cannot be copied or pickled; make one of a Purifier instead")

    # Callers' threads

    def _request(
        self,
        clip: Tensor,
        deadline: float | None,
        steps: int | None,
        progress: Listener | None = None,
    ) -> Request:
        if os.getpid() != self._process:
            raise Closed("the stream is another process's, which this one was forked from: make a stream here")
        check_video(clip)
        most, least = self._purifier.max_frames, max(LEAST_SIDE, 2 * self._purifier.vae_factor)
        if clip.ndim != 4 or clip.shape[1] > most or min(clip.shape[-2:]) < least:
            accepted = f"accepted: one clip (3, F, H, W) of 2 to {most} frames with sides of {least} or more"
            raise ValueError(f"clip has shape {tuple(clip.shape)}; {accepted}")
        now, depth = self._clock(), self._purifier.config.inversion_steps if steps is None else steps
        if deadline is not None:
            check_number("deadline", deadline)
        if steps is not None:
            self._purifier.with_config(inversion_steps=steps)  # raises for a bad one
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a function of a Progress, got {type(progress).__name__}")
        due = math.inf if deadline is None else now + deadline
        return Request(clip.detach(), Future(), now, due, depth, progress)

    def _enqueue(self, request: Request, *, wait: bool = True) -> bool:
        """Into the queue, as its policy says; False where it is full and its caller neither waits nor is refused."""
        ended: list[Ended] = []
        with self._changed:
            self._raise_if_closed()
            while self._waiting.full and not request.future.cancelled():
                if (gone := self._waiting.make_room()) is not None:
                    ended.append((gone, Dropped("a newer clip took its place in the queue")))
                elif self._policy == "reject" or threading.current_thread() is self._worker:
                    self._counts["rejected"] += 1
                    raise QueueFull(f"{self._queue_size} clips wait already; accepted: more once there is room")
                elif self._clock() > request.deadline:
                    break  # the worker would refuse it
                elif not wait:
                    return False
                else:
                    self._changed.wait(min(request.deadline - self._clock(), threading.TIMEOUT_MAX))
                    self._raise_if_closed()
            if not request.future.cancelled():
                self._counts["submitted"] += 1
                if not self._waiting.full:
                    self._waiting.requests.append(request)
                else:
                    ended.append((request, DeadlineMissed("the clip's deadline has passed while the queue was full")))
                self._changed.notify_all()
        self._end(ended)
        return True

    def _raise_if_closed(self) -> None:
        if self._broken is not None:
            raise Closed(f"the stream has ended: {self._broken}") from self._broken
        if self._closing is not None:
            raise Closed("the stream was closed")

    # The worker's thread

    def _work(self) -> None:
        try:
            while self._let_in():
                self._end(self._batch.advance())
        except BaseException as error:  # a fault of ours: nobody waits for ever
            self._broken = error
        finally:
            self._give_up()

    def _let_in(self) -> bool:
        """Wait for something to do, and let clips in; False if there is nothing more to come."""
        ended: list[Ended] = []
        try:
            with self._changed:
                while not (self._waiting.requests or self._batch.flights or self._warmups or self._closing):
                    self._changed.wait()
                if self._closing == "cancel":
                    return False
                ended += [*self._late_flights(), *self._waiting.take_late()]
                warm = self._warmups.pop(0) if self._warmups and not self._batch.flights else None
                if warm is None and not self._warmups:
                    admitted = self._waiting.admissible()
                    self._batch.admit(admitted)  # may raise: until then they wait
                    self._waiting.requests = [one for one in self._waiting.requests if one not in admitted]
                self._changed.notify_all()
        finally:
            self._end(ended)
        if warm is not None:
            warm()
        with self._changed:
            return bool(self._batch.flights or self._waiting.requests or self._warmups or not self._closing)

    def _late_flights(self) -> list[Ended]:
        """Takes clips out of flight whose deadline has passed, or who were canceled."""
        ended: list[Ended] = []
        for flight in list(self._batch.flights):
            canceled = flight.request.future.cancelled()
            if canceled or self._clock() > flight.request.deadline:
                self._batch.leave(flight, late=not canceled)
                ended.append((flight.request, DeadlineMissed("the clip's deadline has passed while it was in flight")))
        return ended

    def _end(self, ended: Sequence[Ended]) -> None:
        """Count the ends of clips and set their futures, unless those were canceled.

        Futures call their callbacks here, which may submit clips: the lock is not held.
        """
        for request, result in ended:
            wanted = request.future.set_running_or_notify_cancel()
            with self._changed:
                self._counts[_OUTCOMES.get(type(result), "failed") if wanted else "canceled"] += 1
            if not wanted:
                continue
            try:
                if isinstance(result, BaseException):
                    request.future.set_exception(result)
                else:
                    request.future.set_result(result)
            except BaseException:  # SystemExit of a callback; a future logs other errors of callbacks itself
                _logger.exception("a callback of a clip's future has raised")

    def _give_up(self) -> None:
        """Nothing more is computed: end the futures of all who are left."""
        with self._changed:
            self._closing = self._closing or "cancel"
            left = [*(flight.request for flight in self._batch.flights), *self._waiting.requests]
            self._batch.flights, self._waiting.requests = [], []
            warmups, self._warmups = self._warmups, []
            self._changed.notify_all()
        atexit.unregister(self.close)
        reason = self._broken or Closed("the stream was closed before the clip's answer was there")
        self._end([(request, reason) for request in left])
        for warm in warmups:
            warm(reason)


def check_stream_models(purifier: Purifier, classifier: nn.Module | None) -> None:
    """TypeError or ValueError for models that a StreamPurifier does not take."""
    if not isinstance(purifier, Purifier):
        raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    if purifier.properties["randomized"] or purifier.config.feedback:
        seen = "feedback" if purifier.config.feedback else f"the method {purifier.config.method!r}, which draws noise"
        raise ValueError(f"the purifier has {seen}; accepted: 'videopure' or 'ddim_inversion', without feedback")
    if classifier is None:
        return
    if not isinstance(classifier, nn.Module):
        raise TypeError(f"classifier must be a torch.nn.Module, got {type(classifier).__name__}")
    weights = next(chain(classifier.parameters(), classifier.buffers()), None)
    device = purifier._executor.device
    if weights is not None and weights.device != device:
        raise ValueError(f"the classifier is on {weights.device} and the purifier on {device}: move one of them")


def _checked_sizes(sizes: Sequence[int] | None, max_batch: int, on_gpu: bool) -> tuple[int, ...]:
    if sizes is None:
        return tuple(2**i for i in range(max_batch.bit_length())) if on_gpu else (1,)
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence) or not sizes:
        raise TypeError(f"batch_sizes must be a sequence of ints, got {sizes!r}")
    for size in sizes:
        check_count("batch_sizes", size, most=max_batch)
    if sizes[0] != 1 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"batch_sizes are {tuple(sizes)}; accepted: different sizes, ascending from 1")
    return tuple(sizes)
