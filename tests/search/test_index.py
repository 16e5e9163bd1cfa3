"""The store: what is in it after every kind of run, and what a search in it answers."""

import errno
import itertools
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'xclip-fast[search]'")

from small import CONFIG

import xclip_fast
from xclip_fast import XCLIP, decode
from xclip_fast.data.decode import reading
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.search import Hit, Index
from xclip_fast.search.query import Filters, merge_neighbors
from xclip_fast.search.store import Store


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    for name in "ab":
        XCLIP(CONFIG).save_pretrained(folder / name)
    return folder


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three clips of half a second, a film of 40 s, and a file that is no video."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for index, label in enumerate(CLASSES[:3]):
        write_clip(folder / f"{index}.mp4", render(label, 0, frames=12, size=(48, 64)))
    write_clip(folder / "film.mp4", render("growing", 0, frames=80, size=(48, 64)), 2)
    (folder / "broken.mp4").write_text("no video\n" * 100)
    return folder


def open_index(tmp_path: Path, weights: Path, **options) -> Index:
    return Index.open(tmp_path / "store", weights / "a", device="cpu", dtype="float32", **options)


def rows(index: Index) -> list[tuple[str, float, float]]:
    """(name, start, end) of every moment, sorted."""
    index.store.refresh()
    found = index.store.table.search().where("error IS NULL").select(["path", "start", "end"]).to_arrow().to_pylist()
    return sorted((os.path.basename(row["path"]), row["start"], row["end"]) for row in found)


def vector(index: Index, name: str, start: float = 0.0) -> np.ndarray:
    where = f"path LIKE '%{name}' AND start = {start}"
    return np.array(index.store.table.search().where(where).to_arrow()["vector"][0].as_py(), np.float32)


def test_what_is_stored_and_what_is_found(tmp_path, weights, videos):
    index = open_index(tmp_path, weights)
    summary = index.add(videos)
    assert sorted(map(os.path.basename, summary.added)) == ["0.mp4", "1.mp4", "2.mp4", "film.mp4"]
    assert [os.path.basename(name) for name in summary.failed] == ["broken.mp4"]
    film = [("film.mp4", float(start), start + 10.0) for start in range(0, 35, 5)]
    assert rows(index) == [*((f"{i}.mp4", 0.0, 0.48) for i in range(3)), *film]
    assert len(index) == summary.moments == 10

    model = XCLIP.from_pretrained(weights / "a")
    with torch.inference_mode():
        parts = [decode(videos / "film.mp4", 3, size=32, start=start, end=end) for _, start, end in film]
        want_BE = torch.nn.functional.normalize(model.encode_video(torch.stack(parts)).video, dim=-1)
        text_1E = torch.nn.functional.normalize(model.encode_text("growing"), dim=-1)
    for (_, start, _), want_E in zip(film, want_BE, strict=True):
        assert np.abs(vector(index, "film.mp4", start) - want_E.numpy()).max() < 1e-3
    hits = index.search("growing", top=20, merge=False, path="film*")
    assert [hit.score for hit in hits] == pytest.approx(sorted((want_BE @ text_1E.T)[:, 0].tolist())[::-1], abs=1e-3)
    assert all(hit.path == str(videos / "film.mp4") for hit in hits)


def test_patches_rank_as_the_model_does(tmp_path, weights, videos, monkeypatch):
    index = open_index(tmp_path, weights, patches=True)
    index.add([videos / f"{i}.mp4" for i in range(3)])
    model = XCLIP.from_pretrained(weights / "a")
    with torch.inference_mode():
        found = model.encode_video(torch.stack([decode(videos / f"{i}.mp4", 3, size=32) for i in range(3)]))
        want = model.similarity(found, model.encode_text("a cat"))[:, 0] / model.logit_scale.exp()
    scores = {os.path.basename(hit.path): hit.score for hit in index.search("a cat")}
    assert scores == pytest.approx({f"{i}.mp4": float(want[i]) for i in range(3)}, abs=1e-3)
    with pytest.raises(ValueError, match="patches 4, not 0"):
        open_index(tmp_path, weights, patches=False)
    monkeypatch.setattr(index.store, "patches", lambda rows: dict.fromkeys(rows, np.full((4, 64), np.nan, np.float16)))
    with pytest.raises(ValueError, match=r"mp4: its stored features are not numbers; embed it again"):
        index.search("a cat")


def test_unchanged_changed_new_and_gone(tmp_path, weights, videos, monkeypatch):
    index = open_index(tmp_path, weights)
    index.add(videos)
    read: list[str] = []
    honest = type(index.reading()).windows
    monkeypatch.setattr(
        type(index.reading()), "windows", lambda self, path, threads=1: read.append(path) or honest(self, path, threads)
    )
    again = index.add(videos)
    assert (again.unchanged, len(again.failed), again.moments, read) == (4, 1, 0, [])  # the failed one is named again

    before = vector(index, "1.mp4")
    write_clip(videos / "1.mp4", render("shrinking", 3, frames=14, size=(48, 64)))
    write_clip(videos / "film.mp4", render("growing", 0, frames=24, size=(48, 64)), 2)  # 12 s now: one moment
    write_clip(videos / "new.mp4", render("shrinking", 0, frames=12, size=(48, 64)))
    (videos / "0.mp4").unlink()
    now = index.add(str(videos))
    assert [os.path.basename(name) for name in now.updated] == ["1.mp4", "film.mp4"]
    assert [os.path.basename(name) for name in now.added] == ["new.mp4"]
    assert now.dropped == [str(videos / "0.mp4")]
    assert rows(index) == [
        ("1.mp4", 0.0, 0.56), ("2.mp4", 0.0, 0.48), ("film.mp4", 0.0, 12.0), ("new.mp4", 0.0, 0.48),
    ]  # fmt: skip
    assert np.abs(vector(index, "1.mp4") - before).max() > 1e-3

    # what was repaired is taken, what broke loses its moments
    write_clip(videos / "broken.mp4", render("growing", 5, frames=12, size=(48, 64)))
    (videos / "2.mp4").write_text("broken now")
    mended = index.add(videos)
    assert [os.path.basename(name) for name in mended.updated] == ["broken.mp4"]
    assert [os.path.basename(name) for name in mended.failed] == ["2.mp4"]
    assert "2.mp4" not in [name for name, *_ in rows(index)]
    read.clear()
    assert index.add(videos, retry=True).failed.keys() == mended.failed.keys()
    assert [os.path.basename(name) for name in read] == ["2.mp4"]


def test_a_folder_that_is_empty_now_drops_nothing(tmp_path, weights, videos):
    """A disk that is not mounted is an empty folder."""
    index = open_index(tmp_path, weights)
    index.add(videos)
    videos.rename(tmp_path / "elsewhere")
    videos.mkdir()
    summary = index.add(videos)
    assert summary.dropped == []
    assert len(index) == 10
    assert "no video file" in next(iter(summary.failed.values()))


def test_a_subfolder_that_cannot_be_listed_drops_nothing(tmp_path, weights, videos, unlistable):
    (videos / "locked").mkdir()
    (videos / "2.mp4").rename(videos / "locked" / "2.mp4")
    index = open_index(tmp_path, weights)
    index.add(videos)
    before = rows(index)
    unlistable(videos / "locked")
    (videos / "0.mp4").unlink()
    summary = index.add(videos)
    assert summary.dropped == [str(videos / "0.mp4")]
    assert rows(index) == [row for row in before if row[0] != "0.mp4"]
    assert "cannot be listed (Permission denied)" in summary.failed[str(videos / "locked")]


@pytest.mark.parametrize("digest", [False, True])
def test_what_is_no_file_gets_no_row(tmp_path, weights, videos, digest):
    """The digest of a pipe waited for somebody to write to it, for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{videos / '0.mp4'}\n{videos}\npipe.mp4\n")
    index = open_index(tmp_path, weights)
    summary = index.add(listed, digest=digest)
    assert list(summary.failed.values()) == [
        f"{videos}: is a directory, not a video file",
        f"{tmp_path / 'pipe.mp4'}: is not a regular file",
    ]
    assert index.store.counts()[2] == 0
    assert index.add(listed, digest=digest).failed == summary.failed


def test_several_names_of_a_file_are_one_entry(tmp_path, weights, videos):
    os.link(videos / "0.mp4", videos / "hard.mp4")
    (videos / "soft.mp4").symlink_to("1.mp4")
    index = open_index(tmp_path, weights)
    given = [videos, videos / "0.mp4", os.path.relpath(videos / "2.mp4"), videos / ".." / "videos" / "2.mp4"]
    summary = index.add(given)
    assert len(index) == 10
    assert sorted(map(os.path.basename, summary.aliases)) == ["hard.mp4", "soft.mp4"]
    assert len(index.add(given).aliases) == 2


def test_digest_sees_content_and_not_times(tmp_path, weights, videos):
    index = open_index(tmp_path, weights)
    one = videos / "1.mp4"
    index.add(one, digest=True)
    os.utime(one, (1, 1))
    assert index.add(one, digest=True).unchanged == 1
    assert len(index.add(one).updated) == 1  # by time it has changed
    index.add(one, digest=True, retry=True)
    status = os.stat(one)
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)
    os.utime(one, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert index.add(one).unchanged == 1


def test_an_error_of_this_run_is_no_fact(tmp_path, weights, videos, monkeypatch):
    def sick(file, count):
        file.error = OSError(errno.EIO, "Input/output error")
        raise file.error

    index = open_index(tmp_path, weights)
    index.add(videos / "0.mp4")
    os.utime(videos / "0.mp4", (1, 1))
    good = [videos / f"{number}.mp4" for number in range(3)]
    for digest in (False, True):
        with monkeypatch.context() as context:
            context.setattr(reading.File, "read", sick)
            failed = index.add(good, digest=digest).failed
            assert len(failed) == 3
            assert all("cannot be read now (Input/output error)" in why for why in failed.values())
        with monkeypatch.context() as context:
            context.setenv("XCLIP_FAST_MAX_PIXELS", "99")
            assert all("XCLIP_FAST_MAX_PIXELS allows more" in why for why in index.add(good).failed.values())
        summary = index.add(good, digest=digest)
        assert (len(summary.updated), summary.failed) == (3, {})
        assert len(rows(index)) == 3
        for path in good:
            os.utime(path, (2, 2))
            path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (b"[]", "not written by this version"),
        (b"[" * 30000, "nested too deeply"),
        (b'{"format": 1}', "settings are incomplete"),
        ({"window": "x"}, "window is 'x'"),
        ({"embed_dim": 9}, "columns do not fit"),
        ({"embed_dim": 10**30}, "too large"),
        ({}, "embedding function, which may run code"),
    ],
)
def test_what_is_no_store(tmp_path, weights, change, why):
    import lancedb

    index = open_index(tmp_path, weights)
    table = index.store.table.to_arrow()
    ((key, text),) = table.schema.metadata.items()
    metadata = {key: change if isinstance(change, bytes) else json.dumps(json.loads(text) | change)}
    if change == {}:
        metadata["embedding_functions"] = "[]"
    lancedb.connect(tmp_path / "other").create_table("moments", table.replace_schema_metadata(metadata))
    with pytest.raises(ValueError, match=f"other: holds a table that is not a store .*{why}"):
        Store.open(tmp_path / "other")


def test_damaged_files_of_a_store(tmp_path, weights, videos):
    """LanceDB's errors name no store, and came through with a traceback."""
    index = open_index(tmp_path, weights)
    index.add(videos)
    uses = (lambda again: again.search("growing"), lambda again: again.add(videos))
    files = list((tmp_path / "store").rglob("data/*.lance"))
    for use, damage in itertools.product(uses, (lambda data: data.write_bytes(b"x" * 99), lambda data: data.unlink())):
        for data in files:
            damage(data)
        with pytest.raises(
            ValueError, match=r"store: its table is damaged or cannot be written \(.*; embed into a new"
        ):
            use(open_index(tmp_path, weights))
    shutil.rmtree(next((tmp_path / "store").rglob("_versions")))
    with pytest.raises(ValueError, match=r"store: its table is damaged .*not found"):
        open_index(tmp_path, weights)


def test_paths_relative_to_a_root_move_along(tmp_path, weights, videos):
    index = open_index(tmp_path, weights, root=tmp_path)
    index.add(videos / "0.mp4")
    assert list(index.store.known()) == ["videos/0.mp4"]
    (tmp_path / "disk").mkdir()
    videos.rename(tmp_path / "disk" / "videos")
    moved = Index.open(tmp_path / "store", root=tmp_path / "disk", device="cpu")
    (hit,) = moved.search("growing")
    assert hit.path == str(tmp_path / "disk" / "videos" / "0.mp4")
    assert moved.add(tmp_path / "disk").unchanged == 1
    (tmp_path / "x.mp4").write_text("x")
    assert "not in the store's root" in next(iter(moved.add(tmp_path / "x.mp4").failed.values()))


def test_another_model_and_other_settings_are_refused(tmp_path, weights, videos):
    open_index(tmp_path, weights, window=4.0).add(videos / "film.mp4")
    with pytest.raises(ValueError, match="made with other weights"):
        Index.open(tmp_path / "store", weights / "b")
    for options, words in (({"window": 5.0}, "window 4.0, not 5.0"), ({"frames": 4}, "frames 3, not 4")):
        with pytest.raises(ValueError, match=words):
            open_index(tmp_path, weights, **options)
    same = open_index(tmp_path, weights, window=4.0, stride=2.0)
    assert len(same) == 19
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(FileExistsError, match="is not a store"):
        Index.open(tmp_path / "other", weights / "a")
    with pytest.raises(FileNotFoundError, match="is not a store"):
        Index.open(tmp_path / "nothing")


def test_files_follow_the_umask(tmp_path, weights, videos):
    old = os.umask(0o027)
    try:
        open_index(tmp_path, weights).add(videos / "0.mp4")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_an_interrupted_run_keeps_whole_files(tmp_path, weights, videos):
    index = open_index(tmp_path, weights)
    seen: list[str] = []

    def stop(path: str, error: ValueError | None) -> None:
        seen.append(path)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.add([videos / "film.mp4", videos / "0.mp4", videos / "1.mp4"], on_file=stop)
    assert {name for name, *_ in rows(index)} == {"film.mp4", "0.mp4"}
    assert index.add(videos).unchanged == 2
    assert len(rows(index)) == len(set(rows(index))) == 10


def test_no_room_for_the_rows(tmp_path, weights, videos, file_limit):
    """LanceDB's own error came through."""
    index = open_index(tmp_path, weights)
    file_limit(2048)
    with pytest.raises(OSError, match=r"store: could not be written, a file .* What was stored before is unchanged;"):
        index.add(videos)
    assert len(index) == 0


def test_a_file_that_fails_midway_leaves_nothing(tmp_path, weights, videos, monkeypatch):
    index = open_index(tmp_path, weights)
    honest = type(index.reading()).windows

    def failing(self, path, threads=1):
        for number, window in enumerate(honest(self, path, threads)):
            if number == 3:
                raise ValueError(f"{path}: lost")
            yield window

    monkeypatch.setattr(type(index.reading()), "windows", failing)
    summary = index.add([videos / "film.mp4", videos / "0.mp4"])
    assert list(summary.failed.values()) == [f"{videos / 'film.mp4'}: lost"]
    assert [name for name, *_ in rows(index)] == ["0.mp4"]


def test_two_runs_into_one_store(tmp_path, weights):
    """Two processes at once, the same files: every file once, and neither run waits for its end to see it."""
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(24):
        write_clip(folder / f"{index:02}.mp4", render(CLASSES[index % 10], index, frames=12, size=(48, 64)))
    code = (
        "import sys; from xclip_fast.search import Index, add; add._SECONDS = 0.2;"
        "i = Index.open(sys.argv[1], sys.argv[2], device='cpu', dtype='float32'); s = i.add(sys.argv[3]);"
        "print(len(s.added), s.unchanged, len(s.failed))"
    )
    command = [sys.executable, "-c", code, tmp_path / "store", weights / "a", folder]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [tuple(map(int, run.communicate(timeout=100)[0].split())) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum(added for added, *_ in counts) == 24
    assert all(added + unchanged == 24 and not failed for added, unchanged, failed in counts)
    index = Index.open(tmp_path / "store", device="cpu")
    assert [name for name, *_ in rows(index)] == [f"{i:02}.mp4" for i in range(24)]


def test_claims_and_commits_of_another_writer(tmp_path, weights, videos):
    """A file that was written after our plan is not written again."""
    index = open_index(tmp_path, weights)
    rival = Index.open(tmp_path / "store", device="cpu")
    done = threading.Event()

    def meanwhile(files: int) -> None:
        if not done.is_set():
            done.set()
            rival.add(videos / "0.mp4")

    summary = index.add([videos / "0.mp4", videos / "1.mp4"], on_plan=meanwhile)
    assert (len(summary.added), summary.unchanged) == (1, 1)
    assert [name for name, *_ in rows(index)] == ["0.mp4", "1.mp4"]


def hit(start: float, score: float, path: str = "a", length: float = 10) -> Hit:
    return Hit(path, start, start + length, score, (start, start + length))


def test_neighbors_become_one_moment():
    hits = [hit(10, 0.9), hit(15, 0.85), hit(100, 0.8), hit(5, 0.7), hit(0, 0.2), hit(50, 0.15, "b"), hit(20, 0.1)]
    found = [(one.path, one.start, one.end, one.score, one.best) for one in merge_neighbors(hits)]
    assert found[:2] == [("a", 5, 25, 0.9, (10, 20)), ("a", 100, 110, 0.8, (100, 110))]
    assert {(path, start) for path, start, *_ in found[2:]} == {("a", 0), ("b", 50), ("a", 20)}
    assert merge_neighbors([]) == []


@pytest.mark.parametrize(
    ("glob", "matching"),
    [
        ("trip", {"/v/trip/a.mp4", "/v/b trip.mp4"}),
        ("*.mp4", {"/v/trip/a.mp4", "/v/b trip.mp4"}),
        ("trip/*", {"/v/trip/a.mp4"}),
        ("/v/?'s.avi", {"/v/x's.avi"}),
        ("[xy]*.avi", {"/v/x's.avi"}),
        ("[!x]'s.avi", set()),
        ("(a+", {"/v/(a+b).mkv"}),
    ],
)
def test_filters_by_path(tmp_path, weights, videos, glob, matching):
    import pyarrow as pa

    index = open_index(tmp_path, weights)
    index.add(videos / "0.mp4")
    row = index.store.table.search().to_arrow()
    for path in ("/v/trip/a.mp4", "/v/b trip.mp4", "/v/x's.avi", "/v/(a+b).mkv"):
        index.store.table.add(row.set_column(1, "path", pa.array([path])))
    hits = index.search("growing", path=glob)
    assert {one.path for one in hits if one.path.startswith("/v/")} == matching


def test_filters_by_time(tmp_path, weights, videos):
    index = open_index(tmp_path, weights)
    index.add(videos / "film.mp4")
    found = index.search("growing", after=12, before=20, merge=False)
    assert sorted(one.start for one in found) == [5, 10, 15]
    assert Filters(after=1, before=2).sql() == '"end" > 1.0 AND start < 2.0'
    assert len(index.search("growing", top=10**12, merge=False)) == 7
    for after, before in ((math.nan, None), (None, math.inf), (2, 2)):
        with pytest.raises(ValueError, match="wanted"):
            index.search("growing", after=after, before=before)


def test_it_is_public():
    assert xclip_fast.Index is Index


def test_search_by_example(tmp_path, weights, videos):
    index = open_index(tmp_path, weights)
    index.add(videos)
    first, *_ = index.search(index.features(videos / "2.mp4"))
    assert first.path == str(videos / "2.mp4")
    assert first.score == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        index.features(videos / "broken.mp4")


@pytest.mark.parametrize("query", ["", "  "])
def test_an_empty_query(tmp_path, weights, videos, query):
    index = open_index(tmp_path, weights)
    assert index.search("a cat") == []  # nothing is stored yet
    with pytest.raises(ValueError, match="the query is empty"):
        index.search(query)


def test_an_index_finds_what_exact_search_finds(tmp_path, weights):
    """6,000 random vectors in clusters: nine of ten of the exact ten, with exact scores."""
    import pyarrow as pa

    index = open_index(tmp_path, weights)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(50, 64))
    vectors = (centers[rng.integers(50, size=6_000)] + 0.5 * rng.normal(size=(6_000, 64))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = index.store.table
    count = len(vectors)
    columns = {
        "id": [str(i) for i in range(count)], "path": [f"{i}.mp4" for i in range(count)],
        "start": np.zeros(count), "end": np.ones(count), "size": np.zeros(count, np.int64),
        "stamp": [""] * count, "digest": pa.nulls(count, pa.string()), "error": pa.nulls(count, pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1).astype(np.float16)), 64),
    }  # fmt: skip
    table.add(pa.table(columns, schema=table.schema))
    with pytest.raises(ValueError, match="an index is worth"):
        Store.create(tmp_path / "small", index.store.settings).build_index()
    query = torch.from_numpy(vectors[7:8])
    exact = index.search(query, merge=False)
    begun = time.monotonic()
    index.store.build_index()
    assert time.monotonic() - begun < 60
    assert index.store.indexed
    found = index.search(query, merge=False)
    assert found[0] == exact[0]
    assert len({one.path for one in found} & {one.path for one in exact}) >= 9
    scores = {one.path: one.score for one in exact}
    assert all(one.score == scores.get(one.path, one.score) for one in found)
