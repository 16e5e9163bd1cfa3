"""Folders are replaced in one step, and files that are no plain files are refused."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from xclip_fast import files
from xclip_fast.data.manifest import Manifest
from xclip_fast.evaluate.sample_lists import read_classes, read_draws

OWNED = ("weights", "config", "note")


def write(folder, version, names=OWNED[:2]):
    with files.staged(folder, OWNED, "weights") as part:
        for name in names:
            (part / name).write_text(version)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_folder_is_made_and_replaced_and_other_files_stay(tmp_path):
    folder = tmp_path / "a" / "b"
    write(folder, "1", OWNED)
    (folder / "mine").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep").write_text("deep")
    write(folder, "2")  # without a note: the old one belongs to the old content
    assert content(folder) == {"weights": "2", "config": "2", "mine": "mine"}
    assert (folder / "sub" / "deep").read_text() == "deep"
    assert os.listdir(folder.parent) == ["b"]


def test_the_current_folder_stays_the_current_folder(tmp_path, monkeypatch):
    """A shell in it would be left in the folder that the exchange removes."""
    monkeypatch.chdir(tmp_path)
    write("../" + tmp_path.name, "1")
    write(".", "2")
    assert os.path.samefile(".", tmp_path)
    assert content(tmp_path) == {"weights": "2", "config": "2"}
    assert len(os.listdir(tmp_path)) == 2


def test_a_removed_current_folder(tmp_path, monkeypatch):
    """On NFS and macOS it has no status. Linux keeps one on a local disk."""
    monkeypatch.setattr(os, "curdir", str(tmp_path / "removed"))
    for version in "12":
        write(tmp_path / "a", version)
    assert content(tmp_path / "a") == {"weights": "2", "config": "2"}


def test_a_failed_block_changes_nothing(tmp_path):
    folder = tmp_path / "a"
    write(folder, "1")
    with pytest.raises(AttributeError), files.staged(folder, OWNED, "weights") as part:
        (part / "weights").write_text("2").no_such_thing()
    assert content(folder) == {"weights": "1", "config": "1"}
    with (
        pytest.raises(OSError, match=f"{folder}: could not be written, no space left"),
        files.staged(folder, OWNED, ""),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("exchange", [True, False])
def test_where_folders_cannot_be_exchanged(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "exchange", lambda a, b: False)
    monkeypatch.setattr(files, "_beside", lambda target: exchange)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    for version in "12":
        write(folder, version, OWNED if version == "1" else OWNED[:2])
    assert content(folder) == {"weights": "2", "config": "2", "mine": "mine"}


def test_two_writers_do_not_mix(tmp_path):
    with files.staged(tmp_path / "a", OWNED, "weights"), pytest.raises(FileExistsError, match="another process"):
        write(tmp_path / "a", "2")
    write(tmp_path / "a", "3")
    assert os.listdir(tmp_path) == ["a"]


KILLED = """
    import os, signal, sys
    from xclip_fast import files
    left = int(sys.argv[2])
    def dying(name):
        real = getattr(os, name)
        def call(*args, **kwargs):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, name, call)
    for name in ("mkdir", "link", "rename", "replace", "unlink", "rmdir", "open", "fsync", "chmod"):
        dying(name)
    exchange = files.exchange
    def exchanged(a, b):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return exchange(a, b)
    files.exchange = exchanged
    for version in "23":
        with files.staged(sys.argv[1], ("weights", "config", "note"), "weights") as part:
            (part / "config").write_text(version)
            (part / "weights").write_text(version)
    print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step on Linux")
def test_killed_at_every_file_event(tmp_path):
    """Old or new, never some of each; the user's files are never lost; the next run leaves nothing behind."""
    code, moment, seen = textwrap.dedent(KILLED), 0, set()
    while True:
        moment += 1
        folder = tmp_path / str(moment) / "a"
        write(folder, "1", OWNED)
        (folder / "mine").write_text("mine")
        (folder / "sub").mkdir()
        (folder / "sub" / "deep").write_text("deep")
        ran = subprocess.run([sys.executable, "-S", "-c", PREPARE + code, folder, str(moment)], capture_output=True)
        found = content(folder)
        assert found.pop("mine") == "mine"
        assert len(set(found.values())) == 1, (moment, found)
        seen |= set(found.values())
        if ran.returncode == 0:
            break
        assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
        write(folder, "4")
        assert content(folder) == {"weights": "4", "config": "4", "mine": "mine"}
        assert (folder / "sub" / "deep").read_text() == "deep"
        assert os.listdir(folder.parent) == ["a"]
    assert moment > 20
    assert seen == {"1", "2", "3"}


# The module alone: importing the package would take its seconds each time.
PREPARE = textwrap.dedent(f"""
    import importlib.util, sys, types
    package = types.ModuleType("xclip_fast")
    sys.modules["xclip_fast"] = package
    spec = importlib.util.spec_from_file_location("xclip_fast.files", {files.__file__!r})
    package.files = importlib.util.module_from_spec(spec)
    sys.modules["xclip_fast.files"] = package.files
    spec.loader.exec_module(package.files)
""")


def test_no_room_for_a_lock(tmp_path, file_limit):
    """The lock file stayed."""
    file_limit(0)
    with pytest.raises(OSError, match=r"x\.json: could not be written, a file would be larger than the disk or"):
        files.write_text(tmp_path / "x.json", "1")
    assert os.listdir(tmp_path) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    files.write_text(path, "1\n")
    (tmp_path / ".x.json.part").mkdir()
    (tmp_path / ".x.json.part" / "x.json").write_text("of a killed run")
    (tmp_path / ".x.json.writing").touch()
    files.write_text(path, "2\n")
    assert (path.read_text(), os.listdir(tmp_path)) == ("2\n", ["x.json"])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"x\.json: could not be written, no space left"), files.replaced(path):
        raise full
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/no/x\.json: there is no folder {tmp_path}/no; make it"):
        files.write_text(tmp_path / "no" / "x.json", "3\n")
    with pytest.raises(OSError, match=r"'/proc/x\.json'"):  # and not a hidden file
        files.write_text("/proc/x.json", "3\n")
    with files.replaced(path), pytest.raises(FileExistsError, match="another process"):
        files.write_text(path, "4\n")
    assert (path.read_text(), os.listdir(tmp_path)) == ("2\n", ["x.json"])


def test_names_as_long_as_they_may_be(tmp_path):
    for name in ("z" * 254 + "a", "z" * 254 + "b", "д" * 127):
        with files.replaced(tmp_path / name) as part, files.replaced(tmp_path / f"{name[:-1]}c") as other:
            part.write_text(name)
            other.write_text("c")
        assert (tmp_path / name).read_text() == name
    assert len(list(tmp_path.iterdir())) == 5


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"is {kind}"):
            files.read_json(path)
        for read in (Manifest.read, read_classes, read_draws):
            with pytest.raises(ValueError, match=f"is {kind}|is a folder"):
                read([path] if read is read_draws else path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "nested too deeply"), ("[]", "list found"), ("{", "is not JSON"), ("\xff", "not a text in UTF-8")],
)
def test_json_that_is_none(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        files.read_json(path)
    assert str(path) in str(error.value)
