"""bench/tune.py and kernels/tuned.py: calls are recorded and made again, wrong ways get no time, the best is chosen."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import build_purifier, clips
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from videopure_fast.kernels import tuned  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KEY = (64, 8)


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The path of a table that is not there yet, for a GPU of sm_90."""
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    monkeypatch.setattr(tuned, "architecture", lambda: 90)
    tuned.reload()
    yield tuned.TABLE
    tuned.reload()


def recorded():
    from tune_calls import recorded_calls

    return recorded_calls(build_purifier(), clips(1, 3, 4, 16, 16))


class CountOps(TorchDispatchMode):
    """Counts the operators of videopure_fast as torch's dispatcher sees them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "videopure_fast" and not function._schema.is_mutable:
            self.counts[function._opname] += 1
        return function(*arguments, **(keywords or {}))


def test_every_call_is_recorded():
    calls = recorded()
    with CountOps() as seen:
        build_purifier()(clips(1, 3, 4, 16, 16), return_votes=True, capture=False)
    counts = Counter()
    for call in calls:
        counts[call.signature.op] += call.counts.total() if call.is_op else 0
    assert +counts == seen.counts and len(seen.counts) > 5
    assert len({str(call.signature) for call in calls}) == len(calls)
    stages = set().union(*(call.counts for call in calls))
    assert {"encode", "chain", "guidance", "decode"} <= stages
    library = {call.signature.op for call in calls if not call.is_op}
    assert {"conv2d", "linear", "scaled_dot_product_attention"} <= library


def test_recorded_calls_are_made_again(monkeypatch):
    """Small tensors have their values, large ones their mean and deviation, and all of them their place in memory."""
    import tune_calls

    x = torch.randn(3, 5, 4).transpose(1, 2)[:, :2]
    weight, wide = torch.randn(6, 5), torch.randn(4000, 5) * 3 + 7
    recorder = tune_calls.Recorder()
    monkeypatch.setattr(tune_calls, "MOST_KEPT", 100)
    with recorder:
        torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(wide, weight=weight)
    small, large = recorder.calls.values()
    arguments, keywords = small.inputs(CPU)
    assert torch.equal(arguments[0], x) and arguments[0].stride() == x.stride() and torch.equal(arguments[1], weight)
    arguments, keywords = large.inputs(CPU)
    assert torch.equal(keywords["weight"], weight) and arguments[0].shape == wide.shape
    assert abs(arguments[0].mean() - wide.mean()) < 0.2 and abs(arguments[0].std() - wide.std()) < 0.2
    assert torch.equal(large.inputs(CPU)[0][0], arguments[0])
    assert large.inputs(torch.device("meta"))[0][0].is_meta
    half = large.signature._replace(operands=tuple(o._replace(dtype=torch.float16) for o in large.signature.operands))
    large.signature = half
    narrow, wide = large.inputs(CPU)[0][0], large.inputs(CPU, wide=True)[0][0]
    assert narrow.dtype == torch.float16 and torch.equal(narrow.float(), wide)


def test_a_choice_is_forced_then_measured_then_reasoned(table):
    def choose(key=KEY):
        return tuned.choose("op", key, ((1, 2), (3, 4), "library"), (1, 2))

    assert choose() == (1, 2)
    entries = [["op", [64, 8], [3, 4]], ["op", [64, 9], "library"], ["op", [64, 10], [5, 6]]]
    table.write_text(json.dumps({"90": {"gpu": "X", "choices": entries}, "80": {"gpu": "Y", "choices": []}}))
    tuned.reload()
    assert choose() == (3, 4) and choose((64, 9)) == "library"
    assert choose((64, 10)) == (1, 2)  # no candidate any more
    with tuned.forced("op", KEY, "library"), tuned.recorded() as found:
        assert choose() == "library" and choose((64, 11)) == (1, 2)
    assert [choice.key for choice in found] == [KEY, (64, 11)] and found[0].reasoned == (1, 2)
    assert choose() == (3, 4)


@pytest.mark.parametrize(
    "text",
    [
        '{"ninety": {"gpu": "X", "choices": []}}',
        '{"90": {"choices": []}}',
        '{"90": {"gpu": "X", "choices": [["op", [[1]], "library"]]}}',
        "[]",
        "{",
    ],
)
def test_a_broken_table_is_refused(table, text):
    table.write_text(text)
    with pytest.raises(ValueError, match="is no table of choices"):
        tuned.choose("op", KEY, ("a",), "a")


def test_calls_of_about_one_size_share_a_choice():
    assert [tuned.nearby(count) for count in (1, 2, 3, 25088, 32768)] == [1, 2, 4, 32768, 32768]


def test_inputs_of_folded_ops_describe_one_another(monkeypatch):
    """Where x is drawn anew, its moments must be too: kernels take them, the reference measures x."""
    import tune_calls

    from videopure_fast import ops
    from videopure_fast.ops.linear_moments import row_moments

    monkeypatch.setattr(tune_calls, "MOST_KEPT", 10)
    x, weight = torch.randn(40, 8), torch.randn(12, 8)
    with tune_calls.Recorder() as recorder:
        ops.folded_linear(x, row_moments(x), weight, weight.sum(1), torch.randn(12))
    (call,) = recorder.calls.values()
    (x, moments, weight, weight_sums, *_), _ = call.inputs(CPU)
    assert torch.equal(moments, row_moments(x))
    torch.testing.assert_close(weight_sums, weight.sum(1))


def linear_residual_with_a_choice(x, weight, bias, residual, skip):
    """The op in three ways: "late" is right and slow, "right" is right, "wrong" is fast."""
    way = tuned.choose("linear_residual", KEY, ("late", "right", "wrong"), "late")
    if way == "wrong":
        return residual
    if way == "late":
        time.sleep(0.01)
    x = x if skip is None else torch.cat([x, skip], -1)
    return residual + torch.nn.functional.linear(x, weight, bias)


def test_every_way_is_checked_then_timed(monkeypatch, table):
    import tune

    original = tune.implementation
    forms = {"triton": linear_residual_with_a_choice}
    monkeypatch.setattr(tune, "implementation", lambda op, form: forms.get(form) or original(op, form))
    monkeypatch.setattr(tune, "serves", lambda form, op, x: form == "triton")
    call = next(call for call in recorded() if call.signature.op == "linear_residual")
    ways = tune.ways_of(call, CPU)
    assert [way.name for way in ways.ways[:2]] == ["triton", "reference"] and len(ways.ways) == 5
    row = tune.call_row(call, ways, CPU, quick=True)
    times = {name.rpartition(": ")[2]: way for name, way in row["ways"].items()}
    assert "differ by more than" in times["wrong"]["error"] and "median" not in times["wrong"]
    assert times["late"]["median"] > times["right"]["median"] > 0
    assert row["counts"] and row["median"] == times["triton"]["median"]
    assert tune.write_table({"call": row, "compilation": {}}, 90, "X") == 1
    assert tuned.choose("linear_residual", KEY, ("late", "right", "wrong"), "late") == "right"


def row_of(seconds, *, count=1, reasoned="a", key=KEY):
    """A row of a call with one choice. seconds: by candidate; None where it was wrong."""
    ways = {
        f"way {name}": {"error": "wrong"} if taken is None else {"median": taken} for name, taken in seconds.items()
    }
    candidates = [[name, f"way {name}"] for name in seconds]
    choices = [{"op": "op", "key": list(key), "reasoned": reasoned, "candidates": candidates}]
    return {"counts": {"chain": count}, "ways": ways, "choices": choices}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"a": 2.0, "b": 1.0}], "b"),
        ([{"a": 1.01, "b": 1.0}], "a"),  # within what times vary by
        ([{"a": None, "b": 1.0, "c": 0.9}], "c"),
        ([{"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 3.0}], "a"),  # over all calls
        ([{"a": 2.0, "b": 1.0}, {"a": 1.0, "b": None}], "a"),
        ([{"a": 2.0, "b": 1.0}, {"a": 2.0}], "a"),  # not timed in every call
        ([{"a": None, "b": None}], None),
    ],
)
def test_the_fastest_over_all_calls_is_chosen(rows, expected):
    from tune import fastest_choices

    found = fastest_choices({str(i): row_of(row) for i, row in enumerate(rows)})
    assert found == ([] if expected is None else [["op", [64, 8], expected]])


def test_calls_weigh_as_often_as_they_are_made():
    from tune import fastest_choices

    rows = {"rare": row_of({"a": 9.0, "b": 1.0}), "often": row_of({"a": 1.0, "b": 2.0}, count=10)}
    assert fastest_choices(rows) == [["op", [64, 8], "a"]]


def test_a_table_keeps_what_was_measured_elsewhere(table):
    from tune import write_table

    write_table({"call": row_of({"a": 2.0, "b": 1.0})}, 80, "A100")
    write_table({"call": row_of({"a": 2.0, "b": 1.0})}, 90, "H100")
    write_table({"call": row_of({"a": 1.0, "b": 2.0}), "other": row_of({"a": 2.0, "b": 1.0}, key=(128, 8))}, 90, "H200")
    found = tuned.read(table)
    assert found["80"] == {"gpu": "A100", "choices": [["op", [64, 8], "b"]]}
    assert found["90"] == {"gpu": "H200", "choices": [["op", [128, 8], "b"], ["op", [64, 8], "a"]]}
    assert write_table({"call": {"error": "no"}}, 90, "nothing") == 0 and tuned.read(table) == found


# Where there is a GPU: kernels are collected by launches on the meta device and compiled by other processes.
COMPILED = """
import json, torch, triton, tune
from aot_launches import Target, TritonKernel, fill_cache
from conftest import build_purifier, clips
from tune_calls import recorded_calls

if __name__ == "__main__":
    torch.cuda.get_device_capability = lambda device: (9, 0)
    calls = recorded_calls(build_purifier(), clips(1, 3, 4, 16, 16))
    call = next(call for call in calls if call.signature.op == "linear_residual")
    kernels = tune.launched(call, torch.device("cuda"))
    broken = TritonKernel(90, "videopure_fast.kernels.linear_residual", "no_such_kernel", "{}")
    result = [len(kernels), fill_cache(kernels), fill_cache([broken])]
    # A launch looks for its kernel in the cache, and compiles it if it is not there; then there is no GPU to load it.
    triton.runtime.driver.set_active(Target(90))
    try:
        tune.implementation(call.signature.op, "triton")(*call.inputs(torch.device("meta"))[0])
    except Exception as error:
        result.append(type(error).__name__)
    print("RESULT" + json.dumps(result))
"""


@pytest.mark.slow
def test_kernels_are_compiled_before_they_are_timed(tmp_path):
    script, cache = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(COMPILED)
    paths = map(str, (ROOT / "tests", ROOT / "bench", ROOT))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels, failed, broken, _ = json.loads(done.stdout.rpartition("RESULT")[2])
    assert kernels == 1 and failed == {} and "no_such_kernel" in broken
    assert len(list(cache.rglob("*.cubin"))) == 1
