"""The time of `xclip-fast classify` on one clip, from the start of the process to the answer, by part.

    python benchmarks/cold_start.py CHECKPOINT CLIP.mp4 --labels "riding a bike,swimming" --runs 5

Every run is a new process that does the work of the command. The first run fills the page cache and does not count.
`--random VARIANT` first writes a checkpoint with random weights.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arguments

PARTS = ("start", "imports", "weights", "labels", "decode", "model")
CHILD = """
import json, sys, time
now = lambda: (time.time(), time.process_time())
marks = [now()]
import xclip_fast
import torch
from xclip_fast.cli import predict, main
from xclip_fast.inference import batches
marks.append(now())
checkpoint, clip, labels = sys.argv[1:4]
model = xclip_fast.XCLIP.from_pretrained(checkpoint)
marks.append(now())
with torch.inference_mode():
    text = model.encode_text(labels.split(","))
    marks.append(now())
    from xclip_fast.data.decode.decoder import decode
    video = decode(clip, model.config.num_frames, size=model.config.vision.image_size)
    marks.append(now())
    model.similarity(model.encode_video(video[None]), text).softmax(-1).topk(1)
marks.append(now())
print(json.dumps(marks))
"""


def one_run(checkpoint: str, clip: str, labels: str) -> dict[str, tuple[float, float]]:
    """(wall seconds, processor seconds of all threads) of each part in a new process."""
    begin = time.time(), 0.0
    given = [sys.executable, "-c", CHILD, checkpoint, clip, labels]
    marks = [begin, *json.loads(subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True).stdout)]
    pairs = zip(PARTS, itertools.pairwise(marks), strict=True)
    return {part: (after[0] - before[0], after[1] - before[1]) for part, (before, after) in pairs}


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("clip", nargs="?")
    parser.add_argument("--labels", default="riding a bike,swimming")
    parser.add_argument("--random", metavar="VARIANT", help="random weights of this shape and a generated clip")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.random is None and args.clip is None:
        parser.error("a checkpoint and a clip wanted, or --random VARIANT")
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            import contenders

            import xclip_fast

            args.checkpoint, args.clip = folder, str(contenders.write_clips(Path(folder))[0])
            xclip_fast.XCLIP(args.random).save_pretrained(folder, overwrite=True)
        runs = [one_run(args.checkpoint, args.clip, args.labels) for _ in range(args.runs + 1)][1:]
    parts = {
        part: [statistics.median(times) for times in zip(*(run[part] for run in runs), strict=True)] for part in PARTS
    }
    totals = [sum(times) for times in zip(*parts.values(), strict=True)]
    print(f"{'':8} {'seconds':>8} {'share':>6} {'processor':>10} {'share':>6}   medians of {args.runs}")
    for part, times in [*parts.items(), ("total", totals)]:
        shares = [each / total for each, total in zip(times, totals, strict=True)]
        print(f"{part:8} {times[0]:8.2f} {shares[0]:6.0%} {times[1]:10.2f} {shares[1]:6.0%}")
    if args.json:
        import measuring

        environment = measuring.environment("cpu")
        measuring.write_json(args.json, {"environment": environment, "variant": args.random, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
