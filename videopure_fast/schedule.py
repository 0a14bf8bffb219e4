"""The noise schedule as host floats: every coefficient a purification needs, known before it starts.

Symbols: a_t = alphas_cumprod[t], b_t = 1 - a_t; timesteps below zero stand at a_0, so that the log variance is finite
at the last step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .config import PurifyConfig, brief


class SamplerStep(NamedTuple):
    """One step of a sampler after eliminating x0: z' = scale z + noise_scale UNet(z, timestep) + sigma N(0, I)."""

    timestep: int
    scale: float
    noise_scale: float
    sigma: float = 0.0


class VoteCoefficients(NamedTuple):
    """One guided update: p = (z - sqrt_beta e) / sqrt_alpha; z_opt = z + update g(p). The vote is z_opt or its x0."""

    sqrt_alpha: float
    sqrt_beta: float
    update: float
    predicts_x0: bool


class Schedule:
    """Coefficients of the samplers for one PurifyConfig. ValueError for betas that leave no signal or no noise."""

    def __init__(self, config: PurifyConfig) -> None:
        self._config = config
        # float32, rounding and all: the table that diffusion checkpoints are trained and sampled with.
        scaled = config.beta_schedule == "scaled_linear"
        ends = [math.sqrt(beta) if scaled else beta for beta in (config.beta_start, config.beta_end)]
        values = torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float32, device="cpu")
        betas = values**2 if scaled else values
        self.alphas_cumprod: list[float] = torch.cumprod(1 - betas, 0).tolist()
        self.step = config.num_train_timesteps // config.num_inference_steps
        try:
            self.vote_coefficients()
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"betas from {config.beta_start} to {config.beta_end} over {config.num_train_timesteps} timesteps "
                "leave no signal or no noise in float32"
            ) from error

    @property
    def timesteps(self) -> list[int]:
        """Timesteps of inversion, ascending: 1, 21, ..., 1 + 20 T."""
        config = self._config
        return [config.steps_offset + i * self.step for i in range(config.inversion_steps + 1)]

    def alpha(self, timestep: int) -> float:
        return self.alphas_cumprod[max(timestep, 0)]

    def log_variance(self, timestep: int) -> float:
        """log of the DDPM posterior variance between t - 20 and t; negative."""
        a, a_prev = self.alpha(timestep), self.alpha(timestep - self.step)
        return math.log((1 - a_prev) / (1 - a) * (1 - a / a_prev))

    def _ddim(self, timestep: int, source: int, target: int) -> SamplerStep:
        """DDIM (eq. 12, eta 0) from level `source` to level `target`, with the noise predicted at `timestep`."""
        a, a_target = self.alpha(source), self.alpha(target)
        ratio = math.sqrt(a_target / a)
        return SamplerStep(timestep, ratio, math.sqrt(1 - a_target) - ratio * math.sqrt(1 - a))

    def inversion(self) -> list[SamplerStep]:
        """DDIM inversion, t ascending; the UNet is asked at the level being entered."""
        return [self._ddim(t, t - self.step, t) for t in self.timesteps]

    def denoising(self) -> list[SamplerStep]:
        """DDIM denoising, t descending."""
        return [self._ddim(t, t, t - self.step) for t in reversed(self.timesteps)]

    def diffusion(self) -> tuple[float, float]:
        """(sqrt(a_t), sqrt(b_t)) at the deepest timestep: z_t = sqrt(a_t) z_0 + sqrt(b_t) N(0, I)."""
        a = self.alpha(self.timesteps[-1])
        return math.sqrt(a), math.sqrt(1 - a)

    def ancestral(self) -> list[SamplerStep]:
        """DDPM (eqs. 6 and 7, the smaller fixed variance) through every training timestep from the deepest to 1."""
        steps = []
        for t in range(self.timesteps[-1], 0, -1):
            a, a_prev = self.alpha(t), self.alpha(t - 1)
            beta = 1 - a / a_prev
            x0_weight = math.sqrt(a_prev) * beta / (1 - a)
            scale = math.sqrt(a / a_prev) * (1 - a_prev) / (1 - a) + x0_weight / math.sqrt(a)
            noise_scale = -x0_weight * math.sqrt((1 - a) / a)
            sigma = math.sqrt((1 - a_prev) / (1 - a) * beta)
            steps.append(SamplerStep(t, scale, noise_scale, sigma))
        return steps

    @cached_property
    def steps(self) -> tuple[tuple[SamplerStep, ...], tuple[SamplerStep, ...]]:
        """The steps of inversion and of denoising for the configured method; without inversion latents are diffused."""
        inverts = self._config.method in ("videopure", "ddim_inversion")
        denoising = self.ancestral() if self._config.method == "ddpm" else self.denoising()
        return tuple(self.inversion()) if inverts else (), tuple(denoising)

    def vote_coefficients(self) -> list[VoteCoefficients]:
        """The T + 2 guided updates of videopure: one x0 vote a denoising step, then the final latents themselves."""
        steps = []
        for t in reversed(self.timesteps):
            a = self.alpha(t)
            update = self._config.update_scale * self.log_variance(t) / math.sqrt(a)
            steps.append(VoteCoefficients(math.sqrt(a), math.sqrt(1 - a), update, predicts_x0=True))
        return [*steps, steps[-1]._replace(predicts_x0=False)]


# Fields of a diffusers scheduler's configuration that say what the model was trained to predict, or that change the
# values of a step; each with the one value that the method's own steps have. Fields that are not listed choose a
# sampler, and the method has its own: the solver (solver_order, algorithm_type, use_karras_sigmas, final_sigmas_type),
# the timesteps of inference (timestep_spacing: the paper visits 1, 21, ...), the level beyond the last step
# (set_alpha_to_one: a_0 here), the variance of ancestral steps (variance_type: the smaller one here), and the sizes of
# what is switched off (clip_sample_range, dynamic_thresholding_ratio, sample_max_value, flow_shift).
_ACCEPTED: dict[str, Any] = {
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 1,
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "clip_sample": False,
    "thresholding": False,
}


def without(scheduler_config: Any, chosen: Collection[str]) -> Any:
    """A scheduler's configuration without the fields for which something else was chosen."""
    if not isinstance(scheduler_config, Mapping):
        return scheduler_config
    return {name: value for name, value in scheduler_config.items() if name not in chosen}


def read_scheduler(config: PurifyConfig, scheduler_config: Mapping[str, Any] | None) -> PurifyConfig:
    """`config` with the training schedule and offset of a diffusers scheduler's configuration.

    ValueError for a scheduler without betas or with others than "scaled_linear" and "linear" ones, for a prediction
    other than epsilon, and for clipped predictions.
    """
    if scheduler_config is None:
        return config
    if not isinstance(scheduler_config, Mapping):
        raise TypeError(f"scheduler_config must be a mapping, got {type(scheduler_config).__name__}")
    given = {name: value for name, value in scheduler_config.items() if value is not None}
    if "_class_name" in given and not {"beta_start", "trained_betas"} & set(given):
        raise ValueError(f"unsupported scheduler: {brief(given['_class_name'])} has no betas; accepted: DDIM's kind")
    for name, accepted in _ACCEPTED.items():
        if given.get(name, accepted) != accepted:
            raise ValueError(f"unsupported scheduler: {name} is {brief(given[name])}; accepted: {accepted!r}")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset")
    return replace(config, **{name: given[name] for name in names if name in given})
