"""The file of stored video features that ``embed`` writes and ``search`` reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..model import XCLIP

FORMAT = "xclip_fast_features"  # the metadata key that marks a file of ours; its value is the version


def fingerprint(model: XCLIP) -> str:
    """SHA-256 of the shape and the weights, the same for the same model in any layout."""
    import torch

    values = model.config.to_dict()
    for name in ("logit_scale", "temporal_std"):  # they say how to start and to train
        del values[name]
    del values["vision"]["drop_path"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse what ``--out`` may not be: nothing but a file of features is ever replaced."""
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else "its folder does not exist"
        raise typer.BadParameter(f"{out}: {what}; a file in an existing folder is wanted", param_hint="--out")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: is there already; choose another name or add --overwrite")
    if out.exists() and read_metadata(out) is None:
        raise FileExistsError(
            f"{out}: is something else than stored features, which is never replaced; choose another name"
        )


def read_metadata(path: Path) -> dict[str, str] | None:
    """What ``embed`` wrote about the features in a file; None if it is another file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, set(file.keys())
    except SafetensorError:
        return None
    complete = {"names", "fingerprint", "checkpoint", "variant"} <= metadata.keys() and "video" in tensors
    return metadata if metadata.get(FORMAT) == "1" and complete else None
