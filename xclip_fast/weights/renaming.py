"""What the layouts share: names translated by a table of patterns, and grids brought to another size."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

# Inside a block of timm's ViTs and of the Swins that are written like them.
TIMM_BLOCK = (
    (r"norm([12])\.(weight|bias)", r"ln_\1.\2"),
    (r"attn\.qkv\.(weight|bias)", r"attn.in_proj_\1"),
    (r"attn\.proj\.(weight|bias)", r"attn.out_proj.\1"),
    (r"mlp\.fc1\.(weight|bias)", r"mlp.c_fc.\1"),
    (r"mlp\.fc2\.(weight|bias)", r"mlp.c_proj.\1"),
)


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """The name by the first rule (pattern, template) that fits all of it. Unknown names stay and get listed."""
    for pattern, template in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    return name


def resize_grid(rows_NC: Tensor, old: int, new: int) -> Tensor:
    """The rows of a grid of old x old, as rows of one of new x new (bicubic)."""
    grid = rows_NC.T.reshape(1, -1, old, old).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T.to(rows_NC.dtype).contiguous()
