"""A model over many video files: threads decode ahead while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.decode.decoder import decode_many
from ..nn.features import VideoFeatures

if TYPE_CHECKING:
    from ..model import XCLIP


def run_videos(
    model: XCLIP,
    paths: Sequence[str],
    answer: Callable[[VideoFeatures], Sequence[Tensor]] = tuple,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    frames: int | None = None,
    **sampling: Any,
) -> Iterator[tuple[str, list[Tensor] | ValueError]]:
    """Encodes video files in batches and yields each file's part of the answer, in order.

    Call it under ``torch.inference_mode()``.

    Args:
        model: on the device and in the dtype to compute with.
        paths: video files.
        answer: from the features of B videos to tensors (B, ...); by default the features themselves.
        batch_size: B. Default: 16 on a GPU, 1 on a CPU.
        workers: decoding threads. Default: one per core.
        frames: T. Default: the model's.
        sampling: ``sampling`` and ``stride``, as for ``decode``.

    Yields:
        the path, with its row of each tensor on the CPU, or with a ValueError that says what is wrong with the file.
    """
    config, device = model.config, next(model.parameters()).device
    batch = batch_size or (1 if device.type == "cpu" else 16)
    waiting: list[tuple[str, Any]] = []
    videos: list[Tensor] = []
    shape: dict[str, Any] = {"frames": frames or config.num_frames, "size": config.vision.image_size}
    decoded = decode_many(paths, **shape, **sampling, workers=workers, errors="return")
    for done, (path, found) in enumerate(zip(paths, decoded, strict=True), 1):
        waiting.append((path, found))
        if not isinstance(found, ValueError):
            videos.append(found)
        if len(videos) < batch and done < len(paths):
            continue
        answers = [part.cpu() for part in answer(model.encode_video(torch.stack(videos).to(device)))] if videos else []
        row = 0
        for waited, item in waiting:
            if isinstance(item, ValueError):
                yield waited, item
                continue
            own, row = [part[row] for part in answers], row + 1
            finite = all(part.isfinite().all() for part in own)
            yield waited, own if finite else ValueError(f"{waited}: the answer is not a number; try --dtype float32")
        waiting, videos = [], []
