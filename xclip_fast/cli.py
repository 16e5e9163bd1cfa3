"""The command line: ``xclip-fast classify | embed | search | index | transcode | train | evaluate | ...``.

Answers go to standard output: tables on a terminal, tab-separated lines in a pipe, JSON if asked for. Everything else
goes to standard error. Exit codes: 0, 1 where something failed, 2 for wrong arguments, 130 after Ctrl-C. What a command
needs it imports itself, so that ``--help`` is quick.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from . import features as features_file
from .console import Bar, complain, plain, print_rows

if TYPE_CHECKING:
    from torch import Tensor

    from .model import XCLIP, VideoFeatures

app = typer.Typer(
    help="X-CLIP video recognition: classify, embed and search video files; train and evaluate.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # errors stay one line, help stays plain in a pipe
    pretty_exceptions_enable=False,
)

# In a folder: what looks like a video and is not hidden.
_VIDEO = re.compile(r"[^.].*\.(3gp|avi|flv|m4v|mkv|mov|mp4|mpe?g|mts|ogv|ts|webm|wmv)", re.IGNORECASE | re.DOTALL)
_HEADINGS = {"name", "label", "labels", "class", "classname"}  # of a CSV's column of labels
_CHUNK = 1024  # labels or stored videos at once: bounds memory, whatever their number

Videos = Annotated[
    list[str], typer.Argument(metavar="VIDEO...", help="Video files, or folders of them.", show_default=False)
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", "-c", metavar="PATH", help="Weights: ours, Hugging Face's, VideoX's or an image CLIP's."
    ),
]
Variant = Annotated[str | None, typer.Option(metavar="NAME", help="Shape, such as B/16-8f, if not the checkpoint's.")]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Go without a checkpoint; answers mean nothing.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Precision; auto is bfloat16 where the hardware has matrix instructions for it."),
]
Templates = Annotated[
    bool | None,
    typer.Option("--templates/--no-templates", help="Average each label over 16 sentences; default: as trained."),
]
Sampled = Annotated[
    Literal["sparse", "dense"] | None, typer.Option(help="How frames are taken; default: as trained, or sparse.")
]
Stride = Annotated[int | None, typer.Option(min=1, help="Frames between frames of a dense view; default: as trained.")]
Frames = Annotated[int | None, typer.Option(min=1, max=1024, help="Frames of a video; default: the checkpoint's.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Videos at once; default: 16 on a GPU, 1 on a CPU.")]
Workers = Annotated[int | None, typer.Option(min=1, max=256, help="Decoding threads; default: one per core.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Top = Annotated[int, typer.Option(min=1, help="How many to print.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.command()
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

    from .trained import Trained

    trained = Trained.read(checkpoint)
    names = list(trained.labels.values()) if labels is None else _labels(labels)
    if not names:
        raise typer.BadParameter(
            "none given, and the checkpoint does not say which it was trained with", param_hint="--labels"
        )
    chosen = trained.choose(frames, sampling, stride, templates)
    sentences = chosen.pop("templates")
    paths, failed = _videos(videos)
    place = _place(device, dtype)
    model = _load(checkpoint, variant, random_weights).to(**place)
    outputs = model.config.num_classes
    if outputs is not None and (sentences or outputs != len(names)):
        raise ValueError(
            f"the model has a linear head and reads no text; --labels must name its {outputs} outputs in order "
            f"({len(names)} given), without --templates"
        )

    with torch.inference_mode(), Bar(len(paths)) as bar:
        text: Sequence[Tensor | None] = [None]
        if outputs is None:
            chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]
            text = [
                model.encode_text_ensemble(chunk, sentences) if sentences else model.encode_text(chunk)
                for chunk in chunks
            ]

        def answer(found: VideoFeatures) -> tuple[Tensor]:
            return (torch.cat([model.similarity(found, part_KE) for part_KE in text], dim=1).softmax(-1),)

        for path, result in _run(model, paths, chosen, batch_size, workers, answer, bar):
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


@app.command()
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

    from .config import VARIANTS
    from .trained import Trained

    features_file.check_out(out, overwrite)
    chosen = Trained.read(checkpoint).choose(frames, sampling, stride)
    del chosen["templates"]
    paths, failed = _videos(videos)
    place = _place(device, dtype)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent) as folder:  # an unwritable place fails early
        model = _load(checkpoint, variant, random_weights)
        identity = features_file.fingerprint(model)
        model.to(**place)
        import torch
        from safetensors.torch import save_file

        kept: list[str] = []
        tensors: dict[str, Tensor] = {}
        with torch.inference_mode(), Bar(len(paths)) as bar:
            for path, result in _run(model, paths, chosen, batch_size, workers, lambda found: found, bar):
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


@app.command()
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
    place = _place(device, dtype)
    model = _load(checkpoint, variant, random_weights)
    identity = features_file.fingerprint(model)
    if identity != (made_with := metadata["fingerprint"]):
        raise ValueError(
            f"{features}: made with other weights ({metadata['checkpoint'] or 'random'}, {made_with[:12]}) "
            f"than {checkpoint or 'random'} ({identity[:12]}); search with the former, or embed the videos again"
        )
    model.to(**place)
    import torch

    from .kernels import cosine_logits
    from .model import VideoFeatures

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
        for start in range(0, len(names), _CHUNK):
            video_BE = video[start : start + _CHUNK].to(like)
            if patches is None:
                logits_B1 = cosine_logits(video_BE, text_1E.expand(len(video_BE), 1, -1), like)
            else:
                found = VideoFeatures(video_BE, patches[start : start + _CHUNK].to(like))
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


@app.command()
def index(
    source: Annotated[
        Path, typer.Argument(metavar="DIR|LIST", help="A folder of videos, a list, or tar shards.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: beside the data.")] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names: a csv of id,name or one name a line.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which part: val, train1, test3, or a subfolder.")] = None,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="What a list's paths are relative to.")] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="folder, flat, lines, kinetics, ucf101, hmdb51 or tar; default: by content."),
    ] = None,
    reuse: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another manifest of the same files. May be repeated.")
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Symbolic links may lead out of the data folder.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="A file that takes longer is given up.")] = 120,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read; default: one per core.")] = None,
) -> None:
    """Look at every video of a data set once and write a manifest.

    A second run looks only at what is new or changed, and a killed one goes on. Videos that cannot be used are listed
    with the reason.
    """
    from .data import manifest

    out = out or manifest.default_out(source, split)
    with Bar() as bar:
        found = manifest.index(
            source,
            out,
            labels=labels,
            split=split,
            root=root,
            format=form,
            reuse=reuse or (),
            follow_links=follow_links,
            workers=workers,
            timeout=timeout,
            progress=bar.update,
        )
    print(manifest.summary(found))
    print(f"written: {plain(str(out))}")
    raise typer.Exit(int(not len(found.usable)))


@app.command()
def transcode(
    source: Annotated[Path, typer.Argument(metavar="DIR|VIDEO", help="What to copy.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the copies go.", show_default=False)],
    short_side: Annotated[int, typer.Option(min=16, help="Pixels; smaller videos keep their size.")] = 256,
    keyframe_every: Annotated[int, typer.Option(min=1, help="Frames from one keyframe to the next.")] = 12,
    crf: Annotated[float, typer.Option(min=0, max=51, help="x264's quality; lower is better and larger.")] = 20,
    preset: Annotated[str, typer.Option(help="x264's effort.")] = "veryfast",
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads; default: one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace copies made with other settings.")] = False,
) -> None:
    """Copy videos into a form that decodes fast.

    H.264, short side at most 256, a keyframe every 12 frames, upright; frame for frame the same. Training reads a few
    frames of each video again and again, which then costs a fraction. Sources are never touched; a killed run goes on.
    """
    from .data.transcode import transcode as run

    with Bar() as bar:
        summary = run(
            source,
            out,
            short_side=short_side,
            keyframe_every=keyframe_every,
            crf=crf,
            preset=preset,
            workers=workers,
            overwrite=overwrite,
            progress=bar.update,
        )
    for name, reason in summary.damaged.items():
        print(f"note: {plain(name)}: damaged: {plain(reason)}", file=sys.stderr)
    for name, reason in summary.failed.items():
        complain(reason if name in reason else f"{name}: {reason}")
    print(f"{plain(str(out))}: {summary}")
    raise typer.Exit(int(bool(summary.failed)))


@app.command()
def motion(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets train and test in it.", show_default=False)],
    clips: Annotated[int, typer.Option(min=1, help="Training clips of each of the ten classes.")] = 1000,
    test_clips: Annotated[int, typer.Option(min=1, help="Test clips of each class.")] = 100,
    size: Annotated[int, typer.Option(min=16, help="Pixels of a side.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Other clips with another.")] = 0,
) -> None:
    """Generate clips whose classes differ in the order of their frames.

    Small mp4 files with manifests, to try training on: `xclip-fast train motion` takes them from data/motion.
    """
    from .data import manifest
    from .data.motion import CLASSES, write_dataset

    for number, (split, count) in enumerate({"train": clips, "test": test_clips}.items()):
        with Bar() as bar:
            write_dataset(folder / split, count, 2 * seed + number, size=(size, size), progress=bar.update)
        manifest.index(folder / split, labels=CLASSES)
        print(f"{plain(str(folder / split))}: {count * len(CLASSES)} clips of {len(CLASSES)} classes")


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Such as optim.lr=1e-5.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder instead of going on.")] = False,
) -> None:
    """Train or fine-tune.

    On several GPUs: torchrun --nproc-per-node 8 -m xclip_fast.train CONFIG KEY=VALUE...
    """
    from .train import main as run

    run(config, overrides or (), fresh=fresh)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Weights.", show_default=False)],
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="What `index` wrote.", show_default=False)],
    clips: Annotated[int, typer.Option(min=1, help="Views in time; the paper's test has 4.")] = 1,
    crops: Annotated[int, typer.Option(help="Views in space, 1 or 3; the paper's test has 3.")] = 1,
    labels: Annotated[
        str | None, typer.Option(help="Labels to choose from (as for classify); default: the manifest's classes.")
    ] = None,
    templates: Templates = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For predictions, confusion and summary.")] = None,
    overwrite: Overwrite = False,
    variant: Variant = None,
    frames: Frames = None,
    sampling: Sampled = None,
    stride: Stride = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Views at once.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="Decoding processes; 0: none.")] = None,
) -> None:
    """Measure accuracy on the videos of a manifest.

    Softmax is averaged over the views. Every video is accounted for: those that could not be read are named.
    """
    from . import evaluate as evaluation

    result = evaluation.main(
        checkpoint,
        manifest,
        out=out,
        overwrite=overwrite,
        clips=clips,
        crops=crops,
        frames=frames,
        sampling=sampling,
        stride=stride,
        labels=None if labels is None else _labels(labels),
        templates=templates,
        variant=variant,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        workers=workers,
    )
    raise typer.Exit(int(result is not None and bool(result.failed)))


@app.command()
def protocol(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PROTOCOL",
            help="zero-shot-hmdb51, zero-shot-ucf101, zero-shot-kinetics600, few-shot-hmdb51 or few-shot-ucf101.",
            show_default=False,
        ),
    ],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Weights.", show_default=False)],
    manifests: Annotated[
        list[Path],
        typer.Argument(metavar="MANIFEST...", help="The test splits: zero-shot three, otherwise one."),
    ],
    shots: Annotated[int | None, typer.Option(min=1, help="How many the checkpoint was trained on.")] = None,
    draws: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A released class list of a draw. May be repeated.")
    ] = None,
    kinetics400: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Kinetics-400's class names, to draw new ones of Kinetics-600.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For everything that was found.")] = None,
    overwrite: Overwrite = False,
    variant: Variant = None,
    frames: Frames = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Views at once.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="Decoding processes; 0: none.")] = None,
) -> None:
    """Run a zero-shot or few-shot protocol of the paper.

    Prints mean and deviation beside the paper's figures (Tables 3 to 5).
    """
    from . import protocols

    protocols.main(
        name,
        checkpoint,
        manifests,
        out=out,
        overwrite=overwrite,
        shots=shots,
        draws=draws or (),
        kinetics400=kinetics400,
        seed=seed,
        variant=variant,
        frames=frames,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        workers=workers,
    )


@app.command("few-shot")
def few_shot(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The training videos.", show_default=False)],
    shots: Annotated[int, typer.Option(min=1, help="Videos a class; the paper has 2, 4, 8 and 16.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help=".jsonl: a manifest to train on; .json, .csv: a list to keep.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Draw K videos of each class."""
    from . import protocols

    drawn = protocols.sample(manifest, shots, out, seed=seed, overwrite=overwrite)
    print(f"{plain(str(out))}: {drawn} videos, {shots} a class")


@app.command()
def flops(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the parts.")] = False) -> None:
    """Count multiply-adds, beside the paper's.

    In 10^9 for one video: Table 1's number, ours counted the paper's way, what really runs here with 1 and with 400
    labels, and what 400 labels cost where each is padded to 77 tokens.
    """
    from .flops import table

    rows = table()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = [name for name in rows[0] if name not in ("variant", "parts")]
    cells = [(str(row["variant"]), *(f"{row[name]:.1f}" for name in columns)) for row in rows]
    print_rows(None, ("variant", *columns), cells, header_in_pipe=True)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A checkpoint of any layout, file or folder.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.", show_default=False)],
    layout: Annotated[Literal["xclip_fast", "huggingface"], typer.Option(help="Whose names and files.")] = "xclip_fast",
    drop_config: Annotated[
        bool, typer.Option("--drop-config", help="Leave out a pickled training configuration.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite a checkpoint as safetensors."""
    from . import checkpoint
    from .trained import Trained

    trained = Trained.read(source)
    checkpoint.convert(source, folder, layout, drop_config=drop_config, overwrite=overwrite)
    if trained != Trained():
        trained.write(folder)
    print(f"{plain(str(folder))}: written in the layout {layout}")


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices and backends."""
    from .info import show

    show(as_json)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console's entry point: runs a command and leaves with its exit code; errors are a line, not a traceback."""
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 -- closed by the caller
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a label that the terminal cannot show is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(args=None if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who read our output has gone; nothing may complain at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, MemoryError) as error:
        complain(error)
    except RuntimeError as error:
        if not _expected(error):
            raise
        complain(error)
    sys.exit(1)


def _expected(error: RuntimeError) -> bool:
    """Is it the machine's or the user's doing: memory that is short, a device that fails, a backend that refuses?"""
    from .kernels import BackendError

    words = ("out of memory", "not enough memory", "can't allocate memory", "CUDA error")
    return isinstance(error, BackendError) or any(word in str(error) for word in words)


def _labels(given: str) -> list[str]:
    """The labels of ``--labels``: without blanks around them, empty ones and repetitions."""

    def bad(message: str) -> typer.BadParameter:
        return typer.BadParameter(message, param_hint="--labels")

    suffix = Path(given).suffix.lower()
    if suffix in (".txt", ".csv"):
        try:
            text = Path(given).read_text(encoding="utf-8-sig")
            found = text.split("\n") if suffix == ".txt" else _column(list(csv.reader(io.StringIO(text, newline=""))))
        except OSError as error:
            raise bad(f"{given}: cannot be read: {error.strerror}") from error
        except (ValueError, csv.Error) as error:
            raise bad(f"{given}: {'not UTF-8 text' if isinstance(error, UnicodeDecodeError) else error}") from error
    elif suffix and "," not in given and os.path.isfile(given):
        raise bad(f"{given}: a file of labels is a .txt or a .csv")
    else:
        found = given.split(",")
    stripped = [label for name in found if (label := name.strip())]
    labels = list(dict.fromkeys(stripped))
    if not labels:
        raise bad(f"{given!r} holds no label")
    if len(labels) < len(stripped):
        print(f"note: {len(stripped) - len(labels)} labels are repetitions, taken once", file=sys.stderr)
    return labels


def _column(rows: list[list[str]]) -> list[str]:
    """The labels of a CSV: its only column, the one headed "name" or the like, or the one after a column of numbers."""
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        return []
    heads = [cell.strip().lower() for cell in rows[0]]
    column = next((index for index, head in enumerate(heads) if head in _HEADINGS), None)
    first = 0 if column is None else 1
    if column is None and len(heads) == 2 and heads[0].isdecimal():
        column = 1
    elif column is None and len(heads) > 1:
        raise ValueError("its first line wants a column called name (or label, or class), or it wants one column only")
    for number, row in enumerate(rows, 1):
        if len(row) != len(heads):
            raise ValueError(
                f"row {number} has {len(row)} columns and the first {len(heads)}; quote labels with commas"
            )
    return [row[column or 0] for row in rows[first:]]


def _videos(given: Sequence[str]) -> tuple[list[str], bool]:
    """The files that are meant, those of a folder and the folders in it sorted; and whether a folder has none."""
    paths: list[str] = []
    failed = False
    for name in given:
        if not name:
            raise typer.BadParameter("an empty name", param_hint="VIDEO...")
        if not os.path.isdir(name):
            paths.append(name)
            continue
        inside: list[str] = []
        for folder, folders, files in os.walk(name):
            folders[:] = [each for each in folders if not each.startswith(".")]
            inside += [os.path.join(folder, each) for each in files if _VIDEO.fullmatch(each)]
        paths += sorted(inside)
        if not inside:
            failed = complain(f"{name}: no video file in this folder")
    if not paths:
        raise typer.Exit(1)
    return paths, failed


def _place(device: str, dtype: str) -> dict[str, Any]:
    """``device`` and ``dtype`` as arguments of ``Module.to``."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda, cuda:N", param_hint="--device")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        from .info import collect_cuda

        cuda = collect_cuda()
        raise ValueError(f"--device {device}: {cuda['reason'] or 'there are only ' + str(len(cuda['devices']))}")
    if dtype != "auto":
        return {"device": device, "dtype": getattr(torch, dtype)}
    from .evaluation_setup import automatic_dtype

    return {"device": device, "dtype": automatic_dtype(torch.device(device))}


def _load(checkpoint: Path | None, variant: str | None, random_weights: bool) -> XCLIP:
    """The model on the CPU, in the checkpoint's own precision."""
    if (checkpoint is None) != random_weights:
        why = "not with --random-weights" if checkpoint else "no weights given; for trials, --random-weights needs none"
        raise typer.BadParameter(why, param_hint="--checkpoint")
    import torch

    from . import config
    from .model import XCLIP

    try:
        shape = None if variant is None else config.variant(variant)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--variant") from error
    torch.manual_seed(0)  # what the checkpoint does not hold is the same in every run
    if checkpoint is not None:
        return XCLIP.from_pretrained(checkpoint, config=shape)
    print("warning: random weights: the answers mean nothing", file=sys.stderr)
    return XCLIP(shape or config.VARIANTS["B/16-8f"]).eval()


def _run(
    model: XCLIP,
    paths: list[str],
    chosen: dict[str, Any],
    batch_size: int | None,
    workers: int | None,
    answer: Callable[[VideoFeatures], Sequence[Tensor]],
    bar: Bar,
) -> Iterator[tuple[str, list[Tensor] | ValueError]]:
    """Each path in order with its part of the batch's ``answer``, on the CPU, or with what is wrong with the video.

    ``chosen``: frames (None: the model's), sampling and stride. Threads decode ahead while the model computes.
    """
    import torch

    from .data.decode import decode_many

    config, device = model.config, next(model.parameters()).device
    batch = batch_size or (1 if device.type == "cpu" else 16)
    waiting: list[tuple[str, Any]] = []
    videos: list[Tensor] = []
    chosen = chosen | {"frames": chosen["frames"] or config.num_frames, "size": config.vision.image_size}
    decoded = decode_many(paths, **chosen, workers=workers, errors="return")
    for done, (path, found) in enumerate(zip(paths, decoded, strict=True), 1):
        waiting.append((path, found))
        if not isinstance(found, ValueError):
            videos.append(found)
        if len(videos) < batch and done < len(paths):
            continue
        answers = [part.cpu() for part in answer(model.encode_video(torch.stack(videos).to(device)))] if videos else []
        row = 0
        for waited, item in waiting:
            bar.advance()
            if isinstance(item, ValueError):
                yield waited, item
                continue
            own, row = [part[row] for part in answers], row + 1
            finite = all(part.isfinite().all() for part in own)
            yield waited, own if finite else ValueError(f"{waited}: the answer is not a number; try --dtype float32")
        waiting, videos = [], []


if __name__ == "__main__":
    main()
