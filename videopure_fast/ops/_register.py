"""One call registers an op: with torch, and with the choice of backends.

The ops are operators of the namespace `videopure_fast` in torch's dispatcher: they have shapes without values and FLOP
counts (of matrix products alone, as torch counts its own), and pass whole through torch.compile, CUDA graphs and
profilers. Gradients are the reference's: a backward pass computes the op once more there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from .backend import NAMESPACE, OPS, SUPPORTED_DTYPES, DtypesByBackend, Op, choose

_library = Library(NAMESPACE, "DEF")

Results: TypeAlias = "Tensor | tuple[Tensor, ...]"


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def register(
    name: str,
    *,
    reference: Callable[..., Results],
    native: Callable[..., Results] | None = None,
    dtypes: DtypesByBackend,
    kernel: str | None = None,
    max_triton_frames: int | None = None,
    fake: Callable[..., Results] = _like_first,
    flops: Callable[..., int] = lambda *_: 0,
) -> Callable[..., Any]:
    """Register an op whose results, one tensor or several, are new, and return torch's operator.

    reference: the op in plain torch, for every device and dtype; its signature is the operator's, a tensor first.
    native: the form that calls the compiled extension, with the same arguments; a form in kernels/ has them too.
    dtypes: those that each backend's form takes. kernel: the module in kernels/ with the Triton function `name`;
    by default it has the same name. max_triton_frames: the largest second dimension of the first argument that the
    Triton form takes. fake: arguments -> empty tensors like the results; by default one like the first argument. flops:
    arguments, with shapes in place of tensors -> floating-point operations of the matrix products.
    """

    def run(*arguments: Any) -> Results:
        with _no_autocast(arguments[0]):
            results: Results = choose(name, arguments[0])(*arguments)
            if isinstance(results, Tensor):
                return results.contiguous()
            return tuple(result.contiguous() for result in results)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.inputs = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, *gradients_of_results: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if value is None else value[0] for value in ctx.inputs]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        again = torch.is_grad_enabled()  # true if the gradient is to be differentiated too: it needs a graph
        for i in wanted:
            inputs[i] = inputs[i].view_as(inputs[i]) if again else inputs[i].detach().requires_grad_()
        sources = [inputs[i] for i in wanted]
        with _no_autocast(sources[0]):
            with torch.enable_grad():
                results = reference(*inputs)
            pairs = zip((results,) if isinstance(results, Tensor) else results, gradients_of_results, strict=True)
            reached = [(result, given) for result, given in pairs if result.requires_grad and given is not None]
            outputs, given = [result for result, _ in reached], [gradient for _, gradient in reached]
            found = torch.autograd.grad(outputs, sources, given, allow_unused=True, create_graph=again)
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, value in zip(wanted, found, strict=True):
            gradients[i] = value
        return tuple(gradients)

    SUPPORTED_DTYPES[name] = dtypes
    OPS[name] = Op(reference, native, kernel or name, max_triton_frames, run)
    operator = _define(name, run, fake, infer_schema(reference, mutates_args=()), flops)
    register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_library)
    return operator


def register_in_place(
    name: str,
    run: Callable[..., None],
    *,
    reference: Callable[..., None],
    native: Callable[..., Any],
    dtypes: DtypesByBackend,
    kernel: str | None = None,
) -> Callable[..., None]:
    """Register an op that overwrites its first argument and has neither result nor gradient.

    run: calls the chosen form. The other arguments are those of `register`.
    """

    def run_and_mark(latents: Tensor, *others: Any) -> None:
        run(latents, *others)
        if not latents.is_inference():
            # By its version, autograd detects an overwritten tensor; writing to an address does not change it.
            torch.autograd.graph.increment_version(latents)

    first = next(iter(reference.__annotations__))
    SUPPORTED_DTYPES[name] = dtypes
    OPS[name] = Op(reference, native, kernel or name, None, run_and_mark)
    return _define(name, run_and_mark, lambda *_: None, infer_schema(reference, mutates_args=(first,)), lambda *_: 0)


def _define(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], schema: str, flops: Callable[..., int]
) -> Callable[..., Any]:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")  # every device; gradients are registered apart
    register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    register_flop_formula(packet)(lambda *shapes, out_shape, **_: flops(*shapes))
    operator: Callable[..., Any] = packet.default
    return operator


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns off the caller's autocast, if it is on: an op computes in the dtype of its tensors."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
