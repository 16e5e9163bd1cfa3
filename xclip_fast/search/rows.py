"""The rows of stored features: their columns, and the settings that all of them share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..files import parse_json
from ..schema import build

_KEY, _VERSION = b"xclip_fast_store", 1  # of the settings in the metadata of an Arrow schema


@dataclass(frozen=True)
class StoreSettings:
    """The settings that all rows of a store share. They are written when the store is made.

    `fingerprint`: of the model (`index.fingerprint`). `patches`: N, if patch features are stored; otherwise 0.
    `root`: the folder that local paths are relative to; "" for absolute paths.
    """

    fingerprint: str
    checkpoint: str
    variant: str
    embed_dim: int
    frames: int
    sampling: str
    frame_stride: int
    window: float
    stride: float
    whole_below: float
    patches: int = 0
    root: str = ""


class Known(NamedTuple):
    """The facts of a stored file. `stamp` changes with the file. `digest` is the hash of its content, if asked for."""

    size: int
    stamp: str
    digest: str | None
    error: str | None


def read_settings(place: Path, schema: Any) -> StoreSettings:
    """The settings in the metadata of an Arrow schema.

    Raises ValueError if they are missing or damaged, or do not describe the columns.
    """
    try:
        if b"embedding_functions" in (schema.metadata or {}):  # LanceDB would load what it names, at the next write
            raise ValueError("it names an embedding function, which may run code")
        written = parse_json((schema.metadata or {}).get(_KEY, b"{}"))
        if not isinstance(written, dict) or written.pop("format", None) != _VERSION:
            raise ValueError("it was not written by this version of xclip-fast")
        try:
            found: StoreSettings = build(StoreSettings, written)
        except TypeError:
            raise ValueError("its settings are incomplete") from None
        if not schema.equals(schema_of(found)):
            raise ValueError("its columns do not fit its settings")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{place}: holds a table that is not a store ({error})") from error
    return found


def check_settings(place: Path, made_with: StoreSettings, wanted: StoreSettings) -> None:
    """Raises ValueError if rows with the wanted settings do not belong beside the others."""
    if made_with.fingerprint != wanted.fingerprint:
        ours, theirs = (f"{each.checkpoint or 'random'}, {each.fingerprint[:12]}" for each in (made_with, wanted))
        raise ValueError(f"{place}: made with other weights ({ours}) than {theirs}; use the former, or embed again")
    mine, other = asdict(made_with), asdict(wanted)
    for name in ("checkpoint", "variant", "root"):  # the same weights may lie elsewhere, the files too
        del mine[name], other[name]
    changed = [f"{name} {value}, not {other[name]}" for name, value in mine.items() if value != other[name]]
    if changed:
        raise ValueError(f"{place}: was made with {'; '.join(changed)}. Leave the option out, or choose another place")


def schema_of(settings: StoreSettings) -> Any:
    """The columns of a store, as an Arrow schema. The metadata hold the settings, for ``read_settings``."""
    import pyarrow as pa

    columns = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("start", pa.float64(), nullable=False),  # seconds; 0 for a file's first moment, and for an error
        pa.field("end", pa.float64(), nullable=False),
        pa.field("size", pa.int64()),  # bytes of the file
        pa.field("stamp", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("error", pa.string()),  # one line; then there is no vector
        pa.field("vector", pa.list_(pa.float16(), settings.embed_dim)),
    ]
    if settings.patches:
        columns.append(pa.field("patches", pa.list_(pa.float16(), settings.patches * settings.embed_dim)))
    return pa.schema(columns, {_KEY: json.dumps({"format": _VERSION, **asdict(settings)})})


def row_id(path: str, start: float) -> str:
    return hashlib.blake2b(f"{path}\0{start:.6f}".encode(), digest_size=12).hexdigest()
