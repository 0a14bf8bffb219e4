"""Times of each op's backends on the CPU, after a check that they agree: pytest bench/bench_ops.py"""

from __future__ import annotations

import pytest
import torch

from videopure_fast import ops, reference
from videopure_fast.config import PurifyConfig
from videopure_fast.schedule import Schedule

# (B, C, F, h, w): the packaged small prior's latents, and the paper's.
SHAPES = {"tiny": (4, 4, 16, 16, 16), "paper": (1, 4, 32, 28, 28)}
# Residuals nearer to zero than this may take either sign; the two sides round their sampling positions differently.
MAX_SHARE_APART = 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_guided_update(benchmark, backend, shape):
    config = PurifyConfig().rescaled(*shape[-3:])
    steps = Schedule(config).votes()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(steps), *shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    target = torch.randn(shape, generator=generator)
    flow = torch.randn(shape[0], shape[2] - 1, 2, *shape[-2:], generator=generator)
    weights = {"spatial_weight": config.spatial_weight, "temporal_weight": config.temporal_weight}

    with ops.use_backend(backend):
        expected = reference.guided_update(latents, noise, target, flow, steps, **weights)
        actual = ops.guided_update(latents, noise, target, flow, steps, **weights)
        apart = ~torch.isclose(actual, expected, rtol=1e-5, atol=2e-5)
        assert apart.float().mean() <= MAX_SHARE_APART

        benchmark.group = f"guided_update {tuple(latents.shape)}"
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.pedantic(
            ops.guided_update, (latents, noise, target, flow, steps), weights, rounds=40, warmup_rounds=4
        )
