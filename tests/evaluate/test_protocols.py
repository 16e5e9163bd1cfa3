"""Sample lists, class draws, and protocols from manifest to the row beside the paper's."""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import save_one_layer

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig
from xclip_fast.config import CLIP_MEAN, CLIP_STD
from xclip_fast.data.decode.video import Video
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.motion import render, write_clip
from xclip_fast.evaluate import protocols
from xclip_fast.evaluate.paper import PAPER_TABLE3, PAPER_TABLE4, PAPER_TABLE5, PROTOCOLS, paper_rows
from xclip_fast.evaluate.sample_lists import (
    draw_classes,
    few_shot,
    new_classes,
    read_classes,
    read_draws,
    write_draws,
)
from xclip_fast.text.labels import readable
from xclip_fast.weights import checkpoint


@pytest.fixture
def many(tmp_path):
    """Three classes of twelve videos, one of each unreadable; one video in a tar, one with an odd name."""
    videos = [
        Video(f"{name}/{number}.mp4", label, error="broken" if number == 5 else None)
        for label, name in enumerate(("walk", "ride bike", "zoë"))
        for number in range(12)
    ]
    videos[0] = Video("shard-0.tar", 0, member="walk/0.mp4", offset=512)
    videos[1] = Video('walk/line\nend, "quoted" \udcff.mp4', 0)
    return Manifest(tmp_path, ("walk", "ride bike", "zoë"), (*videos, Video("unlabelled.mp4")))


def places(manifest, rows):
    return {(manifest.videos[row].path, manifest.videos[row].member) for row in rows}


def test_few_shot_draws(many):
    four = few_shot(many, 4, seed=7)
    assert four.dtype == np.int64
    assert four.tolist() == sorted(set(four.tolist()))
    assert [many.videos[row].label for row in four] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(many.videos[row].error is None for row in four)
    assert few_shot(many, 4, seed=7).tolist() == four.tolist()
    assert few_shot(many, 4, seed=8).tolist() != four.tolist()
    assert set(few_shot(many, 2, seed=7)) < set(four)
    assert set(few_shot(many, 11)) == set(many.usable.tolist()) - {36}


def test_few_shot_does_not_depend_on_the_order(many):
    order = np.random.default_rng(0).permutation(len(many))
    label = [2, 0, 1]  # of the old class
    videos = [many.videos[row] for row in order]
    videos = [
        video if video.label is None else dataclasses.replace(video, label=label[video.label]) for video in videos
    ]
    other = Manifest(many.root, ("ride bike", "zoë", "walk"), tuple(videos))
    assert places(other, few_shot(other, 3)) == places(many, few_shot(many, 3))


def test_few_shot_refusals(many):
    with pytest.raises(ValueError, match="12 usable videos of each class wanted: walk has 11, ride bike has 11"):
        few_shot(many, 12)
    with pytest.raises(ValueError, match="shots 0"):
        few_shot(many, 0)
    with pytest.raises(ValueError, match="no classes"):
        few_shot(dataclasses.replace(many, classes=(), videos=()), 2)


def test_drawn_videos_as_a_manifest(many, tmp_path):
    many.write(tmp_path / "all.jsonl")
    assert protocols.sample(tmp_path / "all.jsonl", 2, tmp_path / "two.jsonl") == 6
    assert places(Manifest.read(tmp_path / "two.jsonl"), range(6)) == places(many, few_shot(many, 2))
    with pytest.raises(FileExistsError, match="--overwrite"):
        protocols.sample(tmp_path / "all.jsonl", 2, tmp_path / "two.jsonl")
    with pytest.raises(ValueError, match="drawn from this manifest"):
        protocols.sample(tmp_path / "all.jsonl", 2, tmp_path / "all.jsonl", overwrite=True)
    with pytest.raises(ValueError, match="jsonl wanted"):
        protocols.sample(tmp_path / "all.jsonl", 2, tmp_path / "two.csv")


def test_new_classes_and_draws(tmp_path):
    old = [f"doing thing {number}" for number in range(400)]
    fresh = [f'playing "game" {number}' for number in range(220)]
    kinetics600 = [name.replace(" ", "_").upper() for name in old[:380]] + fresh
    assert new_classes(kinetics600, old) == fresh
    draws = draw_classes(fresh, seed=1)
    assert [len(set(names)) for names in draws] == [160] * 3
    assert all(set(names) < set(fresh) for names in draws)
    assert len({tuple(names) for names in draws}) == 3
    assert draw_classes(fresh[::-1], seed=1) == draws
    assert draw_classes(fresh, seed=2) != draws
    write_draws(draws, tmp_path / "draws.json", about={"seed": 1})
    assert read_draws([tmp_path / "draws.json"]) == draws
    (tmp_path / "released.json").write_text(json.dumps(draws))
    assert read_draws([tmp_path / "released.json"]) == draws
    for content, said in (
        ({"kind": "xclip_fast draws"}, "None found; a list of class names wanted"),
        ({"kind": "xclip_fast draws", "draws": [["a"], "b"]}, "'b' found; a list of class names wanted"),
        ([[1, 2]], r"\[1, 2\] found; a list of class names wanted"),
        (5, "5 found; a list of class names wanted"),
        ("abc", "'abc' found; a list of class names wanted"),
        ([[]], "holds no class names"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"bad\.json: {said}"):
            read_draws([tmp_path / "bad.json"])


def test_renamed_classes_are_told(caplog):
    old = [f"doing thing {number}" for number in range(400)]
    draws = protocols.kinetics600_draws([*old[:370], *(f"new {number}" for number in range(230))], old)
    assert [len(names) for names in draws] == [160] * 3
    assert "230 classes of 600 are not among Kinetics-400's 400 by name. The paper counts 220" in caplog.text
    with pytest.raises(ValueError, match="only 30 new classes"):
        protocols.kinetics600_draws([*old, *(f"new {number}" for number in range(30))], old)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "abseiling\n\nair drumming \n"),
        ("b.txt", "1 abseiling\n2 air drumming\n"),
        ("c.csv", "id,name\n0,abseiling\n1,air drumming\n"),
        ("d.csv", "0,abseiling\n1,air drumming\n"),
        ("e.csv", "label,youtube_id,split\nabseiling,x,val\nair drumming,y,val\nabseiling,z,val\n"),
        ("f.json", '["abseiling", "air drumming"]'),
        ("g.json", '{"\\"abseiling\\"": 0, "\\"air drumming\\"": 1}'),
        ("h.jsonl", '{"xclip_fast_manifest": 2, "root": ".", "classes": ["abseiling", "air drumming"]}\n'),
    ],
)
def test_class_lists(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name) == ["abseiling", "air drumming"]


def test_names_as_words():
    assert readable("ApplyEyeMakeup") == "Apply Eye Makeup"
    assert readable("brush_hair") == "brush hair"
    assert readable("riding or walking with horse") == "riding or walking with horse"
    assert readable("YoYo") == "Yo Yo"


def test_the_papers_figures():
    # the best other methods and the gains over them, as the paper prints both
    for name, others, gains in (("X-CLIP-B/16", (40.8, 58.3), (3.8, 13.7)), ("X-Florence", (40.8, 58.3), (7.6, 14.9))):
        found = [PAPER_TABLE3[name][data].mean for data in ("hmdb51", "ucf101")]
        assert [round(ours - theirs, 1) for ours, theirs in zip(found, others, strict=True)] == list(gains)
    for name, gains in (("X-CLIP-B/16", (23.1, 13.0)), ("X-Florence", (26.7, 15.3))):
        found = [PAPER_TABLE4[name][key].mean for key in ("top1", "top5")]
        assert [round(ours - theirs, 1) for ours, theirs in zip(found, (42.1, 73.1), strict=True)] == list(gains)
    others = {"hmdb51": (20.9, 41.3, 49.4, 56.1), "ucf101": (53.3, 75.6, 85.8, 89.4)}
    for name, data, printed in (
        ("X-CLIP-B/16", "hmdb51", (32.1, 16.0, 13.4, 7.9)),
        ("X-CLIP-B/16", "ucf101", (23.1, 7.8, 2.5, 2.0)),
        ("X-Florence", "hmdb51", (30.7, 16.5, 14.7, 8.1)),
        ("X-Florence", "ucf101", (30.7, 12.9, 6.7, 5.4)),
    ):
        gains = [round(a - b, 1) for a, b in zip(PAPER_TABLE5[name][data], others[data], strict=True)]
        assert gains == list(printed)
    assert str(paper_rows("zero-shot-hmdb51")["X-CLIP-B/16"]["top1"]) == "44.6 ± 5.2"
    assert str(paper_rows("few-shot-ucf101", 8)["X-CLIP-B/16"]["top1"]) == "88.3"
    assert paper_rows("few-shot-ucf101", 3) == {}


NAMES = ("GrowingShape", "moving_left", "moving right", "red then blue")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A checkpoint, and a manifest of four classes of three clips with names as data sets spell them."""
    root = tmp_path_factory.mktemp("protocol")
    for name, label in zip(NAMES, ("growing", "moving left", "moving right", "red then blue"), strict=True):
        (root / "clips" / name).mkdir(parents=True)
        for number in range(3):
            write_clip(root / "clips" / name / f"{number}.mp4", render(label, 0, number, frames=4, size=(32, 32)))
    found = index(root / "clips", root / "all.jsonl", workers=1)
    dataclasses.replace(found, classes=NAMES).write(root / "all.jsonl")
    for split in range(3):
        dataclasses.replace(found, classes=NAMES).select(range(3 * split, 12)).write(root / f"split{split}.jsonl")
    save_one_layer(root / "model")
    return root


@pytest.fixture
def settings(monkeypatch, one_thread):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take time, and test_evaluate.py has them
    return {"workers": 0, "device": "cpu", "dtype": "float32"}


def test_zero_shot_over_three_splits(data, settings, tmp_path, capsys):
    splits = [data / f"split{split}.jsonl" for split in range(3)]
    out = tmp_path / "out"
    report = protocols.main("zero-shot-hmdb51", data / "model", splits, out=out, **settings)
    parts = [json.loads((out / f"part{number}" / "summary.json").read_text()) for number in (1, 2, 3)]
    values = [100 * part["top1"] for part in parts]
    assert len(set(values)) > 1
    assert report["top1"]["parts"] == pytest.approx(values)
    assert report["top1"]["mean"] == pytest.approx(statistics.mean(values), abs=1e-3)
    assert report["top1"]["std"] == pytest.approx(statistics.stdev(values), abs=1e-3)
    assert [part["data"]["manifest"] for part in parts] == [str(path) for path in splits]
    assert json.loads((out / "protocol.json").read_text()) == json.loads(json.dumps(report))
    said = capsys.readouterr()
    mean, std = report["top1"]["mean"], report["top1"]["std"]
    assert f"this checkpoint, measured\t{mean:.1f} ± {std:.1f}\n" in said.out
    assert "X-CLIP-B/16, paper\t44.6 ± 5.2\n" in said.out
    assert "the paper tests with 32 frames and 1 view" in said.err
    (out / "protocol.json").unlink()
    with pytest.raises(FileExistsError, match="already holds part1, part2, part3"):
        protocols.main("zero-shot-hmdb51", data / "model", splits, out=out, **settings)


def test_all_processes_refuse_an_existing_output(data, tmp_path):
    (tmp_path / "protocol.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "xclip_fast", "protocol", "few-shot-hmdb51", data / "model", data / "split0.jsonl"]
    command += ["--shots", "2", "--out", tmp_path, "--device", "cpu"]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(command, env={**os.environ, **world, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        assert "already holds protocol.json" in process.communicate()[1]
        assert process.returncode == 1


def test_kinetics600_draws(data, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(protocols, "DRAWN", 2)
    monkeypatch.setattr(protocols, "NEW_CLASSES", 3)
    (tmp_path / "k400.txt").write_text("Moving Left\nsomething else\n")
    name = "zero-shot-kinetics600"
    options = {"kinetics400": tmp_path / "k400.txt", "seed": 5, **settings}
    report = protocols.main(name, data / "model", [data / "all.jsonl"], out=tmp_path / "out", **options)
    assert report["videos"] == [6, 6, 6]
    assert "X-CLIP-B/16, paper\t65.2 ± 0.4\t86.1 ± 0.8\n" in capsys.readouterr().out
    chosen = read_draws([tmp_path / "out" / "draws.json"])
    assert [len(names) for names in chosen] == [2, 2, 2]
    assert not any("moving_left" in names for names in chosen)
    # the same draws from files, as released ones would come
    again = protocols.main(
        name, data / "model", [data / "all.jsonl"], draws=[tmp_path / "out" / "draws.json"], **settings
    )
    assert again["top1"] == report["top1"]
    assert again["seed"] is None
    (tmp_path / "other.txt").write_text("growing shape\nnever seen\n")
    with pytest.raises(ValueError, match="draw 1: no videos of 1 of its 2 classes: 'never seen'"):
        protocols.main(name, data / "model", [data / "all.jsonl"], draws=[tmp_path / "other.txt"], **settings)


def test_few_shot_command_and_report(data, settings, tmp_path, capsys):
    assert protocols.sample(data / "all.jsonl", 2, tmp_path / "two.jsonl", seed=3) == 8
    train = Manifest.read(tmp_path / "two.jsonl")
    assert train.usable.tolist() == list(range(8))
    assert train.source(0).path.startswith(str(data / "clips"))
    with pytest.raises(FileExistsError, match="--overwrite"):
        protocols.sample(data / "all.jsonl", 2, tmp_path / "two.jsonl")
    report = protocols.main("few-shot-hmdb51", data / "model", [data / "split0.jsonl"], shots=2, **settings)
    assert report["top1"]["std"] is None
    assert report["paper"]["X-CLIP-B/16"]["top1"]["mean"] == 53.0
    assert "X-CLIP-B/16, paper\t53.0\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["ViFi-CLIP", "ActionCLIP"])
def test_protocols_on_files_of_others(data, settings, tmp_path, kind):
    """As on the same weights in our own layout."""
    vision = VisionConfig(image_size=32, patch_size=8, width=64, layers=1, heads=1, cross_frame=False)
    fusion = {"mit_layers": 0}
    if kind == "ActionCLIP":
        fusion = {
            "mit_layers": 6,
            "mit_positions": 77,
            "mit_eps": 1e-12,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        }
    torch.manual_seed(1)
    model = XCLIP(XCLIPConfig(vision, TextConfig(width=64, layers=1, heads=1), 64, prompt="none", **fusion))
    model.save_pretrained(tmp_path / "ours")
    state = {name.removeprefix("text."): value for name, value in model.state_dict().items()}
    torch.save({name: value for name, value in state.items() if not name.startswith("mit.")}, tmp_path / "clip.pt")
    if kind == "ViFi-CLIP":
        clip, theirs = tmp_path / "clip.pt", {"logit_scale": state.pop("logit_scale")}
        for name, value in state.items():
            tower = "image_encoder." if name.startswith("visual.") else "text_encoder."
            theirs[tower + name.removeprefix("visual.")] = value
        del theirs["text_encoder.token_embedding.weight"]
        torch.save({"model": theirs}, tmp_path / "theirs.pth")
    else:
        clip, inside = None, {name.removeprefix("mit."): value for name, value in state.items() if name[:4] == "mit."}
        positions = inside.pop("positional_embedding")[0]
        inside = {f"transformer.{name}": value for name, value in inside.items()}
        saved = {"model_state_dict": torch.load(tmp_path / "clip.pt"), "fusion_model_state_dict": inside}
        inside["frame_position_embeddings.weight"] = positions
        torch.save(saved, tmp_path / "theirs.pth")
    checkpoint.convert(tmp_path / "theirs.pth", tmp_path / "theirs", clip=clip)
    splits = [data / f"split{split}.jsonl" for split in range(3)]
    for protocol, manifests, shots in (("zero-shot-ucf101", splits, None), ("few-shot-ucf101", splits[:1], 2)):
        wanted, found = (
            protocols.main(protocol, tmp_path / name, manifests, frames=3, shots=shots, **settings)
            for name in ("ours", "theirs")
        )
        assert found["top1"] == wanted["top1"]


def test_refusals(data):
    for name, manifests, options, said in (
        ("zero-shot", [], {}, "one of zero-shot-hmdb51"),
        ("zero-shot-ucf101", ["a"], {}, "takes 3 manifests, and 1 are given"),
        ("few-shot-ucf101", ["a"], {}, "needs the number of training videos"),
        ("zero-shot-kinetics600", ["a"], {}, "needs the class names of Kinetics-400"),
        ("zero-shot-kinetics600", ["a"], {"shots": 2, "kinetics400": "b"}, "takes no --shots"),
        ("zero-shot-ucf101", ["a"] * 3, {"shots": 2}, "takes no --shots"),
        ("zero-shot-ucf101", ["a"] * 3, {"draws": ["b"]}, "takes no --draws or --kinetics400"),
        ("few-shot-ucf101", ["a"], {"shots": 2, "kinetics400": "b"}, "takes no --draws or --kinetics400"),
    ):
        with pytest.raises(ValueError, match=said):
            protocols.main(name, data / "model", manifests, **options)
    assert {protocol.table for protocol in PROTOCOLS.values()} == {3, 4, 5}
