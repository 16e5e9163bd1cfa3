"""The tower with windows against Swin written out plainly, UniCL's weights, and a training step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xclip_fast import XCLIP, SwinConfig, TextConfig, XCLIPConfig, backend, kernels
from xclip_fast.nn.layers import TransformerBlock
from xclip_fast.nn.swin import SwinTower, WindowBlock
from xclip_fast.weights import checkpoint

WIDTHS, DEPTHS, WINDOW, SIZE = (32, 64), (3, 2), 4, 64  # grids of 16 and 8 tokens
TINY = XCLIPConfig(
    vision=SwinConfig(SIZE, WIDTHS, DEPTHS, window=WINDOW, layer_norm_eps=1e-5),
    text=TextConfig(vocab_size=49408, width=64, layers=1, heads=1),
    embed_dim=64,
    num_frames=2,
    mit_layers=2,
)
Weights = dict[str, Tensor]


# ---- Swin, plainly: one image, one window, one head at a time, by UniCL's names


def plain_tower(weights: Weights, pixels_3SS: Tensor, depths: tuple[int, ...], window: int) -> Tensor:
    """Tokens of the last stage (N, D) of one image."""
    if "patch_embed.proj.weight" in weights:
        x_CGG = plain_convolution(weights, "patch_embed.proj", pixels_3SS, stride=4, padding=0)
        x_GGC = plain_norm(weights, "patch_embed.norm", x_CGG.permute(1, 2, 0))
    for stage, depth in enumerate(depths):
        if "convolutions.0.proj.weight" in weights:
            given = pixels_3SS if stage == 0 else x_GGC.permute(2, 0, 1)
            how = {"stride": 4, "padding": 2} if stage == 0 else {"stride": 2, "padding": 1}
            x_CGG = plain_convolution(weights, f"convolutions.{stage}.proj", given, **how)
            x_GGC = plain_norm(weights, f"convolutions.{stage}.norm", x_CGG.permute(1, 2, 0))
        elif stage > 0:
            name = f"layers.{stage - 1}.downsample"
            corners = [x_GGC[0::2, 0::2], x_GGC[1::2, 0::2], x_GGC[0::2, 1::2], x_GGC[1::2, 1::2]]
            x_GGC = plain_norm(weights, f"{name}.norm", torch.cat(corners, -1)) @ weights[f"{name}.reduction.weight"].T
        for block in range(depth):
            x_GGC = plain_block(weights, f"layers.{stage}.blocks.{block}", x_GGC, window, block % 2 == 1)
    return x_GGC.flatten(0, 1)


def plain_convolution(weights: Weights, name: str, x_CGG: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x_CGG[None], weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)[0]


def plain_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def plain_block(weights: Weights, name: str, x_GGC: Tensor, window: int, shifted: bool) -> Tensor:
    grid, _, width = x_GGC.shape
    window = min(window, grid)
    shift = window // 2 if shifted and grid > window else 0
    table = weights[f"{name}.attn.relative_position_bias_table"]
    heads = table.shape[1]
    qkv = plain_linear(weights, f"{name}.attn.qkv", plain_norm(weights, f"{name}.norm1", x_GGC))
    rows = []
    for top in range(0, grid, window):
        for left in range(0, grid, window):
            # tokens of the window, wrapped around the edges of the image
            places = [
                ((top + r + shift) % grid, (left + c + shift) % grid) for r in range(window) for c in range(window)
            ]
            wrapped = [
                (top + r + shift >= grid, left + c + shift >= grid) for r in range(window) for c in range(window)
            ]
            inside = [(r, c) for r in range(window) for c in range(window)]
            tokens = torch.stack([qkv[place] for place in places]).view(-1, 3, heads, width // heads)
            for head in range(heads):
                query, key, value = tokens[:, :, head].unbind(1)
                bias = torch.stack(
                    [
                        torch.stack([table[(qr - kr + window - 1) * (2 * window - 1) + qc - kc + window - 1, head]
                                     for kr, kc in inside])
                        for qr, qc in inside
                    ]
                )  # fmt: skip
                apart = torch.tensor([[a != b for b in wrapped] for a in wrapped])
                scores = (query * (width // heads) ** -0.5) @ key.T + bias - 1000.0 * apart
                rows.append((head, places, scores.softmax(-1) @ value))
    mixed: list[list[list[Any]]] = [[[None] * heads for _ in range(grid)] for _ in range(grid)]
    for head, places, out in rows:
        for place, row in zip(places, out, strict=True):
            mixed[place[0]][place[1]][head] = row
    attended = torch.stack([torch.stack([torch.cat(parts) for parts in line]) for line in mixed])
    x_GGC = x_GGC + plain_linear(weights, f"{name}.attn.proj", attended)
    hidden = plain_linear(weights, f"{name}.mlp.fc1", plain_norm(weights, f"{name}.norm2", x_GGC))
    return x_GGC + plain_linear(weights, f"{name}.mlp.fc2", F.gelu(hidden))


def unicl_names(model: XCLIP) -> Weights:
    """The parameters of a tower under UniCL's names, CoSwin's convolutions as ``convolutions.#``."""
    found: Weights = {}
    stages = [(stage, block) for stage, depth in enumerate(DEPTHS) for block in range(depth)]
    for name, parameter in model.visual.named_parameters():
        kind, _, rest = name.partition(".")
        if kind == "embeddings":
            stage, _, rest = rest.partition(".")
            if model.config.vision.convolutional:
                name = f"convolutions.{stage}.{rest.replace('conv', 'proj')}"
            else:
                above = f"layers.{int(stage) - 1}.downsample"
                name = f"patch_embed.{rest.replace('conv', 'proj')}" if stage == "0" else f"{above}.{rest}"
        elif kind == "transformer":
            number, _, rest = rest.removeprefix("resblocks.").partition(".")
            stage, block = stages[int(number)]
            rest = rest.removeprefix("block.").replace("attn.in_proj_", "attn.qkv.").replace("out_proj", "proj")
            rest = rest.replace("ln_", "norm").replace("c_fc", "fc1").replace("c_proj", "fc2")
            rest = rest.replace("relative_position", "attn.relative_position")
            name = f"layers.{stage}.blocks.{block}.{rest}"
        found[name] = parameter
    return found


def random_model(config: XCLIPConfig, dtype: torch.dtype = torch.float32) -> XCLIP:
    model = XCLIP(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "logit_scale" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "bias_table" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return model


@pytest.mark.parametrize("convolutional", [True, False])
def test_tower_and_gradients_equal_plain_swin(convolutional: bool) -> None:
    vision = dataclasses.replace(TINY.vision, convolutional=convolutional, image_size=32, window=2)
    model = random_model(dataclasses.replace(TINY, vision=vision), torch.float64)
    video = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    frame, got = model.visual(video, 2)
    weights = unicl_names(model)
    wanted = torch.stack([plain_tower(weights, frame, DEPTHS, 2) for frame in video])
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(frame, plain_norm(weights, "ln_post", wanted).mean(1), rtol=1e-9, atol=1e-9)
    parameters = {name: each for name, each in model.visual.named_parameters() if name not in ("proj",)}
    like = torch.randn_like(frame)
    gradients = [
        torch.autograd.grad(x, list(parameters.values()), like)
        for x in (frame, plain_norm(weights, "ln_post", wanted).mean(1))
    ]
    for name, mine, theirs in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_block_with_a_bias_on_each_backend(name: str) -> None:
    """The block's own backward with a bias for each window, beside autograd of the reference in float64."""
    if name == "triton" and not kernels.dispatch.INTERPRETED:
        pytest.skip("Triton's kernels run here in its interpreter only: TRITON_INTERPRET=1")
    block = WindowBlock(32, 2, grid=4, window=2, shifted=True, eps=1e-5, drop_path=0.0)
    block.block = TransformerBlock(32, 2, 1e-5)  # GELU would go to the library, which wants a GPU
    nn.init.normal_(block.relative_position_bias_table)
    x = torch.randn(3, 16, 32, requires_grad=True)
    dy = torch.randn(3, 16, 32)

    def gradients(module: nn.Module, given: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(module(given), [given, *module.parameters()], dy.to(given.dtype)))

    with backend(name):
        y, found = block(x), gradients(block, x)
    precise = x.detach().double().requires_grad_()
    with backend("reference"):
        wanted_y, wanted = block.double()(precise), gradients(block.double(), precise)
    for got, like in zip([y, *found], [wanted_y, *wanted], strict=True):
        assert (got.double() - like).abs().max() <= 1e-4 * like.abs().max()


def test_changed_parts_are_called() -> None:
    model = random_model(TINY)
    video = torch.randint(256, (2, 2, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.no_grad():
        plain = model.encode_video(video).video
        for block in model.visual.transformer.resblocks:
            block.block.attn.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model.encode_video(video).video, plain, rtol=1e-4, atol=1e-4)


def test_a_step_lowers_the_loss_and_recomputing_changes_nothing() -> None:
    vision = dataclasses.replace(TINY.vision, drop_path=0.3)
    model = XCLIP(dataclasses.replace(TINY, vision=vision)).train()
    video = torch.randint(256, (2, 2, SIZE, SIZE, 3), dtype=torch.uint8)

    def loss() -> Tensor:
        torch.manual_seed(1)  # the same branches dropped
        return F.cross_entropy(model(video, ["running", "a swim"]), torch.tensor([0, 1]))

    before = loss()
    before.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.checkpoint_activations()
    loss().backward()
    for mine, like in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(mine.grad, like, rtol=1e-4, atol=1e-6)
    torch.optim.SGD(model.parameters(), 1e-2).step()
    assert loss() < before


def test_own_folder_and_huggingface(tmp_path: Path) -> None:
    model = random_model(TINY)
    model.save_pretrained(tmp_path / "ours")
    again = XCLIP.from_pretrained(tmp_path / "ours")
    video = torch.randint(256, (1, 2, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(again(video, ["a", "b"]), model(video, ["a", "b"]))
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in again.state_dict().items())
    with pytest.raises(checkpoint.CheckpointError, match="no vision tower with windows"):
        model.save_pretrained(tmp_path / "hf", layout="huggingface")
    (tmp_path / "ours" / "config.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="pass config"):
        XCLIP.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 5}, "do not tile the grids"),
        ({"image_size": 36}, "not a multiple of 8"),
        ({"head_size": 24}, "does not divide into heads"),
        ({"depths": (2,)}, "as many of both"),
        ({"depths": (2, 0)}, "vision.depths is 0; at least 1 wanted"),
        ({"widths": (32, 96), "convolutional": False}, "twice the one before"),
        ({"drop_path": 1.0}, "below 1"),
        ({"image_size": 8192, "window": 1024}, "at most 268435456"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY.vision, **changes)


# ---- UniCL


def unicl_shapes(
    widths: tuple[int, ...], depths: tuple[int, ...], window: int, size: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of UniCL's state dict, from its public code: buffers and all."""
    found: dict[str, tuple[int, ...]] = {
        "image_encoder.patch_embed.proj.weight": (widths[0], 3, 4, 4),
        "image_encoder.patch_embed.proj.bias": (widths[0],),
        "logit_scale": (),
        "image_projection": (widths[-1], 64),
        "text_projection": (64, 64),
        "text_encoder.token_embedding.weight": (49408, 64),
        "text_encoder.positional_embedding": (77, 64),
    }
    norms = {"image_encoder.patch_embed.norm": widths[0], "image_encoder.norm": widths[-1], "text_encoder.ln_final": 64}
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        layer, grid = f"image_encoder.layers.{stage}", size // (4 << stage)
        inside = min(window, grid)
        for index in range(depth):
            block = f"{layer}.blocks.{index}"
            linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
            for name, (out, into) in linears.items():
                found[f"{block}.{name}.weight"] = (out * width, into * width)
                found[f"{block}.{name}.bias"] = (out * width,)
            found[f"{block}.attn.relative_position_bias_table"] = ((2 * inside - 1) ** 2, width // 32)
            found[f"{block}.attn.relative_position_index"] = (inside**2, inside**2)
            if index % 2 and grid > window:
                found[f"{block}.attn_mask"] = ((grid // window) ** 2, window**2, window**2)
            norms |= {f"{block}.norm1": width, f"{block}.norm2": width}
        if stage < len(widths) - 1:
            found[f"{layer}.downsample.reduction.weight"] = (2 * width, 4 * width)
            norms[f"{layer}.downsample.norm"] = 4 * width
    for name, (out, into) in {"attn.out_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}.items():
        found[f"text_encoder.resblocks.0.{name}.weight"] = (out * 64, into * 64)
        found[f"text_encoder.resblocks.0.{name}.bias"] = (out * 64,)
    found |= {"text_encoder.resblocks.0.attn.in_proj_weight": (192, 64)}
    found |= {"text_encoder.resblocks.0.attn.in_proj_bias": (192,)}
    norms |= {"text_encoder.resblocks.0.ln_1": 64, "text_encoder.resblocks.0.ln_2": 64}
    return found | {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}


def test_swin_b_of_unicl_starts_a_model() -> None:
    """All names and shapes of its Swin-B, on the meta device."""
    state = {
        name: torch.empty(shape, device="meta")
        for name, shape in unicl_shapes((128, 256, 512, 1024), (2, 2, 18, 2), 7, 224).items()
    }
    found = checkpoint.clip_state(state)
    vision = SwinConfig(224, (128, 256, 512, 1024), (2, 2, 18, 2), convolutional=False, layer_norm_eps=1e-5)
    assert found.config.vision == vision
    assert (found.config.layer_norm_eps, found.config.mit_layers) == (1e-12, 4)
    assert sum(each.numel() for name, each in found.state.items() if name.startswith("visual.")) == pytest.approx(
        86.8e6 + 1024 * 64, rel=2e-3
    )


@pytest.mark.parametrize("older", [False, True])
def test_unicl_features_are_the_plain_ones(tmp_path: Path, older: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) < 2 else shape[-1] ** -0.5)
        for name, shape in unicl_shapes(WIDTHS, DEPTHS, WINDOW, SIZE).items()
    }
    given = {name.replace("image_encoder.", "visual.") if older else name: each for name, each in state.items()}
    given = {
        name.replace("image_projection", "vision_projection") if older else name: each for name, each in given.items()
    }
    torch.save({"model": given}, tmp_path / "unicl.pth")
    found = checkpoint.read(tmp_path / "unicl.pth")
    config = dataclasses.replace(found.config, vision=dataclasses.replace(found.config.vision, image_size=SIZE))
    assert config.vision.window == WINDOW
    model = XCLIP.from_pretrained(tmp_path / "unicl.pth", config=config)
    assert isinstance(model.visual, SwinTower)
    frames = torch.randn(1, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        frame, _ = model.visual(frames, 1)
        got = frame @ model.visual.proj
    weights = {name.removeprefix("image_encoder."): each for name, each in state.items()}
    tokens = plain_tower(weights, frames[0], DEPTHS, WINDOW)
    wanted = plain_norm(weights, "norm", tokens).mean(0, keepdim=True) @ state["image_projection"]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert model.text.ln_final.eps == 1e-12
    assert torch.equal(model.text.token_embedding.weight, state["text_encoder.token_embedding.weight"])
    wider = dataclasses.replace(config.vision, window=2)
    model = XCLIP(dataclasses.replace(config, vision=wider)).expand_from(tmp_path / "unicl.pth")
    assert model.visual.transformer.resblocks[0].relative_position_bias_table.shape == (9, 1)
