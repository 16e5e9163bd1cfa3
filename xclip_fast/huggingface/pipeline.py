"""``pipeline("zero-shot-video-classification")``, a task that transformers does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Pipeline

from ..acceleration import accelerate
from ..text.templates import fill
from ..weights.hub import locate
from ..weights.huggingface import config_from_huggingface, read_processor
from ..weights.recipe import Trained
from .models import Video, XCLIPFastModel, XCLIPFastProcessor


class ZeroShotVideoClassificationPipeline(Pipeline):
    """Classifies a video among given labels.

        classify = pipeline("zero-shot-video-classification", model="xclip-base-patch16")
        classify("clip.mp4", candidate_labels=["riding a bike", "swimming"])
        # [{'score': 0.98, 'label': 'riding a bike'}, {'score': 0.02, 'label': 'swimming'}]

    The model is ours, or transformers' ``XCLIPModel``.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        model: Any = self.model
        self.is_ours = isinstance(model, XCLIPFastModel)
        if self.is_ours:
            self.prepare = XCLIPFastProcessor(model.xclip.config, Trained.read(model.name_or_path or None))
            return
        if model.config.model_type != "xclip":
            raise ValueError(
                f"{type(model).__name__} is not an X-CLIP; a folder of XCLIP.save_pretrained, or one of Hugging Face's "
                "X-CLIPs, is wanted"
            )
        accelerate(model)
        path = model.name_or_path
        processor = read_processor(locate(path)) if path else {}
        config = config_from_huggingface(model.config.to_dict(), processor, path or "the model")
        self.prepare = XCLIPFastProcessor(config)

    def __call__(self, videos: Video, candidate_labels: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Args:
            videos: one, or a list: a path, an address, or frames uint8 (T, H, W, 3).
            candidate_labels: the labels, K strings.
            hypothesis_template: a sentence with ``{}`` in the label's place (default: the label alone).
            num_frames: T (default: as in training).
            top_k: number of labels to return (default: all).

        Returns:
            for each video a list of ``{"score", "label"}``, the largest score first. The scores of all labels sum to 1.
        """
        if not candidate_labels or isinstance(candidate_labels, str):
            raise ValueError(f"candidate_labels is {candidate_labels!r}; a list of strings wanted")
        return super().__call__(videos, candidate_labels=list(candidate_labels), **kwargs)

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        names = ("candidate_labels", "hypothesis_template", "num_frames")
        before = {name: given.pop(name) for name in names if name in given}
        after = {"top_k": given.pop("top_k")} if "top_k" in given else {}
        if given:
            raise TypeError(f"unknown arguments: {', '.join(given)}")
        return before, {}, after

    def preprocess(
        self,
        video: Any,
        candidate_labels: Sequence[str],
        hypothesis_template: str = "{}",
        num_frames: int | None = None,
    ) -> dict[str, Any]:
        inputs = self.prepare(fill(candidate_labels, [hypothesis_template]), [video], num_frames=num_frames)
        if not self.is_ours:  # transformers' takes normalized pixels
            config = self.prepare.config
            mean, std = (torch.tensor(each) for each in (config.image_mean, config.image_std))
            pixels = ((inputs["pixel_values"] / 255 - mean) / std).permute(0, 1, 4, 2, 3)
            inputs["pixel_values"] = pixels.to(self.dtype)
        return {"candidate_labels": candidate_labels, "inputs": inputs}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        outputs = self.model(**model_inputs["inputs"])
        return {"candidate_labels": model_inputs["candidate_labels"], "logits": outputs.logits_per_video}

    def postprocess(self, model_outputs: dict[str, Any], top_k: int | None = None) -> list[dict[str, Any]]:
        scores = model_outputs["logits"][0].float().softmax(-1).tolist()
        rows = zip(scores, model_outputs["candidate_labels"], strict=True)
        return [{"score": score, "label": label} for score, label in sorted(rows, key=lambda row: -row[0])][:top_k]
