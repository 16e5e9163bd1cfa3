"""From the features of videos to logits over labels, and the error of an answer that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..text.labels import refuse_same_texts

if TYPE_CHECKING:
    from ..model import XCLIP
    from ..nn.features import VideoFeatures

NOT_A_NUMBER = "the answer is not a number; try --dtype float32"
LABELS_AT_ONCE = 1024  # bounds the memory of the prompts, whatever the number of labels


def label_scorer(
    model: XCLIP, labels: Sequence[str], templates: Sequence[str] | None = None
) -> Callable[[VideoFeatures], Tensor]:
    """A function from video features to logits (B, K). The labels are encoded here, once.

    Args:
        labels: the texts; of a model with a linear head, the names of its outputs in order.
        templates: sentences to average each label over.

    Raises:
        ValueError: if two labels are the same text for the model. With a linear head: if there are more or fewer
            labels than outputs, or templates are given.
    """
    outputs = model.config.num_classes
    if outputs is not None:
        if outputs != len(labels):
            raise ValueError(
                f"the model's linear head has {outputs} outputs and there are {len(labels)} labels; evaluate it on the "
                "classes it was trained on, or name its outputs in order with --labels (labels=[...])"
            )
        if templates:
            raise ValueError("the model has a linear head and reads no text; leave out --templates (templates=)")
        return model.similarity
    refuse_same_texts(labels, model.config.label_tokens)
    text_KE = model.encode_text_ensemble(labels, templates) if templates else model.encode_text(labels)
    parts = text_KE.split(LABELS_AT_ONCE)
    return lambda found: torch.cat([model.similarity(found, part_KE) for part_KE in parts], dim=1)
