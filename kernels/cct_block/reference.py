"""A block in plain differentiable torch: fallback on any device and dtype, oracle of the tests, peer of benchmarks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention_reference
from ..common.block import GELUS, Block
from ..layer_norm import layer_norm_reference
from ..linear import linear
from ..packed_attention import packed_reference
from ..quick_gelu import quick_gelu_reference


def cct_block_reference(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    b = Block(*args)  # type: ignore[arg-type]
    y = composed(b)
    nothing = y.new_empty(0, dtype=torch.float32)  # row statistics would cost a pass
    return y, nothing, torch.empty_like(nothing)


def composed(b: Block) -> Tensor:
    """The block out of torch's parts."""
    normed = layer_norm_reference(b.x, b.ln_1_weight, b.ln_1_bias, b.eps)
    if b.frames:
        normed[:, -1] = normed_message(b)  # in the spare row; its query is used by nobody
    x = attend(b, _linear(b, "in", normed))
    # z + FFN(LN_2(z)), which the spare row does not need
    spare = b.frames and b.rows is None
    tokens = x[:, :-1] if spare else x
    hidden = _linear(b, "fc", layer_norm_reference(tokens, b.ln_2_weight, b.ln_2_bias, b.eps))
    approximate = GELUS.get(b.activation)
    hidden = quick_gelu_reference(hidden) if approximate is None else F.gelu(hidden, approximate=approximate)
    y = tokens + scale_samples(_linear(b, "projection", hidden), b.drop_feed_forward)
    return torch.cat([y, x[:, -1:]], dim=1) if spare else y


def _linear(b: Block, name: str, x: Tensor) -> Tensor:
    """The linear layer of a block whose weight has this name."""
    return linear(x, getattr(b, f"{name}_weight"), getattr(b, f"{name}_bias"))


def attend(b: Block, qkv: Tensor) -> Tensor:
    """x + attention for its projection (F, S, 3D)."""
    x, width = b.x, b.x.shape[-1]
    qkv = qkv.unflatten(-1, (3, b.heads, width // b.heads))
    if b.offsets is None:
        mixed = attention_reference(qkv, b.causal, b.bias).flatten(-2)
    else:
        mixed = packed_reference(qkv, b.offsets, b.longest).flatten(-2)
    if b.rows is not None:
        x, mixed = x.reshape(-1, width)[b.rows], mixed.reshape(-1, width)[b.rows]
    return x + scale_samples(_linear(b, "out", mixed), b.drop_attention)


def normed_message(b: Block) -> Tensor:
    """LN_1(m) (F, D) of each frame's message."""
    width = b.x.shape[-1]
    # m = x_class Wm + bm
    m_FD = _linear(b, "message_fc", b.x[:, 0])
    # m = m + CFA(LN_m(m)): attention over the T messages of one video
    normed = F.layer_norm(m_FD, (width,), b.message_ln_weight, b.message_ln_bias, b.eps)
    qkv = _linear(b, "message_in", normed)
    mixed = attention_reference(qkv.view(-1, b.frames, 3, b.heads, width // b.heads)).reshape(-1, width)
    m_FD = m_FD + scale_samples(_linear(b, "message_out", mixed), b.drop_fusion)
    return layer_norm_reference(m_FD, b.ln_1_weight, b.ln_1_bias, b.eps)


def scale_samples(x: Tensor, scale_B: Tensor | None) -> Tensor:
    """x (B * anything, ...) with each of the B samples multiplied by its drop path scale (None: x itself)."""
    if scale_B is None or x.numel() == 0:
        return x
    return (x.reshape(scale_B.shape[0], -1) * scale_B[:, None].to(x.dtype)).reshape(x.shape)
