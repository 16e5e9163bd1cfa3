"""Swapping the blocks of image CLIPs in place: Hugging Face's CLIP and SigLIP, OpenAI's names, open_clip's."""

import copy
import logging
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from small import QuickGELU, assert_close, is_swapped, randomize
from torch import nn
from xclip_fast.kernels import dispatch

from xclip_fast import accelerate

WIDTH, HEADS = 128, 2


@pytest.fixture(autouse=True)
def _log_again():
    dispatch._logged.clear()


def swapped(model, least):
    ours = accelerate(copy.deepcopy(model))
    assert sum(is_swapped(module) for module in ours.modules()) == least
    return ours


def compare_gradients(theirs, ours, run):
    """Outputs and all gradients of both, of one weighted sum. The bias of keys moves no attention."""
    results = []
    for model in (theirs, ours):
        model.zero_grad()
        outputs = run(model)
        generator = torch.Generator().manual_seed(7)
        sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs).backward()
        results.append((outputs, {name: parameter.grad for name, parameter in model.named_parameters()}))
    for got, wanted in zip(results[1][0], results[0][0], strict=True):
        assert_close(got, wanted)
    compared = 0
    for name, wanted in results[0][1].items():
        if wanted is not None and not name.endswith("k_proj.bias"):
            got = results[1][1][name]
            if name.endswith("in_proj_bias"):
                got, wanted = (torch.cat([bias[:WIDTH], bias[2 * WIDTH :]]) for bias in (got, wanted))
            assert_close(got, wanted, 1e-4)
            compared += 1
    return compared


# --- OpenAI's CLIP and open_clip, written here after their public interfaces: names, shapes and order of dimensions


def mlp(width, activation):
    layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": activation(), "c_proj": nn.Linear(4 * width, width)}
    return nn.Sequential(OrderedDict(layers))


class OpenAINorm(nn.LayerNorm):
    """Both libraries norm in float32 and cast back."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class OpenAIBlock(nn.Module):
    """(L, N, D); the mask is an attribute."""

    def __init__(self, mask=None, activation=QuickGELU):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_1 = OpenAINorm(WIDTH)
        self.mlp = mlp(WIDTH, activation)
        self.ln_2 = OpenAINorm(WIDTH)
        self.attn_mask = mask

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipAttention(nn.Module):
    """open_clip's own, batches first, since version 3."""

    def __init__(self, qk_norm=False):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.scale = self.head_dim**-0.5
        self.in_proj_weight = nn.Parameter(torch.empty(3 * WIDTH, WIDTH))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * WIDTH))
        self.ln_q, self.ln_k = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.ln_inner = nn.Identity()
        self.attn_drop, self.out_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.logit_scale = self.head_scale = None
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, k_x=None, v_x=None, attn_mask=None):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, HEADS, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.ln_q(query), self.ln_k(key), value, attn_mask, scale=self.scale)
        return self.out_drop(self.out_proj(self.ln_inner(mixed.transpose(1, 2).flatten(-2))))


class OpenClipBlock(nn.Module):
    """``attention``: open_clip's own, or torch's with either order of dimensions, as in its older versions."""

    def __init__(self, attention=OpenClipAttention, activation=nn.GELU):
        super().__init__()
        self.ln_1 = OpenAINorm(WIDTH)
        self.attn = attention()
        self.ls_1 = nn.Identity()
        self.ln_2 = OpenAINorm(WIDTH)
        self.mlp = mlp(WIDTH, activation)
        self.ls_2 = nn.Identity()

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        normed = self.ln_1(q_x)
        if isinstance(self.attn, nn.MultiheadAttention):
            mixed = self.attn(normed, normed, normed, need_weights=False, attn_mask=attn_mask)[0]
        else:
            mixed = self.attn(normed, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        x = q_x + self.ls_1(mixed)
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, **given):
        for block in self.resblocks:
            x = block(x, **given)
        return x


def causal(length):
    return torch.full((length, length), float("-inf")).triu(1)


def tokens(*shape):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))


BLOCKS = {
    "openai": (lambda: OpenAIBlock(), {}),
    "openai text": (lambda: OpenAIBlock(causal(5)), {}),
    "openai, GELU": (lambda: OpenAIBlock(activation=nn.GELU), {}),
    "open_clip": (OpenClipBlock, {}),
    "open_clip text": (lambda: OpenClipBlock(activation=QuickGELU), {"attn_mask": causal(5)}),
    "open_clip 2": (lambda: OpenClipBlock(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)), {}),
    "open_clip 1": (lambda: OpenClipBlock(lambda: nn.MultiheadAttention(WIDTH, HEADS)), {"attn_mask": causal(5)}),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_residual_attention_blocks(kind, caplog):
    make, given = BLOCKS[kind]
    theirs = randomize(Stack(make(), make())).eval()
    ours = swapped(theirs, 2)
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        assert compare_gradients(theirs, ours, lambda model: [model(tokens(5, 5), **given)]) == 24
        with torch.no_grad():
            assert_close(ours(tokens(5, 5), **given), theirs(tokens(5, 5), **given))
    assert not caplog.records
    assert list(ours.state_dict()) == list(theirs.state_dict())


CHANGES = {
    "adapter": lambda block: setattr(block.mlp, "c_proj", nn.Sequential(block.mlp.c_proj, nn.Tanh())),
    "hook": lambda block: block.ln_1.register_forward_hook(lambda module, args, out: out * 2),
    "layer scale": lambda block: setattr(block, "ls_1", nn.Linear(WIDTH, WIDTH)),
    "norm of queries": lambda block: setattr(block.attn, "ln_q", nn.LayerNorm(WIDTH // HEADS)),
    "dropout": lambda block: setattr(block.attn, "out_drop", nn.Dropout(1.0)),
    "norm in the mlp": lambda block: block.mlp.insert(3, nn.LayerNorm(WIDTH, bias=True)),
    "activation": lambda block: setattr(block.mlp, "gelu", QuickGELU()),
    "tanh GELU": lambda block: setattr(block.mlp, "gelu", nn.GELU("tanh")),
    "epsilon": lambda block: setattr(block.ln_2, "eps", 0.5),
    "scale": lambda block: setattr(block.attn, "scale", 0.5),
}


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_parts_act(change, first):
    theirs = randomize(Stack(OpenClipBlock(), OpenClipBlock())).train()
    ours = copy.deepcopy(theirs)
    if not first:
        accelerate(ours)
    for model in (theirs, ours):
        torch.manual_seed(3)
        CHANGES[change](model.resblocks[0])
    if first:
        accelerate(ours)
    with torch.no_grad():
        assert_close(ours(tokens(2, 5)), theirs(tokens(2, 5)))
    assert is_swapped(ours.resblocks[1])


def test_what_computes_something_else_is_left_alone(caplog):
    class Prompted(OpenAIBlock):  # as ViFi-CLIP's second stage
        def __init__(self):
            super().__init__()
            self.VPT_shallow = nn.Parameter(torch.zeros(2, WIDTH))

    model = randomize(Stack(Prompted(), OpenClipBlock(lambda: OpenClipAttention(qk_norm=True)), OpenAIBlock()))
    accelerate(model)
    x = tokens(5, 2)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        model.resblocks[0](x)
    assert "has parameters of its own" in caplog.text
    assert [is_swapped(block) for block in model.resblocks][2]


def test_masks_are_read(caplog):
    theirs = randomize(Stack(OpenClipBlock()))
    ours = swapped(theirs, 1)
    mask = causal(5)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        for _ in range(2):
            assert_close(ours(tokens(2, 5), attn_mask=mask), theirs(tokens(2, 5), attn_mask=mask))
        with torch.inference_mode():
            assert_close(ours(tokens(2, 5), attn_mask=causal(5)), theirs(tokens(2, 5), attn_mask=causal(5)))
        assert not caplog.records
        mask[3, 1] = -1.0  # the same tensor with other values
        assert_close(ours(tokens(2, 5), attn_mask=mask), theirs(tokens(2, 5), attn_mask=mask))
    assert "an attention mask that is not causal is given" in caplog.text


# --- Hugging Face


def sizes(width=WIDTH, **more):
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "projection_dim": 64,
        **more,
    }


def clip(attention="sdpa", act="quick_gelu"):
    transformers = pytest.importorskip("transformers")
    text = sizes(vocab_size=100, max_position_embeddings=12, hidden_act=act, eos_token_id=99, bos_token_id=98)
    vision = sizes(image_size=32, patch_size=16, hidden_act=act)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    config._attn_implementation = attention
    return randomize(transformers.CLIPModel(config)).eval()


def labels(count=3, length=7):
    ids = torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(4))
    ids[:, -1] = 99
    ids[0, 3:] = 99
    return ids


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def both_features(model):
    vision = model.vision_model(images()).last_hidden_state
    return [vision, model.text_model(labels()).last_hidden_state, model(labels(), images()).logits_per_image]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_huggingface_clip(act, caplog):
    theirs = clip(act=act)
    ours = swapped(theirs, 4)
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        assert compare_gradients(theirs, ours, both_features) == 74
        with torch.no_grad():
            for got, wanted in zip(both_features(ours), both_features(theirs), strict=True):
                assert_close(got, wanted)
    assert not caplog.records


TOWERS = {  # width, heads, FFN, pixels, patch
    "ViT-B/16": (768, 12, 3072, 224, 16),
    "ViT-L/14@336": (1024, 16, 4096, 336, 14),
    "ViT-H/14": (1280, 16, 5120, 224, 14),  # heads of 80
    "SigLIP so400m/14": (1152, 16, 4304, 224, 14),  # heads of 72, tanh GELU
}


@pytest.mark.parametrize("tower", TOWERS)
def test_real_shapes(tower):
    """One layer of each, with all its gradients."""
    transformers = pytest.importorskip("transformers")
    width, heads, hidden, pixels, patch = TOWERS[tower]
    values = sizes(width, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=hidden)
    values |= {"image_size": pixels, "patch_size": patch}
    if "SigLIP" in tower:
        theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**values))
    else:
        act = "gelu" if "H/14" in tower else "quick_gelu"
        theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**values, hidden_act=act))
    theirs = randomize(theirs).eval()
    ours = swapped(theirs, 1)
    image = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(5))
    assert compare_gradients(theirs, ours, lambda model: [model(image).last_hidden_state]) >= 15
    with torch.no_grad():
        assert_close(ours(image).last_hidden_state, theirs(image).last_hidden_state)


def test_eager_attention_gives_masks(caplog):
    theirs = clip("eager")
    ours = swapped(theirs, 4)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        for _ in range(2):
            for got, wanted in zip(both_features(ours), both_features(theirs), strict=True):
                assert_close(got, wanted)
        assert not caplog.records
        for model in (theirs, ours):
            model.set_attn_implementation("sdpa")
        assert_close(both_features(ours)[1], both_features(theirs)[1])
    assert not caplog.records


def test_a_mask_of_padding_computes_as_before(caplog):
    theirs = clip()
    ours = swapped(theirs, 4)
    mask = torch.ones(3, 7, dtype=torch.int64)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        assert_close(*(model.text_model(labels(), mask).last_hidden_state for model in (ours, theirs)))
        assert not caplog.records
        mask[0, 4:] = 0
        assert_close(*(model.text_model(labels(), mask).last_hidden_state for model in (ours, theirs)))
    assert "text features are the same, and faster, without attention_mask" in caplog.text
    with torch.no_grad():  # and so they are
        assert_close(
            *(model.get_text_features(labels(), given).pooler_output for model in (ours,) for given in (mask, None))
        )


def test_huggingface_siglip():
    transformers = pytest.importorskip("transformers")
    text = sizes(vocab_size=100, max_position_embeddings=7, projection_size=WIDTH)
    vision = sizes(image_size=32, patch_size=16, intermediate_size=320)
    theirs = randomize(
        transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    ).eval()
    ours = swapped(theirs, 4)

    def run(model):
        return [model.vision_model(images()).last_hidden_state, model.text_model(labels()).last_hidden_state]

    assert compare_gradients(theirs, ours, run) >= 64
    with torch.no_grad():
        # a flag that these attentions do not read
        layers = [model.text_model.encoder.layers[0] for model in (ours, theirs)]
        assert_close(*(layer(tokens(2, 5), None, is_causal=True) for layer in layers))


def test_half_precision_with_norms_in_float32():
    """As OpenAI's CLIP comes on a GPU."""
    theirs = randomize(Stack(OpenAIBlock(), OpenAIBlock())).half()
    for block in theirs.resblocks:
        block.ln_1.float()
        block.ln_2.float()
    ours = swapped(theirs, 2)
    with torch.no_grad():
        assert_close(ours(tokens(5, 2).half()).float(), theirs(tokens(5, 2).half()).float(), 1e-2)


def test_towers_alone_and_hidden_states():
    theirs = clip().vision_model
    ours = swapped(theirs, 2)
    with torch.no_grad():
        found, wanted = (model(images(), output_hidden_states=True).hidden_states for model in (ours, theirs))
    assert len(found) == len(wanted) == 3
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


def test_both_towers_of_x_clip():
    """Its text tower and its multi-frame transformer have CLIP's blocks."""
    transformers = pytest.importorskip("transformers")
    vision = sizes(image_size=32, patch_size=16, num_frames=3, mit_hidden_size=64, mit_intermediate_size=256)
    text = sizes(vocab_size=100, max_position_embeddings=12)
    config = transformers.XCLIPConfig(
        text_config=text, vision_config=vision | {"mit_num_attention_heads": 1}, projection_dim=64
    )
    config.prompt_num_attention_heads = 1
    theirs = randomize(transformers.XCLIPModel(config)).eval()
    ours = swapped(theirs, 6)  # five layers and the encoder of frames
    given = {"input_ids": labels(), "pixel_values": images(6).unflatten(0, (2, 3))}
    with torch.no_grad():
        assert_close(ours(**given).logits_per_video, theirs(**given).logits_per_video)


def test_compiles_whole():
    theirs = clip()
    ours = swapped(theirs, 4)
    for part, given in (("vision_model", images()), ("text_model", labels())):
        compiled = torch.compile(getattr(ours, part), backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert_close(compiled(given).last_hidden_state, getattr(theirs, part)(given).last_hidden_state)


def test_training_steps():
    theirs = clip()
    ours = swapped(theirs, 4)
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(labels(2), images(), return_loss=True).loss.backward()
            optimizer.step()
    with torch.no_grad():
        assert_close(both_features(ours)[2], both_features(theirs)[2], 1e-3)


def test_half_precision():
    theirs = clip().to(torch.bfloat16)
    ours = swapped(theirs, 4)
    with torch.no_grad():
        got, wanted = (model.vision_model(images().bfloat16()).last_hidden_state for model in (ours, theirs))
    assert_close(got.float(), wanted.float(), 3e-2)
