"""Stage 8: a training on video files, and how much of its time it waits for data."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .case import Job, Row

TINY = (
    "model.vision={image_size: 32, patch_size: 16, width: 64, layers: 1, heads: 1}",
    "model.text={width: 64, layers: 1, heads: 1}",
    "model.embed_dim=64",
    "model.num_frames=2",
    "device=cpu",
    "precision=fp32",
    "stop_after=4",
    "log.every=2",
    "optim.batch_size=4",
    "data.workers=0",
)


def data_wait(job: Job) -> Iterator[Row]:
    row: Row = {"op": "training on mp4 files", "contender": "xclip-fast", "precision": job.precision}
    row |= {"variant": "tiny", "batch": 4} if job.tiny else {"variant": "B/16-8f", "batch": 32}
    with job.trying("xclip-fast", row), tempfile.TemporaryDirectory() as folder:
        if job.tiny:
            row |= train_on_files(Path(folder), 10, (32, 32), TINY)
        else:
            row |= train_on_files(Path(folder))
    yield row


def train_on_files(
    folder: Path, clips: int = 60, size: tuple[int, int] = (256, 340), overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Train B/16 8f for 50 steps of 32 on H.264 files of 340x256 with a keyframe every 12 frames.

    Returns the share of the time that it waited for data, and clips/s, after the first ten steps. The manifest names
    each of the ``clips`` files many times, so that an epoch is long. They are in the page cache: no disk is measured.
    """
    from xclip_fast.data.decode.dali_support import missing
    from xclip_fast.data.manifest import index
    from xclip_fast.data.motion import CLASSES, write_dataset
    from xclip_fast.train import loop as train

    videos = folder / "videos"
    write_dataset(videos, -(-clips // len(CLASSES)), size=size, frames=64, preset="veryfast", g=12, bf=0)
    found = index(videos, workers=0)
    found.select([row % len(found) for row in range(2000)]).write(videos / "often.jsonl")
    data = [f"data.train={videos / 'often.jsonl'}", "data.val=null", "data.val_fraction=0", "model.init=null"]
    run = ["optim.batch_size=32", "stop_after=50", f"output={folder / 'run'}", "log.progress=false"]
    train.main("k400-b16-8f", [*data, *run, *overrides])
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["kind"] == "train"][1:]
    mean = {key: statistics.fmean(row[key] for row in rows) for key in ("data_wait", "clips_per_second")}
    return mean | {"dali": missing() is None, "rows": rows}
