"""The layouts of weights: names, shapes and configurations, translated to ours and back.

Our names are VideoX's with the text tower under ``text.``. One table translates between them and Hugging Face's names,
in both directions.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import TextConfig, VisionConfig, XCLIPConfig
from ..nn import assembly
from . import timm_vit, unicl
from .renaming import rename

log = logging.getLogger("xclip_fast")

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit. The message says which, what was wanted and what to do."""


@contextlib.contextmanager
def refused(told: str) -> Iterator[None]:
    """Turns an error of a wrong or missing value in the block into a CheckpointError: ``told``, and the error."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        missing = "there is no " if isinstance(error, KeyError) else ""
        raise CheckpointError(f"{told}: {missing}{error}") from error


# (ours, Hugging Face). # is a layer number, * the rest of the name. If two rows share our name, the first is written.
_LAYERS = (
    ("visual.transformer.resblocks.#.", "vision_model.encoder.layers.#."),
    ("text.transformer.resblocks.#.", "text_model.encoder.layers.#."),
    ("mit.resblocks.#.", "mit.encoder.layers.#."),
)
_IN_LAYER = (
    ("attn.*", "self_attn.*"),
    ("ln_1.*", "layer_norm1.*"),
    ("ln_2.*", "layer_norm2.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
    ("message_fc.*", "message_fc.*"),
    ("message_ln.*", "message_ln.*"),
    ("message_attn.*", "message_attn.*"),
)
_NAMES = (
    *((ours + a, theirs + b) for ours, theirs in _LAYERS for a, b in _IN_LAYER),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.ln_pre.*", "vision_model.pre_layernorm.*"),
    ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # spelled so in Hugging Face's CLIP
    ("visual.ln_post.*", "vision_model.post_layernorm.*"),
    ("visual.proj", "visual_projection.weight"),
    ("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("text.ln_final.*", "text_model.final_layer_norm.*"),
    ("text.text_projection", "text_projection.weight"),
    ("mit.positional_embedding", "mit.position_embedding"),
    ("prompts_visual_ln.*", "prompts_visual_layernorm.*"),
    ("prompts_visual_proj", "prompts_visual_projection"),
    ("prompts_generator.norm.*", "prompts_generator.layernorm.*"),
)
_TRANSPOSED = ("visual.proj", "text.text_projection")  # the weight of a Linear there, an (in, out) matrix here
_ROOT_TEXT = re.compile(r"(token_embedding|positional_embedding|transformer|ln_final|text_projection)(\.|\Z)")
NOT_WEIGHTS = re.compile(
    r"(.*\.)?(position_ids|attn_mask|relative_position_index|input_resolution|context_length|vocab_size)\Z"
)
_SPLIT = re.compile(r"(.*\b(?:message_)?attn)\.([qkv])_proj\.(weight|bias)\Z")
_PACKED = re.compile(r"(.*\b(?:message_)?attn)\.in_proj_(weight|bias)\Z")
_NEW_IN_XCLIP = re.compile(r".*\.message_|mit\.|prompts_|head\.")  # not in an image CLIP


def _rules(source: int) -> list[tuple[str, str]]:
    rules = []
    for row in _NAMES:
        pattern = re.escape(row[source]).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
        template = re.sub("[#*]", r"\\1", row[1 - source], count=1)
        rules.append((pattern, re.sub("[#*]", r"\\2", template)))
    return rules


_FROM_OURS, _FROM_HF = _rules(0), _rules(1)


def to_ours(state: Mapping[Any, Any], where: object) -> tuple[State, str]:
    """Translates a state dict to our names. Returns it with its kind: xclip_fast, huggingface, videox, clip or timm.

    Raises:
        CheckpointError: if it is neither an X-CLIP nor an image CLIP with a vision transformer.
    """
    found = {name: value for name, value in state.items() if not NOT_WEIGHTS.match(str(name))}
    if strange := [name for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise CheckpointError(f"{where}: is not a state dict: {strange[:5]} are not names of tensors")
    if any(name.startswith("vision_model.") for name in found):
        kind, found = "huggingface", from_huggingface(found)
    elif "visual.conv1.weight" in found:
        kind = "xclip_fast" if {"text.token_embedding.weight", "head.weight"} & found.keys() else "videox"
        found = {f"text.{name}" if _ROOT_TEXT.match(name) else name: value for name, value in found.items()}
    elif unicl.is_ours(found):
        kind = "xclip_fast"
    elif unicl.is_unicl(found):
        kind, found = "clip", unicl.to_ours(found)
    elif timm_vit.is_timm(found):
        kind, found = "timm", timm_vit.to_ours(found)
    else:
        raise CheckpointError(
            f"{where}: is neither an X-CLIP nor a CLIP with a vision transformer, nor a ViT of timm: no key is "
            "visual.conv1.weight or patch_embed.proj.weight, and none starts with vision_model.; it has "
            f"{len(found)} keys, such as {list(found)[:5]}"
        )
    if kind != "timm" and not any(is_new(name) for name in found):
        kind = "clip"
    for name in ("logit_scale", "logit_bias"):
        if name in found and found[name].numel() == 1:  # of shape (1,) under some wrappers
            found[name] = found[name].reshape(())
    return {name: value.detach().contiguous() for name, value in found.items()}, kind


def is_new(name: str) -> bool:
    """Whether a parameter, in our names, is new in an X-CLIP: message, MIT, prompts or linear head."""
    return _NEW_IN_XCLIP.match(name) is not None


def from_huggingface(state: Mapping[str, Tensor]) -> State:
    """Translates Hugging Face's names, of X-CLIP or CLIP, to ours. Packs q, k and v; transposes two projections."""
    found: State = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for theirs, tensor in state.items():
        name = rename(theirs, _FROM_HF)
        if match := _SPLIT.match(name):
            parts.setdefault((match[1], match[3]), {})[match[2]] = tensor
        else:
            found[name] = tensor.t() if name in _TRANSPOSED and tensor.ndim == 2 else tensor
    for (attention, kind), qkv in parts.items():
        if len(qkv) == 3:
            found[f"{attention}.in_proj_{kind}"] = torch.cat([qkv[part] for part in "qkv"])
        else:  # kept: check_keys lists it with the missing ones
            found |= {f"{attention}.{part}_proj.{kind}": tensor for part, tensor in qkv.items()}
    return found


def to_huggingface(state: Mapping[str, Tensor]) -> State:
    """Translates our names to those of ``transformers.XCLIPModel``."""
    found: State = {}
    for name, tensor in state.items():
        if match := _PACKED.match(name):
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                found[rename(f"{match[1]}.{part}_proj.{match[2]}", _FROM_OURS)] = chunk.clone()
        else:
            found[rename(name, _FROM_OURS)] = tensor.t() if name in _TRANSPOSED else tensor
    return found


def shapes(config: XCLIPConfig, *, only_clip: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an ``XCLIP`` state dict. ``only_clip``: those that an image CLIP also has."""
    found = assembly.shapes(config)
    return {name: shape for name, shape in found.items() if not (only_clip and is_new(name))}


def check_keys(
    expected: Mapping[str, Tensor | tuple[int, ...]], state: Mapping[str, Tensor], where: object = "state dict"
) -> None:
    """Compares a state dict with the expected names, given with tensors or shapes.

    Raises:
        CheckpointError: lists every missing, unexpected and misshapen key, and those of whole numbers. Equal keys of
            layers share a line.
    """
    wanted = {name: tuple(like.shape if isinstance(like, Tensor) else like) for name, like in expected.items()}
    found = [(name, state[name]) for name in expected if name in state]
    groups = {
        "missing": [(name, "") for name in expected if name not in state],
        "unexpected": [(name, "") for name in state if name not in expected],
        "misshapen": [
            (name, f"is {list(each.shape)}, wanted {list(wanted[name])}")
            for name, each in found
            if tuple(each.shape) != wanted[name]
        ],
        "not floating": [(name, f"is {each.dtype}") for name, each in found if not each.is_floating_point()],
    }
    if any(groups.values()):
        said = [f"{len(keys)} {what}:{_listed(keys)}" for what, keys in groups.items() if keys]
        raise CheckpointError(f"{where}: the weights do not fit the configuration:\n" + "\n".join(said))


def _listed(keys: list[tuple[str, str]], most: int = 40) -> str:
    lines: dict[str, int] = {}
    for name, note in keys:
        line = f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', name, count=1)} {note}".rstrip()
        lines[line] = lines.get(line, 0) + 1
    shown = [f"\n  {line}" + (f" (in {count} layers)" if "*" in line else "") for line, count in lines.items()]
    return "".join(shown[:most]) + (f"\n  and {len(shown) - most} more lines" if len(shown) > most else "")


def infer_config(state: Mapping[str, Tensor], where: object, *, timm: bool = False) -> XCLIPConfig:
    """Infers a config from the shapes of a state dict in our names, with head size 64, epsilon 1e-5 and quick GELU.

    An image CLIP gets the defaults of an X-CLIP for the rest. A ViT of timm has GELU and its own epsilon.
    """
    if unicl.is_ours(state):
        with refused(f"{where}: it has no configuration; pass config=XCLIPConfig(...), which its shapes do not tell"):
            return unicl.infer_config(state)
    textual = not timm and ("text.token_embedding.weight" in state or "head.weight" not in state)
    needed = ["visual.conv1.weight", "visual.positional_embedding"]
    if not timm and not textual:
        needed += ["visual.proj", "head.weight"]
    elif textual:
        needed += ["text.token_embedding.weight", "text.positional_embedding", "text.text_projection"]
    if missing := [name for name in needed if name not in state or state[name].ndim < 2]:
        raise CheckpointError(f"{where}: has no configuration, and one cannot be inferred without {missing}")
    D, _, _, P = state["visual.conv1.weight"].shape
    W = state["text.token_embedding.weight"].shape[1] if textual else 512
    tokens = state["visual.positional_embedding"].shape[0]
    if D > 1024 or D % 64 or W % 64 or math.isqrt(tokens - 1) ** 2 != tokens - 1:
        raise CheckpointError(
            f"{where}: the number of heads or the image size cannot be inferred from widths {D} and {W} and {tokens} "
            "tokens in a frame (head size 64 holds up to width 1024); pass config=XCLIPConfig(...)"
        )

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    given: dict[str, Any] = {}
    other: dict[str, Any] = {"activation": "gelu", "layer_norm_eps": timm_vit.EPS} if timm else {}
    if any(is_new(name) for name in state):  # an X-CLIP, perhaps ablated; an image CLIP keeps the defaults
        other["cross_frame"] = any(".message_" in name for name in state)
        given["mit_layers"] = count("mit.resblocks.")
        given["prompt_layers"] = count("prompts_generator.decoder.")
        if "mit.positional_embedding" in state:
            given["num_frames"] = state["mit.positional_embedding"].shape[1]
        if "prompts_vectors" in state:
            given |= {"prompt": "vectors", "prompt_vectors": state["prompts_vectors"].shape[0]}
        elif not any(name.startswith("prompts_") for name in state):
            given["prompt"] = "none"
    layers = count("visual.transformer.resblocks.")
    if timm:
        other["pre_norm"] = "visual.ln_pre.weight" in state
    given["vision"] = VisionConfig(P * math.isqrt(tokens - 1), P, width=D, layers=layers, heads=D // 64, **other)
    if textual:
        context, text_layers = state["text.positional_embedding"].shape[0], count("text.transformer.resblocks.")
        V = state["text.token_embedding.weight"].shape[0]
        given["text"] = TextConfig(V, context, width=W, layers=text_layers, heads=W // 64)
        given["embed_dim"] = state["text.text_projection"].shape[1]
        if "logit_bias" in state:
            given["logit_bias"] = float(state["logit_bias"])
    elif not timm:
        given |= {"num_classes": state["head.weight"].shape[0], "embed_dim": state["visual.proj"].shape[1]}
    return XCLIPConfig(**given)
