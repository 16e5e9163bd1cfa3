"""Attention by torch's own backends, flash-attn (2, 3, 4) and xformers: their forward with the log-sum-exp, and their
backward, on strided views of a packed projection. No copies but what a library makes itself.

Their forward and backward are called apart, because the block around them has one backward of its own. So flash-attn's
inner functions are used; they are bound by name, and a version that has other names is refused with the reason.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch.parts import Case
from ..dispatch.support import HALF, UNMEASURED, Backend

Saved = tuple[Tensor, ...]
aten = torch.ops.aten


def heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values (F, H, S, C) of (F, S, 3, H, C), as views."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _packed(*gradients: Tensor) -> Tensor:
    """dq, dk, dv (F, H, S, C) as (F, S, 3, H, C)."""
    return torch.stack([gradient.transpose(1, 2) for gradient in gradients], 2)


def log_sum_exp(qkv: Tensor) -> tuple[Tensor]:
    """An empty log-sum-exp (F, H, S), float32: what most of them save beside their result."""
    count, length, _, heads, _ = qkv.shape
    return (qkv.new_empty(count, heads, length, dtype=torch.float32),)


# ---- torch


def _flash_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    out, lse, _, _, _, _, state, unused, _ = aten._scaled_dot_product_flash_attention(*heads_first(qkv), 0.0, causal)
    return out.transpose(1, 2), (lse, state, unused) if save else ()


def _flash_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Tensor:
    lse, *state = saved
    length, none = qkv.shape[1], None
    given = (dout.transpose(1, 2), *heads_first(qkv), out.transpose(1, 2), lse, none, none, length, length)
    return _packed(*aten._scaled_dot_product_flash_attention_backward(*given, 0.0, causal, *state))


def _cudnn_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        *heads_first(qkv), None, save, 0.0, causal
    )
    return out.transpose(1, 2), (lse, seed, offset) if save else ()


def _cudnn_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Tensor:
    length, none = qkv.shape[1], None
    given = (dout.transpose(1, 2), *heads_first(qkv), out.transpose(1, 2), *saved, none, none, none, length, length)
    return _packed(*aten._scaled_dot_product_cudnn_attention_backward(*given, 0.0, causal))


def _efficient_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(*heads_first(qkv), None, save, 0.0, causal)
    return out.transpose(1, 2), (lse, seed, offset) if save else ()


def _efficient_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Tensor:
    given = (dout.transpose(1, 2), *heads_first(qkv), None, out.transpose(1, 2), *saved)
    wanted = [True, True, True, False]
    return _packed(*aten._scaled_dot_product_efficient_attention_backward(*given, 0.0, wanted, causal)[:3])


def _refuse_sdpa(usable: str) -> Callable[[Case], str | None]:
    def refuse(case: Case) -> str | None:
        """Torch's own answer, asked once a kind of call with tensors of its sizes."""
        if case.traced or case.interpreted > 1:  # sizes may be symbols, and what is taken must not depend on them
            return None if case.channels % 8 == 0 and case.channels <= 256 else f"head size {case.channels}"
        shape = (case.sequences, case.length, 3, case.heads, case.channels)
        qkv = torch.empty(shape, dtype=case.dtype, device=case.device, requires_grad=case.training)
        params = torch.backends.cuda.SDPAParams(*heads_first(qkv), None, 0.0, case.causal, False)
        if getattr(torch.backends.cuda, usable)(params, False):
            return None
        return f"torch.backends.cuda.{usable} says no"

    return refuse


def _sdpa(name: str, forward: Any, backward: Any, capability: int, *more: torch.dtype) -> Backend:
    return Backend(
        name,
        forward,
        backward,
        dtypes=(*HALF, *more),
        device_types=("cuda",),
        capability=capability,
        refuse=_refuse_sdpa(f"can_use_{name}_attention"),
        saved=lambda qkv: forward(True, qkv, False)[1],
    )


CUDNN = _sdpa("cudnn", _cudnn_forward, _cudnn_backward, 9)
FLASH = _sdpa("flash", _flash_forward, _flash_backward, 8)
EFFICIENT = _sdpa("efficient", _efficient_forward, _efficient_backward, 0, torch.float32)


# ---- flash-attn and xformers


def _views(qkv: Tensor) -> dict[str, Tensor]:
    return {"q": qkv[:, :, 0], "k": qkv[:, :, 1], "v": qkv[:, :, 2]}


def _gradients(qkv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """An empty dqkv (F, S, 3, H, C) and its views dq, dk, dv, into which flash-attn writes."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return dqkv, {f"d{name}": view for name, view in _views(dqkv).items()}


@functools.cache
def bind(module: str, *names: str) -> tuple[Any, ...]:
    """The functions ``names`` of ``module``."""
    loaded = importlib.import_module(module)
    return tuple(getattr(loaded, name) for name in names)


def unfit(module: str, wanted: dict[str, tuple[str, ...]]) -> str | None:
    """Why the functions of an installed module cannot be called with these arguments, or None."""
    try:
        functions = bind(module, *wanted)
    except (ImportError, AttributeError, OSError) as error:
        return f"{module} does not load: {error}"
    for function, arguments in zip(functions, wanted.values(), strict=True):
        # a registered custom op has the signature of the function it was made of
        parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
        if missing := [name for name in arguments if name not in parameters]:
            return f"this version of {module} has no argument {', '.join(missing)}"
    return None


_FLASH2, _FLASH3, _FLASH4 = "flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute.interface"
_FORWARD, _BACKWARD = ("q", "k", "v", "softmax_scale", "causal"), ("dout", "q", "k", "v", "out", "softmax_scale")
_WANTED: dict[str, dict[str, tuple[str, ...]]] = {
    _FLASH2: {
        "_flash_attn_forward": (*_FORWARD, "window_size_left", "alibi_slopes", "return_softmax"),
        "_flash_attn_backward": (*_BACKWARD, "causal", "softmax_lse", "dq", "dk", "dv", "window_size_left"),
    },
    _FLASH3: {
        "_flash_attn_forward": _FORWARD,
        "_flash_attn_backward": (*_BACKWARD, "is_causal", "softmax_lse", "dq", "dk", "dv"),
    },
    _FLASH4: {
        "_flash_attn_fwd": (*_FORWARD, "return_lse"),
        "_flash_attn_bwd": (*_BACKWARD, "lse", "causal", "dq", "dk", "dv"),
    },
    "xformers.ops": {
        "memory_efficient_attention_forward": ("query", "key", "value", "attn_bias"),
        "memory_efficient_attention_forward_requires_grad": ("query", "key", "value", "attn_bias"),
        "memory_efficient_attention_backward": ("grad", "output", "lse", "query", "key", "value", "attn_bias"),
    },
}


def _refuse_module(module: str) -> Callable[[Case], str | None]:
    def refuse(case: Case) -> str | None:
        if case.channels % 8 or case.channels > 256:
            return f"head size {case.channels} is not a multiple of 8 up to 256"
        return unfit(module, _WANTED[module])

    return refuse


def _flash2_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    (forward, _) = bind(_FLASH2, *_WANTED[_FLASH2])
    options = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False, "causal": causal}
    window = {"window_size_left": -1, "window_size_right": -1}
    out, lse, *_ = forward(**_views(qkv), softmax_scale=qkv.shape[-1] ** -0.5, **options, **window)
    return out, (lse,) if save else ()


def _flash2_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Tensor:
    (_, backward) = bind(_FLASH2, *_WANTED[_FLASH2])
    dqkv, gradients = _gradients(qkv)
    options = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "causal": causal}
    window = {"window_size_left": -1, "window_size_right": -1, "softmax_scale": qkv.shape[-1] ** -0.5}
    backward(dout=dout, **_views(qkv), out=out, softmax_lse=saved[0], **gradients, **options, **window)
    return dqkv


def _flash3_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    (forward, _) = bind(_FLASH3, *_WANTED[_FLASH3])
    out, lse, *_ = forward(**_views(qkv), softmax_scale=qkv.shape[-1] ** -0.5, causal=causal)
    return out, (lse,) if save else ()


def _flash3_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Tensor:
    (_, backward) = bind(_FLASH3, *_WANTED[_FLASH3])
    dqkv, gradients = _gradients(qkv)
    options = {"softmax_scale": qkv.shape[-1] ** -0.5, "is_causal": causal}
    backward(dout=dout, **_views(qkv), out=out, softmax_lse=saved[0], **gradients, **options)
    return dqkv


def _flash4_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    (forward, _) = bind(_FLASH4, *_WANTED[_FLASH4])
    options = {"softmax_scale": qkv.shape[-1] ** -0.5, "causal": causal, "return_lse": save}
    out, lse, *_ = forward(**_views(qkv), **options)
    return out, (lse,) if save else ()


def _flash4_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Tensor:
    (_, backward) = bind(_FLASH4, *_WANTED[_FLASH4])
    dqkv, gradients = _gradients(qkv)
    options = {"softmax_scale": qkv.shape[-1] ** -0.5, "causal": causal}
    backward(**_views(qkv), out=out, dout=dout, lse=saved[0], **gradients, **options)
    return dqkv


def _mask(causal: bool) -> Any:
    if not causal:
        return None
    (lower,) = bind("xformers.ops", "LowerTriangularMask")
    return lower()


def _xformers_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    forward, forward_saving, _ = bind("xformers.ops", *_WANTED["xformers.ops"])
    given = dict(zip(("query", "key", "value"), _views(qkv).values(), strict=True))
    if not save:
        return forward(**given, attn_bias=_mask(causal)), ()
    out, lse = forward_saving(**given, attn_bias=_mask(causal))
    return out, (lse,)


def _xformers_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Tensor:
    (*_, backward) = bind("xformers.ops", *_WANTED["xformers.ops"])
    given = dict(zip(("query", "key", "value"), _views(qkv).values(), strict=True))
    gradients = backward(grad=dout, output=out, lse=saved[0], **given, attn_bias=_mask(causal))
    return torch.stack(list(gradients[:3]), 2)


def _library(
    name: str, package: str, module: str, forward: Any, backward: Any, capability: int, install: str = ""
) -> Backend:
    return Backend(
        name,
        forward,
        backward,
        dtypes=HALF,
        device_types=("cuda",),
        capability=capability,
        package=package,
        install=install,
        opt_in=UNMEASURED,
        refuse=_refuse_module(module),
        saved=None if package == "xformers" else log_sum_exp,  # its kernels pad differently
    )


FLASH_ATTN = _library(
    "flash_attn", "flash_attn", _FLASH2, _flash2_forward, _flash2_backward, 8, "pip install flash-attn"
)
FLASH_ATTN_3 = _library(
    "flash_attn_3",
    "flash_attn_interface",
    _FLASH3,
    _flash3_forward,
    _flash3_backward,
    9,
    "pip install ./hopper in a clone of Dao-AILab/flash-attention",
)
FLASH_ATTN_4 = _library(
    "flash_attn_4", "flash_attn.cute", _FLASH4, _flash4_forward, _flash4_backward, 9, "pip install flash-attn-4"
)
XFORMERS = _library("xformers", "xformers", "xformers.ops", _xformers_forward, _xformers_backward, 8)
