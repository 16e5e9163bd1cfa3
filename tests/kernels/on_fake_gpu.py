"""Every launch of every kernel, bound by Triton's own launcher on a GPU that is not there (fake_gpu.py).

test_launches.py runs this file in a process without Triton's interpreter.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import pkgutil
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

sys.path.insert(0, str(Path(__file__).parent))

import ahead_of_time
import triton
from ahead_of_time import EPS, BehindABlock, cases, meta, norm, run
from xclip_fast.kernels.cct_block import fused, plans
from xclip_fast.kernels.cct_block.example import example
from xclip_fast.kernels.dispatch import tables
from xclip_fast.kernels.fake_gpu import Launch, fake_gpu
from xclip_fast.kernels.layer_norm import triton as layer_norm
from xclip_fast.kernels.triton import launching
from xclip_fast.kernels.tune import measuring, tiles
from xclip_fast.kernels.tune.shapes import BATCHES, SHAPES

from xclip_fast import XCLIP, FastCCTBlock, kernels
from xclip_fast.config import VARIANTS
from xclip_fast.time_model import Recorder

# Before the first backward, at which autograd starts a thread for each device: a device of a kind of its own.
SETUP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)  # torch 2.10 and later
if SETUP is not None:
    SETUP("fakegpu")
    DETACH = torch.library.Library("aten", "IMPL")
    DETACH.impl("detach", lambda x: torch._C._acc.create_empty_tensor(x.shape, x.dtype), "PrivateUse1")
ARCHS = (80, 90, 100)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def every_kernel() -> set[str]:
    """The kernels of all ops: functions under triton.jit whose name ends in _kernel."""
    found = set()
    for each in pkgutil.walk_packages(kernels.__path__[:1], f"{kernels.__name__}."):
        if "triton" in each.name:
            names = vars(importlib.import_module(each.name)).items()
            found |= {name for name, value in names if isinstance(value, triton.JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


def each_op(dtype: torch.dtype = BF16, stream: torch.dtype | None = None, arch: int = 90) -> None:
    """Every op at one production shape, and attention over short frames, which has a backward of its own."""
    shapes = ahead_of_time.SHAPES
    for op, args in cases(dtype, *shapes["B/16"], 4, stream):
        if not ahead_of_time.refused(op, args, arch):
            run(op, args)
    run("cct_block", ahead_of_time.block(example(2, 16, 768, 2, device="meta", dtype=stream or dtype), dtype))


# ---- arguments and grids


# of weights, of the residual stream, and the architecture; test_triton_compile.py binds more before it compiles
BOUND = [(BF16, None, 90), (FP16, None, 90), (FP32, None, 90), (BF16, FP32, 90)]
BOUND += [(BF16, None, 80), (FP32, None, 80), (BF16, FP32, 100)]


@pytest.mark.parametrize(("dtype", "stream", "arch"), BOUND, ids=str)
def test_every_kernel_binds(dtype: torch.dtype, stream: torch.dtype | None, arch: int) -> None:
    with fake_gpu(arch) as launches:
        each_op(dtype, stream, arch)
    # folded in: of half precision alone; statistics in the epilogue: not of a stream that is normalized first anyway
    left_out = {"fold_kernel"} if stream is not None or dtype == FP32 else set()
    left_out |= {"_merge_statistics_kernel"} if stream is not None else set()
    wanted = every_kernel() - left_out
    assert {launch.kernel for launch in launches} == wanted
    if arch >= 90 and dtype != FP32:
        assert all(launch.descriptors for launch in launches if launch.kernel == "gemm_kernel")


ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 1000, 4095, 4096, 12608)
FRAMES = (1, 2, 3, 7, 16, 17, 33, 64, 255)


def linear_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    width = 128
    for rows in ROWS:
        x = meta(rows, width, dtype=dtype)
        yield "quick_gelu", (x,)
        yield "layer_norm", (x, *norm(width, dtype), EPS)
        yield "cct_block", tuple(example(1, rows, width, drops=bool(rows % 2), device="meta", dtype=dtype))


def frame_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    width = 128
    lengths = (1, 3, 16, 51, 198)
    for number, frames in enumerate(FRAMES):
        for length in lengths if frames == 3 else [lengths[number % 5]]:  # a grid has an axis for each
            yield "cct_block", tuple(example(frames, length, width, device="meta", dtype=dtype))
        for videos in (1, 2, 5):
            if frames <= 64:
                given = example(videos * frames, 3, width, frames, drops=True, device="meta", dtype=dtype)
                yield "cct_block", tuple(given)
        embedding = (meta(width, 3, 8, 8, dtype=dtype), meta(width, dtype=dtype), meta(5, width, dtype=dtype))
        pixels = meta(frames, 16, 16, 3, dtype=torch.uint8)
        yield "patch_embed", (pixels, *embedding, *norm(width, dtype), [0.5] * 3, [0.2] * 3, EPS, True)
        text = meta(2, frames, 64, dtype=dtype)  # as many labels
        yield "cosine_logits", (meta(2, 64, dtype=dtype), text, meta(dtype=FP32))
        yield "cct_block", tuple(example(0, 0, width, labels=[1, min(frames, 32)], device="meta", dtype=dtype))


@pytest.mark.parametrize(("arch", "dtype"), [(90, BF16), (80, FP32)], ids=str)
@pytest.mark.parametrize("some", [linear_cases, frame_cases])
def test_every_size_binds_forward_and_backward(some: Callable[..., Any], dtype: torch.dtype, arch: int) -> None:
    with fake_gpu(arch) as launches:
        for op, args in some(dtype):
            before = len(launches)
            run(op, args)
            assert len(launches) - before >= 2, (op, [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)])


def test_empty_batches_launch_nothing() -> None:
    with fake_gpu(90) as launches:
        x = meta(0, 5, 128, dtype=BF16)
        run("quick_gelu", (x,))
        run("layer_norm", (x, *norm(128, BF16), EPS))
        with kernels.backend("triton"):
            assert kernels.cct_block(example(0, 5, 128, 3, device="meta", dtype=BF16))[0].shape == (0, 5, 128)
    assert launches == []


def test_the_number_of_rows_compiles_nothing_anew() -> None:
    """Rows of any number, 1 and multiples of 16 among them, take the kernels of their tile."""
    with fake_gpu(90) as launches:
        for rows in range(1, 80):
            given = example(rows, 5, 128, device="meta", dtype=BF16)
            with kernels.backend("triton"):
                fused.forward(True, *given)
    by_kernel: dict[str, set[int]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel, set()).add(id(launch.source))
    # each of the four products in two tiles
    assert {name: len(sources) for name, sources in by_kernel.items()} == {
        "attention_fwd_kernel": 1,
        "_merge_statistics_kernel": 1,
        "gemm_kernel": 4 * 2,
        "layer_norm_fwd_kernel": 1,
    }


def test_descriptors_only_where_the_hardware_takes_them() -> None:
    """Base and row stride in whole 16 bytes; else the kernel loads through pointers."""
    from xclip_fast.kernels.triton.gemm import gemm

    store = torch.zeros(70000, dtype=BF16)
    aligned, weight = store[: 16 * 64].view(16, 64), store[: 64 * 64].view(64, 64)
    shifted, padded = store[1 : 1 + 16 * 64].view(16, 64), store.as_strided((16, 64), (70, 1))
    odd = store[: 16 * 63].view(16, 63)
    with fake_gpu(90) as launches:
        for x, w in ((aligned, weight), (shifted, weight), (padded, weight), (odd, store[: 64 * 63].view(64, 63))):
            gemm(x, w, bias=store[:64])
        gemm(aligned, store[: 64 * 63].view(63, 64), bias=store[:63])  # its result has an odd row stride
    flags = [(each.arguments["LOAD_DESCRIPTORS"], each.arguments["STORE_DESCRIPTORS"]) for each in launches]
    assert flags == [(True, True), (False, True), (False, True), (False, True), (True, False)]
    for launch in launches:
        assert launch.descriptors == 2 * launch.arguments["LOAD_DESCRIPTORS"] + launch.arguments["STORE_DESCRIPTORS"]


def test_a_block_through_autograd() -> None:
    """What one block launches, forward and backward, in bfloat16 and under autocast with a float32 residual stream."""
    x = torch.randn(4, 5, 128)
    for dtype in (BF16, FP32):
        block = FastCCTBlock(128, 2, 4, batch_first=True).to(dtype)
        given = x.to(dtype).requires_grad_()
        with fake_gpu(90) as launches, kernels.backend("triton"), torch.autocast("cpu", BF16, dtype == FP32):
            y = block(given)
            forward = len(launches)
            y.backward(torch.ones_like(y))
        assert y.dtype == dtype
        assert 9 <= forward <= 20, [launch.kernel for launch in launches]
        assert len(launches) > forward


# ---- what a block launches


def passes(calls: list[tuple[str, dict[Any, Any]]], numel: int) -> int:
    """Reads and writes of whole tensors of this size that are no operand or result of a product. One of k times the
    size counts as k. The message path gets the whole stream and reads its class rows alone."""
    return sum(
        tensor.numel() // numel
        for name, given in calls
        if name not in ("mm", "addmm", "gemm_kernel") and not name.startswith(("attention", "message"))
        for tensor in given.values()
        if isinstance(tensor, Tensor)
    )


def counted(name: str) -> list[tuple[int, int]]:
    """(launches, passes over the residual stream) of a block of B/16 between others, 32 videos: forward for inference,
    forward for training, backward. Attention by our kernel: what a library launches there is its own affair."""
    block = example(256, 198, 768, 8, device="meta", dtype=BF16)
    block = block._replace(x=BehindABlock.apply(block.x.requires_grad_()))
    if name == "triton":  # the block before leaves its statistics
        block = block._replace(mean=meta(256 * 198, dtype=FP32), rstd=meta(256 * 198, dtype=FP32), statistics=True)
    needs = [BF16 if isinstance(arg, Tensor) and arg.dtype == BF16 else None for arg in block]
    found: list[tuple[int, int]] = []

    def count(call: Callable[[], Any]) -> Any:
        with Recorder(launches) as made:
            result = call()
        made.collect()
        found.append((len(made.calls), passes(made.calls, block.x.numel())))
        return result

    with fake_gpu(90) as launches, kernels.backend(name), plans.swap("attention", "triton"):
        fused.forward(False, *block)  # folded weights are kept from here on
        launches.clear()
        count(lambda: fused.forward(False, *block))
        outputs, saved = count(lambda: fused.forward(True, *block))
        dx, *_ = fused.backward([torch.empty_like(outputs[0])], saved, needs, *block)  # as of the block behind
        launches.clear()
        count(lambda: fused.backward([dx], saved, needs, *block))
    return found


# as counted gives them, and as docs/kernels.md has them
MOST = {"library": [(11, 14), (12, 17), (31, 26)], "triton": [(11, 0), (11, 0), (31, 26)]}


@pytest.mark.parametrize("name", sorted(MOST))
def test_launches_and_passes_of_a_block_do_not_grow(name: str) -> None:
    for found, most in zip(counted(name), MOST[name], strict=True):
        assert found[0] <= most[0]
        assert found[1] <= most[1]


def test_class_rows_alone_are_multiplied_where_no_others_leave_a_block() -> None:
    block = example(256, 198, 768, 8, device="meta", dtype=BF16, rows=meta(256, dtype=torch.int64))
    with fake_gpu(90) as launches, kernels.backend("triton"), plans.swap("attention", "triton"):
        fused.forward(False, *block)  # folded weights are kept from here on
        launches.clear()
        with Recorder(launches) as made:
            (y, *_), _ = fused.forward(False, *block)
        made.collect()
    assert y.shape == (256, 768)
    rows = [given["M"] for name, given in made.calls if name in ("gemm_kernel", "message_rows_kernel")]
    assert [count for count in rows if count > 256] == [256 * 198]  # the projection to queries, keys and values
    # the rows of the stream and of the attention are copied, and so few are normalized before a product
    assert len(made.calls) <= MOST["triton"][0][0] + 3


def test_features_of_frames_are_read_where_the_last_block_left_them() -> None:
    """The passes of torch over all patches, forward and backward, beside products and what blocks do."""
    config = VARIANTS["B/16-8f"]
    with torch.device("meta"):
        model = XCLIP(dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=1))).to(BF16)
        video = torch.empty(2, 8, 224, 224, 3, dtype=torch.uint8)
    with fake_gpu(90, chooses=True) as launches, plans.swap("attention", "triton"), Recorder(launches) as made:
        torch.cat([each.flatten() for each in model.encode_video(video)]).sum().backward()
    size = 2 * 8 * 196 * 768
    passes = [
        name
        for name, given in made.calls
        if name not in ("mm", "addmm")
        and not name.endswith("_kernel")
        and any(isinstance(each, Tensor) and each.numel() >= size for each in given.values())
    ]
    # over the frames, and its gradient; the gradients of class, patches and spare rows; that of the positions
    assert passes == ["mean", "div", "cat", "sum"]


# ---- launches that are kept


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels whose launch Triton worked out; the others ran a compiled kernel that was kept."""
    names: list[str] = []
    run = triton.JITFunction.run
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda self, *a, **k: names.append(self.__name__) or run(self, *a, **k)
    )
    return names


def same(one: Launch, other: Launch) -> bool:
    def plain(launch: Launch) -> Any:
        tensors = {
            name: (t.shape, t.stride(), t.dtype) for name, t in launch.arguments.items() if isinstance(t, Tensor)
        }
        return launch.kernel, launch.grid, launch.source, launch.options, {**launch.arguments, **tensors}

    return plain(one) == plain(other)


@pytest.mark.parametrize("name", ["triton", "library"])
def test_a_block_is_launched_again_as_triton_launched_it(name: str, through_triton: list[str]) -> None:
    block = example(256, 18, 64, 8, dtype=BF16)
    mean, rstd = torch.zeros(2, 256 * 18).unbind(0)
    block = block._replace(mean=mean, rstd=rstd, statistics=True) if name == "triton" else block
    with fake_gpu(90) as launches, kernels.backend(name), plans.swap("attention", "triton"), torch.no_grad():
        fused.forward(False, *block)  # folds weights, which is kept too
        first = [each for each in launches if each.kernel != "fold_kernel"]
        assert len(through_triton) == len(launches)
        launches.clear()
        through_triton.clear()
        fused.forward(False, *block)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # descriptors ask the thread's own allocator for memory
            pool.submit(fused.forward, False, *block).result()
    assert through_triton == []
    assert len(launches) == 2 * len(first) > 12
    assert all(same(one, other) for one, other in zip(launches, first + first, strict=True))


def test_other_alignment_strides_dtype_and_tile_are_another_launch(through_triton: list[str]) -> None:
    """Each twice: what may be kept is, with a kernel for such arguments."""
    store, eps = torch.zeros(70000), EPS
    shifted = store[1 : 1 + 16 * 128].view(16, 128)
    cases = {
        "aligned": store[: 16 * 128].view(16, 128),
        "elsewhere": store[4 : 4 + 16 * 128].view(16, 128),
        "shifted": shifted,
        "strided": store.as_strided((16, 128), (130, 1)),
        "half": torch.zeros(16, 128, dtype=FP16),
    }
    with fake_gpu(90) as launches:
        for x in cases.values():
            for _ in range(2):
                layer_norm.row_statistics(x, eps)
        with launching.forced_tile("layer_norm", {"ROWS": 2, "num_warps": 1}):
            layer_norm.row_statistics(cases["aligned"], eps)
        layer_norm.row_statistics(cases["aligned"], eps)
    found = dict(zip(cases, zip(launches[:10:2], launches[1:10:2], strict=True), strict=True))
    assert all(same(one, other) for one, other in found.values())
    assert len(through_triton) == 1 + 0 + 2 + 1 + 1 + 2  # of 12
    sources = {name: one.source for name, (one, _) in found.items()}
    assert sources["aligned"] is sources["elsewhere"]
    assert len(set(map(id, sources.values()))) == 4
    assert sources["aligned"].attrs[0,]  # the pointer is divisible by 16
    assert not sources["shifted"].attrs.get((0,))
    assert launches[10].grid != launches[0].grid == launches[11].grid


def test_the_message_path_is_kept_for_the_strides_of_its_weights(through_triton: list[str]) -> None:
    block = example(256, 18, 64, 8, dtype=BF16)
    padded = torch.zeros(192, 72, dtype=BF16)[:, :64]
    worked_out: list[int] = []
    with fake_gpu(90) as launches, kernels.backend("library"), plans.swap("attention", "triton"):
        for weight in (block.message_in_weight, padded, block.message_in_weight, padded):
            before = len(through_triton)
            fused.forward(False, *block._replace(message_in_weight=weight))
            worked_out.append(len(through_triton) - before)
    found = [each for each in launches if each.kernel == "message_attention_kernel"]
    assert [each.arguments["weight_row"] for each in found] == [64, 72, 64, 72]
    assert all(same(one, other) for one, other in zip(found[:2], found[2:], strict=True))
    assert worked_out[0] >= worked_out[1] > 0 == worked_out[2] == worked_out[3]


def test_hooks_and_knobs_are_asked(through_triton: list[str]) -> None:
    """With a hook or a knob that is set, every launch is Triton's own."""
    x, runtime, kernel = torch.zeros(16, 128), triton.knobs.runtime, layer_norm.layer_norm_fwd_kernel
    seen: list[Any] = []

    def count(change: contextlib.AbstractContextManager[Any]) -> int:
        with change:
            before = len(through_triton)
            layer_norm.row_statistics(x, EPS)
            return len(through_triton) - before

    @contextlib.contextmanager
    def before_the_run() -> Iterator[None]:
        kernel.add_pre_run_hook(lambda *args, **options: seen.append(args))
        yield
        kernel.pre_run_hooks.clear()

    @contextlib.contextmanager
    def around_the_launch(hooks: Any) -> Iterator[None]:
        hooks.add(seen.append)
        yield
        hooks.remove(seen.append)

    @contextlib.contextmanager
    def debugging() -> Iterator[None]:
        with runtime.scope():
            runtime.debug = True
            yield

    plain = contextlib.nullcontext
    with fake_gpu(90) as launches:
        assert [count(plain()), count(plain())] == [1, 0]
        for changed in (before_the_run(), around_the_launch(runtime.launch_enter_hook),
                        around_the_launch(runtime.launch_exit_hook), debugging()):  # fmt: skip
            assert count(changed) == 1
        assert launches[-1].options["debug"]
        assert count(plain()) == 0
    assert len(seen) == 1


# ---- threads and devices


def launched_elsewhere(launches: list[Launch]) -> None:
    assert {launch.kernel for launch in launches} == every_kernel()
    assert any(launch.descriptors for launch in launches)
    assert threading.main_thread().name not in {launch.thread for launch in launches}


def test_every_kernel_from_another_thread() -> None:
    """A server's worker: Triton's allocator is set per thread."""
    with fake_gpu(90) as launches, concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(each_op).result()
    launched_elsewhere(launches)


class _OnDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return device_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        each_op()
        return grad


def device_tensor() -> Tensor:
    tensor: Tensor = torch._C._acc.create_empty_tensor((4,), torch.float32)
    return tensor


@pytest.mark.skipif(SETUP is None, reason="this torch has no Python backends for PrivateUse1")
def test_every_kernel_from_autograds_device_thread() -> None:
    x = device_tensor().requires_grad_()
    with fake_gpu(90) as launches:
        torch.autograd.grad(_OnDevice.apply(x), x, device_tensor())
    launched_elsewhere(launches)


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on cuda:1 while cuda:0 is current: kernel and descriptor memory both go to cuda:1."""
    current = [0]

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    seen = []

    class Kernel:
        arg_names = ("x",)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launched(*args: Any, **options: Any) -> None:
                memory = triton.runtime._allocation._allocator.get()(256, 128, None)
                seen.append((current[-1], memory.device.index))

            return launched

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    with FakeTensorMode(allow_non_fake_inputs=True), launching.assumed_gpu(90, 132):
        for index in (0, 1, 0):
            x = torch.empty(4, device=f"cuda:{index}")
            launching.launch(Kernel(), (1,), x)
            launching.Prepared(x.device, Kernel(), (1,), ())(x)
    assert seen == 2 * [(0, 0)] + 2 * [(1, 1)] + 2 * [(0, 0)]
    assert current == [0]


# ---- tiles


def test_the_tile_cache_stays_small_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    tables.forget()
    draw, device = random.Random(0), torch.device("cpu")
    table = ahead_of_time.json.loads(launching.TABLE.read_text())
    for arch in ARCHS:
        with launching.assumed_gpu(arch, 132):
            for rows in range(1, 6000):
                sizes = {"m": rows, "n": 768, "k": 3072, "bytes": 2, "residual": rows % 2, "aligned": 1}
                launching.tile("gemm", device, **sizes)
            for _ in range(500):
                sizes = {"m": draw.choice((1, 128, 129, 2048, 2049, 8191, 8192, 10**6)), "n": 768, "k": 768}
                sizes |= {"bytes": draw.choice((2, 4)), "residual": draw.randint(0, 1), "aligned": draw.randint(0, 1)}
                newest_first = sorted(table["gemm"], key=lambda row: -row["arch"])
                fitting = (row for row in newest_first if row["arch"] <= arch and tables.holds(row, sizes))
                assert launching.tile("gemm", device, **sizes) == next(fitting)["use"]
    assert tables.first.cache_info().currsize <= 4096


def test_integers_by_triton() -> None:
    for n in (0, 1, 2, 3, 4, 5, 63, 64, 65, 768, 1000):
        assert launching.next_power_of_2(n) == triton.next_power_of_2(n)
        assert launching.cdiv(n, 64) == triton.cdiv(n, 64)


# ---- tuning


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_tuning_compiles_and_times_little(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the shapes of a model: compiling takes about a second a kernel, a timing with its comparison 50 ms."""
    timed: list[dict[str, Any]] = []
    monkeypatch.setattr(measuring, "DEVICE", "meta")
    monkeypatch.setattr(tiles, "agrees", lambda result, wanted: result is not None)
    monkeypatch.setattr(measuring, "milliseconds", lambda call: timed.append({call.args[0]: call.args[1]}) or 0.1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a made-up GPU")
    with fake_gpu(90) as launches:
        for op in tiles.WORK:
            rows, wrong = measuring.measure(tiles, op, SHAPES[name], BATCHES, float("inf"), lambda line: None)
            assert wrong == 0
            short = SHAPES[name].tokens < 64  # it has a backward without tiles
            assert len(rows) == (8 if op == "gemm" else 0 if short and op != "attention" else 1)
    compiled = len({id(launch.source) for launch in launches})
    assert compiled + 0.05 * len(timed) < 50, (compiled, len(timed))
    products = [use["gemm"] for use in timed if "gemm" in use]
    assert {use["OCCUPANCY"] for use in products} == {1, 2} or {use["OCCUPANCY"] for use in products} == {1, 2, 3}
    modes = {(each.arguments["ACTIVATION"], each.arguments["residual_ptr"] is not None) for each in launches
             if each.kernel == "gemm_kernel"}  # fmt: skip
    assert modes == {(False, False), (False, True), (True, False)}


def test_the_estimate_of_a_product() -> None:
    def order(m: int, n: int, k: int) -> list[tuple[int, int]]:
        ordered = sorted(tiles.GEMM, key=lambda use: tiles.gemm_cycles(use, m, n, k, 132))
        return [(use["BLOCK_M"], use["BLOCK_N"]) for use in ordered]

    assert order(8, 768, 768)[0] == (64, 64)  # few rows: many tiles
    assert order(50432, 3072, 768)[0] == (128, 256)
    # fc2 of B/16 at 8 videos: 297 wide tiles fill 75 % of their waves, 594 square ones 90 %: both are tried
    assert {(128, 256), (128, 128)} <= set(order(12608, 768, 3072)[: tiles.TRIED])
    alone = {**tiles.GEMM[-1], "FLATTEN": False}
    whole, more = (tiles.gemm_cycles(alone, m, 768, 768, 132) for m in (128 * 44, 128 * 44 + 1))
    assert more == pytest.approx(2 * whole)  # one row past a full wave is another wave
