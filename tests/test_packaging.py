"""The house holds together: one-way imports, a cheap import, a wheel that runs elsewhere."""

from __future__ import annotations

import ast
import graphlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import videopure_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "videopure_fast"

# Imports go one way: a room, which is a module or a package, imports only rooms before it. The package's own __init__
# stands near the end, before the examples, which import the package as users do and which nothing imports.
ROOMS = (
    *("config", "inputs", "files", "machine", "ray_cluster", "straight_through", "schedule", "windows"),
    *("kernels", "_C"),
    *(
        "ops",
        "reference",
        "tiny",
        "models",
        "runtime",
        "sampling",
        "frozen",
        "stages",
        "purifier",
        "functional",
        "attacks",
        "defense",
        "adapters",
    ),
    *(
        "data",
        "streaming",
        "measure",
        "realtime",
        "evaluation",
        "scale",
        "web",
        "service",
        "cli",
        "__main__",
        "__init__",
        "examples",
    ),
)
TINY_LEAVES = {"tiny.clips", "tiny.models"}
TINY_SCRIPT = "tiny.train"
# A method that hands the purifier over to a later room.
HANDED_OVER = {("purifier", "measure.profile")}


def sources() -> dict[str, Path]:
    """Dotted names inside the package, of the package and of kernels/, to files."""
    files = sorted(PACKAGE.rglob("*.py")) + sorted(PACKAGE.glob("kernels/*.py"))  # rglob follows no links
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def imports(name: str, path: Path) -> Iterator[str]:
    """The absolute names that a module imports, wherever in it the statement stands: `a.b` and each `a.b.c` of it."""
    package = ["videopure_fast", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def house_imports(name: str, path: Path) -> set[str]:
    """The modules of the house that a module imports: "ops.backend", "tiny.models"; a package is its `__init__`."""
    found = set()
    for imported in imports(name, path):
        root, *parts = imported.split(".")
        if root != "videopure_fast":
            continue
        while parts and ".".join(parts) not in (*MODULES, "_C") and ".".join([*parts, "__init__"]) not in MODULES:
            parts.pop()  # a name inside a module
        found.add(".".join(parts) if ".".join(parts) in (*MODULES, "_C") else ".".join([*parts, "__init__"]))
    return found - {name, "_C"}


MODULES = sources()


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    for foreign in imports(name, MODULES[name]):
        assert foreign.split(".")[0] not in ("tests", "bench", "kernels"), f"{name} imports {foreign}"
    imported = house_imports(name, MODULES[name])
    room = name.split(".")[0]
    if name in TINY_LEAVES:
        assert imported <= TINY_LEAVES, f"{name} is a leaf, but imports {imported}"
    elif room == "kernels":
        assert {other.split(".")[0] for other in imported} <= {"kernels"}, f"{name} imports {imported}"
    elif name != TINY_SCRIPT:
        assert room in ROOMS, f"give {name} a place in ROOMS"
        for other in imported:
            assert other != TINY_SCRIPT, f"{name} imports {TINY_SCRIPT}, a script"
            place = other.split(".")[0]
            assert place == room or (name, other) in HANDED_OVER or ROOMS.index(place) < ROOMS.index(room), (
                f"{name} imports {other}, of a later room"
            )


def test_no_modules_import_each_other():
    graph = {
        name: {other for other in house_imports(name, path) if (name, other) not in HANDED_OVER}
        for name, path in MODULES.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_import_is_cheap():
    """`import videopure_fast` loads nothing; its classes load torch, no other heavy package, and start no GPU."""
    code = """if True:
        import sys, videopure_fast
        print(*sys.modules)
        from videopure_fast import DefendedClassifier, Purifier, use_backend
        import torch
        print(*sys.modules)
        print(torch.cuda.is_initialized())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    package, classes, initialized = done.stdout.splitlines()
    heavy = {"diffusers", "av", "cv2", "transformers", "xformers", "videopure_fast._C"}
    assert (heavy | {"torch", "triton", "numpy"}).isdisjoint(package.split())
    assert heavy.isdisjoint(classes.split())  # torch's FLOP counter loads triton where it is installed
    assert initialized == "False"


def test_test_files_have_names_of_their_own():
    """pytest imports each by its name alone, but for its own conftest.py: two of one name end the collection."""
    files = (path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py"))
    names = [path.name for path in files if path.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_fuzzers_run_only_when_asked_for():
    for path in (ROOT / "tests" / "fuzz").glob("test_*.py"):
        text = path.read_text()
        assert text.count("@pytest.mark.fuzz\n") == text.count("\ndef test_") > 0, f"{path.name}: not all are fuzz"
        assert "mark.slow" not in text, f"{path.name}: make test-slow would run it too"


def test_public_names_are_there():
    for name in videopure_fast.__all__:
        assert getattr(videopure_fast, name) is not None
    assert set(videopure_fast.__all__) <= set(dir(videopure_fast))
    with pytest.raises(AttributeError, match="no attribute 'purity'"):
        _ = videopure_fast.purity


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which the wheel of this tree is installed."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    # From a copy: setuptools puts whatever an earlier build left under build/ into the wheel.
    source = tmp_path_factory.mktemp("source") / "tree"
    leave_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "tests", "bench")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.glob("videopure_fast-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


def run_installed(installed: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_everything(installed, tmp_path):
    package = installed / "videopure_fast"
    assert list(package.glob("_C.*"))
    assert (package / "py.typed").is_file()
    assert MODULES["kernels.guided_update"]
    assert all((package / path.relative_to(PACKAGE)).is_file() for path in MODULES.values())
    assert {path.name.split("-")[0] for path in installed.iterdir()} <= {"videopure_fast", "bin"}
    weights = {path.relative_to(PACKAGE) for path in (PACKAGE / "tiny" / "weights").rglob("*") if path.is_file()}
    assert weights
    assert all((package / path).is_file() for path in weights)
    code = "from videopure_fast.ops import backend; print(backend.__file__, backend.backends()['cpu'])"
    assert run_installed(installed, tmp_path, "-c", code).split() == [str(package / "ops" / "backend.py"), "available"]


@pytest.mark.slow
def test_wheel_runs_elsewhere(installed, tmp_path):
    assert "cpu" in run_installed(installed, tmp_path, "-m", "videopure_fast", "info")
    assert run_installed(installed, tmp_path, "-m", "videopure_fast", "demo", "--clips", "4")
