"""Attacks on 5-D clips: one file for each, over the parts in `base`. Each attacks any callable from clips to logits.

All share one contract. clips: (B, 3, F, H, W), float32 or float64 in [0, 1]; labels: (B,) int64; eps and step_size are
in the clips' units (4/255, not 4). The model returns logits (B, K), or (B, V, K) for V votes: a named loss is then the
mean of the votes' losses, and a clip is misclassified when the majority vote is wrong. Attacked clips stay in [0, 1]
and in the ball, measured after rounding. Parameters get no gradient, the model's mode and the caller's grad mode stay
as they are, and every random draw comes from `generator`, on the CPU, so that it does not depend on the device.

Keywords shared by the gradient attacks: `norm` is "linf" or "l2"; `loss` is "ce", "dlr", "margin" or a callable from
the model's logits and labels to (B,), which the attack raises; `eot` calls of a randomized model are averaged for each
gradient (EOT, arXiv 1707.07397); of `restarts` runs each clip keeps the best: one that is misclassified, or else the
one with the largest loss. Runs after the first start at random. `progress` shows a bar.

`ATTACKS` lists them by name. `@register_attack` adds one of your own, which evaluations and the command line then know.

ART 1.20 runs FGM, PGD, MIM, AutoPGD and OverTheAirFlickering well on such clips, foolbox 3.3 FGSM and PGD in both
norms; tests compare fgsm and pgd with them. We have our own because EOT, losses on every vote, restarts and balls that
hold in floating point are needed at once, and because neither has Square on clips, temporal translation or the single
frame.
"""

from .registry import ATTACKS, Attack, AttackSettings, attack_settings, register_attack

# The order of these imports is the order of ATTACKS.
# isort: off
from .fgsm import fgsm
from .pgd import pgd
from .mim import mim
from .apgd import apgd
from .temporal_translation import temporal_translation
from .square import square
from .flicker import flicker
from .one_frame import one_frame
from .patch import patch
# isort: on

from .bpda import bpda

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackSettings",
    "apgd",
    "attack_settings",
    "bpda",
    "fgsm",
    "flicker",
    "mim",
    "one_frame",
    "patch",
    "pgd",
    "register_attack",
    "square",
    "temporal_translation",
]
