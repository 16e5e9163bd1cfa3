"""Stored features in one safetensors file, for small sets: `embed --out x.safetensors` writes it, `search` reads it.

The file holds `video` (n, E) and `patches` (n, N, E). Its metadata has the videos' names and the model's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.decode.decoder import probe
from ..data.decode.source import VideoError
from ..files import check_new_file, parse_json, replaced, save_tensors
from ..inference.batches import Answer
from .add import Plan, Summary, Writer, readable_path, stored_name
from .rows import Known, StoreSettings, check_fingerprint
from .store import Store

if TYPE_CHECKING:
    from ..model import XCLIP


FORMAT = "xclip_fast_features"  # the metadata key that marks a file of ours; its value is the version
_CHUNK = 1024  # videos at once


def fingerprint(model: XCLIP) -> str:
    """SHA-256 of the shape and the weights, the same for the same model in any layout."""
    values = model.config.to_dict()
    for name in ("logit_scale", "temporal_std"):  # initial values, without effect on a trained model
        del values[name]
    del values["vision"]["drop_path"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_out(out: Path, overwrite: bool) -> None:
    """Checks an output file, as ``check_new_file``. Only a file of features is ever replaced."""
    check_new_file(out, overwrite)
    if out.exists() and read_metadata(out) is None:
        raise FileExistsError(
            f"{out}: is something else than stored features, which is never replaced; choose another name"
        )


def read_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a file of features; None for any other file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, set(file.keys())
    except SafetensorError:
        return None
    complete = {"names", "fingerprint", "checkpoint", "variant"} <= metadata.keys() and "video" in tensors
    return metadata if metadata.get(FORMAT) == "1" and complete else None


class FeatureFile:
    """An open file of features: moments of whole videos, for `query.find`."""

    def __init__(self, path: Path) -> None:
        metadata = read_metadata(path)
        if metadata is None:
            raise ValueError(f"{path}: not a file of features; `xclip-fast embed` writes them")
        self.path = path
        try:
            self.names: list[str] = parse_json(metadata["names"])
            frames = int(metadata.get("frames", 8))
            if not isinstance(self.names, list) or not all(isinstance(name, str) for name in self.names):
                raise ValueError("its names are no list of strings")
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); embed the videos again") from error
        self.file = safe_open(path, "pt")
        rows = self.file.get_slice("video").get_shape()[0]
        if rows != len(self.names):
            raise ValueError(f"{path}: damaged, {len(self.names)} names of {rows} videos; embed them again")

        patches = self.file.get_slice("patches").get_shape()[1] if "patches" in set(self.file.keys()) else 0
        width = self.file.get_slice("video").get_shape()[1]
        self.settings = StoreSettings(
            metadata["fingerprint"],
            metadata["checkpoint"],
            metadata["variant"],
            width,
            frames,
            "sparse",
            frame_stride=1,
            window=0.0,  # every video is one moment
            stride=0.0,
            whole_below=0.0,
            patches=patches,
        )

    def check(self, wanted: StoreSettings) -> None:
        """Raises ValueError if another model made the features."""
        check_fingerprint(self.path, self.settings, wanted)

    def refresh(self) -> None:
        """Does nothing: a file does not grow."""

    def nearest(self, vector_E: Tensor, count: int, where: str | None = None) -> Any:
        """See `query.Moments`. Times are 0: the file does not know them. Filters are refused."""
        import pyarrow as pa

        if where:
            raise ValueError(f"{self.path}: a file of features cannot be filtered; make a store of it (embed --import)")
        video = self.file.get_slice("video")
        scores = [
            torch.nn.functional.normalize(video[start : start + _CHUNK].float(), dim=-1) @ vector_E
            for start in range(0, len(self.names), _CHUNK)
        ]
        rows = torch.cat(scores).topk(min(count, len(self.names))).indices.tolist()
        vectors = torch.stack([video[row : row + 1][0].float() for row in rows])
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1).numpy()), vectors.shape[1])
        return pa.table(
            {
                "_rowid": rows,
                "path": [self.names[row] for row in rows],
                "start": [0.0] * len(rows),
                "end": [0.0] * len(rows),
                "vector": values,
            }
        )

    def patches(self, rows: Sequence[int]) -> dict[int, Any]:
        stored = self.file.get_slice("patches")
        return {row: stored[row : row + 1][0].float().numpy() for row in rows}


def write_features(
    out: Path,
    model: XCLIP,
    answers: Any,
    count: int,
    *,
    metadata: dict[str, str],
    overwrite: bool = False,
    on_file: Callable[[str, ValueError | None], None] = lambda path, error: None,
) -> tuple[int, tuple[int, ...]]:
    """Writes the answers of `count` whole videos to a new file, atomically at the end.

    Returns the number of videos that could be read, and the shape of a feature. If it is 0, no file is written.
    """
    check_out(out, overwrite)
    kept: list[str] = []
    tensors: dict[str, Tensor] = {}
    with replaced(out) as part:  # fails before the work if the folder is not writable
        for item in answers:
            if not isinstance(item, Answer):
                on_file(item.path, item.error)
                continue
            for name, value in zip(("video", "patches"), item.values, strict=False):
                if name not in tensors:  # room for all at once: growing would copy
                    tensors[name] = torch.empty(count, *value.shape, dtype=value.dtype)
                tensors[name][len(kept)] = value
            kept.append(item.path)
        if not kept:
            return 0, ()
        found = {name: tensor[: len(kept)] for name, tensor in tensors.items()}
        save_tensors(found, part, {FORMAT: "1", "names": json.dumps(kept), **metadata})
        check_out(out, overwrite)  # again: much time has passed
    return len(kept), tuple(tensors["video"].shape[1:])


def import_features(store: Store, path: Path) -> Summary:
    """Copies the new videos of a file of features into a store of the same model.

    A video that no longer exists is kept with unknown size and length. A video whose path cannot be stored has failed.
    """
    source = FeatureFile(path)
    mine = store.settings
    if source.settings.fingerprint != mine.fingerprint:
        raise ValueError(f"{path}: made with other weights than {store.folder}; embed its videos again")
    if mine.patches and not source.settings.patches:
        raise ValueError(f"{path}: holds no patches, and {store.folder} stores them; make a store without --patches")
    known = store.known()
    work = Plan({}, {}, set(), Summary())
    writer = Writer(store, work)
    try:
        for row, given in enumerate(source.names):
            try:
                name = stored_name(given, mine.root)
            except ValueError as error:
                work.summary.failed[given] = str(error)
                continue
            if name in known or name in work.known:
                continue
            size, stamp, seconds = _seen(readable_path(name, mine.root))
            work.known[name] = Known(size, stamp, None, None)
            patches = torch.from_numpy(source.patches([row])[row]) if mine.patches else None
            writer.moment(name, 0.0, seconds, source.file.get_slice("video")[row : row + 1][0], patches)
            writer.finish(name, None)
    finally:
        writer.close()
    return work.summary


def _seen(path: str) -> tuple[int, str, float]:
    """Present size, stamp and length in seconds of a video; zeros if it is gone."""
    try:
        status = os.stat(path)
        return status.st_size, str(status.st_mtime_ns), probe(path).duration
    except (OSError, VideoError):
        return 0, "", 0.0
