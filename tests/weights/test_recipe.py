"""What training was told about labels and frames stays with the weights, and every command takes it from there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from xclip_fast import XCLIP, evaluate
from xclip_fast.cli import main as cli
from xclip_fast.data.decode.decoder import decode
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.motion import write_dataset
from xclip_fast.text.templates import TEMPLATES
from xclip_fast.train import config as train_config
from xclip_fast.train.loop import train
from xclip_fast.weights.recipe import Trained


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips with a manifest, and weights trained on them for a step with texts, templates and frames of its own."""
    home = tmp_path_factory.mktemp("trained")
    write_dataset(home / "clips", 1, frames=16, size=(32, 32))
    classes = index(home / "clips", home / "clips.jsonl").classes
    (home / "texts.txt").write_text("".join(f"something that is {name}\n" for name in classes))
    values = {
        "output": str(home / "run"),
        "precision": "fp32",
        "device": "cpu",
        "text_templates": True,
        "model": {
            "vision": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "heads": 1},
            "text": {"width": 64, "layers": 1, "heads": 1},
            "embed_dim": 64,
            "num_frames": 2,
        },
        "data": {
            "train": str(home / "clips.jsonl"),
            "val": str(home / "clips.jsonl"),
            "labels": str(home / "texts.txt"),
            **{"frames": 3, "sampling": "dense", "stride": 5, "workers": 0},
        },
        "optim": {"lr": 1e-3, "epochs": 1, "warmup_epochs": 0, "batch_size": 10},
        "log": {"tensorboard": False},
    }
    train(train_config.from_dict(values))
    return home


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert not left.value.code, said.err
    return said.out.splitlines()


def test_training_writes_it(home: Path) -> None:
    classes = Manifest.read(home / "clips.jsonl").classes
    texts = {name: f"something that is {name}" for name in classes}
    for name in ("best", "last"):
        for path in (name, f"{name}/model.safetensors"):
            assert Trained.read(home / "run" / path) == Trained(texts, 3, "dense", 5, templates=True)


def test_evaluate_takes_it_unless_told_otherwise(home: Path) -> None:
    videos, model = Manifest.read(home / "clips.jsonl"), XCLIP.from_pretrained(home / "run/best")
    texts = {name: f"something that is {name}" for name in videos.classes}

    def of_command(**given: object) -> list[tuple[tuple[str, float], ...]]:
        found = evaluate.main(home / "run/best", home / "clips.jsonl", dtype="float32", workers=0, **given)
        assert found is not None
        return [prediction.top for prediction in found.predictions]

    def of_model(**given: object) -> list[tuple[tuple[str, float], ...]]:
        chosen = {"frames": 3, "sampling": "dense", "stride": 5, "templates": TEMPLATES, "labels": texts} | given
        return [found.top for found in evaluate.evaluate(model, videos, workers=0, **chosen).predictions]

    assert of_command() == of_model()
    cases = ({"frames": 4}, {"sampling": "sparse"}, {"stride": 2}, {"labels": ["growing", "shrinking"]})
    for given in cases:
        assert of_command(**given) == of_model(**given) != of_model()
    assert of_command(templates=False) == of_model(templates=None) != of_model()


def test_the_commands_take_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, clips = home / "run/best", home / "clips.jsonl"
    lines = call(capsys, "evaluate", best, clips, "--workers", 0, "--out", home / "out", "--dtype", "float32")
    assert "views\t1 x 1 of 3 frames, dense, stride 5" in lines
    assert json.loads((home / "out/summary.json").read_text())["model"]["templates"] == 16
    lines = call(capsys, "evaluate", best, clips, "--workers", 0, "--sampling", "sparse", "--no-templates")
    assert "views\t1 x 1 of 3 frames, sparse" in lines
    # classify: the same answer as evaluate, without a word about labels, frames or templates
    top = evaluate.main(best, clips, dtype="float32", workers=0)
    capsys.readouterr()
    assert top is not None
    (line,) = call(
        capsys, "classify", home / "clips" / top.predictions[0].path, "-c", best, "--json", "--dtype=float32"
    )
    for found, (name, value) in zip(json.loads(line)["labels"], top.predictions[0].top, strict=True):
        assert found["label"] == f"something that is {name}"
        assert found["probability"] == pytest.approx(value, abs=1e-5)
    (given,) = call(capsys, "classify", home / "clips/growing/00000.mp4", "-c", best, "--json", "--labels", "a,b")
    assert {found["label"] for found in json.loads(given)["labels"]} == {"a", "b"}


def test_texts_of_classes() -> None:
    classes = ["ApplyEyeMakeup", "brush_hair"]
    unknown = Trained()
    assert unknown.texts(classes, False) == {"ApplyEyeMakeup": "Apply Eye Makeup", "brush_hair": "brush hair"}
    assert unknown.texts(classes, True) is None
    # by class, however it is spelt and in whatever order; a new class is its name
    known = Trained({"Brush Hair": "combing", "apply_eye_makeup": "putting on makeup"})
    assert known.texts([*classes, "new_one"], False) == {
        "ApplyEyeMakeup": "putting on makeup",
        "brush_hair": "combing",
        "new_one": "new one",
    }
    assert known.texts(classes, True) == ["Brush Hair", "apply_eye_makeup"]


def test_choices() -> None:
    trained = Trained({}, 4, "dense", 10, templates=True)
    as_trained = {"frames": 4, "sampling": "dense", "stride": 10, "templates": TEMPLATES}
    assert trained.choose() == as_trained
    assert trained.choose(8) == as_trained | {"frames": 8}
    assert trained.choose(sampling="dense") == as_trained
    assert trained.choose(sampling="sparse") == as_trained | {"sampling": "sparse", "stride": 1}
    assert trained.choose(stride=2, templates=False) == as_trained | {"stride": 2, "templates": None}
    assert trained.choose(templates=["a {}"]) == as_trained | {"templates": ["a {}"]}
    assert Trained().choose() == {"frames": None, "sampling": "sparse", "stride": 1, "templates": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "correct it, or delete it"),
        ('{"frame": 3}', "frame: unknown key; did you mean frames"),
        ("[]", "correct it, or delete it"),
        ('{"labels": ["a"]}', "labels is .*; keys and values wanted"),
        ('{"labels": {"a": " "}}', "labels.a is ' '; a text wanted"),
        ('{"frames": 0}', "frames is 0; at least 1 wanted, or null"),
        ('{"frames": 1000000}', "frames is 1000000; at most 1024 wanted, or null"),
        ('{"sampling": "some"}', "sampling is 'some'; one of sparse, dense wanted"),
        ('{"stride": true}', "stride is True .bool.; a whole number wanted"),
        ('{"templates": 1}', "templates is 1 .int.; true or false wanted"),
    ],
)
def test_damaged(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "trained.json").write_text(text)
    with pytest.raises(ValueError, match=rf"trained\.json: .*{said}"):
        Trained.read(tmp_path)


def test_no_labels_to_classify_with(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    XCLIP.from_pretrained(home / "run/best").save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit) as left:
        cli.main(["classify", str(home / "clips/growing/00000.mp4"), "-c", str(tmp_path / "bare")])
    assert left.value.code == 2
    assert "the checkpoint does not say" in capsys.readouterr().err


def test_a_linear_head_answers_with_its_classes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = XCLIP.from_pretrained(home / "run/best").config
    model, names = XCLIP(dataclasses.replace(config, num_classes=3)).eval(), ["one", "two", "three"]
    model.save_pretrained(tmp_path / "head")
    (tmp_path / "head" / "trained.json").write_text(Trained({name: name for name in names}).to_json())
    video = home / "clips/growing/00000.mp4"
    with torch.no_grad():
        want = model(decode(video, 2, size=16)[None])[0].softmax(-1)
    for given in ([], ["--labels", "one,two,three"]):
        (line,) = call(capsys, "classify", video, "-c", tmp_path / "head", "--json", "--dtype", "float32", *given)
        found = {item["label"]: item["probability"] for item in json.loads(line)["labels"]}
        assert found == pytest.approx(dict(zip(names, want.tolist(), strict=True)), abs=1e-5)
    with pytest.raises(SystemExit) as left:
        cli.main(["classify", str(video), "-c", str(tmp_path / "head"), "--labels", "a,b"])
    assert left.value.code == 1
    assert "linear head has 3 outputs and there are 2 labels" in capsys.readouterr().err


def test_convert_takes_it_along(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "convert", home / "run/best", tmp_path / "out", "--layout", "huggingface")
    assert Trained.read(tmp_path / "out") == Trained.read(home / "run/best")
