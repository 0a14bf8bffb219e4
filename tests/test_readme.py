import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_readme_shows_the_committed_results():
    subprocess.run([sys.executable, ROOT / "bench" / "report.py", "--check"], check=True)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_compile_and_what_they_import_exists(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_a_classifier_of_ones_own_is_fifteen_lines_that_run(capsys):
    (block,) = (block for block in BLOCKS if "class Network" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "gray-box pgd" in capsys.readouterr().out


def test_live_clips_are_answered(monkeypatch, capsys):
    from videopure_fast import Purifier

    (block,) = (block for block in BLOCKS if "StreamPurifier" in block)
    shallow = Purifier.from_pretrained("tiny", inversion_steps=0)
    monkeypatch.setattr(Purifier, "from_pretrained", lambda: shallow)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["answer"].label == int(names["labels"][-1])
    assert "answered=4" in capsys.readouterr().out


def test_public_names_are_shown():
    imported = {
        (node.module, alias.name)
        for block in BLOCKS
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {
        ("videopure_fast", name)
        for name in ("purify", "Purifier", "DefendedClassifier", "StreamPurifier", "use_backend")
    } <= imported
    assert {("videopure_fast.attacks", "apgd"), ("videopure_fast.evaluation", "benchmark")} <= imported
