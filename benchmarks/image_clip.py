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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arguments
import measuring
import torch
from contenders import PRECISIONS
from labels import label_list

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
    labels = label_list(args.labels)
    padded, packed = tokenize(labels, pad=True), tokenize(labels)

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


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--videos", type=int, default=1)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--labels", type=int, default=16)
    parser.add_argument("--precisions", default="fp32")
    parser.add_argument("--works", default="images,videos,labels")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each work and precision")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for precision in args.precisions.split(","):
        prepared = works(args, PRECISIONS[precision])
        for work in args.works.split(","):
            with torch.inference_mode():
                results = measuring.measure(prepared[work], "cpu", args.seconds)
            stock = results["Hugging Face"]
            for name, result in results.items():
                off = measuring.largest_error(result["output"], stock["output"])
                if off > TOLERANCE[precision]:
                    raise SystemExit(f"{work} {precision} {name}: off by {off:.1g}")
                row = {"work": work, "precision": precision, "name": name} | measuring.timings(result)
                rows.append(
                    row | {"ratio": (ratio := measuring.ratio(stock["seconds"], result["seconds"])), "off": off}
                )
                milliseconds, text = 1e3 * row["median_s"], measuring.ratio_text(ratio)
                print(f"{work:7} {precision} {name:13} {milliseconds:8.1f} ms   {text:20}   off by {off:.0e}")
    if args.json:
        measuring.write_json(args.json, {"environment": measuring.environment("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
