"""What a full-size purification costs on a GPU, counted on the meta device: products, launches, and nothing wasted."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from full_size import FullSize, Operation, operations_of  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="launches nothing")


@pytest.fixture(scope="module")
def models() -> FullSize:
    return FullSize()


@pytest.fixture(scope="module")
def evaluation(models) -> list[Operation]:
    return operations_of(models.evaluate)


@pytest.fixture(scope="module")
def decoding(models) -> list[Operation]:
    return operations_of(models.decode)


@pytest.fixture(scope="module")
def encoding(models) -> list[Operation]:
    return operations_of(models.encode)


def launches(operations: list[Operation]) -> Counter[str]:
    return Counter(launch for operation in operations for launch in operation.launches)


def test_products_of_a_purification(models):
    """32 frames of 224x224 at depth 5: encode, 6 evaluations each way, 7 decodes. As the paper has it, 296 TFLOP."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        models.encode()
        for _ in range(6):
            models.evaluate(first_frame=True)
            models.evaluate()
        for _ in range(7):
            models.decode()
    assert 180e12 <= counter.get_total_flops() <= 187e12


def test_launches_of_an_evaluation(evaluation):
    assert 660 <= launches(evaluation).total() <= 730


def test_launches_of_a_decode(decoding):
    assert 80 <= launches(decoding).total() <= 130


def test_what_the_attention_over_frames_launches(evaluation):
    """One kernel where an H200 measured it to be the faster way; else two, the product and the attention alone."""
    chains = Counter(
        (operation.shapes[0][-1], len(operation.launches))
        for operation in evaluation
        if operation.name == "folded_temporal_attention"
    )
    assert chains == {(320, 1): 10, (512, 2): 2, (640, 2): 10, (1280, 1): 10, (1280, 2): 2}


@pytest.mark.parametrize("stage", ["evaluation", "decoding", "encoding"])
def test_nothing_is_wasted(stage, request):
    """No bias of a convolution in a kernel of its own, but for the last one of few channels, which nothing follows.

    No concatenation, copy, sum or LayerNorm of an activation, which a megabyte tells from latents, by torch; and
    nearest neighbors only where a side does not double, from 4 to 7.
    """
    operations: list[Operation] = request.getfixturevalue(stage)
    biased = [operation.shapes[1] for operation in operations if operation.bias]
    assert biased == {"evaluation": [(4, 320, 3, 3)], "decoding": [(3, 128, 3, 3)], "encoding": []}[stage]
    counts = launches([operation for operation in operations if operation.written >= 2**20])
    assert not {"cat", "clone", "copy_", "_to_copy", "native_layer_norm", "add"} & set(counts)
    upsampled = [operation.shapes for operation in operations if "upsample" in operation.name]
    assert [shapes[0][-2:] for shapes in upsampled] == ([(4, 4)] if stage == "evaluation" else [])
