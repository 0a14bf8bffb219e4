"""The GPU code of the ops on latents rounds after each operation, as the CPU's does; tests/ops/ compares their values.

A compiler of PTX, be it ptxas or a GPU's driver, may contract a `mul.f32` and an `add.f32`, but leaves instructions
alone that say how they round: where PTX has no fma, and each of its additions and products says .rn, nothing is
contracted on any GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

import aot  # noqa: E402

ROUNDED = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "rcp.rn.f32"}


def assert_rounds(ptx: str) -> None:
    """All arithmetic of floats in the PTX of a kernel is rounded to the nearest, and takes no number for zero."""
    arithmetic = set(re.findall(r"\b(?:fma|mad|add|sub|mul|div|rcp|ex2|tanh)\.(?:\w+\.)*b?f\d\w*", ptx))
    assert {"add.rn.f32", "mul.rn.f32"} <= arithmetic <= ROUNDED
    assert not re.findall(r"\S+\.ftz\S*", ptx)


@pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("cmake")), reason="nvcc and cmake are not on PATH")
def test_cuda(tmp_path):
    """As CMakeLists.txt builds them, for the architectures of a release; without the CPU ops, which take longer."""
    (tmp_path / "pybind11Config.cmake").write_text(
        "function(pybind11_add_module name)\n  add_library(${name} MODULE)\nendfunction()\n"
    )
    given = [f"-Dpybind11_DIR={tmp_path}", f"-DPython_EXECUTABLE={sys.executable}", "-DVPF_CUDA=ON"]
    environment = {name: value for name, value in os.environ.items() if name != "CUDAARCHS"}
    environment["CUDAFLAGS"] = f"--keep --keep-dir={tmp_path}"
    for command in (["cmake", "-S", ROOT, "-B", tmp_path / "build", *given], ["cmake", "--build", tmp_path / "build"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for source in (ROOT / "csrc").glob("*.cu"):
        found = list(tmp_path.glob(f"{source.stem}.*ptx"))
        assert {"compute_80", "compute_90"} <= {path.name.split(".")[1] for path in found}
        for path in found:
            assert_rounds(path.read_text())


TRITON = """
import json
import aot
from aot_launches import compile_kernel
ops = ("guided_update", "ddim_step", "ddim_step_")
wanted = {(case.op, case.dtype()): case for case in aot.cases() if case.op in ops}
jobs, broken = aot.triton_jobs(list(wanted.values()), list(aot.TRITON_ARCHITECTURES))
found = []
for kernel in (job.code for job in jobs):
    found.append(compile_kernel(kernel).asm["ptx"])
print("RESULT" + json.dumps([broken, found]))
"""


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_triton():
    """For each architecture and dtype of the noise, in a process whose driver is that of no GPU."""
    paths = [str(ROOT / "bench"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    broken, found = json.loads(done.stdout.rpartition("RESULT")[2])
    assert not broken
    assert len(found) >= len(aot.TRITON_ARCHITECTURES) * 2 * 3  # two kernels, three dtypes
    for ptx in found:
        assert_rounds(ptx)
