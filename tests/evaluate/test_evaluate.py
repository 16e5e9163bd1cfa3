"""Evaluation through the real loader, on real files, against plain loops."""

import csv
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import save_one_layer

from xclip_fast import XCLIP
from xclip_fast.data.decode.decoder import decode_views
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.motion import render, write_clip
from xclip_fast.data.transforms import TestTransform
from xclip_fast.evaluate import Prediction, evaluate, main, report, write
from xclip_fast.evaluate import report as evaluation_files
from xclip_fast.evaluate.loop import NOT_A_NUMBER
from xclip_fast.evaluate.report import _confusion_png
from xclip_fast.inference.processes import find_device
from xclip_fast.weights.recipe import Trained

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("growing", "moving left", "moving right", "red then blue", "turning clockwise", "blue then red")
UNKNOWN = "growing/unknown.mp4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six classes of two clips, one clip without a class, and one file that is no video."""
    root = tmp_path_factory.mktemp("clips")
    for name in CLASSES:
        home = root / name.replace(" ", "_")
        home.mkdir()
        for number in range(2):
            clip = render(name, 0, number, frames=9, size=(48, 64))
            write_clip(home / f"{number}.mp4", clip)
    write_clip(root / "growing" / "unknown.mp4", render("shrinking", 0, frames=9, size=(48, 64)))
    (root / "growing" / "broken.mp4").write_bytes(b"no video" * 99)
    return root


@pytest.fixture(scope="module")
def manifest(folder):
    found = index(folder, folder / "all.jsonl")
    videos = list(found.videos)
    unknown = row_of(found, UNKNOWN)
    videos[unknown] = dataclasses.replace(videos[unknown], label=None)
    found = dataclasses.replace(found, videos=tuple(videos))
    found.write(folder / "manifest.jsonl")
    return found


def probabilities(model, manifest, row, clips=1, crops=1):
    """Mean of the views' softmax, view by view."""
    video = manifest.videos[row]
    transform = TestTransform(model.config.num_frames, model.config.vision.image_size, clips, crops)
    frames = decode_views(manifest.source(row), transform.views(video.frames, video.width, video.height))
    with torch.no_grad():
        views = [model(torch.from_numpy(view)[None], manifest.classes)[0].softmax(-1) for view in frames]
    assert len(views) == clips * crops
    return torch.stack(views).mean(0)


def row_of(manifest, name):
    return next(row for row in range(len(manifest)) if manifest.name(row) == name)


@pytest.mark.parametrize(("clips", "crops", "batch_size"), [(1, 1, 5), (2, 3, 4)])
def test_equals_a_plain_loop(tiny_model, manifest, clips, crops, batch_size):
    result = evaluate(tiny_model, manifest, clips=clips, crops=crops, batch_size=batch_size, workers=0)
    usable = manifest.usable.tolist()
    assert [each.sample for each in result.predictions] == usable
    confusion, hits = np.zeros((6, 6), int), 0
    for each in result.predictions:
        wanted = probabilities(tiny_model, manifest, each.sample, clips, crops)
        values, order = wanted.topk(5)
        assert [label for label, _ in each.top] == [manifest.classes[number] for number in order]
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), rel=1e-4)
        label = manifest.videos[each.sample].label
        assert each.label == (None if label is None else manifest.classes[label])
        if label is not None:
            confusion[label, order[0]] += 1
            hits += label in order.tolist()
    assert (result.confusion == confusion).all()
    assert result.top1 == confusion.trace() / 12
    assert result.top5 == hits / 12
    assert result.per_class.tolist() == (confusion.diagonal() / 2).tolist()
    assert result.mean_class_accuracy == pytest.approx(result.per_class.mean())
    assert result.views == clips * crops
    assert result.views_per_second == pytest.approx(13 * clips * crops / result.seconds)


def test_every_video_is_accounted_for(tiny_model, manifest, folder, tmp_path):
    gone = row_of(manifest, "moving_left/0.mp4")
    moved = dataclasses.replace(manifest.videos[gone], path="moving_left/gone.mp4")
    videos = dataclasses.replace(
        manifest, videos=tuple(moved if row == gone else video for row, video in enumerate(manifest.videos))
    )
    calls = []
    result = evaluate(
        tiny_model, videos, batch_size=3, workers=0, progress=lambda done, total: calls.append((done, total))
    )
    broken = row_of(manifest, "growing/broken.mp4")
    assert set(result.failed) == {gone, broken}
    assert result.failed[broken] == manifest.videos[broken].error
    assert result.failed_names[gone] == "moving_left/gone.mp4"
    assert (result.videos, len(result.predictions), result.counted) == (14, 12, 11)
    unknown = next(each for each in result.predictions if each.path == UNKNOWN)
    assert unknown.label is None
    assert not unknown.counted
    assert calls[-1] == (13, 13)
    summary = result.summary()
    assert (summary["videos"], summary["predicted"], summary["counted"]) == (14, 12, 11)
    assert {each["path"] for each in summary["failed"]} == {"growing/broken.mp4", "moving_left/gone.mp4"}


def test_nothing_to_evaluate_is_an_error(tiny_model, manifest):
    with pytest.raises(ValueError, match=r"none of 1 videos could be evaluated: growing/broken\.mp4: "):
        evaluate(tiny_model, manifest.select([row_of(manifest, "growing/broken.mp4")]), workers=0)


def test_fewer_classes_than_five(tiny_model, manifest):
    three = [name for name in manifest.classes if name.startswith(("moving", "growing"))]
    result = evaluate(tiny_model, manifest, labels=three, workers=0)
    assert result.labels == tuple(three)
    assert result.counted == 6  # of 13: the other classes are not among the labels
    assert {len(each.top) for each in result.predictions} == {3}
    assert result.top5 == 1.0
    assert result.summary()["top5_is_top"] == 3
    other = next(each for each in result.predictions if each.path == "red_then_blue/0.mp4")
    assert (other.label, other.counted) == ("red then blue", False)


def test_no_number_is_a_failure_and_not_a_wrong_answer(tiny_model, manifest, monkeypatch):
    similarity = tiny_model.similarity

    def spoilt(video, text):
        logits = similarity(video, text)
        logits[0, 2] = float("nan")
        logits[1, 0] = float("inf")
        return logits

    monkeypatch.setattr(tiny_model, "similarity", spoilt)
    result = evaluate(tiny_model, manifest, batch_size=100, workers=0)
    assert [reason for reason in result.failed.values()].count(NOT_A_NUMBER) == 2
    assert len(result.predictions) + len(result.failed) == 14
    assert len(result.predictions) == 11


def test_a_model_that_says_nothing_is_not_right(tiny_model, manifest, monkeypatch):
    monkeypatch.setattr(tiny_model, "similarity", lambda video, text: torch.zeros(len(video.video), len(text)))
    result = evaluate(tiny_model, manifest, workers=0)
    assert result.top1 == 1 / 6
    assert result.top5 == 5 / 6
    assert {each.top[0][0] for each in result.predictions} == {manifest.classes[0]}


def test_labels_by_name_and_as_other_texts(tiny_model, manifest):
    backwards = [name.upper().replace(" ", "_") for name in reversed(manifest.classes)]
    plain = evaluate(
        tiny_model, manifest, workers=0, labels={name: name.upper().replace(" ", "_") for name in manifest.classes}
    )
    other = evaluate(tiny_model, manifest, labels=backwards, workers=0)
    assert other.labels == tuple(backwards)
    assert (other.confusion[::-1, ::-1] == plain.confusion).all()
    assert plain.labels == manifest.classes
    for labels, said in (
        (["a", "b"], r"none of the 6 classes \(blue then red, growing, moving left, ...\) is among"),
        (["growing", "growing"], "'growing' more than once"),
        ([], "labels: none; at least one"),
        (["moving-left", "moving_left"], "class 'moving left' could be 'moving-left' or 'moving_left'"),
        ("growing", "is one string"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(tiny_model, manifest, labels=labels)


def test_text_is_encoded_once_and_the_model_left_as_it_was(tiny_model, manifest):
    tiny_model.train()
    tiny_model.text.eval()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    calls, modes = [], []
    handles = [
        tiny_model.text.register_forward_hook(lambda *_: calls.append(1)),
        tiny_model.visual.register_forward_hook(lambda module, *_: modes.append(module.training)),
    ]
    result = evaluate(tiny_model, manifest, batch_size=4, workers=0, dtype=torch.bfloat16)
    for handle in handles:
        handle.remove()
    assert len(calls) == 1
    assert len(modes) == 4
    assert not any(modes)
    assert tiny_model.training
    assert tiny_model.visual.training
    assert not tiny_model.text.training
    after = tiny_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert result.model["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r"call model\.to"):
        evaluate(tiny_model, manifest, dtype=torch.float64)
    with pytest.raises(ValueError, match="batch_size 0"):
        evaluate(tiny_model, manifest, batch_size=0)


def test_a_linear_head(tiny_config, manifest):
    model = XCLIP(dataclasses.replace(tiny_config, num_classes=6))
    result = evaluate(model, manifest, clips=2, batch_size=3, workers=0)
    assert result.counted == 12
    assert result.model["gflops_per_view"] > 0
    row = manifest.usable.tolist()[3]
    video = manifest.videos[row]
    views = TestTransform(3, 32, 2).views(video.frames, video.width, video.height)
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(decode_views(manifest.source(row), views))).softmax(-1).mean(0)
    assert result.predictions[3].top[0][1] == pytest.approx(wanted.max().item(), rel=1e-4)
    with pytest.raises(ValueError, match="head has 6 outputs and there are 2 labels"):
        evaluate(model, manifest, labels=["growing", "moving left"])
    with pytest.raises(ValueError, match="reads no text; leave out --templates"):
        evaluate(model, manifest, templates=["a video of {}"])


def test_templates(tiny_model, manifest):
    plain = evaluate(tiny_model, manifest, workers=0)
    ensemble = evaluate(tiny_model, manifest, templates=["a video of {}", "{}, filmed"], workers=0)
    assert ensemble.model["templates"] == 2
    assert [each.top for each in ensemble.predictions] != [each.top for each in plain.predictions]


def test_what_the_model_is(tiny_model, manifest):
    result = evaluate(tiny_model, manifest, frames=2, workers=0)
    assert result.frames == 2
    assert result.model["variant"] is None
    assert result.model["gflops_per_view"] > result.model["gflops_per_view_run"] > 0
    assert result.model["parameters"] == sum(parameter.numel() for parameter in tiny_model.parameters())
    assert result.data["fingerprint"] == manifest.fingerprint
    assert result.environment["torch"] == torch.__version__.split("+")[0] or result.environment["torch"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_one_layer(tmp_path_factory.mktemp("checkpoint") / "model")


def test_a_head_knows_the_order_of_its_outputs(tiny_config, manifest, folder, tmp_path):
    model = XCLIP(dataclasses.replace(tiny_config, num_classes=6))
    model.save_pretrained(tmp_path / "model")
    reference = evaluate(model.eval(), manifest, workers=0)
    order = list(reversed(manifest.classes))
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(0))
        if model.head.bias is not None:
            model.head.bias.copy_(model.head.bias.flip(0))
    model.save_pretrained(tmp_path / "turned")
    (tmp_path / "turned" / "trained.json").write_text(Trained({name: name for name in order}).to_json())
    result = main(tmp_path / "turned", folder / "manifest.jsonl", dtype="float32", device="cpu", workers=0)
    assert result.labels == tuple(order)
    assert result.top1 == reference.top1
    assert (result.confusion[::-1, ::-1] == reference.confusion).all()


def figures(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return {name: summary[name] for name in ("top1", "top5", "videos", "predicted", "counted", "failed")}


TWO = """
import os, sys
from xclip_fast.evaluate import main
from xclip_fast.model import XCLIP
XCLIP.from_pretrained(sys.argv[1])  # imported once, for both
children = []
for rank in range(2):
    if not (child := os.fork()):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        main(sys.argv[1], sys.argv[2], out=sys.argv[3], crops=3, batch_size=4, workers=0, dtype="float32")
        sys.stdout.flush()
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children) and 1)
"""


def test_command_and_two_processes(checkpoint, folder, manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one, two = tmp_path / "one", tmp_path / "two"
    result = main(checkpoint, folder / "manifest.jsonl", out=one, crops=3, batch_size=4, workers=0, dtype="float32")
    said = capsys.readouterr()
    assert f"top-1\t{100 * result.top1:.1f} %" in said.out
    assert "videos\t13 of 14, 12 counted" in said.out
    assert "error: growing/broken.mp4: " in said.err
    with pytest.raises(FileExistsError, match="--overwrite"):
        main(checkpoint, folder / "manifest.jsonl", out=one)

    def run_two():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", TWO, str(checkpoint), str(folder / "manifest.jsonl"), str(two)],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    done = run_two()
    assert done.returncode == 0, done.stderr
    refused = run_two()
    assert refused.returncode
    assert refused.stderr.count("FileExistsError: ") == 2, refused.stderr  # both, before the work
    assert done.stdout.count("top-1") == 1  # one of the two speaks
    assert figures(two) == figures(one)
    summary = json.loads((two / "summary.json").read_text())
    assert summary["environment"]["processes"] == 2
    assert summary["model"]["checkpoint"] == str(checkpoint)
    for name in ("confusion.csv", "per_class.csv"):
        assert (two / name).read_text() == (one / name).read_text()
    assert [row["sample"] for row in stored(two)] == manifest.usable.tolist()
    assert [row["top5"] for row in stored(two)] == [row["top5"] for row in stored(one)]


def stored(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def result(tiny_model, manifest):
    """An evaluation whose names need care."""
    found = evaluate(tiny_model, manifest, workers=0)
    labels = ("plain", "a,b", 'a "quote"', "$x$ and _y_", "tab\there", "zoë \udcff")
    predictions = tuple(
        Prediction(
            each.sample,
            each.path,
            each.label and labels[manifest.classes.index(each.label)],
            each.counted,
            tuple((labels[manifest.classes.index(label)], value) for label, value in each.top),
        )
        for each in found.predictions
    )
    return dataclasses.replace(found, labels=labels, predictions=predictions)


@pytest.mark.parametrize("with_pictures", [True, False])
def test_files(result, tmp_path, monkeypatch, with_pictures):
    if with_pictures:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = tmp_path / "new" / "folder"
    paths = write(result, folder)
    assert all(path.stat().st_size for path in paths)
    names = {path.name for path in paths}
    assert {"summary.json", "per_class.csv", "confusion.csv", "predictions.jsonl"} <= names
    assert set(os.listdir(folder)) == names
    assert os.listdir(tmp_path / "new") == ["folder"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["top1"] == result.top1
    assert ("confusion.png" in names) == with_pictures
    assert any("pip install 'xclip-fast[plot]'" in note for note in summary["notes"]) != with_pictures
    with open(folder / "confusion.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == rows[0][1:]
    assert rows[0][1:5] == list(result.labels[:4])
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == result.confusion.tolist()
    with open(folder / "per_class.csv", encoding="utf-8", newline="") as file:
        classes = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in classes] == pytest.approx(result.per_class.tolist())
    kept = stored(folder)
    assert [row["path"] for row in kept] == [each.path for each in result.predictions]
    assert [row["correct"] for row in kept if row["counted"]].count(True) == result.confusion.trace()
    assert kept[0]["probabilities"] == pytest.approx([value for _, value in result.predictions[0].top])


def test_files_of_others_stay_and_old_ones_go(result, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "confusion.png").write_text("of an older evaluation")
    with pytest.raises(FileExistsError, match=r"already holds confusion\.png"):
        write(result, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(result, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert (tmp_path / "summary.json").exists()
    assert not (tmp_path / "confusion.png").exists()
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))
    assert len(stored(tmp_path)) == 13
    with pytest.raises(NotADirectoryError, match="is a file"):
        write(result, tmp_path / "mine.txt")


def test_a_failed_write_leaves_the_old_files(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(result, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluation_files, "_predictions", full)
    with pytest.raises(OSError, match="no space left"):
        write(result, tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_picture_for_any_number_of_classes(result, tmp_path):
    pytest.importorskip("matplotlib")

    for count in (1, 51, 52):
        confusion = np.diag(np.arange(count))
        many = dataclasses.replace(result, labels=tuple(f"class {n}" for n in range(count)), confusion=confusion)
        _confusion_png(many, tmp_path / f"{count}.png", [])
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")


def test_manifest_without_labels(tiny_model, manifest):
    bare = Manifest(manifest.root, (), tuple(dataclasses.replace(video, label=None) for video in manifest.videos[:4]))
    with pytest.raises(ValueError, match="the manifest's classes: none"):
        evaluate(tiny_model, bare)
    result = evaluate(tiny_model, bare, labels=["one", "two"], workers=0)
    assert result.counted == 0
    assert result.summary()["top1"] is None
    assert len(result.predictions) + len(result.failed) == 4


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="device is 'tpu', not auto, cpu, cuda or cuda:N"):
        find_device("tpu")


@pytest.mark.usefixtures("manifest")
def test_an_output_that_cannot_be_written_is_refused_before_the_work(checkpoint, folder, tmp_path, monkeypatch):
    def worked(*_, **__):
        raise AssertionError("evaluated")

    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        main(checkpoint, folder / "manifest.jsonl", out=tmp_path / "file" / "out", run=worked)
    with (
        report.reserved(tmp_path / "out", False),
        pytest.raises(FileExistsError, match=r"another process \(\d+ on .*\) is writing"),
    ):
        main(checkpoint, folder / "manifest.jsonl", out=tmp_path / "out", overwrite=True, run=worked)
    assert os.listdir(tmp_path) == ["file"]

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(PermissionError, match="out: cannot be written"):
        main(checkpoint, folder / "manifest.jsonl", out=tmp_path / "out")


def test_the_loss_is_that_of_the_averaged_probabilities(tiny_model, manifest):
    result = evaluate(tiny_model, manifest, workers=0)
    values = [
        dict(each.top)[each.label] for each in result.predictions if each.counted and each.label in dict(each.top)
    ]
    assert result.loss >= -np.log(max(values)) > 0
    three = [name for name in manifest.classes if name.startswith(("moving", "growing"))]
    few = evaluate(tiny_model, manifest, labels=three, workers=0)
    want = [-np.log(dict(each.top)[each.label]) for each in few.predictions if each.counted]
    assert few.loss == pytest.approx(np.mean(want), rel=1e-5)
    assert few.summary()["loss"] == few.loss


def test_labels_that_are_one_text_are_refused(tiny_model, manifest):
    with pytest.raises(ValueError, match="same text for the model"):
        evaluate(tiny_model, manifest, labels={name: "the same" for name in manifest.classes}, workers=0)


@pytest.mark.usefixtures("manifest")
def test_classes_that_training_did_not_know_are_told(checkpoint, folder, tmp_path, caplog):
    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / "trained.json").write_text(Trained({"cooking": "cooking"}).to_json())
    with caplog.at_level("WARNING", "xclip_fast"):
        main(tmp_path / "c", folder / "manifest.jsonl", workers=0, dtype="float32")
    assert "was not trained on any of its" in caplog.text
    assert "(cooking, ...). The result is zero-shot" in caplog.text
