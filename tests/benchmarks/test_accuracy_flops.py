"""The table and plot of accuracy against cost: what is measured and what is the paper's stay apart."""

import importlib
import itertools
import json
from pathlib import Path

import pytest

from xclip_fast.config import PAPER_TABLE1

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("accuracy_flops")


def summary(variant="B/16-8f", views=(1, 1), labels=400, dtype="bfloat16", **other):
    """What the tool reads of an evaluation's summary."""
    return {
        "kind": "xclip_fast evaluation",
        "top1": 0.823,
        "top5": 0.951,
        "top5_is_top": min(5, labels),
        "videos": 100,
        "predicted": 99,
        "counted": 98,
        "labels": labels,
        "clips": views[0],
        "crops": views[1],
        "frames": 8,
        "views_per_second": 12.5,
        "model": {"variant": variant, "dtype": dtype, "gflops_per_view": 144.9, "checkpoint": "runs/my|model"},
        "environment": {"device": "a GPU"},
        **other,
    }


def throughput(*rows):
    names = ("variant", "precision", "work", "contender", "views_per_second")
    return {"environment": {"device": "an H200"}, "rows": [dict(zip(names, row, strict=True)) for row in rows]}


def store(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def table(text):
    """Rows of a Markdown table as dictionaries."""
    lines = [line.replace(r"\|", "/") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_paper_alone(script, capsys):
    assert script.main([]) == 0
    said = capsys.readouterr().out
    rows = table(said)
    assert {row["origin"] for row in rows} == {"paper"}
    assert [row["model"] for row in rows] == list(PAPER_TABLE1)
    assert (rows[2]["top-1 %"], rows[2]["GFLOPs/view"], rows[2]["GFLOPs"], rows[2]["views"]) == (
        "83.8",
        "145",
        "1740",
        "4 x 3",
    )
    assert "No accuracy was measured here" in said


def test_measured_beside_the_paper(script, tmp_path, capsys):
    store(tmp_path / "one" / "summary.json", summary())
    store(tmp_path / "many" / "summary.json", summary(views=(4, 3), dtype="float16"))
    other = store(tmp_path / "other.json", summary(None, labels=4))
    speeds = throughput(
        ("B/16-8f", "bf16", "cached", "xclip-fast", 900.0),
        ("B/16-8f", "bf16", "cached", "xclip-fast", 1000.0),  # another batch size
        ("B/16-8f", "bf16", "tower", "xclip-fast", 5000.0),
        ("B/16-8f", "bf16", "cached", "Hugging Face", 6000.0),
        ("B/32-8f", "fp16", "cached", "xclip-fast", 3000.0),
        ("L/14-8f", "fp16", "cached", "xclip-fast", None),
    )
    files = [str(tmp_path), other, store(tmp_path / "throughput.json", speeds)]
    assert script.main(files) == 0
    said = capsys.readouterr().out
    assert "No accuracy was measured" not in said
    rows = table(said)
    measured = {(row["model"], row["views"]): row for row in rows if row["origin"] == "measured here"}
    one = measured["B/16-8f", "1 x 1"]
    assert (one["top-1 %"], one["top-5 %"], one["GFLOPs"], one["views/s"]) == ("82.3", "95.1", "145", "1000")
    assert one["on"] == "an H200, bf16"
    assert one["data"] == "400 classes, 98 videos, 1 failed"
    many = measured["B/16-8f", "4 x 3"]  # in fp16, of which there is no throughput run
    assert (many["GFLOPs"], many["views/s"], many["on"]) == ("1739", "12.5", "a GPU, fp16, decoding included")
    four = measured["my/model", "1 x 1"]
    assert (four["top-1 %"], four["top-5 %"]) == (r"82.3 \*", "-")
    assert "cannot be compared with the paper's" in said
    mixed = [row for row in rows if row["origin"].startswith("accuracy: paper")]
    assert [(row["model"], row["top-1 %"], row["views/s"]) for row in mixed] == [("B/32-8f", "80.4", "3000")]


def test_names_stay_apart_where_a_point_lies_far_away(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = []
    plain = script.keep_apart
    monkeypatch.setattr(script, "keep_apart", lambda texts: found.append(plain(texts)))
    far = store(tmp_path / "far.json", summary(None, labels=4, top1=0.05))
    script.main([far, "--plot", str(tmp_path / "out.png")])
    assert [len(boxes) for boxes in found] == [len(PAPER_TABLE1) + 1] * 2
    for boxes in found:
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_plot(script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [
        store(tmp_path / "a.json", summary(None, labels=4, model={**summary()["model"], "checkpoint": "a$b$"})),
        store(tmp_path / "t.json", throughput(("B/32-8f", "fp16", "cached", "xclip-fast", 3000.0))),
    ]
    assert script.main([*files, "--plot", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_without_labels_there_is_no_point(script, tmp_path, capsys):
    assert script.main([store(tmp_path / "a.json", summary(top1=None, top5=None))]) == 0
    said = capsys.readouterr()
    assert "left out: no video with a label" in said.err
    assert {row["origin"] for row in table(said.out)} == {"paper"}


def test_refusals(script, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for given, said in (
        ([str(tmp_path / "empty")], "no summary.json in this folder"),
        ([str(tmp_path / "none.json")], "cannot be read"),
        (
            [store(tmp_path / "x.json", {"kind": "other"})],
            "is neither the summary of an evaluation nor a result of throughput.py",
        ),
        (["--plot", str(tmp_path)], "--plot"),
        (["--nonsense"], "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main(given)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
