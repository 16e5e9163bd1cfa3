"""Files that are read from anybody and folders that are written whole: shared by the rooms.

Reading: a file from elsewhere may be a pipe, a device, nested without end, or small on disk and endless in memory. The
functions here refuse such files with a ``ValueError`` that names them. Writing: ``replaced`` replaces a file at once,
``staged`` a folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("xclip_fast")

TEXT_BYTES = 64 << 20  # the largest text or JSON file that is read whole; a configuration is far smaller
_UNFINISHED = ".unfinished"  # in a staging folder while its content is being written
_LONG_NAME = 200  # bytes; a longer one has no room for what is added to it
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2


def require_regular(path: str | os.PathLike[str]) -> int:
    """The size in bytes of a regular file.

    Raises:
        ValueError: if it is a pipe, a device, a socket or a folder: reading those can wait or go on forever.
        OSError: if it cannot be looked at.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISDIR, "a folder"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(found.st_mode)), "a device")
        raise ValueError(f"{os.fspath(path)}: is {kind}; a regular file is wanted. Copy its content into a file first")
    return found.st_size


@contextlib.contextmanager
def errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the path into an OSError of the block that names no file, as one of a failed read."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: if the file is not regular, larger than ``TEXT_BYTES``, or not UTF-8. The message begins with the
            path.
        OSError: if it cannot be read.
    """
    if (size := require_regular(path)) > TEXT_BYTES:
        raise ValueError(f"{os.fspath(path)}: has {size} bytes; at most {TEXT_BYTES} are read as text")
    try:
        with errors_name(path):
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{os.fspath(path)}: is not a text in UTF-8: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, which raises ValueError also for a text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Errors as of ``read_json``."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: is not JSON: {error}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: as ``read_text``, or if the file is not JSON, is nested too deeply, or holds something else than an
            object. The message begins with the path.
        OSError: if it cannot be read.
    """
    values = load_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{os.fspath(path)}: a JSON object is wanted, {type(values).__name__} found")
    return values


def write_text(path: str | os.PathLike[str], text: str, *, errors: str = "strict") -> None:
    """Write a text file, whole or not at all (``replaced``)."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8", errors=errors, newline="")


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file to, on the same disk as ``path``. When the block ends, that file replaces ``path``.

    If the block writes no file, ``path`` stays as it is. A kill at any moment leaves the old file or the new one. What
    it leaves beside them, the next call with the same ``path`` removes.

    Raises:
        FileExistsError: if another process is writing to ``path``.
        OSError: if the folder is missing or cannot be written, before the block runs; if the disk is full, which the
            message says.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    name = path.name
    if len(os.fsencode(name)) > _LONG_NAME:
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    scratch = path.with_name(f".{name}.part")  # a folder: libraries put files of their own beside theirs
    with full_disk(path), locked(path.with_name(f".{name}.writing"), path):
        remove(scratch)
        scratch.mkdir()
        try:
            yield scratch / path.name
            if (scratch / path.name).exists():
                sync(scratch / path.name)
                os.replace(scratch / path.name, path)
                sync(path.parent)
        finally:
            remove(scratch)


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str], owned: Collection[str], last: str) -> Iterator[Path]:
    """An empty folder to write into. When the block ends, its content replaces that of ``folder`` in one step.

    A kill at any moment leaves the old content or the new content, never some of each. Files of other names in
    ``folder`` stay. The next run with the same ``folder`` removes the leftovers of a killed run. Where the file
    system cannot exchange two folders (a mount point, NFS), ``last`` is removed first and written last instead.

    Args:
        folder: made if it does not exist, with its parents.
        owned: every name that the block may write. Those in ``folder`` that the block does not write are removed.
        last: the owned file without which ``folder`` counts as incomplete.

    Raises:
        FileExistsError: if another process is writing to ``folder``.
        OSError: if ``folder`` cannot be written, before the block runs; if the disk is full, which the message says.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; a folder is wanted")
    with full_disk(folder, ". What was there before is unchanged"):
        target.parent.mkdir(parents=True, exist_ok=True)
        home = target.parent if _beside(target) else target
        part = home / f".{target.name}.part"
        with locked(home / f".{target.name}.writing", folder):
            if part.exists():
                _settle(part, target, owned)
            part.mkdir()
            (part / _UNFINISHED).touch()
            try:
                yield part
                (part / _UNFINISHED).unlink()
                _replace(part, target, owned, last)
            finally:
                if part.exists():
                    _settle(part, target, owned)


@contextlib.contextmanager
def full_disk(path: str | os.PathLike[str], more: str = "") -> Iterator[None]:
    """While the block lasts, a disk or a quota that is full is an OSError that says so, with ``more``.

    So is a file that is too large for the disk or the limits of this process.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # LanceDB has no error of its own for it
        large = os.strerror(errno.EFBIG) in str(error)
        if large or is_full(error):
            why = "a file would be larger than the disk or `ulimit -f` allows" if large else "no space left on the disk"
            full = OSError(f"{path}: could not be written, {why}{more}; make room and start again")
            full.errno = errno.EFBIG if large else errno.ENOSPC  # a smaller file may still fit
            raise full from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota that is full is the error, by its number or its text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _beside(target: Path) -> bool:
    """Whether a folder can be staged beside the target: a writable parent on the same file system.

    Not beside the current folder: a shell would stay in the one that is removed.
    """
    if not target.exists():
        return True
    same = target.stat().st_dev == target.parent.stat().st_dev
    current = os.path.isdir(os.curdir) and target.samefile(os.curdir)  # a removed one may raise
    return same and not current and os.access(target.parent, os.W_OK | os.X_OK)


@contextlib.contextmanager
def locked(path: Path, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock file ``path`` while the block lasts. The lock ends with this process, even if it is killed.

    Systems and file systems without such locks (Windows, some network file systems) lock nothing.

    Raises:
        FileExistsError: if another process holds it. The message names ``folder``, the process and its machine.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two writers are not kept apart
        yield
        return
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:  # it names our hidden file
            raise OSError(error.errno, error.strerror, os.fspath(folder)) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace") or "just started"
            os.close(handle)
            raise FileExistsError(
                f"{folder}: another process ({owner}) is writing to it; wait until it ends, or choose another place"
            ) from None
        except OSError as error:
            log.warning("%s is not locked against other writers: %s", folder, error)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # the process before removed it between our two calls
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


def _replace(part: Path, target: Path, owned: Collection[str], last: str) -> None:
    sync(part)
    if not target.exists():
        part.rename(target)
        sync(target.parent)
        return
    if part.parent != target:
        for entry in list(os.scandir(target)):  # the user's own files are never away
            if entry.name not in owned and not entry.is_dir(follow_symlinks=False):
                _link(Path(entry.path), part / entry.name)
        part.chmod(stat.S_IMODE(target.stat().st_mode))
        if exchange(part, target):
            sync(target.parent)
            return
    for name in [last, *owned]:
        if name in owned:
            remove(target / name)
    for entry in sorted(os.scandir(part), key=lambda entry: entry.name == last):
        if entry.name in owned:
            os.replace(entry.path, target / entry.name)
    sync(target)


def _settle(part: Path, target: Path, owned: Collection[str]) -> None:
    """Remove a staging folder, or the old content after an exchange. What is not ours goes back to the target."""
    unfinished = (part / _UNFINISHED).exists()  # then all is ours, also what a library was about to rename
    for entry in sorted(os.scandir(part), key=lambda entry: entry.name == _UNFINISHED):
        if unfinished or entry.name in owned or os.path.lexists(target / entry.name) or not target.exists():
            remove(Path(entry.path))
        else:
            os.rename(entry.path, target / entry.name)
    part.rmdir()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step. Returns False if one is missing, or the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    here = -100  # AT_FDCWD
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), _EXCHANGE) == 0


def sync(path: Path) -> None:
    """Makes a file, or the renames in a folder, survive a loss of power, on POSIX systems."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
