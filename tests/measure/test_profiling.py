import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import build_purifier, clips
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from videopure_fast import machine
from videopure_fast.files import atomic_write
from videopure_fast.machine import PeakMemory, nvidia_smi
from videopure_fast.measure import estimate
from videopure_fast.measure import profile as profiling
from videopure_fast.measure.profile import measure_roofline


@pytest.fixture(scope="module", autouse=True)
def brief():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "_ROOFLINE_SECONDS", 0.01)
        patch.setattr(profiling, "_MOST_ROUNDS", 3)
        yield


@pytest.fixture(scope="module")
def purifier():
    return build_purifier()


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return tmp_path_factory.mktemp("trace") / "trace.json"


@pytest.fixture(scope="module")
def profiled(purifier, trace):
    return purifier.profile(clips(3, 8, 16, 16), trace=trace)


def stages(profile):
    return {stage.name: stage for stage in profile.stages}


def test_stages_add_up_to_the_call(profiled):
    assert tuple(stages(profiled)) == profiling.STAGES
    assert all(stage.seconds > 0 for stage in profiled.stages[:-1])
    assert 0 <= stages(profiled)["rest"].seconds < 0.5 * profiled.staged.seconds
    eager = build_purifier()
    eager.capture = False  # stages are profiled in eager steps, which take longer than a replay
    steps = eager.profile(clips(3, 8, 16, 16))
    assert 0.5 < steps.staged.seconds / steps.call.seconds < 2  # the machine may be busy
    assert profiled.chain is None and profiled.votes == 3 and profiled.shape == (3, 8, 16, 16)


def test_flops_are_torchs(purifier, profiled):
    """On the path of attention that torch's own counter knows."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        purifier(clips(3, 8, 16, 16), return_votes=True)
    assert profiled.staged.flops == profiled.call.flops == counter.get_total_flops()
    found = stages(profiled)
    assert found["inversion"].flops > 0 and found["guidance"].flops == 0
    assert found["inversion"].flops < found["denoising"].flops  # inversion leaves out what frame 0 does not need


def test_floor(profiled):
    matrix, copied = profiled.roofline
    found = stages(profiled)
    assert found["denoising"].roofline_seconds >= found["denoising"].flops / matrix
    # States, target and votes of 3 votes, noises, flow: float32 latents of 4x8x8x8 and 2 channels of 7 frames.
    latents = 4 * (4 * 8 * 8 * 8)
    moved = (3 + 2 + 1 + 3) * latents + 4 * (7 * 2 * 8 * 8)
    assert found["guidance"].roofline_seconds == pytest.approx(moved / copied)
    assert found["guidance"].roofline_fraction == found["guidance"].roofline_seconds / found["guidance"].seconds
    assert found["rest"].roofline_seconds == 0


def test_operations_are_counted(purifier, profiled):
    video = clips(3, 8, 16, 16)
    with torch.no_grad(), profiling._Operations() as operations:
        purifier(video, return_votes=True)
    assert sum(stage.launches for stage in profiled.stages) == operations.count
    with profiling._Operations() as operations:
        torch.ones(2, 3).add(1).t().view(3, 2)
    assert operations.count == 2


def test_table_and_json(profiled):
    table = str(profiled)
    for word in (*profiling.STAGES, "all stages", "as called", "GFLOP/s", "GB/s", "float32", "3 decoded votes"):
        assert word in table
    assert len({len(line) for line in table.splitlines()[1:4]}) == 1
    found = json.loads(profiled.to_json())
    assert found == profiled.to_dict()
    assert [row["name"] for row in found["stages"]] == list(profiling.STAGES)
    assert found["staged"]["seconds"] == pytest.approx(sum(row["seconds"] for row in found["stages"]))
    assert found["roofline"]["matrix_flops_per_second"] > 0 and found["captured_chain"] is None


def test_trace_shows_the_stages(profiled, trace):
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {f"videopure_fast: {stage}" for stage in profiling.STAGES[:-1]} <= names
    assert list(trace.parent.iterdir()) == [trace]


def test_launches_belong_to_the_stage_they_lie_in(purifier, monkeypatch):
    """No GPU here: a matrix product on the host stands for a launch."""
    monkeypatch.setattr(profiling, "_LAUNCH", re.compile("aten::(addmm|mm|conv2d)$"))
    video, device = clips(3, 8, 16, 16), torch.device("cpu")
    with torch.no_grad():
        staged = profiling._trace(lambda: purifier(video, capture=False), profiling.STAGES, device)
        chained = profiling._trace(lambda: purifier(video), ("chain",), device)
    assert set(staged) == {"encode", "inversion", "denoising", "decode"}
    assert set(chained) == {"chain", "rest"}
    assert 0 < staged["inversion"] <= staged["denoising"]
    assert chained["chain"] == staged["inversion"] + staged["denoising"]
    assert sum(chained.values()) == sum(staged.values())


@pytest.mark.parametrize("method, absent", [("ddim_inversion", {"flow", "guidance"}), ("ddpm", {"inversion"})])
def test_baselines_have_the_stages_they_run(method, absent, monkeypatch):
    monkeypatch.setattr(profiling, "_MOST_ROUNDS", 1)
    profile = build_purifier(method=method, inversion_steps=0).profile(clips(3, 2, 16, 16))
    assert set(profiling.STAGES) - set(stages(profile)) == absent | (
        {"flow", "guidance"} if method == "ddpm" else set()
    )
    assert profile.votes == 1 and profile.method == method


def test_batches_windows_and_votes(purifier, profiled, monkeypatch):
    monkeypatch.setattr(profiling, "_MOST_ROUNDS", 1)
    once, long = stages(profiled), purifier.profile(clips(2, 3, 12, 16, 16), return_votes=False)
    found = stages(long)
    # Two clips, each of two windows; the last of three votes is decoded.
    assert found["encode"].flops == 4 * once["encode"].flops
    assert found["denoising"].flops == 4 * once["denoising"].flops
    assert found["decode"].flops * 3 == 4 * once["decode"].flops
    assert long.votes == 1 and "1 decoded vote," in str(long)


def test_profiling_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(profiling, "_MOST_ROUNDS", 1)
    purifier = build_purifier(method="ddim", inversion_steps=0)
    video = clips(3, 2, 16, 16).requires_grad_()
    torch.manual_seed(3)
    state, known = torch.get_rng_state(), set(vars(purifier))
    purifier.profile(video)
    assert torch.equal(torch.get_rng_state(), state) and set(vars(purifier)) == known
    assert video.grad is None and purifier(video).requires_grad


def test_bad_input_comes_before_work(purifier, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        purifier.profile(clips(3, 8, 16, 16), trace=tmp_path / "nowhere" / "trace.json")
    with pytest.raises(ValueError, match="it is a folder"):
        purifier.profile(clips(3, 8, 16, 16), trace=tmp_path)
    with pytest.raises(ValueError, match="accepted: "):
        purifier.profile(clips(3, 1, 16, 16))


def test_a_failed_trace_leaves_the_old_file(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_peak_memory_rises_and_is_reset():
    device = torch.device("cpu")
    memory = PeakMemory(device)
    before = memory.read()
    if before is None:
        pytest.skip("the peak cannot be read here")
    torch.ones(2**25)
    peak = memory.read()
    assert peak >= before + 2**26  # of 128 MB, whatever else was freed
    assert PeakMemory(device).read() < peak
    assert PeakMemory(torch.device("meta")).read() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roofline(dtype):
    matrix, copied = measure_roofline(torch.device("cpu"), dtype)
    assert 1e8 < matrix < 1e14 and 1e8 < copied < 1e13


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_a_gpu_the_chain_is_one_graph(dtype, trace):
    purifier = build_purifier().to("cuda", dtype)
    profile = purifier.profile(clips(3, 8, 16, 16), trace=trace)
    assert profile.device.startswith("cuda") and "captured chain" in str(profile)
    assert profile.chain.launches <= 4  # the graph, and copies to and from it
    assert profile.call.launches < profile.staged.launches
    assert all(stage.launches > 0 for stage in profile.stages[:-1] if stage.name != "flow")
    assert profile.call.peak_bytes > 0 and profile.staged.roofline_fraction < 1


def test_what_nvidia_smi_tells_and_what_it_does_not(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        return SimpleNamespace(stdout="580.65.06, 700.00\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    fields = {"driver": "driver_version", "power_limit_w": "power.limit"}
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert nvidia_smi(torch.device("cuda"), **fields) == {"driver": "580.65.06", "power_limit_w": "700.00"}
    assert {"GPU-12-34", "--query-gpu=driver_version,power.limit"} <= set(asked[0])
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    nothing = dict.fromkeys(fields)
    assert nvidia_smi(torch.device("cuda"), **fields) == nvidia_smi(torch.device("cpu"), **fields) == nothing


def test_the_estimate_counts_every_evaluation_of_every_prompt(monkeypatch):
    """At a FLOP a second: what another evaluation adds for one prompt, each evaluation adds for a second prompt."""
    one, two, longer = build_purifier(), build_purifier(prompts=2), build_purifier(inversion_steps=2)
    monkeypatch.setattr(estimate, "_SHARE_OF_PRODUCTS", 1.0)
    monkeypatch.setattr(estimate, "measure_roofline", lambda *_: SimpleNamespace(matrix=1))
    alone, guided, more = (estimate.estimate_seconds(purifier, 8, 16, 16) for purifier in (one, two, longer))
    assert guided - alone == one.evaluations * (more - alone) / (longer.evaluations - one.evaluations) > 0
