"""The study of latency behind bench/LATENCY.md: `python bench/latency.py`, three quarters of an hour on two cores.

The packaged prior and classifier as a StreamPurifier, every part on arrivals made of seeds, and beside the measured
runs the same arrivals simulated. bench/results/latency-cpu.json is written when all parts are done, with the pictures
latency-cpu.svg and latency-cpu-timeline.svg; `make report` writes the page. Nothing else should run on the machine.
--scale 0.05 tries all parts on short runs, in the folder build.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from videopure_fast import Purifier, tiny
from videopure_fast.realtime import study
from videopure_fast.realtime.arrivals import Arrival, bursts, cameras, poisson, with_deadlines
from videopure_fast.realtime.figures import draw_load, draw_timeline
from videopure_fast.realtime.loadgen import SCENARIOS, Plan, run_scenario
from videopure_fast.realtime.simulation import simulate
from videopure_fast.realtime.stream import StreamPurifier
from videopure_fast.realtime.study import ServiceTimes, Setting, summarize

RESULTS = Path(__file__).resolve().parent / "results"
TRIAL = RESULTS.parents[1] / "build" / "latency"
SEED = 18_000_000
LOADS = (0.5, 0.8, 0.95)
FINE_LOADS = tuple(round(0.05 * number, 2) for number in range(1, 20))  # of the simulated curve
BATCHES = (1, 4)
FRAMES_PER_SECOND, WINDOW = 25.0, 16
VOTES = 4  # that settle the majority of 7, where they agree
SHALLOW, DEEP = 1, 9  # depths T of the bursts
DEADLINE_CLIPS = 3  # the deadline of the sweep and of Server, in times of a clip
LIVE_DEADLINE = 2.0  # seconds, of cameras
ASSUMED_CURVE = {1: 1.0, 2: 4 / 3, 4: 2.0}  # a batch of 4 costs 2 single clips: assumed, not measured
FLEET_CAMERAS, FLEET_SECONDS, FLEET_DEADLINE, FLEET_SHARE = 1000, 30, 2.0, 0.99
FASTER_DECODER = 0.1  # of the decoder's time
LEAST_SECONDS = 25  # of a run of a trial
GPU_ROW = "stages: ours, 1x32x224x224"  # of the results of `make gpu`
GPU_FRAMES, GPU_DEPTH, GPU_VOTES_DECODED = 32, 5, 7  # of that row


class Study:
    """The parts, each of which adds its rows."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.purifier, self.classifier = Purifier.from_pretrained("tiny", device="cpu"), tiny.load_classifier()
        clips, _ = tiny.sample_clips(8, seed=SEED)
        self.clips = list(clips)
        self.depth = self.purifier.config.inversion_steps
        self.result = study.new_study(torch.device("cpu"), scale=scale, seed=SEED, votes=VOTES, depth=self.depth)
        self.service = self.measure()

    def build(self, setting: Setting) -> StreamPurifier:
        server = StreamPurifier(self.purifier, self.classifier, **setting._asdict())
        server.warmup(self.clips[0].shape)
        return server

    def seconds(self, seconds: float) -> float:
        return max(seconds * self.scale, LEAST_SECONDS)

    def measure(self) -> ServiceTimes:
        with self.build(Setting()) as server:
            repeats = max(2, round(15 * self.scale))
            return study.measure_service(server, self.clips[0], depth=self.depth, votes=VOTES, repeats=repeats)

    def add(self, part: str, arrivals: Sequence[Arrival], settings: Sequence[Setting], **labels: Any) -> None:
        """Measure each setting on the arrivals, and simulate the same with the times measured just before and after."""
        for setting in settings:
            before = self.measure()
            row = study.run(self.build, setting, self.clips, arrivals, part=part, **labels)
            after = self.measure()
            simulated = simulate(before.merged(after), arrivals, setting, seed=SEED)
            row["drift"] = after.clip_seconds() / before.clip_seconds() - 1  # of the machine's speed, meanwhile
            self.result["rows"] += [row, study.row(setting, simulated, simulated=True, part=part, **labels)]
            print(f"{part}, {labels}, {setting}, {row['drift']:+.0%}: {row['summary']['latency']}", flush=True)

    def loads(self) -> None:
        for load in LOADS:
            rate = load / self.service.clip_seconds()
            arrivals = poisson(rate, seconds=self.seconds(150), seed=SEED)
            self.add("load", arrivals, [Setting(limit) for limit in BATCHES], load=load)

    def curve(self) -> None:
        """The simulated curve between and beyond the measured loads."""
        for setting in map(Setting, BATCHES):
            for load in FINE_LOADS:
                arrivals = poisson(load / self.service.clip_seconds(), seconds=2000 * self.scale + 100, seed=SEED)
                row = study.row(
                    setting, simulate(self.service, arrivals, setting), simulated=True, part="curve", load=load
                )
                self.result["rows"].append({**row, "records": []})

    def policies(self) -> None:
        """Cameras that ask for more than there is, with a deadline."""
        keeps_up = WINDOW / FRAMES_PER_SECOND / self.service.clip_seconds()
        count = max(2, 1 + int(keeps_up))
        live = cameras(count, seconds=self.seconds(60), rate=FRAMES_PER_SECOND, window=WINDOW, hop=WINDOW, seed=SEED)
        chosen = [Setting(1, 4, policy) for policy in ("block", "reject", "drop-oldest")]
        self.add("cameras", with_deadlines(live, [LIVE_DEADLINE]), chosen, cameras=count)
        mixed = with_deadlines(live, [LIVE_DEADLINE, 3 * LIVE_DEADLINE])
        self.add("order", mixed, [Setting(1, 4, "drop-oldest", order) for order in ("fifo", "edf")], cameras=count)

    def bursts(self) -> None:
        """Shallow clips and deep ones at one moment: the source of a clip says which it is, 3 is the deep one."""
        each = [self.service.clip_seconds(steps=steps) for steps in (SHALLOW, DEEP)]
        every = (3 * each[0] + each[1]) / 0.6
        depths = (SHALLOW, SHALLOW, SHALLOW, DEEP)
        arrivals = bursts(4, every=every, seconds=self.seconds(120), steps=depths, seed=SEED)
        self.add("bursts", arrivals, [Setting(limit) for limit in BATCHES], every=every)

    def sweep(self) -> None:
        """The highest load that meets a deadline, measured and simulated."""
        deadline = DEADLINE_CLIPS * self.service.clip_seconds()
        seconds, within = self.seconds(60), 0.1
        found, tried = study.carried_load(
            self.build,
            Setting(),
            self.clips,
            self.service,
            deadline=deadline,
            seconds=seconds,
            seed=SEED,
            within=within,
        )
        rows = [{"load": row["load"], "p95": row["summary"]["latency"]["p95"]} for row in tried]
        simulated = carried(self.service, Setting(), deadline, seconds)
        asked = {"deadline": deadline, "deadline_clips": DEADLINE_CLIPS, "seconds": seconds}
        self.result["sweep"] = {**asked, "measured": found, "tried": rows, "simulated": simulated}

    def scenarios(self) -> None:
        """MLPerf's, by LoadGen."""
        alone = self.service.clip_seconds()
        self.result["scenarios"] = []
        for scenario in SCENARIOS:
            plan = Plan(scenario, self.seconds(60), alone, 0.8 / alone, DEADLINE_CLIPS * alone, seed=SEED)
            with self.build(Setting()) as server:
                self.result["scenarios"].append(run_scenario(server, self.clips, plan))
            print(scenario, self.result["scenarios"][-1]["latency"], flush=True)

    def answers(self) -> None:
        """What only the model can say."""
        assumed = assumed_service()
        limits = {limit: carried(assumed, Setting(limit, 10**6), DEADLINE_CLIPS, 3000) for limit in BATCHES}
        gpu = h200_service()
        machines = {"this machine": (self.service, WINDOW), "one H200, clips of 224x224": (gpu, GPU_FRAMES)}
        fleets = []
        for name, (service, window) in machines.items():
            for what, factor in (("", 1.0), (f"a decoder that takes {FASTER_DECODER:.0%} of its time", FASTER_DECODER)):
                faster = service.scaled("decode", factor)
                fleets.append({"machine": name, "change": what, "window": window, **fleet(faster, window)})
                print(fleets[-1], flush=True)
        self.result["answers"] = {
            "assumed": {"curve": ASSUMED_CURVE, "deadline_clips": DEADLINE_CLIPS, "carried": limits},
            "fleets": fleets,
        }

    def run(self) -> dict[str, Any]:
        parts: list[Callable[[], None]] = [self.loads, self.policies, self.bursts, self.sweep, self.scenarios]
        for part in (*parts, self.curve, self.answers):
            part()
        self.result |= {"service": self.service._asdict(), "service_after": self.measure()._asdict()}
        return self.result


def carried(service: ServiceTimes, setting: Setting, deadline: float, seconds: float) -> float | None:
    """The highest simulated load, in clips a second times the time of a clip, with a p95 within the deadline."""

    def meets(load: float) -> bool:
        arrivals = poisson(load / service.clip_seconds(), seconds=seconds, seed=SEED)
        if not arrivals:  # of a trial's short run
            return True
        return bool(summarize(simulate(service, arrivals, setting))["latency"]["p95"] <= deadline)

    return study.highest_load(meets, 0.1, 2.0)


def assumed_service() -> ServiceTimes:
    """A clip of 1 s whose batches follow the assumed curve."""
    ends = {size: [0.1 * times] for size, times in ASSUMED_CURVE.items()}
    evaluation = {size: [0.8 * times / 12] for size, times in ASSUMED_CURVE.items()}
    return ServiceTimes(ends, evaluation, ends, {1: [0.0]}, depth=5)


def h200_service() -> ServiceTimes:
    """What one clip takes on an H200 by the rows of `make gpu`; of several at once each is taken to need as much."""
    stages = json.loads((RESULTS / "nvidia-h200.json").read_text())["rows"][GPU_ROW]["stages"]
    encode, chain, decode = (stages[name]["median"] for name in ("encode", "chain", "decode"))
    evaluation = chain / (2 * (GPU_DEPTH + 1))
    return ServiceTimes(
        {1: [encode]}, {1: [evaluation]}, {1: [decode / GPU_VOTES_DECODED]}, {1: [0.0]}, GPU_DEPTH, VOTES
    )


def fleet(service: ServiceTimes, window: int) -> dict[str, Any]:
    """How many servers 1,000 cameras need, for 99 % of the clips to be in time; as many as are busy, at least."""
    arrivals = with_deadlines(
        cameras(FLEET_CAMERAS, seconds=FLEET_SECONDS, rate=FRAMES_PER_SECOND, window=window, hop=window, seed=SEED),
        [FLEET_DEADLINE],
    )

    def meets(servers: int) -> bool:
        records = simulate(service, arrivals, Setting(), servers=servers)
        return bool(summarize(records)["in_time"] >= FLEET_SHARE)

    busy = FLEET_CAMERAS * FRAMES_PER_SECOND / window * service.clip_seconds()
    possible = service.clip_seconds() <= FLEET_DEADLINE
    servers = study.fewest(meets, least=math.ceil(busy)) if possible else None
    said = {"cameras": FLEET_CAMERAS, "deadline": FLEET_DEADLINE, "in_time": FLEET_SHARE}
    return {"clip_seconds": service.clip_seconds(), "busy_servers": busy, "servers": servers, **said}


def draw(result: dict[str, Any], folder: Path) -> None:
    machine = result["machine"]
    where = f"packaged prior, {machine['device']}, {machine['threads']} threads"
    rows = [row for row in result["rows"] if row["part"] in ("load", "curve")]
    shown = [row for row in rows if row["part"] == "curve" or not row["simulated"]]
    draw_load(shown, folder / "latency-cpu.svg", note=where)
    one_by_one = [row for row in shown if row["part"] == "load" and row["setting"]["max_batch"] == 1]
    (timeline,) = (row for row in one_by_one if row["load"] == LOADS[1])
    draw_timeline(timeline, folder / "latency-cpu-timeline.svg", note=f"one by one at {LOADS[1]:.0%} load, {where}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the runs; below 1 it is a trial, in build/")
    scale = parser.parse_args().scale
    folder = RESULTS if scale >= 1 else TRIAL
    folder.mkdir(parents=True, exist_ok=True)
    result = Study(scale).run()
    study.save(result, folder / "latency-cpu.json")
    draw(result, folder)


if __name__ == "__main__":
    main()
