"""The store: a LanceDB table in one folder, with a row for each moment of a video.

A file's rows are written in one commit, so a killed process leaves all rows of a file or none. Several processes may
write into one store. Each commit is made under a lock, and claims keep two processes from working on the same file.
Vectors have length 1 and half precision, so a dot product is a cosine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..files import full_disk
from .rows import Known, StoreSettings, check_settings, read_settings, schema_of

try:
    import fcntl
except ImportError:  # Windows: only one process may write into a store
    fcntl = None  # type: ignore[assignment]

_TABLE = "moments"
_PARTITION = 256  # a sixteenth of the rows of an index's partition
_PROBES = 4096  # all partitions: 60 ms for a million rows; of random vectors' ten best, 64 of 244 partitions miss half
_FRAGMENTS = 32  # if the table has more files, they are merged at the end of a run
_OLD = timedelta(hours=1)  # age after which files that no version of the table needs are removed


def is_store(folder: str | os.PathLike[str]) -> bool:
    return os.path.isdir(os.path.join(folder, f"{_TABLE}.lance"))


class Store:
    """An open store. `Store.open` opens one that exists; `Store.create` makes one, or opens it if it exists."""

    def __init__(self, folder: Path, table: Any) -> None:
        self.folder, self.table = folder, table
        self.settings = read_settings(folder, table.schema)
        self._seen = table.version  # the newest version that `known` or our own commits have seen
        self._claims: int | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Store:
        """Raises FileNotFoundError, or ValueError if the folder holds another table."""
        path = Path(folder)
        if not is_store(path):
            raise FileNotFoundError(f"{folder}: is not a store; `xclip-fast embed VIDEO... --out STORE` makes one")
        with _named(path):
            table = _connect(path).open_table(_TABLE)
        return cls(path, table)

    @classmethod
    def create(cls, folder: str | os.PathLike[str], settings: StoreSettings) -> Store:
        """A new store, or the existing one. Raises ValueError if the existing one has other settings."""
        path = Path(folder)
        if path.exists() and not is_store(path) and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{folder}: exists and is not a store; choose another name, or an empty folder")
        path.mkdir(parents=True, exist_ok=True)
        database = _connect(path)
        with _locked(path):
            if not is_store(path):
                database.create_table(_TABLE, schema=schema_of(settings))
        with _named(path):
            store = cls(path, database.open_table(_TABLE))
        check_settings(path, store.settings, settings)
        return store

    def refresh(self) -> None:
        """Reads the commits of other processes."""
        self.table.checkout_latest()

    def known(self) -> dict[str, Known]:
        """Every file in the store, by its path as stored."""
        self.refresh()
        self._seen = self.table.version
        columns = ["path", "size", "stamp", "digest", "error"]
        found: dict[str, Known] = {}
        with _named(self.folder):
            for batch in self.table.search().where("start = 0").select(columns).to_batches():
                rows = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
                found.update({path: Known(*rest) for path, *rest in rows})
        return found

    def counts(self) -> tuple[int, int, int]:
        """Files with moments, moments, and files that failed."""
        failed = self.table.count_rows("error IS NOT NULL")
        return self.table.count_rows("start = 0") - failed, self.table.count_rows() - failed, failed

    def drop(self, paths: Sequence[str]) -> None:
        """Remove these files' rows."""
        for start in range(0, len(paths), 1000):
            with _locked(self.folder):
                self.refresh()
                self.table.delete(f"path IN ({_quoted(paths[start : start + 1000])})")

    def commit(self, batches: Any, paths: Sequence[str], replaced: Iterable[str]) -> set[str]:
        """Writes the rows of these files in one commit. The rows of `replaced` files replace the existing ones.

        `batches`: a RecordBatchReader. Returns the paths that another process has written in the meantime. Their rows
        are left out.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        replaced = sorted(set(replaced))
        with _locked(self.folder):
            self.refresh()
            taken: set[str] = set()
            alone = self.table.version == self._seen  # nobody else has written since we looked
            if not alone:
                new = sorted(set(paths) - set(replaced))
                if new:
                    query = self.table.search().where(f"path IN ({_quoted(new)})").select(["path"])
                    taken = set(query.to_arrow()["path"].to_pylist())
            if taken:
                kept, gone = batches, pa.array(sorted(taken))
                filtered = (batch.filter(pc.invert(pc.is_in(batch["path"], value_set=gone))) for batch in kept)
                batches = pa.RecordBatchReader.from_batches(kept.schema, filtered)
            if replaced:
                merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                merge = merge.when_not_matched_by_source_delete(f"path IN ({_quoted(replaced)})")
                merge.execute(batches, on_bad_vectors="null")  # a failed file has no vector
            else:
                self.table.add(batches)
            self.refresh()
            if alone:
                self._seen = self.table.version
        return taken

    def compact(self) -> None:
        """Merges small files of the table, if there are many, and updates the index."""
        if self.table.stats()["fragment_stats"]["num_fragments"] > _FRAGMENTS:
            with _locked(self.folder):
                self.refresh()
                self.table.optimize(cleanup_older_than=_OLD)

    def build_index(self) -> None:
        """Builds an approximate index (IVF with RaBitQ codes) for large stores. Rows that it finds are scored exactly.

        For 100,000 rows on two busy cores it took 11 s. Product quantization was not finished after 200 s.
        """
        from lancedb.index import IvfRq

        rows = self.table.count_rows()
        if rows < 16 * _PARTITION:
            raise ValueError(f"{self.folder}: has {rows} rows; an index is worth building from about 100,000 on")
        with _locked(self.folder):
            self.refresh()
            config = IvfRq(
                distance_type="dot",
                num_partitions=max(16, min(4096, rows // 16 // _PARTITION)),
                num_bits=4,  # with 1, over half of the ten best of random vectors; with 4, all
                sample_rate=64,
                max_iterations=15,
            )
            self.table.create_index("vector", config=config, replace=True)

    @property
    def indexed(self) -> bool:
        return any("vector" in index.columns for index in self.table.list_indices())

    def nearest(self, vector_E: Any, count: int, where: str | None = None) -> Any:
        """The `count` rows with the largest cosine, as an Arrow table: _rowid, path, start, end, vector."""
        if count > 1000:  # LanceDB refuses a number far above the number of rows
            count = min(count, max(1, self.table.count_rows()))
        query = self.table.search(vector_E.numpy(), vector_column_name="vector").distance_type("dot")
        query = query.select(["path", "start", "end", "vector", "_distance"]).with_row_id(True).limit(count)
        if where:
            query = query.where(where, prefilter=True)
        if self.indexed:
            query = query.nprobes(_PROBES).refine_factor(4)
        with _named(self.folder):
            return query.to_arrow()

    def patches(self, rows: Sequence[int]) -> dict[int, Any]:
        """The patch features of these row ids, each a float16 array (N, E)."""
        query = self.table.take_row_ids(list(rows)).with_row_id().select(["patches"])
        with _named(self.folder):
            found = query.to_arrow().combine_chunks()
        shape = (found.num_rows, self.settings.patches, self.settings.embed_dim)
        values = found["patches"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(shape)
        return dict(zip(found["_rowid"].to_pylist(), values, strict=True))

    def changed(self) -> bool:
        """Whether another process has written since this object last read all files or wrote."""
        self.refresh()
        return self.table.version != self._seen

    def claim(self, path: str) -> bool:
        """Claims a file for this process, until `release` or its end. Returns False if another process has it."""
        if fcntl is None:
            return True
        if self._claims is None:
            self._claims = os.open(self.folder / ".claims", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(path))
        except OSError:
            return False
        return True

    def release(self, paths: Sequence[str] | None = None) -> None:
        """Releases these claims, or all."""
        if self._claims is not None and paths is None:
            os.close(self._claims)
            self._claims = None
        elif self._claims is not None and fcntl is not None:
            for path in paths or ():
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, _place(path))


def _place(path: str) -> int:
    """The byte of the claims file for a path."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=7).digest(), "big")


def _connect(folder: Path) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise ImportError("a store needs LanceDB: pip install 'xclip-fast[search]'") from error
    return lancedb.connect(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time commit. Raises OSError if the disk is full."""
    full = full_disk(folder, ". What was stored before is unchanged")
    with full, _named(folder), open(folder / ".lock", "ab") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Puts the folder into LanceDB's errors: those of a damaged file are RuntimeErrors of many lines."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):  # our own
            raise
        why = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: its table is damaged or cannot be written ({why}); embed into a new one"
        ) from error


def _quoted(paths: Sequence[str]) -> str:
    return ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
