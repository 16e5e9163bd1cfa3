"""Loads many thousand videos, 2 % of them bad, and checks that good ones come once and bad ones are named.

    python benchmarks/soak.py                                      # 20,000 videos, minutes
    python benchmarks/soak.py --samples 2000 --json out.json

The files are generated: small clips of five codecs, each with many names (hard links), and six kinds of bad files. The
manifest lists no damage, as if it came after indexing. The checks are: every good video is delivered exactly once an
epoch, every bad one is in the report, memory does not grow after the first tenth, and no batch takes longer than a
minute. The exit code is 0 if all checks pass.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import arguments
import av
import measuring
import numpy as np

from xclip_fast.data.decode.decoder import probe
from xclip_fast.data.decode.video import Video
from xclip_fast.data.loader.loader import loader
from xclip_fast.data.manifest.manifest import Manifest
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.data.transforms import TrainTransform

CODECS = (("libx264", ".mp4"), ("libx265", ".mkv"), ("libvpx-vp9", ".webm"), ("mjpeg", ".avi"), ("mpeg4", ".mp4"))
CLIP_FRAMES, CLIP_SIZE = 12, (72, 96)
BAD = ("corrupt", "truncated", "audio only", "missing", "empty", "text")
EVERY = 50  # every 50th video is bad
LOOKS = 20  # measurements of memory, evenly over the run
WORKERS, THREADS = 2, 2  # of the loader
PATIENCE = 60.0  # seconds for a batch
SLACK = 1.05, 16 * 2**20  # factor and bytes by which memory may grow after the first tenth


def make_pool(folder: Path, clips: int) -> list[tuple[Path, Video]]:
    """Good clips of every codec, with the rows of an index."""
    pool = []
    for number in range(clips):
        codec, suffix = CODECS[number % len(CODECS)]
        label = number % len(CLASSES)
        path = folder / f"{number}{suffix}"
        frames = render(CLASSES[label], 0, number, frames=CLIP_FRAMES, size=CLIP_SIZE)
        quiet: dict[str, Any] = {"x265-params": "log-level=error"} if codec == "libx265" else {}
        write_clip(path, frames, codec=codec, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p", **quiet)
        pool.append((path, replace(probe(path), path=path.name, label=label)))
    return pool


def spoil(kind: str, good: Path, bad: Path) -> None:
    """Writes a bad file, or none, in the place of a copy of a good one."""
    data = good.read_bytes()
    if kind == "corrupt":  # noise of the same length
        bad.write_bytes(np.random.default_rng(len(data)).bytes(len(data)))
    elif kind == "truncated":  # the index of an MP4 file is at its end
        bad.write_bytes(data[: len(data) // 2])
    elif kind == "audio only":
        with av.open(bad, "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 8000
            container.mux([*stream.encode(frame), *stream.encode(None)])
    elif kind == "empty":
        bad.write_bytes(b"")
    elif kind == "text":
        bad.write_text("This is no video.\n" * 20, encoding="utf-8")


def make_data(folder: Path, samples: int, clips: int) -> tuple[Manifest, dict[int, str]]:
    """A manifest of so many files, and the kind of each bad row."""
    (folder / "pool").mkdir()
    (folder / "data").mkdir()
    pool = make_pool(folder / "pool", clips)
    videos, bad = [], {}
    for row in range(samples):
        good, video = pool[row % len(pool)]
        name = f"{row:06d}{good.suffix}"
        if row % EVERY == EVERY - 1:
            bad[row] = BAD[row // EVERY % len(BAD)]
            good, video = pool[0]  # an MP4
            name = f"{row:06d}.mp4"
            spoil(bad[row], good, folder / "data" / name)
        else:
            os.link(good, folder / "data" / name)
        status = good.stat()
        videos.append(replace(video, path=name, size=status.st_size, mtime_ns=status.st_mtime_ns))
    return Manifest(folder / "data", CLASSES, tuple(videos)), bad


def memory(pid: int | str) -> int:
    """Bytes of a process in memory that belong to no file (Linux): private memory, and open shared memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def soak(
    folder: Path, samples: int = 20_000, *, clips: int = 60, batch: int = 32, frames: int = 4, size: int = 64
) -> dict[str, Any]:
    """Runs the checks in an empty folder. All values under "passed" in the result must be true."""
    manifest, bad = make_data(folder, samples, clips)
    transform = TrainTransform(frames=frames, size=size)
    batches = loader(manifest, transform, batch, device="cpu", shuffle=True, workers=WORKERS, threads=THREADS)
    looks, waits = [], []
    in_order = True
    counts: Counter[int] = Counter()
    start = before = time.perf_counter()
    for number, got in enumerate(batches, 1):
        waits.append(time.perf_counter() - before)
        rows = got.samples.tolist()
        counts.update(rows)
        in_order &= got.labels.tolist() == [manifest.videos[row].label for row in rows]
        in_order &= tuple(got.frames.shape) == (len(rows), frames, size, size, 3)
        if number * LOOKS // len(batches) > (number - 1) * LOOKS // len(batches):
            pids = [process.pid for process in batches.workers.processes]
            workers = sum(memory(pid) for pid in pids)
            looks.append({"batch": number, "parent": memory("self"), "workers": workers})
        before = time.perf_counter()
    seconds = time.perf_counter() - start
    report, restarts = batches.report, batches.workers.restarts
    batches.close()
    first, last = looks[max(1, LOOKS // 10) - 1], looks[-1]
    reasons: dict[str, set[str]] = {}
    for row, kind in bad.items():
        if row in report.bad:
            reasons.setdefault(kind, set()).add(report.bad[row])
    return {
        "samples": samples,
        "bad": dict(Counter(bad.values())),
        "reasons": {kind: sorted(texts)[:3] for kind, texts in reasons.items()},
        "settings": {"clips": clips, "batch": batch, "frames": frames, "size": size},
        "summary": f"{report.delivered} of {report.total} videos; {len(report.bad)} could not be read",
        "seconds": seconds,
        "videos_per_second": samples / seconds,
        "first_batch_seconds": waits[0],
        "longest_wait_seconds": max(waits[1:]),
        "restarts": restarts,
        "memory": looks,
        "passed": {
            "every good video exactly once": counts == Counter(row for row in range(samples) if row not in bad),
            "labels and shapes": in_order,
            "every bad video named": set(report.bad) == set(bad),
            "memory flat": all(last[who] <= SLACK[0] * first[who] + SLACK[1] for who in ("parent", "workers")),
            "nothing hangs": max(waits) < PATIENCE,
            "no worker died": restarts == 0,
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__, json_help="write the result here")
    parser.add_argument("--samples", type=arguments.count, default=20_000, help="number of videos (default 20000)")
    args = parser.parse_args(argv)
    if args.samples < 2 * EVERY:
        arguments.fail(f"--samples {args.samples}: at least {2 * EVERY} wanted, of which two are bad")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = {"environment": measuring.environment("cpu"), **soak(Path(folder), args.samples)}
    print(f"{result['summary']}, in {result['seconds']:.0f} s ({result['videos_per_second']:.0f} videos/s)")
    waits = result["first_batch_seconds"], result["longest_wait_seconds"]
    print(f"first batch after {waits[0]:.2f} s, longest wait for another {waits[1]:.2f} s")
    for look in result["memory"]:
        parent, workers = (look[who] / 2**20 for who in ("parent", "workers"))
        print(f"batch {look['batch']:6d}: parent {parent:6.0f} MiB, workers {workers:6.0f} MiB")
    for check, passed in result["passed"].items():
        print(f"{'passed' if passed else 'FAILED'}: {check}")
    measuring.write_json(args.json, result)
    return 0 if all(result["passed"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
