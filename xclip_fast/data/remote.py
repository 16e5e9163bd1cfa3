"""Remote videos, through fsspec: `https://`, `s3://`, `gs://` and its other schemes.

A remote file is copied to a temporary file while it is read. On Linux that file has no name: the system removes it even
if this process is killed. The name on the server never becomes a path on this machine.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .decode.source import ReadError, VideoError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Limits:
    """Limits for copying one remote file: `size` in bytes, `seconds` in all."""

    size: int = 2 << 30
    seconds: float = 600.0


def is_remote(path: str) -> bool:
    """Whether a name is a URL, such as s3://bucket/key, and not a path."""
    return _SCHEME.match(path) is not None


def remote_files(address: str) -> list[str] | None:
    """The files in a remote folder (with a final "/") or of a glob, sorted; None for the URL of one file.

    Raises ValueError if the scheme cannot list, and VideoError if the server refuses.
    """
    scheme = address.partition("://")[0].lower()
    web = scheme in ("http", "https")  # "?" is part of a web URL, and web folders cannot be listed
    is_glob = not web and any(sign in address for sign in "*?[")
    if not is_glob and not address.endswith("/"):
        return None
    if web:
        raise ValueError(f"{_shown(address)}: a folder of a web server cannot be listed; give the URLs of the files")
    with _errors(address):
        filesystem, path = _open(address)
        found = filesystem.glob(path) if is_glob else filesystem.find(path)
    return sorted(filesystem.unstrip_protocol(each) for each in found)


def describe(address: str) -> tuple[int, str]:
    """Size in bytes (0 if unknown), and a stamp that changes with the file. Raises VideoError."""
    with _errors(address):
        filesystem, path = _open(address)
        info = filesystem.info(path)
    stamp = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "md5Hash") if info.get(key)), "")
    return int(info.get("size") or 0), str(stamp)


@contextlib.contextmanager
def local_copy(address: str, limits: Limits | None = None) -> Iterator[str]:
    """A path of a temporary copy, for this process and this block. Raises VideoError, also beyond a limit."""
    limits = limits or Limits()
    end = time.monotonic() + limits.seconds
    nameless = sys.platform == "linux"
    with tempfile.TemporaryFile() if nameless else tempfile.NamedTemporaryFile(prefix="xclip-fast-") as copy:
        with _errors(address):
            filesystem, path = _open(address)
            with filesystem.open(path, "rb", block_size=_CHUNK, cache_type="readahead") as stream:
                while chunk := stream.read(_CHUNK):
                    copy.write(chunk)
                    if copy.tell() > limits.size:
                        raise ReadError(
                            f"{_shown(address)}: is larger than the limit of {limits.size:,} bytes; raise --max-bytes"
                        )
                    if time.monotonic() > end:
                        raise ReadError(
                            f"{_shown(address)}: took longer than {limits.seconds:g} seconds; raise --max-seconds"
                        )
                copy.flush()
        yield f"/proc/self/fd/{copy.fileno()}" if nameless else copy.name


@contextlib.contextmanager
def local_path(path: str, limits: Limits | None = None) -> Iterator[str]:
    """A path on this machine for a path or a URL: itself, or a ``local_copy``. VideoErrors name the original."""
    with local_copy(path, limits) if is_remote(path) else contextlib.nullcontext(path) as name:
        try:
            yield name
        except VideoError as error:
            raise type(error)(str(error).replace(name, path)) from error


def _open(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ImportError(
            "fsspec, which reads remote files, is not installed: pip install 'xclip-fast[remote]'"
        ) from error
    options: dict[str, Any] = {}
    if address.lower().startswith(("http://", "https://")):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=30, sock_read=60)}
    filesystem, path = url_to_fs(address, **options)
    if getattr(filesystem, "protocol", None) in ("file", ("file", "local")) or "::" in address:
        raise VideoError(f"{_shown(address)}: is not a remote file; give the path")
    return filesystem, path


@contextlib.contextmanager
def _errors(address: str) -> Iterator[None]:
    """Turns errors of a server into VideoErrors. A missing package stays an ImportError."""
    try:
        yield
    except (VideoError, ImportError):
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec raises it for every failure over HTTP
        status = getattr(cause, "status", None)
        if cause is None or status in (404, 410):
            raise VideoError(f"{_shown(address)}: no such file") from error
        text = f"status {status}" if status else str(cause) or type(cause).__name__
        raise ReadError(f"{_shown(address)}: cannot be read ({text})") from error
    except Exception as error:  # each of fsspec's file systems raises errors of its own
        text = " ".join(str(error).replace(address, _shown(address)).split()) or type(error).__name__
        raise ReadError(f"{_shown(address)}: cannot be read ({text})") from error


def _shown(address: str) -> str:
    """The URL without password and signature, for people."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"
