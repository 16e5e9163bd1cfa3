"""Stage 3: the main figures: ours, Hugging Face's model and the limit, measured in the same process.

The limit is the time of the matrix products of the model alone, and of the fastest library's attention.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import measuring
import torch
import training
from contenders import (
    COMPILED,
    EAGER,
    GRAPHED,
    HF_INSTALLED,
    OURS,
    TOLERANCE,
    contenders_of,
    huggingface,
    products_of,
)
from labels import label_list
from measuring import largest_error

import xclip_fast
from xclip_fast.config import VARIANTS, TextConfig, VisionConfig, XCLIPConfig

from .case import Job, Row

Calls = dict[str, Callable[[], Any]]
WORKS = {"tower": "tower", "whole": "cached"}  # the kinds of work of throughput.py


def config_of(job: Job, variant: str) -> XCLIPConfig:
    if not job.tiny:
        return VARIANTS[variant]
    vision = VisionConfig(image_size=16, patch_size=8, width=64, layers=1, heads=1)
    text = TextConfig(width=64, layers=1, heads=1)
    return XCLIPConfig(vision=vision, text=text, embed_dim=64, num_frames=2)


def base_of(job: Job, op: str, variant: str, batch: int) -> Row:
    return {"op": op, "variant": "tiny" if job.tiny else variant, "batch": batch, "precision": job.precision}


def labels_of(job: Job) -> list[str]:
    return label_list(6 if job.tiny else 400)


def build(job: Job, variant: str) -> xclip_fast.XCLIP:
    """A model with random weights, made on the device, since that takes seconds on the CPU."""
    torch.manual_seed(0)
    with torch.device(job.device):
        model = xclip_fast.XCLIP(config_of(job, variant))
    return model.eval().to(job.device, job.dtype)


def under(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> Any:
        with xclip_fast.backend(name):
            return call()

    return forced


def calls_of(job: Job, model: xclip_fast.XCLIP, kind: str, batch: int, hf: Any = None, graph: bool = False) -> Calls:
    """The call of each contender on one batch. In a rehearsal, which has no graphs, the eager call plays the graph."""
    graphed = graph and job.device != "cpu"
    calls = dict(contenders_of(WORKS[kind], batch, model, hf, labels_of(job), graphed=graphed))
    return calls | ({GRAPHED: calls[OURS]} if graph and not graphed else {})


def peer(job: Job, model: xclip_fast.XCLIP) -> Any:
    """Hugging Face's model with the same weights, if it is installed."""
    return huggingface(model).to(job.device, job.dtype) if HF_INSTALLED else None


def limit_seconds(job: Job, model: xclip_fast.XCLIP, batch: int, kind: str) -> tuple[float, float]:
    """Seconds of the matrix products of the work, and of the attention of its blocks by the fastest kernel of SDPA."""
    from . import attention

    config = model.config
    products = products_of(WORKS[kind], config, [4] * len(labels_of(job)), batch)
    with job.quiet():
        gemms = measuring.own_gemms(products, job.dtype, job.device)
    frames, tokens = batch * config.num_frames, config.vision.patches + 1
    rows = attention.backends(job, frames, tokens, config.vision.heads, names=attention.TORCH)
    best = min((row["ms"] for row in rows if "ms" in row), default=0.0)
    return gemms, 1e-3 * best * config.vision.layers


def rows_of(job: Job, found: dict[str, dict[str, Any]], base: Row, truth: str, limit: float) -> Iterator[Row]:
    """A row for each contender: its median, and its time relative to ours and to the limit; or why there is none."""
    ours = found.get(OURS, {}).get("seconds")
    right = found.get(truth, {}).get("output")
    for name, result in found.items():
        row: Row = {**base, "contender": name}
        if result.get("note"):
            yield {**row, "note": result["note"]}
            continue
        seconds = result["seconds"]
        median = statistics.median(seconds)
        row |= {"ms": 1e3 * median, "low_ms": 1e3 * min(seconds), "high_ms": 1e3 * max(seconds), "n": len(seconds)}
        row |= {"views_per_second": base["batch"] / median, "peak_bytes": result["peak_memory"]}
        output = job.wrong(result["output"]) if name == OURS else result["output"]
        if right is not None and name != truth:
            row["error"] = largest_error(output, right)
            row["right"] = row["error"] <= TOLERANCE[job.precision]
        if row.get("right") is False:
            yield {**row, "note": f"WRONG compared with {truth}: {row['error']:.3g}; no ratio"}
            continue
        if name not in (EAGER, COMPILED) and limit:
            row |= {"limit_ms": 1e3 * limit, "over_limit": median / limit}
        if ours and name != OURS:
            row["to_ours"] = median / statistics.median(ours)
        yield row


def inference(
    job: Job,
    variant: str,
    batch: int,
    kinds: tuple[str, ...] = ("tower",),
    backends: tuple[str, ...] = (),
    graph: bool = False,
) -> Iterator[Row]:
    """The video tower or the whole model (with encoded labels): ours, each backend, Hugging Face eager."""
    model = build(job, variant)
    row: Row = {**base_of(job, kinds[0], variant, batch), "contender": EAGER}
    hf = job.attempt(EAGER, row, peer, job, model)
    if "note" in row:
        yield row
    for kind in kinds:
        base = base_of(job, kind, variant, batch)
        with torch.inference_mode():
            row = {**base, "contender": "limit"}
            gemms, mixing = job.attempt("limit", row, limit_seconds, job, model, batch, kind) or (0.0, 0.0)
            if gemms:
                row |= {"ms": 1e3 * (gemms + mixing), "gemms_ms": 1e3 * gemms, "attention_ms": 1e3 * mixing}
            yield row
            calls = calls_of(job, model, kind, batch, hf, graph)
            calls |= {f"{OURS} {name}": under(name, calls[OURS]) for name in backends}
            found = job.measure(calls, 8.0)
            truth = EAGER if EAGER in found and "output" in found[EAGER] else f"{OURS} reference"
            yield from rows_of(job, found, base, truth, gemms + mixing)


def compiled(job: Job, variant: str, batch: int, step: bool = False) -> Iterator[Row]:
    """Ours and Hugging Face's tower, or training step, under torch.compile, which compiles in the background before."""
    how: dict[str, Any] = {"backend": "aot_eager"} if job.tiny else {"mode": "default"}
    first: dict[str, Any] = {}  # the losses before a weight changes
    if step:
        _, contenders = training_contenders(job, variant, batch, HF_INSTALLED, how)
        calls: Calls = {name: contender.step for name, contender in contenders.items()}
        with torch.no_grad():
            first = {name: contenders[name].loss() for name in (OURS, EAGER)}
    else:
        model = build(job, variant)
        with torch.inference_mode():
            calls = calls_of(job, model, "tower", batch, peer(job, model))
        calls[COMPILED] = torch.compile(calls[EAGER], **how)
    base = base_of(job, "training step" if step else "tower", variant, batch)
    with torch.inference_mode(not step):
        begin = time.perf_counter()
        job.at(COMPILED)
        made = [calls[COMPILED]() for _ in range(3)]
        if job.device == "cuda":
            torch.cuda.synchronize()
        job.at("")
        took = time.perf_counter() - begin
        job.turn()
        found = job.measure(calls, 8.0)
        if step:
            for name, loss in {**first, COMPILED: made[0]}.items():
                found[name] |= {"output": loss} if "output" in found[name] else {}
        for row in rows_of(job, found, base, EAGER, 0.0):
            yield {**row, **({"compile_s": took, **how} if row["contender"] == COMPILED else {})}


def step(job: Job, variant: str, batch: int, backends: tuple[str, ...] = ()) -> Iterator[Row]:
    """A training step with a frozen text tower: forward, backward, fused AdamW; weights in float32 and autocast."""
    cell, contenders = training_contenders(job, variant, batch, HF_INSTALLED)
    base = base_of(job, "training step", variant, batch)
    forward = products_of("cached", VARIANTS[cell.variant], [4] * len(labels_of(job)), batch)
    with job.quiet():
        # forward, and a product for each of two gradients
        gemms = 3 * measuring.own_gemms(forward, job.dtype, job.device)
    yield {**base, "contender": "limit", "ms": 1e3 * gemms}
    ours = contenders[OURS]
    calls: Calls = {OURS: ours.step} | {f"{OURS} {name}": under(name, ours.step) for name in backends}
    calls |= {name: contender.step for name, contender in contenders.items() if name != OURS}
    losses = {}
    with torch.no_grad():  # before the first step: all of ours share one model
        for name in calls:
            row: Row = {**base, "contender": name}
            forced = name.removeprefix(OURS).strip() if name.startswith(f"{OURS} ") else "auto"
            loss = job.attempt(name, row, under(forced, contenders.get(name, ours).loss))
            if loss is not None:
                losses[name] = loss
            if "note" in row:
                yield row
    found = job.measure({name: call for name, call in calls.items() if name in losses}, 12.0)
    for name, result in found.items():
        if "output" in result:
            result["output"] = losses[name]
    for row in rows_of(job, found, base, EAGER, gemms):
        if row["contender"] in contenders and "ms" in row:
            row["state_bytes"] = contenders[row["contender"]].state_bytes()
        yield row
    if OURS not in job.without:
        with job.quiet():
            parts = ours.parts(job.device)
        yield {**base, "contender": OURS, "op": "its parts", **{f"{name}_ms": 1e3 * s for name, s in parts.items()}}


def training_contenders(
    job: Job, variant: str, batch: int, peers: bool, compiled: dict[str, Any] | None = None
) -> tuple[training.Cell, dict[str, training.Contender]]:
    if job.tiny:
        VARIANTS["tiny"] = config_of(job, variant)
    cell = training.Cell("tiny" if job.tiny else variant, job.precision, batch, "visual", recompute=False)
    return cell, dict(training.contenders_of(cell, labels_of(job), job.device, peers, compiled))


def once(job: Job, variant: str, batch: int, backend: str, kind: str) -> Row:
    """One call of a headline's work on a backend, compared with the reference in the same precision."""
    begin = time.perf_counter()
    if kind == "training step":
        _, contenders = training_contenders(job, variant, batch, False)
        ours = contenders[OURS]
        with torch.no_grad():
            got, right = under(backend, ours.loss)(), under("reference", ours.loss)()
        under(backend, ours.step)()
    else:
        model = build(job, variant)
        with torch.inference_mode():
            calls = calls_of(job, model, "whole" if kind == "whole" else "tower", batch, graph=kind == "graph")
            right = under("reference", calls[OURS])()
            got = calls[GRAPHED]() if kind == "graph" else under(backend, calls[OURS])()
    error = largest_error(job.wrong(got), right)
    found: Row = {"error": error, "limit": TOLERANCE[job.precision], "right": error <= TOLERANCE[job.precision]}
    if not found["right"]:
        found["note"] = f"WRONG compared with the reference: {error:.3g}"
    return {**found, "seconds": time.perf_counter() - begin}
