"""The decoding benchmark runs, checks what it times, and refuses what it cannot do."""

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("decode_benchmark", FOLDER / "decode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.scenes = importlib.import_module("scenes")
    for name, value in (("CLIP_FRAMES", 40), ("CLIP_SIZE", (64, 96)), ("LOADED_FILES", 4), ("LOADED_BATCH", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "MOST_EPOCHS", 2)
    monkeypatch.setattr(module.measuring, "CPU_RUNS", 2)
    monkeypatch.setattr(module, "LOADER_WORKERS", 0)
    return module


def quick_run(bench, tmp_path, *options):
    path = tmp_path / "out.json"
    code = bench.main(["--device", "cpu", "--seconds", "200", "--json", str(path), *options])
    return code, json.loads(path.read_text())


def test_every_contender_gives_the_same_frames(bench, tmp_path, capsys):
    code, report = quick_run(
        bench, tmp_path, "--keyframes", "12,40,copy,training", "--frames", "2,5", "--works", "file"
    )
    assert code == 0
    rows = {(row["keyframe_every"], row["frames"], row["contender"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 4 * 2 * 4
    for row in rows.values():
        assert row["note"] == ""
        assert row["n"] == 2
        assert row["seconds"] == sorted(row["seconds"])
        assert row["clips_per_second"] == pytest.approx(1 / row["seconds"][1], rel=1e-4)
        if row["contender"] != bench.FULL:
            full = rows[row["keyframe_every"], row["frames"], bench.FULL]
            assert row["ratio"]["median"] == pytest.approx(full["seconds"][1] / row["seconds"][1], rel=1e-4)
    clips = {clip["keyframe_every"]: clip for clip in report["clips"]}
    assert {row["pictures"] for row in report["rows"]} == {clip["pictures"] for clip in clips.values()} == {"generated"}
    assert clips["copy"]["referenced"] == 40 > clips[40]["referenced"] > 1  # no B frames in the copy
    assert (clips[12]["keyframes"], clips[40]["keyframes"], clips["copy"]["keyframes"]) == (4, 1, 4)
    assert clips["training"]["keyframes"] == 40
    assert {clip["frames"] for clip in report["clips"]} == {40}
    assert {"device", "av", "date", "command", "commit", "load_average", "clock"} <= set(report["environment"])
    table = capsys.readouterr().out
    assert "x full decode" in table
    assert "ours, stored plan" in table


def test_loader_is_measured(bench, tmp_path):
    options = ("--keyframes", "12", "--frames", "4", "--works", "loader")
    code, report = quick_run(bench, tmp_path, *options)
    assert code == 0
    pyav, dali = report["rows"]
    assert pyav["clips_per_second"] > 0
    assert pyav["n"] >= 1
    assert pyav["rates"][1] == pytest.approx(pyav["clips_per_second"], rel=1e-4)
    assert dali["note"].startswith("not run: DALI")


def test_wrong_frames_are_not_timed(bench, tmp_path, monkeypatch):
    """The frame after the right one is as wrong as any: ours fails the run, a peer loses its figures."""

    def late(path, numbers):
        return bench.full_decode(path, [number + 1 for number in numbers])

    options = ("--keyframes", "12", "--frames", "2", "--works", "file")
    monkeypatch.setattr(bench, "seek_for_each", late)
    code, report = quick_run(bench, tmp_path, *options)
    row = next(row for row in report["rows"] if row["contender"] == bench.SEEKING)
    assert code == 0
    assert "outputs differ" in row["note"]
    assert "seconds" not in row
    monkeypatch.setattr(bench, "decode_frames", late)
    assert quick_run(bench, tmp_path, *options)[0] == 1


def test_footage_of_ones_own(bench, tmp_path, monkeypatch):
    from xclip_fast.data.motion import render, write_clip

    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "own.mp4", render("growing", 0, frames=9, size=(128, 128)))
    found = bench.scenes.footage(tmp_path / "own.mp4", 20, (64, 96))
    assert len(found) == 20
    assert found[0].shape == (64, 96, 3)
    np.testing.assert_array_equal(found[8], found[9])  # there and back
    np.testing.assert_array_equal(found[0], found[18])
    options = ("--keyframes", "12", "--frames", "2", "--works", "file", "--pictures", "generated,own.mp4")
    code, report = quick_run(bench, tmp_path, *options)
    assert code == 0
    assert [clip["pictures"] for clip in report["clips"]] == ["generated", "own"]


def test_scenes_are_as_said(bench):
    first, other = bench.scenes.render(0, 3, (64, 96)), bench.scenes.render(1, 3, (64, 96))
    assert np.array_equal(first, bench.scenes.render(0, 3, (64, 96)))
    assert not np.array_equal(first, other)
    assert first[0].shape == (64, 96, 3)
    assert first[0].dtype == np.uint8
    assert first[0].std() > 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keyframes", "0"], "0: a whole number"),
        (["--keyframes", "12,often"], "often: a whole number"),
        (["--frames", "8,"], ": a whole number"),
        (["--frames", "41"], "the clips have 40"),
        (["--works", "files"], "'files' is not one of"),
        (["--seconds", "0"], "positive"),
        (["--pictures", "generated,/no/such/video"], "no such file"),
        (["--json", "/no/such/folder/out.json"], "existing folder"),
    ],
)
def test_wrong_arguments_are_one_line(bench, options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main([*options])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in message
    assert message.count("\n") == 1
