"""What is made of a weight once, as long as the weight stays as it is: LayerNorm folded in, a bias in another dtype."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = TypeVar("Made")
changes = [0]  # of weights that raise no version: steps of all optimizers in this process, and what a user tells


def _count_step(*_: Any) -> None:
    if not torch.compiler.is_compiling():  # a traced step writes through torch, which raises version counters
        changes[0] += 1


# Fused optimizers change weights without raising their version counters. Every torch.optim.Optimizer calls this hook.
register_optimizer_step_post_hook(_count_step)

# id of a weight -> (the weight, {what: (versions of all it was made of, the result)})
_kept: dict[int, tuple[Any, dict[str, tuple[list[Any], Any]]]] = {}


def kept(what: str, make: Callable[..., Made], weight: Tensor, *more: Tensor) -> Made:
    """``make(weight, *more)``, or what it gave the last time if none of the tensors has changed since, no
    optimizer has made a step and nobody has called ``TextEncoder.forget``.

    Made anew where a change would not be noticed: while a CUDA graph is captured, whose replays see new weights, and
    for inference tensors, which have no version.
    """
    if torch.compiler.is_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make(weight, *more)
    try:
        state = [changes[0], *((each.data_ptr(), each._version, each.dtype) for each in (weight, *more))]
    except RuntimeError:  # an inference tensor has no version
        return make(weight, *more)
    number = id(weight)
    owner, found = _kept.get(number, (None, {}))
    if owner is None or owner() is not weight:
        owner, found = _kept[number] = weakref.ref(weight, lambda _: _kept.pop(number, None)), {}
    before = found.get(what)
    if before is None or before[0] != state:
        with torch.inference_mode(False), torch.no_grad():  # usable in a later training step
            before = found[what] = state, make(weight, *more)
    made: Made = before[1]
    return made


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``, cast once."""
    if tensor.dtype == dtype:
        return tensor
    return kept(str(dtype), lambda given: given.to(dtype), tensor)
