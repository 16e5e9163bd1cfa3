"""Every op: its reference against independent torch, its other backends against the reference in float64,
torch.library's own checks, gradients, strided and empty input.

Triton's kernels run here in Triton's interpreter where there is no GPU (float32 and float16: it cannot do bfloat16).
"""

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from xclip_fast.kernels._dispatch import FLOAT8, INTERPRETED, OPS, Backend, BackendError, Op, _in_float32

from xclip_fast import kernels

WIDTH, HEADS, EPS = 128, 2, 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def norm_parameters(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return 1 + normal(width, scale=0.1), normal(width, scale=0.1)


def linear_parameters(out: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return normal(out, width, scale=width**-0.5), normal(out, scale=0.1)


def linear8(out: int, width: int = WIDTH, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in float8, its scale times ``scale``, and a bias."""
    weight, bias = linear_parameters(out, width)
    weight8, weight_scale = kernels.quantize_weight(weight)
    return weight8, scale * weight_scale.double(), bias


def mlp8_case(x: Tensor, largest: float) -> tuple[Any, ...]:
    """``largest``: the largest of quick_gelu that does not saturate."""
    scale = largest / 448
    return x, *norm_parameters(), *linear8(4 * WIDTH), *linear8(WIDTH, 4 * WIDTH, scale), scale, EPS


def packed_case(lengths: list[int]) -> tuple[Any, ...]:
    offsets = F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int()
    return normal(sum(lengths), 3, HEADS, 64), offsets, max(lengths, default=0)


def message_case(batch: int, frames: int, drop_scale: Tensor | None = None) -> tuple[Any, ...]:
    parameters = (
        *linear_parameters(WIDTH),
        *norm_parameters(),
        *linear_parameters(3 * WIDTH),
        *linear_parameters(WIDTH),
        *norm_parameters(),
        *linear_parameters(2 * WIDTH),
    )
    return normal(batch * frames, WIDTH), frames, *parameters, HEADS, EPS, drop_scale


def patch_case(frames: Tensor, patch: int = 8) -> tuple[Any, ...]:
    size = frames.shape[2]
    tokens = (size // patch) ** 2 + 1
    weight = normal(WIDTH, 3, patch, patch, scale=0.05)
    position = normal(tokens, WIDTH)
    return (
        frames,
        weight,
        normal(WIDTH),
        position,
        *norm_parameters(),
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
        EPS,
    )


def drop() -> Tensor:
    return torch.tensor([0.0, 1.25], dtype=torch.float64)


# op name, case name -> arguments in float64 (made inside the test, after seeding)
CASES: dict[tuple[str, str], Callable[[], tuple[Any, ...]]] = {
    ("layer_norm", "rows"): lambda: (normal(5, 7, WIDTH), *norm_parameters(), EPS),
    ("layer_norm", "outlier channels"): lambda: (
        normal(9, WIDTH) + 50 * F.one_hot(torch.tensor(3), WIDTH),
        *norm_parameters(),
        EPS,
    ),
    ("quick_gelu", "wide range"): lambda: (normal(33, 65, scale=4),),
    ("ln_linear", "plain"): lambda: (normal(3, 17, WIDTH), *norm_parameters(), *linear_parameters(96), EPS, False),
    ("ln_linear", "activation"): lambda: (normal(50, WIDTH), *norm_parameters(), *linear_parameters(96), EPS, True),
    ("ln_linear", "no bias"): lambda: (
        normal(50, WIDTH),
        *norm_parameters(),
        linear_parameters(96)[0],
        None,
        EPS,
        False,
    ),
    ("linear_residual", "plain"): lambda: (
        normal(4, 7, 96),
        *linear_parameters(WIDTH, 96),
        normal(4, 7, WIDTH),
        None,
        EPS,
        False,
    ),
    ("linear_residual", "drop path, statistics"): lambda: (
        normal(4, 7, 96),
        *linear_parameters(WIDTH, 96),
        normal(4, 7, WIDTH),
        drop(),
        EPS,
        True,
    ),
    ("mlp", "plain"): lambda: (
        normal(4, 7, WIDTH),
        *norm_parameters(),
        *linear_parameters(4 * WIDTH),
        *linear_parameters(WIDTH, 4 * WIDTH),
        EPS,
        None,
    ),
    ("mlp", "drop path"): lambda: (
        normal(4, 7, WIDTH),
        *norm_parameters(),
        *linear_parameters(4 * WIDTH),
        *linear_parameters(WIDTH, 4 * WIDTH),
        EPS,
        drop(),
    ),
    ("ln_linear_fp8", "plain"): lambda: (normal(3, 17, WIDTH), *norm_parameters(), *linear8(96), EPS),
    ("ln_linear_fp8", "outlier channels, no bias"): lambda: (
        normal(50, WIDTH) + 50 * F.one_hot(torch.tensor(3), WIDTH),
        *norm_parameters(),
        *linear8(96)[:2],
        None,
        EPS,
    ),
    ("mlp_fp8", "plain"): lambda: mlp8_case(normal(4, 7, WIDTH), 6.0),
    ("mlp_fp8", "saturates"): lambda: mlp8_case(normal(50, WIDTH), 0.5),
    ("cosine_logits", "three videos"): lambda: (normal(3, 64), normal(3, 11, 64), torch.tensor(2.3).double()),
    ("patch_embed", "uint8"): lambda: patch_case(torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8)),
    ("patch_embed", "float"): lambda: patch_case(normal(3, 3, 24, 24)),
    **{
        ("diffusion_attention", f"L={length}"): lambda length=length, frames=frames: (
            normal(frames, length, 3, HEADS, 64),
            normal(frames, 2, HEADS, 64),
        )
        for length, frames in ((1, 3), (2, 3), (50, 3), (197, 1), (257, 1), (577, 1))
    },
    ("diffusion_attention", "head size 80"): lambda: (normal(2, 17, 3, HEADS, 80), normal(2, 2, HEADS, 80)),
    **{("message_kv", f"T={frames}"): lambda frames=frames: message_case(2, frames) for frames in (1, 3, 5, 64)},
    ("message_kv", "drop path"): lambda: message_case(2, 3, drop()),
    ("causal_attention_packed", "unequal"): lambda: packed_case([3, 1, 12, 5, 5]),
    ("causal_attention_packed", "one label"): lambda: packed_case([77]),
}
EMPTY: dict[str, Callable[[], tuple[Any, ...]]] = {
    "layer_norm": lambda: (normal(0, WIDTH), *norm_parameters(), EPS),
    "quick_gelu": lambda: (normal(0, 4),),
    "ln_linear": lambda: (normal(0, 5, WIDTH), *norm_parameters(), *linear_parameters(96), EPS, True),
    "linear_residual": lambda: (normal(0, 96), *linear_parameters(WIDTH, 96), normal(0, WIDTH), None, EPS, True),
    "mlp": lambda: (
        normal(0, 7, WIDTH),
        *norm_parameters(),
        *linear_parameters(256),
        *linear_parameters(WIDTH, 256),
        EPS,
        None,
    ),
    "ln_linear_fp8": lambda: (normal(0, 5, WIDTH), *norm_parameters(), *linear8(96), EPS),
    "mlp_fp8": lambda: mlp8_case(normal(0, 7, WIDTH), 1.0),
    "diffusion_attention": lambda: (normal(0, 50, 3, HEADS, 64), normal(0, 2, HEADS, 64)),
    "message_kv": lambda: message_case(0, 3),
    "patch_embed": lambda: patch_case(torch.zeros(0, 24, 24, 3, dtype=torch.uint8)),
    "cosine_logits": lambda: (normal(0, 64), normal(0, 5, 64), torch.tensor(1.0).double()),
    "causal_attention_packed": lambda: packed_case([]),
}


def cast(args: tuple[Any, ...], dtype: torch.dtype, grad: bool = False) -> tuple[Any, ...]:
    grad = grad and not any(isinstance(arg, Tensor) and arg.dtype == FLOAT8 for arg in args)  # for inference only

    def one(arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        arg = arg.detach().to(DEVICE)
        if arg.dtype == FLOAT8:
            return arg
        # a drop path factor has no gradient
        return arg.to(dtype).requires_grad_(grad and arg.shape != (2,)) if arg.is_floating_point() else arg

    return tuple(one(arg) for arg in args)


def run(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, then the gradient of every floating input, for a fixed random cotangent."""
    args = cast(args, args[1].dtype if args[0].dtype == torch.uint8 else args[0].dtype, grad=True)
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    kept = [index for index, out in enumerate(outputs) if out.requires_grad]
    grads: Any = ()
    if inputs:
        grads = torch.autograd.grad(
            [outputs[index] for index in kept], inputs, [cotangents[index] for index in kept], allow_unused=True
        )
    return [*(out.detach() for out in outputs), *(torch.zeros(0) if grad is None else grad for grad in grads)]


def error(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in exact]
    return [
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1)) if b.numel() else 0.0
        for a, b in zip(got, exact, strict=True)
    ]


def usable(op: Op, args: tuple[Any, ...]) -> list[str]:
    """The backends that take these arguments here."""
    names = []
    for candidate in op.backends:
        low = torch.bfloat16 in {getattr(arg, "dtype", None) for arg in args}
        garbage = candidate.name == "triton" and INTERPRETED and low
        with kernels.backend(candidate.name):
            if not garbage and candidate.refusal(args) is None:
                names.append(candidate.name)
    return names


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN inside."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backends_match_the_float64_reference(case: tuple[str, str], dtype: torch.dtype) -> None:
    op, args = OPS[case[0]], CASES[case]()
    rounded = cast(args, dtype)
    exact = run(op.reference, cast(rounded, torch.float64))
    baseline = error(run(op.reference, rounded), exact)
    assert max(baseline) < {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 2e-2}[dtype]
    for name in usable(op, rounded):
        with kernels.backend(name), poisoned_memory():
            result = run(op, rounded)
        for index, (got, limit) in enumerate(zip(error(result, exact), baseline, strict=True)):
            assert got <= 2 * limit + 4 * torch.finfo(dtype).eps, (name, case, index)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_registered_op_differentiates_like_the_reference(case: tuple[str, str]) -> None:
    op, args = OPS[case[0]], CASES[case]()
    for got, wanted in zip(run(op.registered, args), run(op.reference, args), strict=True):
        if wanted.numel():  # an input without influence has no gradient in one and zeros in the other
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, check_dtype=False)


FIRST_CASES = {name: case for name, case in reversed(CASES)}


@pytest.mark.parametrize("name", sorted(FIRST_CASES))
def test_opcheck(name: str) -> None:
    args = cast(CASES[name, FIRST_CASES[name]](), torch.float32, grad=True)
    checks: tuple[str, ...] = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not OPS[name].differentiable:
        checks = checks[1:]  # the first cannot compare float8 tensors
    torch.library.opcheck(OPS[name].registered, args, test_utils=(*checks, "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("name", sorted(FIRST_CASES))
def test_opcheck_with_kernels(name: str) -> None:
    op, args = OPS[name], cast(CASES[name, FIRST_CASES[name]](), torch.float32, grad=True)
    if "triton" not in usable(op, args):
        pytest.skip(f"no triton kernel of {name} here")
    with kernels.backend("triton"):
        torch.library.opcheck(op.registered_saving, args)


@pytest.mark.parametrize("name", sorted(FIRST_CASES))
def test_kernels_are_traced_through_their_registered_ops(name: str) -> None:
    op, args = OPS[name], cast(CASES[name, FIRST_CASES[name]](), torch.float32)
    if "triton" not in usable(op, args):
        pytest.skip(f"no triton kernel of {name} takes these arguments here")
    torch._dynamo.reset()
    with kernels.backend("triton"):
        traced = torch.compile(lambda *given: op(*given), fullgraph=True, backend="aot_eager", dynamic=False)
        for got, wanted in zip(run(traced, args), run(op, args), strict=True):
            if wanted.numel():
                torch.testing.assert_close(got, wanted)


def test_every_op_has_cases() -> None:
    assert {name for name, _ in CASES} == set(OPS) == set(EMPTY)


@pytest.mark.parametrize("name", sorted(EMPTY))
def test_empty_batch(name: str) -> None:
    args = EMPTY[name]()
    for function in (OPS[name], OPS[name].registered):
        result = run(function, args)
        assert all(tensor.isfinite().all() for tensor in result)
        assert result[0].shape[0] == 0


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_strided_input_gives_the_same(case: tuple[str, str]) -> None:
    args = cast(CASES[case](), torch.float32)

    def strided(arg: Any) -> Any:
        if not isinstance(arg, Tensor) or arg.dim() < 2:
            return arg
        return torch.stack([arg, arg], dim=-1)[..., 0]

    for got, wanted in zip(
        run(OPS[case[0]], tuple(strided(arg) for arg in args)), run(OPS[case[0]], args), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the architecture itself decides")
@pytest.mark.parametrize(
    "case", [("ln_linear", "activation"), ("linear_residual", "drop path, statistics"), ("mlp", "plain")]
)
def test_tensor_descriptors_give_the_same_as_pointers(case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of sm_90: the GEMM loads and stores its tiles through descriptors."""
    gemm = pytest.importorskip("xclip_fast.kernels.triton.gemm", reason="triton is not installed (pip install triton)")
    op, args = OPS[case[0]], cast(CASES[case](), torch.float16)
    with kernels.backend("triton"):
        pointers = run(op, args)
        monkeypatch.setattr(gemm, "arch", lambda device: 90)
        launched = []
        launch = gemm.launch
        monkeypatch.setattr(gemm, "launch", lambda *a, **options: launched.append(options) or launch(*a, **options))
        descriptors = run(op, args)
    assert any(options.get("LOAD_DESCRIPTORS") for options in launched)
    for got, wanted in zip(descriptors, pointers, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["rows", "outlier channels"])
def test_folded_layer_norm_is_as_exact(name: str) -> None:
    """What large M takes: LayerNorm in the GEMM's epilogue, with an outlier channel that raw x does not hide."""
    launching = pytest.importorskip("xclip_fast.kernels.triton._launch", reason="triton is not installed")
    op, x = OPS["ln_linear"], CASES["layer_norm", name]()[0].reshape(-1, WIDTH)
    args = cast((x, *norm_parameters(), *linear_parameters(96), EPS, True), torch.float16)
    exact = run(op.reference, cast(args, torch.float64))
    baseline = error(run(op.reference, args), exact)
    with kernels.backend("triton"), launching.forced_tile("ln_linear", {"FOLD": True}), poisoned_memory():
        folded = error(run(op, args), exact)
    for got, limit in zip(folded, baseline, strict=True):
        assert got <= 2 * limit + 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    "case", [("ln_linear", "activation"), ("linear_residual", "drop path, statistics"), ("mlp", "plain")]
)
def test_kernels_keep_a_float32_residual_under_autocast(case: tuple[str, str]) -> None:
    op, args = OPS[case[0]], cast(CASES[case](), torch.float32)
    if "triton" not in usable(op, args):
        pytest.skip("triton is not installed (pip install triton)")
    low = torch.float16  # the interpreter has no bfloat16
    with torch.autocast(DEVICE, low):
        with kernels.backend("reference"):
            wanted = run(op, args)
        with kernels.backend("triton"):
            got = run(op, args)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).double().norm() <= 1e-2 * b.double().norm().clamp(min=1)


# ---- references against independent torch


def test_diffusion_attention_is_attention_over_the_concatenated_sequence() -> None:
    qkv, message = normal(2, 6, 3, HEADS, 64), normal(2, 2, HEADS, 64)
    query, key, value = (
        torch.cat([qkv[:, :, i], extra[:, None]], 1)
        for i, extra in enumerate((torch.zeros_like(message[:, 0]), message[:, 0], message[:, 1]))
    )
    scores = torch.einsum("flhc,fmhc->fhlm", query, key) / math.sqrt(64)
    wanted = torch.einsum("fhlm,fmhc->flhc", scores.softmax(-1), value)[:, :6]
    torch.testing.assert_close(kernels.diffusion_attention(qkv, message), wanted)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float64])
def test_patch_embed_is_a_convolution_of_normalised_frames(kind: torch.dtype) -> None:
    levels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    args = patch_case(levels)
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in args[6:8])
    pixels = ((levels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    patches = F.conv2d(pixels, args[1], stride=8).flatten(2).transpose(1, 2)
    tokens = torch.cat([args[2].expand(2, 1, -1), patches], 1) + args[3]
    wanted = F.layer_norm(tokens, (WIDTH,), args[4], args[5], EPS)
    frames = levels if kind == torch.uint8 else pixels
    torch.testing.assert_close(kernels.patch_embed(frames, *args[1:]), wanted)


def test_causal_attention_packed_is_each_label_alone() -> None:
    qkv, offsets, longest = packed_case([3, 1, 7])
    got = kernels.causal_attention_packed(qkv, offsets, longest)
    for start, end in itertools.pairwise(offsets):
        query, key, value = qkv[start:end].permute(1, 2, 0, 3)
        wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1)
        torch.testing.assert_close(got[start:end], wanted)


def test_cosine_logits_is_scaled_cosine_similarity() -> None:
    video, text = normal(3, 64), normal(3, 5, 64)
    wanted = 10 * F.cosine_similarity(video[:, None], text, dim=-1)
    torch.testing.assert_close(kernels.cosine_logits(video, text, torch.tensor(10.0).double().log()), wanted)


def test_linear_residual_statistics_normalise_the_result() -> None:
    args = CASES["linear_residual", "plain"]()[:4]
    y, mean, rstd = kernels.linear_residual_statistics(*args)
    torch.testing.assert_close(y, kernels.linear_residual(*args))
    wanted = F.layer_norm(y, (WIDTH,), eps=EPS)
    torch.testing.assert_close((y - mean[..., None]) * rstd[..., None], wanted, rtol=1e-5, atol=1e-5)


def test_drop_path_acts_on_whole_samples() -> None:
    x, weight, bias, residual = CASES["linear_residual", "plain"]()[:4]
    scale = torch.tensor([0.0, 2.0], dtype=torch.float64)
    y = kernels.linear_residual(x, weight, bias, residual, scale)
    torch.testing.assert_close(y[:2], residual[:2])
    torch.testing.assert_close(y[2:], residual[2:] + 2 * F.linear(x[2:], weight, bias))


def test_half_precision_linear_rounds_once_on_cpu() -> None:
    x, (weight, bias) = normal(64, WIDTH).bfloat16(), (p.bfloat16() for p in linear_parameters(96))
    exact = F.linear(x.double(), weight.double(), bias.double())
    got = kernels.ln_linear(x, torch.ones(WIDTH).bfloat16(), torch.zeros(WIDTH).bfloat16(), weight, bias)
    assert got.dtype == torch.bfloat16
    from xclip_fast.kernels._linear import linear

    assert (linear(x, weight, bias).double() - exact).abs().max() <= exact.abs().max() * 2**-8


# ---- the dispatcher


def test_backend_is_forced_and_restored() -> None:
    op, args = OPS["diffusion_attention"], CASES["diffusion_attention", "L=50"]()
    assert op.choose(args).name == "sdpa"
    with kernels.backend("reference"):
        assert op.choose(args).name == "reference"
        with pytest.raises(BackendError), kernels.backend("auto"):
            op(args[0].to(torch.complex64), args[1])
        assert op.choose(args).name == "reference"
    assert op.choose(args).name == "sdpa"


def test_forced_backend_that_an_op_lacks_leaves_the_choice_automatic() -> None:
    with kernels.backend("sdpa"):
        assert OPS["quick_gelu"].choose((normal(3),)).name == "reference"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tpu'.*auto, reference, triton"), kernels.backend("tpu"):
        pass


def test_environment_variable_is_checked() -> None:
    for value, wanted in (
        ("reference", "reference"),
        ("auto", "auto"),
        ("nonsense", "no backend is called 'nonsense'"),
    ):
        code = (
            "import torch; from xclip_fast import kernels; from xclip_fast.kernels import _dispatch;"
            "kernels.quick_gelu(torch.ones(2)); print(_dispatch._forced)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "XCLIP_FAST_BACKEND": value},
            capture_output=True,
            text=True,
            check=False,
        )
        assert wanted in done.stdout + done.stderr


def test_float32_products_are_left_to_the_library_but_not_under_autocast() -> None:
    args = cast(CASES["ln_linear", "plain"](), torch.float32)
    assert _in_float32(args)
    assert not _in_float32((args[0], *cast(args[1:], torch.float16)))  # a float32 residual stream
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not _in_float32(args)


def test_refusals_carry_every_reason() -> None:
    def double_reference(x: Tensor) -> Tensor:
        return x * 2

    op = Op(
        double_reference,
        Backend("cuda", double_reference, device_types=("cuda",)),
        Backend("triton", double_reference, dtypes=(torch.float16,)),
        Backend("xformers", double_reference, refuse=lambda x: "only on Sundays"),
    )
    del OPS["double"]
    x = torch.ones(3)
    assert op.choose((x,)).name == "reference"
    for name, reason in (("cuda", "cpu is not cuda"), ("triton", "float32 is not among"), ("xformers", "Sundays")):
        with kernels.backend(name), pytest.raises(BackendError, match=reason):
            op(x)
    with pytest.raises(BackendError, match=r"reference: dtype torch.complex64"):
        op(x.to(torch.complex64))


def test_a_kernel_is_traced_as_its_registered_op() -> None:
    def triple_reference(x: Tensor) -> Tensor:
        return x * 3

    calls = []

    def forward(save: bool, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        calls.append(save)
        return (x * 3,), (x.sum(),) if save else ()

    def backward(grads: list[Tensor], saved: list[Tensor], needs: list[bool], x: Tensor) -> list[Tensor]:
        assert torch.equal(saved[0], x.sum())
        return [grads[0] * 3]

    op = Op(triple_reference, Backend("triton", forward, backward), saved=lambda x: (x.new_empty(()),))
    del OPS["triple"]
    graphs = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    x = torch.ones(4, requires_grad=True)
    for grad in (True, False):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            y = torch.compile(lambda x: op(x), fullgraph=True, backend=record)(x)
        assert torch.equal(y, x * 3)
        name = "xclip_fast.triple_saving" if grad else "xclip_fast.triple"
        assert any(name in str(node.target) for node in graphs[-1].graph.nodes)
        if grad:
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((4,), 3.0))
    assert calls == [True, False]
