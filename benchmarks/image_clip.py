"""transformers' CLIP beside itself with accelerated blocks, and ViFi-CLIP's way with videos, in one run.

    python benchmarks/image_clip.py                 # B/16, random weights: about a minute on a CPU
    python benchmarks/image_clip.py --images 8 --videos 1 --frames 8 --precisions fp32,bf16 --json out.json

Images: the vision tower with its projection. Videos: the same on every frame and the mean, as ViFi-CLIP computes
them, and our own CLIP-Mean model. Labels: the text tower, labels padded to 77 tokens; our own model packs them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import arguments
import measuring
import torch
from contenders import PRECISIONS
from labels import read_labels

from xclip_fast import VARIANTS, XCLIP, accelerate, tokenize

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


def clip_b16() -> Any:
    """transformers' CLIP with the shapes of openai/clip-vit-base-patch16."""
    import transformers

    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()


def clip_mean(model: Any) -> XCLIP:
    """Our model of the same weights: plain towers, the mean over frames."""
    shape = VARIANTS["B/16-8f"]
    vision = dataclasses.replace(shape.vision, cross_frame=False)
    config = dataclasses.replace(shape, vision=vision, mit_layers=0, prompt="none")
    return XCLIP(config).expand_from(model).eval()


def works(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    """By name of the work, its contenders; the first is what the others are compared with."""
    torch.manual_seed(0)
    stock = clip_b16().to(dtype)
    ours, own = accelerate(copy.deepcopy(stock)), clip_mean(stock)
    images = torch.randn(args.images, 3, 224, 224, dtype=dtype)
    videos = torch.randn(args.videos, args.frames, 3, 224, 224, dtype=dtype)
    padded, packed = tokenize(args.labels, pad=True), tokenize(args.labels)

    def encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def mean(model: Any) -> torch.Tensor:
        return encode(model, videos.flatten(0, 1)).unflatten(0, videos.shape[:2]).mean(1)

    def text(model: Any) -> torch.Tensor:
        return model.text_projection(model.text_model(input_ids=padded).pooler_output)

    def own_text() -> torch.Tensor:
        own.text.forget()
        return own.encode_text(packed)

    towers = {"Hugging Face": stock, "accelerated": ours}
    return {
        "images": {name: lambda m=model: encode(m, images) for name, model in towers.items()},
        "videos": {name: lambda m=model: mean(m) for name, model in towers.items()}
        | {"CLIP-Mean": lambda: own.encode_video(videos).video},
        "labels": {name: lambda m=model: text(m) for name, model in towers.items()} | {"CLIP-Mean": own_text},
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__, json_help="write every raw timing here")
    for option, default in (("--images", 4), ("--videos", 1), ("--frames", 8)):
        parser.add_argument(option, type=arguments.count, default=default, help=f"number of them (default {default})")
    parser.add_argument("--labels", type=read_labels, default="16", help="number, or a file with one on each line")
    names, kinds = arguments.names, ("images", "videos", "labels")
    parser.add_argument("--precisions", type=names(PRECISIONS), default=["fp32"], help="comma-separated (default fp32)")
    parser.add_argument(
        "--works", type=names(kinds), default=list(kinds), help=f"comma-separated, of {', '.join(kinds)}"
    )
    parser.add_argument(
        "--seconds", type=arguments.positive, default=60.0, help="for each work and precision (default 60)"
    )
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"environment": measuring.environment("cpu"), "rows": []}
    for precision in args.precisions:
        prepared = works(args, PRECISIONS[precision])
        for work in args.works:
            with torch.inference_mode():
                results = measuring.measure(prepared[work], "cpu", args.seconds)
            base = {"work": work, "precision": precision}
            rows = measuring.rows(results, base, TOLERANCE[precision], baseline=True)
            report["rows"] += rows
            for row in rows:
                if not row["note"]:
                    ratio, off = measuring.ratio_text(row.get("ratio")), row.get("largest_error", 0.0)
                    told = f"{1e3 * row['median_s']:8.1f} ms   {ratio:20}   off by {off:.0e}"
                print(f"{work:7} {precision} {row['contender']:13} {row['note'] or told}")
            measuring.write_json(args.json, report)  # a run that is stopped keeps what it measured
    return int(any(row["note"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
