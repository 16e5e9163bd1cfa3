"""Tables of what was measured: tiles (triton/tiles.json) and backends (choices.json), shipped or the user's own.

A table is JSON: a name (an op, a kernel) -> rows, the first that fits holds. A row has ``arch``, ``where`` (names of
sizes, each with the least and the largest value it holds for) and what was found there.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def user_table(name: str) -> Path:
    """Where ``python -m xclip_fast.kernels.tune`` keeps what it measured here: asked before the shipped table."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "xclip_fast" / name


@functools.cache
def rows(path: Path, name: str) -> tuple[dict[str, Any], ...]:
    """The rows of a table under a name; none if there is no such table."""
    if not path.exists():
        return ()
    return tuple(json.loads(path.read_text(encoding="utf-8")).get(name, ()))


def holds(row: Mapping[str, Any], sizes: Mapping[str, Any]) -> bool:
    """Whether a row was measured for these sizes. A size that it does not bound may have any value."""
    return all(low <= sizes[name] <= high for name, (low, high) in row.get("where", {}).items() if name in sizes)
