"""Rows as Parquet files: what a store would hold, after every kind of run."""

import os
from pathlib import Path

import pytest
import torch
from small import CONFIG

from xclip_fast import XCLIP
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.search import Index

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'xclip-fast[search]'")


def names(folder: Path) -> list[str]:
    table = pq.read_table(folder)
    return sorted(os.path.basename(path) for path in table["path"].to_pylist())


def interrupted(files: int) -> None:
    raise KeyboardInterrupt


def test_adds_updates_and_drops(tmp_path):
    torch.manual_seed(0)
    XCLIP(CONFIG).save_pretrained(tmp_path / "a")
    videos, out = tmp_path / "videos", tmp_path / "rows.parquet"
    videos.mkdir()
    for index in range(3):
        write_clip(videos / f"{index}.mp4", render(CLASSES[index], 0, frames=12, size=(48, 64)))
    (videos / "broken.mp4").write_text("x" * 100)
    index = Index.open(out, tmp_path / "a", device="cpu", dtype="float32")
    summary = index.add(videos)
    assert (len(summary.added), len(summary.failed)) == (3, 1)
    assert names(out) == ["0.mp4", "1.mp4", "2.mp4", "broken.mp4"]
    first = pq.read_table(out).to_pylist()
    assert [row["error"] is None for row in sorted(first, key=lambda row: row["path"])] == [True, True, True, False]
    assert len(first[0]["vector"]) == 64

    write_clip(videos / "1.mp4", render("growing", 0, frames=16, size=(48, 64)))
    (videos / "0.mp4").unlink()
    write_clip(videos / "3.mp4", render("growing", 1, frames=12, size=(48, 64)))
    again = Index.open(out, tmp_path / "a", device="cpu", dtype="float32")
    summary = again.add(videos)
    assert [len(each) for each in (summary.added, summary.updated, summary.dropped)] == [1, 1, 1]
    assert summary.unchanged == 1
    assert names(out) == ["1.mp4", "2.mp4", "3.mp4", "broken.mp4"]
    assert again.store.counts() == (3, 3, 1)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    with pytest.raises(KeyboardInterrupt):
        again.add(videos, on_plan=interrupted)
    assert Index.open(out, tmp_path / "a", device="cpu", dtype="float32").add(videos).unchanged == 3
    with pytest.raises(ValueError, match="search in a store"):
        again.search("a cat")
    with pytest.raises(ValueError, match="frames 3, not 4"):
        Index.open(out, tmp_path / "a", frames=4)
    (tmp_path / "b.parquet").mkdir()
    (tmp_path / "b.parquet" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="other files"):
        Index.open(tmp_path / "b.parquet", tmp_path / "a")
