"""What names on a command line mean, and remote files with their limits."""

import io
import os
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from xclip_fast.data.decode.decoder import VideoError
from xclip_fast.data.decode.source import ReadError
from xclip_fast.data.decode.video import Video
from xclip_fast.data.inputs import find_videos
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.data.remote import Limits, describe, is_remote, local_copy


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("v/b.mp4", "v/a.MKV", "v/in/c.webm", "v/.hidden.mp4", "v/.git/d.mp4", "v/notes.txt", "v/odd[1].mp4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path


def test_folders_globs_and_files(folder):
    found = find_videos(["v", "v/b.mp4", "missing.mp4"])
    assert found.paths == ["v/a.MKV", "v/b.mp4", "v/in/c.webm", "v/odd[1].mp4", "v/b.mp4", "missing.mp4"]
    assert (found.folders, found.empty) == (["v"], [])
    assert find_videos("v/**/*.webm").paths == ["v/in/c.webm"]
    assert find_videos("v/b*.m*").paths == ["v/b.mp4"]
    assert find_videos("v/odd[1].mp4").paths == ["v/odd[1].mp4"]  # a file of that name, so no glob
    assert find_videos(folder / "v" / "b.mp4").paths == [str(folder / "v" / "b.mp4")]
    (folder / "none").mkdir()
    nothing = find_videos(["none", "x*.mp4"])
    assert nothing.paths == []
    assert nothing.empty == ["none: no video file in this folder", "x*.mp4: no file matches"]
    with pytest.raises(ValueError, match="a name is empty"):
        find_videos([""])


def test_a_folder_that_cannot_be_listed_does_not_stop_the_others(folder, unlistable):
    (folder / "locked").mkdir()
    unlistable(folder / "locked")
    unlistable(folder / "v" / "in")
    found = find_videos(["locked", "v"])
    assert found.paths == ["v/a.MKV", "v/b.mp4", "v/odd[1].mp4"]
    assert found.empty == [
        "locked: no video file in this folder, which cannot be listed (Permission denied)",
        "v/in: is a folder that cannot be listed (Permission denied)",
    ]
    assert found.unlisted == ["locked", "v/in"]
    whole = "v/in: is a folder that cannot be listed (Permission denied)"
    for pattern, paths in (("v/**/*.m*", ["v/b.mp4", "v/odd[1].mp4"]), ("v/*/*", []), ("v/**", None)):
        globbed = find_videos(pattern)
        assert globbed.empty[0] == whole
        assert paths is None or sorted(globbed.paths) == paths
    assert find_videos("v/*.mp4").empty == []  # it does not look into v/in
    unlistable(folder)
    assert find_videos("*.mp4").empty[0] == ".: is a folder that cannot be listed (Permission denied)"


def test_lists_and_standard_input(folder, monkeypatch):
    (folder / "v" / "list.txt").write_text("b.mp4\r\n\nin/c.webm\nhttps://host/d.mp4\n/abs/e.mp4\n")
    assert find_videos("v/list.txt").paths == ["v/b.mp4", "v/in/c.webm", "https://host/d.mp4", "/abs/e.mp4"]
    for data in (b"a b.mp4\nc.mp4\r\n\n", b"a b.mp4\0c.mp4\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert find_videos("-").paths == ["a b.mp4", "c.mp4"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"new\nline.mp4\0")))
    assert find_videos("-").paths == ["new\nline.mp4"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert find_videos("-").empty == ["-: no paths on standard input"]


def test_a_manifest(tmp_path):
    for label in CLASSES[:2]:
        (tmp_path / "data" / label).mkdir(parents=True)
        write_clip(tmp_path / "data" / label / "1.mp4", render(label, 0, frames=3, size=(32, 32)))
    index(tmp_path / "data", workers=0)
    found = find_videos(tmp_path / "data" / "manifest.jsonl").paths
    assert found == sorted(str(tmp_path / "data" / label / "1.mp4") for label in CLASSES[:2])


def test_a_manifest_of_tar_files(tmp_path):
    """Its videos were left out without a word."""
    videos = (Video("a.mp4", frames=1), *(Video("a.tar", member=f"{n}.mp4", offset=512, frames=1) for n in range(2)))
    Manifest(tmp_path, (), videos).write(tmp_path / "m.jsonl")
    found = find_videos(tmp_path / "m.jsonl")
    assert found.paths == [str(tmp_path / "a.mp4")]
    assert found.empty[0].startswith(f"{tmp_path}/m.jsonl: 2 of its videos lie in tar files; unpack them")


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("https://a/b.mp4", True),
        ("s3://b/c", True),
        ("a/b.mp4", False),
        ("/a", False),
        ("C://x", False),
        ("a:b", False),
    ],
)
def test_what_is_an_address(name, remote):
    assert is_remote(name) is remote


def test_a_remote_folder(monkeypatch, tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'xclip-fast[remote]'")
    memory = fsspec.filesystem("memory")
    for name in ("/bucket/v/a.mp4", "/bucket/v/in/b.mkv", "/bucket/v/readme.md"):
        memory.pipe(name, b"content")
    try:
        found = find_videos(["memory://bucket/v/", "memory://bucket/v/a.mp4"])
        assert found.paths == ["memory:///bucket/v/a.mp4", "memory:///bucket/v/in/b.mkv", "memory://bucket/v/a.mp4"]
        assert find_videos("memory://bucket/*/a*").paths == ["memory:///bucket/v/a.mp4"]
        assert describe("memory://bucket/v/a.mp4")[0] == 7
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with local_copy("memory://bucket/v/a.mp4") as path:
            assert Path(path).read_bytes() == b"content"
            assert "bucket" not in path
            assert (sys.platform == "linux") == (not any(tmp_path.iterdir()))  # then a kill leaves nothing
        assert not os.path.exists(path)
        with pytest.raises(VideoError, match="limit of 6 bytes"), local_copy("memory://bucket/v/a.mp4", Limits(6)):
            pass
        with (
            pytest.raises(VideoError, match=r"memory://bucket/x\.mp4: no such file"),
            local_copy("memory://bucket/x.mp4"),
        ):
            pass
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "local:///etc/passwd"])
def test_an_address_does_not_read_local_files(address):
    pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'xclip-fast[remote]'")
    with pytest.raises((VideoError, ValueError), match="not a remote file"), local_copy(address):
        pass


class Server(SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/slow"):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x" * 1000)
                    time.sleep(0.05)
            except OSError:
                pass  # the client gave up
            return
        super().do_GET()

    def log_message(self, *given):
        pass


@pytest.fixture
def web(tmp_path):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'xclip-fast[remote]'")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_file_on_a_web_server(web, tmp_path):
    clip = tmp_path / "clip.mp4"
    write_clip(clip, render("growing", 0, frames=12, size=(48, 64)))
    from xclip_fast.inference.batches import Reading

    reading = Reading(3, 32, limits=Limits(size=clip.stat().st_size, seconds=20))
    (remote,) = reading.windows(f"{web}/clip.mp4?token=secret")
    (local,) = reading.windows(str(clip))
    assert remote.frames.equal(local.frames)
    assert describe(f"{web}/clip.mp4")[0] == clip.stat().st_size
    with pytest.raises(ValueError, match="no such file"):
        next(reading.windows(f"{web}/gone.mp4"))
    with pytest.raises(ReadError, match=r"http://127.0.0.1:1/a.mp4: cannot be read \(Cannot connect"):
        describe("http://127.0.0.1:1/a.mp4?token=secret")
    with (
        pytest.raises(VideoError, match="took longer than") as error,
        local_copy(f"{web}/slow.mp4?token=secret", Limits(seconds=0.5)),
    ):
        pass
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be listed"):
        find_videos(f"{web}/videos/")
