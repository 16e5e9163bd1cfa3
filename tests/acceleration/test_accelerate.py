"""Swapping the blocks of somebody else's X-CLIP in place."""

import copy
import logging
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from small import QuickGELU, assert_close, is_swapped, randomize
from torch import nn
from torch.nn.utils import prune
from xclip_fast.kernels import dispatch

from xclip_fast import XCLIP, FastCCTBlock, TextConfig, VisionConfig, XCLIPConfig, accelerate
from xclip_fast.acceleration import blocks
from xclip_fast.nn import cct

FRAMES, WIDTH, HEADS = 3, 128, 2


@pytest.fixture(autouse=True)
def _log_again():
    dispatch._logged.clear()


def both(model):
    """The model and an accelerated copy with the same weights."""
    return model, accelerate(copy.deepcopy(model))


# --- the released blocks, written out here after equations 7 to 9


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep) / keep


class ReleasedBlock(nn.Module):
    def __init__(self, width=WIDTH, heads=HEADS, frames=FRAMES, activation=QuickGELU, drop=0.0, **attention):
        super().__init__()
        self.T = frames
        self.message_fc = nn.Linear(width, width)
        self.message_ln = nn.LayerNorm(width)
        self.message_attn = nn.MultiheadAttention(width, heads, **attention)
        self.attn = nn.MultiheadAttention(width, heads, **attention)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        layers = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", activation()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        tokens, frames, width = x.shape
        message = self.message_fc(x[0]).view(-1, self.T, width).transpose(0, 1)  # (T, B, D)
        normed = self.message_ln(message)
        message = message + self.drop_path(self.message_attn(normed, normed, normed, need_weights=False)[0])
        x = torch.cat([x, message.transpose(0, 1).reshape(1, frames, width)])
        normed = self.ln_1(x)
        x = (x + self.drop_path(self.attn(normed, normed, normed, need_weights=False)[0]))[:tokens]
        return x + self.drop_path(self.mlp(self.ln_2(x)))


def released(blocks=2, **kwargs):
    return randomize(nn.Sequential(*(ReleasedBlock(**kwargs) for _ in range(blocks)))).eval()


def tokens(batch=2, seed=1):
    return torch.randn(5, batch * FRAMES, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_released_blocks_give_the_same_outputs_and_gradients():
    theirs, ours = both(released())
    assert all(is_swapped(block) and isinstance(block, ReleasedBlock) for block in ours)
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    weigh = tokens(seed=2)
    (theirs(x) * weigh).sum().backward()
    (ours(y) * weigh).sum().backward()
    assert_close(ours(y), theirs(x))
    assert_close(y.grad, x.grad, 1e-3)
    for (name, wanted), (same, got) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == same
        assert_close(got.grad, wanted.grad, 1e-3)


@pytest.fixture
def pads(monkeypatch):
    """The shapes of streams that were given a spare row."""
    seen, pad = [], cct.F.pad
    monkeypatch.setattr(cct.F, "pad", lambda x, by: seen.append(tuple(x.shape)) or pad(x, by))
    return seen


def test_a_tower_pads_its_stream_once(pads):
    theirs, ours = both(released(blocks=3))
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    pads.clear()
    (ours(y) * tokens(seed=2)).sum().backward()
    assert pads == [(2 * FRAMES, 5, WIDTH)]
    (theirs(x) * tokens(seed=2)).sum().backward()
    assert_close(y.grad, x.grad, 1e-3)
    with torch.no_grad():
        assert_close(ours[1:](tokens()), theirs[1:](tokens()))
        assert len(pads) == 2
        for model in (theirs, ours):
            model.append(nn.LayerNorm(WIDTH))  # no block: it takes plain tokens
        assert_close(ours(tokens()), theirs(tokens()))
        assert len(pads) == 5

    theirs, ours = both(huggingface(num_hidden_layers=3))
    pads.clear()
    with torch.no_grad():
        assert_close(ours(**inputs()).logits_per_video, theirs(**inputs()).logits_per_video)
        assert len(pads) == 1
        (logits, *_), (wanted, *_) = (model(**inputs(), return_dict=False) for model in (ours, theirs))
        assert_close(logits, wanted)


def test_a_hook_on_a_whole_block_sees_plain_tokens(pads):
    theirs, ours = both(huggingface(num_hidden_layers=3))
    shapes = []
    for model in (theirs, ours):
        layers(model)[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
        layers(model)[2].register_forward_hook(lambda module, args, out: shapes.append(out.shape) or out + 1)
    pads.clear()
    with torch.no_grad():
        assert_close(ours(**inputs()).logits_per_video, theirs(**inputs()).logits_per_video)
    assert shapes == [(2 * FRAMES, 5, WIDTH)] * 2
    assert len(pads) == 3


def test_blocks_that_compute_as_before_share_the_stream(pads):
    """The middle one has an adapter."""
    theirs, ours = both(released(blocks=3))
    for model in (theirs, ours):
        PARTS["adapter"](model[1])
    with torch.no_grad():
        pads.clear()
        assert_close(ours(tokens()), theirs(tokens()))
    assert len(pads) == 2


def test_parameters_keys_and_modes_stay(caplog):
    model = released()
    model[1].train()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    modes = [module.training for module in model.modules()]
    seed = torch.random.get_rng_state()
    with caplog.at_level(logging.DEBUG, "xclip_fast"):
        assert accelerate(model) is model
    assert not caplog.records
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), seed)
    kinds = [type(module) for module in model.modules()]
    accelerate(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    theirs, ours = both(released().to(dtype))
    with torch.no_grad():
        assert_close(ours(tokens().to(dtype)), theirs(tokens().to(dtype)), 1e-9 if dtype == torch.float64 else 3e-2)


def test_a_model_without_memory_yet():
    with torch.device("meta"):
        model = accelerate(ReleasedBlock(drop=1e-9))
        model.drop_path.drop_prob = 0.0
        assert model.train()(torch.empty(5, 2 * FRAMES, WIDTH)).shape == (5, 2 * FRAMES, WIDTH)


def test_drop_path_of_released_blocks_drops_whole_videos():
    model = accelerate(released(blocks=1, drop=0.5)).train()
    x = tokens(batch=64)
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(x)
        moved = (model(x) - x).unflatten(1, (64, FRAMES)).abs().amax((0, 2, 3))
    assert 4 <= (moved == 0).sum() <= 32  # both residual branches dropped: a quarter of the videos
    assert (wanted - x).abs().amax() > 0


def test_copies_and_pickles():
    ours = accelerate(released())
    with torch.no_grad():
        wanted = ours(tokens())
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert all(is_swapped(block) for block in again)
            assert torch.equal(again(tokens()), wanted)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.mlp, "gelu", nn.ReLU()), "neither quick GELU nor GELU"),
        (lambda block: setattr(block, "attn_mask", torch.zeros(6, 6)), "attention mask"),
        (lambda block: setattr(block, "drop_path", nn.Dropout(0.1)), "drop probability of Dropout"),
        (lambda block: setattr(block, "forward", block.forward), "replaced by another library"),
        (lambda block: setattr(block, "T", 0), "it failed on a small input"),
    ],
)
def test_blocks_that_differ_are_left_as_they_are(change, reason, caplog):
    model = released()
    change(model[0])
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        accelerate(model)
    assert [is_swapped(block) for block in model] == [False, True]
    assert reason in caplog.text
    with pytest.raises(ValueError, match=r"no block that could be swapped(.|\n)*CrossFramelAttentionBlock") as error:
        accelerate(model[0])
    assert reason in str(error.value)


class Adapter(nn.Module):
    """As an adapter library wraps a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + 1


def quantized(block):
    block.mlp.c_fc = torch.ao.nn.quantized.dynamic.Linear.from_float(with_qconfig(block.mlp.c_fc))


def with_qconfig(linear):
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


PARTS = {
    "epsilon of message_ln": lambda block: setattr(block.message_ln, "eps", 0.5),
    "epsilon of ln_2": lambda block: setattr(block.ln_2, "eps", 0.5),
    "RMSNorm": lambda block: setattr(block, "ln_2", nn.RMSNorm(WIDTH)),
    "RMSNorm first": lambda block: setattr(block, "message_ln", nn.RMSNorm(WIDTH)),
    "an added key": lambda block: setattr(block, "attn", nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True)),
    "no bias": lambda block: setattr(block.mlp, "c_fc", nn.Linear(WIDTH, 4 * WIDTH, bias=False)),
    "other heads": lambda block: setattr(block, "message_attn", nn.MultiheadAttention(WIDTH, 4)),
    "adapter": lambda block: setattr(block.mlp, "c_proj", Adapter(block.mlp.c_proj)),
    "adapter on the message": lambda block: setattr(block, "message_fc", Adapter(block.message_fc)),
    "int8": quantized,
    "hook": lambda block: block.ln_1.register_forward_hook(lambda module, args, out: out * 2),
    "pre-hook": lambda block: block.attn.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:])),
    "hook on the mlp": lambda block: block.mlp.register_forward_hook(lambda module, args, out: out * 2),
    "patched forward": lambda block: setattr(block.mlp, "forward", lambda x: x),
    "activation": lambda block: setattr(block.mlp, "gelu", nn.ReLU()),
    "parametrization": lambda block: nn.utils.parametrizations.weight_norm(block.mlp.c_fc),
    "prune": lambda block: prune.l1_unstructured(block.message_fc, "weight", 0.5),
    "drop path": lambda block: setattr(block, "drop_path", nn.Hardtanh(-0.1, 0.1)),
}


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("change", PARTS)
def test_changed_parts_compute_as_before(change, first, caplog):
    theirs = released()
    ours = copy.deepcopy(theirs)
    if not first:
        accelerate(ours)
    for model in (theirs, ours):
        torch.manual_seed(3)
        PARTS[change](model[0])
    if first:
        accelerate(ours)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        assert_close(ours(tokens()), theirs(tokens()), 1e-5)
    assert is_swapped(ours[1])
    assert not first or is_swapped(ours[0]) or change in ("activation", "drop path")
    assert len(caplog.records) <= 1


def test_a_block_is_tried_out_when_its_hook_is_gone(monkeypatch):
    theirs = released()
    ours = copy.deepcopy(theirs)
    handle = ours[0].ln_1.register_forward_hook(lambda *_: None)
    accelerate(ours)
    computed = []
    compute = blocks._compute
    monkeypatch.setattr(blocks, "_compute", lambda module, *given: computed.append(module) or compute(module, *given))
    with torch.no_grad():
        ours(tokens())
        assert computed == [ours[1]]
        handle.remove()
        computed.clear()
        assert_close(ours(tokens()), theirs(tokens()))
        assert computed == [ours[0], ours[0], ours[1]]  # once on the small input


def test_second_derivatives_and_jvp():
    """Of eager attention, as stock: torch's other attentions have none."""
    theirs, ours = both(huggingface("eager"))
    results = []
    for model in (theirs, ours):
        x = inputs()["pixel_values"].flatten(0, 1).requires_grad_()
        (first,) = torch.autograd.grad(model.vision_model(x).last_hidden_state.pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        _, tangent = torch.func.jvp(lambda x, m=model: m.vision_model(x).last_hidden_state, (x,), (torch.ones_like(x),))
        results.append((second, tangent))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert_close(got, wanted, 1e-3)


def test_another_attention_implementation():
    theirs, ours = both(huggingface())
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def half(module, query, *given, **options):
        return sdpa_attention_forward(module, query / 2, *given, **options)

    AttentionInterface.register("half", half)
    for model in (theirs, ours):
        model.set_attn_implementation("half")
    with torch.no_grad():
        assert_close(ours(**inputs()).logits_per_video, theirs(**inputs()).logits_per_video)
        for model in (theirs, ours):
            model.set_attn_implementation("eager")
            layers(model)[0].self_attn.scale = 0.5
        assert_close(ours(**inputs()).logits_per_video, theirs(**inputs()).logits_per_video)


def test_cpu_offload():
    offload = pytest.importorskip("accelerate").cpu_offload
    theirs, ours = both(huggingface())
    with torch.no_grad():
        wanted = theirs(**inputs()).logits_per_video
        assert_close(offload(ours, execution_device="cpu")(**inputs()).logits_per_video, wanted)
        assert_close(accelerate(offload(theirs, execution_device="cpu"))(**inputs()).logits_per_video, wanted)


class OtherBlock(ReleasedBlock):
    def forward(self, x):
        return super().forward(x) + 0.01


def test_a_block_that_looks_alike_and_computes_something_else_is_refused():
    with pytest.raises(ValueError, match="computes something else"):
        accelerate(randomize(OtherBlock()))


def test_nothing_to_swap_is_an_error():
    with pytest.raises(ValueError, match=r"Linear has no block(.|\n)*XCLIPVisionEncoderLayer: message_fc"):
        accelerate(nn.Linear(2, 2))


def test_our_own_model_is_left_alone():
    config = XCLIPConfig(
        vision=VisionConfig(32, 16, width=64, layers=1, heads=1), text=TextConfig(50, 8, 64, 1, 1), embed_dim=64
    )
    model = XCLIP(config)
    assert accelerate(model) is model
    assert type(model.visual.transformer.resblocks[0]) is FastCCTBlock


def test_calls_that_ours_cannot_take_fall_back_and_say_so_once(caplog):
    theirs, ours = both(released())
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        assert torch.equal(ours[0](x=tokens()), theirs[0](tokens()))
        ours[0](x=tokens())
    assert [record.getMessage() for record in caplog.records] == [
        "ReleasedBlock computes as before, not accelerated: more than the tokens is given"
    ]
    with pytest.raises(ValueError, match="7 frames given, which are not whole videos of 3"):
        ours(torch.randn(5, 7, WIDTH))


def test_dropout_in_attention_falls_back_while_training_only(caplog):
    ours = accelerate(released(dropout=0.3))
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        ours(tokens())
        assert not caplog.records
        ours.train()(tokens())
    assert "attention dropout while training" in caplog.text


# --- Hugging Face


def huggingface(attention="sdpa", **vision):
    transformers = pytest.importorskip("transformers")
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": 32,
        "patch_size": 16,
        "num_frames": FRAMES,
        "mit_hidden_size": 64,
        "mit_intermediate_size": 256,
        "mit_num_attention_heads": 1,
    } | vision
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
    text["vocab_size"] = 100
    config = transformers.XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=64, prompt_num_attention_heads=1
    )
    config._attn_implementation = attention
    model = randomize(transformers.XCLIPModel(config)).eval()
    model.logit_scale.data.fill_(1.0)
    return model


def inputs(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 98, (batch, 6), generator=generator)
    text[:, -1] = 99
    return {"pixel_values": torch.randn(batch, FRAMES, 3, 32, 32, generator=generator), "input_ids": text}


def layers(model):
    return list(model.vision_model.encoder.layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_huggingface_model_gives_the_same(attention):
    theirs = huggingface(attention)
    weigh = torch.randn(2, 2, generator=torch.Generator().manual_seed(2))
    wanted = theirs(**inputs(), output_hidden_states=True)
    (wanted.logits_per_video * weigh).sum().backward()
    parameters = list(theirs.parameters())
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    keys = list(theirs.state_dict())
    theirs.zero_grad()
    assert accelerate(theirs) is theirs
    ours = theirs
    assert all(is_swapped(layer) for layer in layers(ours))
    assert list(ours.state_dict()) == keys
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))

    found = ours(**inputs(), output_hidden_states=True)
    (found.logits_per_video * weigh).sum().backward()
    assert_close(found.logits_per_video, wanted.logits_per_video)
    assert_close(found.video_embeds, wanted.video_embeds)
    hidden, other = found.vision_model_output.hidden_states, wanted.vision_model_output.hidden_states
    assert len(hidden) == len(other) == 3
    for a, b in zip(hidden, other, strict=True):
        assert_close(a, b)
    compared = 0
    for name, parameter in ours.vision_model.named_parameters(prefix="vision_model"):
        # no attention depends on its keys' bias, and the first CFA, whose messages are all alike, not on its queries
        if not name.endswith("k_proj.bias") and ".0.message_attn.q_" not in name and ".0.message_attn.k_" not in name:
            assert_close(parameter.grad, gradients[name], 1e-3)
            compared += 1
    assert compared == 56


def test_huggingface_vision_model_alone_and_saved(tmp_path):
    model = huggingface().vision_model
    pixels = inputs()["pixel_values"].flatten(0, 1)
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state
        accelerate(model)
        assert_close(model(pixels).last_hidden_state, wanted)
        model.save_pretrained(tmp_path)
        assert_close(type(model).from_pretrained(tmp_path)(pixels).last_hidden_state, wanted)


def test_packed_weights_follow_the_parameters():
    model = accelerate(huggingface())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: tensor * 0.7 for name, tensor in state.items()}
    with torch.no_grad():
        first = model(**inputs()).logits_per_video
        assert torch.equal(model(**inputs()).logits_per_video, first)
        for change in (
            lambda: model.load_state_dict(other),
            lambda: model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True),
            lambda: [p.mul_(0.7) for p in model.parameters()],
            lambda: [p.data.mul_(1.1) for p in model.parameters()],
            lambda: [setattr(p, "data", state[name]) for name, p in model.named_parameters()],
        ):
            change()
            got = model(**inputs()).logits_per_video
            fresh = huggingface()
            fresh.load_state_dict(model.state_dict())
            assert_close(got, fresh(**inputs()).logits_per_video)


def test_a_hook_on_a_part_is_still_called(caplog):
    model = accelerate(huggingface())
    seen = []
    layers(model)[0].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(**inputs())
    assert seen
    assert "fc1 has a hook" in caplog.text


def test_inference_mode_and_optimizer_steps():
    theirs, ours = both(huggingface())
    with torch.inference_mode():
        ours(**inputs())
    steps = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (theirs, ours)]
    for _ in range(2):
        for model, optimizer in zip((theirs, ours), steps, strict=True):
            optimizer.zero_grad()
            model(**inputs(), return_loss=True).loss.backward()
            optimizer.step()
    with torch.no_grad():
        assert_close(ours(**inputs()).logits_per_video, theirs(**inputs()).logits_per_video, 1e-3)


def test_gradient_checkpointing():
    ours = accelerate(huggingface())
    ours(**inputs(), return_loss=True).loss.backward()
    plain = [parameter.grad.clone() for parameter in ours.parameters()]
    ours.zero_grad()
    ours.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name is not in all versions
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layer = layers(ours)[0]
    func = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *args, **kwargs: calls.append(1) or func(*args, **kwargs)
    ours(**inputs(), return_loss=True).loss.backward()
    assert calls == [1]
    for parameter, wanted in zip(ours.parameters(), plain, strict=True):
        assert torch.allclose(parameter.grad, wanted, rtol=1e-3, atol=1e-5)


def test_drop_path_draws_as_before():
    theirs, ours = both(huggingface(drop_path_rate=0.5).train())
    results = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        results.append(model(**inputs(batch=8)).logits_per_video.detach())
    assert_close(*results)
    with torch.no_grad():
        assert (results[0] - theirs.eval()(**inputs(batch=8)).logits_per_video).abs().max() > 1e-4


def test_compiles_whole():
    theirs, ours = both(huggingface().vision_model)
    pixels = inputs()["pixel_values"].flatten(0, 1)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(pixels).last_hidden_state, theirs(pixels).last_hidden_state)
    compiled(pixels).last_hidden_state.sum().backward()
    assert ours.encoder.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_attention_weights_fall_back(caplog):
    theirs, ours = both(huggingface("eager"))
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        wanted = theirs(**inputs(), output_attentions=True).vision_model_output.attentions
        found = ours(**inputs(), output_attentions=True).vision_model_output.attentions
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        f"{layer} computes as before, not accelerated: attention weights are asked for"
        for layer in ("XCLIPVisionEncoderLayer", "XCLIPEncoderLayer")
    ]


def test_dropout_and_masks_fall_back(caplog):
    ours = accelerate(huggingface(attention_dropout=0.5))
    layer = layers(ours)[0]
    hidden = torch.randn(FRAMES, 5, WIDTH)
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        layer(hidden, None)
        assert not caplog.records
        layer(hidden, torch.zeros(1, 1, 6, 6))
        assert "an attention mask, or more, is given" in caplog.text
        layer.train()(hidden, None)
    assert "attention dropout while training" in caplog.text


def test_an_adapter_put_in_afterwards_is_not_ignored(caplog):
    theirs, ours = both(huggingface())
    for model in (theirs, ours):
        attention = layers(model)[0].self_attn
        attention.v_proj = Adapter(attention.v_proj)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        assert_close(ours(**inputs()).logits_per_video, theirs(**inputs()).logits_per_video)
    assert "v_proj is a" in caplog.text
    del layers(ours)[0].message_fc
    with pytest.raises(AttributeError, match="message_fc"):
        ours(**inputs())


def test_gelu_models():
    theirs, ours = both(huggingface(hidden_act="gelu"))
    assert all(is_swapped(layer) for layer in layers(ours))
    with torch.no_grad():
        assert_close(ours(**inputs()).logits_per_video, theirs(**inputs()).logits_per_video)


def tuple_layer(base):
    """The calling convention of transformers before 5: two masks, a tuple back."""

    class XCLIPVisionEncoderLayer(base):
        def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
            return (super().forward(hidden_states, attention_mask),)

    return XCLIPVisionEncoderLayer


def test_older_layers_return_tuples():
    model = huggingface()
    layer = layers(model)[0]
    hidden = torch.randn(2 * FRAMES, 5, WIDTH)
    with torch.no_grad():
        wanted = layer(hidden, None)
        layer.__class__ = tuple_layer(type(layer))
        found = accelerate(layer)(hidden, None, None, output_attentions=False)
    assert is_swapped(layer)
    assert isinstance(found, tuple)
    assert len(found) == 1
    assert_close(found[0], wanted)
