"""Finds the weights inside the wrappers of training frameworks: nested dictionaries, and prefixes of names.

It knows no list of frameworks. It looks for a key that ends with a name that every X-CLIP, CLIP or ViT has. The part of
the key before that name is the prefix of all weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layouts import NOT_WEIGHTS

FUSION = "fusion_model."  # starts the names of ActionCLIP's second model here; FUSION + "mean": it has no weights

log = logging.getLogger("xclip_fast")

# The patch embedding, which every layout has under one of these names.
_ANCHORS = (
    "visual.conv1.weight",
    "vision_model.embeddings.patch_embedding.weight",
    "image_encoder.conv1.weight",  # of ViFi-CLIP
    "image_encoder.patch_embed.proj.weight",  # of UniCL
    "visual.patch_embed.proj.weight",  # of UniCL, older
    "visual.embeddings.0.conv.weight",  # ours, X-Florence
    "patch_embed.proj.weight",  # of timm: last, because it ends two of the others
)
# A segment that a wrapper adds inside a name (_orig_mod, _fsdp_wrapped_module, module). Our names have none like it.
_ADDED = re.compile(r"(?:^|(?<=\.))(?:_\w+|module)\.")
_FRONT = re.compile(r"(?:(?:_\w+|module)\.)*")
_DEPTH = 4  # of nested dictionaries
_AVERAGED = re.compile(r"ema|averag|teacher|shadow", re.IGNORECASE)


def unwrap(content: Mapping[Any, Any], where: object) -> dict[Any, Any]:
    """The state dict inside ``content``, with names without prefixes; ``content`` itself if it holds no model.

    Of several models, a plain one is preferred to an averaged one, then the outermost, then the first. A logged line
    names the others. Other values than tensors of the model are left out.
    """
    found = list(_models(content))
    if not found:
        return dict(content)
    found.sort(key=lambda each: (bool(_AVERAGED.search(each.title)), len(each.keys)))
    chosen, *others = found
    if others:
        names = ", ".join(each.title for each in others)
        log.warning("%s: holds several models; %s is read, not %s", where, chosen.title, names)
    kept: dict[Any, Any] = {}
    left_out = []
    for name, value in chosen.content.items():
        plain = _ADDED.sub("", name) if isinstance(name, str) and name.startswith(chosen.front) else ""
        own = plain[len(chosen.prefix) :] if plain.startswith(chosen.prefix) else ""
        if own and (isinstance(value, Tensor) or NOT_WEIGHTS.match(own)):
            kept[own] = value
        else:
            left_out.append(str(name))
    if isinstance(fusion := content.get("fusion_model_state_dict"), Mapping):  # ActionCLIP's, beside its CLIP
        named = {_ADDED.sub("", str(name)): value for name, value in fusion.items()}
        kept |= {FUSION + name: value for name, value in (named or {"mean": torch.empty(0)}).items()}
    if left_out:
        log.info("%s: left out, because they are not part of the model: %s", where, ", ".join(left_out[:5]))
    return kept


class _Model(NamedTuple):
    content: Mapping[str, Any]
    keys: tuple[str, ...]  # that lead to it
    front: str  # added by wrappers at the start of its names
    prefix: str  # of its names after that

    @property
    def title(self) -> str:
        return ".".join((*self.keys, self.prefix)).rstrip(".") or "the outermost"


def _models(outermost: Mapping[Any, Any]) -> Iterator[_Model]:
    waiting: list[tuple[Any, tuple[str, ...]]] = [(outermost, ())]
    seen = {id(outermost)}
    while waiting:
        content, keys = waiting.pop(0)
        known = set()
        for key, value in content.items():
            if not isinstance(key, str):
                continue
            if isinstance(value, Mapping) and len(keys) < _DEPTH and id(value) not in seen:
                seen.add(id(value))  # a damaged file may hold a dictionary inside itself
                waiting.append((value, (*keys, key)))
            plain = _ADDED.sub("", key)
            for anchor in _ANCHORS:
                if isinstance(value, Tensor) and f".{plain}".endswith(f".{anchor}"):
                    prefix = plain.removesuffix(anchor)
                    if prefix not in known:
                        known.add(prefix)
                        yield _Model(content, keys, _FRONT.match(key)[0], prefix)  # type: ignore[index]
                    break
