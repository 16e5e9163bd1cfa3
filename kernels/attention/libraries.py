"""Attention by torch's own backends, flash-attn (2, 3, 4) and xformers: their forward with the log-sum-exp, and their
backward, on strided views of a packed projection. No copies but what a library makes itself.

Their forward and backward are called apart, because the block around them has one backward of its own. So flash-attn's
inner functions are used; they are bound by name, and a version that has other names is refused with the reason.
"""

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch.parts import Case
from ..dispatch.support import HALF, UNMEASURED, Backend

Saved = tuple[Tensor, ...]
Found = tuple[Tensor, None]  # dqkv, and no sums of its rows
aten = torch.ops.aten


def heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values (F, H, S, C) of (F, S, 3, H, C), as views."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _packed(*gradients: Tensor) -> Found:
    """What backward returns, of dq, dk, dv (F, H, S, C)."""
    return torch.stack([gradient.transpose(1, 2) for gradient in gradients], 2), None


def log_sum_exp(qkv: Tensor) -> tuple[Tensor]:
    """An empty log-sum-exp (F, H, S), float32: what most of them save beside their result."""
    count, length, _, heads, _ = qkv.shape
    return (qkv.new_empty(count, heads, length, dtype=torch.float32),)


# ---- torch


def _flash_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    out, lse, _, _, _, _, state, unused, _ = aten._scaled_dot_product_flash_attention(*heads_first(qkv), 0.0, causal)
    return out.transpose(1, 2), (lse, state, unused) if save else ()


def _flash_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Found:
    lse, *state = saved
    length, none = qkv.shape[1], None
    given = (dout.transpose(1, 2), *heads_first(qkv), out.transpose(1, 2), lse, none, none, length, length)
    return _packed(*aten._scaled_dot_product_flash_attention_backward(*given, 0.0, causal, *state))


def _cudnn_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        *heads_first(qkv), None, save, 0.0, causal
    )
    return out.transpose(1, 2), (lse, seed, offset) if save else ()


def _cudnn_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Found:
    length, none = qkv.shape[1], None
    given = (dout.transpose(1, 2), *heads_first(qkv), out.transpose(1, 2), *saved, none, none, none, length, length)
    return _packed(*aten._scaled_dot_product_cudnn_attention_backward(*given, 0.0, causal))


def _efficient_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(*heads_first(qkv), None, save, 0.0, causal)
    return out.transpose(1, 2), (lse, seed, offset) if save else ()


def _efficient_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Found:
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


def _refusing(module: str, wanted: dict[str, tuple[str, ...]]) -> Callable[[Case], str | None]:
    def refuse(case: Case) -> str | None:
        if case.channels % 8 or case.channels > 256:
            return f"head size {case.channels} is not a multiple of 8 up to 256"
        return unfit(module, wanted)

    return refuse


_NONE: Mapping[str, Any] = types.MappingProxyType({})


class _FlashAttn(NamedTuple):
    """A version of flash-attn: the functions below its autograd, and what only this version calls so."""

    module: str
    names: tuple[str, str]  # of forward and backward
    lse: str = "softmax_lse"  # arguments of backward: log-sum-exp and causal
    causal: str = "causal"
    options: Mapping[str, Any] = _NONE  # of both
    forward_options: Mapping[str, Any] = _NONE
    backward_options: Mapping[str, Any] = _NONE
    asks_lse: bool = False  # whether forward has an argument return_lse

    def wanted(self) -> dict[str, tuple[str, ...]]:
        """The arguments that the functions must have."""
        both = ("q", "k", "v", "softmax_scale", *self.options)
        forward = (*both, "causal", *self.forward_options, *(("return_lse",) if self.asks_lse else ()))
        backward = (*both, "dout", "out", self.lse, "dq", "dk", "dv", self.causal, *self.backward_options)
        return dict(zip(self.names, (forward, backward), strict=True))

    def forward(self, save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
        forward, _ = bind(self.module, *self.names)
        options = {**self.options, **self.forward_options, **({"return_lse": save} if self.asks_lse else {})}
        out, lse, *_ = forward(**_views(qkv), softmax_scale=qkv.shape[-1] ** -0.5, causal=causal, **options)
        return out, (lse,) if save else ()

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Found:
        _, backward = bind(self.module, *self.names)
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        gradients = {f"d{name}": view for name, view in _views(dqkv).items()}  # they are written
        options = {**self.options, **self.backward_options, self.lse: saved[0], self.causal: causal}
        backward(dout=dout, **_views(qkv), out=out, softmax_scale=qkv.shape[-1] ** -0.5, **gradients, **options)
        return dqkv, None

    def backend(self, name: str, package: str, install: str, **supported: Any) -> Backend:
        """Its backend. supported: fields that differ from the other libraries'."""
        refuse = _refusing(self.module, self.wanted())
        given = {**LIBRARY, "refuse": refuse, "saved": log_sum_exp, **supported}
        return Backend(name, self.forward, self.backward, package=package, install=install, **given)


LIBRARY: dict[str, Any] = {"dtypes": HALF, "device_types": ("cuda",), "capability": 8, "opt_in": UNMEASURED}
_NAMES = ("_flash_attn_forward", "_flash_attn_backward")
FLASH2 = _FlashAttn(
    "flash_attn.flash_attn_interface",
    _NAMES,
    options={"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "window_size_left": -1, "window_size_right": -1},
    forward_options={"return_softmax": False},
    backward_options={"deterministic": False},
)
FLASH3 = _FlashAttn("flash_attn_interface", _NAMES, causal="is_causal")
FLASH4 = _FlashAttn("flash_attn.cute.interface", ("_flash_attn_fwd", "_flash_attn_bwd"), lse="lse", asks_lse=True)
FLASH_ATTN = FLASH2.backend("flash_attn", "flash_attn", "pip install flash-attn")
FLASH_ATTN_3 = FLASH3.backend(
    "flash_attn_3",
    "flash_attn_interface",
    "pip install ./hopper in a clone of Dao-AILab/flash-attention",
    capability=9,
    last_capability=9,
)
FLASH_ATTN_4 = FLASH4.backend("flash_attn_4", "flash_attn.cute", "pip install flash-attn-4", capability=9)


_QKV = ("query", "key", "value", "attn_bias")
_XFORMERS: dict[str, tuple[str, ...]] = {
    "memory_efficient_attention_forward": _QKV,
    "memory_efficient_attention_forward_requires_grad": _QKV,
    "memory_efficient_attention_backward": ("grad", "output", "lse", *_QKV),
}


def _mask(causal: bool) -> Any:
    return bind("xformers.ops", "LowerTriangularMask")[0]() if causal else None


def _xformers_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, Saved]:
    forward, forward_saving, _ = bind("xformers.ops", *_XFORMERS)
    given = dict(zip(("query", "key", "value"), _views(qkv).values(), strict=True))
    if not save:
        return forward(**given, attn_bias=_mask(causal)), ()
    out, lse = forward_saving(**given, attn_bias=_mask(causal))
    return out, (lse,)


def _xformers_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved, causal: bool) -> Found:
    (*_, backward) = bind("xformers.ops", *_XFORMERS)
    given = dict(zip(("query", "key", "value"), _views(qkv).values(), strict=True))
    gradients = backward(grad=dout, output=out, lse=saved[0], **given, attn_bias=_mask(causal))
    return torch.stack(list(gradients[:3]), 2), None


XFORMERS = Backend(
    "xformers",
    _xformers_forward,
    _xformers_backward,
    package="xformers",
    refuse=_refusing("xformers.ops", _XFORMERS),
    **LIBRARY,  # what its kernels save is not known beforehand: they pad differently
)
