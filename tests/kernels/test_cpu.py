"""Inference on a CPU (kernels/cpu) against float64, after changes of weights and from every kind of caller."""

import copy
import dataclasses
import pickle
import platform
import threading

import pytest
import torch
from small import error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from xclip_fast.kernels import cpu
from xclip_fast.kernels.cpu import buffers, library
from xclip_fast.kernels.cpu.products import Products
from xclip_fast.kernels.linear import NATIVE_ON_CPU

import xclip_fast
from xclip_fast import FastCCTBlock, kernels
from xclip_fast.config import VARIANTS
from xclip_fast.nn.cct import Stream


def random_block(width=64, heads=2, frames=3, activation="quick_gelu", seed=0):
    torch.manual_seed(seed)
    block = FastCCTBlock(width, heads, frames, batch_first=True, activation=activation).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else 1.5 * width**-0.5))
    return block


@pytest.fixture
def taken(monkeypatch):
    """Counts the calls that the CPU path computes, and fills every buffer with NaN before it is used."""
    calls = []

    def count(module, name, label):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            calls.append(label)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for name in ("cross_frame_attention", "self_attention", "feed_forward", "patch_embed", "causal_attention_packed"):
        count(cpu, name, name)
    count(library, "block", "whole block")
    buffer = buffers.take
    monkeypatch.setattr(buffers, "take", lambda *args: buffer(*args).fill_(float("nan")))
    return calls


@pytest.fixture
def products(monkeypatch):
    """Counts the products of the library, by their rows."""
    calls, product = [], library.product

    def counted(rows, *args, **kwargs):
        calls.append(rows)
        product(rows, *args, **kwargs)

    monkeypatch.setattr(library, "product", counted)
    return calls


@pytest.fixture(params=["library", "torch", "onednn"])
def multiplied(request, monkeypatch):
    """Each of the ways to multiply in turn: torch's own as on a CPU without AVX-512."""
    if request.param == "library" and library.functions(torch.float32) is None:
        pytest.skip(library.load(library.instruction_set(torch.float32))[1])
    if request.param == "torch":
        monkeypatch.setattr(library, "instruction_set", lambda dtype: None)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        for dtype in NATIVE_ON_CPU:
            monkeypatch.setitem(NATIVE_ON_CPU, dtype, False)
    with kernels.backend("onednn" if request.param == "onednn" else "auto"):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("videos", "frames", "length"), [(1, 1, 2), (2, 3, 5), (1, 5, 50), (3, 2, 17)])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_block_is_as_exact_as_torch_of_its_dtype(videos, frames, length, dtype, activation, multiplied, taken):
    block = random_block(frames=frames, activation=activation).to(dtype)
    x = torch.randn(videos * frames, length, 64).to(dtype)
    with torch.no_grad():
        wanted = copy.deepcopy(block).double()(x.double())
        with kernels.backend("reference"):
            plain = block(x)
        assert not taken
        with cpu.workspace():
            given = block(x)
    whole = multiplied == "library" and Products(dtype).library is not None and activation == "quick_gelu"
    assert taken == (["whole block"] if whole else ["cross_frame_attention", "feed_forward"])
    assert given.dtype == dtype
    assert given.shape == x.shape
    assert error(given, wanted) <= 2 * error(plain, wanted) + torch.finfo(dtype).eps


@pytest.mark.skipif(
    library.instruction_set(torch.float32) is None,
    reason="the library has no products for what torch sees of this CPU",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_library_that_is_missing_or_damaged(dtype, tmp_path, monkeypatch, taken):
    """The reason is told, and a block is computed without the library."""
    file = tmp_path / "libxclip_fast_cpu.so"
    monkeypatch.setattr(library, "FILE", file)
    block, x = random_block().to(dtype), torch.randn(6, 9, 64).to(dtype)
    with torch.no_grad():
        wanted = copy.deepcopy(block).double()(x.double())
        for content, note, reason in (
            (None, None, "no CPU library libxclip_fast_cpu.so in this package (built by pip install where g++ is)"),
            (None, "its build failed at install: no -fopenmp", "in this package: its build failed at install"),
            (b"not a library", None, "does not load"),
        ):
            if content is not None:
                file.write_bytes(content)
            if note is not None:
                file.with_suffix(".failed").write_text(note)
            library.load.cache_clear()
            try:
                assert reason in library.load(library.instruction_set(torch.float32))[1]
                assert error(block(x), wanted) < (1e-6 if dtype == torch.float32 else 2e-2)
            finally:
                library.load.cache_clear()
    assert taken == ["cross_frame_attention", "feed_forward"] * 3


@pytest.mark.skipif(library.functions(torch.float32) is None, reason="needs the CPU library")
def test_a_library_of_another_interface(monkeypatch):
    library.load.cache_clear()
    try:
        monkeypatch.setattr(library, "ABI", -1)
        assert "wanted -1: install again" in library.load("avx2")[1]
        library.load.cache_clear()
        assert "has no functions for avx3, it is an older one: install again" in library.load("avx3")[1]
    finally:
        library.load.cache_clear()


def made_block(width, heads, *, messages=False, dtype=torch.float32, **arguments):
    """The arguments of a block of 6 frames of 9 rows."""
    weights, message = random_block(width, heads)._weights()
    more = (1e-5, "quick_gelu", *message, 3) if messages else ()
    b = kernels.Block(torch.randn(6, 9, width), *weights, heads, *more)._replace(**arguments)
    return as_dtype(b, dtype)


def as_dtype(b, dtype):
    def is_floating(each):
        return isinstance(each, torch.Tensor) and each.is_floating_point()

    return b._replace(**{name: each.detach().to(dtype) for name, each in b._asdict().items() if is_floating(each)})


def packed(width):
    return {"x": torch.randn(54, width), "offsets": torch.tensor([0, 5, 10, 30, 54]), "longest": 24}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "heads", "arguments", "by_library"),
    # by_library: how many of its products are, if it is not computed as a whole
    [
        (64, 2, {}, None),
        (64, 2, {"messages": True}, None),
        (64, 2, {"activation": "gelu"}, 4),
        (64, 2, {"activation": "gelu_tanh", "messages": True}, 7),
        (64, 2, {"causal": True}, 4),
        (64, 2, {"bias": torch.randn(2, 2, 9, 9)}, 4),
        (64, 2, {"rows": torch.tensor([3, 20, 50])}, 4),
        (64, 2, packed(64), 4),
        (64, 16, {"messages": True}, 7),  # 4 channels
        (60, 3, {"messages": True}, 0),
        (60, 3, packed(60), 0),
    ],
    ids=lambda each: "+".join(each) if isinstance(each, dict) else str(each),  # a tensor has another in each process
)
def test_what_the_library_does_not_compute_as_a_whole(width, heads, arguments, by_library, dtype, taken, products):
    if Products(dtype).library is None:
        pytest.skip(str(library.load(library.instruction_set(Products(dtype).dtype))[1]))
    b = made_block(width, heads, dtype=dtype, **arguments)
    with torch.no_grad():
        given, _ = kernels.cct_block(b)
        with kernels.backend("reference"):
            plain, _ = kernels.cct_block(b)
            wanted, _ = kernels.cct_block(as_dtype(b, torch.float64))
    assert ("whole block" in taken) == (by_library is None)
    assert len(products) == (by_library or 0)
    if b.frames:
        given, plain, wanted = given[:, :-1], plain[:, :-1], wanted[:, :-1]
    assert error(given, wanted) <= 2 * error(plain, wanted) + torch.finfo(dtype).eps


def test_a_weight_that_is_a_view_of_another(taken, products):
    if Products(torch.float32).library is None:
        pytest.skip(str(library.load(library.instruction_set(torch.float32))[1]))
    block, x = random_block(), torch.randn(6, 9, 64)
    block.attn.in_proj_weight.data = block.attn.in_proj_weight.data.T.contiguous().T
    with torch.no_grad():
        assert error(block(x), copy.deepcopy(block).double()(x.double())) < 1e-6
    assert taken == ["cross_frame_attention", "feed_forward"]
    assert len(products) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "patch"), [(64, 16), (60, 16), (64, 14)])
def test_patch_embed(width, patch, dtype, multiplied, taken):
    """From pixels, and by the library from levels where it takes the weight."""
    frames = torch.randint(256, (3, 2 * patch, 3 * patch, 3), dtype=torch.uint8)
    weight, position = torch.randn(width, 3, patch, patch) / 48, torch.randn(7, width)
    weights = [x.to(dtype) for x in (weight, torch.randn(width), position, torch.rand(width) + 0.5, torch.randn(width))]

    def given(weights):
        return kernels.patch_embed(frames, *weights, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 1e-5, True)

    with torch.no_grad():
        y, wanted = given(weights), given([x.double() for x in weights])
        with kernels.backend("reference"):
            plain = given(weights)
    assert taken == ["patch_embed"]
    assert y.dtype == dtype
    assert error(y[:, :7], wanted[:, :7]) <= 2 * error(plain[:, :7], wanted[:, :7]) + torch.finfo(dtype).eps


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_memory_of_one_call_serves_the_next():
    resource = pytest.importorskip("resource")
    block, x = random_block(128), torch.randn(15, 300, 128)

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with torch.no_grad(), cpu.workspace():
            for _ in range(3):
                y = block(x)
        assert y.shape == x.shape
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    # 4,500 each time if nothing is kept; the system may take pages back, but not each time
    assert min(faults() for _ in range(4)) < 200


def test_rows_computed_in_parts(monkeypatch, taken):
    block = random_block()
    x = torch.randn(12, 7, 64)
    with torch.no_grad():
        whole = block(x)
        monkeypatch.setattr(cpu, "HIDDEN_BYTES", 4 * 4 * 64 * 20)  # two frames, or twenty rows
        with cpu.workspace():
            assert torch.allclose(block(x), whole, rtol=1e-5, atol=1e-6)


def test_released_layout_and_an_input_that_stays_as_it_is():
    block = random_block()
    released = copy.deepcopy(block)
    released.batch_first = False
    x = torch.randn(6, 5, 64)
    before = x.clone()
    with torch.no_grad():
        assert torch.allclose(released(x.transpose(0, 1).contiguous()).transpose(0, 1), block(x), atol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_of_any_strides(dtype, multiplied):
    block, x = random_block().to(dtype), torch.randn(6, 64, 5).to(dtype).transpose(1, 2)
    for parameter in block.parameters():
        if parameter.dim() == 1:
            parameter.data = torch.stack((parameter.data, parameter.data + 1), 1)[:, 0]
    with torch.no_grad():
        wanted = copy.deepcopy(block).double()(x.double())
        with kernels.backend("reference"):
            plain = block(x.contiguous())
        assert error(block(x), wanted) <= 2 * error(plain, wanted) + torch.finfo(dtype).eps
        ffn = [(block.ln_2.weight, block.ln_2.bias)]
        ffn += [(linear.weight, linear.bias) for linear in (block.mlp.c_fc, block.mlp.c_proj)]
        given, wanted = cpu.feed_forward(x, *ffn, 1e-5), cpu.feed_forward(x.contiguous(), *ffn, 1e-5)
        assert torch.allclose(given, wanted, rtol=1e-5, atol=1e-6)


def test_results_of_any_strides(multiplied):
    """The residual stream of one column-major frame, whose strides the first product's result may take over."""
    block, x = random_block(frames=1), torch.randn(1, 64, 9).transpose(1, 2)
    block.attn.out_proj.weight.data = block.attn.out_proj.weight.data.T.contiguous().T
    ffn = [(block.ln_2.weight, block.ln_2.bias), (block.mlp.c_fc.weight, block.mlp.c_fc.bias)]
    ffn += [(block.mlp.c_proj.weight, block.mlp.c_proj.bias)]
    out = torch.zeros(1, 64, 200)[:, :, :9].transpose(1, 2)
    with torch.no_grad():
        assert error(block(x), copy.deepcopy(block).double()(x.double())) < 1e-6
        wanted = cpu.feed_forward(x.contiguous(), *ffn, 1e-5)
        assert cpu.feed_forward(x, *ffn, 1e-5, out=out) is out
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-6)


def test_sizes_that_do_not_fit_and_empty_ones(multiplied):
    weight, bias = torch.randn(16, 64), torch.randn(16)
    ffn = (torch.ones(64), torch.ones(64)), (torch.randn(256, 64), torch.randn(256)), (torch.randn(64, 256), bias)
    with torch.no_grad(), cpu.workspace():
        for call in (
            lambda: cpu.linear(torch.randn(6, 32), weight, bias),
            lambda: cpu.linear(torch.randn(6, 64), weight, bias[:3]),
            lambda: cpu.feed_forward(torch.randn(6, 32), *ffn, 1e-5),
            lambda: cpu.feed_forward(torch.randn(6, 64), *ffn, 1e-5),  # the last bias
        ):
            with pytest.raises(RuntimeError):
                call()
        assert cpu.linear(torch.randn(0, 64), weight, bias).shape == (0, 16)
        assert cpu.feed_forward(torch.randn(0, 64), *ffn, 1e-5).shape == (0, 64)
        spare = random_block()(Stream(torch.randn(3, 1, 64), True)).x  # frames of a spare row alone
    assert torch.equal(spare, torch.zeros(3, 1, 64))


def test_a_thread_with_a_small_stack():
    block, x, results = random_block(), torch.randn(6, 50, 64), []
    before = threading.stack_size(128 << 10)

    def run():
        with torch.inference_mode():
            results.append(block(x))

    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    with torch.no_grad():
        assert torch.allclose(results[0], block(x), atol=1e-6)


def test_defaults_of_torch_do_not_count(multiplied):
    frames = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    weights = torch.randn(64, 3, 16, 16), torch.randn(64), torch.randn(5, 64), (torch.ones(64), torch.zeros(64))
    with torch.no_grad():
        wanted = cpu.patch_embed(frames, *weights, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 1e-5)
        torch.set_default_dtype(torch.bfloat16)
        try:
            given = cpu.patch_embed(frames, *weights, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 1e-5)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(given, wanted)


def fused_step(block):
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, fused=True)
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def edited_data(block):
    for parameter in block.parameters():
        parameter.data.view(-1)[3] += 1.0  # one element: no sample of a weight would show it


def edited_numpy(block):
    block.mlp.c_fc.weight.detach().numpy()[:, 1] = 0.5


def loaded(block):
    block.load_state_dict(random_block(seed=1).state_dict())


def assigned(block):
    block.load_state_dict(random_block(seed=1).state_dict(), assign=True)


def merged_lora(block):
    for linear in (block.mlp.c_fc, block.mlp.c_proj, block.attn.out_proj):
        linear.weight.data += torch.randn(linear.out_features, 2) @ torch.randn(2, linear.in_features)


def to_half(block):
    block.to(torch.float16)


@pytest.mark.parametrize(
    "change", [fused_step, edited_data, edited_numpy, loaded, assigned, merged_lora, to_half], ids=lambda f: f.__name__
)
def test_changed_weights_count_at_once(change, multiplied):
    block = random_block()
    x = torch.randn(6, 5, 64)
    with torch.no_grad():
        before = block(x)
    change(block)
    with torch.no_grad():
        given = block(x.to(block.ln_1.weight.dtype))
        wanted = copy.deepcopy(block).double()(x.double())
    tolerance = 1e-5 if block.ln_1.weight.dtype == torch.float32 else 5e-3
    assert error(given, wanted) < tolerance
    if change is not to_half:
        assert error(before, wanted) > 1e-3


def test_gradients_autocast_float64_and_transforms_are_left_to_the_differentiable_path(taken):
    block, x = random_block(), torch.randn(6, 5, 64)
    block(x).sum().backward()
    assert block.mlp.c_fc.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        block(x)
    with torch.no_grad():
        block.double()(x.double())
        block.float()
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(block, (x,), (x,))
        torch.func.vmap(lambda x: block(x))(x[None].repeat(2, 1, 1, 1))
        torch.jit.trace(block, x, check_trace=False)
    assert not taken
    block.requires_grad_(False)(x)  # nothing asks for a gradient
    assert taken
    del taken[:]
    assert block(x.clone().requires_grad_()).requires_grad
    assert not taken


def test_compiled_and_exported_blocks_give_the_same_numbers(taken):
    block, x = random_block(), torch.randn(6, 5, 64)
    with torch.no_grad():
        wanted = block(x)
        del taken[:]
        exported = torch.export.export(block, (x,)).module()(x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert not taken
    for given in (exported, compiled):
        assert torch.allclose(given, wanted, rtol=1e-5, atol=1e-5)


def test_threads_copies_and_inference_mode():
    block, x = random_block(), torch.randn(6, 5, 64)
    with torch.no_grad():
        wanted = block(x)
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(twin(x), wanted)
    results = {}
    intra_op = torch.get_num_threads()  # without the library, rounding depends on it

    def run(number):
        torch.set_num_threads(intra_op)
        with torch.inference_mode(), cpu.workspace():
            results[number] = [block(x + number) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for number in range(4):
            wanted = block(x + number)
            assert all(torch.allclose(given, wanted, atol=1e-6) for given in results[number])


def test_a_workspace_ends_with_its_block_and_serves_both_modes():
    block, x = random_block(activation="gelu"), torch.randn(6, 5, 64)  # a whole block of the library needs none of it
    with cpu.workspace():
        with torch.inference_mode():
            first = block(x)
        with torch.no_grad():
            assert torch.equal(block(x), first)
        assert buffers._local.buffers
    assert buffers._local.buffers is None


@pytest.fixture(scope="module")
def model():
    config = VARIANTS["B/32-8f"]
    vision = dataclasses.replace(config.vision, layers=2, width=128, heads=2)
    text = dataclasses.replace(config.text, layers=2)
    torch.manual_seed(0)
    return xclip_fast.XCLIP(dataclasses.replace(config, vision=vision, text=text)).eval()


LABELS = ["swimming", "riding a horse on the beach", "a", "playing the guitar with two friends", "tennis"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_model_against_float64(model, dtype, taken):
    given = copy.deepcopy(model).to(dtype)
    video = torch.randint(256, (2, 8, 224, 224, 3), dtype=torch.uint8)
    with torch.no_grad():
        ours = given(video, LABELS)
        block = "cross_frame_attention" if Products(dtype).library is None else "whole block"
        assert {"patch_embed", block, "feed_forward", "causal_attention_packed"} <= set(taken)
        text = given.encode_text(LABELS)
        given.text.forget()
        with kernels.backend("reference"):
            plain, plain_text = given(video, LABELS), given.encode_text(LABELS)
        exact = copy.deepcopy(given).double()
        wanted, wanted_text = exact(video, LABELS), exact.encode_text(LABELS)
    slack = torch.finfo(dtype).eps
    assert error(ours, wanted) <= 1.5 * error(plain, wanted) + slack
    assert error(text, wanted_text) <= 1.5 * error(plain_text, wanted_text) + slack
    if dtype == torch.float32:
        assert error(ours, wanted) < 1e-5


@pytest.mark.parametrize("cross_frame", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_without_patches_are_the_same(dtype, cross_frame, model, multiplied):
    vision = dataclasses.replace(model.config.vision, cross_frame=cross_frame)
    given = xclip_fast.XCLIP(dataclasses.replace(model.config, vision=vision)).to(dtype).eval()
    video = torch.randint(256, (2, 8, 224, 224, 3), dtype=torch.uint8)
    with torch.no_grad():
        features = given.encode_video(video, patches=False)
        wanted = given.encode_video(video).video.double()
    assert error(features.video, wanted) <= (0 if multiplied == "library" else 2 * torch.finfo(dtype).eps)
    assert features.patches.shape == (2, 0, 512)


def test_normalized_pixels_are_the_same_as_levels(model):
    video = torch.randint(256, (1, 8, 224, 224, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values) for values in (model.config.image_mean, model.config.image_std))
    pixels = ((video / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        for given, wanted in zip(model.encode_video(pixels), model.encode_video(video), strict=True):
            assert torch.allclose(given, wanted, rtol=1e-4, atol=1e-5)


# operations that read nothing, and those whose work is done by another one that is recorded, too
READ_NOTHING = {"empty_like", "new_empty", "to", "select", "slice", "as_strided", "view", "reshape", "resolve_conj"}
READ_NOTHING |= {"permute", "transpose", "t", "unbind", "narrow", "expand", "flatten", "layer_norm"}
READ_NOTHING |= {"split", "split_with_sizes", "_reshape_alias", "unflatten", "scaled_dot_product_attention"}


def large_operations(function, elements):
    """The operations of torch that read as many elements at least, in order."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    return [
        name
        for event in profiler.events()
        if any(torch.Size(shape).numel() >= elements for shape in event.input_shapes if shape)
        and (name := event.name.split("::")[-1]) not in READ_NOTHING
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_block_is_one_call(dtype, taken, products):
    """Nothing else touches the residual stream."""
    if Products(dtype).library is None or Products(dtype).dtype != dtype:
        pytest.skip(str(library.load(library.instruction_set(dtype))[1]))
    block, x = random_block().to(dtype), torch.randn(12, 60, 64).to(dtype)
    stream = Stream(Stream(x).with_spare_row(), True)
    with torch.no_grad(), cpu.workspace():
        assert large_operations(lambda: block(stream), x.numel()) == []
    assert taken == ["whole block"]
    assert not products


def test_passes_over_memory_of_a_block(multiplied, products):
    """The operations that read as much as the stream, in order, of a block that the library does not compute whole."""
    activation = "gelu" if multiplied == "library" else "quick_gelu"
    block, x = random_block(activation=activation), torch.randn(12, 60, 64)
    stream = Stream(Stream(x).with_spare_row(), True)
    with torch.no_grad(), cpu.workspace():
        block(stream)
        del products[:]
        called = large_operations(lambda: block(stream), x.numel())
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    if multiplied == "library":  # one call rewrites x (LayerNorm is in it) and multiplies
        assert [rows for rows in products if rows >= 12 * 60] == [12 * 61, 12 * 60, 12 * 60, 12 * 60]
        assert called == [flash, "gelu_"]
    elif multiplied == "torch":  # copy_ inside a product fills it with its bias; add writes the residual
        product, normed = ["addmm", "copy_"], "native_layer_norm"
        assert called == [normed, *product, flash, *product, "add", normed, *product, "silu_", *product, "add"]
    else:
        product, normed = "_linear_pointwise", "native_layer_norm"
        assert called == [normed, product, flash, product, "add", normed, product, product, "mul_", "add"]


def test_a_model_may_be_trained_between_two_inferences(model):
    trained = copy.deepcopy(model)
    video = torch.randint(256, (1, 8, 224, 224, 3), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, fused=True)
    with torch.no_grad():
        before = trained(video, LABELS)
    trained.train()(video, LABELS).logsumexp(1).sum().backward()
    with torch.no_grad():
        trained.eval()(video, LABELS)  # metrics between backward and step
        trained.train()
    optimizer.step()
    with torch.no_grad():
        after, wanted = trained.eval()(video, LABELS), copy.deepcopy(trained).double()(video, LABELS)
    assert error(after, wanted) < 1e-4
    assert error(before, wanted) > 1e-3


@pytest.mark.skipif(NATIVE_ON_CPU[torch.bfloat16], reason="this CPU has bfloat16 instructions")
def test_half_precision_is_rounded_once_where_the_cpu_has_no_instructions_for_it():
    assert Products(torch.bfloat16).dtype == torch.float32


def test_float16_is_computed_in_float32_by_the_library_where_the_cpu_has_no_tiles_for_it():
    if library.functions(torch.float32) is None:
        pytest.skip(library.load(library.instruction_set(torch.float32))[1])
    expected = torch.float16 if torch.cpu._is_amx_fp16_supported() else torch.float32
    assert Products(torch.float16).dtype == expected
