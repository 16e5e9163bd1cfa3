"""What float8 costs in accuracy: a checkpoint's answers to video files in float32, bfloat16 and float8.

    python benchmarks/fp8.py CHECKPOINT CALIBRATION.jsonl TEST.jsonl

Calibrates on some videos of the first manifest and classifies those of the second among its classes. Compare what
float8 changes with what bfloat16 changes. On a CPU the float8 arithmetic is emulated, with the same accuracy; nothing
is timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import arguments
import measuring
import torch
import torch.nn.functional as F
from torch import Tensor

from xclip_fast import XCLIP
from xclip_fast.data.loader.loader import loader
from xclip_fast.data.manifest.manifest import Manifest
from xclip_fast.data.transforms import TestTransform
from xclip_fast.text.labels import candidates
from xclip_fast.weights.recipe import Trained


def batches(manifest: Manifest, model: XCLIP, args: argparse.Namespace) -> Any:
    config = model.config
    trained = Trained.read(args.checkpoint)
    transform = TestTransform(
        frames=config.num_frames,
        size=config.vision.image_size,
        sampling=trained.sampling,
        stride=trained.stride,
    )
    device = model.visual.conv1.weight.device
    return loader(manifest, transform, args.batch_size, device=device, workers=args.workers)


def answers(model: XCLIP, manifest: Manifest, texts: list[str], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The logits (M, K) of the videos, float32, and their labels (M,)."""
    found, labels = [], []
    with torch.inference_mode():
        for batch in batches(manifest, model, args):
            found.append(model(batch.frames, texts).float().cpu())
            labels.append(batch.labels.cpu())
    return torch.cat(found), torch.cat(labels)


def compare(exact: Tensor, found: Tensor, labels: Tensor) -> dict[str, float]:
    """How ``found`` differs from ``exact``; accuracies are fractions."""
    cosine = F.cosine_similarity(found, exact, dim=1)
    return {
        "top-1": (found.argmax(1) == labels).float().mean().item(),
        "same answer": (found.argmax(1) == exact.argmax(1)).float().mean().item(),
        "cosine of all logits": F.cosine_similarity(found.flatten(), exact.flatten(), dim=0).item(),
        "least cosine of a video": cosine.min().item(),
        "videos below 0.999": int((cosine < 0.999).sum()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint, as XCLIP.from_pretrained takes it")
    parser.add_argument("calibration", type=Path, help="manifest of videos to calibrate on")
    parser.add_argument("test", type=Path, help="manifest of videos to classify")
    parser.add_argument(
        "--calibration-videos", type=int, default=64, help="number of videos to calibrate on (default 64)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="videos in a batch (default 16)")
    parser.add_argument("--workers", type=int, help="worker processes of the loader; 0: decode in this process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    model = XCLIP.from_pretrained(args.checkpoint, device=args.device, dtype=torch.float32)
    test, calibration = Manifest.read(args.test), Manifest.read(args.calibration)
    # spread over the manifest, which is usually sorted by class
    step = max(1, len(calibration.usable) // max(1, args.calibration_videos))
    calibration = calibration.select(calibration.usable[::step][: args.calibration_videos])
    texts = list(candidates(test.classes, None)[1])
    wide, labels = answers(model, test, texts, args)
    exact, _ = answers(model.bfloat16(), test, texts, args)
    model.quantize("fp8", calibration=(batch.frames for batch in batches(calibration, model, args)))
    found, _ = answers(model, test, texts, args)
    rows = {
        "float32": compare(wide, wide, labels),
        "bfloat16, against float32": compare(wide, exact, labels),
        "float8, against bfloat16": compare(exact, found, labels),
    }
    print(f"{len(labels)} videos, {len(texts)} labels, calibrated on {len(calibration.usable)}")
    print("| model | " + " | ".join(rows["float32"]) + " |\n|---|" + "---|" * len(rows["float32"]))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.5g}" for value in row.values()) + " |")
    if args.json:
        report = {"environment": measuring.environment(args.device), "videos": len(labels), "rows": rows}
        measuring.write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
