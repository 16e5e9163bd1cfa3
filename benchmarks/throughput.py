"""Throughput of X-CLIP beside the paper's Table 1 and Hugging Face's model, measured in one run.

    python benchmarks/throughput.py                        # defaults: minutes on a CPU, everything on a GPU
    python benchmarks/throughput.py --variants B/16-8f --precisions bf16 --seconds 600 --json out.json

Each row is one kind of work on one batch of videos and K labels. README.md beside this file explains the measurement
and the columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arguments
import cpu_engines
import measuring
import torch
from arguments import fail
from contenders import (
    BATCHES_A_CALL,
    COMPILED,
    DECODING,
    EAGER,
    GRAPHED,
    HF_INSTALLED,
    OURS,
    PRECISIONS,
    TOLERANCE,
    contenders_of,
    has_peer,
    huggingface,
    products_of,
    write_clips,
)
from throughput_table import print_table

import xclip_fast
from xclip_fast import flops
from xclip_fast.config import PAPER_TABLE1, VARIANTS

WORKS = {  # in this order: the longest last, when the weights are warm
    "tower": "video tower",
    "cached": "labels cached",
    "files": "from mp4 files",
    "encoded": "labels encoded",
}
AV_INSTALLED = importlib.util.find_spec("av") is not None
COMPILE_SECONDS = {"cuda": 150.0, "cpu": 60.0}  # the least time left for a compilation to start
ENGINES = {name.lower().replace(" ", ""): name for name in cpu_engines.FORMATS}  # "openvino": "OpenVINO"
ENGINE_SECONDS = 45.0  # the least time left for an engine's conversion to start
GRAPHED_UP_TO = {"cuda": 8, "cpu": 0}  # videos; with more, the GPU's work hides the launches
COMPILED_BATCH = 32  # the compiled peer runs at the batch size nearest to this
GPU_BATCHES = [1, 8, 32, 64, 128, 256, 512]  # until throughput grows by less than SATURATED
SATURATED = 1.05


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.model_parser(__doc__, VARIANTS, PRECISIONS)
    parser.add_argument(
        "--batch-sizes",
        type=arguments.counts,
        help="comma-separated (default: 1 on a CPU, up to saturation on a GPU)",
    )
    works = ",".join(WORKS)
    parser.add_argument("--works", type=arguments.names(WORKS), default=works, help=f"comma-separated, of {works}")
    parser.add_argument(
        "--engines",
        type=arguments.names(ENGINES),
        default=[],
        help=f"also Hugging Face's video tower in these, on a CPU: {', '.join(ENGINES)}",
    )
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    args.seconds = args.seconds or arguments.seconds_on(args.device)
    args.variants = args.variants or (list(PAPER_TABLE1) if gpu else ["B/32-8f", "B/16-8f"])
    args.precisions = args.precisions or (["bf16", "fp16"] if gpu else ["fp32", "bf16"])
    if gpu and args.engines:
        fail("--engines are measured on a CPU: add --device cpu")
    args.until_saturated = gpu and not args.batch_sizes
    args.batch_sizes = args.batch_sizes or (GPU_BATCHES if gpu else [1])
    return args


@dataclasses.dataclass(frozen=True)
class Cell:
    """One group of rows: the contenders in one kind of work."""

    variant: str
    precision: str
    batch: int
    work: str

    def work_products(self, lengths: list[int]) -> list[flops.Product]:
        """The matrix products of our forward."""
        return products_of(self.work, VARIANTS[self.variant], lengths, self.batch)

    def estimate(self, lengths: list[int], rates: dict[str, float]) -> tuple[float, float]:
        """Rough seconds of one call of ours, and of Hugging Face's."""
        ours = sum(product.multiply_adds for product in self.work_products(lengths))
        theirs = flops.count(VARIANTS[self.variant], labels=len(lengths), batch=self.batch)
        peer = {"encoded": theirs.total, "tower": theirs.video, "files": 0}.get(self.work, theirs.total - theirs.text)
        ours *= 2 * BATCHES_A_CALL if self.work == "files" else 1  # with the model alone
        # ours computes in float32 on a CPU without instructions for the precision
        return 2.2 * ours / max(rates[self.precision], rates.get("fp32", 0)), 2.2 * peer / rates[self.precision]


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
    """The JSON rows of one cell. Those of peers have the ratio of ours to them."""
    if DECODING in results and "output" in results[DECODING]:
        results[DECODING]["output"] = results[OURS].get("output")  # frames, which have no peer
    rows = measuring.rows(results, dataclasses.asdict(cell), TOLERANCE[cell.precision])
    paper = PAPER_TABLE1.get(cell.variant)
    for row in rows:
        name = row["contender"]
        if row["note"]:
            continue
        views = cell.batch * (BATCHES_A_CALL if cell.work == "files" else 1)
        row["peak_memory_bytes"] = results[name]["peak_memory"]
        row["views_per_second"] = views / row["median_s"]
        row["ratio_to_paper"] = row["views_per_second"] / paper.views_per_second if paper else None
        if name not in (OURS, GRAPHED):
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
    torch.manual_seed(0)
    # on a CPU also float32, in which ours computes without instructions for the precision
    rated = [*args.precisions, *(["fp32"] if args.device == "cpu" else [])]
    report, lengths = measuring.start_report(args, {precision: PRECISIONS[precision] for precision in rated})
    rates, rows = report["gemm_flop_per_s"], report["rows"]
    cells = [
        Cell(variant, precision, batch, work)
        for precision, batch, variant in itertools.product(args.precisions, args.batch_sizes, args.variants)
        for work in WORKS
        if work in args.works
    ]
    costs = {cell: cell.estimate(lengths, rates) for cell in cells}
    planned = plan(costs, 0.75 * (deadline - time.perf_counter()))  # the rest of the time builds the models
    to_compile = compiled_cells(cells) if args.compile else set()
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
                    present = [row["contender"] for row in group]
                    engines = [ENGINES[name] for name in args.engines if cell.work == "tower"]
                    group += [blank(cell, name, ENGINE_SECONDS) for name in engines if name not in present]
                except Exception as error:  # for example, too little memory; the other cells go on
                    group = [blank(cell, OURS, 0.0) | {"note": measuring.failure(error)}]
                model.clear_graphs()
                if cell.work != "files" and not peer:
                    group.append(blank(cell, EAGER, costs[cell][1]))
                if cell in to_compile and peer and not compiles:
                    group.append(blank(cell, COMPILED, COMPILE_SECONDS[args.device]))
                rows += group
                measuring.write_json(args.json, report)  # a run that is stopped keeps what it measured
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
    engines = [ENGINES[name] for name in args.engines if seconds >= ENGINE_SECONDS]
    with torch.inference_mode():
        given = (cell.work, cell.batch, model, hf, args.labels, files)
        graphed = cell.work != "encoded" and cell.batch <= GRAPHED_UP_TO[args.device]
        made = dict(contenders_of(*given, graphed=graphed, compiled=compiles, engines=engines))
        results = measuring.measure(made, args.device, max(end - time.perf_counter(), 0.0))
        return rows_of(cell, results, lengths, rate, args.device)


def blank(cell: Cell, contender: str, cost: float) -> dict[str, Any]:
    """The row of a contender that did not run, with the reason."""
    note = f"not run: {cost:.3g} s"
    if contender in (EAGER, COMPILED) and not has_peer(cell.variant):
        note = "no peer: Hugging Face has no X-Florence"
    elif contender in (EAGER, *ENGINES.values()) and not HF_INSTALLED:
        note = "not installed: pip install 'xclip-fast[hf]'"
    elif contender in ENGINES.values():
        note = cpu_engines.missing(contender) or note
    if cell.work == "files" and not AV_INSTALLED:
        note = "not installed: pip install av"
    return dataclasses.asdict(cell) | {"contender": contender, "note": note}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with xclip_fast.backend(args.backend):
        report = run(args)
    print_table(report, WORKS)
    measuring.write_json(args.json, report)
    wrong = [row for row in report["rows"] if row["note"].startswith(("outputs differ", "failed"))]
    return 1 if any(row["contender"] in (OURS, GRAPHED) or row["note"].startswith("outputs") for row in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
