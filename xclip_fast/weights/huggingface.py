"""Hugging Face's folders: ``config.json`` and image processors, translated to ``XCLIPConfig`` and back; tokenizers."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import ACTIVATIONS, TextConfig, VisionConfig, XCLIPConfig
from .layouts import CheckpointError, refused
from .weight_files import read_object

log = logging.getLogger("xclip_fast")

_HF_TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
_HF_TEXT = {
    **_HF_TOWER,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_HF_VISION = {
    **_HF_TOWER,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "num_frames": 8,
    "drop_path_rate": 0.0,
    "mit_hidden_size": 512,
    "mit_intermediate_size": 2048,
    "mit_num_hidden_layers": 1,
    "mit_num_attention_heads": 8,
}

# our field: their key
_TOWER = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
_TOWER |= {"activation": "hidden_act"}
_TEXT = _TOWER | {"vocab_size": "vocab_size", "context_length": "max_position_embeddings"}
_VISION = _TOWER | {"image_size": "image_size", "patch_size": "patch_size", "drop_path": "drop_path_rate"}
_FRAMES = {"num_frames": "num_frames", "mit_layers": "mit_num_hidden_layers", "mit_heads": "mit_num_attention_heads"}


def _hf_part(values: Mapping[str, Any], part: str, defaults: dict[str, Any]) -> dict[str, Any]:
    found = {**defaults, **(values.get(part) or {})}
    if (old := values.get(f"{part}_dict")) is not None:  # the older key with its defaults wins, as in transformers
        found |= {**defaults, **old}
    for name in ("image_size", "patch_size"):
        if isinstance(found.get(name), list | tuple) and len(set(found[name])) == 1:
            found[name] = found[name][0]
    return found


def config_from_huggingface(values: Mapping[str, Any], processor: Mapping[str, Any], where: object) -> XCLIPConfig:
    """The config of a Hugging Face X-CLIP or CLIP from its ``config.json`` and its image processor's values.

    Raises:
        CheckpointError: if a value has a wrong type, or the model differs from X-CLIP, for example in its activation.
    """
    with refused(f"{where}: its configuration has a value that does not fit"):
        clip = values.get("model_type") == "clip"
        text = _hf_part(values, "text_config", _HF_TEXT)
        vision = _hf_part(values, "vision_config", _HF_VISION)
        E = values.get("projection_dim", 512)
        if clip:
            vision |= {"mit_hidden_size": E, "mit_intermediate_size": 4 * E, "mit_num_attention_heads": None}
        acts = {"text": text["hidden_act"], "vision": vision["hidden_act"]}
        wanted: list[tuple[str, Any, Any]] = [
            (f"{part}_config.hidden_act", act, "quick_gelu")
            for part, act in acts.items()
            if not (clip and act in ACTIVATIONS)
        ]
        wanted += [
            ("prompt_hidden_act", values.get("prompt_hidden_act", "quick_gelu"), "quick_gelu"),
            ("text_config.intermediate_size", text["intermediate_size"], 4 * text["hidden_size"]),
            ("vision_config.intermediate_size", vision["intermediate_size"], 4 * vision["hidden_size"]),
            ("vision_config.mit_hidden_size", vision["mit_hidden_size"], E),
            ("vision_config.mit_intermediate_size", vision["mit_intermediate_size"], 4 * E),
            ("vision_config.num_channels", vision["num_channels"], 3),
            ("vision_config.layer_norm_eps", vision["layer_norm_eps"], text["layer_norm_eps"]),
        ]
        if odd := [f"{name} is {got!r}; {want!r} wanted" for name, got, want in wanted if got != want]:
            raise CheckpointError(f"{where}: is a model of another kind\n  " + "\n  ".join(odd))
        config = XCLIPConfig(
            vision=VisionConfig(**{ours: vision[theirs] for ours, theirs in _VISION.items()}),
            text=TextConfig(**{ours: text[theirs] for ours, theirs in _TEXT.items()}),
            **{ours: vision[theirs] for ours, theirs in _FRAMES.items()},
            embed_dim=E,
            prompt_layers=values.get("prompt_layers", 2),
            prompt_heads=None if clip else values.get("prompt_num_attention_heads", 8),
            prompt_alpha=values.get("prompt_alpha", 0.1),
            layer_norm_eps=vision["layer_norm_eps"],
            logit_scale=values.get("logit_scale_init_value", 2.6592),
        )
        # an image CLIP becomes an X-CLIP, which the released recipe trains with ImageNet's mean and deviation
        return config if clip else dataclasses.replace(config, **_normalization(processor, config, where))


def read_processor(folder: Path) -> dict[str, Any]:
    """The values of the image processor in a Hugging Face folder, as transformers 5 or earlier versions store them."""
    values = read_object(folder / "processor_config.json")
    for name in ("image_processor", "video_processor"):
        if isinstance(values.get(name), dict):
            return values[name]
    return read_object(folder / "preprocessor_config.json")


def warn_of_heads(config: XCLIPConfig, where: object) -> None:
    """Logs a warning if MIT and prompts have other numbers of heads than in the released code: the outputs differ.

    Hugging Face's conversions of the large models have 8 heads; the released code has 12.
    """
    plain = dataclasses.replace(config, mit_heads=None, prompt_heads=None)
    odd = [name for name in ("mit_heads", "prompt_heads") if getattr(config, name) != getattr(plain, name)]
    if not odd:
        return
    variant = plain.variant_name
    log.warning(
        "%s: %s, by its configuration. The released code has E / 64 = %d heads, so its outputs differ. To compute like "
        "the released code, give %s, or convert the VideoX file",
        where,
        " and ".join(f"{name} is {getattr(config, name)}" for name in odd),
        plain.mit_heads,
        f"config={variant!r} (--variant {variant})"
        if variant
        else "config=dataclasses.replace(model.config, mit_heads=None, prompt_heads=None)",
    )


def _normalization(processor: Mapping[str, Any], config: XCLIPConfig, where: object) -> dict[str, Any]:
    """``image_mean`` and ``image_std`` of a Hugging Face image processor, with its rescaling.

    Other differences to the pictures of ``decode`` are logged.
    """
    if not processor:
        return {}
    size = config.vision.image_size
    crop = _side(processor.get("crop_size")) if processor.get("do_center_crop", True) else None
    short = _side(processor.get("size")) if processor.get("do_resize", True) else None
    for level, said, theirs, ours in (
        (logging.WARNING, "crops to %s, the model takes %d", crop, size),
        (logging.WARNING, "resamples with PIL's filter %s; decode() has %d, bilinear", processor.get("resample"), 2),
        (logging.INFO, "resizes the short side to %s; decode() resizes to %d", short, short_side(size)),
    ):
        if theirs not in (None, ours):
            log.log(level, f"%s: its processor {said}", where, theirs, ours)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if mean is None and std is None and math.isclose(255 * scale, 1.0):
        return {}
    mean, std = mean or config.image_mean, std or config.image_std
    if math.isclose(255 * scale, 1.0, rel_tol=1e-6):
        return {"image_mean": tuple(mean), "image_std": tuple(std)}
    # (scale v - mean) / std of a level v, written with v / 255
    return {
        name: tuple(x / (255 * scale) for x in values) for name, values in (("image_mean", mean), ("image_std", std))
    }


def short_side(size: int) -> int:
    """The short side that a frame is resized to before a square of ``size`` is cropped from it: 256 for 224."""
    return int(256 / 224 * size)


def _side(value: Any) -> Any:
    if isinstance(value, Mapping):
        return next((value[name] for name in ("shortest_edge", "height", "width") if value.get(name)), None)
    return value


def config_to_huggingface(config: XCLIPConfig, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` as ``transformers`` reads them."""
    plain = XCLIPConfig()
    if not isinstance(config.vision, VisionConfig):
        raise CheckpointError("Hugging Face's X-CLIP has no vision tower with windows; write layout='xclip_fast'")
    ablated = [
        f"{where}{name}={getattr(given, name)!r}"
        for where, given, like, names in (
            ("", config, plain, ("mit_residual", "mit_positions", "mit_eps", "prompt", "num_classes", "logit_bias")),
            ("text.", config.text, plain.text, ("activation",)),
            ("vision.", config.vision, plain.vision, ("cross_frame", "activation", "pre_norm", "layer_norm_eps")),
        )
        for name in names
        if getattr(given, name) != getattr(like, name)
    ] + (["mit_layers=0"] if config.mit_layers == 0 else [])
    if ablated:
        raise CheckpointError(f"Hugging Face's X-CLIP has no {', '.join(ablated)}; use the layout xclip_fast")
    E = config.embed_dim
    vision, text = (
        {theirs: getattr(tower, ours) for ours, theirs in names.items()}
        | {"intermediate_size": 4 * tower.width, "layer_norm_eps": config.layer_norm_eps}
        for tower, names in ((config.vision, _VISION), (config.text, _TEXT))
    )
    vision |= {theirs: getattr(config, ours) for ours, theirs in _FRAMES.items()}
    vision |= {"mit_hidden_size": E, "mit_intermediate_size": 4 * E, "model_type": "xclip_vision_model"}
    text |= {"model_type": "xclip_text_model"}
    model = {"model_type": "xclip", "architectures": ["XCLIPModel"], "projection_dim": E, "text_config": text}
    model |= {"vision_config": vision, "prompt_layers": config.prompt_layers, "prompt_alpha": config.prompt_alpha}
    model |= {"prompt_num_attention_heads": config.prompt_heads, "prompt_hidden_act": "quick_gelu"}
    model |= {"logit_scale_init_value": config.logit_scale, "torch_dtype": str(dtype).removeprefix("torch.")}
    size = config.vision.image_size
    # VideoMAE's processor turns a list of frames into (B, T, 3, S, S), as XCLIPModel needs
    preprocessor: dict[str, Any] = {"image_processor_type": "VideoMAEImageProcessor"}
    preprocessor |= {"processor_class": "XCLIPProcessor", "do_normalize": True, "do_rescale": True}
    preprocessor |= {"image_mean": config.image_mean, "image_std": config.image_std, "resample": 2}
    preprocessor |= {"do_resize": True, "size": {"shortest_edge": short_side(size)}}
    preprocessor |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    return model, preprocessor


def tokenizer_files(config: XCLIPConfig) -> dict[str, Any]:
    """The files of CLIP's tokenizer for ``transformers``, if the text tower has CLIP's vocabulary."""
    from ..text.tokenizer import vocabulary

    tokens, merges = vocabulary()
    if config.text.vocab_size != len(tokens):
        return {}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.text.context_length}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings |= {"pad_token": "<|endoftext|>"}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    return {"vocab.json": json.dumps(tokens), "merges.txt": "\n".join(lines) + "\n", "tokenizer_config.json": settings}
