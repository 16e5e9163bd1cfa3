"""Options that several commands have, and the meaning of their values."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..console import complain

if TYPE_CHECKING:
    from ..data.inputs import Inputs
    from ..model import XCLIP
    from ..weights.recipe import Trained

CHUNK = 1024  # labels or stored videos at once: bounds memory, whatever their number

Videos = Annotated[
    list[str],
    typer.Argument(
        metavar="VIDEO...",
        help="Files, folders, quoted globs, lists (.txt, .jsonl), addresses; - for paths on standard input.",
        show_default=False,
    ),
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
FrameStride = Annotated[
    int | None, typer.Option(min=1, help="Frames between frames of a dense view; default: as trained.")
]
Window = Annotated[float | None, typer.Option(metavar="SECONDS", help="Length of a moment of a long video.")]
Stride = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="From one moment's start to the next; default: half a window.")
]
OnRay = Annotated[bool, typer.Option("--ray", help="Spread the work with Ray, over the machines of a cluster.")]
Address = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Of a running Ray cluster, or auto; default: this machine alone.")
]
Actors = Annotated[int | None, typer.Option(min=1, help="Models on the cluster; default: one per GPU.")]
Decoders = Annotated[int | None, typer.Option(min=1, help="Files decoded at once on the cluster; default: by CPUs.")]
MaxBytes = Annotated[int, typer.Option(min=1, help="A remote file that is larger is given up.")]
MaxSeconds = Annotated[float, typer.Option(min=0.1, help="A remote file that takes longer to copy is given up.")]
Frames = Annotated[int | None, typer.Option(min=1, max=1024, help="Frames of a video; default: the checkpoint's.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Videos at once; default: 16 on a GPU, 1 on a CPU.")]
Workers = Annotated[int | None, typer.Option(min=1, max=256, help="Decoding threads; default: one per core.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads of the model on a CPU; default: one per core.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Top = Annotated[int, typer.Option(min=1, help="How many to print.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def parse_labels(given: str) -> list[str]:
    """The labels of ``--labels``: without blanks around them, empty ones and repetitions."""

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
        raise bad(f"{given}: a file of labels is a .txt, a .csv or a .tsv")
    else:
        found = given.split(",")
    stripped = [label for name in found if (label := name.strip())]
    labels = list(dict.fromkeys(stripped))
    if not labels:
        raise bad(f"{given!r} holds no label")
    if len(labels) < len(stripped):
        print(f"note: {len(stripped) - len(labels)} labels are repetitions, taken once", file=sys.stderr)
    return labels


def find_videos(given: Sequence[str]) -> tuple[Inputs, bool]:
    """The files that are meant; and whether a folder or glob has none."""
    from ..data.inputs import find_videos as find

    if "" in given:
        raise typer.BadParameter("an empty name", param_hint="VIDEO...")
    inputs = find(given)
    failed = False
    for line in inputs.empty:
        failed |= complain(line)
    if not inputs.paths and not inputs.folders:
        raise typer.Exit(1)
    return inputs, failed


def device_and_dtype(device: str, dtype: str) -> dict[str, Any]:
    """``device`` and ``dtype`` as arguments of ``Module.to``."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda, cuda:N", param_hint="--device")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        from ..info import collect_cuda

        cuda = collect_cuda()
        raise ValueError(f"--device {device}: {cuda['reason'] or 'there are only ' + str(len(cuda['devices']))}")
    if dtype != "auto":
        return {"device": device, "dtype": getattr(torch, dtype)}
    from ..inference.placement import automatic_dtype

    return {"device": device, "dtype": automatic_dtype(torch.device(device))}


def set_threads(threads: int | None) -> None:
    """Lets torch compute with ``threads`` threads of the CPU; None: as it chose."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def read_recipe(checkpoint: Path | None) -> Trained:
    """What the checkpoint was trained with; a checkpoint without weights is refused before anything else."""
    from ..weights.checkpoint import find_weights
    from ..weights.recipe import Trained

    if checkpoint is not None:
        find_weights(checkpoint)
    return Trained.read(checkpoint)


def load_model(checkpoint: Path | None, variant: str | None, random_weights: bool) -> XCLIP:
    """The model on the CPU, in the checkpoint's own precision."""
    if (checkpoint is None) != random_weights:
        why = "not with --random-weights" if checkpoint else "no weights given; for trials, --random-weights needs none"
        raise typer.BadParameter(why, param_hint="--checkpoint")
    import torch

    from .. import config
    from ..model import XCLIP

    try:
        shape = None if variant is None else config.variant(variant)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--variant") from error
    torch.manual_seed(0)  # what the checkpoint does not hold is the same in every run
    if checkpoint is not None:
        return XCLIP.from_pretrained(checkpoint, config=shape)
    print("warning: random weights: the answers mean nothing", file=sys.stderr)
    return XCLIP(shape or config.VARIANTS["B/16-8f"]).eval()


def stored_weights(
    place: Path, checkpoint: Path | None, variant: str | None, random_weights: bool
) -> tuple[Path | None, str | None]:
    """The checkpoint and variant that a store or a file of features was made with, unless others are given."""
    from ..search.feature_file import FeatureFile
    from ..search.store import Store

    if checkpoint is not None:
        return checkpoint, variant
    if place.is_dir():
        made_with = Store.open(place).settings
        stored, shape = made_with.checkpoint, made_with.variant
    else:
        metadata = FeatureFile(place).metadata
        stored, shape = metadata["checkpoint"], metadata["variant"]
    if not random_weights and not stored:
        raise ValueError(f"{place}: made with random weights; to use it nevertheless, add --random-weights")
    return (None if random_weights else Path(stored)), variant or shape or None
