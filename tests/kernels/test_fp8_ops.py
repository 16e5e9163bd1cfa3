"""The ops on float8 against arithmetic done another way, and the calls of their backends.

Strided, empty and half-precision input, opcheck and the comparison of the backends that run here are in test_ops.py.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from xclip_fast.kernels import cuda_library, fp8
from xclip_fast.kernels.common.example import FLOAT8
from xclip_fast.kernels.dispatch import INTERPRETED, OPS

from xclip_fast import kernels

WIDTH, EPS = 64, 1e-5
DEVICE = "cpu" if INTERPRETED else "cuda"
NUMBERS = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()  # all that e4m3 has
NUMBERS = NUMBERS[NUMBERS.isfinite()].unique()


def nearest(x: Tensor) -> Tensor:
    """x rounded to e4m3 by looking for the nearest number, ties to the even one (every second), float64."""
    magnitudes = NUMBERS[NUMBERS >= 0]
    x = x.double()
    distance = (x.abs()[..., None] - magnitudes).abs()
    odd = torch.arange(len(magnitudes)) % 2
    best = (distance == distance.amin(-1, keepdim=True)).double() * (2 - odd)
    return magnitudes[best.argmax(-1)] * x.sign()


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape) * scale


def linear8(out: int, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    return *kernels.quantize_weight(normal(out, width, scale=width**-0.5)), normal(out, scale=0.1)


def linear_arguments(rows: int = 33, out: int = 48) -> tuple[Any, ...]:
    return normal(rows, WIDTH), 1 + normal(WIDTH, scale=0.1), normal(WIDTH, scale=0.1), *linear8(out), EPS


def mlp_arguments(rows: int = 33, scale: float = 4.0 / 448) -> tuple[Any, ...]:
    x, gamma, beta, *_ = linear_arguments(rows)
    weight8, weight_scale, bias = linear8(WIDTH, 4 * WIDTH)
    return x, gamma, beta, *linear8(4 * WIDTH), weight8, weight_scale * scale, bias, scale, EPS


def low(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """x, the norm's parameters and the biases in bfloat16; float8 and scales as they are."""
    scales = {4} if len(args) == 7 else {4, 7}
    return tuple(
        arg.bfloat16() if isinstance(arg, Tensor) and arg.dtype != FLOAT8 and index not in scales else arg
        for index, arg in enumerate(args)
    )


# ---- quantizing


def test_saturating_rounds_to_the_nearest() -> None:
    x = torch.cat([torch.linspace(-500, 500, 4001), torch.logspace(-12, 9, 3001, 2), -torch.logspace(-12, 9, 3001, 2)])
    x = torch.cat([x, (NUMBERS[1:] + NUMBERS[:-1]).float() / 2, torch.tensor([0.0, 1e9, -torch.inf, torch.inf])])
    assert torch.equal(fp8.saturate(x).double().abs(), nearest(x.clamp(-448, 448)).abs())
    assert torch.equal(fp8.saturate(x).double().sign(), nearest(x.clamp(-448, 448)).sign())
    assert fp8.saturate(torch.tensor(torch.nan)).isnan()


def test_weights_have_a_scale_for_each_channel() -> None:
    weight = normal(20, WIDTH) * torch.logspace(-4, 4, 20)[:, None]
    weight[7] = 0
    weight8, scale = kernels.quantize_weight(weight.bfloat16())
    assert (weight8.dtype, scale.dtype, scale.shape) == (FLOAT8, torch.float32, (20,))
    largest = weight.bfloat16().float().abs().amax(1)
    torch.testing.assert_close(scale, torch.where(largest > 0, largest / 448, 1), rtol=0, atol=0)
    found = weight8.float().abs().amax(1)
    assert torch.equal(found, torch.where(torch.arange(20) == 7, 0.0, 448.0))
    error = (weight8.float() * scale[:, None] - weight.bfloat16().float()).abs()
    assert (error <= weight.abs() * 2**-4 + scale[:, None] * 2**-10 + 1e-30).all()  # half a step, or of the smallest


# ---- the references


def test_linear_is_its_formula() -> None:
    x, gamma, beta, weight8, weight_scale, bias, eps = args = linear_arguments()
    x[5] *= 1000
    x[6, 3] += 100
    y = F.layer_norm(x, (WIDTH,), gamma, beta, eps)
    scale = y.abs().amax(1, keepdim=True) / 448
    wanted = scale.double() * weight_scale.double() * (nearest(y / scale) @ weight8.double().T) + bias.double()
    got = kernels.ln_linear_fp8(*args)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    weight = weight8.float() * weight_scale[:, None]
    exact = F.linear(y, weight, bias)
    assert 1e-3 < (got - exact).norm() / exact.norm() < 4e-2  # it is float8, and no worse


@pytest.mark.parametrize("largest", [4.0, 0.3], ids=["fits", "saturates"])
def test_mlp_is_its_formula(largest: float) -> None:
    args = mlp_arguments(scale=largest / 448)
    x, gamma, beta, fc8, fc_scale, fc_bias, projection8, projection_scale, bias, hidden_scale, eps = args
    y = F.layer_norm(x, (WIDTH,), gamma, beta, eps)
    scale = y.abs().amax(1, keepdim=True) / 448
    u = scale.double() * fc_scale.double() * (nearest(y / scale) @ fc8.double().T) + fc_bias.double()
    hidden = (u * torch.sigmoid(1.702 * u)).float() / hidden_scale
    assert (hidden.max() > 448) == (largest < 1)
    product = nearest(hidden.clamp(-448, 448)) @ projection8.double().T
    wanted = x.double() + projection_scale.double() * product + bias.double()
    error = (kernels.mlp_fp8(*args).double() - wanted).abs()
    # a value of h between two numbers may round to the other one: few do
    assert error.median() < 1e-6
    assert error.max() < 0.02


def test_rows_of_zeros_and_nan_stay_alone() -> None:
    args = linear_arguments()
    x, _, beta, _, _, bias, _ = args
    beta.zero_()
    clean = kernels.ln_linear_fp8(*args)
    x[2] = 3.0  # LN gives zeros
    x[4, 0] = torch.nan
    got = kernels.ln_linear_fp8(*args)
    assert torch.equal(got[2], bias)
    assert got[4].isnan().all()
    others = [row for row in range(len(x)) if row not in (2, 4)]
    assert torch.equal(got[others], clean[others])
    poisoned = kernels.mlp_fp8(x, *mlp_arguments()[1:])
    assert poisoned[4].isnan().all()
    assert poisoned[others].isfinite().all()


def test_autocast_changes_nothing_in_the_reference() -> None:
    args = mlp_arguments()
    wanted = kernels.mlp_fp8(*args)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernels.mlp_fp8(*args)
    assert torch.equal(got, wanted)


# ---- refusals


def test_gradients_are_refused() -> None:
    for name, args in (("ln_linear_fp8", linear_arguments()), ("mlp_fp8", mlp_arguments())):
        x = args[0].requires_grad_()
        with pytest.raises(RuntimeError, match=rf"{name} is for inference only.*inference_mode"):
            getattr(kernels, name)(*args)
        with torch.no_grad():
            assert getattr(kernels, name)(*args).isfinite().all()
        (y,) = OPS[name].registered(*args)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            torch.autograd.grad(y.sum(), x)


def test_wrong_dtypes_are_refused() -> None:
    args = linear_arguments()
    with pytest.raises(TypeError, match=r"weight of dtype torch.float32 given; torch.float8_e4m3fn"):
        kernels.ln_linear_fp8(*args[:3], args[3].float(), *args[4:])
    with pytest.raises(TypeError, match=r"x of dtype torch.float8_e4m3fn given"):
        kernels.ln_linear_fp8(args[0].to(FLOAT8), *args[1:])
    args = mlp_arguments()
    with pytest.raises(TypeError, match=r"weight of dtype torch.bfloat16 given"):
        kernels.mlp_fp8(*args[:6], args[6].bfloat16(), *args[7:])


def reason(op: str, name: str, args: tuple[Any, ...]) -> str:
    return OPS[op].reasons(args).get(name) or ""


def test_reasons_of_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, mlp = low(linear_arguments()), low(mlp_arguments())
    assert OPS["mlp_fp8"].choose(mlp).name == "reference"
    assert reason("mlp_fp8", "cuda", mlp) == "device cpu is not cuda"
    monkeypatch.setattr(cuda_library, "refuse_device", lambda *_: None)
    assert reason("mlp_fp8", "cuda", mlp) == ""
    assert reason("ln_linear_fp8", "cuda", linear) == ""
    assert "float32 is not bfloat16" in reason("mlp_fp8", "cuda", mlp_arguments())
    narrow = low(linear_arguments(out=40))
    assert "(40, 64): both sizes must be multiples of 16" in reason("ln_linear_fp8", "cuda", narrow)


# ---- the backends


def close(got: Tensor, wanted: Tensor, limit: float) -> None:
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert got.shape == wanted.shape
    assert (got.float() - wanted.float()).norm() <= limit * wanted.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_pass_quantizes_as_torch_does(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from xclip_fast.kernels.layer_norm import triton as layer_norm

    x, gamma, beta = normal(33, 96).to(dtype), 1 + normal(96, scale=0.1), normal(96, scale=0.1)
    x[5] = 1.0  # with a bias of zeros, a row of zeros
    x, gamma = x.to(DEVICE), gamma.to(DEVICE)

    def same(got: Tensor, wanted: Tensor) -> None:
        assert got.dtype == wanted.dtype == FLOAT8
        wrong = (got.float() != wanted.float()).cpu()
        if INTERPRETED:  # Triton's interpreter halves what it rounds up to a power of two, and truncates subnormals
            magnitude = wanted.float().abs()
            wrong &= (magnitude.log2().frac() != 0) & (magnitude >= 2**-6)
        assert wrong.float().mean() < 1e-3  # next to a tie, sums in another order round elsewhere

    for shift in (beta.to(DEVICE), torch.zeros(96, device=DEVICE)):
        got, scale = layer_norm.layer_norm_fp8(x, gamma, shift, EPS)
        wanted, wanted_scale = fp8.normed_rows(x, gamma, shift, EPS)
        torch.testing.assert_close(scale, wanted_scale, rtol=1e-5, atol=0)
        same(got, wanted)
    assert scale[5] == 1


class Calls:
    """Plays the CUDA calls with torch, and holds the callers to what they say."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_library, "refuse_device", lambda *_: None)
        for name in ("fp8_linear", "fp8_linear_residual"):
            monkeypatch.setattr(cuda_library, name, getattr(self, name), raising=False)

    def product(self, x8: Tensor, w8: Tensor, w_scale: Tensor) -> Tensor:
        assert x8.dtype == w8.dtype == FLOAT8
        assert w_scale.dtype == torch.float32
        assert (x8.dim(), w8.shape[1], w_scale.shape) == (2, x8.shape[1], (len(w8),))
        return (x8.double() @ w8.double().T) * w_scale.double()

    def fp8_linear(
        self,
        x8: Tensor,
        x_scale: Tensor,
        w8: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        h_scale: float | None = None,
    ) -> Tensor:
        self.made.append("linear" if h_scale is None else "gelu")
        u = self.product(x8, w8, w_scale) * x_scale[:, None]
        u = u if bias is None else u + bias
        return u.bfloat16() if h_scale is None else fp8.saturate(u * torch.sigmoid(1.702 * u) / h_scale)

    def fp8_linear_residual(self, x8: Tensor, w8: Tensor, w_scale: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        self.made.append("residual")
        assert residual.shape == (len(x8), len(w8))
        assert residual.dtype == torch.bfloat16
        return (residual + self.product(x8, w8, w_scale) + bias).bfloat16()


def test_cuda_calls_compute_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    calls.stand_in(monkeypatch)
    linear, mlp = low(linear_arguments(34)), low(mlp_arguments(34))
    pairs = [("ln_linear_fp8", linear), ("ln_linear_fp8", (*linear[:5], None, EPS)), ("mlp_fp8", mlp)]
    for name, args in pairs:
        for x in (args[0], args[0].view(2, 17, WIDTH), torch.stack([args[0]] * 2, 1)[:, 0], args[0][:0]):
            given = (x, *args[1:])
            wanted = OPS[name].reference(*given)
            with kernels.backend("cuda"):
                close(OPS[name](*given), wanted, 4e-3)
                if x.dim() == 3 or not len(x):  # tracing takes a second
                    continue
                torch._dynamo.reset()
                traced = torch.compile(lambda *a, name=name: OPS[name](*a), fullgraph=True, backend="aot_eager")
                close(traced(*given), wanted, 4e-3)
    assert calls.made[:2] == ["linear"] * 2
    assert calls.made[-2:] == ["gelu", "residual"]


def test_traced_in_one_graph() -> None:
    for op, args in (("ln_linear_fp8", low(linear_arguments())), ("mlp_fp8", low(mlp_arguments()))):
        torch._dynamo.reset()
        traced = torch.compile(lambda *a, op=op: OPS[op](*a), fullgraph=True, backend="aot_eager")
        close(traced(*args), OPS[op](*args), 1e-3)


# ---- on a GPU, at the shapes of the model


def at(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in args)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(1, 768), (50, 768), (1576, 768), (12608, 768), (16448, 1024)])
def test_ops_on_a_gpu(rows: int, width: int) -> None:
    x = at((normal(rows, width).bfloat16(), 1 + normal(width, scale=0.1), normal(width, scale=0.1)))
    fc, projection = at(linear8(4 * width, width)), at(linear8(width, 4 * width))
    scale = 6.0 / 448
    mlp = (*x, *fc, projection[0], projection[1] * scale, projection[2], scale, EPS)
    for op, args in (("ln_linear_fp8", (*x, *at(linear8(3 * width, width)), EPS)), ("mlp_fp8", mlp)):
        with kernels.backend("cuda"):
            refused = reason(op, "cuda", args)
            if refused:
                pytest.skip(refused)
            close(OPS[op](*args), OPS[op].reference(*args), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(1, 768), (131, 768), (1576, 768), (16448, 1024)])
def test_cuda_calls_on_a_gpu(rows: int, width: int) -> None:
    refused = cuda_library.refuse_device("cuda", None)
    if refused:
        pytest.skip(refused)
    calls: Any = cuda_library
    played = Calls()
    x, gamma, beta = at((normal(rows, width).bfloat16(), 1 + normal(width, scale=0.1), normal(width, scale=0.1)))
    x8, scale = fp8.normed_rows(x, gamma, beta, EPS)
    w8, w_scale, bias = at(linear8(4 * width, width))
    n8, n_scale, n_bias = at(linear8(width, 4 * width))
    close(calls.fp8_linear(x8, scale, w8, w_scale, bias), played.fp8_linear(x8, scale, w8, w_scale, bias), 4e-3)
    hidden8 = calls.fp8_linear(x8, scale, w8, w_scale, bias, 6.0 / 448)
    wanted = played.fp8_linear(x8, scale, w8, w_scale, bias, 6.0 / 448)
    assert (hidden8.float() - wanted.float()).norm() < 2e-2 * wanted.float().norm()
    given = (hidden8, n8, n_scale * (6.0 / 448), n_bias, x)
    close(calls.fp8_linear_residual(*given), played.fp8_linear_residual(*given), 4e-3)
