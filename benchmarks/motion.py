"""The effect of each part of X-CLIP: the component ablation (Table 6) on clips that differ in their order alone.

    python benchmarks/motion.py

The classes of the motion clips come in pairs. One class of a pair is the other played backwards, so a model that
ignores the order of the frames cannot tell them apart. The script writes the clips as mp4 files, indexes them, trains
each model from random weights with the real loader and training loop (`xclip_fast/configs/motion.yaml`), and tests it
on other clips. All files stay in the work folder and are not made again. Two models are trained at a time, each on one
core.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import arguments
import measuring

from xclip_fast.data.manifest.manifest import Manifest
from xclip_fast.model import XCLIP
from xclip_fast.weights.recipe import Trained

# Each row adds a part to the row before it.
MODELS = {
    "CLIP-Mean": ["model.vision.cross_frame=false", "model.mit_layers=0", "model.prompt=none"],
    "+ cross-frame communication": ["model.mit_layers=0", "model.prompt=none"],
    "+ multi-frame integration": ["model.prompt=none"],
    "+ video-specific prompts": [],
}


def by_order(confusion: Any) -> tuple[float, float]:
    """The share of clips in the right pair of classes, and the share of those with the right order (chance: 1/2)."""
    pairs = confusion.reshape(5, 2, 5, 2).diagonal(axis1=0, axis2=2)  # (2, 2, 5): truth, prediction, pair
    in_pair = int(pairs.sum())
    return in_pair / int(confusion.sum()), int(pairs[0, 0].sum() + pairs[1, 1].sum()) / max(1, in_pair)


def test(checkpoint: Path, manifest: Path) -> dict[str, float]:
    from xclip_fast.evaluate.loop import evaluate

    given = Trained.read(checkpoint).choose()
    result = evaluate(XCLIP.from_pretrained(checkpoint), Manifest.read(manifest), workers=0, **given)
    pair, order = by_order(result.confusion)
    return {"top1": result.top1, "pair": pair, "order": order}


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__, json_help="write the figures here")
    count = arguments.count
    parser.add_argument("--work", type=Path, default=Path("runs/motion-ablation"), help="folder for clips and runs")
    parser.add_argument("--clips", type=count, default=1000, help="training clips of each class (default 1000)")
    parser.add_argument("--test-clips", type=count, default=100, help="test clips of each class (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of clips and weights (default 0)")
    every = ",".join(MODELS)
    parser.add_argument(
        "--models", type=arguments.names(MODELS), default=every, help="rows, comma-separated (default: all)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="training configuration, such as optim.epochs=5"
    )
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    data = args.work / "data"
    given = ["--clips", str(args.clips), "--test-clips", str(args.test_clips), "--seed", str(args.seed)]
    subprocess.run([sys.executable, "-m", "xclip_fast", "motion", str(data), *given], check=True)
    train, held_out = (data / split / "manifest.jsonl" for split in ("train", "test"))
    made = time.perf_counter() - begin
    print(f"{10 * (args.clips + args.test_clips)} clips in {made:.0f} s", flush=True)

    def output_of(name: str) -> Path:
        return args.work / f"model-{list(MODELS).index(name)}"

    def trained(name: str) -> tuple[bool, float]:
        """Whether the training succeeded, and its seconds. What it says is in a file beside its folder."""
        output, started = output_of(name), time.perf_counter()
        given = [f"data.train={train}", f"output={output}", *MODELS[name]]
        given += ["data.val=null", f"seed={args.seed}", *args.overrides]
        command = [sys.executable, "-m", "xclip_fast", "train", "motion", *given]
        with open(output.with_suffix(".txt"), "w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:  # the other models go on
            print(output.with_suffix(".txt").read_text(), file=sys.stderr)
        return done.returncode == 0, time.perf_counter() - started

    with ThreadPoolExecutor(2) as pool:
        ended = dict(zip(args.models, pool.map(trained, args.models), strict=True))
    rows: list[dict[str, Any]] = []
    clips = {"seed": args.seed, "clips_per_class": args.clips, "test_clips_per_class": args.test_clips}
    report = {"environment": measuring.environment("cpu"), **clips, "rows": rows}
    print("| model | top-1 | right pair | right order in it (chance 50 %) | training, s |\n|---|---|---|---|---|")
    for name, (succeeded, seconds) in ended.items():
        if not succeeded:
            rows.append({"model": name, "note": "its training failed"})
            print(f"| {name} | its training failed | | | {seconds:.0f} |", flush=True)
            continue
        found = test(output_of(name) / "last", held_out)
        rows.append({"model": name, **found, "train_seconds": seconds})
        figures = " | ".join(f"{100 * found[key]:.1f} %" for key in ("top1", "pair", "order"))
        print(f"| {name} | {figures} | {seconds:.0f} |", flush=True)
        measuring.write_json(args.json, report)
    total = time.perf_counter() - begin
    busy = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{10 * args.test_clips} test clips; all of it took {total:.0f} s, and {busy:.0f} s of processor time")
    measuring.write_json(args.json, report | {"seconds": total, "processor_seconds": busy})
    return 0 if all(succeeded for succeeded, _ in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
