"""open_clip's ``open_clip_config.json``, translated to ``XCLIPConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import Activation, TextConfig, VisionConfig, XCLIPConfig
from .layouts import CheckpointError, refused

FILE = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# keys that are read below, or have no effect on a model that open_clip does not train
_READ = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias", "init_logit_scale"}
    | {"custom_text", "nonscalar_logit_scale", "cast_dtype", "output_dict"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "no_ln_pre", "norm_kwargs"}
    | {"patch_dropout", "output_tokens", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads"}
    | {"final_ln_after_pool", "timm_pool", "timm_proj", "timm_drop"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "norm_kwargs", "pad_id", "output_tokens"}
    | {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}
# required values of keys, if they are given; other keys must be None, False or empty
_WANTED = {
    "mlp_ratio": 4.0,
    "pool_type": {"vision_cfg": "tok", "text_cfg": "argmax"},
    "proj_type": "linear",
    "block_type": "default",
    "text_arch": "clip",
    "tiktoken_name": "cl100k_base",
}


def has_gelu(model: nn.Module) -> bool | None:
    """Whether an open_clip or OpenAI CLIP computes exact GELU in its first block; None for another module."""
    tower: Any = getattr(model, "visual", None)
    try:
        activation = tower.transformer.resblocks[0].mlp.gelu
    except (AttributeError, IndexError, TypeError):
        return None
    points = torch.linspace(-3, 3, 13)
    with torch.no_grad():
        return torch.allclose(activation(points), F.gelu(points), atol=1e-5)


def config_from_open_clip(values: Mapping[str, Any], where: object) -> XCLIPConfig:
    """The config of an open_clip model from its ``open_clip_config.json``.

    GELU is exact, as open_clip's models compute it, unless the file says ``quick_gelu``.

    Raises:
        CheckpointError: if a value is of a wrong type, or the model computes something that CLIP here does not; every
            such key is named.
    """
    with refused(f"{where}: its {FILE} holds a value that does not fit"):
        model = values["model_cfg"]
        vision, text = model["vision_cfg"], model["text_cfg"]
        odd = []
        for part, values in (("", model), ("vision_cfg", vision), ("text_cfg", text)):
            for name, value in values.items():
                wanted = _WANTED.get(name)
                wanted = wanted.get(part) if isinstance(wanted, dict) else wanted
                norms = [key for key in value if key != "eps"] if name == "norm_kwargs" and value else []
                if (name not in _READ[part] and value and value != wanted) or norms:
                    odd.append(f"{part + '.' if part else ''}{name} is {value!r}")
        if not isinstance(vision["layers"], int):
            odd.append(f"vision_cfg.layers is {vision['layers']!r}: a ResNet")
        if odd:
            raise CheckpointError(f"{where}: an open_clip model of another kind\n  " + "\n  ".join(odd))
        activation: Activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        eps, text_eps = ((part.get("norm_kwargs") or {}).get("eps", 1e-5) for part in (vision, text))
        width = vision["width"]
        size = vision.get("image_size", 224)
        if isinstance(size, list | tuple) and len(set(size)) == 1:
            size = size[0]
        sizes = "vocab_size", "context_length", "width", "layers", "heads"  # with the defaults of TextConfig
        return XCLIPConfig(
            vision=VisionConfig(
                image_size=size,
                patch_size=vision.get("patch_size", 16),
                width=width,
                layers=vision["layers"],
                heads=width // vision.get("head_width", 64),
                activation=activation,
                pre_norm=not vision.get("no_ln_pre", False),
                layer_norm_eps=None if eps == text_eps else eps,
            ),
            text=TextConfig(activation=activation, **{name: text[name] for name in sizes if name in text}),
            embed_dim=model["embed_dim"],
            layer_norm_eps=text_eps,
            logit_bias=model.get("init_logit_bias"),
        )
