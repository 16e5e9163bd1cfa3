"""The attention part: every backend's call against float64. Libraries that need a GPU are played by stand-ins with the
signatures of the real ones, and torch's own run on meta tensors."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from xclip_fast.kernels.attention import ATTENTION, attention_reference, libraries
from xclip_fast.kernels.dispatch import INTERPRETED, support
from xclip_fast.kernels.dispatch.parts import Case, refusal

CANDIDATES = {candidate.name: candidate for candidate in ATTENTION.backends}


def kind(**more: Any) -> Case:
    given: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float16, "stream": torch.float16}
    given |= {"sequences": 2, "length": 5, "rows": 10, "heads": 3, "channels": 16, "width": 48, "hidden": 192}
    return Case(**{**given, **more})


def packed(length: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, 3, 3, 16, dtype=dtype)


def gradients(qkv: Tensor, dout: Tensor, causal: bool) -> Tensor:
    with torch.enable_grad():
        leaf = qkv.detach().clone().requires_grad_()
        return torch.autograd.grad(attention_reference(leaf, causal), leaf, dout.to(qkv.dtype))[0]


class Played:
    """A library's attention by torch. It keeps where what it was given lies."""

    def __init__(self) -> None:
        self.addresses: list[tuple[int, tuple[int, ...]]] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        self.addresses = [(x.data_ptr(), x.stride()) for x in (q, k, v)]
        return attention_reference(torch.stack([q, k, v], 2), causal), q.new_full((2, 3, q.shape[1]), 7.0)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, causal: bool) -> tuple[Tensor, ...]:
        assert (lse == 7).all()
        return gradients(torch.stack([q, k, v], 2), dout, causal).unbind(2)


def flash_attn_2(played: Played) -> dict[str, Any]:
    """flash-attn 2.8: flash_attn/flash_attn_interface.py."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, window_size_left, window_size_right, softcap) == (0.0, 0.25, -1, -1, 0.0)
        assert alibi_slopes is None
        assert return_softmax is False
        return *played.forward(q, k, v, causal), torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, window_size_left, window_size_right, softcap) == (0.0, 0.25, -1, -1, 0.0)
        for to, gradient in zip((dq, dk, dv), played.backward(dout, q, k, v, softmax_lse, causal), strict=True):
            to.copy_(gradient)
        return torch.empty(0)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash_attn_3(played: Played) -> dict[str, Any]:
    """hopper/flash_attn_interface.py; the arguments between that are not given have defaults there."""

    def _flash_attn_forward(q, k, v, k_new=None, v_new=None, softmax_scale=None, causal=False, num_splits=1):
        assert softmax_scale == 0.25
        return *played.forward(q, k, v, causal), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, dq=None, dk=None, dv=None, softmax_scale=None,
        is_causal=False, deterministic=False,
    ):  # fmt: skip
        assert softmax_scale == 0.25
        for to, gradient in zip((dq, dk, dv), played.backward(dout, q, k, v, softmax_lse, is_causal), strict=True):
            to.copy_(gradient)
        return torch.empty(0)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash_attn_4(played: Played) -> dict[str, Any]:
    """flash_attn/cute/interface.py."""

    def _flash_attn_fwd(q, k, v, cu_seqlens_q=None, softmax_scale=None, causal=False, return_lse=False, out=None):
        assert softmax_scale == 0.25
        out, lse = played.forward(q, k, v, causal)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, dq=None, dk=None, dv=None
    ):
        assert softmax_scale == 0.25
        for to, gradient in zip((dq, dk, dv), played.backward(dout, q, k, v, lse, causal), strict=True):
            to.copy_(gradient)
        return dq, dk, dv

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


def xformers(played: Played) -> dict[str, Any]:
    """xformers.ops (fmha/__init__.py)."""

    class LowerTriangularMask:
        pass

    def causal(attn_bias: Any) -> bool:
        assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
        return attn_bias is not None

    def memory_efficient_attention_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        return played.forward(query, key, value, causal(attn_bias))[0]

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        return played.forward(query, key, value, causal(attn_bias))

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        return played.backward(grad, query, key, value, lse, causal(attn_bias))

    return {name: value for name, value in locals().items() if name.startswith("memory_efficient")} | {
        "LowerTriangularMask": LowerTriangularMask
    }


LIBRARIES = {
    "flash_attn": (libraries.FLASH2.module, flash_attn_2),
    "flash_attn_3": (libraries.FLASH3.module, flash_attn_3),
    "flash_attn_4": (libraries.FLASH4.module, flash_attn_4),
    "xformers": ("xformers.ops", xformers),
}


def install(monkeypatch: pytest.MonkeyPatch, module: str, functions: dict[str, Any]) -> None:
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules[module]).update(functions)
    libraries.bind.cache_clear()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_a_library_is_called_as_its_interface_says(
    name: str, causal: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(libraries.bind.cache_clear)
    module, functions = LIBRARIES[name]
    played, candidate, qkv = Played(), CANDIDATES[name], packed()
    install(monkeypatch, module, functions(played))
    assert candidate.refuse is not None
    assert candidate.refuse(kind()) is None
    out, saved = candidate.forward(True, qkv, causal)
    # views of the packed projection, no copies
    assert played.addresses == [(qkv[:, :, part].data_ptr(), qkv[:, :, part].stride()) for part in range(3)]
    torch.testing.assert_close(out, attention_reference(qkv, causal))
    without, nothing = candidate.forward(False, qkv, causal)
    assert nothing == ()
    torch.testing.assert_close(without, out)
    dout = torch.randn_like(out)
    assert candidate.backward is not None
    dqkv, sums = candidate.backward(dout, qkv, out, saved, causal)
    assert sums is None
    torch.testing.assert_close(dqkv, gradients(qkv, dout, causal))


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_a_version_with_other_names_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(libraries.bind.cache_clear)
    module, functions = LIBRARIES[name]
    given = functions(Played())
    first = next(iter(given))
    install(monkeypatch, module, {**given, first: lambda x: x})
    refuse = CANDIDATES[name].refuse
    assert refuse is not None
    assert f"this version of {module} has no argument" in (refuse(kind()) or "")
    given.pop(first)
    install(monkeypatch, module, given)
    assert f"{module} does not load" in (refuse(kind()) or "")
    assert "multiple of 8" in (refuse(kind(channels=20)) or "")


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_torchs_backends_take_views_of_the_projection(name: str) -> None:
    """On meta tensors: the operators exist, with these arguments, and what they save is known beforehand."""
    candidate, qkv = CANDIDATES[name], torch.empty(2, 198, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    assert candidate.backward is not None
    assert candidate.saved is not None
    for causal in (False, True):
        out, saved = candidate.forward(True, qkv, causal)
        assert out.shape == (2, 198, 12, 64)
        assert [(each.shape, each.dtype) for each in saved] == [
            (each.shape, each.dtype) for each in candidate.saved(qkv)
        ]
        assert candidate.backward(torch.empty_like(out), qkv, out, saved, causal)[0].shape == qkv.shape


@pytest.mark.parametrize("length", [1, 3, 51, 64, 65, 198, 258, 578])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_our_kernel_and_torchs_products(length: int, dtype: torch.dtype) -> None:
    if not INTERPRETED:
        pytest.skip("Triton's interpreter is off: on a GPU the block's tests run the kernel")
    if length == 578 and dtype == torch.float32:
        pytest.skip("slow in the interpreter; its tiles are those of 258")
    qkv = packed(length)[:, :, :, : 2 if length < 100 else 1].to(dtype)
    exact = attention_reference(qkv.double())
    dout = torch.randn_like(qkv[:, :, 0])
    wanted = gradients(qkv.double(), dout, False)
    right = wanted.sum((0, 1)).flatten()
    errors: dict[str, tuple[float, ...]] = {}
    for name in ("reference", "triton"):
        candidate = CANDIDATES[name]
        assert candidate.backward is not None
        out, saved = candidate.forward(True, qkv, False)
        got, sums = candidate.backward(dout, qkv, out, saved, False)
        assert (sums is None) == (name == "reference")
        sums = (got if sums is None else sums).double().reshape(-1, right.numel()).sum(0)
        pairs = ((out, exact), (got / wanted.abs().max(), wanted / wanted.abs().max()), (sums, right))
        errors[name] = tuple(float((a - b).abs().max()) for a, b in pairs)
    for ours, torchs in zip(errors["triton"], errors["reference"], strict=True):
        assert ours <= 2 * torchs + 4 * torch.finfo(dtype).eps


def test_reasons_of_refusal() -> None:
    found = ATTENTION.refusals(kind(forced="xformers"))
    assert found == {"xformers": "the package xformers is not installed (pip install xformers)"}
    found = ATTENTION.refusals(kind(forced="auto"))
    assert found["flash_attn"] == "the package flash_attn is not installed (pip install flash-attn)"
    assert found["cudnn"] == "device cpu is not cuda"
    assert found["reference"] is None
    assert "dtype torch.float64" in (ATTENTION.refusals(kind(dtype=torch.float64))["flash"] or "")


def test_flash_attn_3_is_of_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are built for compute capability 9.0. Those of flash-attn 2 and 4 have no upper end."""
    monkeypatch.setattr(support, "installed", lambda package: True)
    monkeypatch.setattr(libraries, "unfit", lambda module, wanted: None)
    for architecture, reason in ((80, "8.x is below 9.0"), (90, None), (100, "10.x is above 9.x"), (120, "12.x")):
        case = kind(interpreted=architecture)
        found = refusal(CANDIDATES["flash_attn_3"], case)
        assert (found is None) if reason is None else (found is not None and reason in found), found
        assert refusal(CANDIDATES["flash_attn"], case) is None
        assert (refusal(CANDIDATES["flash_attn_4"], case) is None) == (architecture >= 90)
