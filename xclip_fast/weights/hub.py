"""Checkpoints on the Hugging Face Hub, through the package huggingface_hub, if it is installed."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..console import first_line
from .layouts import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONNECTIONS = ("httpx", "httpx2", "httpcore", "requests")  # packages
_BESIDE = "*.json"  # configurations of model and processor, trained.json, and the index of shards


def is_name(path: str | os.PathLike[str]) -> bool:
    """Whether this is a repository's name, such as microsoft/xclip-base-patch16, and nothing on this disk."""
    path = Path(path)
    return _NAME.fullmatch(path.as_posix()) is not None and not path.parent.exists()


def locate(path: str | os.PathLike[str], weights: Sequence[str] = (), revision: str | None = None) -> Path:
    """The path itself if it exists, or the local copy of a repository of the Hub, downloaded if need be.

    Args:
        weights: names of weight files; the first that the repository has is downloaded, with its shards. Every
            ``*.json`` is downloaded, too.
        revision: of the repository; None: the newest.

    Raises:
        CheckpointError: if it is neither. It says whether the name is wrong, the Hub was not reached, or the package is
            missing.
    """
    path = Path(path)
    if path.exists():
        return path
    if not is_name(path):
        raise CheckpointError(
            f"{path}: no such file or folder. Weights are read from disk, or by the name of a model on the Hugging "
            "Face Hub, such as microsoft/xclip-base-patch16"
        )
    return _download(path.as_posix(), weights, revision)


def cached(path: str | os.PathLike[str]) -> Path:
    """The local copy of a repository of the Hub, if there is one; any other path as it is. Downloads nothing."""
    if not is_name(path):
        return Path(path)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        return Path(path)
    try:
        return Path(snapshot_download(Path(path).as_posix(), allow_patterns=_BESIDE, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(path)


def reference(path: str | os.PathLike[str]) -> str:
    """What to write down to find a checkpoint again: an absolute path, or its name on the Hub."""
    return Path(path).as_posix() if is_name(path) else os.path.abspath(path)


def _download(name: str, weights: Sequence[str], revision: str | None) -> Path:
    by_hand = f"hf download {name} --local-dir {name.rpartition('/')[2]}"
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such file or folder. To read it from the Hugging Face Hub: pip install huggingface_hub, or "
            f"{by_hand}"
        ) from error
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_BESIDE))
        if not weights or any((folder / each).exists() for each in weights if not each.endswith(".json")):
            return folder
        files = HfApi().list_repo_files(name, revision=folder.name)
        found = next((each for each in weights if each in files), None)
        if found is None:
            raise CheckpointError(f"{name}: that repository has no weights; one of {', '.join(weights)} is wanted")
        wanted = [_BESIDE, found]
        if found.endswith(".json"):
            shards = json.loads((folder / found).read_text(encoding="utf-8")).get("weight_map", {})
            wanted += sorted({str(shard) for shard in shards.values()})
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=wanted))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{name}: no such file or folder, and no such model on the Hugging Face Hub that you may read. For a "
            f"private or gated one: hf auth login ({first_line(error)})"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name}: not on this disk, and the Hugging Face Hub cannot be reached ({first_line(error)}). Where it "
            f"can: {by_hand}"
        ) from error


def upload(
    write: Callable[[Path], object],
    name: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Writes a folder with ``write`` and uploads it to the repository ``name``. See ``XCLIP.push_to_hub``."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("to push a model to the Hugging Face Hub: pip install huggingface_hub") from error
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="xclip-fast-") as folder:
        write(Path(folder))
        try:
            api.create_repo(name, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message or "Add an X-CLIP")
        except Exception as error:
            # the connection's own errors are no OSErrors
            if isinstance(error, OSError) or type(error).__module__.split(".")[0] not in _CONNECTIONS:
                raise
            raise OSError(f"{name}: the Hugging Face Hub cannot be reached ({first_line(error)})") from error
    return str(commit.commit_url)
