"""Tables of what was measured: tiles (triton/tiles.json) and backends (choices.json), shipped or the user's own.

A table is JSON: a name (an op, a kernel) -> rows, the first that fits holds. A row has ``arch``, ``where`` (names of
sizes, each with the least and the largest value it holds for) and what was found there.
"""

import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("xclip_fast")
_told: set[Path] = set()  # damaged tables that a line was logged of


def user_table(name: str) -> Path:
    """Where ``python -m xclip_fast.kernels.tune`` keeps what it measured here: asked before the shipped table."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "xclip_fast" / name


@functools.cache
def rows(shipped: Path, name: str) -> tuple[dict[str, Any], ...]:
    """The rows under a name: the user's own, then the shipped ones, in each those of the newest architecture first."""
    tables = (_table(path).get(name, ()) for path in (user_table(shipped.name), shipped))
    return tuple(row for table in tables for row in sorted(table, key=lambda row: -row["arch"]))


@functools.lru_cache(4096)  # labels come in any number
def first(shipped: Path, name: str, architectures: range, sizes: tuple[tuple[str, Any], ...]) -> dict[str, Any] | None:
    """The first row under a name that holds for one of these architectures and for these sizes."""
    fitting = (row for row in rows(shipped, name) if row["arch"] in architectures and holds(row, dict(sizes)))
    return next(fitting, None)


kept: list[Any] = [rows, first]  # functools caches of what the tables say or decide


def forget() -> None:
    """Read the tables again at the next call."""
    for cached in kept:
        cached.cache_clear()


def _table(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A whole table. One that is damaged counts as empty, with a logged line: what it says only makes things faster."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for each in found.values():
            for row in each:
                if not (
                    isinstance(row["arch"], int) and all(low <= high for low, high in row.get("where", {}).values())
                ):
                    raise ValueError(f"a row that is none: {row!r:.80}")
                if not all(ms > 0 for ms in row.get("milliseconds", {}).values()):
                    raise ValueError(f"times that are none: {row!r:.80}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if path not in _told:
            _told.add(path)
            log.warning(
                "%s is damaged and not used (%r); delete it, or measure again with `xclip-fast tune`", path, error
            )
        return {}
    return found


def holds(row: Mapping[str, Any], sizes: Mapping[str, Any]) -> bool:
    """Whether a row was measured for these sizes. A size that it does not bound may have any value."""
    return all(low <= sizes[name] <= high for name, (low, high) in row.get("where", {}).items() if name in sizes)
