"""The paper's ablations (section 4.5, Tables 6 to 10) as switches of the configuration, and recomputation."""

import dataclasses
import logging
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small import normalized, plain_transformer, rough
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig, backend, kernels, tokenize
from xclip_fast.flops import count
from xclip_fast.nn import layers
from xclip_fast.nn import text as text_module
from xclip_fast.nn.layers import TransformerBlock
from xclip_fast.text.templates import TEMPLATES, fill
from xclip_fast.weights.checkpoint import CheckpointError, shapes
from xclip_fast.weights.layouts import is_new

LABELS = ["riding a bike", "swimming", "playing the accordion while walking", "yoga"]
FULL = XCLIPConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=128, layers=2, heads=2),
    text=TextConfig(width=64, layers=2, heads=1),
    embed_dim=64,
    num_frames=3,
)
PLAIN = dataclasses.replace(FULL.vision, cross_frame=False)
VIT = dataclasses.replace(FULL.vision, activation="gelu", pre_norm=False, layer_norm_eps=1e-6)
CLIP_MEAN = dataclasses.replace(FULL, vision=PLAIN, mit_layers=0, prompt="none")
CONFIGS = {
    "CLIP-Mean": CLIP_MEAN,
    "+ CCT": dataclasses.replace(FULL, mit_layers=0, prompt="none"),
    "+ MIT": dataclasses.replace(FULL, prompt="none"),
    "+ prompts": FULL,
    "vectors": dataclasses.replace(FULL, prompt="vectors", prompt_vectors=5),
    "head": dataclasses.replace(FULL, num_classes=5),
    "ViT": dataclasses.replace(FULL, vision=VIT),
    "plain ViT": dataclasses.replace(FULL, vision=dataclasses.replace(VIT, cross_frame=False), mit_layers=0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: XCLIPConfig) -> XCLIP:
    return rough(XCLIP(config).eval())


def frames(batch: int = 2, count: int = 3) -> Tensor:
    return torch.randint(0, 256, (batch, count, 32, 32, 3), dtype=torch.uint8)


def given(config: XCLIPConfig) -> tuple[list[str], ...]:
    """What a model of this config is called with beside the video."""
    return () if config.num_classes else (LABELS,)


def plain_text(model: XCLIP, tokens: Tensor, vectors: Tensor | None = None) -> Tensor:
    """The text tower by torch's own modules, one label after another, without padding."""
    text, features = model.text, []
    for row in tokens:
        x = text.token_embedding(row[: row.argmax() + 1])
        if vectors is not None:
            x = torch.cat([x[:1], vectors, x[1:]])
        x = x + text.positional_embedding[: len(x)]
        mask = torch.full((len(x), len(x)), float("-inf"), dtype=x.dtype).triu(1)
        x = plain_transformer(text.transformer.resblocks, x[None], mask=mask)[0]
        features.append(text.ln_final(x[-1]) @ text.text_projection)
    return torch.stack(features)


# ---- the switches


def test_table_6_grows_part_by_part() -> None:
    names = {step: set(shapes(CONFIGS[step])) for step in ("CLIP-Mean", "+ CCT", "+ MIT", "+ prompts")}
    sizes = [len(found) for found in names.values()]
    assert sizes == sorted(sizes)
    assert not any(is_new(name) for name in names["CLIP-Mean"])  # an image CLIP and no more
    assert all(".message_" in name for name in names["+ CCT"] - names["CLIP-Mean"])
    assert all(name.startswith("mit.") for name in names["+ MIT"] - names["+ CCT"])
    assert all(name.startswith("prompts_") for name in names["+ prompts"] - names["+ MIT"])


@every_config
def test_every_switch_has_its_parameters_and_trains_them_all(config: XCLIPConfig) -> None:
    model = build(config).train()
    logits = model(frames(), *given(config))
    assert logits.shape == (2, config.num_classes or len(LABELS))
    assert logits.dtype == torch.float32
    F.cross_entropy(logits, torch.tensor([1, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert model.bfloat16()(frames(), *given(config)).dtype == torch.float32
    assert model.float()(frames(0), *given(config)).shape == (0, logits.shape[1])


def test_clip_mean_equals_clip_written_out() -> None:
    model, video = build(CLIP_MEAN).double(), frames()
    visual = model.visual
    x = visual.conv1(normalized(video, CLIP_MEAN).flatten(0, 1)).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = plain_transformer(visual.transformer.resblocks, visual.ln_pre(x))
    v = (visual.ln_post(x[:, 0]) @ visual.proj).view(2, 3, -1).mean(1)
    c = plain_text(model, tokenize(LABELS))
    features = model.encode_video(video)
    torch.testing.assert_close(features.video, v, rtol=1e-5, atol=1e-5)  # float32 constants of the normalisation
    assert features.patches.shape == (2, 0, 64)
    torch.testing.assert_close(model.encode_text(LABELS), c)
    wanted = model.logit_scale.exp() * F.cosine_similarity(v[:, None], c, dim=-1)
    torch.testing.assert_close(model(video, LABELS), wanted, rtol=1e-5, atol=1e-5)


def test_only_the_multi_frame_transformer_sees_the_order_of_frames() -> None:
    """Cross-frame attention has no temporal positions, and the mean forgets them."""
    video = frames()
    for config in (CLIP_MEAN, CONFIGS["+ CCT"], CONFIGS["+ MIT"]):
        model = build(config)
        if model.mit is not None:
            nn.init.normal_(model.mit.positional_embedding)
        same = torch.allclose(model(video, LABELS), model(video.flip(1), LABELS), rtol=1e-4, atol=1e-4)
        assert same == (config.mit_layers == 0)


def test_plain_logits_ignore_autocast() -> None:
    model = build(CLIP_MEAN)
    features, text = model.encode_video(frames()), model.encode_text(LABELS)
    wanted = model.similarity(features, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.similarity(features, text), wanted)


def test_drop_path_of_a_plain_block_drops_whole_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [torch.tensor([0.0, 2.0]), torch.tensor([2.0, 0.0])]
    monkeypatch.setattr(layers, "drop_path_scale", lambda videos, probability, like: drawn.pop(0)[:videos])
    block = TransformerBlock(128, 2, 1e-5, drop_path=0.5).train()
    x = torch.randn(2 * 3, 5, 128)
    n = block.ln_1(x).transpose(0, 1)
    mixed = block.attn(n, n, n)[0].transpose(0, 1)
    z = torch.cat([x[:3], x[3:] + 2 * mixed[3:]])  # the three frames of a video share its luck
    u = block.mlp.c_fc(block.ln_2(z))
    y = block.mlp.c_proj(u * torch.sigmoid(1.702 * u))
    torch.testing.assert_close(block(x, samples=2), torch.cat([z[:3] + 2 * y[:3], z[3:]]), rtol=1e-4, atol=1e-5)
    assert not drawn
    block.eval()(x)  # draws nothing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "vector"}, "one of video, vectors, none wanted"),
        ({"prompt": "vectors", "prompt_vectors": 75}, "leave room"),
        ({"prompt": "vectors", "prompt_vectors": 0}, "at least 1"),
        ({"num_classes": 0}, "at least 1"),
        ({"num_classes": 3, "prompt": "vectors"}, "a linear head has no text"),
        ({"vision": {"activation": "relu"}}, "one of quick_gelu, gelu wanted"),
        ({"vision": {"cross_frame": "false"}}, "true or false wanted"),
        ({"vision": {"pre_norm": 0}}, "true or false wanted"),
        ({"text": {"layers": 0}}, "at least 1"),
        ({"vision": {"layer_norm_eps": "tiny"}}, "vision.layer_norm_eps is 'tiny' .str.; a finite number wanted"),
        ({"layer_norm_eps": None}, "a finite number wanted"),
    ],
)
def test_wrong_switches_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XCLIPConfig.from_dict(values)


# ---- text: vectors, ensemble, head


def test_vectors_stand_before_the_words() -> None:
    model, tokens = build(CONFIGS["vectors"]).double(), tokenize(LABELS)
    wanted = plain_text(model, tokens, model.prompts_vectors)
    torch.testing.assert_close(model.encode_text(tokens), wanted)
    padded = F.pad(tokens, (0, 40))
    padded[0, -3:] = 7  # whatever stands behind the end
    torch.testing.assert_close(model.encode_text(padded), wanted)
    places = text_module._with_places(tokens, 5)
    torch.testing.assert_close(model.text._encode_padded(places, model.prompts_vectors), wanted)  # as compiled


def test_vectors_get_gradients_through_a_frozen_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS["vectors"]).double()
    model.text.requires_grad_(False)
    cotangent = torch.randn(4, 64, dtype=torch.float64)
    (plain_text(model, tokenize(LABELS), model.prompts_vectors) * cotangent).sum().backward()
    wanted, model.prompts_vectors.grad = model.prompts_vectors.grad, None
    monkeypatch.setattr(text_module, "LABELS_AT_ONCE", 3)  # two parts
    (model.encode_text(LABELS) * cotangent).sum().backward()
    torch.testing.assert_close(model.prompts_vectors.grad, wanted)
    assert all(parameter.grad is None for parameter in model.text.parameters())


def test_kept_features_follow_the_vectors() -> None:
    model = build(CONFIGS["vectors"])
    with torch.no_grad():
        before = model.encode_text(LABELS)
        assert torch.equal(model.encode_text(LABELS), before)
        assert len(model.text._cache) == 1
        model.prompts_vectors.add_(1)
        assert not torch.allclose(model.encode_text(LABELS), before)
    optimizer = torch.optim.AdamW([model.prompts_vectors], lr=0.1, fused=True)
    model.text.requires_grad_(False)
    with torch.no_grad():
        before = model.encode_text(LABELS)
    model.encode_text(LABELS).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(model.encode_text(LABELS), before)


def test_labels_and_vectors_share_the_context() -> None:
    model = build(dataclasses.replace(CONFIGS["vectors"], prompt_vectors=70))
    assert model.config.label_tokens == 7
    assert model.encode_text(["one two three four five six seven eight"]).isfinite().all()  # cut, its end kept
    full = tokenize(["one two three four five"])
    assert full.shape == (1, 7)
    assert model.encode_text(F.pad(full, (0, 70))).isfinite().all()  # padding takes no room
    with pytest.raises(ValueError, match="8 tokens a label given; at most 7 fit beside 70 learned vectors"):
        model.encode_text(tokenize(["one two three four five six"]))


def test_ensemble_is_the_mean_of_normalized_features() -> None:
    assert len(TEMPLATES) == 16 == len(set(TEMPLATES))
    model = build(CONFIGS["+ MIT"])
    with torch.no_grad():
        got = model.encode_text_ensemble(LABELS)
        one_by_one = [model.encode_text([text.replace("{}", label) for text in TEMPLATES]) for label in LABELS]
        wanted = torch.stack([(x / x.norm(dim=-1, keepdim=True)).mean(0) for x in one_by_one])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_text_ensemble("yoga"), wanted[3:], rtol=1e-4, atol=1e-5)
        assert model.similarity(model.encode_video(frames()), got).shape == (2, 4)
    assert fill(["a {}{0}"], ["x {} y", "{}"]) == ["x a {}{0} y", "a {}{0}"]
    for wrong in ([], "a {}", ["no place"], ["{} {}"]):
        with pytest.raises(ValueError, match="in the place of the label"):
            model.encode_text_ensemble(LABELS, wrong)


def test_a_linear_head_takes_the_place_of_text() -> None:
    model, video = build(CONFIGS["head"]), frames()
    assert model.config.prompt == "none"
    assert model.text is None
    features = model.encode_video(video)
    wanted = features.video @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(video), wanted)
    torch.testing.assert_close(model.similarity(features), wanted)
    for call in (model.encode_text, model.encode_text_ensemble, lambda labels: model(video, labels)):
        with pytest.raises(ValueError, match="linear head for 5 classes and no text encoder"):
            call(LABELS)
    with pytest.raises(ValueError, match="leave them out"):
        model.similarity(features, torch.zeros(3, 64))
    with pytest.raises(TypeError, match="no text given"):
        build(CLIP_MEAN)(video)


def test_similarity_refuses_what_are_no_features_of_this_model() -> None:
    model = build(FULL)
    features, text = model.encode_video(frames()), model.encode_text(LABELS)
    with pytest.raises(TypeError, match="text_features is a list; the result of encode_text"):
        model.similarity(features, LABELS)
    with pytest.raises(TypeError, match="video_features is a Tensor; the result of encode_video"):
        model.similarity(features.video, text)
    with pytest.raises(ValueError, match=r"text features of shape \(4, 32\).*\(K, 64\) wanted"):
        model.similarity(features, text[:, :32])
    with pytest.raises(ValueError, match="floating"):
        model.similarity(features, tokenize(["word " * 62]).long())
    with pytest.raises(ValueError, match=r"video features of shape \(2, 32\)"):
        model.similarity(features._replace(video=features.video[:, :32]), text)
    with pytest.raises(ValueError, match=r"patch features of shape \(2, 0, 64\) given; \(2, 16, 64\) wanted"):
        model.similarity(build(CLIP_MEAN).encode_video(frames()), text)


# ---- checkpoints


@every_config
def test_round_trip_of_every_switch(tmp_path, config: XCLIPConfig) -> None:
    model = build(config)
    model.save_pretrained(tmp_path / "folder")
    again = XCLIP.from_pretrained(tmp_path / "folder")
    assert again.config == config
    assert XCLIP.from_pretrained(tmp_path / "folder", config=config).config == config
    assert list(again.state_dict()) == list(model.state_dict())
    video = frames()
    assert torch.equal(again(video, *given(config)), model(video, *given(config)))
    if config != FULL:
        with pytest.raises(CheckpointError, match="Hugging Face's X-CLIP has no"):
            model.save_pretrained(tmp_path / "theirs", layout="huggingface")


@pytest.mark.parametrize("name", ["+ CCT", "+ MIT", "vectors", "head"])
def test_weights_alone_tell_an_ablation(tmp_path, name: str) -> None:
    save_file(build(CONFIGS[name]).state_dict(), tmp_path / "weights")
    found = XCLIP.from_pretrained(tmp_path / "weights").config
    for field in ("mit_layers", "prompt", "num_classes", "vision"):
        assert getattr(found, field) == getattr(CONFIGS[name], field), field


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.vision.pre_norm])
def test_every_ablation_starts_from_an_image_clip(tmp_path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIGS[name]
    clip = {key: torch.randn(shape) for key, shape in shapes(FULL, only_clip=True).items()}
    save_file({key.removeprefix("text."): tensor for key, tensor in clip.items()}, tmp_path / "clip")
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        model = XCLIP.from_pretrained(tmp_path / "clip", config=config)
    assert model.config == config
    new = set()
    for key, tensor in model.state_dict().items():
        if is_new(key):
            new.add(key.split(".")[0])
        else:
            assert torch.equal(tensor, clip[key]), key
    said = [record.getMessage() for record in caplog.records if "randomly initialized" in record.getMessage()]
    assert [message.split("randomly initialized: ")[1].split(", ") for message in said] == (
        [sorted(new)] if new else []
    )


def test_a_whole_xclip_does_not_become_an_ablation_silently(tmp_path) -> None:
    build(FULL).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as error:
        XCLIP.from_pretrained(tmp_path, config=CLIP_MEAN)
    for key in ("message_fc.weight (in 2 layers)", "mit.positional_embedding", "prompts_generator.alpha"):
        assert key in str(error.value)
    with pytest.raises(CheckpointError, match=r"missing:\n  head\.weight"):
        XCLIP.from_pretrained(tmp_path, config=CONFIGS["head"])


# ---- timm's ViTs


def timm_like(image: int = 32, layers: int = 2, width: int = 128) -> dict[str, Tensor]:
    """Random weights under the names of timm's vit_*_patch*_*."""
    tokens = (image // 8) ** 2 + 1
    state = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, tokens, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 8, 8) / 14,
        "patch_embed.proj.bias": torch.randn(width),
        "norm.weight": 1 + torch.randn(width) / 10,
        "norm.bias": torch.randn(width),
        "head.weight": torch.randn(10, width),
        "head.bias": torch.randn(10),
    }
    for block in (f"blocks.{index}" for index in range(layers)):
        sizes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (out, into) in sizes.items():
            state[f"{block}.{name}.weight"] = torch.randn(out * width, into * width) / math.sqrt(into * width)
            state[f"{block}.{name}.bias"] = torch.randn(out * width) / 10
        for name in ("norm1", "norm2"):
            state |= {f"{block}.{name}.weight": 1 + torch.randn(width) / 10, f"{block}.{name}.bias": torch.randn(width)}
    return state


def timm_forward(state: dict[str, Tensor], images: Tensor, heads: int = 2) -> Tensor:
    """A ViT as timm computes it, up to its final norm."""
    state = {name: tensor.double() for name, tensor in state.items()}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)  # noqa: E731
    apply = lambda x, name: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + state["pos_embed"]
    for block in sorted({name.rsplit(".", 3)[0] for name in state if ".attn.qkv.weight" in name}):
        q, k, v = apply(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, heads, -1)).unbind(2)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1])
        mixed = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(-2)
        x = x + apply(mixed, f"{block}.attn.proj")
        x = x + apply(F.gelu(apply(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "norm")


@pytest.mark.parametrize("stored", ["safetensors", "pth", "module"])
def test_a_timm_vit_starts_the_vision_tower_exactly(tmp_path, stored: str, caplog: pytest.LogCaptureFixture) -> None:
    state = {name: tensor.double() for name, tensor in timm_like().items()}
    config = CONFIGS["plain ViT"]
    path = tmp_path / "vit"
    if stored == "safetensors":
        save_file(state, path)
    elif stored == "pth":
        torch.save({"model": state}, path)
    else:
        path = nn.Module()
        path.state_dict = lambda: state
    model = XCLIP(config).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        model.expand_from(path)
    assert not caplog.records
    video = frames(2, 3)
    pixels = normalized(video, config)
    wanted = timm_forward(state, pixels.flatten(0, 1))
    tower = model.visual.eval()
    for images, tolerance in ((pixels.flatten(0, 1), 1e-9), (video.flatten(0, 1), 1e-5)):
        feature, patches = tower(images, 3)
        got = torch.cat([feature[:, None], tower.ln_post(patches)], 1)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    for name, tensor in model.state_dict().items():  # text, projections, prompts stay
        inherited = name.startswith("visual.") and name != "visual.proj"
        assert torch.equal(tensor, before[name]) != inherited, name


def test_a_timm_vit_with_messages_or_another_grid(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    state = timm_like(image=64)
    model = XCLIP(CONFIGS["ViT"]).expand_from(state)  # 8 x 8 positions to 4 x 4
    assert torch.equal(model.visual.transformer.resblocks[1].attn.in_proj_weight, state["blocks.1.attn.qkv.weight"])
    assert torch.equal(model.visual.positional_embedding[0], state["pos_embed"][0, 0])
    grid = (state["pos_embed"][0, 1:] + state["patch_embed.proj.bias"]).T.reshape(1, 128, 8, 8)
    wanted = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(model.visual.positional_embedding[1:], wanted)
    save_file(timm_like(), tmp_path / "vit")
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        found = XCLIP.from_pretrained(tmp_path / "vit")
    assert (
        "is an image ViT. Parameters missing from it are randomly initialized: logit_scale, mit, prompts_generator"
        in caplog.text
    )
    assert found.config.vision == dataclasses.replace(VIT, image_size=32, layers=2)


def test_table_10_takes_text_from_a_clip_and_vision_from_a_vit() -> None:
    clip = {name: torch.randn(shape) for name, shape in shapes(FULL, only_clip=True).items()}
    state = timm_like()
    model = XCLIP(CONFIGS["ViT"]).expand_from(clip, part="text").expand_from(state)
    found = model.state_dict()
    assert all(torch.equal(found[name], clip[name]) for name in clip if name.startswith("text."))
    assert torch.equal(found["logit_scale"], clip["logit_scale"])
    assert torch.equal(found["visual.conv1.weight"], state["patch_embed.proj.weight"])
    with pytest.raises(CheckpointError, match=r"unexpected:\n  visual\.ln_pre\.weight"):
        model.expand_from(clip, part="visual")
    with pytest.raises(CheckpointError, match="it has no weights for the text tower"):
        model.expand_from(state, part="text")
    with pytest.raises(ValueError, match="choose 'both', 'visual' or 'text'"):
        model.expand_from(clip, part="vision")


def test_a_timm_vit_that_does_not_fit_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    state = timm_like()
    quick = dataclasses.replace(FULL, vision=dataclasses.replace(VIT, activation="quick_gelu"))
    with pytest.raises(CheckpointError, match="set it to 'gelu'"):
        XCLIP(quick).expand_from(state)
    with pytest.raises(CheckpointError, match=r"missing:\n  visual\.ln_pre"):
        XCLIP(FULL).expand_from(state)
    scaled = state | {"blocks.0.ls1.gamma": torch.ones(128), "reg_token": torch.zeros(1, 4, 128)}
    with pytest.raises(CheckpointError, match=r"2 unexpected:\n  blocks\.\*\.ls1\.gamma \(in 1 layers\)\n  reg_token"):
        XCLIP(CONFIGS["ViT"]).expand_from(scaled)
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        XCLIP(dataclasses.replace(FULL, vision=dataclasses.replace(VIT, layer_norm_eps=None))).expand_from(state)
    assert "set vision.layer_norm_eps" in caplog.text


# ---- recomputation and cost


def saved_bytes(model: XCLIP, *inputs: object) -> int:
    """Bytes that a forward keeps for backward, parameters apart, and a backward through them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*inputs).sum()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("name", ["+ prompts", "CLIP-Mean", "vectors", "head"])
def test_recomputation_changes_memory_and_nothing_else(name: str) -> None:
    config = CONFIGS[name]
    vision = dataclasses.replace(config.vision, layers=4, drop_path=0.3)
    config = dataclasses.replace(config, vision=vision, text=dataclasses.replace(config.text, layers=4))
    model, video = build(config).train(), frames(4)
    results, kept = [], []
    for enabled in (False, True, False):
        assert model.checkpoint_activations(enabled) is model
        model.zero_grad()
        torch.manual_seed(5)  # the same videos dropped
        kept.append(saved_bytes(model, video, *given(config)))
        results.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, wanted in results[0].items():
        assert torch.equal(results[1][key], wanted), key
    assert kept[0] == kept[2] > 3 * kept[1]
    model.checkpoint_activations()
    with torch.no_grad():
        assert torch.equal(
            model.eval()(video, *given(config)), model.checkpoint_activations(False)(video, *given(config))
        )


def test_recomputation_runs_on_the_backend_of_the_forward() -> None:
    model, video = build(CLIP_MEAN).checkpoint_activations(), frames()
    block, seen = model.visual.transformer.resblocks[0], []
    original = block.forward
    block.forward = lambda *args: seen.append(kernels.forced_backend()) or original(*args)
    with backend("reference"):
        loss = model(video, LABELS).sum()
    loss.backward()
    assert seen == ["reference", "reference"]
    assert kernels.forced_backend() == "auto"


@every_config
def test_flops_of_every_switch_equal_torch(config: XCLIPConfig) -> None:
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=3))
    model, video = XCLIP(config).eval(), frames()
    lengths = [4, 9, 6]
    tokens = torch.zeros(3, 9, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = 7
        row[0], row[length - 1] = 49406, 49407
    text = () if config.num_classes else (tokens,)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(video, *text)
    flops = count(config, labels=lengths, batch=2, counting="actual")
    assert counter.get_total_flops() / 2 == flops.total
    paper = count(config, batch=2)
    assert (paper.message_kv > 0) == config.vision.cross_frame
    assert (paper.mit > 0) == (config.mit_layers > 0)
    assert (paper.prompts > 0) == (paper.patch_projection > 0) == (config.prompt == "video")
    assert (paper.text > 0) == (config.num_classes is None)
    if config == CONFIGS["vectors"]:
        with pytest.raises(ValueError, match="at most 72 tokens a label"):
            count(config, labels=[73])


def test_paper_names_stand_in_the_docstrings() -> None:
    for thing, words in ((XCLIPConfig, r"Tables? 6.*Table 9.*Table 8"), (VisionConfig, "Table 10")):
        assert re.search(words, thing.__doc__, re.DOTALL)


def test_kernels_can_be_recomputed() -> None:
    """torch.utils.checkpoint lets what was saved be read only once."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    x = torch.randn(4, 64, requires_grad=True)
    weight, bias = torch.randn(64, requires_grad=True), torch.randn(64)
    with backend("triton"):
        y = torch.utils.checkpoint.checkpoint(kernels.layer_norm, x, weight, bias, use_reentrant=False)
        y.square().sum().backward()
    assert x.grad.isfinite().all()
