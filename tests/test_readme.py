import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readme_shows_the_committed_results():
    subprocess.run([sys.executable, ROOT / "bench" / "report.py", "--check"], check=True)
