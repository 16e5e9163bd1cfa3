"""Options that several commands share, and functions that read their values."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click
from click.core import ParameterSource

from ..console import complain

if TYPE_CHECKING:
    from ..data.inputs import Inputs
    from ..data.remote import Limits
    from ..model import XCLIP
    from ..scale.cluster import ClusterOptions
    from ..scale.stage import ModelSpec
    from ..search.page import Page


class FilePath(click.Path):
    """A path, which may be missing: what opens a file tells better why it cannot. It is not empty (``"$UNSET"``)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) if value else self.fail("a name is empty", param, ctx)


class FloatRange(click.FloatRange):
    """A number between limits. NaN is refused: click compares it with both limits, and neither comparison holds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return self.fail("nan is not a number", param, ctx) if math.isnan(number) else number


PATH = FilePath(path_type=Path, readable=False)
COUNT = click.IntRange(1)


class Argument(click.Argument):
    """An argument with a help text. Those of click have one only from version 8.5 on."""

    def __init__(self, names: Sequence[str], *, text: str, **settings: Any):
        super().__init__(names, **settings)
        self.text = text


class Option(click.Option):
    """An option that does something only together with another one, ``needs``."""

    def __init__(self, names: Sequence[str], *, needs: str = "", **settings: Any):
        super().__init__(names, **settings)
        self.needs = needs


class Command(click.Command):
    """A command whose help describes its arguments, too. It refuses an option without the one that it needs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for each in self.params:
            needs = each.needs if isinstance(each, Option) else ""
            given = ctx.get_parameter_source(str(each.name)) is ParameterSource.COMMANDLINE
            if needs and given and not ctx.params[needs]:
                raise click.BadParameter(f"works only together with --{needs}", ctx, each)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if rows := [(each.make_metavar(ctx), each.text) for each in self.params if isinstance(each, Argument)]:
            with formatter.section("Arguments"):
                formatter.write_dl(rows)
        super().format_options(ctx, formatter)


command = functools.partial(click.command, cls=Command)


def argument(name: str, metavar: str, text: str, **settings: Any) -> Callable[..., Any]:
    return click.argument(name, metavar=metavar, text=text, cls=Argument, **settings)


def option(name: str, help: str, type: Any = None, *names: str, **settings: Any) -> Callable[..., Any]:
    return click.option(name, *names, help=help, type=type, cls=Option, **settings)


def flag(name: str, help: str, *names: str) -> Callable[..., Any]:
    return click.option(name, *names, help=help, is_flag=True)


def path(name: str, metavar: str, help: str, **settings: Any) -> Callable[..., Any]:
    return click.option(name, metavar=metavar, help=help, type=PATH, **settings)


def group(kind: Any, *options: Callable[..., Any]) -> Callable[..., Any]:
    """Adds options. The command gets their values as one ``kind``, a named tuple, under its name in lower case."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            values = {name: given.pop(name) for name in kind._fields}
            function(**given, **{kind.__name__.lower(): kind(**values)})

        return functools.reduce(lambda made, each: each(made), reversed(options), run)

    return decorate


VIDEOS = (
    "Video files, folders, globs in quotes, lists of paths (.txt, .jsonl), URLs, or - to read paths from standard "
    "input."
)
checkpoint = argument("checkpoint", "CHECKPOINT", "Weights, a file or folder.", type=PATH)
variant = option("--variant", "Model shape, such as B/16-8f. Default: the checkpoint's.", metavar="NAME")
device = option("--device", "Device of the model: auto, cpu, cuda or cuda:N.", default="auto")
dtype = option(
    "--dtype",
    "Precision. auto: bfloat16 if the hardware has matrix instructions for it, else float32.",
    click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
)
templates = option(
    "--templates/--no-templates", "Average each label over 16 sentences. Default: as in training.", default=None
)
frames = option(
    "--frames", "Frames that the model sees of a video. Default: the checkpoint's.", click.IntRange(1, 1024)
)
sampling = option(
    "--sampling",
    "sparse: frames over the whole video; dense: consecutive ones. Default: as in training.",
    click.Choice(["sparse", "dense"]),
)
frame_stride = option("--frame-stride", "With --sampling dense, take every Nth frame. Default: as in training.", COUNT)
threads = option("--threads", "CPU threads of the model. Default: one for each core.", click.IntRange(1, 1024))
as_json = flag("--json", "Print JSON, one object on each line.", "as_json")
views = option("--batch-size", "Views in a batch. Default: 64 on a GPU, 8 on a CPU.", click.IntRange(1, 65536))
processes = option(
    "--workers", "Decoding processes; 0: decode in this one. Default: by the number of cores.", click.IntRange(0, 1024)
)
html = path("--html", "FILE", "Also write a web page with pictures.")
overwrite = flag("--overwrite", "Replace existing output.")


class Model(NamedTuple):
    """The options of ``model``."""

    checkpoint: Path | None
    variant: str | None
    random_weights: bool
    device: str
    dtype: str

    def check(self) -> None:
        """Raises an error unless one of ``--checkpoint`` and ``--random-weights`` is given, and not both."""
        if (self.checkpoint is None) != self.random_weights:
            missing = "missing; for a trial without weights: --random-weights"
            why = "cannot go with --random-weights" if self.checkpoint else missing
            raise click.BadParameter(why, param_hint="--checkpoint")

    def load(self) -> XCLIP:
        """The model on the CPU, in the checkpoint's precision."""
        from ..inference.placement import load_model

        self.check()
        if self.random_weights:
            print("warning: random weights: the answers mean nothing", file=sys.stderr)
        return load_model(self.checkpoint, self.variant)

    def of_store(self, place: Path) -> Model:
        """With the given checkpoint and variant; without them, with those that a store was made with."""
        from ..search.store import Store

        made_with = Store.open(place).settings
        if self.checkpoint is not None:
            return self
        if not self.random_weights and not made_with.checkpoint:
            raise ValueError(f"{place}: was made with random weights; to use it all the same, add --random-weights")
        checkpoint = None if self.random_weights else Path(made_with.checkpoint)
        return self._replace(checkpoint=checkpoint, variant=self.variant or made_with.variant or None)


model = group(
    Model,
    click.option(
        "--checkpoint",
        "-c",
        metavar="PATH",
        type=PATH,
        help="Weights, a file, folder or name on the Hub: of xclip-fast, Hugging Face, VideoX, or an image CLIP.",
    ),
    variant,
    flag("--random-weights", "Use random weights, for a trial. The answers mean nothing."),
    device,
    dtype,
)


class Reading(NamedTuple):
    """The options of ``reading``."""

    frames: int | None
    sampling: Literal["sparse", "dense"] | None
    frame_stride: int | None
    window: float | None
    stride: float | None
    max_bytes: int
    max_seconds: float
    batch_size: int | None
    workers: int | None
    decoders: int | None
    threads: int | None

    def limits(self) -> Limits:
        from ..data.remote import Limits

        return Limits(self.max_bytes, self.max_seconds)


reading = group(
    Reading,
    frames,
    sampling,
    frame_stride,
    option("--window", "Cut longer videos into moments of this length.", float, metavar="SECONDS"),
    option("--stride", "From the start of a moment to the next. Default: half of --window.", float, metavar="SECONDS"),
    option("--max-bytes", "Give up on a remote file that is larger.", COUNT, default=2 << 30, show_default="2 GiB"),
    option("--max-seconds", "Give up on a remote file that takes longer to copy.", FloatRange(0.1), default=600),
    option("--batch-size", "Videos in a batch. Default: 16 on a GPU, 1 on a CPU.", click.IntRange(1, 65536)),
    option("--workers", "Decoding threads. Default: one for each core.", click.IntRange(1, 256)),
    option("--decoders", "Files decoded at once on the Ray cluster. Default: by its CPUs.", COUNT, needs="ray"),
    threads,
)


class Ray(NamedTuple):
    """The options of ``ray``."""

    ray: bool
    address: str | None
    actors: int | None

    def cluster(
        self, model: Model, decoders: int | None = None, batch_size: int | None = None
    ) -> tuple[ModelSpec, ClusterOptions]:
        """The model and the cluster of ``--ray``."""
        from ..scale.cluster import ClusterOptions
        from ..scale.stage import ModelSpec

        checkpoint = None if model.checkpoint is None else str(model.checkpoint.absolute())
        spec = ModelSpec(checkpoint, model.variant, model.device, model.dtype)
        return spec, ClusterOptions(self.address, self.actors, decoders=decoders, batch_size=batch_size or 16)


ray = group(
    Ray,
    flag("--ray", "Spread the work over a Ray cluster."),
    option(
        "--address",
        "Address of a running Ray cluster, or auto. Default: this machine alone.",
        metavar="ADDRESS",
        needs="ray",
    ),
    option("--actors", "Models on the cluster. Default: one for each GPU.", COUNT, needs="ray"),
)


def parse_labels(given: str) -> list[str]:
    """The labels of ``--labels``, stripped, without empty ones and repetitions."""

    def bad(message: str) -> click.BadParameter:
        return click.BadParameter(message, param_hint="--labels")

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

    inputs = find(given or ())
    failed = False
    for line in inputs.empty:
        failed |= complain(line)
    if not inputs.paths and not inputs.folders:
        sys.exit(1)
    return inputs, failed


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
