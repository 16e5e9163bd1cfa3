"""``classify``, ``embed`` and ``search``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Bar, complain, plain, print_rows
from ..search import features as features_file
from .options import (
    CHUNK,
    AsJson,
    BatchSize,
    Checkpoint,
    Device,
    DType,
    Frames,
    Overwrite,
    RandomWeights,
    Sampled,
    Stride,
    Templates,
    Top,
    Variant,
    Videos,
    Workers,
    device_and_dtype,
    find_videos,
    load_model,
    parse_labels,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.features import VideoFeatures

commands = typer.Typer()


@commands.command()
def classify(
    videos: Videos,
    labels: Annotated[
        str | None,
        typer.Option(
            help="'a,b,c', a .txt with one a line, or a .csv (one column, or id,name); default: as trained.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    variant: Variant = None,
    random_weights: RandomWeights = False,
    top: Top = 5,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: DType = "auto",
    templates: Templates = None,
    frames: Frames = None,
    sampling: Sampled = None,
    stride: Stride = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
) -> None:
    """Name what happens in videos.

    Prints the most probable of the labels for each video; in a pipe, lines of video, rank, label and probability
    between tabs. A video that cannot be read is reported, the others are still answered, and the exit code is 1.
    """
    import torch

    from ..inference.batches import run_videos
    from ..weights.recipe import Trained

    trained = Trained.read(checkpoint)
    names = list(trained.labels.values()) if labels is None else parse_labels(labels)
    if not names:
        raise typer.BadParameter(
            "none given, and the checkpoint does not say which it was trained with", param_hint="--labels"
        )
    chosen = trained.choose(frames, sampling, stride, templates)
    sentences = chosen.pop("templates")
    paths, failed = find_videos(videos)
    target = device_and_dtype(device, dtype)
    model = load_model(checkpoint, variant, random_weights).to(**target)
    outputs = model.config.num_classes
    if outputs is not None and (sentences or outputs != len(names)):
        raise ValueError(
            f"the model has a linear head and reads no text; --labels must name its {outputs} outputs in order "
            f"({len(names)} given), without --templates"
        )

    with torch.inference_mode(), Bar(len(paths)) as bar:
        text: Sequence[Tensor | None] = [None]
        if outputs is None:
            chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
            text = [
                model.encode_text_ensemble(chunk, sentences) if sentences else model.encode_text(chunk)
                for chunk in chunks
            ]

        def answer(found: VideoFeatures) -> tuple[Tensor]:
            return (torch.cat([model.similarity(found, part_KE) for part_KE in text], dim=1).softmax(-1),)

        for path, result in run_videos(model, paths, answer, batch_size=batch_size, workers=workers, **chosen):
            bar.advance()
            if isinstance(result, ValueError):
                failed |= complain(result, bar)
                continue
            best = result[0].topk(min(top, len(names)))
            ranked = [(names[index], value) for value, index in zip(best.values.tolist(), best.indices, strict=True)]
            with bar.aside():
                if as_json:
                    answers = [{"label": label, "probability": value} for label, value in ranked]
                    print(json.dumps({"video": path, "labels": answers, "random_weights": random_weights}), flush=True)
                else:
                    rows = [(str(rank), label, f"{value:.4f}") for rank, (label, value) in enumerate(ranked, 1)]
                    print_rows(path, ("rank", "label", "probability"), rows)
    raise typer.Exit(int(failed))


@commands.command()
def embed(
    videos: Videos,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The features go here, as safetensors.")],
    checkpoint: Checkpoint = None,
    variant: Variant = None,
    random_weights: RandomWeights = False,
    patches: Annotated[
        bool, typer.Option("--patches/--no-patches", help="Patch features too; search needs them for prompts.")
    ] = True,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: DType = "auto",
    frames: Frames = None,
    sampling: Sampled = None,
    stride: Stride = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
) -> None:
    """Store features of videos, for search.

    The file holds `video` (n, E) and `patches` (n, N, E) in the precision they were computed in, and as metadata the
    videos' names and what identifies the model. Without patches a search goes by plain cosine, 1 / N of the size.
    """
    import tempfile

    from ..config import VARIANTS
    from ..inference.batches import run_videos
    from ..weights.recipe import Trained

    features_file.check_out(out, overwrite)
    chosen = Trained.read(checkpoint).choose(frames, sampling, stride)
    del chosen["templates"]
    paths, failed = find_videos(videos)
    target = device_and_dtype(device, dtype)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent) as folder:  # an unwritable place fails early
        model = load_model(checkpoint, variant, random_weights)
        identity = features_file.fingerprint(model)
        model.to(**target)
        import torch
        from safetensors.torch import save_file

        kept: list[str] = []
        tensors: dict[str, Tensor] = {}
        with torch.inference_mode(), Bar(len(paths)) as bar:
            for path, result in run_videos(model, paths, batch_size=batch_size, workers=workers, **chosen):
                bar.advance()
                if isinstance(result, ValueError):
                    failed |= complain(result, bar)
                    continue
                for name, value in zip(("video", "patches") if patches else ("video",), result, strict=False):
                    if name not in tensors:  # room for all at once: growing would copy
                        tensors[name] = torch.empty(len(paths), *value.shape, dtype=value.dtype)
                    tensors[name][len(kept)] = value
                kept.append(path)
        if not kept:
            complain(f"no video could be read, so {out} is not written")
            raise typer.Exit(1)
        config = model.config
        metadata = {
            features_file.FORMAT: "1",
            "names": json.dumps(kept),
            "fingerprint": identity,
            "checkpoint": "" if checkpoint is None else str(checkpoint.resolve()),
            "variant": next((name for name, row in VARIANTS.items() if row == config), variant or ""),
            "frames": str(chosen["frames"] or config.num_frames),
        }
        part = Path(folder, "features")
        save_file({name: tensor[: len(kept)] for name, tensor in tensors.items()}, part, metadata=metadata)
        features_file.check_out(out, overwrite)  # again: much time has passed
        os.replace(part, out)
    size = f"{tensors['video'].shape[1]} numbers each, {'with' if patches else 'without'} patches"
    print(f"{plain(str(out))}: {len(kept)} of {len(paths)} videos, {size}")
    raise typer.Exit(int(failed))


@commands.command()
def search(
    features: Annotated[Path, typer.Argument(metavar="FEATURES", help="A file that embed wrote.", show_default=False)],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for.", show_default=False)],
    checkpoint: Checkpoint = None,
    variant: Variant = None,
    random_weights: RandomWeights = False,
    top: Top = 10,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Search stored videos by text.

    Prints the videos most similar to the query, by cosine. Without --checkpoint the one that the features were made
    with is read again.
    """
    if not query.strip():
        raise typer.BadParameter("the query is empty", param_hint="QUERY")
    from safetensors import safe_open

    metadata = features_file.read_metadata(features)
    if metadata is None:
        raise ValueError(f"{features}: not a file of features; `xclip-fast embed` writes them")
    if checkpoint is None:  # the model that made them, then
        variant = variant or metadata["variant"] or None
        if not random_weights and not metadata["checkpoint"]:
            raise ValueError(f"{features}: made with random weights; to search it nevertheless, add --random-weights")
        checkpoint = None if random_weights else Path(metadata["checkpoint"])
    target = device_and_dtype(device, dtype)
    model = load_model(checkpoint, variant, random_weights)
    identity = features_file.fingerprint(model)
    if identity != (made_with := metadata["fingerprint"]):
        raise ValueError(
            f"{features}: made with other weights ({metadata['checkpoint'] or 'random'}, {made_with[:12]}) "
            f"than {checkpoint or 'random'} ({identity[:12]}); search with the former, or embed the videos again"
        )
    model.to(**target)
    import torch

    from ..kernels import cosine_logits
    from ..nn.features import VideoFeatures

    names = json.loads(metadata["names"])
    like = model.logit_scale
    scores: list[Tensor] = []
    with torch.inference_mode(), safe_open(features, "pt") as file:
        text_1E = model.encode_text(query)
        video = file.get_slice("video")
        if video.get_shape()[0] != len(names):
            raise ValueError(
                f"{features}: damaged, {len(names)} names of {video.get_shape()[0]} videos; embed them again"
            )
        patches = file.get_slice("patches") if "patches" in set(file.keys()) else None
        for start in range(0, len(names), CHUNK):
            video_BE = video[start : start + CHUNK].to(like)
            if patches is None:
                logits_B1 = cosine_logits(video_BE, text_1E.expand(len(video_BE), 1, -1), like)
            else:
                found = VideoFeatures(video_BE, patches[start : start + CHUNK].to(like))
                logits_B1 = model.similarity(found, text_1E)
            scores.append(logits_B1[:, 0] / like.to(logits_B1.dtype).exp())
    if patches is None:
        print(f"note: {features} holds no patches: plain cosine, without video-specific prompts", file=sys.stderr)
    best = torch.cat(scores).topk(min(top, len(names)))
    hits = list(zip(best.values.tolist(), (names[index] for index in best.indices.tolist()), strict=True))
    if as_json:
        for score, name in hits:
            print(json.dumps({"video": name, "score": score, "random_weights": random_weights}))
    else:
        rows = [(str(rank), f"{score:.4f}", name) for rank, (score, name) in enumerate(hits, 1)]
        print_rows(None, ("rank", "score", "video"), rows)
