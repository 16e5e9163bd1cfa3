"""ViFi-CLIP, ActionCLIP and open_clip: read from their files, and compared with what their papers and code compute."""

import dataclasses
import json
import logging
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig
from xclip_fast.weights import checkpoint
from xclip_fast.weights.checkpoint import CheckpointError
from xclip_fast.weights.open_clip import config_from_open_clip

# real vocabulary, context and patch; narrow, so that the tests are quick, but for one with the widths of ViT-B/16
WIDTH, TEXT, EMBED, SIZE, VOCAB = 128, 64, 64, 32, 49408
QUICK = types.SimpleNamespace(forward=lambda u: u * torch.sigmoid(1.702 * u))


def blocks(prefix, width, layers):
    shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    shapes |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    shapes |= {"mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
    shapes |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    shapes |= {f"ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    return {f"{prefix}{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()}


def norm(name, width):
    return {f"{name}.{kind}": (width,) for kind in ("weight", "bias")}


def clip_state(dtype=torch.float32, seed=0):
    """OpenAI's names and shapes."""
    shapes = {"visual.class_embedding": (WIDTH,), "visual.positional_embedding": ((SIZE // 16) ** 2 + 1, WIDTH)}
    shapes |= {"visual.conv1.weight": (WIDTH, 3, 16, 16), "visual.proj": (WIDTH, EMBED)}
    shapes |= norm("visual.ln_pre", WIDTH) | norm("visual.ln_post", WIDTH)
    shapes |= blocks("visual.transformer.resblocks.", WIDTH, 2) | blocks("transformer.resblocks.", TEXT, 2)
    shapes |= {"positional_embedding": (77, TEXT), "token_embedding.weight": (VOCAB, TEXT)}
    shapes |= {"text_projection": (TEXT, EMBED), "logit_scale": ()} | norm("ln_final", TEXT)
    return random_state(shapes, seed, dtype)


def random_state(shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = 0.1 if len(shape) < 2 else (noise[0].numel() ** -0.5)
        state[name] = (noise * scale + (len(shape) == 1 and name.endswith("weight"))).to(dtype)
    if "logit_scale" in state:
        state["logit_scale"] = torch.tensor(2.0)
    return state


# --- a small independent CLIP in float64, after the papers' equations


def run_blocks(x, state, prefix, heads, activation=QUICK.forward, causal=False, eps=1e-5):
    layer = 0
    while f"{prefix}{layer}.ln_1.weight" in state:
        one = {name.removeprefix(f"{prefix}{layer}."): value for name, value in state.items()}
        normed = F.layer_norm(x, x.shape[-1:], one["ln_1.weight"], one["ln_1.bias"], eps)
        qkv = normed @ one["attn.in_proj_weight"].T + one["attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=x.dtype).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ one["attn.out_proj.weight"].T + one["attn.out_proj.bias"]
        normed = F.layer_norm(x, x.shape[-1:], one["ln_2.weight"], one["ln_2.bias"], eps)
        hidden = activation(normed @ one["mlp.c_fc.weight"].T + one["mlp.c_fc.bias"])
        x = x + hidden @ one["mlp.c_proj.weight"].T + one["mlp.c_proj.bias"]
        layer += 1
    return x


def image_features(state, images, activation=QUICK.forward, eps=1e-5):
    s = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    patches = F.conv2d(images, s["conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([s["class_embedding"].expand(len(images), 1, -1), patches], 1) + s["positional_embedding"]
    x = F.layer_norm(x, (WIDTH,), s["ln_pre.weight"], s["ln_pre.bias"], eps)
    x = run_blocks(x, s, "transformer.resblocks.", WIDTH // 64, activation, eps=eps)[:, 0]
    return F.layer_norm(x, (WIDTH,), s["ln_post.weight"], s["ln_post.bias"], eps) @ s["proj"]


def text_features(state, tokens, activation=QUICK.forward):
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    x = run_blocks(x, state, "transformer.resblocks.", TEXT // 64, activation, causal=True)
    x = F.layer_norm(x, (TEXT,), state["ln_final.weight"], state["ln_final.bias"])
    return x[torch.arange(len(tokens)), tokens.argmax(1)] @ state["text_projection"]


def cosine(video, text, scale):
    return scale.exp() * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T


def double(state):
    return {name: value.double() for name, value in state.items()}


def videos(frames=4):
    return torch.randn(2, frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))


def tokens():
    ids = torch.randint(1, 49000, (3, 6), generator=torch.Generator().manual_seed(8))
    ids[:, 0], ids[:, -1], ids[1, 3:] = VOCAB - 2, VOCAB - 1, VOCAB - 1
    return ids


def assert_close(got, wanted, relative=1e-5):
    assert (got.double() - wanted).abs().max() <= relative * wanted.abs().max()


# --- ViFi-CLIP


@pytest.fixture(params=["narrow", "ViT-B/16"])
def shape(request, monkeypatch):
    if request.param == "ViT-B/16":
        for name, value in {"WIDTH": 768, "TEXT": 512, "EMBED": 512, "SIZE": 224}.items():
            monkeypatch.setitem(globals(), name, value)


def vifi_file(path, state=None, **more):
    state = state or clip_state()
    inside = {}
    for name, value in state.items():
        if name.startswith("visual."):
            inside[f"module.image_encoder.{name.removeprefix('visual.')}"] = value
        elif name == "logit_scale":
            inside["module.logit_scale"] = value
        elif not name.startswith("token_embedding"):
            inside[f"module.text_encoder.{name}"] = value
    inside["module.prompt_learner.complete_text_embeddings"] = state["token_embedding.weight"][tokens()]
    torch.save({"model": inside | more, "optimizer": {"state": {}}, "epoch": 3}, path)
    return path


def test_vifi_clip_computes_clip_on_the_mean_of_frames(tmp_path, shape):
    state = clip_state()
    torch.save(state, tmp_path / "clip.pt")
    model = XCLIP.from_pretrained(vifi_file(tmp_path / "vifi.pth"), clip=tmp_path / "clip.pt")
    assert (model.mit, model.prompts_generator, model.config.num_frames) == (None, None, 16)
    with torch.no_grad():
        s = double(state)
        video = image_features(s, videos(2).flatten(0, 1).double()).unflatten(0, (2, -1)).mean(1)
        wanted = cosine(video, text_features(s, tokens()), s["logit_scale"])
        assert_close(model(videos(2), tokens()), wanted)
    # converted once, it needs no CLIP any more
    checkpoint.convert(tmp_path / "vifi.pth", tmp_path / "vifi", clip=tmp_path / "clip.pt")
    again = XCLIP.from_pretrained(tmp_path / "vifi")
    assert again.config == model.config
    with torch.no_grad():
        assert_close(again(videos(2), tokens()), model(videos(2), tokens()))


def test_vifi_clip_needs_the_clip_that_it_started_from(tmp_path):
    path = vifi_file(tmp_path / "vifi.pth")
    with pytest.raises(CheckpointError, match=r"lack CLIP's token embedding(.|\n)*--clip ViT-B-16\.pt"):
        checkpoint.read(path)
    with pytest.raises(CheckpointError, match="embedded by another CLIP"):
        checkpoint.read(path, clip=clip_state(seed=1))
    save = tmp_path / "clip.pt"
    torch.save(clip_state(), save)
    with pytest.raises(CheckpointError, match="clip is for ViFi-CLIP files"):
        checkpoint.read(save, clip=clip_state())
    prompts = {"module.image_encoder.VPT": torch.zeros(8, WIDTH), "module.prompt_learner.ctx": torch.zeros(8, TEXT)}
    for name, value in prompts.items():
        with pytest.raises(CheckpointError, match=r"learned prompts \(its second stage\) is not covered"):
            checkpoint.read(vifi_file(tmp_path / "prompts.pth", **{name: value}), clip=clip_state())


# --- ActionCLIP


def fusion_state(layers=6):
    shapes = {"module.frame_position_embeddings.weight": (77, EMBED)}
    return random_state(shapes | blocks("module.transformer.resblocks.", EMBED, layers), seed=3)


def action_file(path, fusion, clip=None):
    saved = {"epoch": 1, "model_state_dict": clip or clip_state(), "fusion_model_state_dict": fusion}
    torch.save(saved | {"optimizer_state_dict": {}}, path)
    return path


@pytest.mark.parametrize("frames", [3, 77])
def test_action_clip_with_the_fusion_transf(tmp_path, frames, shape):
    if WIDTH == 768 and frames == 77:
        pytest.skip("the wide one has few frames, to be quick")
    model = XCLIP.from_pretrained(action_file(tmp_path / "model.pt", fusion_state()))
    assert (model.config.mit_layers, model.config.num_frames, model.config.mit_eps) == (6, 8, 1e-12)
    assert model.config.image_mean[0] == pytest.approx(0.4815, abs=1e-4)
    with torch.no_grad():
        s = double(clip_state())
        fusion = double({name.removeprefix("module."): value for name, value in fusion_state().items()})
        h = image_features(s, videos(frames).flatten(0, 1).double()).unflatten(0, (2, -1))
        mixed = run_blocks(
            h + fusion["frame_position_embeddings.weight"][:frames],
            fusion,
            "transformer.resblocks.",
            EMBED // 64,
            eps=1e-12,
        )
        wanted = cosine((mixed + h).mean(1), text_features(s, tokens()), s["logit_scale"])
        assert_close(model(videos(frames), tokens()), wanted)
    model.save_pretrained(tmp_path / "ours")
    assert XCLIP.from_pretrained(tmp_path / "ours").config == model.config
    with pytest.raises(CheckpointError, match="mit_positions=77"):
        model.save_pretrained(tmp_path / "theirs", layout="huggingface")
    with pytest.raises(ValueError, match="78 frames given; this model has positions for 77"):
        model.mit(torch.zeros(1, 78, EMBED))


def test_action_clip_with_the_mean_and_half_precision(tmp_path):
    clip = {name: value.half() if name.startswith("visual.t") else value for name, value in clip_state().items()}
    model = XCLIP.from_pretrained(action_file(tmp_path / "model.pt", {}, clip))
    assert model.mit is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        video = image_features(double(clip), videos().flatten(0, 1).double()).unflatten(0, (2, -1)).mean(1)
        assert_close(model.encode_video(videos()).video, video)


def test_other_variants_of_action_clip_are_refused_by_name(tmp_path):
    lone = {"LSTM": "module.lstm_visual.weight_ih_l0", "Conv_1D": "module.shift.weight"}
    lone["Transf_cls"] = "module.transformer.cls_token"
    for name, key in lone.items():
        with pytest.raises(CheckpointError, match=f"ActionCLIP with the fusion {name} is not covered"):
            checkpoint.read(action_file(tmp_path / "model.pt", {key: torch.zeros(3)}))
    shifted = clip_state() | {"visual.transformer.resblocks.0.net.ln_1.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="temporal shift"):
        checkpoint.read(action_file(tmp_path / "model.pt", {}, shifted))


# --- open_clip


def open_clip_folder(folder, state, model=None, **config):
    folder.mkdir()
    from safetensors.torch import save_file

    save_file(state, folder / "open_clip_model.safetensors")
    vision = {"image_size": SIZE, "layers": 2, "width": WIDTH, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": VOCAB, "width": TEXT, "heads": 1, "layers": 2}
    values = {"embed_dim": EMBED, "vision_cfg": vision, "text_cfg": text} | (model or {})
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values, **config}))
    return folder


def plain_clip(config):
    """The X-CLIP config that computes the image CLIP itself."""
    vision = dataclasses.replace(config.vision, cross_frame=False)
    return dataclasses.replace(config, vision=vision, mit_layers=0, prompt="none")


@pytest.mark.parametrize("custom", [False, True], ids=["names at the root", "text.*"])
def test_open_clip_computes_exact_gelu(tmp_path, custom, caplog):
    state = clip_state() | {"logit_bias": torch.full((1,), -10.0)}
    named = state
    if custom:
        named = {
            f"text.{name}" if not name.startswith(("visual.", "logit_")) else name: value
            for name, value in state.items()
        }
    folder = open_clip_folder(tmp_path / "open", named, {"init_logit_bias": -5, "custom_text": custom})
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        found = checkpoint.read(folder)
    assert not caplog.records
    assert (found.kind, found.config.vision.activation, found.config.text.activation) == ("clip", "gelu", "gelu")
    model = XCLIP.from_pretrained(folder, config=plain_clip(found.config))
    with torch.no_grad():
        s = double(state)
        video = image_features(s, videos().flatten(0, 1).double(), F.gelu).unflatten(0, (2, -1)).mean(1)
        wanted = cosine(video, text_features(s, tokens(), F.gelu), s["logit_scale"]) - 10
        assert_close(model(videos(), tokens()), wanted)
    model.save_pretrained(tmp_path / "ours")
    again = XCLIP.from_pretrained(tmp_path / "ours")
    assert again.logit_bias == -10
    assert again.config == model.config
    quick = dataclasses.replace(found.config, vision=dataclasses.replace(found.config.vision, activation="quick_gelu"))
    with pytest.raises(CheckpointError, match="has the activation gelu in the vision"):
        checkpoint.read(folder, quick)


def test_open_clip_quick_gelu_and_its_epsilon(tmp_path):
    model = {
        "quick_gelu": True,
        "vision_cfg": {"image_size": [SIZE, SIZE], "layers": 2, "width": WIDTH, "patch_size": 16},
    }
    model["vision_cfg"] |= {"head_width": 32, "norm_kwargs": {"eps": 1e-6}}
    config = checkpoint.read(open_clip_folder(tmp_path / "open", clip_state(), model)).config
    assert (config.vision.activation, config.text.activation, config.vision.heads) == ("quick_gelu", "quick_gelu", 4)
    assert (config.vision_eps, config.layer_norm_eps, config.logit_bias) == (1e-6, 1e-5, None)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit_base_patch16_siglip_224"),
        ("vision_cfg", "layers", [3, 4, 6, 3]),
        ("vision_cfg", "mlp_ratio", 4.9231),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "norm_kwargs", {"elementwise_affine": False}),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "hf_tokenizer_name", "bert-base-uncased"),
        ("text_cfg", "act_kwargs", {"approximate": "tanh"}),
    ],
)
def test_open_clip_models_of_another_kind_are_refused(part, key, value):
    parts = {"vision_cfg": {"layers": 2, "width": WIDTH}, "text_cfg": {}}
    parts[part][key] = value
    with pytest.raises(CheckpointError, match=rf"another kind\n  {part}\.{key} is "):
        config_from_open_clip({"model_cfg": {"embed_dim": EMBED, **parts}}, "there")
    with pytest.raises(CheckpointError, match="multimodal_cfg is"):
        config_from_open_clip(
            {"model_cfg": {"vision_cfg": {"layers": 2}, "text_cfg": {}, "multimodal_cfg": {"a": 1}}}, ""
        )
    with pytest.raises(CheckpointError, match="a value that does not fit"):
        config_from_open_clip({"model_cfg": {"vision_cfg": 3, "text_cfg": {}}}, "there")


class OpenClip(nn.Module):
    """The names that tell an open_clip module's activation, with the parameters of a state dict."""

    def __init__(self, state, activation):
        super().__init__()
        self.state, self.visual = state, nn.Module()
        self.visual.transformer = nn.Module()
        block = nn.Module()
        block.mlp = nn.Sequential(OrderedDict(gelu=activation))
        self.visual.transformer.resblocks = nn.ModuleList([block])

    def state_dict(self):
        return self.state


def test_the_activation_of_a_module_is_read():
    module = OpenClip(clip_state(), nn.GELU())
    assert checkpoint.clip_state(module).config.vision.activation == "gelu"
    config = checkpoint.clip_state(clip_state()).config
    assert config.vision.activation == "quick_gelu"
    with pytest.raises(CheckpointError, match="the activation gelu"):
        XCLIP(config).expand_from(module)


def test_hugging_face_clips_with_gelu(tmp_path):
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config=tower | {"hidden_act": "gelu"},
        vision_config=tower | {"hidden_act": "gelu", "image_size": 32, "patch_size": 16},
        projection_dim=64,
    )
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    found = checkpoint.read(tmp_path)
    model = XCLIP.from_pretrained(tmp_path, config=plain_clip(found.config))
    with torch.no_grad():
        wanted = theirs(tokens(), videos(1)[:, 0]).logits_per_image
        assert_close(model(videos(1), tokens()), wanted.double(), 1e-4)


def test_they_take_a_training_step_and_the_protocols_configuration():
    vision = VisionConfig(SIZE, 16, width=64, layers=1, heads=1, cross_frame=False, activation="gelu")
    text = TextConfig(100, 8, 64, 1, 1, activation="gelu")
    config = XCLIPConfig(vision, text, 64, 8, prompt="none", mit_positions=77, mit_eps=1e-12, logit_bias=-10.0)
    model = XCLIP(config).train()
    ids = torch.tensor([[1, 99], [2, 99]])
    F.cross_entropy(model(videos(4), ids), torch.tensor([0, 1])).backward()
    assert model.mit.positional_embedding.grad[:, :4].abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
