"""FastCCTBlock against equations 7 to 9 written out with torch's own modules and a concatenated message."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xclip_fast import FastCCTBlock
from xclip_fast.nn.layers import drop_path_scale

WIDTH, HEADS = 128, 2


def make_block(frames: int = 3, **options: object) -> FastCCTBlock:
    block = FastCCTBlock(WIDTH, HEADS, frames, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, WIDTH**-0.5)
    return block


def paper_block(block: FastCCTBlock, x_FLD: Tensor, frames: int, scales: tuple[Tensor, ...] | None = None) -> Tensor:
    """Equations 7 to 9 to the letter. ``scales``: drop path factors (B,) of CFA, IFA, FFN."""
    batch = x_FLD.shape[0] // frames
    fusion, diffusion, ffn = scales or (torch.ones(batch, dtype=x_FLD.dtype),) * 3
    m = block.message_fc(x_FLD[:, 0]).view(batch, frames, WIDTH).transpose(0, 1)
    normed = block.message_ln(m)
    m = m + fusion[None, :, None] * block.message_attn(normed, normed, normed, need_weights=False)[0]
    m = m.transpose(0, 1).reshape(-1, 1, WIDTH)
    sequence = torch.cat([x_FLD, m], dim=1)
    normed = block.ln_1(sequence).transpose(0, 1)
    mixed = block.attn(normed, normed, normed, need_weights=False)[0].transpose(0, 1)
    per_frame = diffusion.repeat_interleave(frames)[:, None, None]
    z = (sequence + per_frame * mixed)[:, :-1]
    u = block.mlp.c_fc(block.ln_2(z))
    per_frame = ffn.repeat_interleave(frames)[:, None, None]
    return z + per_frame * block.mlp.c_proj(u * torch.sigmoid(1.702 * u))


@pytest.mark.parametrize(("batch", "frames", "tokens"), [(2, 3, 17), (1, 1, 2), (3, 5, 50), (1, 64, 5)])
def test_equals_the_paper_with_gradients(batch: int, frames: int, tokens: int) -> None:
    block = make_block(frames, batch_first=True).double()
    x = torch.randn(batch * frames, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    cotangent = torch.randn_like(x)
    got, wanted = block(x), paper_block(block, x, frames)
    torch.testing.assert_close(got, wanted)
    for name, a, b in zip(
        ["x", *dict(block.named_parameters())],
        torch.autograd.grad(got, inputs, cotangent),
        torch.autograd.grad(wanted, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_state_dict_has_the_released_names() -> None:
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    wanted = {f"{name}.{part}" for name in ("attn", "message_attn") for part in attention}
    modules = ("message_fc", "message_ln", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    wanted |= {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    assert set(make_block().state_dict()) == wanted


def test_layout_follows_batch_first() -> None:
    sequence_first, batch_first = make_block(), make_block(batch_first=True)
    batch_first.load_state_dict(sequence_first.state_dict())
    x = torch.randn(6, 9, WIDTH)
    torch.testing.assert_close(sequence_first(x.transpose(0, 1)).transpose(0, 1), batch_first(x))


def test_another_number_of_frames_may_be_given() -> None:
    block = make_block(3, batch_first=True)
    x = torch.randn(4, 5, WIDTH)
    torch.testing.assert_close(block(x, 2), paper_block(block, x, 2))
    torch.testing.assert_close(block(x, num_frames=4), paper_block(block, x, 4))


def test_drop_path_is_drawn_per_video_on_all_three_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(3, drop_path=0.4, batch_first=True).train()
    x = torch.randn(4 * 3, 5, WIDTH)
    drawn = []
    draw = block.draw_drop_scales

    def remember(*args: object) -> object:
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(block, "draw_drop_scales", remember)
    seen = set()
    for _ in range(20):
        got = block(x)
        torch.testing.assert_close(got, paper_block(block, x, 3, tuple(drawn[-1])))
        for branch, scale in enumerate(drawn[-1]):
            assert scale.shape == (4,)
            seen |= {(branch, round(float(value), 4)) for value in scale}
    assert seen == {(branch, value) for branch in range(3) for value in (0.0, round(1 / 0.6, 4))}
    torch.testing.assert_close(block.eval()(x), paper_block(block, x, 3))


def test_drop_path_keeps_the_expectation() -> None:
    scale = drop_path_scale(20000, 0.3, torch.empty(0))
    assert abs(float(scale.mean()) - 1) < 0.03
    assert abs(float((scale == 0).float().mean()) - 0.3) < 0.02


@pytest.mark.parametrize(
    ("shape", "message"),
    [((5, 6, 64), r"D = 128 wanted"), ((6, 128), r"\(L, B \* T, D\)"), ((5, 7, 128), r"7 frames in all.*videos of 3")],
)
def test_wrong_tokens_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_block(3)(torch.randn(shape))


def test_wrong_shape_of_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into 3 heads"):
        FastCCTBlock(WIDTH, 3, 3)
    with pytest.raises(ValueError, match="activation is 'relu'; one of quick_gelu, gelu wanted"):
        FastCCTBlock(64, 1, 2, activation="relu")
    with pytest.raises(ValueError, match="num_frames 0"):
        FastCCTBlock(WIDTH, HEADS, 0)


def test_wrong_drop_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_path 1\.0"):
        FastCCTBlock(WIDTH, HEADS, 3, drop_path=1.0)


def test_low_precision_residual_keeps_its_dtype() -> None:
    block = make_block(3, batch_first=True)
    x = torch.randn(6, 9, WIDTH)
    exact = block(x)
    low = block.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert F.cosine_similarity(low.float().flatten(), exact.flatten(), dim=0) > 0.999


def test_autocast_keeps_a_float32_residual() -> None:
    block = make_block(3, batch_first=True)
    x = torch.randn(6, 9, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, block(x), rtol=0.1, atol=0.3)


def test_compiles_in_one_graph() -> None:
    block = make_block(3, batch_first=True)
    x = torch.randn(6, 9, WIDTH)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
