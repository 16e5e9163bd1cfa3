"""The rows of a store as a folder of Parquet files, for other programs. Written like a store, not searched."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..files import locked, remove, replaced, require_regular
from .rows import Known, StoreSettings, check_settings, read_settings, schema_of


class ParquetFolder:
    """A folder of `part-*.parquet`. Each part appears when it is complete. One run at a time writes into the folder.

    It replaces a `Store` in `embed`: it resumes, adds, updates and drops in the same way. An update or a drop writes
    the parts again that hold the file.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: StoreSettings) -> None:
        import pyarrow.parquet as pq

        self.folder, self.settings = Path(folder), settings
        self._lock = contextlib.ExitStack()
        strange = set(self.folder.glob("*")) - set(self.folder.glob(".*")) - set(self._parts())
        if strange or (self.folder.exists() and not self.folder.is_dir()):
            raise FileExistsError(f"{folder}: exists and holds other files; choose another name")
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self._parts()[:1]:
            with _named(part):
                schema = pq.read_schema(part)
            mine = read_settings(self.folder, schema)
            check_settings(self.folder, mine, settings)
            self.settings = mine

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def known(self) -> dict[str, Known]:
        """Every file in the folder, by its path as stored. Claims the folder for this process until `release`.

        Removes the leftovers of a killed run. Raises FileExistsError if another process has the folder.
        """
        self.release()
        self._lock.enter_context(locked(self.folder / ".writing", self.folder))
        for left in self.folder.glob(".part-*"):
            remove(left)
        columns = ["path", "size", "stamp", "digest", "error"]
        rows = (row for part in self._parts() for row in _read(part, columns).to_pylist())
        return {row.pop("path"): Known(**row) for row in rows}

    def counts(self) -> tuple[int, int, int]:
        """Files with moments, moments, and files that failed."""
        rows = [row for part in self._parts() for row in _read(part, ["start", "error"]).to_pylist()]
        failed = sum(row["error"] is not None for row in rows)
        return sum(row["start"] == 0 for row in rows) - failed, len(rows) - failed, failed

    def commit(self, batches: Any, paths: Sequence[str], outdated: Iterable[str]) -> set[str]:
        """Removes the rows of the outdated files, and writes one part with these rows."""
        import pyarrow.parquet as pq

        self.drop(outdated)  # first: after a kill rows are missing and added again, but never doubled
        new = self.folder / f"part-{uuid.uuid4().hex}.parquet"
        with replaced(new) as draft, pq.ParquetWriter(draft, schema_of(self.settings)) as writer:
            for batch in batches:
                if batch.num_rows:
                    writer.write_batch(batch)
        return set()

    def drop(self, paths: Iterable[str]) -> None:
        """Removes these files' rows."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        gone = pa.array(sorted(paths), pa.string())
        for part in self._parts() if len(gone) else ():
            if not pc.any(pc.is_in(_read(part, ["path"])["path"], value_set=gone)).as_py():
                continue
            table = _read(part)
            kept = table.filter(pc.invert(pc.is_in(table["path"], value_set=gone)))
            if kept.num_rows:
                with replaced(part) as draft:
                    pq.write_table(kept, draft)
            else:
                part.unlink()

    def refresh(self) -> None:
        """Does nothing: only this process writes."""

    def claim(self, path: str) -> bool:
        """True: `known` has claimed the whole folder."""
        return True

    def changed(self) -> bool:
        """False: only this process writes."""
        return False

    def release(self, paths: Sequence[str] | None = None) -> None:
        """Releases the folder at the end of a run."""
        if paths is None:
            self._lock.close()

    def compact(self) -> None:
        """Does nothing: parts stay as they are."""


def _read(part: Path, columns: list[str] | None = None) -> Any:
    """Columns of a part."""
    import pyarrow.parquet as pq

    with _named(part):
        return pq.read_table(part, columns=columns)


@contextlib.contextmanager
def _named(part: Path) -> Iterator[None]:
    """Puts the name of the file into pyarrow's errors."""
    require_regular(part)
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{part}: is damaged ({error}); remove it and embed its videos again") from error
