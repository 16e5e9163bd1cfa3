"""The loader: exactly once, on any number of ranks and workers, after crashes, hangs, kills and resumes."""

import base64
import hashlib
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from xclip_fast.data.decode.decoder import decode_views, probe
from xclip_fast.data.decode.video import Video
from xclip_fast.data.loader import dali
from xclip_fast.data.loader import workers as watched
from xclip_fast.data.loader.loader import Batch, DataError, Loader, loader
from xclip_fast.data.loader.tasks import Decoder
from xclip_fast.data.manifest import Manifest
from xclip_fast.data.motion import render, write_clip
from xclip_fast.data.transforms import TestTransform, TrainTransform

N = 22
TRAIN = TrainTransform(frames=2, size=16)
HOOKS = """
import os, signal, time
from xclip_fast.data.loader.tasks import Decoder

class Slow(Decoder):
    def one(self, task, place, out):
        time.sleep(0.03)
        return super().one(task, place, out)

class Crash(Slow):
    def one(self, task, place, out):
        if task.manifest.videos[place].path == "07.mp4":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().one(task, place, out)

class Hang(Slow):
    def one(self, task, place, out):
        while task.manifest.videos[place].path == "07.mp4":
            time.sleep(60)
        return super().one(task, place, out)

class Late(Decoder):
    def one(self, task, place, out):
        time.sleep(0.8 * (task.rows[place] >= 16))
        return super().one(task, place, out)

class Wrong(Slow):
    def one(self, task, place, out):
        1 / 0
"""
SCRIPT = """
import hashlib, json, os, sys
from xclip_fast.data.loader import loader
from xclip_fast.data.transforms import TrainTransform
import hooks

if __name__ == "__main__":
    manifest, out = sys.argv[1:]
    batches = loader(manifest, TrainTransform(frames=2, size=16), 4, seed=5, shuffle=True, workers=2, threads=2)
    batches.workers.decoder.__class__ = hooks.Slow
    for _ in range(1000):
        for batch in batches:
            pids = [process.pid for process in batches.workers.processes]
            with open(out + ".new", "w") as file:
                json.dump({"state": batches.state_dict(), "pids": pids}, file)
            os.replace(out + ".new", out)
            print(json.dumps([batch.samples.tolist(), hashlib.sha256(batch.frames.numpy()).hexdigest()]), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(N):
        write_clip(folder / f"{number:02d}.mp4", render("growing", 0, number, frames=6, size=(32, 40)))
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest(folder, ("a", "b"), tuple(_video(path) for path in sorted(folder.glob("*.mp4"))))


def _video(path: Path) -> Video:
    status = path.stat()
    of_row = {"path": path.name, "label": int(path.stem) % 2, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    return replace(probe(path), **of_row)


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Decoders with faults, in a module that worker processes can import."""
    (tmp_path / "hooks.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import hooks

    yield hooks
    del sys.modules["hooks"]


def _told(batches: Iterable[Batch]) -> list[tuple[list[int], str]]:
    return [(batch.samples.tolist(), hashlib.sha256(batch.frames.numpy().tobytes()).hexdigest()) for batch in batches]


def _rows(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.samples.tolist()]


def _pids(batches: Loader) -> list[int]:
    return [process.pid for process in batches.workers.processes]


def _gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether these processes end in time; one that nobody has waited for counts as there."""
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _missing(manifest: Manifest, *rows: int) -> Manifest:
    """The same data, but these rows are named after files that are not there."""
    videos = list(manifest.videos)
    for row in rows:
        videos[row] = replace(videos[row], path=f"gone{row}.mp4")
    return replace(manifest, videos=tuple(videos))


def test_every_video_once_whatever_the_world(manifest: Manifest) -> None:
    whole: dict[int, torch.Tensor] = {}
    sets: list[set[int]] = []
    for world in (1, 2, 8):
        ranks = []
        for rank in range(world):
            batches = loader(manifest, TRAIN, 8 // world, seed=1, shuffle=True, rank=rank, world=world, workers=0)
            got = list(batches)
            assert len(got) == len(batches) == 3
            assert batches.epoch == 1
            ranks.append(got)
        assert sorted(row for got in ranks for row in _rows(got)) == list(range(N))
        assert [sum(len(got[-1].samples) for got in ranks)] == [N - 16]
        assert all(got[-1].frames.shape[1:] == (2, 16, 16, 3) for got in ranks)  # also where it is empty
        sets = sets or [set(_rows([batch])) for batch in ranks[0]]
        for number, expected in enumerate(sets):
            assert set(_rows([got[number] for got in ranks])) == expected
        for batch in (batch for got in ranks for batch in got):
            assert batch.labels.tolist() == [row % 2 for row in batch.samples.tolist()]
            for row, frames in zip(batch.samples.tolist(), batch.frames, strict=True):
                assert torch.equal(whole.setdefault(row, frames), frames)


def test_any_number_of_workers_gives_the_same_batches(manifest: Manifest) -> None:
    batches = loader(manifest, TRAIN, 4, seed=2, shuffle=True, workers=0)
    expected = [_told(batches) for _ in range(2)]
    assert expected[0] != expected[1]
    random = torch.get_rng_state()
    batches = loader(manifest, TRAIN, 4, seed=2, shuffle=True, workers=2, threads=3, prefetch=1)
    assert [_told(batches) for _ in range(2)] == expected
    batches.epoch = 0
    assert _told(batches) == expected[0]
    assert torch.equal(random, torch.get_rng_state()), "the loader drew from the program's own random numbers"
    assert batches.report.summary() == f"{N} of {N} videos"
    assert batches.workers.restarts == 0


def test_threads_serve_all_batches(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """New threads for each batch cost some percent of the time of a batch of small clips."""
    used: set[threading.Thread] = set()
    one = Decoder.one

    def noted(*given: Any) -> str:
        used.add(threading.current_thread())
        return one(*given)

    monkeypatch.setattr(Decoder, "one", noted)
    list(loader(manifest, TRAIN, 4, workers=0, threads=2))
    assert len(used) <= 2


def test_views_and_an_empty_batch(manifest: Manifest) -> None:
    data = _missing(manifest, 2, 3).select(range(4))
    batches = loader(data, TestTransform(frames=3, size=16, clips=2, crops=3), 2, workers=0, max_bad=0.5)
    first, second = batches
    assert first.frames.shape == (2, 6, 3, 16, 16, 3)
    assert second.frames.shape == (0, 6, 3, 16, 16, 3)
    assert second.labels.shape == second.samples.shape == (0,)
    views = TestTransform(frames=3, size=16, clips=2, crops=3).views(6, 40, 32)
    assert np.array_equal(first.frames[1], decode_views(manifest.source(1), views))


def test_missing_files_are_named_and_counted(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    data = _missing(manifest, 4).with_errors({9: "was bad in the index"})
    twice = replace(data, videos=(*data.videos, data.videos[4]))  # one more row of the missing file
    batches = loader(twice, TRAIN, 4, workers=0, max_bad=0.1)
    named = "3 could not be read: gone4.mp4: no such file; 09.mp4: was"
    for _ in range(2):
        assert sorted(_rows(list(batches))) == [row for row in range(N) if row not in (4, 9)]
        assert set(batches.report.bad) == {4, 9, N}
        assert batches.report.summary().startswith(f"{N - 2} of {N + 1} videos; {named}")
    assert [record.getMessage() for record in caplog.records] == ["gone4.mp4: left out: no such file"]

    halves = [loader(twice, TRAIN, 2, rank=rank, world=2, workers=0, max_bad=0.1) for rank in range(2)]
    for half in halves:
        list(half)
    reports = [half.report for half in halves]
    assert (sum(each.delivered for each in reports), sum(each.total for each in reports)) == (N - 2, N + 1)
    assert set().union(*(each.bad for each in reports)) == {4, 9, N}


def test_members_of_a_tar_file(manifest: Manifest, folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for row in range(4):
            shard.add(folder / f"{row:02d}.mp4", f"{row:02d}.mp4")
    with tarfile.open(tmp_path / "shard.tar") as shard:
        places = {info.name: info.offset_data for info in shard}
    videos = [
        replace(video, path="shard.tar", member=video.path, offset=places[video.path]) for video in manifest.videos[:4]
    ]
    data = Manifest(tmp_path, manifest.classes, tuple(videos))
    expected = _told(loader(manifest.select(range(4)), TRAIN, 4, workers=0))
    assert _told(loader(data, TRAIN, 4, workers=0)) == expected
    data = data.with_errors({3: "bad"})
    assert loader(data, TRAIN, 4, workers=0, max_bad=0.25).report.bad == {3: "bad"}  # a member is a video of its own


def test_what_dali_is_asked_for(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = loader(manifest, TRAIN, 4, seed=9, shuffle=True, workers=0)
    expected = [batch.samples.tolist() for batch in batches]
    asked: list[dict[str, Any]] = []
    real = dali.dali_batches

    def pretend(data: Manifest, transform: Any, rows: list[np.ndarray], **options: Any) -> Iterator[Batch]:
        inspect.signature(real).bind(data, transform, rows, **options)
        asked.append(options)
        for number, part in enumerate(rows):
            if number == 1:
                options["on_bad"](int(part[0]), "broken")
                part = part[1:]
            yield Batch(
                torch.zeros(len(part), 2, 16, 16, 3, dtype=torch.uint8), torch.zeros(len(part)), torch.tensor(part)
            )

    monkeypatch.setattr(dali, "dali_batches", pretend)
    batches.epoch, batches.decoder = 0, "dali"
    got = [batch.samples.tolist() for batch in batches]
    broken = expected[1][0]
    assert got == [expected[0], expected[1][1:], *expected[2:]]
    assert batches.report.bad == {broken: "broken"}
    assert batches.report.delivered == N - 1
    assert (asked[0]["seed"], asked[0]["epoch"], batches.epoch) == (9, 0, 1)
    batches.epoch = 0
    next(iter(batches))
    assert asked[1]["routes"] is asked[0]["routes"]


def test_too_many_bad_videos_stop_with_a_list(manifest: Manifest) -> None:
    with pytest.raises(DataError, match=r"1 of 22 videos .* 0\.0% .*gone0\.mp4: no such file.*max_bad allows more"):
        list(loader(_missing(manifest, 0), TRAIN, 4, workers=0, max_bad=0))
    with pytest.raises(DataError, match=r"2 of 22 videos .* 5\.0%"):
        list(loader(_missing(manifest, 0, 7), TRAIN, 4, workers=0))
    assert len(_rows(list(loader(_missing(manifest, 7), TRAIN, 4, workers=0, max_bad=0.01)))) == N - 1  # one may


def test_videos_that_the_index_found_bad_are_not_tried(manifest: Manifest) -> None:
    data = manifest.with_errors(dict.fromkeys(range(12), "bad"))
    batches = loader(data, TRAIN, 4, workers=0, max_bad=0)
    assert sorted(_rows(list(batches))) == list(range(12, N))
    assert batches.report.summary().startswith(f"{N - 12} of {N} videos; 12 could not be read")
    assert "09.mp4: bad; and 2 more" in batches.report.listed()


BOMB = base64.b64encode(zlib.compress(np.array([6, 2**62], "<i8").tobytes() + bytes(10**7))).decode()


@pytest.mark.parametrize("packed", ["x", "", "eJwDAAAAAAE=", BOMB], ids=["text", "empty", "nothing", "bomb"])
def test_a_damaged_plan_costs_its_row(manifest: Manifest, packed: str) -> None:
    videos = list(manifest.videos)
    videos[3] = replace(videos[3], packed=packed)
    for workers in (0, 1):
        batches = loader(replace(manifest, videos=tuple(videos)), TRAIN, 4, workers=workers, max_bad=0.1)
        assert sorted(_rows(list(batches))) == [row for row in range(N) if row != 3]
        assert "decoding plan in the manifest is damaged" in batches.report.bad[3]
        batches.close()


def test_little_shared_memory_is_said_at_the_start(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = 4 * 3 * 16 * 16 * 3  # of TestTransform below
    transform = TestTransform(3, 16)
    for free, told in ((batch - 1, "a batch takes"), (batch * 4, "may wait at once"), (batch * 5, "")):
        monkeypatch.setattr(watched.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        caplog.clear()
        if told == "a batch takes":
            with pytest.raises(RuntimeError, match=r"a batch takes 0 MiB, and /dev/shm.*--shm-size"):
                loader(manifest, transform, 4, workers=2, prefetch=2)
            loader(manifest, transform, 4, workers=0)
        else:
            loader(manifest, transform, 4, workers=2, prefetch=2)
            assert told in caplog.text
            assert bool(told) == bool(caplog.records)


def test_a_video_that_crashes_its_worker(manifest: Manifest, hooks: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = [(row, sha) for row, sha in _told(loader(manifest, TRAIN, 1, seed=3, shuffle=True, workers=0))]
    batches = loader(
        manifest,
        TRAIN,
        1,
        seed=3,
        shuffle=True,
        workers=2,
        threads=2,
        max_bad=0.05,
    )
    batches.workers.decoder.__class__ = hooks.Crash
    got = _told(batches)
    assert [item for item in got if item[0]] == [item for item in expected if item[0] != [7]]
    assert len(got) == N
    assert list(batches.report.bad) == [7]
    assert "SIGSEGV" in batches.report.bad[7]
    assert f"{N - 1} of {N} videos" in batches.report.summary()
    restarts = batches.workers.restarts
    assert restarts >= 1
    assert len(_rows(list(batches))) == N - 1  # it is not tried again
    assert batches.workers.restarts == restarts
    assert sum("07.mp4: left out" in record.getMessage() for record in caplog.records) == 1


def test_a_video_that_hangs_its_worker(manifest: Manifest, hooks: Any) -> None:
    batches = loader(manifest, TRAIN, 4, workers=2, threads=2, timeout=2.0)
    batches.workers.decoder.__class__ = hooks.Hang
    start = time.monotonic()
    assert sorted(_rows(list(batches))) == [row for row in range(N) if row != 7]
    assert time.monotonic() - start < 60
    assert batches.report.bad == {7: "decoding it takes longer than 2 s (tried twice)"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_loses_nothing(manifest: Manifest, hooks: Any, how: int) -> None:
    batches = loader(manifest, TRAIN, 2, workers=2, threads=2, timeout=2.0)
    batches.workers.decoder.__class__ = hooks.Slow
    rows = []
    for number, batch in enumerate(batches):
        if number == 2:
            os.kill(_pids(batches)[0], how)
        rows += batch.samples.tolist()
    assert rows == list(range(N))
    assert not batches.report.bad
    assert batches.workers.restarts >= 1


def test_an_error_that_is_no_videos_fault_is_raised(manifest: Manifest, hooks: Any) -> None:
    batches = loader(manifest, TRAIN, 4, workers=1)
    batches.workers.decoder.__class__ = hooks.Wrong
    with pytest.raises(RuntimeError, match=r"(?s)no video is the cause.*ZeroDivisionError"):
        list(batches)


def _script(manifest: Manifest, tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    manifest.write(tmp_path / "manifest.jsonl")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "manifest.jsonl"), str(tmp_path / "state")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True), tmp_path / "state"


def test_killed_and_resumed_at_any_batch(manifest: Manifest, hooks: Any, tmp_path: Path) -> None:
    reference = loader(manifest, TRAIN, 4, seed=5, shuffle=True, workers=0)
    expected = [item for _ in range(3) for item in _told(reference)]
    process, file = _script(manifest, tmp_path)
    assert process.stdout is not None
    stop = int(np.random.default_rng().integers(1, 10))
    lines = [json.loads(process.stdout.readline()) for _ in range(stop)]
    process.kill()
    process.wait()
    saved = json.loads(file.read_text())
    assert [tuple(line) for line in lines] == expected[:stop]
    state = saved["state"]
    done = state["epoch"] * len(reference) + state["batches"]  # it may have got further than we read
    assert done >= stop
    assert len(saved["pids"]) == 2
    assert _gone(saved["pids"]), "workers outlive a process that was killed"
    process.communicate()

    resumed = loader(manifest, TRAIN, 4, seed=5, shuffle=True, workers=0)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rest = _told(resumed)
    assert resumed.report.summary() == f"{N} of {N} videos"
    assert rest == expected[done : done + len(rest)]
    assert len(rest) == len(reference) - state["batches"]
    assert resumed.epoch == state["epoch"] + 1

    pair = [loader(manifest, TRAIN, 2, seed=5, shuffle=True, rank=rank, world=2, workers=0) for rank in range(2)]
    for half in pair:
        half.load_state_dict(state)
    for left, right, (rows, _) in zip(*pair, rest, strict=True):
        assert left.samples.tolist() == rows[::2]
        assert right.samples.tolist() == rows[1::2]


def test_state_of_something_else_is_refused(manifest: Manifest) -> None:
    state = loader(manifest, TRAIN, 4, workers=0).state_dict()
    other: dict[str, Callable[[], Loader]] = {
        "fingerprint": lambda: loader(manifest.select(range(N - 1)), TRAIN, 4, workers=0),
        "transform": lambda: loader(manifest, TestTransform(2, 16), 4, workers=0),
        "seed": lambda: loader(manifest, TRAIN, 4, seed=1, workers=0),
        "global_batch": lambda: loader(manifest, TRAIN, 4, world=2, workers=0),
        "shuffle": lambda: loader(manifest, TRAIN, 4, shuffle=True, workers=0),
    }
    for name, make in other.items():
        with pytest.raises(ValueError, match=f"its {name} is"):
            make().load_state_dict(state)
    with pytest.raises(ValueError, match="fingerprint"):  # the order of the others is another one now
        loader(manifest.with_errors({0: "bad"}), TRAIN, 4, workers=0).load_state_dict(state)


def test_a_broken_off_iteration_leaves_nothing_behind(manifest: Manifest, hooks: Any) -> None:
    batches = loader(manifest, TRAIN, 2, workers=2, threads=2)
    batches.workers.decoder.__class__ = hooks.Slow
    for batch in batches:
        if batch.samples[0] == 4:
            pids = _pids(batches)
            break
    assert (batches.epoch, batches.state_dict()["batches"]) == (0, 3)
    assert len(pids) == 2
    assert _gone(pids, 3)
    assert _rows(list(batches)) == list(range(N))  # from its start
    pids = _pids(batches)
    iteration = iter(batches)
    next(iteration)
    assert _pids(batches) == pids  # the workers go on from epoch to epoch
    del batch, iteration
    start = time.monotonic()
    del batches
    assert _gone(pids, 3)
    assert time.monotonic() - start < 3
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    assert not [name for name in names if name.startswith(tuple(f"torch_{pid}_" for pid in (os.getpid(), *pids)))]


def test_closing_does_not_wait_for_whole_batches(
    manifest: Manifest, hooks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = loader(manifest, TRAIN, 8, workers=2, threads=1, prefetch=1)
    batches.workers.decoder.__class__ = hooks.Late
    next(iteration := iter(batches))
    time.sleep(0.3)  # the last batch, of six slow videos, has begun
    start = time.monotonic()
    iteration.close()
    assert time.monotonic() - start < 3
    next(iteration := iter(batches))
    end = batches.workers._batches._shutdown_workers

    def interrupted() -> None:
        end()
        raise KeyboardInterrupt

    monkeypatch.setattr(batches.workers._batches, "_shutdown_workers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        iteration.close()
    assert _told(batches) == _told(loader(manifest, TRAIN, 8, workers=0))


def test_ctrl_c_ends_all_processes(manifest: Manifest, hooks: Any, tmp_path: Path) -> None:
    process, file = _script(manifest, tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    pids = json.loads(file.read_text())["pids"]
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT or process.returncode == 130 or process.returncode == 1
    assert _gone(pids, 5)
    assert time.monotonic() - start < 10


def test_no_cuda_device(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda:1', and torch sees no CUDA device"):
        loader(manifest, TRAIN, 2, device="cuda:1")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world": 2}, "rank is 2"),
        ({"max_bad": 2.0}, "max_bad is 2.0"),
        ({"workers": -1}, "workers is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"decoder": "gpu"}, "decoder is 'gpu'"),
        ({"decoder": "dali", "device": "cpu"}, "DALI is for CUDA devices"),
    ],
)
def test_bad_arguments(manifest: Manifest, given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        loader(manifest, TRAIN, **{"batch_size": 2, **given})  # type: ignore[arg-type]


def test_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    soak = importlib.import_module("soak")
    result = soak.soak(tmp_path, 600, clips=5, batch=16, size=16, frames=2)
    assert result["passed"] == dict.fromkeys(result["passed"], True), result
    assert result["summary"] == "588 of 600 videos; 12 could not be read"
    assert set(result["reasons"]) == set(soak.BAD)


def test_what_was_found_bad_can_be_kept(manifest: Manifest, tmp_path: Path) -> None:
    batches = loader(_missing(manifest, 4), TRAIN, 4, workers=0)
    list(batches)
    batches.quarantined().write(tmp_path / "known.jsonl")
    assert list(Manifest.read(tmp_path / "known.jsonl").bad) == [4]


def test_seek(manifest: Manifest) -> None:
    reference = loader(manifest, TRAIN, 4, seed=5, shuffle=True, workers=0)
    epochs = [_told(reference) for _ in range(2)]
    found = loader(manifest, TRAIN, 4, seed=5, shuffle=True, workers=0)
    found.seek(1, 2)
    assert _told(found) == epochs[1][2:]
    assert found.epoch == 2
    found.seek(0, 0)
    assert _told(found) == epochs[0]
    with pytest.raises(ValueError, match="batch is 99; an epoch has"):
        found.seek(0, 99)
    with pytest.raises(ValueError, match="epoch is -1"):
        found.seek(-1, 0)
