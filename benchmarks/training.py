"""Training steps of X-CLIP: speed by part, share of the GEMM limit, memory, beside Hugging Face's model in one run.

    python benchmarks/training.py                          # defaults: minutes on a CPU, everything on a GPU
    python benchmarks/training.py --variants B/16-8f --batch-size 32 --text frozen,trained --compile --json out.json
    python benchmarks/training.py --table7                 # also the memory case of the paper's Table 7

A step is forward, backward and fused AdamW on one resident batch and K labels, with weights in float32, and autocast in
half precision. README.md beside this file explains each number.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import arguments
import measuring
import torch
import torch.nn.functional as F
from contenders import COMPILED, EAGER, HF_INSTALLED, OURS, PRECISIONS, hf_cached, huggingface, normalized
from torch import Tensor, nn

import xclip_fast
from xclip_fast import flops
from xclip_fast.config import VARIANTS
from xclip_fast.train import optim

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # between the first losses, with the same weights and videos
TEXT = {"frozen": "visual", "trained": "both"}  # the towers that are trained
PAPER_TABLE7 = {"both": 22, "visual": 6, "text": 20, "none": 4}  # GB, 2 videos of 8 frames, one V100
PART_RUNS = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = arguments.names
    parser = arguments.model_parser(__doc__, VARIANTS, TOLERANCE)
    parser.add_argument(
        "--batch-size", type=arguments.count, help="videos in a step (default: 1 on a CPU, 32 on a GPU)"
    )
    parser.add_argument("--text", type=names(TEXT), help="comma-separated, of frozen, trained: the text tower")
    parser.add_argument(
        "--recompute", type=names(("no", "yes")), help="comma-separated, of no, yes: activation checkpointing"
    )
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--table7", action="store_true", help="the memory case of Table 7 (default on a GPU)")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    args.seconds = args.seconds or arguments.seconds_on(args.device)
    args.variants = args.variants or (["B/16-8f", "L/14-8f"] if gpu else ["B/32-8f"])
    args.precisions = args.precisions or (["bf16"] if gpu else ["fp32"])
    args.text = args.text or (list(TEXT) if gpu else ["frozen"])
    args.recompute = args.recompute or (["no", "yes"] if gpu else ["no"])
    args.batch_size = args.batch_size or (32 if gpu else 1)
    args.table7 |= gpu
    return args


@dataclasses.dataclass(frozen=True)
class Cell:
    """One group of rows: the contenders of one kind of step."""

    variant: str
    precision: str
    batch: int
    towers: str  # which are trained, as in Table 7
    recompute: bool

    def multiply_adds(self, lengths: list[int]) -> int:
        """Multiply-adds of our step: each product once in forward, and once for each gradient.

        Recomputation does not count: the step itself does not need it.
        """
        total = 0
        for product in flops.products(VARIANTS[self.variant], labels=lengths, batch=self.batch, counting="actual"):
            if product.part == "text" and self.towers not in ("text", "both"):
                continue  # encoded once, before the first step
            passes = 2 if product.part == "patch_embed" else 3  # pixels have no gradient
            total += passes * product.multiply_adds
        return total


@dataclasses.dataclass
class Contender:
    """A model with its optimizer, ready to step."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]

    def step(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def state_bytes(self) -> int:
        """Weights and optimizer state; gradients and activations are in the step's own peak."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.module.parameters(), *self.module.buffers(), *filter(torch.is_tensor, states)]
        return sum(tensor.nbytes for tensor in tensors)

    def parts(self, device: str) -> dict[str, float]:
        """Median seconds of forward, backward and optimizer, each waited for."""
        found: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
        loss: Tensor | None = None

        def forward() -> None:
            nonlocal loss
            loss = self.loss()

        def update() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        for _ in range(PART_RUNS if device == "cuda" else 2):
            found["forward"].append(measuring.timed(forward, device)())
            assert loss is not None
            found["backward"].append(measuring.timed(loss.backward, device)())
            found["optimizer"].append(measuring.timed(update, device)())
        return {name: statistics.median(seconds) for name, seconds in found.items()}


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """The same for all: fused, its state in place before the first step."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    made = torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    for parameter in parameters:
        made.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return made


def contenders_of(
    cell: Cell, labels: list[str], device: str, peers: bool, compiled: dict[str, Any] | None = None
) -> Iterator[tuple[str, Contender]]:
    """Ours and the peers, with the same weights, videos and labels; ``compiled``: torch.compile's options, for one
    more."""
    torch.manual_seed(0)
    config, dtype = VARIANTS[cell.variant], PRECISIONS[cell.precision]
    model = xclip_fast.XCLIP(config).train()
    hf: Any = huggingface(model).train() if peers else None
    model.to(device).checkpoint_activations(cell.recompute)
    optim.freeze(model, cell.towers)  # type: ignore[arg-type]
    tokens = xclip_fast.tokenize(labels, config.text.context_length)
    shape = (cell.batch, config.num_frames, config.vision.image_size, config.vision.image_size, 3)
    video = torch.randint(256, shape, dtype=torch.uint8, device=device)
    truth = torch.arange(cell.batch, device=device) % len(labels)
    autocast = functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)
    text_trained = cell.towers in ("text", "both")
    text_KE = None if text_trained else model.encode_text(tokens)

    def ours() -> Tensor:
        with autocast():
            logits = model.similarity(model.encode_video(video), model.encode_text(tokens) if text_trained else text_KE)
        return F.cross_entropy(logits.float(), truth)

    yield OURS, Contender(model, adamw(model), ours)
    if hf is None:
        return
    hf.to(device)
    _freeze_huggingface(hf, cell.towers)
    if cell.recompute:
        getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)()
    pixels = normalized(video, config)
    padded = xclip_fast.tokenize(labels, config.text.context_length, pad=True).to(device)

    def theirs() -> Tensor:
        with autocast():
            # a careful user of theirs would keep a frozen tower's features too
            logits = hf_cached(hf, pixels, text_KE) if text_KE is not None else hf(padded, pixels).logits_per_video
        return F.cross_entropy(logits.float(), truth)

    contender = Contender(hf, adamw(hf), theirs)
    yield EAGER, contender
    if compiled is not None:
        torch._dynamo.reset()
        yield COMPILED, dataclasses.replace(contender, loss=torch.compile(theirs, **compiled))


def _freeze_huggingface(hf: nn.Module, towers: str) -> None:
    """As ``optim.freeze`` does with ours."""
    for name, parameter in hf.named_parameters():
        new = "message_" in name or name.startswith(("mit.", "prompts_"))
        tower = "visual" if name.startswith(("vision_model.", "visual_projection")) else "text"
        parameter.requires_grad_(new or towers in (tower, "both"))


def rows_of(
    cell: Cell, contenders: dict[str, Contender], results: dict[str, Any], lengths: list[int], rate: float, device: str
) -> list[dict[str, Any]]:
    rows = measuring.rows(results, dataclasses.asdict(cell), TOLERANCE[cell.precision])
    for row in rows:
        name = row["contender"]
        if row["note"]:
            continue
        row |= {"loss": float(results[name]["output"]), "clips_per_second": cell.batch / row["median_s"]}
        row |= {"state_bytes": contenders[name].state_bytes(), "peak_bytes": results[name]["peak_memory"]}
        row["parts_s"] = contenders[name].parts(device)
        if name == OURS:
            row["multiply_adds"] = cell.multiply_adds(lengths)
            row["flop_per_s"] = 2 * row["multiply_adds"] / row["median_s"]
            row["share_of_gemm"] = row["flop_per_s"] / rate
    return rows


def table7(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Memory of one step on 2 videos of 8 frames with all labels, for each choice of towers, optimizer included."""
    variant = "B/16-8f" if "B/16-8f" in VARIANTS else args.variants[0]
    for towers, paper in PAPER_TABLE7.items():
        cell = Cell(variant, "bf16" if args.device == "cuda" else "fp32", 2, towers, recompute=False)
        # one after the other: both at once would hide how little one needs
        for name in (OURS, EAGER) if HF_INSTALLED and not args.no_peers and args.device == "cuda" else (OURS,):
            row: dict[str, Any] = dataclasses.asdict(cell) | {"contender": name, "paper_gb": paper, "note": ""}
            try:
                with contextlib.closing(contenders_of(cell, args.labels, args.device, name != OURS)) as made:
                    contender = next(found for title, found in made if title == name)
                    _, peak = measuring.peak_memory(contender.step, args.device)
                row |= {"state_bytes": contender.state_bytes(), "peak_bytes": peak}
                row["total_bytes"] = None if peak is None else row["state_bytes"] + peak
                del contender, made
            except Exception as error:  # out of memory
                row["note"] = measuring.failure(error)
            yield row


def run(args: argparse.Namespace) -> dict[str, Any]:
    report, lengths = measuring.start_report(args, {name: PRECISIONS[name] for name in args.precisions})
    report["table7"] = []
    rates = report["gemm_flop_per_s"]
    cells = [
        Cell(variant, precision, args.batch_size, TEXT[text], recompute == "yes")
        for variant, precision, text, recompute in itertools.product(
            args.variants, args.precisions, args.text, args.recompute
        )
    ]

    def keep(part: str, rows: list[dict[str, Any]]) -> None:
        """Written after every cell: a run that is stopped keeps what it measured."""
        report[part] += rows
        measuring.write_json(args.json, report)

    for cell in cells:
        try:
            rows = measured(cell, args, lengths, rates[cell.precision], args.seconds / len(cells))
        except Exception as error:  # as when memory runs out: the other cells go on
            rows = [dataclasses.asdict(cell) | {"contender": OURS, "note": measuring.failure(error)}]
        keep("rows", rows)
        print(f"{cell}: {rows[0].get('clips_per_second', 0):.3g} clips/s", file=sys.stderr)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if args.table7:
        for row in table7(args):
            keep("table7", [row])
    return report


def measured(
    cell: Cell, args: argparse.Namespace, lengths: list[int], rate: float, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one cell; its models are freed with it."""
    mode = {"mode": "max-autotune-no-cudagraphs" if args.device == "cuda" else "default"} if args.compile else None
    made = contenders_of(cell, args.labels, args.device, HF_INSTALLED and not args.no_peers, mode)
    contenders = dict(made)
    steps = {name: contender.step for name, contender in contenders.items()}
    return rows_of(cell, contenders, measuring.measure(steps, args.device, seconds), lengths, rate, args.device)


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['environment']['device']}, training steps, {report['labels']['count']} labels")
    gigabytes = functools.partial(measuring.shown, form="{:.2f} GB", unit=1e-9)
    for row in report["rows"]:
        recomputed = ", activations recomputed" if row["recompute"] else ""
        print(f"\n{row['variant']} {row['precision']}, trained: {row['towers']}{recomputed}, {row['contender']}")
        if "median_s" in row:
            print(f"  {row['clips_per_second']:.3g} clips/s, batches of {row['batch']}, n = {row['n']}")
            print("  " + ", ".join(f"{part} {1e3 * seconds:.3g} ms" for part, seconds in row["parts_s"].items()))
            print(f"  state {gigabytes(row['state_bytes'])}, peak {gigabytes(row['peak_bytes']) or 'unknown'}")
            if "share_of_gemm" in row:
                print(f"  {row['share_of_gemm']:.0%} of the GEMM rate")
        if row.get("ratio"):
            print(f"  ours has {measuring.ratio_text(row['ratio'])} its speed")
        if row["note"]:
            print(f"  {row['note']}")
    print()
    for row in report["table7"]:
        total = gigabytes(row.get("total_bytes")) or row["note"] or "unknown"
        print(f"Table 7, trained: {row['towers']}: {total} with {row['contender']}; the paper: {row['paper_gb']} GB")
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in report["gemm_flop_per_s"].items())
    print(f"GEMM rate in this run, GFLOP/s: {rates}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with xclip_fast.backend(args.backend):
        report = run(args)
    print_table(report)
    bad = [row for row in report["rows"] if row["note"]]
    return 1 if any(row["contender"] == OURS or "differ" in row["note"] for row in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
