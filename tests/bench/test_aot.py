"""bench/aot.py: a sample passes, broken tiles fail, tools are read rightly, and the cases are those of the models."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel

from videopure_fast.ops.backend import SUPPORTED_DTYPES
from videopure_fast.tiny.models import UNET_CONFIG, VAE_CONFIG

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

import aot  # noqa: E402
import aot_cases  # noqa: E402
import aot_machine_code  # noqa: E402
from gpu_models import FULL_UNET, FULL_VAE  # noqa: E402

needs_tools = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
FIELDS = {
    *("kernel", "arch", "config", "dtype", "registers", "shared", "spills", "stack", "matrix", "occupancy"),
    *("wgmma", "tma", "cp_async"),
}


def kernels_in_files() -> set[str]:
    """The functions of kernels/ that a launch starts, with their file, such as "geglu._geglu_kernel"."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found |= {f"{path.stem}.{node.name}" for node in functions if node.name.endswith("_kernel")}
    return found


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [
        str(ROOT / "bench"),
        str(ROOT),
        str(ROOT / "tests" / "bench"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


@needs_tools
def test_sample_passes(tmp_path):
    out = tmp_path / "rows.json"
    done = python("bench/aot.py", "--sample", "--jobs", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    rows = json.loads(out.read_text())["rows"]
    assert all(FIELDS <= set(row) for row in rows)
    triton_rows = [row for row in rows if ".cu" not in row["kernel"]]
    assert {row["arch"] for row in triton_rows} == {80, 90}
    files = {name.split(".")[0] for name in kernels_in_files()}
    assert {row["kernel"].split(".")[0] for row in triton_rows} == files
    by_arch = {row["arch"]: row for row in rows if row["kernel"] == "matrix_product._matrix_product_kernel"}
    assert "HGMMA" in by_arch[90]["matrix"]
    assert by_arch[90]["wgmma"]["hgmma"] > by_arch[90]["wgmma"]["arrive"] > 0
    assert "HMMA" in by_arch[80]["matrix"]
    assert by_arch[80]["cp_async"] > 0


# Each entry replaces the tile of linear_geglu by one that must fail for the reason that is its key.
BROKEN = """
import json, sys, tempfile, pathlib, aot
from videopure_fast.kernels.product_tiles import DESCRIBED, GATED_TILES, Tile
tiles = {
    "fits": GATED_TILES[DESCRIBED][0],
    "shared memory": Tile(block_m=64, block_n=128, block_k=128, warps=8, stages=4, second=128),
    "spills": Tile(block_m=64, block_n=256, block_k=16, warps=4, stages=2, second=256),
    "without HGMMA": Tile(block_m=64, block_n=32, block_k=32, warps=2, stages=2, second=32),
    "does not compile": Tile(block_m=64, block_n=32, block_k=8, warps=4, stages=2, second=32),
    "does not launch": None,
}
result = {}
for name, tile in tiles.items():
    GATED_TILES[DESCRIBED] = (tile,)
    out = pathlib.Path(tempfile.mkdtemp()) / "rows.json"
    status = aot.main(["--sample", "--kernel", "linear_geglu", "--arch", "90", "--jobs", "1", "--out", str(out)])
    result[name] = status, [failure for row in json.loads(out.read_text())["rows"] for failure in row["failures"]]
print("RESULT" + json.dumps(result))
"""


@needs_tools
def test_broken_configurations_fail_with_their_reasons():
    done = python("-c", BROKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.rpartition("RESULT")[2])
    assert result.pop("fits") == [0, []]
    for reason, (status, failures) in result.items():
        assert status == 1, reason
        assert len(failures) == 1, (reason, failures)
        assert reason in failures[0]
        assert f"{failures[0]}\n" in done.stdout
    assert len(result) == 5


# Each kernel of faulty_kernels.py, sound and at fault: its name, constants, architecture, and the reason it fails for.
FAULTS = [
    ("chained_kernel", {"ASSUME": True}, 90, None),
    ("chained_kernel", {"ASSUME": False}, 90, "serialized: waits after each of its "),
    ("described_kernel", {"LOAD": True}, 90, None),
    ("described_kernel", {"LOAD": False}, 90, "loads no tile by TMA"),
    ("described_kernel", {"LOAD": True}, 80, "no load that goes past the registers"),
]
FAULTY = """
import json, sys, aot, faulty_kernels
result = []
for name, constants, architecture in json.loads(sys.argv[1]):
    with aot.launches(architecture) as kernels:
        faulty_kernels.launch(name, **constants)
    (row,) = aot.triton_rows(aot.Job(kernels[0], name, "float16", []), kernels[0])
    result.append(row)
print("RESULT" + json.dumps(result))
"""


@needs_tools
def test_slow_machine_code_fails(tmp_path, monkeypatch):
    """What serializes HGMMA, ignores its descriptors, or waits for its loads is found, and what does not is not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = python("-c", FAULTY, json.dumps([fault[:3] for fault in FAULTS]))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.rpartition("RESULT")[2])
    for (name, constants, architecture, reason), row in zip(FAULTS, rows, strict=True):
        seen = name, constants, architecture, row
        if reason is None:
            assert row["failures"] == [], seen
        else:
            assert any(reason in failure for failure in row["failures"]), seen
    sound, serialized, described, *_ = (row["wgmma"] for row in rows)
    assert serialized["arrive"] == serialized["depbar"] == serialized["hgmma"] == sound["hgmma"] > sound["arrive"]
    assert rows[2]["tma"]["load"] >= 2 and rows[0]["cp_async"] > 0


@pytest.mark.skipif(aot.triton is None, reason="triton is not installed")
def test_missing_tools_are_named(monkeypatch, capsys):
    monkeypatch.setattr(aot_machine_code, "find_tool", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert aot.main(["--sample"]) == 2
    assert "Nothing was checked: cuobjdump is neither in triton's wheel nor on PATH" in capsys.readouterr().err


USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _first:
  REG:42 STACK:40 SHARED:3072 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _second:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ASSEMBLY = """
//--------------------- .nv.info._first      --------------------------
\t.section\t.nv.info._first,"",@"SHT_CUDA_INFO"
\t//----- nvinfo : EIATTR_REGCOUNT
        /*0004*/ \t.word\t0x0000002a
\t//----- nvinfo : EIATTR_MAX_THREADS
\t.align\t\t4
.L_35:
        /*002c*/ \t.byte\t0x04, 0x05
        /*0030*/ \t.word\t0x00000080
        /*0034*/ \t.word\t0x00000002
        /*0038*/ \t.word\t0x00000001
\t.section\t.nv.info._second,"",@"SHT_CUDA_INFO"
\t//----- nvinfo : EIATTR_REGCOUNT
        /*0004*/ \t.word\t0x0000000a
\t.section\t.text._first,"ax",@progbits
.text._first:
        /*0000*/                   STL.64 [R1], R4 ;
        /*0010*/                   LDL R4, [R1+0x8] ;
        /*0020*/              @!P0 STL [R1], R4 ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0048*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0060*/                   WARPGROUP.ARRIVE ;
        /*0070*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0080*/                   UTMASTG.2D [UR8], [UR4] ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
\t.section\t.text._second,"ax",@progbits
.text._second:
        /*0000*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
"""


def test_reading_the_tools():
    needs = aot_machine_code.parse(USAGE, ASSEMBLY, 90)
    # 1 KiB of the shared memory is the system's.
    assert needs["_first"] == aot_machine_code.Needs(
        **{"registers": 42, "shared": 2048, "stack": 40, "spills": 3, "matrix": "HGMMA x2", "warps": 8},
        **{"wgmma": aot_machine_code.Wgmma(arrive=1, depbar=1, hgmma=2), "cp_async": 1},
        tma=aot_machine_code.Tma(load=1, store=1),
    )
    assert needs["_second"] == aot_machine_code.Needs(
        registers=10, shared=0, stack=0, spills=0, matrix="HMMA x1", warps=None
    )
    assert aot_machine_code.parse(USAGE, ASSEMBLY, 80)["_first"].shared == 3072


@pytest.mark.parametrize(
    ("options", "strides", "dots", "expected"),
    [
        ({"num_stages": 3}, ["i32", "divisible"], [128], True),
        ({"num_stages": 3}, ["i32", "constexpr"], [128], True),  # a row that is broadcast
        ({"num_stages": 3}, ["i32", ""], [128], False),  # unaligned rows
        ({"num_stages": 1}, ["i32", "divisible"], [128], False),
        ({"num_stages": 3}, ["i32", "divisible"], [], False),  # no product in half precision
    ],
)
def test_what_a_launch_promises(options, strides, dots, expected):
    kind, stride = strides
    signature = {"x_ptr": "*fp16", "rows": "i32", "x_stride_row": stride if stride == "constexpr" else kind}
    divisible = [["tt.divisibility", 16]] if stride == "divisible" else []
    specialization = {"signature": signature, "options": options, "attrs_keys": [[2]], "attrs_vals": [divisible]}
    assert aot.promises(specialization, dots) == aot_machine_code.Promises(dots, tma=False, cp_async=expected)


@pytest.mark.parametrize(
    ("counts", "products", "expected"),
    [((4, 4, 4), 2, True), ((1, 2, 4), 1, False), ((2, 2, 2), 2, False), ((0, 0, 0), 0, False)],
)
def test_serialized(counts, products, expected):
    assert aot_machine_code.Wgmma(*counts).serialized(products) == expected


def test_products_outside_the_tensor_cores_fail():
    needs, promises = aot_machine_code.Needs(32, 0, 0, 0, "", 4), aot_machine_code.Promises(dots=[32])
    assert "without MMA (none)" in aot_machine_code.failures(needs, 80, promises)[0]
    assert aot_machine_code.failures(needs._replace(matrix="HMMA x4"), 80, promises) == []


def test_reading_tritons_products():
    dot = "%a = tt.dot %x, %y, %z : tensor<{0}x32x{1}> * tensor<32x64x{1}> -> tensor<{0}x64xf32> loc(#loc1)\n"
    ttir = dot.format(128, "f16") + dot.format(64, "f32") + dot.format(32, "bf16") + dot.format("4x16", "f16")
    assert aot_machine_code.half_precision_dot_rows(ttir) == [128, 32, 16]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "architecture", "expected"),
    [
        (128, 96 * 1024, 8, 90, 16 / 64),  # two blocks, by registers
        (128, 96 * 1024, 8, 80, 8 / 64),  # one, by shared memory
        (32, 0, 4, 90, 1.0),
        (16, 0, 1, 90, 32 / 64),  # 32 blocks at most
        (129, 0, 8, 80, 8 / 64),
        (255, 227 * 1024, 8, 90, 8 / 64),
        (32, 228 * 1024, 8, 90, 0.0),
    ],
)
def test_occupancy(registers, shared, warps, architecture, expected):
    needs = aot_machine_code.Needs(registers, shared, 0, 0, "", warps)
    assert aot_machine_code.occupancy(needs, architecture) == pytest.approx(expected, abs=1e-3)


def unet_pass(configuration: dict, side: int) -> None:
    unet = UNet3DConditionModel(**configuration)
    unet(torch.empty(1, 4, 2, side, side), torch.empty(1), torch.empty(1, 3, unet.config.cross_attention_dim))


def vae_pass(configuration: dict, side: int) -> None:
    vae = AutoencoderKL(**configuration)
    vae.decode(vae.encode(torch.empty(1, 3, side, side)).latent_dist.mode())


@pytest.mark.parametrize(
    ("forward", "configuration", "side"),
    [(unet_pass, FULL_UNET, 28), (unet_pass, UNET_CONFIG, 16), (vae_pass, FULL_VAE, 224), (vae_pass, VAE_CONFIG, 32)],
    ids=["real UNet", "packaged UNet", "real VAE", "packaged VAE"],
)
def test_widths_are_those_of_diffusers(forward, configuration, side):
    """Every GroupNorm of the models has a case with its pixels, channels and groups. A default UNet is the real one."""
    seen = set()

    def look(module, inputs):
        if isinstance(module, torch.nn.GroupNorm):
            shape = inputs[0].shape
            # The VAE's attention has its pixels flattened: (B, C, HW).
            seen.add((shape[-1] if len(shape) > 3 else math.isqrt(shape[-1]), module.num_channels, module.num_groups))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        with torch.device("meta"), torch.no_grad():
            forward(configuration, side)
    finally:
        hook.remove()
    norms = [case.arguments for case in aot_cases.cases() if case.op == "group_norm_silu"]
    cases = {(x.shape[2], x.shape[-1], groups) for x, _, _, _, _, groups, *_ in norms}
    assert seen
    assert seen <= cases, seen - cases


def test_every_op_has_cases():
    cases = {case.op for case in aot_cases.cases()}
    assert cases == {op for op, forms in SUPPORTED_DTYPES.items() if "triton" in forms}


@pytest.mark.parametrize("name", ["aot.json", "aot-3.6.json"])
def test_committed_results(name):
    """Every kernel is there, whole and without spills."""
    rows = json.loads(aot.RESULTS.with_name(name).read_text())["rows"]
    assert kernels_in_files() <= {row["kernel"] for row in rows}
    for row in rows:
        assert FIELDS <= set(row), row
        assert row["spills"] == row["stack"] == 0, row
        assert row["failures"] == [], row
