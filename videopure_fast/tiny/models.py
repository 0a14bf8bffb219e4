"""The packaged models: a video classifier, and the configurations of the small VAE and UNet.

VAE and UNet are of the diffusers classes that the full-size text-to-video models use, with few channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from .clips import CLASSES

WEIGHTS = Path(__file__).with_name("weights")

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [24, 48],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 32,
}
UNET_CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "sample_size": 16,
}


class ActionClassifier(nn.Module):
    """A 3-D convolutional classifier: clips (B, 3, F, H, W) in [0, 1] -> logits (B, 8).

    width: channels of the first layer.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        # Early layers reduce height and width, not frames: the direction of motion shows only over time.
        strides = ((1, 2, 2), (2, 2, 2), 1, 2, 1)
        for out, stride in zip((width, 2 * width, 2 * width, 4 * width, 4 * width), strides, strict=True):
            layers += [nn.Conv3d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm3d(out), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, len(CLASSES))

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.features(2 * clips - 1).mean((2, 3, 4)))


def load_classifier() -> ActionClassifier:
    """The packaged classifier: trained, in eval mode, its parameters without gradients."""
    classifier = ActionClassifier()
    classifier.load_state_dict(load_file(WEIGHTS / "classifier.safetensors"))
    return classifier.eval().requires_grad_(False)
