"""What a Triton kernel's launcher needs to know of the machine."""

from __future__ import annotations

import os

import triton


def architecture() -> int:
    """Compute capability of the current GPU as one number, 80 or 90; of the interpreter, 80."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 80
    return triton.runtime.driver.active.get_current_target().arch
