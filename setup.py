"""Builds the extension module with CMake and Ninja. Everything else is declared in pyproject.toml.

CMAKE_ARGS adds arguments to the configuration: CMAKE_ARGS="-DVPF_CUDA=OFF" pip install .
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ROOMS = (
    "attacks cli data defense evaluation examples kernels measure models ops realtime runtime scale service tiny web"
).split()


def find_tool(name: str, directory: str) -> str | None:
    """The build tool on PATH, or the one in the folder that the attribute `directory` of its pip package names."""
    if found := shutil.which(name):
        return found
    return shutil.which(name, path=getattr(__import__(name), directory)) if find_spec(name) else None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise RuntimeError("building videopure_fast needs CMake 3.22 or newer: pip install cmake")
        # With --inplace and editable installs this is a staging folder: setuptools copies the module from it.
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # An old cache holds paths of an isolated build's deleted environment, and options of another build.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if ninja := find_tool("ninja", "BIN_DIR"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
        subprocess.run([cmake, "--build", str(build), "--config", "Release", "--parallel"], check=True)


setup(
    # Named one by one: kernels/ has no __init__.py, and automatic discovery would skip it or take bench/ and tests/.
    packages=["videopure_fast", *("videopure_fast." + room for room in ROOMS)],
    package_data={
        "videopure_fast": ["py.typed"],
        "videopure_fast.kernels": ["tuned.json"],
        "videopure_fast.tiny": ["weights/**"],
        "videopure_fast.web": ["*.css", "*.html", "*.js"],
    },
    ext_modules=[Extension("videopure_fast._C", sources=[])],  # CMake finds the sources; MANIFEST.in ships them
    cmdclass={"build_ext": CMakeBuild},
)
