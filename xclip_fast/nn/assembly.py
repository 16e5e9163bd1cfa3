"""The parts of an X-CLIP by the names of its state dict, and the shapes that follow from them."""

from __future__ import annotations

import torch
from torch import nn

from ..config import SwinConfig, XCLIPConfig
from .layers import WithoutInit, init_linear
from .mit import MultiFrameIntegration
from .prompt import VideoSpecificPrompt
from .swin import SwinTower
from .text import TextEncoder
from .vit import VisionTower

OPTIONAL = ("text", "mit", "prompts_generator", "prompts_vectors", "head", "logit_bias")


def parts_of(config: XCLIPConfig) -> dict[str, nn.Module | nn.Parameter | None]:
    """The modules and parameters of ``XCLIP``, initialized. None: the config leaves the part out."""
    width, embed, eps = config.vision.width, config.embed_dim, config.layer_norm_eps
    assert config.mit_heads is not None
    assert config.prompt_heads is not None
    parts: dict[str, nn.Module | nn.Parameter] = {
        "visual": SwinTower(config) if isinstance(config.vision, SwinConfig) else VisionTower(config)
    }
    if config.num_classes is None:
        parts["text"] = TextEncoder(config.text, embed, eps)
    if config.mit_layers:
        parts["mit"] = MultiFrameIntegration(
            embed,
            config.mit_positions or config.num_frames,
            config.mit_layers,
            config.mit_heads,
            config.mit_residual,
            eps if config.mit_eps is None else config.mit_eps,
            config.temporal_std,
            interpolated=config.mit_positions is None,
        )
    if config.prompt == "video":
        parts["prompts_visual_ln"] = nn.LayerNorm(width, eps)
        parts["prompts_visual_proj"] = nn.Parameter(nn.init.normal_(torch.empty(width, embed), std=width**-0.5))
        parts["prompts_generator"] = VideoSpecificPrompt(
            embed, config.prompt_layers, config.prompt_heads, config.prompt_alpha, eps
        )
    elif config.prompt == "vectors":
        vectors = torch.empty(config.prompt_vectors, config.text.width)
        parts["prompts_vectors"] = nn.Parameter(nn.init.normal_(vectors, std=0.02))
    if config.num_classes is not None:
        parts["head"] = head = nn.Linear(embed, config.num_classes)
        init_linear(head)
    else:
        parts["logit_scale"] = nn.Parameter(torch.tensor(config.logit_scale))
        if config.logit_bias is not None:
            parts["logit_bias"] = nn.Parameter(torch.tensor(config.logit_bias))
    return {**parts, **{name: None for name in OPTIONAL if name not in parts}}


def shapes(config: XCLIPConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an ``XCLIP`` state dict. No memory is taken for them."""
    model = nn.Module()
    with torch.device("meta"), WithoutInit():
        for name, part in parts_of(config).items():
            setattr(model, name, part)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
