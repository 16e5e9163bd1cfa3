"""The loss of a video classifier whose classes are texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of ``logits_per_video`` for ``Trainer(compute_loss_func=loss)``.

    Args:
        outputs: of our model or of transformers' ``XCLIPModel``, for the texts of the classes.
        labels: (B,), the number of each video's class among the texts. -100 is ignored.
        num_items_in_batch: videos of all batches that one optimizer step accumulates (default: of this batch).
    """
    logits_BK = outputs["logits_per_video"] if isinstance(outputs, Mapping) else outputs.logits_per_video
    labels = labels.to(logits_BK.device)
    if num_items_in_batch is None:
        return F.cross_entropy(logits_BK, labels)
    return F.cross_entropy(logits_BK, labels, reduction="sum") / num_items_in_batch
