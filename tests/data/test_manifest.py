"""Manifests: writing and reading back, and an index that survives bad files, kills and moved folders."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xclip_fast.data.decode.decoder import decode_frames, probe
from xclip_fast.data.decode.plan import Plan
from xclip_fast.data.decode.video import Video, pack_plan, unpack_plan
from xclip_fast.data.manifest import Manifest, index, probing, summary
from xclip_fast.data.motion import render, write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, render("moving up", 0, frames=10, size=(32, 48)), g=4)
    return path


@pytest.fixture
def data(tmp_path, clip):
    """Two classes: three good videos, and one of each kind of bad file."""
    root = tmp_path / "data"
    for name in ("run/0.mp4", "run/1.mp4", "long_jump/0.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, root / name)
    (root / "run/text.mp4").write_text("not a video")
    (root / "run/zero.mp4").touch()
    (root / "run/cut.mp4").write_bytes(clip.read_bytes()[:200])
    (root / "run/folder.mp4").mkdir()
    os.mkfifo(root / "run/pipe.mp4")
    return root


BAD = {"run/text.mp4", "run/zero.mp4", "run/cut.mp4", "run/folder.mp4", "run/pipe.mp4"}


def rows(manifest):
    return {video.path: video for video in manifest.videos}


def looked_at(monkeypatch):
    """The paths that are really read from here on, with workers=0."""
    paths = []
    real = probing.look

    def look(root, row, follow_links):
        paths.append(row.path)
        return real(root, row, follow_links)

    monkeypatch.setattr(probing, "look", look)
    return paths


# ---- the file


def test_index_and_read_back(data, clip):
    manifest = index(data)
    assert manifest == Manifest.read(data / "manifest.jsonl")
    assert manifest.classes == ("long jump", "run")
    assert sorted(os.listdir(data)) == ["long_jump", "manifest.jsonl", "run"]
    assert {manifest.videos[row].path for row in manifest.bad} == BAD
    assert [manifest.videos[row].path for row in manifest.usable] == ["long_jump/0.mp4", "run/0.mp4", "run/1.mp4"]
    assert manifest.usable.dtype == manifest.labels.dtype == np.int64
    assert manifest.labels.tolist() == [0, *[1] * 7]
    video = rows(manifest)["run/0.mp4"]
    of_row = {name: getattr(video, name) for name in ("path", "label", "size", "mtime_ns")}
    assert video == replace(probe(clip), **of_row)
    assert video.plan is not None
    assert (video.size, video.mtime_ns) == ((s := (data / "run/0.mp4").stat()).st_size, s.st_mtime_ns)
    assert not any(str(data) in reason for reason in manifest.bad.values())


def test_source_decodes(data, clip):
    manifest = index(data, workers=0)
    row = int(manifest.usable[1])
    source = manifest.source(row)
    assert source.plan == probe(clip).plan
    assert (decode_frames(source, [3, 0, 9]) == decode_frames(clip, [3, 0, 9])).all()
    bad = next(iter(manifest.bad))
    with pytest.raises(ValueError, match=r"run/\w+\.mp4: cannot be used"):
        manifest.source(bad)


def test_a_moved_folder_needs_no_new_index(data, tmp_path):
    manifest = index(data, workers=0)
    data.rename(tmp_path / "elsewhere")
    moved = Manifest.read(tmp_path / "elsewhere/manifest.jsonl")
    assert moved.root == tmp_path / "elsewhere"
    assert (moved.videos, moved.fingerprint) == (manifest.videos, manifest.fingerprint)
    assert decode_frames(moved.source(int(moved.usable[0])), [0]).shape == (1, 32, 48, 3)


def test_where_the_root_is(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "lists").mkdir()
    manifest = Manifest(tmp_path / "data", (), (Video("a.mp4"),))
    for place, stored in (
        ("data/m.jsonl", "."),
        ("m.jsonl", "data"),
        ("data/sub/m.jsonl", ".."),
        ("lists/m.jsonl", str(tmp_path / "data")),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        manifest.write(tmp_path / place)
        assert json.loads((tmp_path / place).read_text().split("\n")[0])["root"] == stored
        assert Manifest.read(tmp_path / place) == manifest
    (tmp_path / "link.jsonl").symlink_to("data/sub/m.jsonl")
    assert Manifest.read(tmp_path / "link.jsonl").root == tmp_path / "data"


def test_odd_names_survive(tmp_path, clip):
    names = [b"line\nend", b"tab\tq'\"", b"-x", b" y ", b"\xff\xfe", "д😀".encode(), b"z" * 251, b"%d", b"subfile,,:"]
    for name in names:
        shutil.copy(clip, os.fsencode(tmp_path) + b"/" + name + b".mp4")
    manifest = index(tmp_path)
    assert not manifest.bad
    again = Manifest.read(tmp_path / "manifest.jsonl")
    assert again == manifest
    assert {os.fsencode(video.path)[:-4] for video in again.videos} == set(names)
    shown = [again.name(row) for row in range(len(again))]
    assert all(name.isprintable() for name in shown)
    assert len(set(shown)) == len(names)
    assert all(decode_frames(again.source(row), [0]).shape[0] == 1 for row in range(len(again)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": "a.mp4", "label": 2}', "line 3: label 2 is not one of the 2 classes"),
        ('{"path": "a.mp4", "label": -1}', "line 3: label -1"),
        ('{"path": "../a.mp4"}', "line 3: ../a.mp4 leads out of the root"),
        ('{"path": "b/../../a.mp4"}', "line 3: .* leads out of the root"),
        ('{"path": "/a.mp4"}', "line 3: /a.mp4 leads out of the root"),
        ('{"path": 3}', "line 3: path is 3; str wanted"),
        ('{"path": "a.mp4", "label": "1"}', "line 3: label is '1'; int or null wanted"),
        ('{"path": "a.mp4", "label": true}', "line 3: label is True"),
        ('{"path": "a.mp4", "frames": "9"}', "line 3: frames is '9'; int wanted"),
        ('{"path": "a.mp4", "frames": -5}', "line 3: frames is -5; it must be at least 0"),
        ('{"path": "a.mp4", "offset": -1}', "line 3: offset is -1"),
        ('{"path": "a.mp4", "packed": 5}', "line 3: packed is 5"),
        ('{"path": "a.mp4", "duration": "a"}', "line 3: duration is 'a'"),
        ('{"path": "a.mp4", "what": 1}', "line 3: 'what' is not a field"),
        ('{"label": 1}', "line 3: .*path"),
        ('{"path": "a', "line 3"),
        ("[]", "line 3"),
    ],
)
def test_damaged_manifests(line, message, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"xclip_fast_manifest":2,"root":".","classes":["a","b"]}\n{"path":"ok.mp4"}\n' + line)
    manifest = Manifest.read(path)
    assert (len(manifest), manifest.usable.tolist()) == (2, [0])
    assert re.search(message.replace("line 3: ", "line 3 of the manifest is damaged: "), manifest.bad[1])
    with pytest.raises(ValueError, match="cannot be used: line 3"):
        manifest.source(1)


@pytest.mark.parametrize("text", ["", "hello", "[]", "{}", "\xff", '{"xclip_fast_manifest": 2, "root": 3}'])
def test_files_that_are_no_manifest(text, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"m\.jsonl"):
        Manifest.read(path)
    for version in (1, 3):
        path.write_text(json.dumps({"xclip_fast_manifest": version}))
        with pytest.raises(ValueError, match=rf"version {version}.*again with `xclip-fast index`"):
            Manifest.read(path)


def test_two_dots_in_a_name_are_no_way_out(tmp_path):
    manifest = Manifest(tmp_path, (), (Video("a..b/..c.mp4"),))
    manifest.write(tmp_path / "m.jsonl")
    assert Manifest.read(tmp_path / "m.jsonl") == manifest


def test_writing_leaves_the_old_file_if_it_fails(tmp_path):
    path = tmp_path / "m.jsonl"
    Manifest(tmp_path, (), (Video("a.mp4"),)).write(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        Manifest(tmp_path, (), (Video("a.mp4", codec=b"no text"),)).write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_fingerprint(tmp_path):
    videos = (Video("a.mp4", 0, size=1, mtime_ns=5, frames=3), Video("b.mp4", 1, size=2))
    manifest = Manifest(tmp_path, ("x", "y"), videos)
    same = [
        replace(manifest, root=tmp_path / "other"),
        manifest.with_errors({0: "broken"}),
        replace(manifest, videos=(replace(videos[0], mtime_ns=6, frames=4), videos[1])),
    ]
    assert {each.fingerprint for each in same} == {manifest.fingerprint}
    other = [
        replace(manifest, classes=("y", "x")),
        replace(manifest, videos=videos[::-1]),
        manifest.select([0]),
        replace(manifest, videos=(replace(videos[0], size=3), videos[1])),
        replace(manifest, videos=(replace(videos[0], label=1), videos[1])),
        replace(manifest, videos=(replace(videos[0], path="c.mp4"), videos[1])),
        replace(manifest, videos=(replace(videos[0], member="m"), videos[1])),
    ]
    assert len({each.fingerprint for each in (manifest, *other)}) == 1 + len(other)


def test_select_and_with_errors(tmp_path):
    manifest = Manifest(tmp_path, ("x",), tuple(Video(f"{n}.mp4", 0) for n in range(4)))
    assert [video.path for video in manifest.select(np.array([3, 1, 1])).videos] == ["3.mp4", "1.mp4", "1.mp4"]
    marked = manifest.with_errors({2: "two\nlines\x1b[31m"})
    assert marked.bad == {2: "two lines\\x1b[31m"}
    assert (marked.usable.tolist(), manifest.usable.tolist()) == ([0, 1, 3], [0, 1, 2, 3])


@pytest.mark.parametrize("seed", range(20))
def test_plans_survive_packing(seed):
    rng = np.random.default_rng(seed)
    frames, keys = int(rng.integers(1, 400)), int(rng.integers(1, 30))
    start = rng.integers(0, keys, frames).tolist()
    pts = np.sort(rng.integers(-(2**40), 2**40, frames)).tolist()
    keyframes = [(int(a), int(b)) for a, b in rng.integers(-(2**40), 2**40, (keys, 2))]
    plan = Plan(pts, start, keyframes)
    assert unpack_plan(pack_plan(plan)) == plan


def test_a_regular_plan_is_short():
    starts = [i // 12 for i in range(300)]
    plan = Plan([512 * i for i in range(300)], starts, [(512 * 12 * k, 512 * 12 * k - 1024) for k in range(25)])
    assert len(pack_plan(plan)) < 200
    assert unpack_plan(pack_plan(plan)) == plan


@pytest.mark.parametrize("packed", ["", "?", "AAAA", pack_plan(Plan([1, 2], [0, 0], [(1, 1)]))[:-4]])
def test_damaged_plans(packed):
    with pytest.raises(ValueError, match="plan in the manifest is damaged"):
        unpack_plan(packed)


# ---- index


def test_only_what_is_new_or_changed_is_read(data, clip, monkeypatch):
    first = index(data, workers=0)
    paths = looked_at(monkeypatch)
    assert index(data, workers=0) == first
    assert paths == []
    shutil.copy(clip, data / "run/2.mp4")
    os.utime(data / "run/0.mp4", ns=(1, 1))
    (data / "run/text.mp4").write_text("another text")
    (data / "long_jump/0.mp4").unlink()
    shutil.copy(clip, data / "long_jump/1.mp4")
    second = index(data, workers=0)
    assert sorted(paths) == ["long_jump/1.mp4", "run/0.mp4", "run/2.mp4", "run/text.mp4"]
    assert "long_jump/0.mp4" not in rows(second)
    assert rows(second)["run/0.mp4"].mtime_ns == 1


def test_facts_of_another_manifest(data, tmp_path, monkeypatch):
    index(data, workers=0)
    paths = looked_at(monkeypatch)
    listed = tmp_path / "few.txt"
    listed.write_text("run/0.mp4 2\nno/such.mp4 0\nrun/0.mp4 1\n")
    manifest = index(listed, root=data, labels=["a", "b", "c"], reuse=[data / "manifest.jsonl"], workers=0)
    assert paths == ["no/such.mp4"]
    assert manifest.labels.tolist() == [2, 0, 1]
    assert manifest.bad == {1: "no such file"}
    assert manifest == Manifest.read(tmp_path / "few.txt.manifest.jsonl")
    (data / "no").mkdir()
    shutil.copy(data / "run/0.mp4", data / "no/such.mp4")  # it has come since
    assert not index(listed, root=data, labels=["a", "b", "c"], workers=0).bad


def test_killed_and_run_again(data, monkeypatch):
    """A run that is killed outright keeps what it knew, and leaves no process; a torn last line is passed over."""
    script = f"""
        import multiprocessing, os, signal
        from xclip_fast.data.manifest import index
        def kill(done, total):
            if done == 4:
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        index({str(data)!r}, workers=2, progress=kill)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, stdout=subprocess.PIPE)
    pids = [int(pid) for pid in run.stdout.split()]
    assert (run.returncode, len(pids)) == (-signal.SIGKILL, 2)
    until = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until, "a reader is still there"
        time.sleep(0.1)
    partial = data / "manifest.jsonl.partial"
    assert not (data / "manifest.jsonl").exists()
    with partial.open("a") as file:
        file.write('{"path":"run/1.mp4","fra')
    paths = looked_at(monkeypatch)
    done = []
    manifest = index(data, workers=0, progress=lambda *counts: done.append(counts))
    assert len(paths) == 4
    assert done == [(n, 8) for n in range(4, 9)]
    assert {manifest.videos[row].path for row in manifest.bad} == BAD
    assert not partial.exists()
    (data / "manifest.jsonl").unlink()
    assert index(data, workers=0) == manifest


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_reader_that_dies_or_hangs_costs_one_row(data, monkeypatch):
    real = probing.probe

    def nasty(source):
        if source.path.endswith("run/0.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        if source.path.endswith("text.mp4"):
            time.sleep(60)
        if source.path.endswith("long_jump/0.mp4"):
            raise ZeroDivisionError("odd file")
        return real(source)

    monkeypatch.setattr(probing, "probe", nasty)
    began = time.monotonic()
    manifest = index(data, workers=2, timeout=1.5)
    assert time.monotonic() - began < 20
    found = {path: video.error for path, video in rows(manifest).items()}
    assert "died (exit status -9)" in found["run/0.mp4"]
    assert "took longer than 1.5 seconds" in found["run/text.mp4"]
    assert found["long_jump/0.mp4"] == "ZeroDivisionError: odd file"
    assert found["run/1.mp4"] is None
    monkeypatch.undo()  # the next time it goes well: those two are looked at again
    again = {path: video.error for path, video in rows(index(data, workers=0)).items()}
    assert again["run/0.mp4"] is None
    assert "cannot be opened" in again["run/text.mp4"]


def test_a_file_that_changes_while_it_is_read(data, monkeypatch):
    real = probing.probe

    def growing(source):
        info = real(source)
        os.utime(source.path, ns=(7, 7))
        return info

    monkeypatch.setattr(probing, "probe", growing)
    manifest = index(data, workers=0)
    assert "changed while it was read" in rows(manifest)["run/0.mp4"].error
    monkeypatch.undo()
    assert rows(index(data, workers=0))["run/0.mp4"].error is None


def test_links_that_lead_out(data, tmp_path, clip):
    outside = tmp_path / "outside"
    (outside / "jump").mkdir(parents=True)
    shutil.copy(clip, outside / "jump/x.mp4")
    (data / "run/out.mp4").symlink_to(outside / "jump/x.mp4")
    (data / "run/in.mp4").symlink_to(data / "long_jump/0.mp4")
    (data / "run/gone.mp4").symlink_to(outside / "nothing.mp4")
    (data / "run/self.mp4").symlink_to("self.mp4")
    (data / "jump").symlink_to(outside / "jump")
    manifest = index(data)
    found = {path: video.error for path, video in rows(manifest).items() if path not in BAD}
    assert "leads out of the root folder" in found["run/out.mp4"]
    assert found["run/in.mp4"] is None
    assert found["run/gone.mp4"] == "no such file"
    assert "symbolic links" in found["run/self.mp4"]
    assert "follow_links=True" in found["jump"]
    followed = rows(index(data, follow_links=True, workers=0))
    assert followed["run/out.mp4"].error is followed["jump/x.mp4"].error is None
    # what was known with links followed does not hold without
    assert "leads out of the root folder" in rows(index(data, workers=0))["run/out.mp4"].error
    listed = tmp_path / "list.txt"
    listed.write_text("jump/x.mp4\nrun/../jump/x.mp4\n")
    assert all("leads out" in reason for reason in index(listed, root=data, workers=0).bad.values())
    assert len(index(listed, root=data, workers=0).bad) == 2


def test_tar_members_are_read_in_place(tmp_path, clip, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    (tmp_path / "run.txt").write_text("run")
    (tmp_path / "bad.mp4").write_text("not a video")
    for number in range(2):
        with tarfile.open(folder / f"s-{number}.tar", "w") as tar:
            tar.add(clip, f"../{number}.mp4")
            tar.add(tmp_path / "run.txt", f"../{number}.txt")
            tar.add(tmp_path / "bad.mp4", "bad.mp4")
    manifest = index(folder / "s-{0..2}.tar")
    assert manifest == Manifest.read(folder / "s.manifest.jsonl")
    assert manifest.usable.tolist() == [0, 2]
    assert manifest.name(2) == "s-1.tar:../1.mp4"
    assert manifest.bad[1].startswith("cannot be opened")
    assert "No such file" in manifest.bad[4]
    assert (decode_frames(manifest.source(2), [9, 2]) == decode_frames(clip, [9, 2])).all()
    assert sorted(os.listdir(folder)) == ["s-0.tar", "s-1.tar", "s.manifest.jsonl"]
    paths = looked_at(monkeypatch)
    assert index(folder / "s-{0..2}.tar", workers=0) == manifest
    assert paths == []
    os.utime(folder / "s-1.tar", ns=(1, 1))
    index(folder / "s-{0..2}.tar", workers=0)
    assert paths == ["s-1.tar", "s-1.tar"]


def test_what_is_in_the_way(data):
    precious = data / "precious.csv"
    precious.write_text("id,name\n")
    with pytest.raises(ValueError, match="would overwrite it"):
        index(data, out=precious, workers=0)
    assert precious.read_text() == "id,name\n"
    with pytest.raises(FileNotFoundError):
        index(data, out=data / "no/where.jsonl", workers=0)
    with pytest.raises(ValueError, match="workers is -1"):
        index(data, workers=-1)


def test_splits_have_manifests_of_their_own(tmp_path):
    listed = tmp_path / "k.csv"
    listed.write_text("youtube_id,time_start,time_end,split\na,0,1,train\nb,0,1,val\n")
    index(listed, split="train", workers=0)
    index(listed, split="val", workers=0)
    assert sorted(os.listdir(tmp_path)) == ["k.csv", "k.csv.train.manifest.jsonl", "k.csv.val.manifest.jsonl"]


def test_summary(data):
    text = summary(index(data, workers=0, labels=["run", "long_jump", "fly\n"]))
    assert "8 videos, 3 classes" in text
    assert "3 usable: 30 frames, 0 h 0 min 1 s" in text
    assert "codecs: 3 x h264 yuv420p\n" in text
    assert "classes without a usable video: 1 (fly\\n)" in text
    assert "5 cannot be used" in text
    assert "1 x is empty (zero bytes): run/zero.mp4" in text
    assert "a GPU with NVIDIA DALI can decode 0.0%; the CPU decodes the rest (size 100.0%)" in text  # too small
    many = Manifest(data, (), (Video("a", frames=1, codec="mjpeg"), Video("b", frames=1, codec="h264")) * 6000)
    assert re.search(
        r"about 0.0%; the CPU decodes the rest \((codec|pixel format) 5\d\.\d%, (codec|pixel format) 4\d\.\d%\)",
        summary(many),
    )


def test_no_room_for_the_manifest(data, file_limit):
    """The error named no file."""
    file_limit(300)
    with pytest.raises(OSError, match=r"partial: could not be written, .*What was read before is kept; make room and"):
        index(data, workers=0)


def test_a_place_that_cannot_be_written_is_said_before_the_work(data, tmp_path, monkeypatch):
    paths = looked_at(monkeypatch)
    for out in ("/proc/manifest.jsonl", tmp_path / "none" / "m.jsonl"):
        with pytest.raises(OSError, match=r"cannot be written here \(.*\); choose another file with --out"):
            index(data, out, workers=0)
    assert paths == []
    assert not list(tmp_path.glob("**/*.partial"))


def test_leftovers_of_a_killed_index(data):
    names = (".manifest.jsonl.part", ".manifest.jsonl.writing", ".x.part")
    for name in (names[0], names[2]):
        (data / name).mkdir()
        (data / name / "manifest.jsonl").write_text("half")
    (data / names[1]).touch()
    index(data, workers=0)
    assert [(data / name).exists() for name in names] == [False, False, True]


def test_a_damaged_line_is_a_video_that_cannot_be_used(data, caplog):
    """The others are used; index looks at it again. Before, the whole manifest was refused."""
    whole = index(data, workers=0)
    path = data / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for number, damage in (
        (2, lambda line: line[:-9] + b"\n"),
        (6, lambda line: b"\0" * 40 + b"\n"),
        (7, lambda line: line.replace(b'"label":1', b'"label":7')),
        (8, lambda line: b"[" * 100_000 + b"\n"),
    ):
        lines[number - 1] = damage(lines[number - 1])
    path.write_bytes(b"".join(lines) + b"\n")
    found = Manifest.read(path)
    assert len(found) == len(whole)
    damaged = {row for row, why in found.bad.items() if "of the manifest is damaged" in why}
    assert damaged == {0, 4, 5, 6}
    assert found.bad[5] == "line 7 of the manifest is damaged: label 7 is not one of the 2 classes"
    assert found.videos[5].path == whole.videos[5].path
    assert all(found.videos[row] == whole.videos[row] for row in range(len(whole)) if row not in damaged)
    assert f"{path}, line 2: " in caplog.text
    assert f"4 of {len(whole)} videos are left out. Index again" in caplog.text
    assert index(data, workers=0) == whole == Manifest.read(path)
    path.write_bytes(lines[0] + lines[1])
    with pytest.raises(ValueError, match="line 2: "):
        Manifest.read(path)
