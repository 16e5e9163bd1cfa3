"""The time of `xclip-fast classify` on one clip, from the start of the process to the answer, by part.

    python benchmarks/cold_start.py --random B/16-8f --runs 9

Every run is a new process that runs the command. The first run fills the page cache, writes Python's bytecode and does
not count. "exit" is the time from the answer to the end of the process.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arguments
import contenders
import measuring

from xclip_fast import VARIANTS, XCLIP

PARTS = ("start", "imports", "weights", "labels", "decode", "model")
# main() of xclip_fast/__main__.py with a mark at the end of each part
CHILD = """
import gc, json, time
marks = []
def mark(*_):
    marks.append((time.time(), time.process_time()))
def around(call, before=None, after=None):
    def marked(*args, **kwargs):
        if before: before()
        result = call(*args, **kwargs)
        if after: after(result)
        return result
    return marked
def mark_model(model):
    model.to = around(model.to, after=mark)
    model.encode_text = around(model.encode_text, after=mark)
    model.encode_video = around(model.encode_video, before=mark)
mark()
from xclip_fast.cli import main, options
options.Model.load = around(options.Model.load, mark, mark_model)
try:
    main.main()
except SystemExit as end:
    mark()
    gc.freeze()
    print(json.dumps(marks), flush=True)
    if end.code: raise
"""


def one_run(checkpoint: str, clip: str, dtype: str) -> dict[str, tuple[float, float]]:
    """(wall seconds, processor seconds of all threads) of each part in a new process; "exit": after the answer."""
    command = ["classify", clip, "--checkpoint", checkpoint, "--labels", "riding a bike,swimming", "--dtype", dtype]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", CHILD, *command], stdout=subprocess.PIPE, env=environment, check=True)
    end, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    marks = [(begin, 0.0), *json.loads(done.stdout.splitlines()[-1]), (end, processor)]
    pairs = zip((*PARTS, "exit"), itertools.pairwise(marks), strict=True)
    return {part: (after[0] - before[0], after[1] - before[1]) for part, (before, after) in pairs}


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__, json_help="write the times of every run here")
    parser.add_argument("--dtype", default="float32", help="as for classify (default: float32)")
    parser.add_argument(
        "--random",
        metavar="VARIANT",
        choices=VARIANTS,
        default="B/16-8f",
        help="a shape, which gets random weights (default B/16-8f)",
    )
    parser.add_argument("--runs", type=arguments.count, default=5, help="number of processes (default 5)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        clip = str(contenders.write_clips(Path(folder))[0])
        XCLIP(args.random).save_pretrained(folder, overwrite=True)
        runs = [one_run(folder, clip, args.dtype) for _ in range(args.runs + 1)][1:]
    medians = {
        part: [statistics.median(times) for times in zip(*(run[part] for run in runs), strict=True)] for part in runs[0]
    }
    answer = [sum(times) for times in zip(*(medians[part] for part in PARTS), strict=True)]
    print(f"{'':8} {'seconds':>8} {'share':>6} {'processor':>10} {'share':>6}   medians of {args.runs}")
    for part, times in {**{part: medians[part] for part in PARTS}, "answer": answer, "exit": medians["exit"]}.items():
        shares = [each / whole for each, whole in zip(times, answer, strict=True)]
        print(f"{part:8} {times[0]:8.2f} {shares[0]:6.0%} {times[1]:10.2f} {shares[1]:6.0%}")
    settings = {"variant": args.random, "dtype": args.dtype}
    measuring.write_json(args.json, {"environment": measuring.environment("cpu"), **settings, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
