"""`Index`: a store and the model that made it, in one object."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.decode.windows import check_windows
from ..data.inputs import Inputs, find_videos
from ..data.remote import Limits
from ..inference.batches import Finished, Reading, answers
from ..weights.hub import reference
from .add import Summary, plan, readable_path, run
from .parquet import ParquetFolder
from .query import Filters, Hit, find
from .rows import StoreSettings, check_settings
from .store import Store, is_store

if TYPE_CHECKING:
    from ..model import XCLIP

_LARGE = 100_000  # moments; above it an index pays
PARQUET = ".parquet"
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Index:
    """Videos that can be searched by text, in a folder that grows.

        index = Index.open("holidays", "xclip-base-patch16")
        index.add("videos/")
        for hit in index.search("somebody juggling", top=5):
            print(hit.path, hit.start, hit.end, hit.score)

    `store`: the LanceDB store, or Parquet files, which grow in the same way and cannot be searched. `model`: the model,
    on its device.
    """

    def __init__(self, store: Store | ParquetFolder, model: XCLIP, root: str | None = None) -> None:
        self.store, self.model = store, model
        self.root = store.settings.root if root is None else os.path.abspath(root)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        model: XCLIP | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        root: str | os.PathLike[str] | None = None,
        variant: str | None = None,
        window: float | None = None,
        stride: float | None = None,
        patches: bool | None = None,
        frames: int | None = None,
        sampling: str | None = None,
        frame_stride: int | None = None,
    ) -> Index:
        """Opens the store in a folder, or makes one. A folder named `*.parquet` gets Parquet files instead.

        Args:
            folder: of the store.
            checkpoint: the weights (default: those that made the store).
            model: a model in place of the checkpoint, in the precision of its checkpoint.
            device: "auto", "cpu", "cuda" or "cuda:N". dtype: "auto", or as for `torch.nn.Module.to`.
            root: folder of the videos. Paths are stored relative to it (default: absolute paths). For an existing store
                with a root: the present place of that folder.
            window, stride: seconds. Default: windows of 10 s every 5 s in videos longer than 30 s. A given window cuts
                every longer video.
            patches: store patch features too (N times the size), to rank with video-specific prompts.
            frames, sampling, frame_stride: as in `decode` (default: as in training).

        Raises:
            ValueError: if the store was made with another model or other settings.
        """
        from ..inference.placement import load_model, placed
        from ..weights.recipe import Trained

        if model is None:
            if checkpoint is None:
                checkpoint = Store.open(folder).settings.checkpoint  # its error names what is missing
            if not checkpoint:
                raise ValueError(f"{folder}: made with random weights; give a model")
            model = load_model(checkpoint)
        config, used = model.config, fingerprint(model)
        weights = "" if checkpoint is None else reference(checkpoint)
        patch_count = config.vision.patches if patches and model.prompts_generator is not None else 0
        store: Store | ParquetFolder
        if is_store(folder):
            store = Store.open(folder)
            times = {"stride": stride} if window is None else Reading.moments(window, stride)
            given: dict[str, Any] = {"frames": frames, "sampling": sampling, "frame_stride": frame_stride, **times}
            given["patches"] = None if patches is None else patch_count
            changed = {name: value for name, value in given.items() if value is not None}
            wanted = replace(store.settings, fingerprint=used, checkpoint=weights, **changed)
            check_settings(store.folder, store.settings, wanted)
        else:
            moments = Reading.moments(window, stride)
            check_windows(**moments)
            chosen = Trained.read(checkpoint).choose(frames, sampling, frame_stride)  # type: ignore[arg-type]
            settings = StoreSettings(
                used,
                weights,
                config.variant_name or variant or "",
                config.embed_dim,
                chosen["frames"] or config.num_frames,
                chosen["sampling"],
                chosen["stride"],
                **moments,
                patches=patch_count,
                root="" if root is None else os.path.abspath(root),
            )
            parquet = os.fspath(folder).endswith(PARQUET)
            store = ParquetFolder(folder, settings) if parquet else Store.create(folder, settings)
        return cls(store, model.to(**placed(device, dtype)), None if root is None else os.fspath(root))

    def __len__(self) -> int:
        """The number of moments."""
        self.store.refresh()
        return self.store.counts()[1]

    def add(
        self,
        videos: Paths | Inputs,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        digest: bool = False,
        retry: bool = False,
        limits: Limits | None = None,
        on_file: Callable[[str, ValueError | None], None] = lambda path, error: None,
        on_plan: Callable[[int], None] = lambda files: None,
        embed: Callable[[Iterable[str]], Iterator[Any]] | None = None,
    ) -> Summary:
        """Embeds new and changed videos, and drops videos that are gone from the given folders.

        Args:
            videos: files, folders, globs, lists, addresses, as for `find_videos`.
            batch_size, workers: as for `answers`.
            digest: compare contents (SHA-256) instead of times of change.
            retry: try failed files again, even if they did not change.
            limits: of remote files.
            on_file: called with each finished file and its error, if any.
            on_plan: called once with the number of files to embed.
            embed: replaces the model and the loop, for example on a cluster. Returns the results of `answers`.
        """
        inputs = videos if isinstance(videos, Inputs) else find_videos(videos)

        def here(paths: Iterable[str]) -> Any:
            kept = bool(self.store.settings.patches)
            return answers(
                self.model,
                paths,
                self.reading(limits),
                lambda found: found[: 1 + kept],
                patches=kept,
                batch_size=batch_size,
                workers=workers,
            )

        try:
            work = plan(self.store, inputs, root=self.root, digest=digest, retry=retry)
            work.summary.failed.update((line.partition(": ")[0], line) for line in inputs.empty)
            on_plan(len(work.names))
            return run(self.store, work, embed or here, on_file)
        finally:
            self.store.release()

    def search(
        self,
        query: str | Tensor,
        top: int = 10,
        *,
        path: str | None = None,
        after: float | None = None,
        before: float | None = None,
        merge: bool = True,
    ) -> list[Hit]:
        """The moments most similar to a text, best first. See `Hit` for the meaning of the score.

        Args:
            query: the text, or features (1, E) of a text or a video.
            top: number of hits.
            path, after, before: see `Filters`.
            merge: join neighboring windows of one moment into one hit.

        Raises:
            ValueError: for an empty text.
        """
        if isinstance(self.store, ParquetFolder):
            raise ValueError(f"{self.store.folder}: Parquet files are for other programs; search in a store")
        self.store.refresh()
        prompted = None
        if isinstance(query, str):
            if not query.strip():
                raise ValueError("the query is empty; a text is wanted")
            with torch.inference_mode():
                query = self.model.encode_text(query)
            prompted = self.model if self.prompted else None
        filters = Filters(path, after, before)
        hits = find(self.store, query, model=prompted, top=top, filters=filters, merge=merge)
        return [replace(hit, path=readable_path(hit.path, self.root)) for hit in hits]

    def features(self, path: str | os.PathLike[str]) -> Tensor:
        """Features (1, E) of a whole video file, to search for videos like it. Raises VideoError."""
        reading = replace(self.reading(), window=None)
        first, *_ = answers(self.model, [os.fspath(path)], reading, lambda found: found[:1], patches=False)
        if isinstance(first, Finished):
            assert first.error is not None
            raise first.error
        return first.values[0][None]

    @property
    def prompted(self) -> bool:
        """Whether hits are ranked again with video-specific prompts."""
        return bool(self.store.settings.patches) and self.model.prompts_generator is not None

    @property
    def note(self) -> str | None:
        """A note for the user about this store, or None."""
        if isinstance(self.store, ParquetFolder):
            return None
        rows = self.store.table.count_rows()
        if rows > _LARGE and not self.store.indexed:
            return f"{rows} moments without an index; `xclip-fast embed --out {self.store.folder} --index` builds one"
        return None

    def reading(self, limits: Limits | None = None) -> Reading:
        """The settings with which the store's videos were read."""
        mine = self.store.settings
        return Reading(
            mine.frames,
            self.model.config.vision.image_size,
            mine.sampling,  # type: ignore[arg-type]  # checked when the store was made
            mine.frame_stride,
            mine.window or None,
            mine.stride,
            mine.whole_below,
            limits or Limits(),
        )


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
