"""Time whole purifications, their stages and their ops on one GPU: python bench/gpu.py, or `make gpu`.

Random weights in the shape of ModelScope's text-to-video UNet and Stable Diffusion's VAE, made on the GPU in float16;
random clips; T=5. Nothing is downloaded.

A row is kept only if what was timed is correct: an op agrees with its float32 reference, and the votes of a
purification are no further from a float32 run than 1.25 times those of the authors' algorithm in the same precision. A
row that fails says why, and does not stop the rest. Every row is written as soon as it is measured; a later run goes on
where the last one ended, unless the sources have changed or --again is given. Another process measures: where it is
lost, to an error on the GPU or a kernel that never ends, a new one goes on behind the row that it was at.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_plan import parser

ROOT = Path(__file__).resolve().parents[1]
ENDED = (0, 2, 3)  # exit statuses of a process that need no other one: done, bad options, a result was not correct
MOST_PROCESSES = 5


def main() -> None:
    options = parser(__doc__)
    given = options.parse_args()
    if given.worker:
        # What a run that was cut off has compiled serves the next one. torch and triton read these variables.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
        sys.path.insert(0, str(ROOT))  # these sources are measured, installed or not
        from gpu_stages import work

        sys.exit(work(given, options.error))
    began = time.time()
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    status = subprocess.call(command)
    for _ in range(MOST_PROCESSES - 1):
        if status in ENDED:
            break
        print(f"the process was lost (status {status}); another one goes on", file=sys.stderr)
        rest = [argument for argument in command if argument != "--again"]
        status = subprocess.call([*rest, "--skip-failed", "--began", str(began)])
    sys.exit(status)


if __name__ == "__main__":
    main()
