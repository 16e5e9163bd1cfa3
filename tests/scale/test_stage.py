"""The stage of a pipeline, without any cluster: batches of dicts in and out; and once with Ray."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from small import CONFIG

from xclip_fast import XCLIP
from xclip_fast.data.decode.source import ReadError
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.inference.batches import Answer, Finished, Reading, answers
from xclip_fast.scale.stage import ModelSpec, VideoStage, as_answers

READING = Reading(3, 32, window=2.0, stride=1.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    torch.manual_seed(1)
    XCLIP(CONFIG).save_pretrained(folder / "a")
    for index, label in enumerate(CLASSES[:3]):
        write_clip(folder / f"{index}.mp4", render(label, 0, frames=12, size=(48, 64)))
    write_clip(folder / "film.mp4", render("growing", 0, frames=40, size=(48, 64)), 4)
    (folder / "broken.mp4").write_text("no video\n" * 100)
    return folder


def paths(home: Path) -> list[str]:
    return [str(home / name) for name in ("0.mp4", "broken.mp4", "film.mp4", "1.mp4", "gone.mp4", "2.mp4")]


def stage(home: Path, **options) -> VideoStage:
    return VideoStage(ModelSpec(str(home / "a"), device="cpu", dtype="float32"), READING, **options)


def rebatch(batches: list[dict], size: int) -> list[dict]:
    """Rows put into batches of another size, as an engine does."""
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    count = len(whole["path"])
    return [{name: column[at : at + size] for name, column in whole.items()} for at in range(0, count, size)]


def test_the_stage_gives_what_the_loop_gives(home):
    """Decoded and answered apart, in batches across files, and put together from any order."""
    one = pickle.loads(pickle.dumps(stage(home)))
    windows = rebatch(list(one.decode({"path": paths(home)})), 4)
    assert windows[0]["frames"].shape == (4, 3, 32, 32, 3)
    results = [one(batch) for batch in windows]
    assert all("frames" not in batch for batch in results)
    assert not any(weight.is_inference() for weight in one.model.parameters())  # what is made of them is kept
    got = list(as_answers(results[::-1], ["vector"]))
    model = XCLIP.from_pretrained(home / "a")
    want = list(answers(model, paths(home), READING, lambda found: found[:1]))

    def table(items: list) -> dict:
        return {(item.path, item.start, item.end): item.values[0] for item in items if isinstance(item, Answer)}

    assert table(got).keys() == table(want).keys()
    assert len(table(got)) == 3 + 9
    for key, vector in table(want).items():
        torch.testing.assert_close(table(got)[key], vector, rtol=1e-4, atol=1e-5)
    errors = [
        {item.path: item.error and str(item.error) for item in items if isinstance(item, Finished)}
        for items in (got, want)
    ]
    assert errors[0] == errors[1]
    assert sum(error is not None for error in errors[0].values()) == 2


def test_paths_alone_are_decoded_too(home):
    whole = stage(home)({"path": np.array(paths(home)[:3], object)})
    split = stage(home)
    want = split(rebatch(list(split.decode({"path": paths(home)[:3]})), 99)[0])
    assert whole.keys() == want.keys()
    assert all(np.array_equal(whole[name], want[name]) for name in whole)
    assert whole["number"].tolist() == [0, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, -10]


def test_labels_and_patches(home):
    labels = ["growing", "a cat", "moving right"]
    batch = {"path": paths(home)[:1]}
    found = stage(home, labels=labels)(batch)["probabilities"][0]
    model = XCLIP.from_pretrained(home / "a")
    (want, _) = answers(
        model, batch["path"], READING, lambda f: (model.similarity(f, model.encode_text(labels)).softmax(-1),)
    )
    assert found == pytest.approx(want.values[0].numpy(), abs=1e-5)
    both = stage(home, patches=True)(batch)
    assert (both["patches"].shape, both["patches"].dtype) == ((2, 4, 64), np.float16)


def test_answers_that_are_no_numbers_are_errors(home):
    broken = stage(home)
    with torch.no_grad():
        broken.model.visual.proj.fill_(float("nan"))
    (done,) = as_answers([broken({"path": paths(home)[:1]})], ["vector"])
    assert "not a number" in str(done.error)


def test_an_error_of_this_run_is_no_fact(home, monkeypatch):
    monkeypatch.setenv("XCLIP_FAST_MAX_PIXELS", "99")
    (done,) = as_answers([stage(home)({"path": paths(home)[:1]})], [])
    assert isinstance(done.error, ReadError)
    monkeypatch.delenv("XCLIP_FAST_MAX_PIXELS")
    (done,) = as_answers([stage(home)({"path": [str(home / "broken.mp4")]})], [])
    assert not isinstance(done.error, ReadError)


def test_empty_batches(home):
    assert stage(home)({"path": []}) == {}
    assert list(as_answers([{}], [])) == []
    only_bad = stage(home)({"path": [str(home / "broken.mp4")]})
    assert only_bad["vector"].shape == (1, 64)


def test_a_file_that_is_never_complete_is_never_given(home):
    one = stage(home)
    rows = rebatch(list(one.decode({"path": paths(home)[2:3]})), 99)[0]
    answered = one(rows)
    without = {name: np.delete(column, 4, 0) for name, column in answered.items()}
    assert list(as_answers([without], ["vector"])) == []
    *windows, done = as_answers([without, {name: column[4:5] for name, column in answered.items()}], ["vector"])
    assert (len(windows), done.error) == (9, None)


@pytest.mark.skipif(
    os.environ.get("XCLIP_FAST_FULL_TESTS") != "1",
    reason="starts a Ray cluster (20 s): XCLIP_FAST_FULL_TESTS=1 runs it",
)
def test_a_cluster_fills_a_store_like_one_machine(home, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'xclip-fast[ray]'")
    pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'xclip-fast[search]'")
    from xclip_fast.scale.cluster import ClusterOptions, cluster_answers
    from xclip_fast.search import Index

    def filled(name: str, **options) -> dict:
        index = Index.open(tmp_path / name, home / "a", device="cpu", dtype="float32", window=2.0, stride=1.0)
        summary = index.add([home, home / "gone.mp4"], **options)
        assert sorted(map(os.path.basename, summary.failed)) == ["broken.mp4", "gone.mp4"]
        rows = index.store.table.search().where("error IS NULL").to_arrow().to_pylist()
        return {(row["path"], row["start"]): np.array(row["vector"], np.float32) for row in rows}

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        embed = cluster_answers(stage(home), ClusterOptions(actors=1, batch_size=4), ["vector"])
        got, want = filled("ray", embed=embed), filled("plain")
    finally:
        ray.shutdown()
    assert got.keys() == want.keys()
    assert max(np.abs(got[key] - want[key]).max() for key in got) < 2e-3
