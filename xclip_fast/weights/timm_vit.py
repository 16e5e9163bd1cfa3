"""The ViTs of timm in our names. Table 10 of the paper starts from them instead of an image CLIP.

They are ``vit_base_patch16_224`` and similar: a class token, learned positions, pre-norm blocks with GELU, LayerNorm
epsilon 1e-6. The config gives the activation, the epsilon, and the mean and standard deviation of the images; the file
holds none of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from torch import Tensor

from ..config import VisionConfig, XCLIPConfig
from .renaming import TIMM_BLOCK, rename

log = logging.getLogger("xclip_fast")

EPS = 1e-6  # of all but timm's CLIP towers

_NAMES = (
    (r"patch_embed\.proj\.weight", "visual.conv1.weight"),
    (r"norm_pre\.(weight|bias)", r"visual.ln_pre.\1"),
    (r"norm\.(weight|bias)", r"visual.ln_post.\1"),
)
_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")
_CLASSIFIER = re.compile(r"(head|pre_logits)\.")  # after the features


def is_timm(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is one of timm's ViTs."""
    return {"patch_embed.proj.weight", "cls_token", "pos_embed"} <= state.keys()


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates timm's names to ours, without the classifier. Unknown names are kept, so that they get listed.

    The bias of the patch embedding is added to the position embeddings of the patches.
    """
    found: dict[str, Tensor] = {}
    for theirs, tensor in state.items():
        match = _BLOCK.fullmatch(theirs)
        if match and (inside := rename(match[2], TIMM_BLOCK)) != match[2]:
            found[f"visual.transformer.resblocks.{match[1]}.{inside}"] = tensor
        elif not _CLASSIFIER.match(theirs):
            found[rename(theirs, _NAMES)] = tensor
    found["visual.class_embedding"] = found.pop("cls_token").flatten()
    position_LD = found.pop("pos_embed").flatten(0, -2)
    bias_D = found.pop("patch_embed.proj.bias", None)
    if bias_D is not None:
        position_LD = position_LD.clone()
        position_LD[1:] += bias_D
    found["visual.positional_embedding"] = position_LD
    return found


def refusal(config: XCLIPConfig) -> str | None:
    """The reason why a ViT of timm cannot start the vision tower of this config, or None."""
    vision = config.vision
    if not isinstance(vision, VisionConfig):
        return "a ViT of timm's cannot start a tower with windows: leave vision.depths and vision.widths out"
    if not vision.pre_norm and vision.activation != "gelu":
        return f"timm's ViTs have the activation gelu, and vision.activation is {vision.activation!r}; set it to 'gelu'"
    if not vision.pre_norm and config.vision_eps != EPS:
        log.warning(
            "timm's ViTs have LayerNorm epsilon %g, the config %g: set vision.layer_norm_eps", EPS, config.vision_eps
        )
    return None
