"""Extra keys and values of a frame, or of a video, in a block without a message."""

import copy

import pytest
import torch
import torch.nn.functional as F

from xclip_fast import backend
from xclip_fast.nn.layers import TransformerBlock

FRAMES, LENGTH, WIDTH, HEADS = 6, 5, 128, 2


def written_out(block, x_FLD, context_FKD):
    """By attention over concatenated keys."""
    attention = block.attn
    query, key, value = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    normed, more = block.ln_1(x_FLD), block.ln_1(torch.cat([x_FLD, context_FKD], 1))
    q, k, v = F.linear(normed, query, biases[0]), F.linear(more, key, biases[1]), F.linear(more, value, biases[2])
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
    mixed = ((q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x_FLD = x_FLD + attention.out_proj(mixed)
    hidden = block.mlp.c_fc(block.ln_2(x_FLD))
    return x_FLD + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


@pytest.mark.parametrize(
    ("owners", "keys", "way"),
    [(owners, keys, way) for owners, keys in ((FRAMES, 1), (FRAMES, 3), (2, 7), (2, 0)) for way in ("auto", "a hook")]
    + [(2, 3, "reference"), (2, 3, "triton")],
)
def test_extra_keys(owners, keys, way):
    torch.manual_seed(0)
    block = TransformerBlock(WIDTH, HEADS, 1e-5)
    weigh = torch.randn(FRAMES, LENGTH, WIDTH)
    given = torch.randn(FRAMES, LENGTH, WIDTH), torch.randn(owners, keys, WIDTH)

    exact = copy.deepcopy(block).double()
    x, context = (each.double().requires_grad_() for each in given)
    wanted = written_out(exact, x, context.repeat_interleave(FRAMES // owners, 0))
    (wanted * weigh).sum().backward()

    if way == "a hook":
        block.ln_1.register_forward_hook(lambda *_: None)
    y, more = (each.clone().requires_grad_() for each in given)
    with backend("auto" if way == "a hook" else way):
        got = block.with_context(y, more)
        (got * weigh).sum().backward()
    pairs = [(got, wanted), (y.grad, x.grad), (more.grad, context.grad)]
    pairs += [(ours.grad, theirs.grad) for ours, theirs in zip(block.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert theirs.numel() == 0 or (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    with torch.no_grad(), backend("auto" if way == "a hook" else way):
        assert torch.allclose(block.with_context(*given).double(), wanted, atol=1e-5)
