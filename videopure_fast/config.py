"""Every constant of the method, once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

Method = Literal["videopure", "ddim_inversion", "ddim", "ddpm"]
BetaSchedule = Literal["scaled_linear", "linear"]

_MOST_TIMESTEPS = 100_000  # the table is made anew for every configuration
MOST_FLOAT = 1e9  # of a float setting: the product of three of them, and of latents, is finite in float32
_LEAST_TEMPERATURE = 1e-30  # float32 knows it
_MOST_DECODED = 2**31 - 1  # frames at once


def brief(value: object, longest: int = 200) -> str:
    """The value as a message shows it, in so many characters at most."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    shown = repr(value)
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


@dataclass(frozen=True)
class PurifyConfig:
    """Settings of one purification. The defaults are the paper's (arXiv 2501.14999), for 32 frames of 28x28 latents.

    Attributes:
        method: "videopure", or one of the baselines "ddim_inversion", "ddim", "ddpm".
        inversion_steps: the depth T. Both loops run T + 1 evaluations, at timesteps 1, 21, ..., 1 + 20 T.
        num_inference_steps: steps into which the training schedule is divided; 50 steps of 20 timesteps.
        spatial_weight: weight of the squared distance to the attacked latents, averaged over a clip's N values.
        temporal_weight: weight of the L1 distance to the flow-warped next frame, averaged over a frame's n values.
            Both weights enter the gradient as they stand; `rescaled` converts them to another latent size.
        update_scale: factor on (log variance) x (gradient) in the guided update. The log variance is negative,
            so a negative factor moves away from the attacked latents and towards temporal consistency.
        sign_temperature: 0, or a temperature tau for tanh(residual / tau) in the place of the temporal distance's
            sign: another method, through which a gradient passes. For attackers' surrogates.
        feedback: let each transition of denoising start from the optimized latents, as the paper's abstract can be
            read; its authors' code optimizes votes alone.
        cfg_inversion, cfg_denoise: classifier-free guidance scales; used only where the negative prompt differs.
        window_overlap: frames that neighboring windows of a long clip share; fewer than the windows' length.
        decode_chunk: frames that go through the VAE at once; bounds its memory, changes no result. 0 leaves the
            choice to the purifier: on a CUDA GPU as much as 32 frames of 224x224, elsewhere what fits into caches.
        num_train_timesteps, beta_start, beta_end, beta_schedule, steps_offset: the training schedule, in which the
            betas' roots grow linearly, or with "linear" (AnimateDiff) the betas themselves; and the first timestep
            visited. A scheduler configuration given to the Purifier is read into them.
    """

    method: Method = "videopure"
    inversion_steps: int = 5
    num_inference_steps: int = 50
    spatial_weight: float = 800.0
    temporal_weight: float = 5.0
    update_scale: float = -4.0
    sign_temperature: float = 0.0
    feedback: bool = False
    cfg_inversion: float = 7.5
    cfg_denoise: float = 9.0
    window_overlap: int = 4
    decode_chunk: int = 0
    num_train_timesteps: int = 1000
    beta_start: float = 8.5e-4
    beta_end: float = 1.2e-2
    beta_schedule: BetaSchedule = "scaled_linear"
    steps_offset: int = 1

    def __post_init__(self) -> None:
        for name, accepted in (("method", get_args(Method)), ("beta_schedule", get_args(BetaSchedule))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"unknown {name} {brief(getattr(self, name))}; accepted: {', '.join(accepted)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{field.name} must be an int, got {brief(value)}")
            if field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be a bool, got {brief(value)}")
            if field.type == "float":
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TypeError(f"{field.name} must be a number, got {brief(value)}")
                if not -MOST_FLOAT <= value <= MOST_FLOAT:  # NaN fails both
                    raise ValueError(f"{field.name} must be within {MOST_FLOAT:g} of 0, got {brief(value)}")
        if not 0 <= self.inversion_steps < self.num_inference_steps:
            raise ValueError(
                f"inversion_steps must satisfy 0 <= inversion_steps < num_inference_steps, "
                f"got {brief(self.inversion_steps)} of {brief(self.num_inference_steps)}"
            )
        if not 1 <= self.num_train_timesteps <= _MOST_TIMESTEPS:
            seen = brief(self.num_train_timesteps)
            raise ValueError(f"num_train_timesteps must be 1 to {_MOST_TIMESTEPS}, got {seen}")
        if not 1 <= self.num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be 1 to {self.num_train_timesteps}, got {brief(self.num_inference_steps)}"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betas must satisfy 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}"
            )
        if self.feedback and self.method != "videopure":
            raise ValueError(f"feedback is of method 'videopure' alone, got {brief(self.method)}")
        if self.sign_temperature and self.sign_temperature < _LEAST_TEMPERATURE:
            least = f"0, or {_LEAST_TEMPERATURE:g} or more"
            raise ValueError(f"sign_temperature must be {least}, got {self.sign_temperature}")
        if self.window_overlap < 0:
            raise ValueError(f"window_overlap must be 0 or more, got {brief(self.window_overlap)}")
        if not 0 <= self.decode_chunk <= _MOST_DECODED:
            raise ValueError(f"decode_chunk must be 0 to {_MOST_DECODED}, got {brief(self.decode_chunk)}")
        last = self.inversion_steps * (self.num_train_timesteps // self.num_inference_steps) + self.steps_offset
        if self.steps_offset < 1 or last >= self.num_train_timesteps:
            raise ValueError(
                f"steps_offset {brief(self.steps_offset)} makes the timesteps go from there to {brief(last)}; "
                f"accepted: within 1..{self.num_train_timesteps - 1}"
            )

    def rescaled(self, frames: int, height: int, width: int) -> PurifyConfig:
        """The config whose weights pull on (frames, height, width) latents as these do on 32x28x28."""
        if min(frames, height, width) < 1 or max(frames, height, width) > _MOST_DECODED:
            seen = "x".join(map(brief, (frames, height, width)))
            raise ValueError(f"latents must have 1 to {_MOST_DECODED} frames, rows and columns, got {seen}")
        area = height * width / (28 * 28)
        return replace(
            self,
            spatial_weight=self.spatial_weight * area * frames / 32,
            temporal_weight=self.temporal_weight * area,
        )
