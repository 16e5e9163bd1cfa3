"""Options that several commands share, and functions that read their values."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..console import complain

if TYPE_CHECKING:
    from ..data.inputs import Inputs
    from ..model import XCLIP
    from ..scale.cluster import ClusterOptions
    from ..scale.stage import ModelSpec
    from ..search.page import Page


Videos = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="VIDEO",
        help="Video files, folders, globs in quotes, lists of paths (.txt, .jsonl), URLs, or - to read paths from "
        "standard input.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="PATH",
        help="Weights, a file, folder or name on the Hub: of xclip-fast, Hugging Face, VideoX, or an image CLIP.",
    ),
]
Variant = Annotated[
    str | None, typer.Option(metavar="NAME", help="Model shape, such as B/16-8f. Default: the checkpoint's.")
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Use random weights, for a trial. The answers mean nothing.")
]
Device = Annotated[str, typer.Option(help="Device of the model: auto, cpu, cuda or cuda:N.")]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Precision. auto: bfloat16 if the hardware has matrix instructions for it, else float32."),
]
Templates = Annotated[
    bool | None,
    typer.Option("--templates/--no-templates", help="Average each label over 16 sentences. Default: as in training."),
]
Sampled = Annotated[
    Literal["sparse", "dense"] | None,
    typer.Option(help="sparse: frames over the whole video; dense: consecutive ones. Default: as in training."),
]
FrameStride = Annotated[
    int | None, typer.Option(min=1, help="With --sampling dense, take every Nth frame. Default: as in training.")
]
Window = Annotated[float | None, typer.Option(metavar="SECONDS", help="Cut longer videos into moments of this length.")]
Stride = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="From the start of a moment to the next. Default: half of --window."),
]
OnRay = Annotated[bool, typer.Option("--ray", help="Spread the work over a Ray cluster.")]
Address = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Address of a running Ray cluster, or auto. Default: this machine alone."),
]
Actors = Annotated[int | None, typer.Option(min=1, help="Models on the cluster. Default: one for each GPU.")]
Decoders = Annotated[
    int | None, typer.Option(min=1, help="Files decoded at once on the cluster. Default: by its CPUs.")
]
MaxBytes = Annotated[int, typer.Option(min=1, help="Give up on a remote file that is larger.", show_default="2 GiB")]
MaxSeconds = Annotated[float, typer.Option(min=0.1, help="Give up on a remote file that takes longer to copy.")]
Frames = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Frames that the model sees of a video. Default: the checkpoint's.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, max=65536, help="Videos in a batch. Default: 16 on a GPU, 1 on a CPU.")
]
Workers = Annotated[int | None, typer.Option(min=1, max=256, help="Decoding threads. Default: one for each core.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads of the model. Default: one for each core.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object on each line.")]
Top = Annotated[int, typer.Option(min=1, help="Number of answers to print.")]
EvalBatchSize = Annotated[
    int | None, typer.Option(min=1, max=65536, help="Views in a batch. Default: 64 on a GPU, 8 on a CPU.")
]
EvalWorkers = Annotated[
    int | None,
    typer.Option(min=0, max=1024, help="Decoding processes; 0: decode in this one. Default: by the number of cores."),
]
Weights = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Weights, a file or folder.")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a web page with pictures.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]


def parse_labels(given: str) -> list[str]:
    """The labels of ``--labels``, stripped, without empty ones and repetitions."""

    def bad(message: str) -> typer.BadParameter:
        return typer.BadParameter(message, param_hint="--labels")

    from ..data.manifest.labels import SUFFIXES, label_rows

    suffix = Path(given).suffix.lower()
    if suffix in SUFFIXES:
        try:
            found = [name for _, name in label_rows(given)]
        except OSError as error:
            raise bad(f"{given}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise bad(str(error)) from error
    elif suffix and "," not in given and os.path.isfile(given):
        raise bad(f"{given}: a file of labels ends in .txt, .csv or .tsv")
    else:
        found = given.split(",")
    stripped = [label for name in found if (label := name.strip())]
    labels = list(dict.fromkeys(stripped))
    if not labels:
        raise bad(f"{given!r} holds no label")
    if len(labels) < len(stripped):
        print(f"note: {len(stripped) - len(labels)} repeated labels are left out", file=sys.stderr)
    return labels


def find_videos(given: Sequence[str] | None) -> tuple[Inputs, bool]:
    """The video files of the arguments, and whether a folder or glob holds none or cannot be listed."""
    from ..data.inputs import find_videos as find

    if "" in (given or ()):
        raise typer.BadParameter("a name is empty", param_hint="VIDEO")
    inputs = find(given or ())
    failed = False
    for line in inputs.empty:
        failed |= complain(line)
    if not inputs.paths and not inputs.folders:
        raise typer.Exit(1)
    return inputs, failed


def cluster(
    checkpoint: Path | None,
    variant: str | None,
    device: str,
    dtype: str,
    address: str | None,
    actors: int | None,
    decoders: int | None = None,
    batch_size: int | None = None,
) -> tuple[ModelSpec, ClusterOptions]:
    """The model and the cluster of ``--ray``."""
    from ..scale.cluster import ClusterOptions
    from ..scale.stage import ModelSpec

    spec = ModelSpec(None if checkpoint is None else str(checkpoint.absolute()), variant, device, dtype)
    return spec, ClusterOptions(address, actors, decoders=decoders, batch_size=batch_size or 16)


def open_page(html: Path | None, overwrite: bool, random_weights: bool) -> Page | None:
    """The web page of ``--html``, if it is given."""
    if html is None:
        return None
    from ..search.page import Page

    return Page(html, overwrite=overwrite, random_weights=random_weights)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For imports of torch: Python's garbage collector is off, and never looks at what was imported.

    Does nothing if torch was imported before: then the process may be another program's.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def set_threads(threads: int | None) -> None:
    """Sets the number of CPU threads of torch; None leaves torch's default."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_weights(checkpoint: Path | None, random_weights: bool) -> None:
    """Raises an error unless one of ``--checkpoint`` and ``--random-weights`` is given, and not both."""
    if (checkpoint is None) != random_weights:
        why = (
            "cannot go with --random-weights"
            if checkpoint
            else "missing; for a trial without weights: --random-weights"
        )
        raise typer.BadParameter(why, param_hint="--checkpoint")


def load_model(checkpoint: Path | None, variant: str | None, random_weights: bool) -> XCLIP:
    """The model on the CPU, in the checkpoint's precision."""
    check_weights(checkpoint, random_weights)
    from .. import config
    from ..inference import placement

    if variant is not None and variant not in config.VARIANTS:
        raise typer.BadParameter(f"{variant!r} is none of {', '.join(config.VARIANTS)}", param_hint="--variant")
    if random_weights:
        print("warning: random weights: the answers mean nothing", file=sys.stderr)
    return placement.load_model(checkpoint, variant)


def stored_weights(
    place: Path, checkpoint: Path | None, variant: str | None, random_weights: bool
) -> tuple[Path | None, str | None]:
    """The given checkpoint and variant; without them, those that a store was made with."""
    from ..search.store import Store

    made_with = Store.open(place).settings
    if checkpoint is not None:
        return checkpoint, variant
    if not random_weights and not made_with.checkpoint:
        raise ValueError(f"{place}: was made with random weights; to use it all the same, add --random-weights")
    return (None if random_weights else Path(made_with.checkpoint)), variant or made_with.variant or None
