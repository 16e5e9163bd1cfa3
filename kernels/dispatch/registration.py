"""Registers an op with torch.library, for graphs: ``torch.ops.xclip_fast.<name>`` for inference; ``<name>_saving`` and
``<name>_backward`` where gradients are wanted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def save(ctx: Any, args: Sequence[Any], saved: Sequence[Tensor]) -> None:
    """Keep arguments, and what a forward saved, for backward."""
    ctx.save_for_backward(*saved, *(arg for arg in args if isinstance(arg, Tensor)))
    ctx.rest = [None if isinstance(arg, Tensor) else (arg,) for arg in args]
    ctx.saved_count = len(saved)


def restore(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """What ``save`` kept."""
    kept = ctx.saved_tensors  # read once: recomputed activations cannot be unpacked twice
    saved = kept[: ctx.saved_count]
    tensors = iter(kept[ctx.saved_count :])
    return [next(tensors) if other is None else other[0] for other in ctx.rest], saved


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _fresh(tensors: Sequence[Tensor], args: Sequence[Any]) -> list[Tensor]:
    """Contiguous, and no storage of an argument nor one storage twice, as torch.library demands."""
    taken = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
    result = []
    for tensor in tensors:
        tensor = tensor.contiguous()
        result.append(tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor)
        taken.add(result[-1].untyped_storage().data_ptr())
    return result


def register(op: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Define the op's torch.library ops with their fakes and autograd; return those for inference and for training.

    Args:
        op: a ``dispatch.Op``.
    """
    name = f"xclip_fast::{op.name}"
    schema = torch.library.infer_schema(op.reference, mutates_args=())
    arguments = schema[1 : schema.rindex(") -> ")]

    def fake(*args: Any) -> list[Tensor]:
        return [each.contiguous() for each in _as_tuple(op.reference(*args))]

    def forward(*args: Any) -> list[Tensor]:
        chosen = op.choose(args)
        plain = chosen.backward is None
        return _fresh(_as_tuple(chosen.forward(*args)) if plain else chosen.forward(False, *args)[0], args)

    registered = torch.library.custom_op(name, forward, mutates_args=(), schema=f"({arguments}) -> Tensor[]")
    registered.register_fake(fake)

    def forward_saving(*args: Any) -> list[Tensor]:
        outputs, saved = op.choose(args, training=True, kernels=True).forward(True, *args)
        return _fresh([*outputs, *saved], args)

    def fake_saving(*args: Any) -> list[Tensor]:
        return [*fake(*args), *op.saved(*args)]

    def kernel_backward(grads: list[Tensor], saved: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        chosen = op.choose(args, training=True, kernels=True)
        dtypes = [arg.dtype if need else None for arg, need in zip(args, needs, strict=True)]
        return _fresh(chosen.backward(grads, saved, dtypes, *args), [*args, *grads, *saved])

    def fake_backward(grads: list[Tensor], saved: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        return [
            torch.empty_like(arg, memory_format=torch.contiguous_format)
            for arg, need in zip(args, needs, strict=True)
            if need
        ]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        save(ctx, inputs, output[len(output) - len(op.saved(*inputs)) :])

    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        args, saved = restore(ctx)
        needs = list(ctx.needs_input_grad)
        given = [grad for grad in grads[: len(grads) - len(saved)] if grad is not None]
        result = iter(library_backward(given, list(saved), needs, *args))
        return tuple(next(result) if need else None for need in needs)

    library_saving = torch.library.custom_op(
        f"{name}_saving", forward_saving, mutates_args=(), schema=f"({arguments}) -> Tensor[]"
    )
    library_backward = torch.library.custom_op(
        f"{name}_backward",
        kernel_backward,
        mutates_args=(),
        schema=f"(Tensor[] grads, Tensor[] saved, bool[] needs, {arguments}) -> Tensor[]",
    )
    library_saving.register_fake(fake_saving)
    library_backward.register_fake(fake_backward)
    library_saving.register_autograd(backward, setup_context=setup)
    return registered, library_saving
