"""The models of a purifier as its loop wants them: fast forms where there are any, tables made once, CUDA graphs."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..models.layers import AttentionFn, Unsupported
from ..models.unet import Constants, FastMotionUNet, FastUNet, PlainUNet
from ..models.vae import FastVAE, PlainVAE
from ..ops import backend
from ..schedule import SamplerStep
from .replay import Recording

_MOST_WALKS = 16
_MOST_GRAPHS = 4  # each keeps the activations of its shape
# On the CPU: calls of a shape before it is captured, and before it is captured once more after it was pushed out.
_CALLS_BEFORE, _CALLS_BEFORE_ANOTHER, _MOST_WAITING = 1, 16, 64
# Values of the UNet's first activation: beyond, its operations take so long that their calls do not matter.
_MOST_REPLAYED = 2**19


class SamplerTables(NamedTuple):
    """A sampler's transitions as tensors on the models' device.

    constants: for each prompt, conditional and, under guidance, unconditional. coefficients: (steps, 2), scale and
    noise_scale, in the state's dtype.
    """

    transitions: tuple[SamplerStep, ...]
    constants: tuple[Constants, ...]
    coefficients: Tensor


class Engine:
    """Evaluates a UNet and a VAE; reads their weights anew when they have changed.

    fast: use the channels-last forms where they know the model; else, or where they do not, diffusers' own forward.
    attend: the function for spatial and cross-attention in the fast forms.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        *,
        fast: bool = True,
        attend: AttentionFn = F.scaled_dot_product_attention,
    ) -> None:
        self._modules = unet, vae
        self._fast = fast
        self._attend = attend
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made again when needed: a captured graph cannot be copied."""
        empty = {name: OrderedDict() for name in ("_walks", "_graphs", "_waiting")}
        return {**self.__dict__, "_seen": (), "_forms": None, **empty}

    def _forget(self) -> None:
        self._seen: tuple[Any, ...] = ()
        self._forms: tuple[Any, Any] | None = None
        self._walks: OrderedDict[Any, SamplerTables] = OrderedDict()
        self._graphs: OrderedDict[Any, _Graph | Recording | None] = OrderedDict()
        self._waiting: OrderedDict[Any, int] = OrderedDict()  # calls that are still to come before a capture

    def refresh(self) -> None:
        """Drop everything that was made of weights which have changed since. Called before each purification."""
        parameters = (parameter for module in self._modules for parameter in module.parameters())
        seen = tuple((id(p), p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)
        if seen != self._seen:
            self._forget()
            self._seen = seen

    @property
    def unet(self) -> FastUNet | PlainUNet:
        return self._made()[0]

    @property
    def vae(self) -> FastVAE | PlainVAE:
        return self._made()[1]

    def _made(self) -> tuple[Any, Any]:
        if self._forms is None:
            unet, vae = self._modules
            fast_unet = FastMotionUNet if type(unet).__name__ == "UNetMotionModel" else FastUNet
            if unet.device.type == "cpu":
                # A block of this size, once freed, makes glibc keep what the process frees later: giving memory back
                # and faulting it in again takes a tenth of a small clip's time.
                torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
            with torch.inference_mode(False):  # what is made in it would shut autograd out of every later call
                self._forms = self._form(unet, fast_unet, PlainUNet), self._form(vae, FastVAE, PlainVAE)
        return self._forms

    def _form(self, module: nn.Module, fast: type, plain: type) -> Any:
        if self._fast:
            try:
                return fast(module, self._attend)
            except Unsupported as reason:
                what = f"{type(module).__name__}: {reason}; diffusers' own forward runs instead, which is slower"
                warnings.warn(what, stacklevel=2)
        return plain(module)

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, transitions: Sequence[SamplerStep], prompts: Sequence[Tensor], like: Tensor) -> SamplerTables:
        """The tables of a walk, made once. `like` has the state's dtype and device."""
        transitions = tuple(transitions)
        key = (transitions, like.dtype, like.device, *((prompt.data_ptr(), prompt._version) for prompt in prompts))
        if key not in self._walks:
            timesteps = torch.tensor([step.timestep for step in transitions], device=like.device)
            constants = tuple(self.unet.constants(prompt, timesteps) for prompt in prompts)
            coefficients = like.new_tensor([(step.scale, step.noise_scale) for step in transitions])
            _remember(self._walks, key, SamplerTables(transitions, constants, coefficients), _MOST_WALKS)
        self._walks.move_to_end(key)
        return self._walks[key]

    def captured(self, key: Any, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
        """function(x), captured for each key and shape: on a CUDA GPU as one graph, on the CPU as a replay.

        The function must be the same for the same key, and neither read a tensor on the host nor draw random numbers,
        and its walks have been prepared. x needs no gradient. A capture on the CPU takes longer than a call, so only
        a call that comes again is captured. Where it cannot be captured it runs as it is, after one warning.
        """
        if not x.is_cuda and not self._replays(x):
            return function(x)
        key = (key, backend.in_use(), torch.get_num_threads(), tuple(x.shape), x.dtype, x.device)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            graph = self._graphs[key]
            return function(x) if graph is None else graph(x)
        if not x.is_cuda and (calls := self._waiting.get(key, _CALLS_BEFORE)):
            _remember(self._waiting, key, calls - 1, _MOST_WAITING)
            return function(x)
        try:
            graph = _Graph(function, x) if x.is_cuda else Recording(function, x)
            graph.tables = tuple(self._walks.values())  # it reads their memory, whatever is forgotten here
        except Exception as error:  # a compiler's, CUDA's or torch's; what is really wrong will raise below again
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"nothing was captured, which is slower: {reason}", stacklevel=2)
            graph = None
        _remember(self._graphs, key, graph, _MOST_GRAPHS)
        _remember(self._waiting, key, _CALLS_BEFORE_ANOTHER, _MOST_WAITING)
        if graph is None:
            return function(x)
        return graph(x) if x.is_cuda else graph.results()

    def _replays(self, latents: Tensor) -> bool:
        """Whether a replay pays: a small model's on the CPU, whose operations are the extension's or torch's."""
        if latents.device.type != "cpu" or not isinstance(self.unet, FastUNet) or ops.watched():
            return False
        width = self._modules[0].config.block_out_channels[0]
        return latents[:, 0].numel() * width <= _MOST_REPLAYED and set(backend.in_use()) <= {"cpu", "reference"}


def _remember(memory: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    memory[key] = value
    if len(memory) > most:
        memory.popitem(last=False)


class _Graph:
    """A captured call. Its inputs and outputs have fixed places, from and to which each replay copies."""

    tables: tuple[SamplerTables, ...] = ()

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> None:
        self._x = x.clone()
        side, current = torch.cuda.Stream(x.device), torch.cuda.current_stream(x.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function(self._x)  # compiles kernels and chooses algorithms, which a capture may not
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(self._x)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        self._x.copy_(x)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


class SideStream:
    """On a CUDA GPU, a stream for work that depends on nothing enqueued after this line; elsewhere the usual order.

    Entering the block switches to it, and leaving lets the current stream wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._side is not None:
            self._current = torch.cuda.current_stream(device)
            self._side.wait_stream(self._current)
            self._context = torch.cuda.stream(self._side)

    def __enter__(self) -> None:
        if self._side is not None:
            self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._side is not None:
            self._context.__exit__(*error)
            self._current.wait_stream(self._side)
