"""The benchmarks: their ways to purify agree, a wrong result gives no row, runs resume, and the report's tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_purifier, clips

from videopure_fast.ops.backend import SUPPORTED_DTYPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")


@pytest.fixture
def gpu():
    import gpu

    return gpu


@pytest.mark.parametrize(
    "name",
    [
        *("algebra", "algebra-captured", "ours-eager", "ours"),
        pytest.param("algebra-compiled", marks=pytest.mark.slow),  # torch.compile takes ten seconds
    ],
)
def test_every_way_gives_the_authors_votes(name):
    from baselines import PATHS

    purifier, video = build_purifier(dtype=torch.float64), clips(2, 3, 4, 16, 16, dtype=torch.float64)
    expected = PATHS["authors"](purifier)(video)
    assert expected.shape == (2, 3, 3, 4, 16, 16)
    options = {"compiler": "eager"} if name.endswith("compiled") else {}
    votes = PATHS[name](purifier, **options)(video)
    assert ((votes - expected).abs() / (1 + expected)).max() <= 1e-9


def test_every_op_has_a_benchmark():
    from bench_ops import OPS

    assert {make.__name__ for make in OPS} == set(SUPPORTED_DTYPES) - {"ddim_step_"}


def test_ways_share_the_weights():
    from baselines import _copy_sharing_weights

    purifier = build_purifier()
    twin = _copy_sharing_weights(purifier.unet)
    assert twin.conv_in is not purifier.unet.conv_in
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in purifier.unet.parameters()}


def run(gpu, monkeypatch, file, *arguments):
    """gpu.py's rows after a run on the CPU in this process, and its exit status."""
    command = ["gpu.py", "--worker", "--device", "cpu", "--quick", "--out", str(file), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return json.loads(file.read_text())["rows"], ended.value.code


@pytest.mark.slow
def test_rows_are_measured_once_and_only_if_right(gpu, monkeypatch, tmp_path):
    import gpu_rows
    from gpu_stages import GATE_FAILED

    file, name = tmp_path / "rows.json", "purification: ours, 1x4x16x16"
    bench = ("--stage", "bench", "--only")
    rows, status = run(gpu, monkeypatch, file, *bench, name)
    (row,) = rows.values()
    assert not status and row["median"] > 0 and row["rounds"] == 3 and row["dtype"] == "float16"
    assert row["mean_error"] <= 1.25 * row["mean_error_of_authors"]
    assert {"gpu", "driver", "torch", "triton", "diffusers", "commit", "peak_memory", "launches"} <= row.keys()

    def off(purifier):
        return lambda video: 0.99 * gpu_rows.PATHS["authors"](purifier)(video)

    monkeypatch.setitem(gpu_rows.PATHS, "ours", off)
    assert run(gpu, monkeypatch, file, *bench, name) == (rows, 0)  # in the file: not measured again
    rows, status = run(gpu, monkeypatch, file, *bench, name, "--again")
    assert status == GATE_FAILED
    assert "median" not in rows[name] and "mean error against float32" in rows[name]["error"]
    # A failed row is tried again, unless it is to be skipped, and keeps no other from being measured.
    monkeypatch.setitem(gpu_rows.PATHS, "ours", lambda purifier: 1 / 0)
    before = rows[name]["error"]
    assert run(gpu, monkeypatch, file, *bench, name, "--skip-failed")[0][name]["error"] == before
    rows, status = run(gpu, monkeypatch, file, *bench, "s, 1x4x16x16")
    assert not status and rows[name]["error"] == "ZeroDivisionError: division by zero"
    assert rows["purification: authors, 1x4x16x16"]["median"] > 0
    assert "not installed" in rows["purification: authors-xformers, 1x4x16x16"]["error"]
    stages = rows["stages: ours, 1x4x16x16"]["stages"]
    assert list(stages) == ["encode", "chain", "flow", "guidance", "decode"]
    assert all(stage["median"] > 0 for stage in stages.values())
    assert rows["label: ours, 1x4x16x16"]["median"] > 0
    first = rows["first call: ours, 1x4x16x16"]
    assert first["first_call"] > 0 and first["second_call"] > 0
    assert list(rows["kernels: ours, 1x4x16x16"]["stages"]) == list(stages)


def test_stages_are_those_of_a_call():
    """The stages that are timed alone make the votes of a whole call."""
    from gpu_rows import stage_calls

    purifier, video = build_purifier(dtype=torch.float64), clips(2, 3, 4, 16, 16, dtype=torch.float64)
    with purifier._inference(video):
        votes = stage_calls(purifier, video)["decode"]()
    assert torch.equal(votes.transpose(0, 1), purifier(video, return_votes=True))


def test_kernels_are_of_the_kind_of_the_operation_around_them(gpu):
    """A library's kernel is launched by an operation within the one that the prediction counts."""
    from types import SimpleNamespace

    from gpu_profile import summary

    def event(name, parent=None, *kernels):
        launched = [SimpleNamespace(name=kernel, duration=microseconds) for kernel, microseconds in kernels]
        return SimpleNamespace(name=name, cpu_parent=parent, kernels=launched, input_shapes=[[1, 2]])

    convolution = event("aten::convolution")
    attention = event("aten::scaled_dot_product_attention")
    events = [
        convolution,
        event("aten::cudnn_convolution", convolution, ("fprop", 3.0)),
        event("aten::add_", convolution, ("bias", 1.0)),
        event("aten::_cudnn_attention_forward", attention, ("fmha", 5.0)),
        event("videopure_fast::folded_linear_geglu", None, ("_matrix_product_kernel", 7.0)),
        event(
            "videopure_fast::linear_residual", None, ("_matrix_product_kernel", 2.0), ("_matrix_product_kernel", 2.0)
        ),
        event("aten::copy_", None, ("copy", 0.5)),
    ]
    found = summary(events)
    kinds = {
        name: (1e6 * kind["seconds"], kind["launches"]) for name, kind in found["kinds"].items() if kind["launches"]
    }
    assert {name: (round(us, 3), launches) for name, (us, launches) in kinds.items()} == {
        "attention over pixels and text": (5.0, 1),
        "convolutions and upsampling": (4.0, 2),
        "feed-forward, first product and GEGLU": (7.0, 1),
        "other products": (4.0, 2),
        "copies and the rest": (0.5, 1),
    }
    assert found["kernels"][0] == ("_matrix_product_kernel", 3, 11.0)
    assert found["operations"][0] == ("videopure_fast::folded_linear_geglu [[1, 2]]", 1, 7.0)


def test_a_run_ends_in_time(gpu, monkeypatch, tmp_path):
    file = tmp_path / "rows.json"
    rows, _ = run(gpu, monkeypatch, file, "--only", "ours, 1x4x16x16", "--minutes", "0.001", "--stage", "bench")
    assert "stopped after" in rows["first call: ours, 1x4x16x16"]["error"]
    assert "purification: ours, 1x4x16x16" not in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --quick"),
        (["--device", "nothing"], "no such device"),
        (["--device", "cpu", "--quick", "--clips", "0"], "1 or more"),
        (["--device", "cpu", "--quick", "--minutes", "nan"], "more than 0"),
        (["--device", "cpu", "--quick", "--stage", "lossy", "--only", "magic"], "no row is named"),
    ],
)
def test_bad_arguments(gpu, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--worker", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_file_of_others_is_left_alone(gpu, monkeypatch, tmp_path):
    file = tmp_path / "cpu.json"
    file.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match="holds other results"):
        run(gpu, monkeypatch, file, "--only", "ceiling")
    assert file.read_text() == '{"benchmarks": []}'


def test_a_change_of_any_source_measures_anew():
    """The digest of the sources reads every code file of the package, the kernels, the C++ and the benchmarks."""
    from gpu_runner import WRITTEN, source_files

    found = source_files()
    assert len(set(found)) == len(found)
    for folder in ("videopure_fast", "kernels", "csrc", "bench"):
        code = {path for suffix in ("py", "cpp", "cu", "h") for path in (ROOT / folder).rglob(f"*.{suffix}")}
        assert code and code <= set(found)
    rooms = {path.parent.name for path in found}
    assert {"videopure_fast", "ops", "models", "runtime", "attacks", "weights", "kernels", "csrc", "bench"} <= rooms
    from videopure_fast.kernels import tuned

    # What tuning writes would otherwise be a change by which its own rows are old.
    assert WRITTEN == tuned.TABLE.resolve() and WRITTEN not in found


def test_what_failed_before_runs_last():
    from gpu_runner import Task, pending

    tasks = [Task(name, "bench", dict) for name in ("done", "failed", "old", "new", "ceiling: copies")]
    rows = {name: {"commit": "now"} for name in ("done", "ceiling: copies")}
    rows |= {"failed": {"commit": "now", "error": "no"}, "old": {"commit": "before", "error": "no"}}
    found = [task.name for task in pending(tasks, rows, "now")]
    assert found == ["old", "new", "ceiling: copies", "failed"]
    assert [task.name for task in pending(tasks, rows, "now", skip_failed=True)] == found[:-1]
    assert {task.name for task in pending(tasks, rows, "now", again=True)} == {task.name for task in tasks}


def test_a_lost_gpu_ends_the_process_and_its_row_says_why(tmp_path):
    from gpu_runner import LostContext, Task, load_results, run_tasks

    def illegal():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def full():
        raise RuntimeError("CUDA out of memory. CUDA error: out of memory")

    file, ran = tmp_path / "rows.json", []
    tasks = [Task("full", "bench", full), Task("illegal", "bench", illegal)]
    tasks.append(Task("next", "bench", lambda: ran.append(1) or {}))
    with pytest.raises(LostContext, match="illegal"):
        run_tasks(tasks, file, torch.device("cpu"), seconds=60)
    assert "illegal memory access" in load_results(file)["rows"]["illegal"]["error"] and not ran
    rows = run_tasks(tasks, file, torch.device("cpu"), seconds=60, skip_failed=True)
    assert ran == [1] and "error" not in rows["next"] and "error" in rows["full"]


@pytest.mark.slow
def test_tuned_rows_are_those_of_the_table(gpu, monkeypatch, tmp_path):
    import gpu_stages

    table, name = tmp_path / "tuned.json", "tuned purification: ours, 1x4x16x16"
    monkeypatch.setattr(gpu_stages, "WRITTEN", table)
    times = []
    for text in (None, None, "{}", "{}"):
        if text is not None:
            table.write_text(text)
        rows, _ = run(gpu, monkeypatch, tmp_path / "rows.json", "--stage", "tuned", "--only", name)
        times.append((rows[name]["table"], rows[name]["median"]))
    assert times[0] == times[1] and times[2] == times[3]
    assert times[0][0] is None and times[2][0] is not None and times[0][1] != times[2][1]


HANGING = """
import itertools, pathlib, sys, torch, gpu_runner
gpu_runner.GRACE = 0.2
# A loop in C, which no signal interrupts: as the wait for a kernel that never ends.
tasks = [gpu_runner.Task("hangs", "bench", lambda: sum(itertools.repeat(0, 10**12)))]
gpu_runner.run_tasks(tasks, pathlib.Path(sys.argv[1]), torch.device("cpu"), seconds=0.5)
"""


def test_a_hanging_row_is_left_behind(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT / 'bench')!r}, {str(ROOT)!r}]\n{HANGING}"]
    done = subprocess.run([*command, file], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and "Timeout" in done.stderr
    assert json.loads(file.read_text())["rows"]["hangs"]["error"] == "began and did not end"


def test_another_process_goes_on_behind_a_lost_one(gpu, monkeypatch):
    statuses, commands = [4, -11, 0], []

    def call(command):
        commands.append(command[2:])
        return statuses.pop(0)

    monkeypatch.setattr(gpu.subprocess, "call", call)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--stage", "bench"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    first, *others = commands
    assert not ended.value.code and first == ["--stage", "bench", "--worker"]
    assert [command[:-1] for command in others] == [[*first, "--skip-failed", "--began"]] * 2


SUITE = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
def test_elsewhere(): pytest.skip("not here")
@pytest.fixture
def broken(): raise OSError("no")
def test_with(broken): pass
"""


@pytest.mark.slow
def test_failures_of_the_suite_are_rows(tmp_path):
    from gpu_suite import run_suite

    suite, file = tmp_path / "test_suite.py", tmp_path / "rows.json"
    suite.write_text(SUITE)
    row = run_suite(file, ("-p", "no:cacheprovider", str(suite)))
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 2, 1) and row["gate_failed"]
    wrong, broken = json.loads(file.read_text())["rows"]["gpu tests"]["failures"]  # written by pytest's process
    assert "test_wrong" in wrong["test"] and "assert 1 == 2" in wrong["error"]
    assert "test_with" in broken["test"] and "OSError: no" in broken["error"]
    suite.write_text("def test_right(): pass\n")
    assert "error" not in run_suite(tmp_path / "others.json", ("-p", "no:cacheprovider", str(suite)))
    suite.write_text("import nothing_at_all\n")
    row = run_suite(tmp_path / "none.json", ("-p", "no:cacheprovider", str(suite)))
    assert row["gate_failed"] and "No module named 'nothing_at_all'" in row["failures"][0]["error"]
    assert "pytest ended early" in run_suite(tmp_path / "early.json", ("--no-such-option",))["error"]


def test_every_stage_has_its_rows():
    from gpu_plan import STAGES, USUAL_STAGES
    from gpu_stages import TASKS

    assert list(TASKS) == list(STAGES)
    assert sum(STAGES[name].minutes for name in USUAL_STAGES) <= 12


@pytest.mark.slow
def test_the_whole_script_runs_on_a_cpu(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--device", "cpu", "--quick", "--out", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["stage"] for row in rows.values()} == {"build", "bench", "tuned", "batch", "compile", "lossy"}
    missing = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert all("xformers" in name or "raft" in name for name in missing), missing
    for name in rows:
        assert name in done.stdout
    calls = json.loads((tmp_path / "tune-rows.json").read_text())["rows"]
    assert calls and not any("error" in row for row in calls.values())
    assert "build: 1 rows" in done.stdout and "min left for tune, tuned, batch" in done.stdout


TIME = "2026-01-02T03:04:05+00:00"


def purification(path, n, median, **others):
    return {
        **{"path": path, "clips": n, "frames": 32, "height": 224, "width": 224, "flow": "given", "model": "full"},
        **{"median": median, "iqr": 0.001, "steps": 5, "dtype": "float16", "mean_error": 1e-4, "peak_memory": 2**30},
        **{"launches": 100, "clips_per_second": n / median, "gpu": "NVIDIA X", "commit": "new", "time": TIME},
        **dict.fromkeys(("driver", "power_limit_w", "torch", "cuda", "cudnn", "triton", "diffusers", "python"), "1"),
        **others,
    }


def test_the_table_of_a_gpu():
    from report import gpu_tables

    rows = {
        "a": purification("authors", 1, 2.0, launches=10_000, peak_memory=2**31),
        "b": purification("ours", 1, 0.25),
        "c": purification("authors-compiled", 1, 0.1, commit="old", time="2026-01-01T23:59:00+00:00"),
        "d": {"error": "no", "path": "algebra", "commit": "new", "time": TIME},
        "op: guided_update, full, triton": {"median": 7e-5, "commit": "new", "time": TIME},
    }
    text = gpu_tables(rows)
    assert "On NVIDIA X: clips of 32 frames of 224x224, T=5, float16, random weights in full size" in text
    assert "| **ours** | 0.250 ± 0.001 | 8.00 | 100 | 1.0 | 1.0e-04 |" in text
    assert "| 1 clip, times (1) | ≥ 7 | 8 | yes |" in text
    assert "| peak memory of 1 clip | ≤ 7 GiB | 1 GiB | yes |" in text
    assert "| launches of 1 clip, of (1)'s | ≤ 0.02 | 0.01 | yes |" in text
    assert "| guided update of all votes | ≤ 50 µs | 70 µs | no |" in text
    # Other sources' rows are marked, and failed rows do not count.
    assert "| (3a) the same compiled: max-autotune, channels last† | 0.100 ± 0.001 | 20.00 |" in text
    assert "\n† Measured with other sources.\n" in text
    assert "| the algebra alone, on diffusers' modules | not measured | - | - | - | - |" in text
    assert "\nGoals not measured: 1 clip, times (3b); 1 clip, times (3c); 1 clip, its label by early stop; " in text
    assert "`make gpu` on 2026-01-02: driver 1, 1 W, " in text


def test_the_table_of_a_cpu():
    from report import cpu_table

    common = {"shape": [1, 3, 16, 32, 32], "dtype": "float32", "steps": 5, "threads": 2, "torch": "2", "iqr": 0.1}
    rows = [
        {"path": path, "clips": n, "median": median * n, "peak_memory": 3 * 2**20 if n == 1 else None, **common}
        for path, median in (("authors", 4.0), ("ours", 1.0))
        for n in (1, 4)
    ]
    text = cpu_table({"benchmarks": [{"op": "geglu"}, *rows], "machine_info": {"cpu": "X", "python": "3"}})
    assert "clips of 16 frames of 32x32 by the packaged prior, T=5, float32" in text
    assert "| **ours** | 1.00 ± 0.10 | 4.0 | 4.00 ± 0.10 | 4.0 | 3 |" in text
    assert "`make bench` on X, 2 threads, torch 2, Python 3." in text


def accuracy_row(part, threat_model, defense, accuracy, eps=4 / 255, n=64, seconds=1.0):
    return {
        **{"part": part, "threat_model": threat_model, "defense": defense, "eps": eps, "n": n, "accuracy": accuracy},
        **{"low": accuracy - 0.05, "high": accuracy + 0.05, "seconds_per_clip": seconds},
    }


@pytest.mark.slow
def test_what_fools_one_path_fools_the_other(tmp_path):
    """Crafted on diffusers' modules with the ops' reference and judged on ours, and the other way round."""
    from study import PARITY, crossed, draw

    from videopure_fast import Purifier, tiny
    from videopure_fast.defense import build_defenses
    from videopure_fast.evaluation.plan import Plan, Threat
    from videopure_fast.evaluation.runner import EvalContext, evaluate
    from videopure_fast.evaluation.tables import table

    config = {"inversion_steps": 1}
    purifier = Purifier.from_pretrained("tiny", device="cpu", **config)
    available = crossed(build_defenses(purifier)["videopure"], **config)
    threat = Threat("bpda", "pgd", {"steps": 5, "step_size": 2 / 255}, 8)
    plan = Plan("packaged", (threat,), PARITY, eps=(6 / 255,), seeds=(0,))
    rows = table(evaluate(plan, EvalContext(tiny.load_classifier(), available, draw), tmp_path / "record.json"))
    accuracies = [row.accuracy for row in rows]
    assert len(accuracies) == 4 and 0 < max(accuracies) < 1 and max(accuracies) - min(accuracies) <= 1 / 8, accuracies


def test_the_tables_of_robust_accuracy():
    from report import robustness

    rows = [
        accuracy_row("gray-box", "none", "none", 0.99, eps=0.0, n=768),
        accuracy_row("gray-box", "none", "videopure", 0.98, eps=0.0, n=768),
        accuracy_row("gray-box", "gray-box", "videopure", 0.9, n=768),
        accuracy_row("gray-box", "gray-box", "videopure", 0.7, eps=8 / 255, n=768),
        accuracy_row("gray-box ddpm", "gray-box", "ddpm", 0.8, n=256),
        accuracy_row("bpda", "gray-box", "videopure", 0.85),
        accuracy_row("bpda", "bpda", "videopure", 0.5),
        accuracy_row("exact", "exact", "videopure", 0.125, n=32),
        accuracy_row("exact apgd", "exact", "videopure", 0.0625, n=32),
        accuracy_row("curve", "bpda", "videopure", 0.75, eps=1 / 255, n=32),
        accuracy_row("parity", "bpda", "videopure, crafted on fast, judged on reference", 0.5, n=32),
        accuracy_row("chance", "gray-box", "ddim", 0.9, n=64) | {"worst": 0.75},
        accuracy_row("adaptive", "adaptive", "videopure", 0.1, n=32),
        accuracy_row("cost", "none", "videopure", 1.0, eps=0.0, n=16, seconds=0.512),
        accuracy_row("depths", "gray-box", "videopure, T=2", 0.6, n=128),
    ]
    checks = [{"name": "sound", "passed": True, "seen": ""}, {"name": "odd", "passed": False, "seen": "0.9 and 0.1"}]
    where = {"device": "cpu (X)", "threads": 2, "torch": "2"}
    result = {"rows": rows, "checks": checks, "plans": {"cost": {"batch": 4}}, "machines": {"cost": [where]}}
    text = robustness(result)
    lines = text.splitlines()
    assert "| defense | clips | clean | attacked, 4/255 | attacked, 8/255 | s a clip |" in lines
    assert "| none | 768 | 0.990 (0.94 to 1.04) | - | - | - |" in lines
    assert (
        "| **videopure** | 768 | 0.980 (0.93 to 1.03) | 0.900 (0.85 to 0.95) | 0.700 (0.65 to 0.75) | 0.51 |" in lines
    )
    assert "| ddpm | 256 | - | 0.800 (0.75 to 0.85) | - | - |" in lines
    assert "| videopure, T=2 | 128 | - | 0.600 (0.55 to 0.65) | - | - |" in lines
    (informed,) = [line for line in lines if line.startswith("| **videopure** | - ")]
    assert informed == (
        "| **videopure** | - | - | 0.850 (0.80 to 0.90; 64) | 0.500 (0.45 to 0.55; 64) | 0.125 (0.07 to 0.17; 32) "
        "| 0.062 (0.01 to 0.11; 32) | 0.100 (0.05 to 0.15; 32) |"
    )
    assert any(line.endswith("crafted on fast, judged on reference, 0.500 (0.45 to 0.55; 32).") for line in lines)
    assert any("ddim is right on 0.900 of 64 clips" in line and "0.750 in every draw" in line for line in lines)
    assert "1 of 2 checks passed; FAILED: odd (0.9 and 0.1)." in lines
    assert lines[-1] == "`make study`; seconds: the median of batches of 4 clips on cpu (X), 2 threads, torch 2."
    assert robustness(result | {"machines": {}}).endswith("\n`make study`.")


def test_the_studys_result_is_of_its_records(tmp_path):
    from study import RESULT, WORK, plans, recorded, write

    path, checks = tmp_path / RESULT.name, json.loads((WORK / "checks.json").read_text())
    write(recorded(plans(), WORK), checks, path)
    assert path.read_text() == RESULT.read_text()
    assert path.with_suffix(".svg").read_text() == RESULT.with_suffix(".svg").read_text()


def test_records_of_other_weights_are_refused(tmp_path):
    from study import check_models

    mine, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for _ in range(2):
        check_models(tmp_path / "models.json", purifier=mine)
    check_models(tmp_path / "models.json", attacker=other)
    with pytest.raises(ValueError, match="are of another purifier: move them away"):
        check_models(tmp_path / "models.json", purifier=other, attacker=other)
    check_models(tmp_path / "models.json", purifier=mine, attacker=other)


def test_nothing_measured_is_said(tmp_path):
    from report import speed

    assert speed(tmp_path) == (
        "On a CPU. Not measured yet: no CPU results file.\n\nOn a GPU. Not measured yet: no GPU results file."
    )


def test_the_studys_plans_name_defenses_that_exist(purifier):
    from study import DEPTHS, PARITY, RANDOMIZED, plans, shrunk

    from videopure_fast.defense import build_defenses

    found = build_defenses(purifier, depths=DEPTHS)
    assert {name for name, defense in found.items() if defense.randomized} == set(RANDOMIZED)
    available = {*found, *PARITY}
    for plan in plans().values():
        assert set(plan.defenses) <= available
        assert all(threat.clips == 1 for threat in shrunk(plan, 0.001).threats)
        assert plan.hash != shrunk(plan, 0.5).hash
    assert len({plan.hash for plan in plans().values()}) == len(plans())
