"""Decoding a few frames of a video file: ours beside a full decode and a seek per frame; the loader, also with DALI.

    python benchmarks/decode.py                                     # minutes
    python benchmarks/decode.py --keyframes 12 --frames 8 --json out.json
    python benchmarks/decode.py --pictures bikes.mp4 --processor-time

Pictures are generated (moving textures under grain) or come from video files. x264 writes them as H.264 with its
defaults, B frames, and a keyframe at least every 12, 60 or 250 frames. "copy" and "training" are the copies by
`xclip-fast transcode` of the last kind. All contenders use one thread, and must give the same frames.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import arguments
import av
import measuring
import numpy as np
import torch
from arguments import fail
from av.video.reformatter import VideoReformatter
from scenes import COPIES, COPY, TRAINING, write_clips

from xclip_fast.data.decode.decoder import decode_frames, probe
from xclip_fast.data.decode.picture import EXACT_COLOR
from xclip_fast.data.decode.source import Source
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.sampling import frame_indices
from xclip_fast.data.transforms import TestTransform

FULL, STORED, PLANNED, SEEKING = "full decode", "ours, stored plan", "ours, first sight", "seek for each frame"
LOADER, LOADER_DALI = "loader, PyAV", "loader, DALI"
OURS = (STORED, PLANNED, LOADER, LOADER_DALI)
WORKS = ("file", "loader")
GENERATED = "generated"
CLIP_FRAMES, CLIP_SIZE = 300, (256, 340)  # (height, width): ten seconds of Kinetics
LOADED_FILES, LOADED_BATCH = 64, 8
LOADER_WORKERS: int | None = None  # the loader's own choice
MOST_EPOCHS = 20
NEAR = 3.0  # levels of mean difference of a frame: DALI converts colors differently, and the next frame is far off


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.parser(__doc__, json_help="write the rows here: quartiles of the times, ratios")
    kinds = f"12,60,250,{COPY},{TRAINING}"
    parser.add_argument(
        "--keyframes", type=keyframes, default=kinds, help=f"frames from one to the next (default {kinds})"
    )
    parser.add_argument(
        "--frames", type=arguments.counts, default="8,16,32", help="frames wanted of each clip (default 8,16,32)"
    )
    parser.add_argument(
        "--works",
        type=arguments.names(WORKS),
        default=list(WORKS),
        help="file: one file, one thread; loader: all cores (first pictures, first and last kind, fewest frames)",
    )
    parser.add_argument("--pictures", default=GENERATED, help=f"{GENERATED}, or video files, comma-separated")
    parser.add_argument("--device", type=arguments.device, default="auto", help="of the loader: auto, cpu or cuda")
    parser.add_argument("--processor-time", action="store_true", help="of one file: for a busy machine")
    parser.add_argument("--seconds", type=arguments.positive, default=120.0, help="time limit, roughly (default 120)")
    args = parser.parse_args(argv)
    args.pictures = args.pictures.split(",")
    if max(args.frames) > CLIP_FRAMES:
        fail(f"--frames {max(args.frames)}: the clips have {CLIP_FRAMES}")
    for name in args.pictures:
        if name != GENERATED and not Path(name).is_file():
            fail(f"--pictures {name}: no such file")
    return args


def keyframes(given: str) -> list[int | str]:
    return [part if part in COPIES else arguments.count(part) for part in given.split(",")]


def converter() -> Callable[[av.VideoFrame], np.ndarray]:
    """Converts frames to RGB with our settings, so that the pixels and the work can be compared."""
    convert = functools.partial(VideoReformatter().reformat, format="rgb24", interpolation=EXACT_COLOR, threads=1)
    return lambda frame: convert(frame).to_ndarray()


def full_decode(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """Decode all frames and convert those asked for."""
    wanted, to_rgb = set(numbers), converter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return np.stack([to_rgb(frame) for place, frame in enumerate(container.decode(stream)) if place in wanted])


def seek_for_each(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """For each frame, seek to the keyframe before it and decode up to it: the usual loop."""
    found, to_rgb = [], converter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for place in numbers:
            when = (stream.start_time or 0) + round(place / stream.average_rate / stream.time_base)
            container.seek(when, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= when)
            found.append(to_rgb(frame))
    return np.stack(found)


Cell = dict[str, Any]  # the entries of a row that say what is decoded


def file_rows(cell: Cell, path: Path, seconds: float) -> list[dict[str, Any]]:
    """The rows of one file on one thread."""
    numbers = frame_indices(CLIP_FRAMES, cell["frames"], "sparse").tolist()
    planned = Source(str(path), size=path.stat().st_size, plan=probe(path).plan)
    ways: dict[str, Callable[[], np.ndarray]] = {
        FULL: lambda: full_decode(path, numbers),
        PLANNED: lambda: decode_frames(path, numbers),
        STORED: lambda: decode_frames(planned, numbers),
        SEEKING: lambda: seek_for_each(path, numbers),
    }
    calls = {name: lambda way=way: torch.from_numpy(way()) for name, way in ways.items()}
    results = measuring.measure(calls, "cpu", seconds, pause=0.0)
    rows = measuring.rows(results, cell, 0.0, baseline=True)
    for row in rows:
        if not row["note"]:
            row["clips_per_second"] = 1 / row["median_s"]
            row["seconds"] = measuring.quartiles(row["seconds"])
    return rows


def loader_rows(cell: Cell, path: Path, device: str, seconds: float) -> list[dict[str, Any]]:
    """The rows of the loader over many copies of a file on all cores: cropped, resized batches on the device."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for place in range(LOADED_FILES):
            shutil.copy(path, Path(folder) / f"{place:03}.mp4")
        manifest = index(folder, workers=0)
        rows, first = [], None
        for name, decoder in ((LOADER, "cpu"), (LOADER_DALI, "dali")):
            row = {**cell, "contender": name, "note": ""}
            rows.append(row)
            try:
                rates, frames = run_loader(manifest, cell["frames"], device, decoder, seconds / 2)
            except (ImportError, ValueError) as error:
                row["note"] = "not run: " + str(error).splitlines()[0]
                continue
            row |= {"n": len(rates), "rates": measuring.quartiles(rates), "clips_per_second": statistics.median(rates)}
            if first is not None:
                row["largest_mean_difference"] = (frames - first).abs().mean().item()
                row["ratio_to_pyav"] = row["clips_per_second"] / rows[0]["clips_per_second"]
                if row["largest_mean_difference"] > NEAR:
                    row["note"] = f"outputs differ by {row['largest_mean_difference']:.3g} levels on average"
            first = frames
    return rows


def run_loader(
    manifest: Manifest, frames: int, device: str, decoder: Any, seconds: float
) -> tuple[list[float], torch.Tensor]:
    """Clips per second of each epoch, from its first batch to its last, and the frames of the first batch."""
    from xclip_fast.data.loader.loader import loader

    if decoder == "dali" and device != "cuda":
        raise ValueError("DALI decodes H.264 on a GPU only, and there is none here")
    workers = LOADER_WORKERS if decoder == "cpu" else None
    options: dict[str, Any] = {"device": device, "decoder": decoder, "workers": workers, "max_bad": 0}
    batches = loader(manifest, TestTransform(frames=frames), LOADED_BATCH, **options)
    rates: list[float] = []
    begin = time.perf_counter()
    try:
        while not rates or (len(rates) < MOST_EPOCHS and time.perf_counter() - begin < seconds):
            epoch = iter(batches)
            first, start = next(epoch).frames, time.perf_counter()
            clips = sum(len(batch.samples) for batch in epoch)
            if device == "cuda":
                torch.cuda.synchronize()
            rates.append(clips / (time.perf_counter() - start))
        return rates, first.cpu().float()
    finally:
        batches.close()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all cells. Returns the content of the JSON."""
    deadline = time.perf_counter() + args.seconds
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        print("writing the clips ...", file=sys.stderr)
        files: dict[tuple[str, int | str], Path] = {}
        for place, name in enumerate(args.pictures):
            home = Path(folder) / str(place)
            home.mkdir()
            real = None if name == GENERATED else Path(name)
            written = write_clips(home, args.keyframes, CLIP_FRAMES, CLIP_SIZE, real)
            files |= {(real.stem if real else name, kind): path for kind, path in written.items()}
        clips = [clip_facts(*kind, path) for kind, path in files.items()]
        report = {"environment": measuring.environment(args.device), "clips": clips, "rows": rows}
        # the loader with the fewest frames, where decoding weighs most
        ends = [(next(iter(files))[0], args.keyframes[end], min(args.frames)) for end in (0, -1)]
        cells: list[Cell] = [
            {"work": work, "pictures": name, "keyframe_every": kind, "frames": frames}
            for work in args.works
            for name, kind in files
            for frames in args.frames
            if work == "file" or (name, kind, frames) in ends
        ]
        for done, cell in enumerate(cells):
            seconds = max(0.5, deadline - time.perf_counter()) / (len(cells) - done)
            path = files[cell["pictures"], cell["keyframe_every"]]
            try:
                if cell["work"] == "file":
                    rows += file_rows(cell, path, seconds)
                else:
                    rows += loader_rows(cell, path, args.device, seconds)
            except Exception as error:  # the other cells go on
                contender = STORED if cell["work"] == "file" else LOADER
                rows.append({**cell, "contender": contender, "note": measuring.failure(error)})
            measuring.write_json(args.json, report)  # a run that is stopped keeps what it measured
            print(f"{', '.join(map(str, cell.values()))} frames: done", file=sys.stderr)
    return report


def clip_facts(pictures: str, kind: int | str, path: Path) -> dict[str, Any]:
    info = probe(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        referenced = sum(1 for _ in container.decode(stream))  # other frames need these
    return {
        "pictures": pictures,
        "keyframe_every": kind,
        "frames": info.frames,
        "keyframes": len(info.plan.keyframes) if info.plan else None,
        "referenced": referenced,
        "kbit_per_s": path.stat().st_size / info.duration / 125,
    }


def print_table(report: dict[str, Any]) -> None:
    print(report["environment"]["device"])
    before = None
    for row in report["rows"]:
        cell = f"{row['pictures']}, keyframe every {row['keyframe_every']}, {row['frames']} frames"
        if cell != before:
            print(f"\n{cell}\n  {'':20} {'clips/s':>8}  {'x full decode':22} {'n':>3}")
        before = cell
        if "clips_per_second" in row:
            ratio = measuring.ratio_text(row.get("ratio"))
            print(f"  {row['contender']:20} {row['clips_per_second']:8.3g}  {ratio:22} {row['n']:3}")
        if row["note"]:
            print(f"  {row['contender']:20} {row['note']}")
    print()
    for clip in report["clips"]:
        print(
            f"{clip['pictures']}, keyframe every {clip['keyframe_every']}: {clip['keyframes']} keyframes, "
            f"{clip['referenced']} of {clip['frames']} frames are referred to, {clip['kbit_per_s']:.0f} kbit/s"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.processor_time:
        measuring.clock = time.process_time
    report = run(args)
    print_table(report)
    wrong = [row for row in report["rows"] if row["note"].startswith(("outputs differ", "failed"))]
    return 1 if any(row["contender"] in OURS for row in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
