"""From the features of videos to logits over labels, and the error of an answer that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..model import XCLIP
    from ..nn.features import VideoFeatures

NOT_A_NUMBER = "the answer is not a number; try --dtype float32"
LABELS_AT_ONCE = 1024  # bounds the memory of the prompts, whatever the number of labels


def label_scorer(
    model: XCLIP, labels: Sequence[str], templates: Sequence[str] | None = None
) -> Callable[[VideoFeatures], Tensor]:
    """A function from video features to logits (B, K). The labels are encoded here, once.

    ``templates``: sentences to average each label over. A model with a linear head ignores the labels.
    """
    if model.config.num_classes is not None:
        return model.similarity
    text_KE = model.encode_text_ensemble(labels, templates) if templates else model.encode_text(labels)
    parts = text_KE.split(LABELS_AT_ONCE)
    return lambda found: torch.cat([model.similarity(found, part_KE) for part_KE in parts], dim=1)
