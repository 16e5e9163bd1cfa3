"""quick_gelu and its slope inside kernels: exact but for quick_gelu of bfloat16 results, which goes by tanh."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
tl = triton.language

from xclip_fast.kernels.dispatch import INTERPRETED  # noqa: E402
from xclip_fast.kernels.triton.activation import quick_gelu_slope, quick_gelu_value  # noqa: E402


@triton.jit
def both_kernel(u_ptr, value_ptr, slope_ptr, TO: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    u = tl.load(u_ptr + at)
    tl.store(value_ptr + at, quick_gelu_value(u, TO))
    tl.store(slope_ptr + at, quick_gelu_slope(u))


@pytest.mark.parametrize("to", [tl.float32, tl.bfloat16], ids=str)
def test_values_and_slopes(to: object) -> None:
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("neither Triton's interpreter nor a GPU")
    u = torch.linspace(-30, 30, 512, device="cpu" if INTERPRETED else "cuda")
    value, slope = torch.full_like(u, float("nan")), torch.full_like(u, float("nan"))
    both_kernel[(1,)](u, value, slope, TO=to, SIZE=512)
    exact: Tensor = u.double().requires_grad_()
    wanted = exact * torch.sigmoid(1.702 * exact)
    (wanted_slope,) = torch.autograd.grad(wanted.sum(), exact)
    # the GPU's tanh: relative error 2^-11, so |u| 2^-12 in the value
    error = 2.0**-12 if to == tl.bfloat16 and not INTERPRETED else 0.0
    assert ((value - wanted).abs() <= u.abs() * error + 2e-6 * (1 + u.abs())).all()
    assert ((slope - wanted_slope).abs() <= 2e-6 * (1 + u.abs())).all()
