"""Throughput of X-CLIP beside the paper's Table 1 and Hugging Face's model, measured in one run.

    python benchmarks/throughput.py                        # defaults: minutes on a CPU, everything on a GPU
    python benchmarks/throughput.py --variants B/16-8f --precisions bf16 --seconds 600 --json out.json --plot out.png

Each row is one kind of work on one batch of videos and K labels. README.md beside this file explains the measurement
and the columns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import arguments
import cpu_engines
import measuring
import torch
import torch.nn.functional as F
from arguments import chosen, fail
from measuring import largest_error, ratio_text, ratios
from torch import Tensor

import xclip_fast
from xclip_fast import flops
from xclip_fast.config import PAPER_TABLE1, VARIANTS, VisionConfig, XCLIPConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # between outputs of the same random weights
WORKS = {  # in this order: the longest last, when the weights are warm
    "tower": "video tower",
    "cached": "labels cached",
    "files": "from mp4 files",
    "encoded": "labels encoded",
}
OURS, GRAPHED, FP8 = "xclip-fast", "xclip-fast graph", "xclip-fast fp8"
DECODING, COMPUTING = "decoding alone", "model alone"  # of "from mp4 files", in which both run at once
EAGER, COMPILED = "Hugging Face", "HF compiled"
GRAPHED_UP_TO = 8  # videos; with more, the GPU's work hides the launches and a graph only takes memory
HF_INSTALLED = importlib.util.find_spec("transformers") is not None
AV_INSTALLED = importlib.util.find_spec("av") is not None
COMPILE_SECONDS = {"cuda": 150.0, "cpu": 60.0}  # the least time left for a compilation to start
ENGINES = {name.lower().replace(" ", ""): name for name in cpu_engines.FORMATS}  # "openvino": "OpenVINO"
ENGINE_SECONDS = 45.0  # the least time left for an engine's conversion to start
BUSY = 0.25  # load average per core before the run; above it, other programs disturb the run
COMPILED_BATCH = 32  # the compiled peer runs at the batch size nearest to this
GPU_BATCHES = (1, 8, 32, 64, 128, 256, 512)  # until throughput grows by less than SATURATED
SATURATED = 1.05
FP8_COSINE = 0.99  # of outputs in float8 and bfloat16; less is an error (fp8.py measures accuracy)
NOT_RUN = "not run: a forward would take longer than --seconds leaves (the JSON holds the estimates)"
BATCHES_A_CALL = 4  # of "from mp4 files": a single batch could not be decoded ahead
CLIP_FRAMES, CLIP_SIZE = 96, (256, 340)  # of the generated mp4 files


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    arguments.add_model_options(parser, VARIANTS, PRECISIONS)
    parser.add_argument(
        "--batch-sizes", default="auto", help="comma-separated; auto: 1 on a CPU, up to saturation on a GPU"
    )
    parser.add_argument("--works", default=",".join(WORKS), help=f"comma-separated, of {', '.join(WORKS)}")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="for a busy CPU: measure the processor time of the process, on one thread (implies --threads 1)",
    )
    parser.add_argument(
        "--engines", default="", help=f"also Hugging Face's video tower in these, on a CPU: {', '.join(ENGINES)}"
    )
    parser.add_argument("--fp8", action="store_true", help="also ours quantized to float8, beside bf16 (see README.md)")
    parser.add_argument("--plot", type=Path, help="draw throughput against FLOPs here (needs matplotlib)")
    args = parser.parse_args(argv)
    arguments.check_model_options(args)
    gpu = args.device == "cuda"
    args.variants = chosen("--variants", args.variants, list(PAPER_TABLE1) if gpu else ["B/32-8f", "B/16-8f"], VARIANTS)
    args.precisions = chosen("--precisions", args.precisions, ["bf16", "fp16"] if gpu else ["fp32", "bf16"], PRECISIONS)
    if args.fp8 and "bf16" not in args.precisions:
        fail("--fp8 is measured beside bf16: add it to --precisions")
    args.engines = chosen("--engines", args.engines, [], ENGINES) if args.engines else []
    if gpu and args.engines:
        fail("--engines are measured on a CPU: add --device cpu")
    args.works = chosen("--works", args.works, list(WORKS), WORKS)
    args.batch_sizes, args.until_saturated = batch_sizes(args.batch_sizes, gpu)
    if args.processor_time:
        if gpu or args.threads not in (None, 1):
            fail("--processor-time is for one thread of a CPU: add --device cpu --threads 1")
        args.threads = 1
    arguments.check_outputs(json=args.json, plot=args.plot)
    return args


def batch_sizes(given: str, gpu: bool) -> tuple[list[int], bool]:
    """The batch sizes, and whether to stop when throughput stops growing."""
    if given == "auto":
        return (list(GPU_BATCHES), True) if gpu else ([1], False)
    try:
        sizes = [int(size) for size in given.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        fail(f"--batch-sizes {given}: positive whole numbers wanted, separated by commas")
    return sizes, False


@dataclasses.dataclass(frozen=True)
class Cell:
    """One group of rows: the contenders in one kind of work."""

    variant: str
    precision: str
    batch: int
    work: str

    def work_products(self, lengths: list[int]) -> list[flops.Product]:
        """The matrix products of our forward."""
        products = flops.products(VARIANTS[self.variant], labels=lengths, batch=self.batch, counting="actual")
        left_out = {"encoded": (), "tower": ("text", "prompts", "similarity")}.get(self.work, ("text",))
        return [product for product in products if product.part not in left_out]

    def estimate(self, lengths: list[int], rates: dict[str, float]) -> tuple[float, float]:
        """Rough seconds of one call of ours, and of Hugging Face's."""
        ours = sum(product.multiply_adds for product in self.work_products(lengths))
        theirs = flops.count(VARIANTS[self.variant], labels=len(lengths), batch=self.batch)
        peer = {"encoded": theirs.total, "tower": theirs.video, "files": 0}.get(self.work, theirs.total - theirs.text)
        ours *= 2 * BATCHES_A_CALL if self.work == "files" else 1  # with the model alone
        # ours computes in float32 on a CPU without instructions for the precision
        return 2.2 * ours / max(rates[self.precision], rates.get("fp32", 0)), 2.2 * peer / rates[self.precision]


def has_peer(variant: str) -> bool:
    """Whether Hugging Face has this model, and float8 takes it: not X-Florence, whose tower has windows."""
    return isinstance(VARIANTS[variant].vision, VisionConfig)


def huggingface(model: xclip_fast.XCLIP) -> torch.nn.Module:
    """Hugging Face's model with the same weights, in evaluation mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, layout="huggingface")
        hf = transformers.XCLIPModel.from_pretrained(folder).eval()
        for parameter in hf.parameters():
            parameter.data = parameter.data.clone()  # into memory: the first timed call would read a mapped file
    return hf


def normalized(video: Tensor, config: XCLIPConfig) -> Tensor:
    """uint8 videos (B, T, H, W, 3) as Hugging Face's model takes them: float32 (B, T, 3, H, W)."""
    mean, deviation = (torch.tensor(values, device=video.device) for values in (config.image_mean, config.image_std))
    return ((video / 255 - mean) / deviation).permute(0, 1, 4, 2, 3).contiguous()


def hf_video(hf: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """The video half of ``XCLIPModel.forward``: ``get_video_features`` and the patch features for the prompts."""
    batch, frames = video.shape[:2]
    tokens = hf.vision_model(pixel_values=video.flatten(0, 1))
    features = hf.mit(hf.visual_projection(tokens[1]).unflatten(0, (batch, frames)))[1]
    patches = hf.prompts_visual_layernorm(tokens[0][:, 1:]) @ hf.prompts_visual_projection
    return features, patches.unflatten(0, (batch, frames)).mean(1)


def hf_cached(hf: Any, video: Tensor, text_KE: Tensor) -> Tensor:
    """``XCLIPModel.forward`` from the features of the labels on."""
    features, patches = hf_video(hf, video)
    text = text_KE.expand(len(features), -1, -1)
    text = text + hf.prompts_generator(text, patches)
    return hf.logit_scale.exp() * torch.einsum("be,bke->bk", F.normalize(features, dim=-1), F.normalize(text, dim=-1))


def contenders_of(
    cell: Cell,
    model: xclip_fast.XCLIP,
    fp8: xclip_fast.XCLIP | None,
    hf: Any,
    labels: list[str],
    files: list[Path],
    compiled: bool,
    engines: Sequence[str] = (),
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of each contender for the same work, without the absent ones."""
    work, batch = cell.work, cell.batch
    config, device, dtype = model.config, model.logit_scale.device, model.logit_scale.dtype
    frames, size = config.num_frames, config.vision.image_size
    tokens = xclip_fast.tokenize(labels, config.text.context_length)
    video = torch.randint(256, (batch, frames, size, size, 3), dtype=torch.uint8, device=device)
    ours = {OURS: model} if fp8 is None or work == "files" else {OURS: model, FP8: fp8}
    if work in ("cached", "files"):
        for one in ours.values():
            one.encode_text(tokens)
    if work == "files":
        # files are repeated to fill the batches; each counts as one video
        paths = list(itertools.islice(itertools.cycle(files), BATCHES_A_CALL * batch))
        videos = decoded(paths, frames, size)
        yield OURS, lambda: from_files(model, paths, tokens, batch)
        yield DECODING, lambda: decoded(paths, frames, size)
        yield COMPUTING, lambda: torch.cat([model(part.to(device), tokens).cpu() for part in videos.split(batch)])
        return
    for name, one in ours.items():
        calls: dict[str, Callable[[], Any]] = {
            "tower": functools.partial(one.encode_video, video),
            "cached": functools.partial(one, video, tokens),
            "encoded": functools.partial(forgetful, one, video, tokens),
        }
        yield name, calls[work]
    if work != "encoded" and has_graphs(device) and batch <= GRAPHED_UP_TO:
        tower = model.graphed(batch, frames)
        cached = lambda: model.similarity(tower(video), model.encode_text(tokens))  # noqa: E731
        yield GRAPHED, cached if work == "cached" else lambda: tower(video)
    if hf is None:
        return
    pixels = normalized(video, config).to(dtype)
    padded = xclip_fast.tokenize(labels, config.text.context_length, pad=True).to(device)
    if work == "tower":
        peer: Callable[[], Any] = functools.partial(hf_video, hf, pixels)
    elif work == "cached":
        # features from our encoder, because theirs takes long; the "encoded" row checks that they are equal
        peer = functools.partial(hf_cached, hf, pixels, model.encode_text(tokens))
    else:
        peer = lambda: hf(input_ids=padded, pixel_values=pixels).logits_per_video  # noqa: E731
    yield EAGER, peer
    if compiled:
        torch._dynamo.reset()
        compiled_peer = torch.compile(peer, mode="max-autotune" if device.type == "cuda" else "default")
        with contextlib.suppress(Exception):  # compiled now, not in a timed call; an error comes again and is noted
            compiled_peer()
        yield COMPILED, compiled_peer
    for name in engines if work == "tower" else ():
        if cpu_engines.missing(name) is None:
            try:
                with torch.inference_mode(False):  # its tensors cannot be traced
                    engine = cpu_engines.build(name, Tower(hf), pixels.float().clone(), dtype)
            except Exception as error:  # noted in its row, as a failed call
                engine = functools.partial(reraise, error)
            yield name, engine


class Tower(torch.nn.Module):
    """The video half of Hugging Face's model as a module of its own, in float32."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = copy.deepcopy(hf).float()

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return hf_video(self.hf, video)


def reraise(error: Exception) -> NoReturn:
    raise error


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def forgetful(model: xclip_fast.XCLIP, video: Tensor, tokens: Tensor) -> Tensor:
    """A forward that encodes its labels, also known ones."""
    model.text.forget()
    return model(video, tokens)


def from_files(model: xclip_fast.XCLIP, paths: list[Path], tokens: Tensor, batch: int) -> Tensor:
    """Logits of video files, decoded ahead of the model as ``xclip-fast classify`` does."""
    from xclip_fast.inference.batches import Answer, Reading, answers

    text_KE = model.encode_text(tokens)
    reading = Reading(model.config.num_frames, model.config.vision.image_size)
    found = answers(
        model, [str(path) for path in paths], reading, lambda v: (model.similarity(v, text_KE),), batch_size=batch
    )
    return torch.stack([item.values[0] for item in found if isinstance(item, Answer)])


def decoded(paths: list[Path], frames: int, size: int) -> Tensor:
    from xclip_fast.data.decode.decoder import decode_many

    videos: Any = decode_many(paths, frames=frames, sampling="sparse", size=size)
    return torch.stack(list(videos))


def write_clips(folder: Path) -> list[Path]:
    from xclip_fast.data.motion import CLASSES, render, write_clip

    paths = [folder / f"{number}.mp4" for number in range(4)]
    for path, label in zip(paths, CLASSES[::2], strict=False):
        write_clip(path, render(label, 0, frames=CLIP_FRAMES, size=CLIP_SIZE))
    return paths


def quantized(model: xclip_fast.XCLIP) -> xclip_fast.XCLIP:
    """A copy in float8, calibrated on random frames, as the timed input."""
    config, device = model.config, model.logit_scale.device
    size = config.vision.image_size
    video = torch.randint(256, (4, config.num_frames, size, size, 3), dtype=torch.uint8, device=device)
    return copy.deepcopy(model).quantize("fp8", calibration=video)


def least_cosine(ours: Any, theirs: Any) -> float:
    """The least cosine over the videos of a batch and over several outputs."""
    if isinstance(ours, tuple):
        return min(least_cosine(*pair) for pair in zip(ours, theirs, strict=True))
    return F.cosine_similarity(ours.float().flatten(1), theirs.float().flatten(1)).min().item()


def plan(costs: dict[Cell, tuple[float, float]], seconds: float) -> dict[Cell, tuple[float, float]]:
    """(ours, peer): the seconds of a warm-up and a run in each cell that fits into ``seconds``; 0 for other cells.

    For each precision, ours is planned first, then the peer in order of cost.
    """
    planned = {cell: (0.0, 0.0) for cell in costs}
    for precision in dict.fromkeys(cell.precision for cell in costs):
        cells = [cell for cell in costs if cell.precision == precision]
        for cell in cells:
            if 2 * costs[cell][0] <= seconds:
                planned[cell] = (2 * costs[cell][0], 0.0)
                seconds -= planned[cell][0]
        for cell in sorted(cells, key=lambda cell: costs[cell][1]):
            # a single call of a slow peer counts: measure() takes the first
            if planned[cell][0] and 1.1 * costs[cell][1] <= seconds:
                planned[cell] = (planned[cell][0], 1.1 * costs[cell][1])
                seconds -= planned[cell][1]
    return planned


def compiled_cells(cells: list[Cell]) -> set[Cell]:
    """The cell of each variant in which Hugging Face's model is compiled.

    It has the first precision, the tower if that is measured, and the batch size nearest to COMPILED_BATCH. Compiling
    for every batch size and work would take most of the time.
    """

    def rank(cell: Cell) -> tuple[bool, int]:
        return cell.work != "tower", abs(cell.batch - COMPILED_BATCH)

    first = [cell for cell in cells if cell.work != "files" and cell.precision == cells[0].precision]
    variants = dict.fromkeys(cell.variant for cell in first)
    return {min((cell for cell in first if cell.variant == variant), key=rank) for variant in variants}


def rows_of(
    cell: Cell, results: dict[str, dict[str, Any]], lengths: list[int], rate: float, device: str
) -> list[dict[str, Any]]:
    """The JSON rows of one cell. Rows of ours have the ratios."""
    rows: list[dict[str, Any]] = []
    ours = results[OURS].get("seconds", [])
    paper = PAPER_TABLE1.get(cell.variant)
    for name, result in results.items():
        row: dict[str, Any] = dataclasses.asdict(cell) | {"contender": name, "note": result.get("note", "")}
        rows.append(row)
        if not result.get("seconds"):
            continue
        row |= measuring.timings(result) | {"peak_memory_bytes": result["peak_memory"]}
        views = cell.batch * (BATCHES_A_CALL if cell.work == "files" else 1)
        row["views_per_second"] = views / row["median_s"]
        row["ratio_to_paper"] = row["views_per_second"] / paper.views_per_second if paper else None
        if name == FP8:
            cosine = least_cosine(results[OURS]["output"], result["output"]) if ours else math.nan
            row["cosine"] = cosine if math.isfinite(cosine) else None
            if cosine >= FP8_COSINE:
                row["ratios"] = ratios(OURS, ours, result["seconds"])
            elif ours:
                row["note"] = f"outputs differ from those in bf16, cosine {cosine:.5f} below {FP8_COSINE}: no ratio"
            continue
        if name != OURS:
            error = math.nan
            if ours:  # decoding gives frames
                error = 0.0 if name == DECODING else largest_error(results[OURS]["output"], result["output"])
            row["largest_error"] = error if math.isfinite(error) else None
            if error <= TOLERANCE[cell.precision]:
                for mine in rows if name != GRAPHED else []:
                    if "multiply_adds" in mine:
                        mine.setdefault("ratios", {}).update(ratios(name, result["seconds"], mine["seconds"]))
            elif ours:
                row["note"] = (
                    f"outputs differ from ours by {error:.1g}, more than {TOLERANCE[cell.precision]}: no ratio"
                )
        if name not in (OURS, GRAPHED) or row["note"]:
            continue
        products = cell.work_products(lengths)
        row["multiply_adds"] = sum(product.multiply_adds for product in products) * views // cell.batch
        row["flop_per_s"] = 2 * row["multiply_adds"] / row["median_s"]
        row["share_of_gemm"] = row["flop_per_s"] / rate
        if cell.work != "files":
            known = rows[0].get("own_gemms_s")  # of the other row of ours
            row["own_gemms_s"] = known or measuring.own_gemms(products, PRECISIONS[cell.precision], device)
            row["share_of_own_gemms"] = row["own_gemms_s"] / row["median_s"]
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all cells. Returns the content of the JSON."""
    deadline = time.perf_counter() + args.seconds
    if args.threads:
        torch.set_num_threads(args.threads)
    measuring.clock = time.process_time if args.processor_time else time.perf_counter
    torch.manual_seed(0)
    # before the run, which adds to the load average
    environment = measuring.environment(args.device) | {"clock": measuring.clock.__name__}
    lengths = (xclip_fast.tokenize(args.labels).argmax(1) + 1).tolist()
    # on a CPU also float32, in which ours computes without instructions for the precision
    rated = dict.fromkeys([*args.precisions, *(["fp32"] if args.device == "cpu" else [])])
    rates = {precision: measuring.gemm_rate(PRECISIONS[precision], args.device) for precision in rated}
    cells = [
        Cell(variant, precision, batch, work)
        for precision, batch, variant in itertools.product(args.precisions, args.batch_sizes, args.variants)
        for work in WORKS
        if work in args.works
    ]
    costs = {cell: cell.estimate(lengths, rates) for cell in cells}
    if args.fp8:  # ours runs twice
        costs |= {cell: (2 * costs[cell][0], costs[cell][1]) for cell in cells if cell.precision == "bf16"}
    planned = plan(costs, 0.75 * (deadline - time.perf_counter()))  # the rest of the time builds the models
    to_compile = compiled_cells(cells) if args.compile else set()
    rows: list[dict[str, Any]] = []
    report = {
        "environment": environment,
        "labels": {"count": len(lengths), "tokens": sum(lengths), "longest": max(lengths)},
        "backend": args.backend,
        "gemm_flop_per_s": rates,
        "rows": rows,
    }
    variants = sorted(args.variants, key=lambda variant: args.compile and variant != "B/16-8f")
    with tempfile.TemporaryDirectory() as folder:
        files = write_clips(Path(folder)) if "files" in args.works and AV_INSTALLED else []
        for variant in variants:
            mine = [cell for cell in cells if cell.variant == variant]
            model = xclip_fast.XCLIP(variant).eval()
            hf = None
            if HF_INSTALLED and has_peer(variant) and any(planned[cell][1] for cell in mine):
                hf = huggingface(model)
            before: dict[tuple[str, str], float] = {}  # views/s of the last batch size
            for cell in mine:
                left, ahead = deadline - time.perf_counter(), sum(sum(seconds) for seconds in planned.values())
                ours_s, peer_s = planned.pop(cell)
                key = (cell.precision, cell.work)
                if before.get(key) == 0:
                    continue
                if not ours_s or left < ours_s / 2 or (cell.work == "files" and not AV_INSTALLED):
                    rows += [blank(cell, OURS, costs[cell][0])]
                    continue
                peer = hf if peer_s and left >= peer_s + ours_s / 2 else None
                allotted = left * (ours_s + peer_s) / ahead if left < math.inf else left
                compiles = cell in to_compile and left >= COMPILE_SECONDS[args.device]
                try:
                    group = measured(cell, args, model, peer, files, compiles, allotted, lengths, rates[cell.precision])
                    group += absent_engines(cell, args.engines, group)
                except Exception as error:  # for example, too little memory; the other cells go on
                    group = [blank(cell, OURS, 0.0) | {"note": measuring.failure(error)}]
                model.clear_graphs()
                if cell.work != "files" and not peer:
                    group.append(blank(cell, EAGER, costs[cell][1]))
                if cell in to_compile and peer and not compiles:
                    group.append(blank(cell, COMPILED, COMPILE_SECONDS[args.device]))
                rows += group
                if args.json:  # after every cell: a run that is stopped keeps what it measured
                    measuring.write_json(args.json, report)
                speed = group[0].get("views_per_second", 0.0)
                grows = speed > SATURATED * before.get(key, 0.0)
                before[key] = speed if grows or not args.until_saturated else 0.0
                print(
                    f"{cell.variant} {cell.precision} x{cell.batch} {WORKS[cell.work]}: {speed:.3g} views/s",
                    file=sys.stderr,
                )
    return report


def measured(
    cell: Cell,
    args: argparse.Namespace,
    model: xclip_fast.XCLIP,
    hf: Any,
    files: list[Path],
    compiles: bool,
    seconds: float,
    lengths: list[int],
    rate: float,
) -> list[dict[str, Any]]:
    """The rows of one cell. Building the contenders, compilation included, counts in its ``seconds``."""
    end = time.perf_counter() + seconds
    for module in filter(None, (model, hf)):
        module.to(args.device, PRECISIONS[cell.precision])
    fp8 = None
    if args.fp8 and has_peer(cell.variant) and cell.precision == "bf16" and cell.work != "files":
        fp8 = quantized(model)
    engines = [ENGINES[name] for name in args.engines if seconds >= ENGINE_SECONDS]
    with torch.inference_mode():
        contenders = dict(contenders_of(cell, model, fp8, hf, args.labels, files, compiles, engines))
        results = measuring.measure(contenders, args.device, max(end - time.perf_counter(), 0.0))
        return rows_of(cell, results, lengths, rate, args.device)


def absent_engines(cell: Cell, asked: list[str], group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the reason for engines that are missing in ``group``."""
    rows = []
    for name in (ENGINES[name] for name in asked if cell.work == "tower"):
        if all(row["contender"] != name for row in group):
            note = cpu_engines.missing(name) or f"not run: {ENGINE_SECONDS:.3g} s"
            if not HF_INSTALLED:
                note = "not installed: pip install 'xclip-fast[hf]'"
            rows.append(dataclasses.asdict(cell) | {"contender": name, "note": note})
    return rows


def blank(cell: Cell, contender: str, cost: float) -> dict[str, Any]:
    """The row of a contender that did not run, with the reason."""
    note = f"not run: {cost:.3g} s"
    if contender in (EAGER, COMPILED) and not has_peer(cell.variant):
        note = "no peer: Hugging Face has no X-Florence"
    elif contender == EAGER and not HF_INSTALLED:
        note = "not installed: pip install 'xclip-fast[hf]'"
    if cell.work == "files" and not AV_INSTALLED:
        note = "not installed: pip install av"
    return dataclasses.asdict(cell) | {"contender": contender, "note": note}


def print_table(report: dict[str, Any]) -> None:
    """Prints a group of lines for each cell, at most 79 columns wide. The JSON has the rest."""
    environment, rows = report["environment"], report["rows"]
    threads = environment["threads"]
    print(f"{environment['device']}, {threads} thread{'s' * (threads > 1)}, {report['labels']['count']} labels")
    notes: dict[str, None] = {}
    for key, group in itertools.groupby(rows, key=lambda row: [row[name] for name in Cell.__dataclass_fields__]):
        variant, precision, batch, work = key
        print(f"\n{variant} {precision}, {'1 video' if batch == 1 else f'{batch} videos'}, {WORKS[work]}")
        print(f"  {'':16} {'views/s':>8} {'x paper':>8}  {'speed of ours over it':24} {'of GEMM':>7} {'n':>4}")
        own = list(group)
        for row in own:
            if row["note"]:
                notes.setdefault(NOT_RUN if row["note"].startswith("not run") else row["note"], None)
                print(f"  {row['contender']:16} {row['note'].partition(':')[0]:>8}")
                continue
            paper, share = shown(row["ratio_to_paper"], "{:.3g}"), shown(row.get("share_of_own_gemms"), "{:.0%}")
            figures = f"{row['views_per_second']:8.3g} {paper:>8}  {speed_over(row, own):24} {share:>7} {row['n']:4}"
            print(f"  {row['contender']:16} {figures}")
            if row.get("cosine") is not None:
                print(f"  {'':16} cosine with bf16's outputs {row['cosine']:.5f}")
    print()
    cores, load = environment["cores"], (environment["load_average"] or [0.0])[0]
    if environment["clock"] == "process_time":
        print("Times are processor times: waiting for other programs does not count.")
    elif load > BUSY * cores:
        print(f"Busy machine: the load average before this run was {load:.1f} on {cores} cores.")
        print("Times are longer than on an idle machine, and ratios vary. Run it again alone.")
    for note in notes:
        print(note)


def speed_over(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """The ratio in a row: how many times faster ours is than a peer, or a variant of ours than its peer."""
    ours, name = group[0].get("ratios", {}), row["contender"]
    if name == OURS:
        return ""
    if name in (GRAPHED, FP8):
        return next((f"{ratio_text(found)} {against}" for against, found in row.get("ratios", {}).items()), "")
    return ratio_text(ours.get(name, {})) or "no ratio of one call"


def shown(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value * unit)


def plot(report: dict[str, Any], path: Path) -> None:
    """Plots views/s over Table 1's FLOPs, both logarithmic: the paper's points and this run's best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    series: dict[str, dict[str, float]] = {
        "paper, one V100": {n: row.views_per_second for n, row in PAPER_TABLE1.items()}
    }
    for row in report["rows"]:
        if row["work"] in ("cached", "encoded") and "views_per_second" in row:
            points = series.setdefault(f"{row['contender']}, {row['precision']}, {WORKS[row['work']]}", {})
            points[row["variant"]] = max(points.get(row["variant"], 0.0), row["views_per_second"])
    for name, points in series.items():
        gflops = {variant: flops.count(VARIANTS[variant]).total / 1e9 for variant in points}
        order = sorted(points, key=gflops.__getitem__)
        style: dict[str, Any] = {"linestyle": ":", "color": "gray"} if name.startswith("paper") else {}
        if not style and not name.startswith(OURS):
            style |= {"linestyle": "--", "marker": "x"}
        style.setdefault("marker", "o")
        axes.plot([gflops[n] for n in order], [points[n] for n in order], label=name, **style)
    for variant, speed in series["paper, one V100"].items():
        place = (flops.count(VARIANTS[variant]).total / 1e9, speed)
        axes.annotate(variant, place, textcoords="offset points", xytext=(4, 5), fontsize=8, color="gray")
    labels = report["labels"]["count"]
    axes.set(
        xscale="log", yscale="log", xlabel="GFLOPs of a view, as in the paper's Table 1", ylabel="views per second"
    )
    axes.set_title(f"{report['environment']['device']}, {labels} labels", fontsize=10)
    axes.margins(x=0.22)  # room for the names
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with xclip_fast.backend(args.backend):
        report = run(args)
    print_table(report)
    if args.json:
        measuring.write_json(args.json, report)
    if args.plot:
        plot(report, args.plot)
    wrong = [row for row in report["rows"] if row["note"].startswith(("outputs differ", "failed"))]
    return 1 if any(row["contender"] in (OURS, GRAPHED) or row["note"].startswith("outputs") for row in wrong) else 0


if __name__ == "__main__":
    arguments.start(main)
