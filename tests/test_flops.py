"""Counted multiply-adds against the paper's Table 1 and torch's own counter."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small import CONFIG
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import xclip_fast
from xclip_fast.config import PAPER_TABLE1, VARIANTS, TextConfig
from xclip_fast.flops import Flops, count, products, table
from xclip_fast.weights.huggingface import config_to_huggingface

TINY = dataclasses.replace(CONFIG, text=TextConfig(width=64, layers=3, heads=1))


def labels_of(lengths, context=77):
    """Token rows (K, longest) that are `lengths` long."""
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = 7
        row[0], row[length - 1] = 49406, 49407
    return tokens


def counted_by_torch(call):
    """Multiply-adds as torch sees them. Attention runs as plain products: torch does not count the CPU's fused one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", PAPER_TABLE1)
def test_paper_way_gives_table_1(name):
    assert count(VARIANTS[name]).total / 1e9 == pytest.approx(PAPER_TABLE1[name].gflops, rel=5e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_actual_equals_torch_on_the_full_model(name):
    config = VARIANTS[name]
    lengths = [3, 12, 5, 5, 77]
    with torch.device("meta"):  # shapes only: no memory, no work
        model = xclip_fast.XCLIP(config).eval()
        size = config.vision.image_size
        video = torch.empty(2, config.num_frames, size, size, 3, dtype=torch.uint8)
    flops = count(config, labels=lengths, batch=2, counting="actual")
    for backend in ("auto", "reference"):
        with xclip_fast.backend(backend):
            expected = counted_by_torch(lambda: model(video, labels_of(lengths)))
        assert flops.total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("batch", "frames"), [(1, 3), (2, 5), (3, 1)])
@torch.no_grad()
def test_actual_equals_torch_on_a_real_forward(batch, frames):
    model = xclip_fast.XCLIP(TINY).eval()
    video = torch.randint(256, (batch, frames, 32, 32, 3), dtype=torch.uint8)
    lengths = [4, 9, 6, 3]
    flops = count(TINY, frames=frames, labels=lengths, batch=batch, counting="actual")
    assert counted_by_torch(lambda: model(video, labels_of(lengths))) == flops.total
    # the label set is cached by now: what is left is the rest
    assert counted_by_torch(lambda: model(video, labels_of(lengths))) == flops.total - flops.text
    assert counted_by_torch(lambda: model.encode_video(video)) == flops.video
    assert counted_by_torch(lambda: model.encode_text(labels_of(lengths[::-1]))) == flops.text


def test_parts_equal_torch_by_module():
    model = xclip_fast.XCLIP(TINY).eval()
    video = torch.randint(256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    flops = count(TINY, labels=[4, 9], batch=2, counting="actual")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(video, labels_of([4, 9]))
    by_module = {name: sum(counts.values()) / 2 for name, counts in counter.get_flop_counts().items()}
    blocks = sum(by_module[f"XCLIP.visual.transformer.resblocks.{layer}"] for layer in range(2))
    cct = ("message_kv", "ln_linear", "diffusion_attention", "linear_residual", "mlp")
    assert blocks == sum(getattr(flops, part) for part in cct)
    assert by_module["XCLIP.visual"] - blocks == flops.patch_embed
    assert by_module["XCLIP.mit"] == flops.mit
    assert by_module["XCLIP.prompts_generator"] == flops.prompts
    assert by_module["XCLIP.text"] == flops.text


@pytest.mark.parametrize(("config", "labels"), [(TINY, 3), (VARIANTS["B/16-8f"], 1)], ids=["tiny", "B/16-8f"])
def test_paper_way_equals_torch_on_the_released_model(config, labels):
    transformers = pytest.importorskip("transformers")

    settings = transformers.XCLIPConfig(**config_to_huggingface(config, torch.float32)[0])
    size = config.vision.image_size
    with torch.device("meta"):
        model = transformers.XCLIPModel(settings).eval()
        video = torch.empty(2, config.num_frames, 3, size, size)
        tokens = torch.ones(labels, 77, dtype=torch.long)
    expected = counted_by_torch(lambda: model(input_ids=tokens, pixel_values=video))
    assert count(config, labels=labels, batch=2).total == pytest.approx(expected, rel=1e-6)


def test_parts_add_up():
    flops = count(VARIANTS["B/16-8f"], labels=400)
    assert flops.to_dict()["total"] == flops.total == sum(dataclasses.astuple(flops))
    assert flops.video + flops.text + flops.prompts + flops.similarity == flops.total
    assert all(amount > 0 for amount in dataclasses.astuple(flops))
    assert Flops().total == 0


def test_the_readme_has_this_table():
    lines = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    for row in table():
        name = row["variant"].replace("-", " ").replace("Florence", "X-Florence")
        cells = [f"{row[column]:.1f}" for column in ("counted", "ours_1", "ours_400", "padded_400")]
        assert f"| {name} | {row['paper']:.0f} | {' | '.join(cells)} |" in lines


def test_text_attention_is_square_and_the_rest_linear():
    one, two = (count(TINY, labels=[length], counting="actual").text for length in (10, 20))
    attention = 2 * 3 * 10 * 10 * 64  # q k^T and weights by v, of three layers
    projection = 64 * 64 * (1 + 1 + 8)  # of the end alone: to E, and the last block past its attention
    assert two - projection - 4 * attention == 2 * (one - projection - attention)


def test_weight_products_leave_attention_out():
    weights = sum(product.multiply_adds for product in products(TINY, counting="actual") if product.weight)
    flops = count(TINY, counting="actual")
    assert flops.total - flops.diffusion_attention > weights > 0.5 * flops.total


def test_table_has_every_row():
    rows = table()
    assert [row["variant"] for row in rows] == list(PAPER_TABLE1)
    for row in rows:
        assert row["ours_1"] < row["counted"] < row["ours_400"] < row["padded_400"]
        assert row["parts"]["total"] == row["ours_1"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"frames": 0},
        {"labels": 0},
        {"labels": []},
        {"labels": [78]},
        {"labels": [3, 0]},
        {"counting": "x"},
    ],
)
def test_wrong_arguments_say_so(wrong):
    with pytest.raises(ValueError, match="wanted"):
        count(TINY, **wrong)
