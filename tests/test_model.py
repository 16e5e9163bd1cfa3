"""The whole model: interface, exact savings, text cache, frames other than the checkpoint's, compile and export."""

import copy
import dataclasses
import logging
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import gelu_mlp, normalized, plain_transformer
from torch import Tensor
from xclip_fast.kernels import dispatch

import xclip_fast
from xclip_fast import VARIANTS, XCLIP, XCLIPConfig, tokenize
from xclip_fast.nn import text as text_module

LABELS = ["riding a bike", "swimming", "playing the accordion while walking", "yoga"]


def frames(batch: int = 2, count: int = 3, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (batch, count, size, size, 3), dtype=torch.uint8)


def test_variants_have_the_shapes_of_their_names() -> None:
    florence = {"Florence-8f-384", "Florence-32f"}
    assert set(VARIANTS) == florence | {
        *("B/32-8f", "B/32-16f", "B/16-8f", "B/16-16f", "L/14-8f", "L/14@336-16f", "B/16-32f")
    }
    for name, config in VARIANTS.items():
        assert f"-{config.num_frames}f" in name
        if name in florence:
            assert ("-384" in name) == (config.vision.image_size == 384)
            continue
        assert f"/{config.vision.patch_size}" in name
        assert ("@336" in name) == (config.vision.image_size == 336)
        assert config.vision.width == 64 * config.vision.heads
        assert config.mit_heads == config.embed_dim // 64
    assert VARIANTS["L/14@336-16f"].vision.patches == 576
    with torch.device("meta"):
        assert sum(p.numel() for p in XCLIP("B/32-8f").parameters()) == pytest.approx(196.6e6, rel=0.01)


def test_config_survives_a_dictionary_and_refuses_nonsense() -> None:
    config = VARIANTS["L/14@336-16f"]
    assert XCLIPConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"vision\.widht: unknown key; did you mean width"):
        XCLIPConfig.from_dict({"vision": {"widht": 3}})
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        XCLIPConfig(mit_heads=5)
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        xclip_fast.VisionConfig(image_size=225)
    with pytest.raises(ValueError, match="drop_path"):
        xclip_fast.VisionConfig(drop_path=1.5)
    with pytest.raises(ValueError, match="num_frames"):
        XCLIPConfig(num_frames=0)
    with pytest.raises(ValueError, match="B/16-8f"):
        XCLIP("B/16")


def test_forward_is_its_parts(tiny_model: XCLIP) -> None:
    video = frames()
    features = tiny_model.encode_video(video)
    assert features.video.shape == (2, 64)
    assert features.patches.shape == (2, 16, 64)
    text = tiny_model.encode_text(LABELS)
    assert text.shape == (4, 64)
    logits = tiny_model.similarity(features, text)
    assert logits.shape == (2, 4)
    torch.testing.assert_close(logits, tiny_model(video, LABELS))
    torch.testing.assert_close(logits, tiny_model(video, tokenize(LABELS)))
    torch.testing.assert_close(tiny_model(video, "yoga"), logits[:, 3:])


CHANGED = {
    "plain": lambda block: None,
    "a hook on the last block": lambda block: block.register_forward_hook(lambda module, args, out: None),
    "a hook on its mlp": lambda block: block.mlp.register_forward_hook(lambda module, args, out: None),
    "a forward of its own": lambda block: setattr(block, "forward", lambda *args: type(block).forward(block, *args)),
    "a class of its own": lambda block: setattr(block, "__class__", of_own_class(type(block))),
}


def of_own_class(kind: Any) -> type:
    return type("Own", (kind,), {"forward": lambda block, x, number, *rest: kind.forward(block, x, number)})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cross_frame", [True, False])
@pytest.mark.parametrize("change", CHANGED)
def test_without_patches_the_last_block_computes_class_rows(
    change: str, cross_frame: bool, recompute: bool, tiny_config: XCLIPConfig
) -> None:
    """The features and all gradients are those with patches."""
    vision = dataclasses.replace(tiny_config.vision, cross_frame=cross_frame, drop_path=0.5)
    model = XCLIP(dataclasses.replace(tiny_config, vision=vision)).double().checkpoint_activations(recompute)
    block, video, gradients = model.visual.transformer.resblocks[-1], frames(4), []
    CHANGED[change](block)
    rows: list[int] = []
    block.ln_2.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    for patches in (True, False):
        torch.manual_seed(0)
        features = model.encode_video(video, patches)
        assert features.patches.shape == (4, 16 if patches else 0, 64)
        model.zero_grad()
        features.video.square().sum().backward()
        gradients.append([p.grad for p in model.visual.parameters()])
    assert all(count == 12 * 17 for count in rows)  # called as a module, it sees them all
    for part, whole in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"\(4, 0, 64\) given; \(4, 16, 64\) wanted.*patches=True"):
        model.similarity(features, model.encode_text(LABELS))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("patches", [True, False])
def test_a_traced_tower_takes_other_numbers_of_videos(patches: bool, tiny_model: XCLIP) -> None:
    tiny_model.requires_grad_(False)
    traced = torch.jit.trace(lambda video: tuple(tiny_model.encode_video(video, patches)), frames(2))
    video = frames(3)
    torch.testing.assert_close(traced(video), tuple(tiny_model.encode_video(video, patches)))


def test_whole_model_equals_the_paper_written_out(tiny_model: XCLIP) -> None:
    """Float64, concatenated messages, padded text, a projection per frame, prompts per video."""
    model = tiny_model.double()
    video = frames()
    pixels = normalized(video, model.config).flatten(0, 1)
    visual = model.visual
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks:
        m = block.message_fc(x[:, 0]).view(2, 3, -1).transpose(0, 1)
        n = block.message_ln(m)
        m = (m + block.message_attn(n, n, n)[0]).transpose(0, 1).flatten(0, 1)[:, None]
        s = torch.cat([x, m], 1)
        n = block.ln_1(s).transpose(0, 1)
        x = (s + block.attn(n, n, n)[0].transpose(0, 1))[:, :-1]
        x = x + gelu_mlp(block.ln_2(x), block.mlp.c_fc, block.mlp.c_proj)
    h = (visual.ln_post(x[:, 0]) @ visual.proj).view(2, 3, -1)
    v = plain_transformer(model.mit.resblocks, h + model.mit.positional_embedding)
    v = (v + h).mean(1)
    z = (model.prompts_visual_ln(x[:, 1:]) @ model.prompts_visual_proj).view(2, 3, 16, -1).mean(1)

    tokens = tokenize(LABELS, pad=True)
    text = model.text
    c = text.token_embedding(tokens) + text.positional_embedding
    mask = torch.full((77, 77), float("-inf"), dtype=torch.float64).triu(1)
    c = text.ln_final(plain_transformer(text.transformer.resblocks, c, mask))
    c = c[torch.arange(4), tokens.argmax(1)] @ text.text_projection

    generator = model.prompts_generator
    z_normed, prompts = generator.norm(z), c.expand(2, -1, -1)
    for layer in generator.decoder:
        a = layer.cross_attn
        split = lambda t: t.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # noqa: E731, B023
        q, k, w = split(a.q_proj(layer.norm1(prompts))), split(a.k_proj(z_normed)), split(a.v_proj(z_normed))
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(64)).softmax(-1) @ w
        prompts = prompts + a.proj(mixed.transpose(1, 2).flatten(-2))
        prompts = prompts + gelu_mlp(layer.norm3(prompts), layer.mlp[0], layer.mlp[2])
    c_hat = c + generator.alpha * prompts
    logits = model.logit_scale.exp() * F.cosine_similarity(v[:, None], c_hat, dim=-1)

    features = model.encode_video(video)
    torch.testing.assert_close(features.video, v, rtol=1e-5, atol=1e-5)  # float32 constants of the normalization
    torch.testing.assert_close(features.patches, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.encode_text(LABELS), c)
    torch.testing.assert_close(model(video, LABELS), logits, rtol=1e-5, atol=1e-5)


def test_uint8_frames_equal_normalized_float(tiny_model: XCLIP) -> None:
    video = frames()
    torch.testing.assert_close(
        tiny_model.encode_video(video),
        tiny_model.encode_video(normalized(video, tiny_model.config).float()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_bfloat16_is_close(tiny_model: XCLIP) -> None:
    video = frames()
    exact = tiny_model(video, LABELS)
    low = tiny_model.bfloat16()(video, LABELS)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0.3)


def test_paper_form_of_equation_6_has_no_residual(tiny_config: XCLIPConfig) -> None:
    model = XCLIP(dataclasses.replace(tiny_config, mit_residual=False))
    h = torch.randn(2, 3, 64)
    without = model.mit(h)
    model.mit.residual = True
    torch.testing.assert_close(model.mit(h), without + h.mean(1))


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_any_number_of_frames_works(tiny_model: XCLIP, count: int) -> None:
    assert tiny_model(frames(1, count), LABELS).isfinite().all()


def test_interpolated_temporal_embedding_is_logged_once(tiny_model: XCLIP, caplog: pytest.LogCaptureFixture) -> None:
    dispatch._logged.clear()
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        for _ in range(3):
            tiny_model.encode_video(frames(1, 6))
        tiny_model.encode_video(frames(1, 3))
    assert [record.message for record in caplog.records] == [
        "the temporal embedding of 3 frames is interpolated to the 6 given"
    ]
    position = tiny_model.mit.positional_embedding
    torch.testing.assert_close(tiny_model.mit._position(5)[:, 2], position[:, 1])  # the middle stays


def test_empty_batch_and_no_labels(tiny_model: XCLIP) -> None:
    assert tiny_model(frames(0), LABELS).shape == (0, 4)
    assert tiny_model(frames(2), torch.zeros(0, 5, dtype=torch.long)).shape == (2, 0)


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 32, 32, 3),
        torch.zeros(3, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 48, 48, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 3, 32, 32, dtype=torch.int64),
        torch.zeros(2, 0, 32, 32, 3, dtype=torch.uint8),
    ],
    ids=lambda video: f"{tuple(video.shape)} {video.dtype}",
)
def test_wrong_video_is_refused(tiny_model: XCLIP, video: Tensor) -> None:
    with pytest.raises(ValueError, match="H = W = 32 and T >= 1 wanted"):
        tiny_model.encode_video(video)


def test_wrong_kinds_of_arguments_are_refused(tiny_model: XCLIP) -> None:
    with pytest.raises(TypeError, match=r"torch\.Tensor wanted"):
        tiny_model.encode_video(frames().numpy())
    with pytest.raises(TypeError, match="XCLIPConfig or a variant's name wanted"):
        XCLIP({"embed_dim": 64})


def test_empty_batch_in_training_with_drop_path() -> None:
    block = xclip_fast.FastCCTBlock(128, 2, 3, drop_path=0.5).train()
    assert block(torch.randn(5, 0, 128)).shape == (5, 0, 128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": "8"}, "a whole number wanted"),
        ({"vision": None}, "vision is None; keys and values wanted"),
        ({"embed_dim": None}, "a whole number wanted"),
        ({"vision": {"patch_size": 0}}, "vision.patch_size is 0; at least 1 wanted"),
        ({"image_mean": [1]}, "a list of 3 numbers wanted"),
        ({"image_std": [0, 0, 0]}, "a number above 0 wanted"),
        ({"mit_layers": -1}, "at least 0 wanted"),
    ],
)
def test_damaged_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XCLIPConfig.from_dict(values)


def test_wrong_tokens_are_refused(tiny_model: XCLIP) -> None:
    with pytest.raises(ValueError, match=r"int32 or int64 \(K, L\)"):
        tiny_model.encode_text(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"int32 or int64 \(K, L\)"):
        tiny_model.encode_text(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at most 77 fit"):
        tiny_model.encode_text(torch.zeros(3, 78, dtype=torch.long))


# ---- text: trimming, packing, cache


def test_padding_changes_nothing(tiny_model: XCLIP) -> None:
    trimmed, padded = tokenize(LABELS), tokenize(LABELS, pad=True)
    assert trimmed.shape[1] < padded.shape[1] == 77
    torch.testing.assert_close(tiny_model.encode_text(trimmed), tiny_model.encode_text(padded))
    padded[0, -5:] = 7  # whatever stands behind the end-of-text token
    torch.testing.assert_close(tiny_model.encode_text(trimmed), tiny_model.encode_text(padded))


def count_encodings(model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = []
    encode = model.text._encode_packed
    monkeypatch.setattr(model.text, "_encode_packed", lambda *given: calls.append(len(given[0])) or encode(*given))
    return calls


def test_text_is_encoded_once_for_each_label_set(tiny_model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_encodings(tiny_model, monkeypatch)
    with torch.no_grad():
        first = tiny_model.encode_text(LABELS)
        assert torch.equal(tiny_model.encode_text(list(LABELS)), first)
        changed = tiny_model.encode_text([*LABELS[:3], "boxing"])
        assert calls == [4, 4]
        torch.testing.assert_close(changed[:3], first[:3])
        assert not torch.allclose(changed[3], first[3])
        assert torch.equal(tiny_model.encode_text(LABELS), first)
        assert calls == [4, 4]
    assert not tiny_model.training


def test_changed_weights_are_a_new_entry(tiny_model: XCLIP) -> None:
    with torch.no_grad():
        first = tiny_model.encode_text(LABELS)
        tiny_model.text.text_projection.mul_(2)
        torch.testing.assert_close(tiny_model.encode_text(LABELS), 2 * first)
        assert tiny_model.bfloat16().encode_text(LABELS).dtype == torch.bfloat16
        state = {name: torch.zeros_like(tensor) for name, tensor in tiny_model.text.state_dict().items()}
        tiny_model.text.load_state_dict(state)
        assert not tiny_model.encode_text(LABELS).any()


def test_kept_features_survive_use_in_place(tiny_model: XCLIP) -> None:
    with torch.no_grad():
        first = tiny_model.encode_text(LABELS)
        wanted = first.clone()
        first /= first.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(tiny_model.encode_text(LABELS), wanted)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_is_noticed(tiny_model: XCLIP, fused: bool) -> None:
    optimizer = torch.optim.AdamW(tiny_model.text.parameters(), lr=0.01, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            before = tiny_model.encode_text(LABELS)
        tiny_model.encode_text(LABELS).sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = tiny_model.encode_text(LABELS)
            assert not torch.allclose(before, after)
            tiny_model.text.forget()
            torch.testing.assert_close(tiny_model.encode_text(LABELS), after)


@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_optimizer_leaves_stale_features(tiny_model: XCLIP, kind: str, compiled: bool) -> None:
    """Fused steps raise no version counter, and a compiled model trains without the eager one noticing."""
    text = tiny_model.text
    trained = torch.compile(text, backend="aot_eager") if compiled else text
    optimizer = torch.optim.AdamW(text.parameters(), lr=1e-2, **{kind: True})
    for set_to_none in (True, False, True):
        with torch.no_grad():
            tiny_model.encode_text(LABELS)  # validation
        optimizer.zero_grad(set_to_none)
        trained(tokenize(LABELS)).sum().backward()
        with torch.no_grad():
            tiny_model.encode_text(LABELS)  # accuracy so far
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            served = tiny_model.encode_text(LABELS)
            text.forget()
            torch.testing.assert_close(served, tiny_model.encode_text(LABELS))


def test_a_step_of_our_own_behind_a_gradient_leaves_no_stale_features(tiny_model: XCLIP) -> None:
    projection = tiny_model.text.text_projection
    tiny_model.encode_text(LABELS).sum().backward()
    with torch.no_grad():
        before = tiny_model.encode_text(LABELS)
        projection.data.mul_(2)
        torch.testing.assert_close(tiny_model.encode_text(LABELS), 2 * before)


def test_replaced_weights_are_noticed(tiny_model: XCLIP) -> None:
    text = tiny_model.text
    with torch.no_grad():
        for _ in range(20):
            before = tiny_model.encode_text(LABELS)
            text.text_projection.data = text.text_projection.data * 1.1
            torch.testing.assert_close(tiny_model.encode_text(LABELS), 1.1 * before, rtol=1e-4, atol=1e-4)
            text.text_projection = torch.nn.Parameter(text.text_projection * 1.1)
            torch.testing.assert_close(tiny_model.encode_text(LABELS), 1.21 * before, rtol=1e-4, atol=1e-4)
        state = {name: tensor * 2 for name, tensor in text.state_dict().items() if name == "text_projection"}
        text.load_state_dict(state, strict=False, assign=True)
        torch.testing.assert_close(tiny_model.encode_text(LABELS), 2 * 1.21 * before, rtol=1e-4, atol=1e-4)


def test_copies_do_not_carry_kept_features(tiny_model: XCLIP) -> None:
    with torch.no_grad():
        wanted = tiny_model.encode_text(LABELS)
        twin = copy.deepcopy(tiny_model)
        assert not twin.text._cache
        torch.testing.assert_close(twin.encode_text(LABELS), wanted)
        assert len(pickle.loads(pickle.dumps(tiny_model)).text._cache) == 0


def test_a_replica_without_parameters_is_not_cached(tiny_model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.nn.DataParallel makes them: tensors in place of parameters."""
    with torch.no_grad():
        wanted = tiny_model.encode_text(LABELS)
        monkeypatch.setattr(tiny_model.text, "parameters", lambda: iter(()))
        calls = count_encodings(tiny_model, monkeypatch)
        torch.testing.assert_close(tiny_model.encode_text(LABELS), wanted)
    assert calls == [4]


def test_many_labels_are_encoded_in_parts(tiny_model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        wanted = tiny_model.encode_text(LABELS)
        tiny_model.text.forget()
        monkeypatch.setattr(text_module, "LABELS_AT_ONCE", 3)
        torch.testing.assert_close(tiny_model.encode_text(LABELS), wanted)


def test_autocast_is_a_new_entry(tiny_model: XCLIP) -> None:
    with torch.no_grad():
        tiny_model.encode_text(LABELS)
        with torch.autocast("cpu", torch.bfloat16):
            assert tiny_model.encode_text(LABELS).dtype == torch.bfloat16


def test_training_the_text_tower_bypasses_the_cache(tiny_model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_encodings(tiny_model, monkeypatch)
    for _ in range(2):
        tiny_model.encode_text(LABELS).sum().backward()
    assert calls == [4, 4]
    tiny_model.text.requires_grad_(False)
    for _ in range(2):
        assert not tiny_model.encode_text(LABELS).requires_grad
    assert calls == [4, 4, 4]


def test_features_cached_in_inference_mode_serve_training(tiny_model: XCLIP) -> None:
    tiny_model.text.requires_grad_(False)
    with torch.inference_mode():
        tiny_model.encode_text(LABELS)
    tiny_model(frames(), LABELS).sum().backward()
    assert tiny_model.prompts_generator.alpha.grad is not None


def test_a_model_made_in_inference_mode_is_not_cached(tiny_config: XCLIPConfig) -> None:
    with torch.inference_mode():
        model = XCLIP(tiny_config)
        first = model.encode_text(LABELS)
        model.text.text_projection.mul_(2)
        torch.testing.assert_close(model.encode_text(LABELS), 2 * first)


def test_cache_is_bounded(tiny_model: XCLIP) -> None:
    with torch.no_grad():
        for index in range(text_module.CACHED_LABEL_SETS + 3):
            tiny_model.encode_text([f"label {index}"])
    assert len(tiny_model.text._cache) == text_module.CACHED_LABEL_SETS


# ---- kernels, training, compile, export


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_whole_model_with_triton_kernels(tiny_model: XCLIP, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Forward and every gradient; in the interpreter on a CPU."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    if dtype == torch.float16:
        request.getfixturevalue("shallow_model")  # leaves one layer of each kind in the model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, video = tiny_model.to(device, dtype), frames().to(device)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = model(video, LABELS)
        F.cross_entropy(logits, torch.tensor([1, 3], device=device)).backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with xclip_fast.backend("reference"):
        logits, grads = step()
    with xclip_fast.backend("triton"):
        got_logits, got_grads = step()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got_logits, logits, rtol=tolerance, atol=tolerance)
    assert set(got_grads) == set(grads) == set(dict(model.named_parameters()))
    for name, wanted in grads.items():
        off = (got_grads[name] - wanted).double().norm() / wanted.double().norm().clamp(min=1e-4)
        assert off < 3 * tolerance, (name, off)


def test_every_parameter_gets_a_gradient(tiny_model: XCLIP) -> None:
    F.cross_entropy(tiny_model.train()(frames(), LABELS), torch.tensor([1, 3])).backward()
    for name, parameter in tiny_model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_drop_path_grows_with_depth() -> None:
    vision = xclip_fast.VisionConfig(image_size=32, width=128, layers=5, heads=2, drop_path=0.2)
    with torch.device("meta"):
        model = XCLIP(XCLIPConfig(vision=vision))
    rates = [block.drop_path for block in model.visual.transformer.resblocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_compile_in_one_graph_gives_the_same_numbers(shallow_model: XCLIP) -> None:
    video, tokens = frames(), tokenize(LABELS)
    compiled = torch.compile(shallow_model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(video, tokens), shallow_model(video, tokens), rtol=1e-4, atol=1e-4)


def test_compile_takes_another_number_of_frames_but_no_strings(shallow_model: XCLIP) -> None:
    compiled = torch.compile(shallow_model, fullgraph=True, backend="eager")
    video, tokens = frames(2, 5), tokenize(LABELS)
    torch.testing.assert_close(compiled(video, tokens), shallow_model(video, tokens))
    with pytest.raises(Exception, match=r"pass xclip_fast\.tokenize\(labels\) instead"):
        compiled(video, LABELS)


def test_compiled_training_step_gives_the_same_gradients(shallow_model: XCLIP) -> None:
    video, tokens = frames(), tokenize(LABELS)
    shallow_model(video, tokens).sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in shallow_model.named_parameters()}
    shallow_model.zero_grad()
    torch.compile(shallow_model, fullgraph=True, backend="aot_eager")(video, tokens).sum().backward()
    for name, parameter in shallow_model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4)


def test_export_gives_the_same_numbers_for_other_batches(shallow_model: XCLIP) -> None:
    video, tokens = frames(2), tokenize(LABELS)
    batch, labels = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("labels", min=2, max=512)
    program = torch.export.export(shallow_model, (video, tokens), dynamic_shapes=({0: batch}, {0: labels}))
    assert not any("xclip_fast" in str(node.target) for node in program.graph.nodes)  # plain ATen, loads anywhere
    more, fewer = frames(5), tokenize(LABELS[:3])
    assert fewer.shape[1] == tokens.shape[1]  # the longest label is among them
    with torch.no_grad():
        torch.testing.assert_close(program.module()(more, fewer), shallow_model(more, fewer), rtol=1e-4, atol=1e-4)


def test_scripts_find_the_public_names() -> None:
    assert set(xclip_fast.__all__) <= set(dir(xclip_fast))

    code = (
        "import sys, torch; before = set(sys.modules); import time; start = time.perf_counter(); import xclip_fast; "
        "took = time.perf_counter() - start; "
        "print([m for m in ('av','tokenizers','safetensors','rich','click','transformers','triton','matplotlib',"
        "'flash_attn','xformers','apex','nvidia.dali') if m in set(sys.modules) - before], took)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, took = done.stdout.rsplit(" ", 1)
    assert modules == "[]"
    assert float(took) < 1.0  # 0.1 s on an idle machine; a loaded one may be slow


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda video: video.uniform_(0, 255), "reach from 0"),
        (lambda video: video.fill_(0).index_fill_(1, torch.tensor([1]), torch.nan), "from nan to nan"),
        (lambda video: video.mul_(torch.inf), "inf|nan"),
    ],
)
def test_floats_that_are_not_normalized_are_refused(tiny_model: XCLIP, spoil: object, wanted: str) -> None:
    size = tiny_model.config.vision.image_size
    video = torch.randn(1, 2, 3, size, size)
    with torch.no_grad():
        tiny_model.encode_video(video)
        with pytest.raises(ValueError, match=wanted) as error:
            tiny_model.encode_video(spoil(video))  # type: ignore[operator]
    assert "uint8 (B, T, H, W, 3)" in str(error.value)
