"""Trained on real files through the real loader, X-CLIP tells a clip from the same clip backwards; CLIP-Mean cannot."""

from pathlib import Path

import pytest
import torch

from xclip_fast import XCLIP
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.evaluate.loop import evaluate
from xclip_fast.train import train
from xclip_fast.train.config import load

SHAPE = [
    "model.vision={image_size: 32, patch_size: 16, width: 64, layers: 2, heads: 1}",
    "model.num_frames=4",
    "data.sampling=sparse",
    "data.val=null",
    "optim.epochs=24",
    "optim.batch_size=16",
    "checkpoint.every_epochs=null",
    "log.tensorboard=false",
]
CLIP_MEAN = ["model.vision.cross_frame=false", "model.mit_layers=0", "model.prompt=none"]
EASY = ("growing", "shrinking")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and test.jsonl: 40 and 10 clips of each of the classes that are learnt in seconds."""
    folder = tmp_path_factory.mktemp("order")
    for seed, (name, count) in enumerate({"train": 40, "test": 10}.items()):
        for label in EASY:
            (folder / name / label).mkdir(parents=True)
            for number in range(count):
                clip = render(label, seed, number, frames=16, size=(32, 32))
                write_clip(folder / name / label / f"{number}.mp4", clip, preset="ultrafast")
        index(folder / name, labels=CLASSES, workers=0).write(folder / f"{name}.jsonl")
    return folder


def accuracy(clips: Path, output: Path, overrides: list[str]) -> float:
    data = [f"data.train={clips / 'train.jsonl'}", f"output={output}"]
    train(load("motion", [*data, *SHAPE, *overrides]))
    model = XCLIP.from_pretrained(output / "last", dtype=torch.float32)
    return evaluate(model, Manifest.read(clips / "test.jsonl"), workers=0).top1


def test_order_is_learnt(clips: Path, tmp_path: Path) -> None:
    assert accuracy(clips, tmp_path / "xclip", []) >= 0.9


def test_without_order_it_is_a_guess(clips: Path, tmp_path: Path) -> None:
    assert accuracy(clips, tmp_path / "mean", CLIP_MEAN) <= 0.65  # of two that hold the same frames
