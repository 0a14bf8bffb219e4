"""A model's weights as the fast evaluation wants them, and what follows from several of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..ops.backend import is_available
from ..ops.folded_linear import FoldedNorm, fold_norm, widened

Made = TypeVar("Made")


class Owed(NamedTuple):
    """An activation, `width` channels wide, that still lacks the biases of `layers`."""

    layers: tuple[nn.Module, ...]
    width: int


class Weights:
    """A model's weights in the layouts of this evaluation: copies, or the weights themselves where they fit.

    Convolutions over images are channels last, those over frames (3, N, C); an upsampler's are those of its transposed
    convolution, (C, N, 4, 4).

    for_gpu: evaluate as a GPU is fastest, by default where Triton's kernels serve the model: on a CUDA GPU, or in the
    interpreter that stands for one. Biases of convolutions are left to the operation that reads their result,
    LayerNorms are folded into the products after them, skip connections are not concatenated, and a feed-forward's last
    layer is one product with the projection after it. On a CPU these gain nothing: its convolutions add their biases
    for nothing, and its norms lie within the products' caches.
    """

    def __init__(self, model: nn.Module, *, for_gpu: bool | None = None) -> None:
        served = is_available("triton", "linear_moments", next(model.parameters()))
        self.for_gpu = served if for_gpu is None else for_gpu
        laid_out = ((module, _laid_out_weight(module)) for module in model.modules())
        self._weights = {module: weight for module, weight in laid_out if weight is not None}
        self._made: dict[Hashable, object] = {}

    def __getitem__(self, module: nn.Module) -> Tensor:
        return self._weights[module]

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._weights

    def bias(self, layers: Sequence[nn.Module]) -> Tensor | None:
        """The sum of several layers' biases, (C,); None without layers, or where none of them has one."""
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        if len(biases) < 2:
            return biases[0] if biases else None
        return self._once(("bias", *layers), lambda: _sum(biases))

    def bias_of(self, parts: Sequence[Owed]) -> Tensor | None:
        """The biases of activations that stand beside one another: (sum of their widths,), None where none is owed."""
        biases = [self.bias(part.layers) for part in parts]
        owed = [bias for bias in biases if bias is not None]
        if not owed or len(parts) == 1:
            return biases[0] if owed else None

        def make() -> Tensor:
            columns = zip(biases, parts, strict=True)
            return torch.cat([owed[0].new_zeros(part.width) if bias is None else bias for bias, part in columns])

        return self._once(("beside", *parts), make)

    def bias_through(self, layer: nn.Module, parts: Sequence[Owed], others: Sequence[nn.Module]) -> Tensor | None:
        """The bias of a linear layer whose inputs still lack theirs, plus the biases of the layers `others`: (N,)."""
        own, owed = self.bias((layer, *others)), self.bias_of(parts)
        if owed is None:
            return own

        def make() -> Tensor:
            through = widened(layer.weight.detach().flatten(1)) @ widened(owed)
            return (through if own is None else through + widened(own)).to(owed.dtype)

        return self._once(("through", layer, *parts, *others), make)

    def beside(self, layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
        """Linear layers of one input as one product: weight (sum of their outputs, K), and bias or None."""
        if len(layers) == 1:
            return layers[0].weight.detach(), self.bias(layers)
        return self._once(("product", *layers), lambda: _concatenated(layers))

    def folded(self, norm: nn.LayerNorm, layers: Sequence[nn.Module]) -> FoldedNorm:
        """Linear layers of one input as one product, with the LayerNorm before them folded in."""

        def make() -> FoldedNorm:
            return fold_norm(norm.weight.detach(), norm.bias.detach(), *_concatenated(layers))

        return self._once(("folded", norm, *layers), make)

    def merged(self, first: nn.Module, second: nn.Module, owed: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
        """For second(h + first(g)): the weight (N, K + L) of h and g side by side, and the bias, `owed` ones added.

        The weights are (K, L) and (N, K); their product is computed in float64 and rounded once.
        """

        def make() -> tuple[Tensor, Tensor | None]:
            outer, inner = second.weight.detach().flatten(1), first.weight.detach()
            weight = torch.cat([outer, (widened(outer) @ widened(inner)).to(outer.dtype)], 1)
            return weight, self.bias_through(second, [Owed((first,), len(inner))], owed)

        return self._once(("merged", first, second, *owed), make)

    @torch.no_grad()
    def _once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What follows from the weights, made at its first use; a call before a capture makes all that it reads."""
        if key not in self._made:
            with torch.inference_mode(False):
                made = make()
            if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().synchronize()  # another thread may read it on a stream of its own
            self._made[key] = made
        return self._made[key]  # type: ignore[return-value]


def _concatenated(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The weights and the biases of linear layers, one after another."""
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return widened(torch.stack(list(tensors))).sum(0).to(tensors[0].dtype)


def lay_out_in_place(model: nn.Module) -> None:
    """Make a model's weights over images channels last, so that `Weights` need not copy them.

    They are 1.1 of the 2.8 GB of text-to-video-ms-1.7b's UNet in half precision.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _laid_out_weight(module: nn.Module) -> Tensor | None:
    """A module's weight in the layout of this evaluation; None where the module's own serves as it is."""
    if type(module).__name__ == "Upsample2D":
        return _upsampling_weight(module.conv.weight.detach()) if module.conv.kernel_size == (3, 3) else None
    if isinstance(module, nn.Conv3d):
        return module.weight.detach().flatten(2).permute(2, 0, 1).contiguous()
    if isinstance(module, nn.Conv2d):
        return module.weight.detach().contiguous(memory_format=torch.channels_last)
    return None


def _upsampling_weight(weight: Tensor) -> Tensor:
    """The transposed convolution that doubles an image and convolves it: (N, C, 3, 3) -> (C, N, 4, 4).

    Weights that meet the same pixel are summed in float64 and rounded once.
    """
    summed = widened(weight.new_zeros(*weight.shape[:2], 4, 4))
    for row in range(2):
        for column in range(2):
            summed[..., row : row + 3, column : column + 3] += weight
    return summed.flip(2, 3).transpose(0, 1).to(weight.dtype).contiguous(memory_format=torch.channels_last)
