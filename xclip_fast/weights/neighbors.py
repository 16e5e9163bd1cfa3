"""ViFi-CLIP and ActionCLIP, video models on CLIP's plain towers, in our names.

ViFi-CLIP (Rasheed et al., CVPR 2023) fine-tunes CLIP on the mean of the frames' features, our CLIP-Mean. Its file
lacks the token embedding, which it neither trains nor saves. ActionCLIP (Wang et al., 2021) puts a fusion model behind
the frames: "Transf" is our multi-frame integration transformer with six layers, "meanP" the mean.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import CLIP_MEAN, CLIP_STD, VisionConfig, XCLIPConfig
from .layouts import CheckpointError, State, infer_config
from .wrappers import FUSION

_EMBEDDING = "text.token_embedding.weight"
_VIFI_FRAMES, _ACTION_FRAMES = 16, 8  # of their models for Kinetics-400; the files don't tell
_FUSION_EPS = 1e-12
# (a name in the file, what it belongs to): variants whose towers or fusion compute something else
_REFUSED = (
    (r".*\bVPT", "ViFi-CLIP with learned prompts (its second stage)"),
    (r"prompt_learner\.ctx$", "ViFi-CLIP with learned prompts (its second stage)"),
    (rf"{FUSION}lstm_visual\.", "ActionCLIP with the fusion LSTM"),
    (rf"{FUSION}shift\.", "ActionCLIP with the fusion Conv_1D"),
    (rf"{FUSION}transformer\.(cls_token|transformer_enc)", "ActionCLIP with the fusion Transf_cls"),
    (r"visual\.time_embedding$", "ActionCLIP with joint space-time attention"),
    (r"visual\.transformer\.resblocks\.\d+\.net\.", "ActionCLIP with temporal shift"),
)
_NAMES = (
    (r"image_encoder\.", "visual."),
    (r"text_encoder\.", "text."),
    (rf"{FUSION}frame_position_embeddings\.weight$", "mit.positional_embedding"),
    (rf"{FUSION}transformer\.resblocks\.", "mit.resblocks."),
)


def kind_of(state: Mapping[Any, Any]) -> str | None:
    """ "vificlip", "actionclip", or None for any other state dict."""
    if "image_encoder.conv1.weight" in state:
        return "vificlip"
    return "actionclip" if any(str(name).startswith(FUSION) for name in state) else None


def rename(state: Mapping[Any, Any], where: object) -> dict[str, Any]:
    """Their names to those of VideoX.

    Raises:
        CheckpointError: of a variant that is not covered, by its name.
    """
    for pattern, title in _REFUSED:
        if found := [name for name in state if re.match(pattern, str(name))]:
            raise CheckpointError(f"{where}: {title} is not covered; it has {len(found)} keys such as {found[0]}")
    renamed: dict[str, Any] = {}
    for theirs, tensor in state.items():
        name = str(theirs)
        if name == f"{FUSION}mean" or name.startswith("prompt_learner."):  # embedded texts of its own classes
            continue
        for pattern, ours in _NAMES:
            name = re.sub(f"^{pattern}", ours, name)
        lone = name == "mit.positional_embedding" and isinstance(tensor, Tensor)
        renamed[name] = tensor[None] if lone else tensor
    return renamed


def add_token_embedding(ours: State, theirs: Mapping[Any, Any], embedding_VW: Tensor | None, where: object) -> None:
    """Give a ViFi-CLIP in our names the token embedding (V, W) of the CLIP that it started from.

    Raises:
        CheckpointError: if there is none, or it is another CLIP's, as the embedded texts inside the file tell.
    """
    if embedding_VW is None:
        raise CheckpointError(
            f"{where}: a ViFi-CLIP, whose files lack CLIP's token embedding. Name the OpenAI CLIP that it started from "
            f"(ViT-B/16 for all released ones): xclip-fast convert {where} NEW_FOLDER --clip ViT-B-16.pt, or "
            "from_pretrained(..., clip='ViT-B-16.pt')"
        )
    known_KLW = theirs.get("prompt_learner.complete_text_embeddings", theirs.get("prompt_learner.token_prefix"))
    if isinstance(known_KLW, Tensor) and known_KLW.numel() and known_KLW.shape[2:] == embedding_VW.shape[1:]:
        start_W = embedding_VW[-2].float()  # of the start-of-text token
        if (known_KLW[0, 0].float() - start_W).abs().max() > 1e-2 * start_W.abs().max():
            raise CheckpointError(f"{where}: its texts were embedded by another CLIP than the one that clip names")
    ours[_EMBEDDING] = embedding_VW


def infer(ours: Mapping[str, Tensor], kind: str, where: object) -> XCLIPConfig:
    """The config of one of them, from its shapes: CLIP-Mean, and ActionCLIP's fusion as MIT."""
    found = infer_config(ours, where)
    assert isinstance(found.vision, VisionConfig)
    vision = dataclasses.replace(found.vision, cross_frame=False)
    found = dataclasses.replace(found, vision=vision, prompt="none", num_frames=_VIFI_FRAMES)
    if kind == "vificlip":
        return dataclasses.replace(found, mit_layers=0)
    position_1TE = ours.get("mit.positional_embedding")
    return dataclasses.replace(
        found,
        num_frames=_ACTION_FRAMES,
        mit_layers=0 if position_1TE is None else found.mit_layers,
        mit_positions=None if position_1TE is None else position_1TE.shape[1],
        mit_eps=_FUSION_EPS,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
