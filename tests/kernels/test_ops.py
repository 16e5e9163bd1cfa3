"""Every op: its reference against independent torch, its other backends against the reference in float64,
torch.library's own checks, gradients, strided and empty input.

Triton's kernels run here in Triton's interpreter where there is no GPU (float32 and float16: it cannot do bfloat16).
"""

import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from xclip_fast.kernels.cct_block import fused, products
from xclip_fast.kernels.cct_block.example import example
from xclip_fast.kernels.common import derived
from xclip_fast.kernels.common.example import TINY, Maker
from xclip_fast.kernels.dispatch import INTERPRETED, OPS, BackendError, Op
from xclip_fast.kernels.dispatch.support import Backend
from xclip_fast.kernels.linear import product

from xclip_fast import TextConfig, kernels
from xclip_fast.nn.text import TextEncoder

WIDTH, HEADS, EPS = 128, 2, 1e-5
PATCH_KERNELS = "xclip_fast.kernels.patch_embed.triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def norm_parameters(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return 1 + normal(width, scale=0.1), normal(width, scale=0.1)


def linear_parameters(out: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return normal(out, width, scale=width**-0.5), normal(out, scale=0.1)


def patch_case(frames: Tensor, patch: int = 8, spare: bool = True) -> tuple[Any, ...]:
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
        spare,
    )


def block_case(
    count: int = 0, length: int = 0, frames: int = 0, *, width: int = WIDTH, **given: Any
) -> tuple[Any, ...]:
    return tuple(example(count, length, width, frames, dtype=torch.float64, **given))


# op name, case name -> arguments in float64 (made inside the test, after seeding), beside each op's own example;
# most blocks have one head, which takes Triton's interpreter a third of the time of two
CASES: dict[tuple[str, str], Callable[[], tuple[Any, ...]]] = {
    ("layer_norm", "outlier channels"): lambda: (
        normal(9, WIDTH) + 50 * F.one_hot(torch.tensor(3), WIDTH),
        *norm_parameters(),
        EPS,
    ),
    ("quick_gelu", "wide range"): lambda: (normal(33, 65, scale=4),),
    ("cct_block", "message"): lambda: block_case(6, 6, 3),
    ("cct_block", "message, drop path"): lambda: block_case(4, 10, 2, drops=True),
    ("cct_block", "message, T=1, L=2"): lambda: block_case(2, 3, 1, width=64),
    ("cct_block", "message, T=5"): lambda: block_case(5, 4, 5, width=64),
    ("cct_block", "message, T=64"): lambda: block_case(64, 3, 64, width=64),
    ("cct_block", "message, width 80"): lambda: block_case(10, 3, 5, width=80, heads=5),
    ("cct_block", "message, L=50"): lambda: block_case(2, 51, 1, width=64),
    ("cct_block", "message, L=197"): lambda: block_case(1, 198, 1, width=64),
    ("cct_block", "message, class rows"): lambda: block_case(6, 6, 3, width=64, rows=torch.arange(0, 36, 6)),
    ("cct_block", "message, drop path, some rows"): lambda: block_case(
        4, 5, 2, width=64, drops=True, rows=torch.tensor([0, 3, 5, 8, 10, 13, 15, 18])
    ),
    ("cct_block", "plain, drop path"): lambda: block_case(4, 7, width=64, drops=True),
    ("cct_block", "head size 80"): lambda: block_case(2, 5, 1, width=160, heads=2),
    ("cct_block", "gelu"): lambda: block_case(2, 5, 2, width=64, activation="gelu"),
    ("cct_block", "causal, some rows"): lambda: block_case(3, 6, width=64, causal=True, rows=torch.tensor([2, 7, 13])),
    ("cct_block", "packed"): lambda: block_case(labels=[3, 1, 12]),
    ("cct_block", "packed, some rows"): lambda: block_case(labels=[3, 1, 4], width=64, rows=torch.tensor([2, 3, 7])),
    ("patch_embed", "float"): lambda: patch_case(normal(3, 3, 24, 24)),
    ("patch_embed", "patches of 14, cropped"): lambda: patch_case(
        torch.randint(0, 256, (2, 45, 50, 3), dtype=torch.uint8)[:, 2:44, 5:47], 14, spare=False
    ),
    ("patch_embed", "patches of 14, float, channels last"): lambda: patch_case(
        normal(2, 28, 28, 3).permute(0, 3, 1, 2), 14, spare=False
    ),
    ("patch_embed", "37 tokens of 12"): lambda: patch_case(
        torch.randint(0, 256, (3, 72, 72, 3), dtype=torch.uint8), 12
    ),
}
MAKER = Maker(dtype=torch.float64)
CASES |= {(name, "example"): functools.partial(op.example, TINY, MAKER) for name, op in OPS.items()}
EMPTY = {name: functools.partial(op.example, TINY._replace(videos=0), MAKER) for name, op in OPS.items()}


def cast(args: tuple[Any, ...], dtype: torch.dtype, grad: bool = False) -> tuple[Any, ...]:
    def one(arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        arg = arg.detach().to(DEVICE)
        # a drop path factor has no gradient
        return (
            arg.to(dtype).requires_grad_(grad and not (arg.dim() == 1 and len(arg) <= 4))
            if arg.is_floating_point()
            else arg
        )

    return tuple(one(arg) for arg in args)


def run(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, then the gradient of every floating input, for a fixed random cotangent."""
    args = cast(args, args[1].dtype if args[0].dtype == torch.uint8 else args[0].dtype, grad=True)
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if len(args) == len(kernels.Block._fields) and kernels.Block(*args).frames:
        assert outputs[0][:, -1].isfinite().all()  # the spare row is dead: it may hold any number
        outputs = (outputs[0][:, :-1], *outputs[1:])
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
    for name in op.names:
        low = torch.bfloat16 in {getattr(arg, "dtype", None) for arg in args}
        garbage = INTERPRETED and low and (name == "triton" or (op.name == "cct_block" and name != "reference"))
        if garbage or (name == "library" and INTERPRETED and op.name == "cct_block"):  # as "fused"
            continue
        with kernels.backend(name), contextlib.suppress(BackendError):
            op.choose(args)
            names.append(name)
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
def test_registered_op_computes_the_reference(case: tuple[str, str]) -> None:
    op, args = OPS[case[0]], cast(CASES[case](), torch.float64)
    wanted = op.reference(*args)
    for got, right in zip(op.registered(*args), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


FIRST_CASES = {name: case for name, case in reversed(CASES)} | {"cct_block": "message, T=5"}


@pytest.mark.parametrize("name", sorted(FIRST_CASES))
def test_opcheck(name: str) -> None:
    """The registered op, which is for inference; that with gradients is checked below."""
    args = cast(CASES[name, FIRST_CASES[name]](), torch.float32)
    torch.library.opcheck(OPS[name].registered, args)


@pytest.mark.parametrize("name", sorted(FIRST_CASES))
def test_opcheck_with_kernels(name: str) -> None:
    op, args = OPS[name], cast(CASES[name, FIRST_CASES[name]](), torch.float32, grad=True)
    if "triton" not in usable(op, args):
        pytest.skip(f"no triton kernel of {name} here")
    if name == "cct_block":
        args = tuple(kernels.Block(*args)._replace(backend="triton"))  # as when a graph is traced
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


@pytest.mark.parametrize("name", sorted(EMPTY))
def test_empty_batch(name: str) -> None:
    args = EMPTY[name]()
    for result in (run(OPS[name], args), OPS[name].registered(*args)):
        assert all(tensor.isfinite().all() for tensor in result)
        assert result[0].shape[0] == 0


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_strided_input_gives_the_same(case: tuple[str, str]) -> None:
    args = cast(CASES[case](), torch.float32)

    def strided(arg: Any) -> Any:
        if not isinstance(arg, Tensor) or arg.dim() < 2:
            return arg
        return torch.stack([arg, arg], dim=-1)[..., 0]

    for name in ("auto", "fused"):
        if name == "fused" and (name not in usable(OPS[case[0]], args) or case[1] != "message, drop path"):
            continue
        with kernels.backend(name):
            given = run(OPS[case[0]], tuple(strided(arg) for arg in args))
            for got, wanted in zip(given, run(OPS[case[0]], args), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the architecture itself decides")
def test_tensor_descriptors_give_the_same_as_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of sm_90: the GEMM loads and stores its tiles through descriptors."""
    gemm = pytest.importorskip("xclip_fast.kernels.triton.gemm", reason="triton is not installed (pip install triton)")
    launching = pytest.importorskip("xclip_fast.kernels.triton.launching")
    op, args = OPS["cct_block"], cast(CASES["cct_block", "message, drop path"](), torch.float16)
    with kernels.backend("triton"):
        pointers = run(op, args)
        made = []
        prepared = gemm.Prepared
        monkeypatch.setattr(gemm, "Prepared", lambda *a, **options: made.append(options) or prepared(*a, **options))
        with launching.assumed_gpu(90, 2):
            descriptors = run(op, args)
    assert any(options.get("LOAD_DESCRIPTORS") for options in made)
    for got, wanted in zip(descriptors, pointers, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("outliers", [0.0, 50.0])
def test_folded_layer_norm_is_as_exact(outliers: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large M takes: LayerNorm in the GEMM's epilogue, with an outlier channel that raw x does not hide."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    monkeypatch.setattr(products, "FOLD_FROM", 0)
    op, args = OPS["cct_block"], CASES["cct_block", "message"]()
    args = cast((args[0] + outliers * F.one_hot(torch.tensor(3), WIDTH), *args[1:]), torch.float16)
    exact = run(op.reference, cast(args, torch.float64))
    baseline = error(run(op.reference, args), exact)
    with kernels.backend("triton"), poisoned_memory():
        folded = error(run(op, args), exact)
    for got, limit in zip(folded, baseline, strict=True):
        assert got <= 2 * limit + 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("name", ["message", "message, L=50", "plain, drop path", "gelu", "packed, some rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inference_adds_the_last_product_in_place(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    block = kernels.Block(*cast(CASES["cct_block", name](), dtype))
    before = block.x.clone()
    exact = kernels.composed(kernels.Block(*cast(tuple(block), torch.float64)))
    baseline = kernels.composed(block)
    with kernels.backend("fused"), torch.no_grad(), poisoned_memory():
        got = OPS["cct_block"](*block)[0]
    assert torch.equal(block.x, before)
    if block.frames:
        got, exact, baseline = got[:, :-1], exact[:, :-1], baseline[:, :-1]
    (found,), (limit,) = error([got], [exact]), error([baseline], [exact])
    assert found <= 2 * limit + 4 * torch.finfo(dtype).eps


def test_what_is_made_of_a_weight_follows_a_fused_optimizer() -> None:
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)

    def doubled() -> Tensor:
        return derived.kept("doubled", lambda given: 2 * given.detach(), weight)

    first, version = doubled(), weight._version
    assert doubled() is first
    weight.grad = torch.ones(8)
    optimizer.step()
    assert weight._version == version  # so only the step itself tells
    second = doubled()
    assert torch.equal(second, 2 * weight.detach())
    assert not torch.equal(second, first)
    weight.data.fill_(3)  # which a user has to tell
    TextEncoder(TextConfig(width=64, layers=1, heads=1), 64, 1e-5).forget()
    assert torch.equal(doubled(), torch.full((8,), 6.0))


def test_statistics_go_from_block_to_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block behind takes them instead of reading its rows, and they are those of the rows."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    monkeypatch.setattr(products, "FOLD_FROM", 0)
    first = kernels.Block(*cast(CASES["cct_block", "message"](), torch.float16))
    with kernels.backend("triton"), torch.no_grad():
        y, statistics = kernels.cct_block(first._replace(statistics=True))
        assert statistics is not None
        rows = y.float().flatten(0, 1)
        torch.testing.assert_close(statistics[0], rows.mean(1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(statistics[1], rows.var(1, correction=0).add(EPS).rsqrt(), rtol=1e-3, atol=1e-3)
        wanted = kernels.cct_block(first._replace(x=y))[0]
        torch.testing.assert_close(
            kernels.cct_block(first._replace(x=y, mean=statistics[0], rstd=statistics[1]))[0],
            wanted,
            rtol=1e-3,
            atol=1e-3,
        )
        wrong = kernels.cct_block(first._replace(x=y, mean=statistics[0] + 1, rstd=statistics[1]))[0]
        assert (wrong - wanted).abs().max() > 0.01


HOOKS = {"a new gradient": lambda grad: 2 * grad, "a changed gradient": lambda grad: grad.mul_(2)}


@pytest.mark.parametrize("frames", [0, 3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("between", ["nothing", *HOOKS, "another reader", "drop path", "another stream"])
def test_a_gradient_goes_to_the_block_before_with_its_copy_and_sums(
    between: str, autocast: bool, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read for them only if somebody changed it on its way, or the block before scales it."""
    column_sums = pytest.importorskip("xclip_fast.kernels.triton.column_sums", reason="triton is not installed")
    blocks = [example(6, 6, WIDTH, frames, dtype=torch.float64) for _ in range(2)]
    if between == "drop path":
        blocks[0] = blocks[0]._replace(drop_feed_forward=torch.tensor([0.0, 1.25]))
    cotangent, read = normal(6, 6 - bool(frames), WIDTH), []
    real = column_sums.scaled

    def watched(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        if x.shape == (36, WIDTH):
            read.append(x.dtype)
        return real(x, *args, **options)

    def gradients(dtype: torch.dtype, name: str, lower: bool = autocast) -> list[Tensor]:
        first, later = (kernels.Block(*cast(tuple(block), dtype, grad=True)) for block in blocks)
        with kernels.backend(name), torch.autocast(DEVICE, torch.float16, lower), poisoned_memory():
            x = kernels.cct_block(first)[0]
            if between in HOOKS:
                x.register_hook(HOOKS[between])
            y = kernels.cct_block(later._replace(x=x))[0]
            y = y + x if between == "another reader" else y
            loss = (y[:, : cotangent.shape[1]] * cotangent.to(y)).sum()
            inputs = [arg for arg in (*first, *later[1:]) if isinstance(arg, Tensor) and arg.requires_grad]
            with concurrent.futures.ThreadPoolExecutor(1) as pool:  # autograd's thread may be any
                return list(pool.submit(torch.autograd.grad, loss, inputs).result())

    exact = gradients(torch.float64, "reference", False)
    baseline = error(gradients(torch.float32, "reference"), exact)
    monkeypatch.setattr(column_sums, "scaled", watched)
    if between == "another stream":
        streams = itertools.count()
        monkeypatch.setattr(fused, "_stream", lambda _: next(streams))
    for got, limit in zip(error(gradients(torch.float32, "fused"), exact), baseline, strict=True):
        assert got <= 2 * limit + 4 * torch.finfo(torch.float16 if autocast else torch.float32).eps
    assert len(read) == (1 if between == "nothing" else 2)


class _Collective(torch.autograd.Function):
    """A region of a model that is split over processes: it adds up the gradient of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dy.data.mul_(2)  # in place and without a new version, as torch.distributed.all_reduce
        return dy


def test_only_a_block_right_before_gets_more_than_a_gradient() -> None:
    """What stands between two blocks may change the gradient without a word."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    blocks = [kernels.Block(*cast(tuple(example(6, 6, WIDTH, 0)), torch.float32, grad=True)) for _ in range(2)]
    got = []
    for name in ("reference", "fused"):
        with kernels.backend(name):
            x = _Collective.apply(kernels.cct_block(blocks[0])[0])
            y = kernels.cct_block(blocks[1]._replace(x=x))[0]
            got.append(torch.autograd.grad(y.square().sum(), [blocks[0].projection_weight, blocks[0].projection_bias]))
    for wanted, found in zip(*got, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("name", "case", "weights", "products"),
    [("cct_block", "message, drop path", 7, 4), ("patch_embed", "example", 1, 1)],
)
def test_the_gradient_of_a_weight_that_autocast_lowers_is_computed_in_its_own_dtype(
    name: str, case: str, weights: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, args = OPS[name], cast(CASES[name, case](), torch.float32)
    if "triton" not in usable(op, args):
        pytest.skip("triton is not installed (pip install triton)")
    casts, asked, module = [], [], fused if name == "cct_block" else importlib.import_module(PATCH_KERNELS)
    copy = torch._foreach_copy_

    def watched(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        asked.append((a.dtype, dtype))
        return product(a, b, dtype)

    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, given: casts.append(len(to)) or copy(to, given))
    monkeypatch.setattr(module, "product", watched)
    with torch.autocast(DEVICE, torch.float16), kernels.backend("triton"):
        run(op, args)
    assert casts == [weights]  # all at once
    assert asked == products * [(torch.float16, torch.float32)]


def test_a_gradient_of_a_gradient_is_refused() -> None:
    """A kernel's backward pass has no gradient of its own: without a word, a gradient penalty would have no effect."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    x, weight, bias = (part.float().to(DEVICE).requires_grad_() for part in (normal(4, WIDTH), *norm_parameters()))
    with kernels.backend("triton"):
        y = kernels.layer_norm(x, weight, bias, EPS)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_a_gradients_product_in_float32_is_not_rounded_in_between() -> None:
    a, b = normal(40, 64).to(DEVICE, torch.float16), normal(64, 24).to(DEVICE, torch.float16)
    exact = a.double() @ b.double()
    for dtype in (torch.float16, torch.float32):
        got = product(a.T.contiguous().T, b, dtype)
        assert got.dtype == dtype
        wide = DEVICE == "cuda" and dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-5 if wide else 2e-3, atol=1e-4 if wide else 1e-2)


def test_kernels_keep_a_float32_residual_under_autocast() -> None:
    op, args = OPS["cct_block"], cast(CASES["cct_block", "message, drop path"](), torch.float32)
    if "triton" not in usable(op, args):
        pytest.skip("triton is not installed (pip install triton)")
    low = torch.float16  # the interpreter has no bfloat16
    with torch.autocast(DEVICE, low):
        with kernels.backend("reference"):
            wanted = run(op, args)
        for name in ("fused", "triton"):
            with kernels.backend(name):
                got = run(op, args)
            for a, b in zip(got, wanted, strict=True):
                assert a.dtype == b.dtype
                assert (a - b).double().norm() <= 1e-2 * b.double().norm().clamp(min=1)


# ---- references against independent torch


@pytest.mark.parametrize("kind", [torch.uint8, torch.float64])
def test_patch_embed_is_a_convolution_of_normalized_frames(kind: torch.dtype) -> None:
    levels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    args = patch_case(levels)
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in args[6:8])
    pixels = ((levels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    patches = F.conv2d(pixels, args[1], stride=8).flatten(2).transpose(1, 2)
    tokens = torch.cat([args[2].expand(2, 1, -1), patches], 1) + args[3]
    wanted = F.layer_norm(tokens, (WIDTH,), args[4], args[5], EPS)
    frames = levels if kind == torch.uint8 else pixels
    torch.testing.assert_close(kernels.patch_embed(frames, *args[1:])[:, :-1], wanted)
    torch.testing.assert_close(kernels.patch_embed(frames, *args[1:-1]), wanted)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter (TRITON_INTERPRET=1)")
def test_layer_norm_of_some_rows_of_each_frame_is_that_of_their_copy() -> None:
    """To the bit, with its gradients. 30 rows in memory, of which the kernels read some where they are."""
    stream, norm = normal(3, 30, WIDTH).float(), tuple(each.float() for each in norm_parameters())
    every = stream.requires_grad_(), *(each.requires_grad_() for each in norm)
    views = (stream[:, 1:-1], stream[:, :-1], stream[:, 2:7], stream[:, 0], stream[:, ::3], stream[1:2, 1:], stream)
    for x in (
        *views,
        stream[0].expand(3, 30, WIDTH),
        stream[:, 1:-1].transpose(0, 1),
        stream[..., ::2].repeat(1, 1, 2),
    ):
        weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
        with kernels.backend("triton"):
            results = [kernels.layer_norm(given, *norm, EPS) for given in (x, x.contiguous())]
        assert torch.equal(*results)
        grads = [torch.autograd.grad((y * weights).sum(), every, retain_graph=True) for y in results]
        assert all(torch.equal(got, wanted) for got, wanted in zip(*grads, strict=True))
        torch.testing.assert_close(results[0], F.layer_norm(x, (WIDTH,), *norm, EPS), rtol=1e-5, atol=1e-5)


def test_packed_sequences_are_each_label_alone() -> None:
    packed = example(0, 0, WIDTH, labels=[3, 1, 7], dtype=torch.float64)
    got, _ = kernels.cct_block(packed)
    for start, end in itertools.pairwise(packed.offsets.tolist()):
        alone = packed._replace(x=packed.x[None, start:end], offsets=None, longest=0)
        torch.testing.assert_close(got[start:end], kernels.cct_block(alone)[0][0])


def test_cosine_logits_is_scaled_cosine_similarity() -> None:
    video, text = normal(3, 64), normal(3, 5, 64)
    wanted = 10 * F.cosine_similarity(video[:, None], text, dim=-1)
    torch.testing.assert_close(kernels.cosine_logits(video, text, torch.tensor(10.0).double().log()), wanted)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("one_stage", [16, 2048])
def test_column_sums_in_one_stage_and_in_two(one_stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from xclip_fast.kernels.triton import column_sums

    monkeypatch.setattr(column_sums, "ONE_STAGE", one_stage)
    column_sums._prepare.cache_clear()  # type: ignore[attr-defined]
    for rows, columns in ((0, 5), (1, 1), (17, 256), (66, 257), (130, 40)):
        x, u = normal(rows, columns + 3)[:, :columns].float(), 3 * normal(rows, columns).float()
        drop = torch.tensor([0.0, 1.25]) if rows % 2 == 0 else None
        factor = 1.0 if drop is None else drop.double().repeat_interleave(rows // 2)[:, None]
        s = torch.sigmoid(1.702 * u.double())
        exact = x.double() * factor * (s + 1.702 * u.double() * s * (1 - s))
        with poisoned_memory():
            y, sums, h = column_sums.scaled(x, torch.float16, drop, u, keep=True)
            _, plain, _ = column_sums.scaled(x, torch.float32)
        assert h is not None
        torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(h.double(), u.double() * s, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(sums.double(), exact.sum(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(plain.double(), x.double().sum(0), rtol=1e-5, atol=1e-4)
    column_sums._prepare.cache_clear()  # type: ignore[attr-defined]


def test_drop_path_acts_on_whole_samples() -> None:
    block = example(4, 5, WIDTH, dtype=torch.float64)
    nothing = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y, _ = kernels.cct_block(block._replace(drop_attention=nothing, drop_feed_forward=nothing))
    torch.testing.assert_close(y[:2], block.x[:2])
    torch.testing.assert_close(y[2:], kernels.cct_block(block)[0][2:])


def test_half_precision_linear_rounds_once_on_cpu() -> None:
    x, (weight, bias) = normal(64, WIDTH).bfloat16(), (p.bfloat16() for p in linear_parameters(96))
    exact = F.linear(x.double(), weight.double(), bias.double())
    from xclip_fast.kernels.linear import linear

    assert (linear(x, weight, bias).double() - exact).abs().max() <= exact.abs().max() * 2**-8


# ---- the dispatcher


def test_backend_is_forced_and_restored() -> None:
    op, args = OPS["cct_block"], cast(CASES["cct_block", "message"](), torch.float32)
    assert op.choose(args).name == "reference"
    with kernels.backend("fused"):
        with contextlib.suppress(BackendError):  # Triton is not installed, or not interpreted
            assert op.choose(args).name == "fused"
        with pytest.raises(BackendError), kernels.backend("reference"):
            op(args[0].to(torch.complex64), *args[1:])
    assert op.choose(args).name == "reference"


def test_a_part_that_cannot_be_had_is_a_reason() -> None:
    args = cast(CASES["cct_block", "message"](), torch.float16)
    for name, reason in (("flash_attn", "flash_attn is not installed"), ("cudnn", "device cpu is not cuda")):
        with kernels.backend(name), pytest.raises(BackendError, match=reason):
            OPS["cct_block"](*args)


def test_forced_backend_that_an_op_lacks_leaves_the_choice_automatic() -> None:
    with kernels.backend("cudnn"):
        assert OPS["quick_gelu"].choose((normal(3),)).name == "reference"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tpu'.*auto, cuda, .*triton"), kernels.backend("tpu"):
        pass


def test_environment_variable_is_checked() -> None:
    code = (
        "import torch; from xclip_fast import kernels; from xclip_fast.kernels import dispatch\n"
        "print(dispatch.forced_backend())\n"
        "try: kernels.quick_gelu(torch.ones(2))\n"
        "except ValueError as error: print(error)\n"
        "dispatch._forced = 'auto'; print(*kernels.quick_gelu(torch.zeros(2)).tolist())\n"
    )
    environment = {**os.environ, "XCLIP_FAST_BACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    read, refused, answered = done.stdout.splitlines()
    assert read == "nonsense"
    assert "no backend is called 'nonsense'" in refused
    assert answered == "0.0 0.0"


def test_refusals_carry_every_reason() -> None:
    def double_reference(x: Tensor) -> Tensor:
        return x * 2

    op = Op(
        double_reference,
        Backend("cuda", double_reference, device_types=("cuda",)),
        Backend("triton", double_reference, dtypes=(torch.float16,)),
        Backend("xformers", double_reference, refuse=lambda x: "only on Sundays"),
        example=lambda sizes, make: (),
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

    op = Op(
        triple_reference,
        Backend("triton", forward, backward),
        example=lambda sizes, make: (),
        saved=lambda x: (x.new_empty(()),),
    )
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
