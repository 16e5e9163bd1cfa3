"""An evaluation in parts is the evaluation of the whole."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small import CONFIG

from xclip_fast import XCLIP
from xclip_fast.data.manifest import index
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.evaluate.loop import evaluate
from xclip_fast.scale.evaluation import evaluate_part, merge


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("evaluation")
    for number, label in enumerate(CLASSES[:6]):
        (folder / label).mkdir()
        for clip in range(2):
            write_clip(folder / label / f"{clip}.mp4", render(label, number, clip, frames=6, size=(48, 64)))
    (folder / CLASSES[0] / "bad.mp4").write_text("no video")
    manifest = index(folder, workers=0)
    (folder / CLASSES[1] / "0.mp4").write_text("broken since")
    return manifest


def test_parts_make_the_whole(data):
    torch.manual_seed(0)
    model = XCLIP(CONFIG).eval()
    arguments = {"clips": 2, "workers": 0, "batch_size": 4}
    want = evaluate(model, data, **arguments)
    rows = list(range(len(data)))
    for size in (1, 5, 99):
        chunks = [rows[at : at + size] for at in range(0, len(rows), size)]
        got = merge(data, [evaluate_part(model, data, chunk, **arguments) for chunk in chunks][::-1])
        assert (got.top1, got.top5, got.videos) == (want.top1, want.top5, len(data))
        assert np.array_equal(got.confusion, want.confusion)
        assert got.loss == pytest.approx(want.loss, rel=1e-5)
        assert [each.sample for each in got.predictions] == [each.sample for each in want.predictions]
        for mine, theirs in zip(got.predictions, want.predictions, strict=True):
            assert dataclasses.replace(mine, top=()) == dataclasses.replace(theirs, top=())
            assert [name for name, _ in mine.top] == [name for name, _ in theirs.top]
        assert got.failed.keys() == want.failed.keys()
        assert len(got.failed) == 2
        assert got.failed_names == want.failed_names
        assert got.data == want.data


def test_nothing_to_evaluate(data):
    model = XCLIP(CONFIG).eval()
    bad = [row for row in range(len(data)) if data.videos[row].error]
    with pytest.raises(ValueError, match="none of"):
        merge(data, [evaluate_part(model, data, bad, workers=0)])
    part = evaluate_part(model, data, list(range(3)), workers=0)
    with pytest.raises(RuntimeError, match="of 13"):
        merge(data, [part])
