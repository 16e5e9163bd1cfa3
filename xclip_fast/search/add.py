"""`embed` into a store: finds new, changed and missing files, embeds them, and writes rows as they come."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..data.decode.source import ReadError, VideoError
from ..data.inputs import Inputs
from ..data.remote import describe, is_remote
from ..inference.batches import Answer, Finished
from .parquet import ParquetFolder
from .rows import Known, row_id, schema_of
from .store import Store

_AGAIN = "read again"  # the stamp of a file with a `ReadError`: no file has it
_SECONDS, _FILES, _IN_MEMORY = 10.0, 4096, 64 << 20  # a commit at least so often; bytes of rows before they go to disk


@dataclass
class Summary:
    """The outcome for each given file, by its path as stored. `failed` holds a line for each error."""

    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: int = 0
    aliases: dict[str, str] = field(default_factory=dict)  # another path of a file, and the entry that it has
    dropped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    moments: int = 0

    def __str__(self) -> str:
        text = f"{len(self.added)} added, {len(self.updated)} updated, {self.unchanged} unchanged"
        text += f", {len(self.dropped)} dropped, {len(self.failed)} failed; {self.moments} moments written"
        return text + (f"; {len(self.aliases)} further paths of the same files" if self.aliases else "")


@dataclass
class Plan:
    """The files to embed: the stored name of each path to read, and the present facts of each name."""

    names: dict[str, str]
    known: dict[str, Known]
    replaced: set[str]
    summary: Summary


def stored_name(path: str, root: str) -> str:
    """The path as stored. Raises ValueError for a path outside of the root, or not in UTF-8."""
    if is_remote(path):
        return path
    full = os.path.abspath(path)
    try:
        full.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path!r}: the name is not UTF-8; rename the file") from error
    if not root:
        return full
    below = os.path.relpath(full, root)
    if below.startswith(os.pardir + os.sep):
        raise ValueError(f"{path}: is not in the store's root folder {root}; --root gives its new place")
    return below


def readable_path(stored: str, root: str) -> str:
    """The path to open for a stored path."""
    return os.path.join(root, stored) if root and not is_remote(stored) else stored


def plan(store: Store | ParquetFolder, inputs: Inputs, *, root: str, digest: bool = False, retry: bool = False) -> Plan:
    """Compares the given files with the stored ones.

    A file is unchanged if its size and its time of change are unchanged; with `digest`, if its content is. Failed files
    are tried again if they changed, after a `ReadError`, or with `retry`. Files gone from the given folders are
    dropped, unless a folder has no video at all, because it may not be mounted.
    """
    stored = store.known()
    summary = Summary()
    by_identity: dict[tuple[int, str], list[str]] = {}
    for name, known in stored.items():
        by_identity.setdefault((known.size, known.stamp), []).append(name)
    todo: dict[str, str] = {}
    now: dict[str, Known] = {}
    replaced: set[str] = set()
    given: set[str] = set()
    for path in inputs.paths:
        try:
            name = stored_name(path, root)
            given.add(name)
            size, stamp = describe(path) if is_remote(path) else _local(path)
            old = stored.get(name)
            same = old is not None and (old.size, old.stamp) == (size, stamp)
            sha = _sha256(path) if digest and not is_remote(path) else None
            if sha is not None and old is not None and old.digest is not None:
                same = old.digest == sha
        except ValueError as error:
            summary.failed[path] = str(error)
            continue
        if name in now:
            continue
        if same and old is not None and not (retry and old.error):
            if old.error:
                summary.failed[name] = old.error
            else:
                summary.unchanged += 1
            continue
        twin = None if old else _same_file(path, by_identity.get((size, stamp), ()), root)
        if twin is not None:
            summary.aliases[name] = twin
            continue
        todo[path] = name
        now[name] = Known(size, stamp, sha, None)
        by_identity.setdefault((size, stamp), []).append(name)
        if old is not None:
            replaced.add(name)
    gone = [name for name in stored if name not in given and _is_gone(name, inputs, root)]
    if gone:
        store.drop(gone)
        summary.dropped = gone
    return Plan(todo, now, replaced, summary)


def run(
    store: Store | ParquetFolder,
    work: Plan,
    embed: Callable[[Iterable[str]], Iterator[Answer | Finished]],
    on_file: Callable[[str, ValueError | None], None] = lambda path, error: None,
) -> Summary:
    """Embeds the files of the plan and writes them. `embed` gives answers (vector (E,)[, patches (N, E)]) for paths.

    If the run is interrupted, it still commits the files that are complete.
    """
    names = work.names
    writer = Writer(store, work)
    written: set[str] = set()  # by other processes, since the plan was made
    pending = list(names)
    later: list[str] = []  # claimed by another process

    def mine(paths: Iterable[str]) -> Iterator[str]:
        for path in paths:
            name = names[path]
            if not store.claim(name):
                later.append(path)
                continue
            if store.changed():
                written.update(store.known())
            if name in written and name not in work.replaced:
                store.release([name])
                work.summary.unchanged += 1
            else:
                yield path

    try:
        while pending:
            for item in embed(mine(pending) if len(pending) > 1 else list(mine(pending))):
                if isinstance(item, Answer):
                    writer.moment(names[item.path], item.start, item.end, *item.values)
                else:
                    writer.finish(names[item.path], item.error)
                    on_file(item.path, item.error)
            writer.flush()
            if len(later) == len(pending):
                time.sleep(0.5)  # this process holds no claim while it waits
            pending, later = later, []
    finally:
        writer.close()
    store.compact()
    return work.summary


class Writer:
    """Collects rows and commits whole files, about every ten seconds.

    Rows wait in memory, and beyond 64 MB in an unnamed temporary file. So a long film with patches takes no more.
    """

    def __init__(self, store: Store | ParquetFolder, work: Plan) -> None:
        import pyarrow as pa

        self.store, self.work, self.pa = store, work, pa
        self.schema = schema_of(store.settings)
        self._begin()

    def _begin(self) -> None:
        self.spool = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(self.store.folder))  # noqa: SIM115 -- see `flush`
        self.sink = self.pa.ipc.new_stream(self.pa.PythonFile(self.spool, "w"), self.schema)
        self.sink.write_batch(self.pa.RecordBatch.from_pylist([], self.schema))  # the schema is written with it
        self.start = self.spool.tell()  # where the rows of the present file begin
        self.count = 0
        self.counts: dict[str, int] = {}
        self.errors: dict[str, str] = {}
        self.problem: ValueError | None = None  # with the present file
        self.since = time.monotonic()

    def moment(self, name: str, start: float, end: float, vector: Any, patches: Any = None) -> None:
        """Adds a row to the present file: float vectors (E,) and (N, E)."""
        features = {"vector": torch.nn.functional.normalize(vector.float(), dim=-1).half().numpy()}
        if patches is not None:
            features["patches"] = patches.half().reshape(-1).numpy()
            if not np.isfinite(features["patches"]).all():
                self.problem = ValueError(f"{name}: patch features do not fit into half precision; leave out --patches")
                return
        self._row(name, self.work.known[name], start, end, **features)
        self.count += 1

    def _row(self, name: str, known: Known, start: float = 0.0, end: float = 0.0, **features: np.ndarray) -> None:
        row = {"id": row_id(name, start), "path": name, "start": start, "end": end, **known._asdict(), **features}
        self.sink.write_batch(self.pa.RecordBatch.from_pylist([row], self.schema))

    def finish(self, name: str, error: ValueError | None) -> None:
        """Completes the present file. If it has failed, its rows are removed."""
        known = self.work.known[name]
        error, self.problem = error or self.problem, None
        if error is not None:
            self.spool.seek(self.start)
            self.spool.truncate()
            reason = " ".join(str(error).split())
            known = known._replace(error=reason)
            if isinstance(error, ReadError):
                known = known._replace(stamp=_AGAIN, digest=None)
            self._row(name, known)
            self.errors[name] = reason
            self.count = 0
        self.counts[name] = self.count
        self.start, self.count = self.spool.tell(), 0
        if time.monotonic() - self.since > _SECONDS or len(self.counts) >= _FILES:
            self.flush()

    def flush(self) -> None:
        """Commits the complete files."""
        self.spool.seek(self.start)
        self.spool.truncate()
        counts, self.counts = self.counts, {}
        if not counts:
            return
        self.sink.close()
        self.spool.seek(0)
        replaced = self.work.replaced & counts.keys()
        taken = self.store.commit(self.pa.ipc.open_stream(self.spool), list(counts), replaced)
        summary = self.work.summary
        for name, count in counts.items():
            if name in taken:
                summary.unchanged += 1
            elif name in self.errors:
                summary.failed[name] = self.errors[name]
            else:
                (summary.updated if name in replaced else summary.added).append(name)
                summary.moments += count
        self.store.release(list(counts))
        self.spool.close()
        self._begin()

    def close(self) -> None:
        """Commits the complete files, also after an error."""
        try:
            self.flush()
        finally:
            self.spool.close()


def _local(path: str) -> tuple[int, str]:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise VideoError(f"{path}: {reason}") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{path}: is a directory, not a video file")
    if not stat.S_ISREG(status.st_mode):  # `_sha256` would wait for a pipe
        raise VideoError(f"{path}: is not a regular file")
    return status.st_size, str(status.st_mtime_ns)


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror}") from error


def _same_file(path: str, candidates: Sequence[str], root: str) -> str | None:
    """The stored entry of the same file under another name (a hard or symbolic link), or None."""
    if is_remote(path):
        return None
    for name in candidates:
        other = readable_path(name, root)
        if os.path.exists(other) and os.path.samefile(path, other):
            return name
    return None


def _is_gone(name: str, inputs: Inputs, root: str) -> bool:
    """Whether a stored file belongs to a folder that was just listed, and no longer exists there.

    A file below a subfolder that cannot be listed may still exist.
    """
    full = name if is_remote(name) else readable_path(name, root)
    if any(full.startswith(os.path.abspath(folder) + os.sep) for folder in inputs.unlisted):
        return False
    for folder in inputs.folders:
        if is_remote(folder) or is_remote(name):
            within = name.startswith(folder) and folder.endswith("/")
            if within and any(path.startswith(folder) for path in inputs.paths):
                return True  # the listing decides
            continue
        above = os.path.abspath(folder) + os.sep
        if full.startswith(above) and not os.path.lexists(full):
            return any(os.path.abspath(path).startswith(above) for path in inputs.paths)
    return False
