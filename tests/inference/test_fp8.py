"""``XCLIP.quantize``: what it does to a model, what it refuses, and how close its answers stay (emulated on a CPU)."""

import copy
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import rough
from torch import Tensor
from xclip_fast.kernels import quantize_weight

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig, kernels, tokenize
from xclip_fast.inference import fp8 as quantization
from xclip_fast.inference.cuda_graphs import _Tower

TOKENS = tokenize(["riding a bike", "swimming", "playing the accordion while walking", "yoga", "a dog", "juggling"])
GATE = 0.999  # cosine of the logits with those of bfloat16
NEAR = 0.99  # the same of the tiny model, whose sums are short


def videos(model: XCLIP, batch: int = 2) -> Tensor:
    size = model.config.vision.image_size
    return torch.randint(0, 256, (batch, model.config.num_frames, size, size, 3), dtype=torch.uint8)


def blocks(model: XCLIP) -> list[Any]:
    return list(model.visual.transformer.resblocks)


def logits(model: XCLIP, video: Tensor, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model(video, tokens).float()


def cosine(a: Tensor, b: Tensor) -> float:
    """The least of any video's."""
    return float(F.cosine_similarity(a, b, dim=1).min())


@pytest.fixture
def quantized(tiny_model: XCLIP) -> XCLIP:
    return tiny_model.quantize("fp8", calibration=videos(tiny_model))


# ---- what it does


def test_three_weights_of_a_block_are_quantized_and_nothing_is_lost(tiny_model: XCLIP, tmp_path: Path) -> None:
    video = videos(tiny_model)
    before, state = logits(tiny_model, video), {name: t.clone() for name, t in tiny_model.state_dict().items()}
    assert tiny_model.quantized is None
    assert tiny_model.train().quantize("fp8", calibration=video) is tiny_model
    assert tiny_model.quantized == "fp8"
    assert not tiny_model.training
    for block in blocks(tiny_model):
        given = (block.attn.in_proj_weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)
        factors = (1.0, 1.0, block.fp8.hidden_scale)
        for name, weight, factor in zip(("qkv", "fc", "projection"), given, factors, strict=True):
            weight8, scale = quantize_weight(weight)
            assert torch.equal(getattr(block.fp8, name).float(), weight8.float())
            torch.testing.assert_close(getattr(block.fp8, f"{name}_scale"), scale * factor)
    after = logits(tiny_model, video)
    assert not torch.equal(after, before)
    assert cosine(after, before) > NEAR
    found = tiny_model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    tiny_model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(XCLIP.from_pretrained(tmp_path), video), before
    )  # read tensors may be aligned otherwise
    assert tiny_model.dequantize() is tiny_model
    assert tiny_model.quantized is None
    assert torch.equal(logits(tiny_model.dequantize(), video), before)


def test_static_scales_are_what_the_videos_need(tiny_model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = videos(tiny_model), videos(tiny_model, 1)
    seen: list[float] = []

    def watched(block: kernels.Block) -> tuple[Tensor, None]:
        def apply(name: str, x: Tensor) -> Tensor:
            u = kernels.own_linear(block, name, x)
            if name == "fc" and block.frames:
                kept = u[:, :-1]  # nobody reads the spare row
                seen.append(float((kept * torch.sigmoid(1.702 * kept)).abs().max()))
            return u

        return kernels.composed(block, apply), None

    with monkeypatch.context() as context, torch.no_grad():
        context.setattr(kernels, "cct_block", watched)
        tiny_model.encode_video(first)
        tiny_model.encode_video(second)
    largest = [max(seen[layer], seen[layer + 2]) for layer in range(2)]
    tiny_model.quantize("fp8", calibration=(video for video in (first, second)))
    found = [block.fp8.hidden_scale for block in blocks(tiny_model)]
    assert found == pytest.approx([quantization.MARGIN * value / 448 for value in largest], rel=1e-4)
    assert all(not block._forward_pre_hooks for block in blocks(tiny_model))
    config = tiny_model.config
    mean, deviation = torch.tensor(config.image_mean), torch.tensor(config.image_std)
    pixels = ((torch.cat([first, second]) / 255 - mean) / deviation).permute(0, 1, 4, 2, 3)
    for given in ([first, second], torch.cat([first, second]), [first[:0], pixels]):
        tiny_model.dequantize().quantize("fp8", calibration=given)
        assert [block.fp8.hidden_scale for block in blocks(tiny_model)] == pytest.approx(found, rel=1e-4)


def test_a_layer_without_activations_has_the_scale_one(tiny_model: XCLIP) -> None:
    with torch.no_grad():
        for parameter in blocks(tiny_model)[1].mlp.c_fc.parameters():
            parameter.zero_()
    video = videos(tiny_model)
    before = logits(tiny_model, video)
    tiny_model.quantize("fp8", calibration=video)
    assert blocks(tiny_model)[1].fp8.hidden_scale == 1.0
    assert cosine(logits(tiny_model, video), before) > NEAR


def test_it_survives_moving_copying_and_saving_of_the_module(quantized: XCLIP) -> None:
    video = videos(quantized)
    wanted = logits(quantized, video)
    buffer = io.BytesIO()
    torch.save(quantized, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(quantized), torch.load(buffer, weights_only=False), quantized.to("cpu").float()):
        assert twin.quantized == "fp8"
        assert torch.equal(logits(twin, video), wanted)
    low = copy.deepcopy(quantized).bfloat16()
    for old, new in zip(blocks(quantized), blocks(low), strict=True):
        for (name, a), (_, b) in zip(old.fp8.named_buffers(), new.fp8.named_buffers(), strict=True):
            assert a.dtype == b.dtype == (torch.float32 if "scale" in name else torch.float8_e4m3fn)
            assert torch.equal(a.float(), b.float())
        assert new.attn.in_proj_weight.dtype == torch.bfloat16
    assert cosine(logits(low, video), wanted) > NEAR
    assert all(buffer.device.type == "meta" for buffer in blocks(low.to("meta"))[0].fp8.buffers())


def test_it_compiles_in_one_graph(shallow_model: XCLIP) -> None:
    """Also a model that was compiled, and run, before it was quantized."""
    video = videos(shallow_model)
    torch._dynamo.reset()
    compiled = torch.compile(shallow_model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for change in (lambda: None, lambda: shallow_model.quantize("fp8", calibration=video)):
            change()
            torch.testing.assert_close(compiled(video, TOKENS), shallow_model(video, TOKENS), rtol=1e-4, atol=1e-4)


def test_cuda_graphs_notice_it(tiny_model: XCLIP) -> None:
    tower = _Tower(tiny_model)
    for change in (lambda: tiny_model.quantize("fp8", calibration=videos(tiny_model)), tiny_model.dequantize):
        assert tower.change() is None
        change()
        assert tower.change() == "the module fp8 was replaced"
        tower = _Tower(tiny_model)


def test_a_block_with_tokens_first_is_the_same(quantized: XCLIP) -> None:
    block = blocks(quantized)[0]
    x = torch.randn(6, 9, quantized.config.vision.width)
    with torch.inference_mode():
        wanted = block(x)
        block.batch_first = False
        torch.testing.assert_close(block(x.transpose(0, 1)).transpose(0, 1), wanted)


# ---- what it refuses


def test_training_and_gradients_are_refused(quantized: XCLIP) -> None:
    video = videos(quantized)
    with pytest.raises(RuntimeError, match=r"inference only.*inference_mode"):
        quantized(video, TOKENS)
    with pytest.raises(RuntimeError, match=r"inference only: call eval\(\), or dequantize\(\)"), torch.no_grad():
        quantized.train()(video, TOKENS)
    assert quantized.dequantize()(video, TOKENS).requires_grad


def test_changes_of_the_weights_are_refused(quantized: XCLIP) -> None:
    state = quantized.state_dict()
    kept = state["visual.conv1.weight"].clone()
    state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for change, name in ((quantized.load_state_dict, "load_state_dict"), (quantized.expand_from, "expand_from")):
        with pytest.raises(RuntimeError, match=rf"{name} changes weights.*dequantize\(\) it first"):
            change(state)
    assert torch.equal(quantized.visual.conv1.weight, kept)
    quantized.dequantize().load_state_dict(state)


def test_wrong_calls_leave_the_model_as_it_was(tiny_model: XCLIP) -> None:
    video = videos(tiny_model)
    before = logits(tiny_model, video)
    pixels = torch.randn(1, 3, 3, 32, 32)
    pixels[0, 1, 2, 3, 4] = torch.nan
    cases: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "calibration has no video"),
        (video[:0], ValueError, "calibration has no video"),
        (None, TypeError, "calibration is a NoneType; a batch of videos, or an iterable of batches, wanted"),
        (["clip.mp4"], TypeError, "video is a str"),
        (video[0], ValueError, r"video of shape \(3, 32, 32, 3\)"),
        ([video, pixels], ValueError, "reach from nan to nan"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            tiny_model.quantize("fp8", calibration=given)
        assert tiny_model.quantized is None
        assert all(not block._forward_pre_hooks for block in blocks(tiny_model))
    with pytest.raises(ValueError, match="mode 'int8' given; 'fp8' wanted"):
        tiny_model.quantize("int8", calibration=video)  # type: ignore[arg-type]
    assert torch.equal(logits(tiny_model, video), before)
    tiny_model.quantize("fp8", calibration=video)
    with pytest.raises(RuntimeError, match=r"quantized to fp8 already; to calibrate it again, dequantize\(\) it"):
        tiny_model.quantize("fp8", calibration=video)


def test_weights_that_are_not_finite_are_named(tiny_model: XCLIP) -> None:
    video = videos(tiny_model)
    with torch.no_grad():  # where no calibration video shows it: a channel that quick_gelu closes
        blocks(tiny_model)[1].mlp.c_proj.weight[3, 5] = torch.inf
        with pytest.raises(ValueError, match="block 1 of the vision tower: the weight projection holds NaN"):
            tiny_model.quantize("fp8", calibration=video)
    assert tiny_model.quantized is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"cross_frame": False}, "plain blocks"), ({"activation": "gelu"}, "the activation 'gelu'")],
)
def test_other_encoders_are_refused(tiny_config: XCLIPConfig, changes: dict[str, Any], message: str) -> None:
    vision = dataclasses.replace(tiny_config.vision, **changes)
    model = XCLIP(dataclasses.replace(tiny_config, vision=vision))
    with pytest.raises(ValueError, match=message):
        model.quantize("fp8", calibration=videos(model))
    assert model.dequantize().quantized is None


# ---- how close it stays


@pytest.fixture(scope="module")
def wide() -> tuple[XCLIP, Tensor, Tensor]:
    """B/16's width, four layers deep, in bfloat16, with outliers as CLIP has them: its logits for three videos.

    Random weights at CLIP's initialization, norms and biases moved by 0.1. In each LayerNorm of a block three channels,
    the same in all, have their gain times 10, 25 and 50; three other channels of the residual stream are pushed by
    10, 25 and 50 of its deviations, by the embedding of every token, and by 30 % of it more in each block.
    """
    torch.manual_seed(0)
    vision = VisionConfig(image_size=64, patch_size=16, width=768, layers=4, heads=12)
    model = XCLIP(XCLIPConfig(vision=vision, text=TextConfig(width=64, layers=1, heads=1), num_frames=4)).eval()
    gains, shifts = torch.randperm(768)[:6].split(3)
    rough(model)
    with torch.no_grad():
        size = torch.tensor([10.0, -25.0, 50.0])
        model.visual.ln_pre.bias[shifts] += size
        for block in blocks(model):
            block.ln_1.weight[gains] *= size.abs()
            block.ln_2.weight[gains] *= size.abs()
            block.mlp.c_proj.bias[shifts] += 0.3 * size
    model.bfloat16()
    video = videos(model, 3)
    return model, video, logits(model, video)


@pytest.fixture
def calibrated(wide: tuple[XCLIP, Tensor, Tensor]) -> Iterator[XCLIP]:
    yield wide[0].quantize("fp8", calibration=videos(wide[0]))
    wide[0].dequantize()


def test_logits_stay_close_with_outlier_channels(wide: tuple[XCLIP, Tensor, Tensor], calibrated: XCLIP) -> None:
    _, video, exact = wide
    found = cosine(logits(calibrated, video), exact)
    print(f"cosine of the logits: {found:.6f}")
    assert found >= GATE


@pytest.mark.parametrize("bad", ["hidden saturates", "hidden not folded", "qkv scale", "fc scale"])
def test_a_bad_scale_fails_the_gate(bad: str, wide: tuple[XCLIP, Tensor, Tensor], calibrated: XCLIP) -> None:
    _, video, exact = wide
    for block in blocks(calibrated):
        fp8 = block.fp8
        if bad == "hidden saturates":
            fp8.hidden_scale /= 64
            fp8.projection_scale /= 64
        elif bad == "hidden not folded":
            fp8.projection_scale /= fp8.hidden_scale
        else:
            getattr(fp8, bad.replace(" ", "_")).mul_(2)
    found = cosine(logits(calibrated, video), exact)
    print(f"{bad}: {found:.6f}")
    assert found < GATE


LABELS = ["growing", "shrinking", "red then blue", "blue then red"]


def clips(seed: int, count: int) -> tuple[Tensor, Tensor]:
    pytest.importorskip("av", reason="av is not installed")
    from xclip_fast.data.motion import render

    frames = [
        torch.from_numpy(render(label, seed, n, frames=4, size=(32, 32))) for n in range(count) for label in LABELS
    ]
    return torch.stack(frames), torch.arange(len(LABELS)).repeat(count)


@pytest.fixture(scope="module")
def trained() -> XCLIP:
    """A small model that has learnt motion clips of four classes, of which it keeps mistaking two for one another."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1)
    sizes: dict[str, Any] = {"embed_dim": 64, "num_frames": 4, "mit_heads": 4, "prompt_layers": 1, "temporal_std": 1.0}
    model = XCLIP(XCLIPConfig(vision=vision, text=TextConfig(width=64, layers=1, heads=1), **sizes))
    model.text.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    video, label = clips(0, 40)
    tokens = tokenize(LABELS)
    for _ in range(8):
        for rows in torch.randperm(len(video)).split(16):
            loss = F.cross_entropy(model(video[rows], tokens), label[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return model.eval()


def test_a_trained_model_answers_the_same(trained: XCLIP) -> None:
    model = copy.deepcopy(trained).bfloat16()
    video, label = clips(1, 40)
    tokens = tokenize(LABELS)
    exact = logits(model, video, tokens)
    assert (exact.argmax(1) == label).float().mean() > 0.7
    model.quantize("fp8", calibration=clips(2, 8)[0])
    found = logits(model, video, tokens)
    agreement = float((found.argmax(1) == exact.argmax(1)).float().mean())
    together = float(F.cosine_similarity(found.flatten(), exact.flatten(), dim=0))
    print(f"agreement {agreement:.4f}, cosine {together:.6f}, least of a video {cosine(found, exact):.6f}")
    assert agreement >= 0.98
    assert together >= GATE
    for block in blocks(model):
        block.fp8.projection_scale.neg_()
    bad = logits(model, video, tokens)
    assert (bad.argmax(1) == exact.argmax(1)).float().mean() < 0.9
