"""UniCL's Swin beside CLIP's text encoder, in our names: public weights that an X-Florence can start from.

UniCL (Yang et al., CVPR 2022) is what Florence was trained with. Its Swin has neither CoSwin's convolutions nor its
widths: the config that follows from the file has ``convolutional=False`` and the sizes of the file.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping

from torch import Tensor

from ..config import SwinConfig, TextConfig, XCLIPConfig
from .renaming import TIMM_BLOCK, rename, resize_grid

log = logging.getLogger("xclip_fast")

TEXT_EPS = 1e-12  # of its text encoder's LayerNorms; the Swin has torch's 1e-5
_TABLE = "relative_position_bias_table"
_TOWER = r"(?:image_encoder|visual)\."
_TEXT = r"(?:text_encoder|lang_encoder|text)\."
_NAMES = (
    (rf"{_TOWER}patch_embed\.proj\.(weight|bias)", r"visual.embeddings.0.conv.\1"),
    (rf"{_TOWER}patch_embed\.norm\.(weight|bias)", r"visual.embeddings.0.norm.\1"),
    (rf"{_TOWER}norm\.(weight|bias)", r"visual.ln_post.\1"),
    (r"(?:image|vision)_projection", "visual.proj"),
    (rf"{_TEXT}(token_embedding|positional_embedding|ln_final)(.*)", r"text.\1\2"),
    (rf"{_TEXT}resblocks\.(.*)", r"text.transformer.resblocks.\1"),
    (r"text_projection", "text.text_projection"),
)
_STAGE = re.compile(rf"{_TOWER}layers\.(\d+)\.(?:blocks\.(\d+)\.|downsample\.)(.*)")
_LEFT_OUT = re.compile(rf"{_TOWER}head\..*")


def is_unicl(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is UniCL's, with a Swin."""
    return any(re.fullmatch(rf"{_TOWER}patch_embed\.proj\.weight", name) for name in state)


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict in our names has a tower with windows."""
    return "visual.embeddings.0.conv.weight" in state


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UniCL's names to ours. Unknown names are kept, so that they get listed."""
    depths: dict[int, int] = {}
    for name in state:
        if (match := _STAGE.fullmatch(name)) and match[2]:
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _LEFT_OUT.fullmatch(name):
            continue
        if match := _STAGE.fullmatch(name):
            stage = int(match[1])
            if match[2] is None:  # its merging belongs to the stage before
                name = f"visual.embeddings.{stage + 1}.{match[3]}"
            else:
                block = sum(depth for index, depth in depths.items() if index < stage) + int(match[2])
                inside = _TABLE if match[3] == f"attn.{_TABLE}" else f"block.{rename(match[3], TIMM_BLOCK)}"
                name = f"visual.transformer.resblocks.{block}.{inside}"
        else:
            name = rename(name, _NAMES)
        found[name] = tensor
    return found


def infer_config(state: Mapping[str, Tensor]) -> XCLIPConfig:
    """The config of an image model in our names, from its shapes: 8 frames of 224 pixels, a new MIT and prompts.

    Raises:
        ValueError, KeyError: if the shapes do not belong together, or some are missing.
    """
    tables = _tables(state)
    if not tables or "mit.positional_embedding" in state:
        raise ValueError("of an image model with windows alone they do")
    widths: dict[int, int] = {}
    head_size = 0
    for index, table in tables.items():
        width = state[f"visual.transformer.resblocks.{index}.block.ln_1.weight"].shape[0]
        widths[width] = widths.get(width, 0) + 1
        head_size = width // table.shape[1]
    layers = len({name.split(".")[3] for name in state if name.startswith("text.transformer.resblocks.")})
    vocabulary, width = state["text.token_embedding.weight"].shape
    return XCLIPConfig(
        vision=SwinConfig(
            widths=tuple(widths),
            depths=tuple(widths.values()),
            head_size=head_size,
            window=(math.isqrt(max(table.shape[0] for table in tables.values())) + 1) // 2,
            convolutional="visual.embeddings.1.conv.weight" in state,
            layer_norm_eps=1e-5,
        ),
        text=TextConfig(
            vocabulary, state["text.positional_embedding"].shape[0], width=width, layers=layers, heads=width // 64
        ),
        embed_dim=state["text.text_projection"].shape[1],
        mit_layers=4,
        mit_eps=1e-5,
        layer_norm_eps=TEXT_EPS,
    )


def fit_windows(ours: dict[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Bring bias tables to windows of another size (bicubic), in place."""
    for index, table in _tables(ours).items():
        name = f"visual.transformer.resblocks.{index}.{_TABLE}"
        rows, heads = wanted.get(name, table.shape)
        old, new = math.isqrt(table.shape[0]), math.isqrt(rows)
        if old != new and old**2 == table.shape[0] and new**2 == rows and heads == table.shape[1]:
            ours[name] = resize_grid(table, old, new)
            log.info("%s of %d x %d distances is interpolated to %d x %d", name, old, old, new, new)


def _tables(state: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The bias tables by the number of their block, in order."""
    found = {}
    for name, tensor in state.items():
        if (match := re.fullmatch(rf"visual\.transformer\.resblocks\.(\d+)\.{_TABLE}", name)) and tensor.ndim == 2:
            found[int(match[1])] = tensor
    return dict(sorted(found.items()))
