"""Clips in flight: each at a step of its own, evaluated together.

One thread owns a `Batch`. An iteration takes every clip one step further: a new one is encoded, one in the sampling
loops has one evaluation of the UNet, one that has been sampled has one vote decoded and classified. So a clip that
arrives waits for one step of the others, and not for their ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from ..defense.classifier import classify_votes, settled
from ..inputs import like_video
from ..purifier import Purifier
from ..runtime import readback
from ..runtime.captures import Captures
from ..sampling import BatchStep, Chain, batch_rows
from .estimates import Estimates, share_in_time
from .flights import Clock, Encoded, Ended, Flight, Request, Stage
from .serving import Answer, Progress, Times

_MOST_DEPTHS = 16  # of which the settings are kept
_SHAPES = 4  # of clips, whose captured steps are kept
_WARM_ROUNDS = 2  # on the CPU, a step is recorded when it comes again


class Batch:
    """The clips in flight through one purifier, all of one shape.

    classifier: of clips (B, 3, F, H, W) in [0, 1]; None for none. all_votes: decode every vote. early_stop: stop
    decoding when the majority's label is settled. sizes: of the groups of clips that share an evaluation, ascending
    from 1.
    """

    def __init__(
        self,
        purifier: Purifier,
        classifier: nn.Module | None,
        *,
        all_votes: bool,
        early_stop: bool,
        sizes: Sequence[int],
        clock: Clock,
    ) -> None:
        self.flights: list[Flight] = []
        self._purifier, self._classifier = purifier, classifier
        self._all_votes, self._early_stop = all_votes, early_stop
        self.sizes, self._clock = sizes, clock
        self._depths: dict[int, Purifier] = {}
        self._unet: object = purifier._executor.unet  # the form that the steps below are made of
        self._steps: dict[bool, BatchStep] = {}
        self._captures = Captures(2 * len(sizes) * _SHAPES, one_thread=True)
        self.estimates = Estimates()
        self.warming = False
        self._last: torch.cuda.Event | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape that the clips in flight have; None where there are none."""
        return tuple(self.flights[0].request.clip.shape) if self.flights else None

    def keeps_deadlines(self, joining: Sequence[Request]) -> bool:
        """Whether nobody would miss a deadline if these joined those in flight."""
        now = self._clock()
        needs = [(one.request, one.spent(now)) for one in self.flights] + [(request, 0.0) for request in joining]
        return share_in_time(now, [(one.deadline, self.estimates.least(one.kind), spent) for one, spent in needs])

    def warm(self, requests: Sequence[Request]) -> None:
        """Compute as many of these as share an evaluation, for every size, until there is nothing new to make."""
        self.warming = True
        try:
            for size in self.sizes:
                self._compile_ahead(requests[:size])
                for _ in range(_WARM_ROUNDS):
                    self.estimates.restart(requests[0].kind)  # what a clip took while things were made says nothing
                    self.admit(requests[:size])
                    while self.flights:
                        for _, result in self.advance():
                            if isinstance(result, BaseException):
                                raise result
        finally:
            self.warming = False
            self.flights.clear()

    def _compile_ahead(self, requests: Sequence[Request]) -> None:
        """The GPU kernels of a group of clips, side by side."""
        with self._purifier._inference():
            self._purifier._refresh()
            clips = self._purifier._preprocess(torch.stack([request.clip for request in requests]))
            last = not self._all_votes and self._classifier is None
            self._purifier._compile_ahead(clips.shape, last=last, progress=False)

    def admit(self, requests: Sequence[Request]) -> None:
        """Let clips of the shape of those in flight join them."""
        now = self._clock()
        self.flights += [Flight(request, self._at_depth(request.steps), now) for request in requests]

    def advance(self) -> list[Ended]:
        """Take every clip one step further; returns those that have ended, each with its answer or what went wrong."""
        with self._purifier._inference():
            if self._purifier._executor.unet is not self._unet:
                self._forget()
            for flight in self.flights:
                flight.iterations += 1
                flight.shared += len(self.flights)
            for stage in get_args(Stage)[:-1]:
                for group in self._groups([flight for flight in self.flights if flight.stage == stage]):
                    if group[0] in self.flights:  # else it has begun again
                        self._attempt(getattr(self, f"_{stage}"), group)
            self._keep_pace()
            self._tell()
            return self._ended()

    def leave(self, flight: Flight, *, late: bool) -> None:
        """Compute no more of a clip. late: it takes more seconds than it has had; a canceled one says nothing."""
        self.flights.remove(flight)
        if late:
            self.estimates.takes_more(flight.request.kind, flight.spent(self._clock()))

    def _at_depth(self, steps: int) -> Purifier:
        if steps == self._purifier.config.inversion_steps:
            return self._purifier
        if steps not in self._depths:
            while len(self._depths) >= _MOST_DEPTHS:
                self._depths.pop(next(iter(self._depths)))
            self._depths[steps] = self._purifier.with_config(inversion_steps=steps)
        return self._depths[steps]

    def _forget(self) -> None:
        """The models have changed: whoever is in flight begins again with them as they are now."""
        self._unet = self._purifier._executor.unet
        self._steps.clear()
        self._captures.clear()
        self._depths.clear()  # which have the forms that they were made with
        self._begin_again(self.flights)

    def _groups(self, flights: list[Flight]) -> Iterator[list[Flight]]:
        """Flights at one stage in groups of the sizes that there are, the largest first."""
        everything = bool(flights) and flights[0].stage == "decode" and self._all_votes  # which differs with the depth
        together = [flight for flight in flights if not flight.alone and not everything]
        for size in reversed(self.sizes):
            while len(together) >= size:
                yield together[:size]
                together = together[size:]
        yield from ([flight] for flight in flights if flight.alone or everything)

    def _attempt(self, stage: Callable[[list[Flight]], None], group: list[Flight]) -> None:
        """A stage for a group. If it fails, each of its clips begins again alone, so that only the culprit ends."""
        try:
            with readback.collecting() as flags:
                stage(group)
        except BaseException as error:  # of the caller's models, or memory
            if self._purifier._executor.unet is not self._unet:
                return  # they were moved meanwhile, and the next iteration begins again
            if len(group) == 1:
                group[0].stage, group[0].result = "end", _cause(group[0], error)
            else:
                self._begin_again(group, alone=True)
        else:
            for flight in group:
                flight.flags.extend(flags)

    def _begin_again(self, flights: Sequence[Flight], *, alone: bool = False) -> None:
        """The same clips at their start."""
        self.flights = [
            Flight(one.request, self._at_depth(one.request.steps), one.started, alone or one.alone)
            if one in flights
            else one
            for one in self.flights
        ]

    # Stages

    def _encode(self, group: list[Flight]) -> None:
        """Also looks at the models, once a clip as a call does."""
        self._purifier._refresh()
        if self._purifier._executor.unet is not self._unet:
            self._forget()
            return
        clips = torch.cat([one.purifier._preprocess(one.request.clip[None]) for one in group])
        targets = self._purifier._encode(clips)
        voting = self._purifier.config.method == "videopure"
        flows = self._purifier._latent_flow(clips).split(1) if voting else [None] * len(group)
        for flight, target, flow in zip(group, targets.split(1), flows, strict=True):
            chain = flight.purifier._chain(target)
            flight.encoded = Encoded(target, flow, chain)
            flight.states, flight.steps = [target], chain.clip_steps()[::-1]
            flight.stage, flight.times["encoded"] = "evaluate", self._clock()
            flight.news.append(Progress("encode", 1, 1, None))

    def _evaluate(self, group: list[Flight]) -> None:
        """One evaluation of the UNet for clips at steps of their own."""
        rows = [flight.steps[-1] for flight in group]
        latents = torch.cat([flight.states[-1] for flight in group])
        encoded = group[0].encoded
        assert encoded is not None
        step, others = self._step(encoded.chain, all(row.inverts for row in rows)), batch_rows(rows, latents)
        if self._purifier.captured and self._purifier._executor.capturable:
            results = self._captures(step, latents, *others, first_activation=encoded.chain.first_activation(latents))
        else:
            results = step(latents, *others)
        for flight, state, noise_pred in zip(group, *(result.split(1) for result in results), strict=True):
            if flight.steps.pop().inverts:  # votes are of denoising's states
                flight.states = [state]
            else:
                flight.states.append(state)
                flight.noise_preds.append(noise_pred)
            total = flight.purifier.evaluations
            flight.news.append(Progress("evaluate", total - len(flight.steps), total, None))
            if not flight.steps:
                flight.stage = "vote"

    def _step(self, chain: Chain, invert: bool) -> BatchStep:
        """The one object for a kind of step, by which its captures are known. Prompts are the same at all depths."""
        if invert not in self._steps:
            texts = tuple(constants.texts for constants in chain.denoising.constants)
            self._steps[invert] = BatchStep(chain.unet, texts, invert)
        return self._steps[invert]

    def _vote(self, group: list[Flight]) -> None:
        """The guided votes of clips that have been sampled, all at once: that takes next to no time."""
        for flight in group:
            assert flight.encoded is not None
            states, noise_preds = torch.stack(flight.states), torch.stack(flight.noise_preds)
            readback.check_finite("denoise", states, noise_preds, dtype=self._purifier._executor.dtype)
            flight.votes = states[-1:]
            target, flow, _ = flight.encoded
            if flow is not None:
                coefficients = flight.purifier._schedule.vote_coefficients()
                flight.votes = flight.purifier._vote(states, noise_preds, target, flow, coefficients)
            last = len(flight.votes) - 1  # the purified clip, which is always wanted
            others = range(last - 1, -1, -1) if self._all_votes or self._classifier is not None else ()
            flight.pending = [*others, last]
            flight.stage, flight.times["sampled"] = "decode", self._clock()

    def _decode(self, group: list[Flight]) -> None:
        """One vote of each clip, decoded and classified; all votes of a single one where all are wanted."""
        chosen = [sorted(flight.pending) if self._all_votes else flight.pending[-1:] for flight in group]
        latents = [flight.votes[votes] for flight, votes in zip(group, chosen, strict=True) if flight.votes is not None]
        height, width = group[0].request.clip.shape[-2:]
        clips = self._purifier._decode(torch.cat(latents, 1)).transpose(0, 1)[..., :height, :width]
        logits = None if self._classifier is None else classify_votes(self._classifier, clips)
        for i, (flight, votes) in enumerate(zip(group, chosen, strict=True)):
            flight.decoded |= dict(zip(votes, clips[i], strict=True))
            if logits is not None:
                flight.logits |= dict(zip(votes, logits[i], strict=True))
            if flight.request.progress is not None:
                self._decoded(flight, votes)
            flight.pending = [vote for vote in flight.pending if vote not in votes]
            if not flight.pending or self._is_settled(flight):
                flight.stage, flight.times["decoded"] = "end", self._clock()

    def _decoded(self, flight: Flight, votes: Sequence[int]) -> None:
        """Report these votes, each with its label."""
        total = len(flight.decoded) - len(votes) + len(flight.pending)
        for done, vote in enumerate(votes, 1 + len(flight.decoded) - len(votes)):
            label = int(flight.logits[vote].argmax()) if flight.logits else None
            flight.news.append(Progress("decode", done, total, label))

    def _is_settled(self, flight: Flight) -> bool:
        """Whether the votes to come cannot change the label."""
        seen, left = len(flight.logits), len(flight.pending)
        return self._early_stop and seen > left and bool(settled(_counts(flight)[None], left).item())

    # Ends

    def _tell(self) -> None:
        """Callers hear of the steps that their clips have taken; one whose function raises ends its own clip."""
        for flight in self.flights:
            tell, news, flight.news = flight.request.progress, flight.news, []
            if tell is None:
                continue
            try:
                for one in news:
                    tell(one)
            except BaseException as error:  # SystemExit too: the thread is not the caller's to end
                flight.stage, flight.result = "end", error

    def _ended(self) -> list[Ended]:
        """Takes clips out of flight that have their results. One that ends may let others begin again."""
        ended = []
        for flight in tuple(self.flights):
            if flight in self.flights and self._has_ended(flight) and flight.result is not None:
                self.flights.remove(flight)
                ended.append((flight.request, flight.result))
        return ended

    def _has_ended(self, flight: Flight) -> bool:
        """Whether a clip has its result: its answer, or what went wrong."""
        if flight.stage != "end" or flight.result is not None:
            return flight.stage == "end"
        try:
            if not flight.flags.read():  # the models are not what they were taken for
                self._purifier._refresh(anew=True)
                self._forget()
                return False
            flight.result = self._answer(flight)
        except FloatingPointError as error:
            if not flight.alone and self.sizes[-1] > 1:  # it may be another clip of its group that is not finite
                self._begin_again([flight], alone=True)
                return False
            flight.result = error
        except Exception as error:  # of logits that do not belong together, or memory
            flight.result = error
        return True

    def _answer(self, flight: Flight) -> Answer:
        clip = flight.request.clip
        order = sorted(flight.decoded)
        votes = like_video(torch.stack([flight.decoded[vote] for vote in order]), clip) if self._all_votes else None
        logits, label = None, None
        if flight.logits:
            logits = torch.stack([flight.logits[vote] for vote in order]).to(clip.device)
            label = int(_counts(flight).argmax())
        purified = like_video(flight.decoded[order[-1]], clip)
        if clip.is_cuda:  # the caller may use another stream
            torch.cuda.current_stream(clip.device).synchronize()
        now = self._clock()
        self.estimates.took(flight.request.kind, flight.spent(now))
        times = Times(flight.request.submitted, flight.started, **flight.times, done=now)
        return Answer(purified, votes, logits, label, times)

    def _keep_pace(self) -> None:
        """On a GPU, wait until it has come to the iteration before this one: what is enqueued cannot be joined."""
        if self._purifier._executor.device.type == "cuda":
            event, before = torch.cuda.Event(blocking=True), self._last  # else the wait would spin on a core
            event.record(torch.cuda.current_stream(self._purifier._executor.device))  # a thread begins with GPU 0
            self._last = event
            if before is not None:
                before.synchronize()


def _counts(flight: Flight) -> Tensor:
    """Votes for each label, (K,)."""
    logits = torch.stack(list(flight.logits.values()))
    return torch.bincount(logits.argmax(-1), minlength=logits.shape[-1])


def _cause(flight: Flight, error: BaseException) -> BaseException:
    """What made a stage fail for a clip: values that were not finite already, or else the error itself."""
    try:
        flight.flags.read()
    except FloatingPointError as cause:
        return cause
    return error
