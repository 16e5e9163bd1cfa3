"""What is made of a weight once, as long as the weight stays as it is: LayerNorm folded in, a bias in another dtype."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")
_kept: Any = WeakTensorKeyDictionary()  # weight -> {what: (versions of all it was made of, the result)}


def kept(what: str, make: Callable[..., Made], *given: Tensor | None) -> Made:
    """``make(*given)``, or what it gave the last time if none of the tensors has changed since.

    Made anew where a change would not be noticed: while a CUDA graph is captured, whose replays see new weights, and
    for inference tensors, which have no version.
    """
    tensors = [tensor for tensor in given if tensor is not None]
    captured = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return make(*given)
    state = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)
    found = _kept.setdefault(tensors[0], {})
    if found.get(what, (None,))[0] != state:
        with torch.inference_mode(False), torch.no_grad():  # usable in a later training step
            found[what] = (state, make(*given))
    made: Made = found[what][1]
    return made


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``, cast once."""
    if tensor.dtype == dtype:
        return tensor
    return kept(str(dtype), lambda given: given.to(dtype), tensor)
