"""The CPU library (csrc/cpu) by each instruction set that this CPU has, against float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from small import error
from xclip_fast.kernels.cpu import library

from xclip_fast import FastCCTBlock, kernels

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
LINEAR = ("message_fc", "message_in", "message_out", "in", "out", "fc", "projection")
NORMS = ("message_ln", "ln_1", "ln_2")


def missing(name):
    """Why an instruction set cannot run here, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    has = capability == "AVX512" or (capability == "AVX2" and name == "avx2")
    if name not in ("avx2", "avx512"):
        has = has and torch.cpu._is_avx512_bf16_supported()
    if name.startswith("amx"):
        has = has and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    return library.load(name)[1] if has else f"torch finds no {name} on this CPU"


@pytest.fixture(params=library.SETS)
def here(request, monkeypatch):
    """The functions of one instruction set, as those that are chosen for their dtype."""
    if missing(request.param):
        pytest.skip(missing(request.param))
    found, _ = library.load(request.param)
    monkeypatch.setattr(library, "instruction_set", lambda dtype: request.param if dtype == found.dtype else None)
    return found


@pytest.fixture
def by_threads():
    """Calls a function with 1, 2 and 3 threads. Its results are the same bits, and the first is returned."""
    before = torch.get_num_threads()

    def call(function):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(function())
        torch.set_num_threads(1)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        return results[0]

    yield call
    torch.set_num_threads(before)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def panels(rows, width, dtype):
    return poisoned(library.panel_size(rows, width, dtype), dtype=dtype)


def as_exact_as_torch(given, composed, dtype):
    wanted = composed(torch.float64)
    assert given.dtype == dtype
    assert error(given, wanted) <= 2 * error(composed(dtype), wanted) + torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("frames", "length", "inputs", "outputs"),
    # in units: full panels and parts of one, some panels of a task, K in one part and in several
    [(1, 1, 1, 1), (2, 4, 25, 13), (3, 13, 145, 3), (1, 17, 49, 6), (7, 29, 3, 49), (2, 15, 112, 5), (5, 100, 2, 2)],
)
def test_products(frames, length, inputs, outputs, here, by_threads):
    """LayerNorm, another last row, residual and strides; then a product of what quick_gelu left in panels."""
    width, columns, rows = inputs * here.unit, outputs * here.unit, frames * length

    def draw(*shape):
        return torch.randn(shape).to(here.dtype)

    weight, bias = draw(columns, width) * width**-0.5, draw(columns)
    norm = draw(width), draw(width), 1e-5
    x = draw(frames, length + 1, 2 * width)[:, :-1, width:] + 1
    x = torch.cat((x, x), 2)[..., width:]  # strides of its own
    last, residual = draw(frames, width), draw(frames, length, columns)
    whole = x.clone()
    whole[:, -1] = last

    def product():
        y = poisoned(frames, length + 1, columns, dtype=here.dtype)
        y[:, :-1] = residual  # which is overwritten
        given = dict(x=x, norm=norm, last=last, residual=y[:, :-1])
        library.product(rows, panels(rows, width, here.dtype), weight, bias, y=y[:, :-1], **given)
        assert y[:, -1].isnan().all()
        return y[:, :-1]

    def composed(dtype):
        normed = F.layer_norm(whole.to(dtype), (width,), norm[0].to(dtype), norm[1].to(dtype), norm[2])
        return F.linear(normed, weight.to(dtype), bias.to(dtype)) + residual.to(dtype)

    y = by_threads(product)
    as_exact_as_torch(y, composed, here.dtype)
    alone = poisoned(1, length, columns, dtype=here.dtype)
    given = dict(x=x[:1], norm=norm, last=last[:1], residual=residual[:1])
    library.product(length, panels(length, width, here.dtype), weight, bias, y=alone, **given)
    assert torch.equal(alone, y[:1])

    back = draw(width, columns) * columns**-0.5

    def mlp():
        hidden, y = panels(rows, columns, here.dtype), poisoned(frames, length, width, dtype=here.dtype)
        library.product(rows, panels(rows, width, here.dtype), weight, bias, x=x, y_panels=hidden)
        library.product(rows, hidden, back, norm[1], y=y, residual=x)
        return y

    def composed_mlp(dtype):
        u = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return F.linear(u * torch.sigmoid(1.702 * u), back.to(dtype), norm[1].to(dtype)) + x.to(dtype)

    as_exact_as_torch(by_threads(mlp), composed_mlp, here.dtype)


def test_a_product_of_the_largest_k_of_x_clip(here):
    """The second one of a feed-forward part in L/14."""
    x, weight = torch.randn(394, 4096).to(here.dtype), (torch.randn(192, 4096) / 64).to(here.dtype)
    bias, y = torch.randn(192).to(here.dtype), poisoned(394, 192, dtype=here.dtype)
    library.product(394, panels(394, 4096, here.dtype), weight, bias, x=x, y=y)
    as_exact_as_torch(y, lambda dtype: F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)), here.dtype)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_of_float32_rows(half, here):
    weight = torch.randn(72 * here.unit, 37 * here.unit).to(half)
    if here.dtype != torch.float32:
        assert not library.takes(here.dtype, weight.to(torch.float16))
        pytest.skip("its rows are not float32")
    assert library.takes(here.dtype, weight)
    x, results = torch.randn(39, weight.shape[1]), []
    for each in (weight, weight.float()):
        y = poisoned(39, len(weight), dtype=torch.float32)
        library.product(39, panels(39, x.shape[1], torch.float32), each, torch.zeros(len(weight)), x=x, y=y)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize("inputs", [1, 25])
def test_a_residual_that_is_the_same_for_all_frames(inputs, here, by_threads):
    width, columns, frames, length = inputs * here.unit, 3 * here.unit, 3, 13

    def draw(*shape):
        return torch.randn(shape).to(here.dtype)

    x, weight, bias = draw(frames * length, width), draw(columns, width) * width**-0.5, draw(columns)
    residual = draw(length, columns).expand(frames, -1, -1)

    def product():
        y = poisoned(frames, length, columns, dtype=here.dtype)
        room = panels(frames * length, width, here.dtype)
        library.product(frames * length, room, weight, bias, x=x, y=y, residual=residual)
        return y

    def composed(dtype):
        y = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return y.view(frames, length, -1) + residual.to(dtype)

    as_exact_as_torch(by_threads(product), composed, here.dtype)


def test_quick_gelu_at_the_ends(here):
    u = [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 3e4, -3e4, 1e38, float("nan"), -5.0, 51.0, -1e38]
    u = torch.tensor(u, dtype=here.dtype)[:, None].repeat(1, here.unit)
    weight, bias = torch.eye(here.unit, dtype=here.dtype), torch.zeros(here.unit, dtype=here.dtype)
    hidden, y = panels(*u.shape, here.dtype), torch.empty_like(u)
    library.product(len(u), panels(*u.shape, here.dtype), weight, bias, x=u, y_panels=hidden)
    library.product(len(u), hidden, weight, bias, y=y)
    wanted = u.double() * torch.sigmoid(1.702 * u.double())
    rtol = 1e-6 if here.dtype == torch.float32 else 2**-8
    assert torch.allclose(y[:-1].double(), wanted[:-1], rtol=rtol, atol=1e-30, equal_nan=True)
    assert (y[-1].abs() < 1e-7).all()


@pytest.mark.parametrize(("patch", "height", "width"), [(16, 32, 48), (14, 28, 14), (7, 21, 35)])
def test_patches(patch, height, width, here, by_threads):
    if here.dtype != torch.float32:
        pytest.skip("pixels are rewritten to float32")
    frames = torch.randint(256, (3, height, width, 3), dtype=torch.uint8)
    frames.view(-1)[:768] = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)  # every level of every channel
    rows, columns = 3 * height * width // patch**2, 3 * patch**2

    def normalized():
        out = poisoned(rows, columns, dtype=torch.float32)
        library.patches(frames, patch, MEAN, STD, out)
        return out

    pixels = (frames.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    wanted = F.unfold(pixels.permute(0, 3, 1, 2), patch, stride=patch).transpose(1, 2).reshape(rows, columns)
    assert torch.allclose(by_threads(normalized).double(), wanted, rtol=0, atol=2.0**-21)  # values of up to 4


def random_block(sequences, rows, channels, frames, here, heads=2):
    """A block with messages, or without any if ``frames`` is 0; and its x (sequences, rows, D)."""
    module = FastCCTBlock(heads * channels, heads, 1)

    def drawn(parameters):
        for parameter in parameters:
            scale = 0.5 if parameter.dim() == 1 else 1.5 * parameter.shape[1] ** -0.5
            yield (torch.randn(parameter.shape) * scale).to(here.dtype)

    weights, message = map(drawn, module._weights())
    x = torch.randn(sequences, rows, heads * channels).to(here.dtype)
    return kernels.Block(x, *weights, heads, *((1e-5, "quick_gelu", *message, frames) if frames else ()))


def run(b, x=None, y=None, part=None):
    x = b.x if x is None else x
    y = poisoned(*x.shape, dtype=x.dtype) if y is None else y
    parameters = [getattr(b, f"{name}_{kind}") for name in (*LINEAR, *NORMS) for kind in ("weight", "bias")]
    library.block(x, y, b.heads, b.frames, part or len(x), b.eps, parameters)
    return y


def by_reference(b, dtype):
    b = b._replace(**{name: each.to(dtype) for name, each in b._asdict().items() if isinstance(each, torch.Tensor)})
    with kernels.backend("reference"), torch.no_grad():
        y, _ = kernels.cct_block(b)
    return y[:, :-1] if b.frames else y


@pytest.mark.parametrize("has_messages", [True, False])
@pytest.mark.parametrize("channels", ["one unit", "64", "more"])
@pytest.mark.parametrize(
    ("videos", "frames", "rows"),
    [(30, 1, 2), (4, 3, 5), (2, 2, 17), (1, 5, 50), (2, 3, 51), (1, 40, 3), (1, 2, 198), (1, 1, 578)],
)
def test_blocks(videos, frames, rows, channels, has_messages, here):
    channels = {"one unit": here.unit, "64": 64, "more": 96 if here.unit == 32 else 80}[channels]
    b = random_block(videos * frames, rows, channels, frames * has_messages, here)
    y, tokens = run(b), rows - has_messages
    as_exact_as_torch(y[:, :tokens], lambda dtype: by_reference(b, dtype), here.dtype)
    assert torch.equal(y[:, tokens:], torch.zeros_like(y[:, tokens:]))
    assert torch.equal(run(b, y=poisoned(len(y), y.shape[2], dtype=y.dtype)), y[:, 0])


def test_sizes_of_blocks_and_patches_that_do_not_fit(here):
    b = random_block(6, 5, 64, 3, here)
    changes = [{"frames": 4}, {"heads": 3}, {"fc_bias": b.fc_bias[:32]}, {"ln_1_weight": b.ln_1_weight[:64]}]
    changes += [{"in_weight": b.in_weight[:192]}, {"projection_weight": b.projection_weight[:, :256]}]
    changes += [{"message_fc_weight": b.message_fc_weight[:64]}, {"message_ln_bias": None}]
    for change in changes:
        with pytest.raises(RuntimeError, match="wanted"):
            run(b._replace(**change))
    with pytest.raises(RuntimeError, match="wanted"):
        run(b, y=b.x[:5, 0])
    room = torch.empty(4 * 4, 3 * 16 * 16 * 4 // here.dtype.itemsize, dtype=here.dtype)
    for shape in ((4, 48, 32, 3), (4, 32, 40, 3), (3, 32, 32, 3), (3, 32, 32, 4)):
        with pytest.raises(RuntimeError, match="wanted"):
            library.patches(torch.zeros(shape, dtype=torch.uint8), 16, MEAN, STD, room)
    with pytest.raises(RuntimeError, match="2 means"):
        library.patches(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), 16, MEAN[:2], STD[:2], room)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_half_precision_weights(half, here):
    if here.dtype != torch.float32:
        pytest.skip("its rows are not float32")
    b = random_block(6, 18, 64, 3, here)
    weights = {f"{name}_weight": getattr(b, f"{name}_weight").to(half) for name in LINEAR}
    assert library.takes(here.dtype, *weights.values())
    wide = {name: weight.float() for name, weight in weights.items()}
    assert torch.equal(run(b._replace(**weights)), run(b._replace(**wide)))


@pytest.mark.parametrize("frames", [0, 3])
def test_a_block_does_not_depend_on_threads_parts_batch_and_strides(frames, here, by_threads):
    b = random_block(9, 35, 64, frames, here)
    y = by_threads(lambda: run(b))
    for part in (1, 2, 5, 8):
        assert torch.equal(run(b, part=part), y)
        assert torch.equal(run(b, y=torch.empty_like(y[:, 0]), part=part), y[:, 0])
    assert torch.equal(run(b, b.x[3:6]), y[3:6])  # one video of three
    room, memory = (poisoned(9, 38, 2 * b.x.shape[2], dtype=here.dtype) for _ in range(2))
    x, strided = (each[:, 2:-1, : b.x.shape[2]] for each in (room, memory))
    x.copy_(b.x)
    run(b, x, strided)
    assert torch.equal(strided, y)
    strided.fill_(float("nan"))
    assert memory.isnan().all()  # nothing was written beside y
    columns = b.x.transpose(0, 1).contiguous().transpose(0, 1)  # (S, F, D)
    assert torch.equal(run(b, columns, torch.empty_like(columns)), y)


def test_what_nan_spoils(here):
    """A video whose class token is NaN, a frame whose other token is, and nothing beyond; the spare row is not read."""
    b, nan = random_block(9, 35, 64, 3, here), float("nan")
    y = run(b)

    def spoiled(b, frame, row):
        x = b.x.clone()
        x[frame, row] = nan
        return run(b, x)

    assert torch.equal(spoiled(b, slice(None), -1), y)
    video = spoiled(b, 4, 0)
    assert video[3:6, :-1].isnan().all()
    assert torch.equal(video[:3], y[:3])
    assert torch.equal(video[6:], y[6:])
    frame = spoiled(b, 4, 17)
    assert frame[4, :-1].isnan().all()
    assert torch.equal(frame[[0, 1, 2, 3, 5, 6, 7, 8]], y[[0, 1, 2, 3, 5, 6, 7, 8]])
    plain = random_block(9, 35, 64, 0, here)
    y, frame = run(plain), spoiled(plain, 4, 34)
    assert frame[4].isnan().all()
    assert torch.equal(frame[[0, 1, 2, 3, 5, 6, 7, 8]], y[[0, 1, 2, 3, 5, 6, 7, 8]])


CHOSEN = """
import torch
import xclip_fast
from xclip_fast.kernels.cpu import library

print(*(library.instruction_set(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)))
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        block = xclip_fast.FastCCTBlock(64, 2, 3, batch_first=True).to(dtype)
        x = torch.randn(6, 5, 64).to(dtype)
        wanted = block.double()(x.double())
        assert torch.allclose(block.to(dtype)(x).double(), wanted, rtol=0.03, atol=0.03), dtype
"""


@pytest.mark.skipif(missing("avx2") is not None, reason=str(missing("avx2")))
@pytest.mark.parametrize(("capability", "chosen"), [("avx2", "avx2 None None"), ("default", "None None None")])
def test_the_library_follows_the_capability_of_torch(capability, chosen):
    """Whoever holds torch back from AVX-512 (the frequency drops on some CPUs) holds this library back, too."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", CHOSEN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == chosen, done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
