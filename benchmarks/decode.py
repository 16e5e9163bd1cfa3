"""Getting a few frames out of a video file: ours beside a full decode, a seek per frame, OpenCV, TorchCodec, DALI.

    python benchmarks/decode.py                                     # minutes
    python benchmarks/decode.py --keyframes 12 --frames 8 --json out.json

Files are generated: moving textures under grain, H.264 with B frames, a keyframe every 12, 60 or 250 frames; "copy" is
what `xclip-fast transcode` makes of the last. All contenders use one thread, and must give the same frames first.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import av
import measuring
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from scenes import COPY, write_clips

from xclip_fast.data.decode import EXACT_COLOUR, Source, decode_frames, probe
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.sampling import frame_indices
from xclip_fast.data.transforms import TestTransform

FULL, STORED, PLANNED, SEEKING = "full decode", "ours, stored plan", "ours, first sight", "seek for each frame"
OPENCV, OPENCV_SEEKING = "OpenCV, full", "OpenCV, seeking"
EXACT, APPROXIMATE = "TorchCodec, exact", "TorchCodec, approximate"
LOADER, LOADER_DALI = "loader, PyAV", "loader, DALI"
OURS = (STORED, PLANNED, LOADER, LOADER_DALI)
WORKS = ("file", "loader")
CLIP_FRAMES, CLIP_SIZE = 300, (256, 340)  # (height, width): ten seconds of Kinetics
LOADED_FILES, LOADED_BATCH = 64, 8
LOADER_WORKERS: int | None = None  # the loader's own choice
MOST_ROUNDS = 20
NEAR = (
    3.0  # levels, on average over a frame: other libraries convert colours in their own way; the next frame is far off
)


def fail(message: str) -> NoReturn:
    print(f"decode.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # type: ignore[method-assign]  # one line, not the usage as well
    parser.add_argument("--keyframes", default=f"12,60,250,{COPY}", help="frames from one to the next; or copy")
    parser.add_argument("--frames", default="8,16,32", help="frames wanted of each clip, comma-separated")
    parser.add_argument(
        "--works",
        default=",".join(WORKS),
        help="file: one file, one thread; loader: all cores (the first and last kind of file, fewest frames)",
    )
    parser.add_argument("--footage", type=Path, help="take the pictures from this video instead of generating them")
    parser.add_argument("--clips", type=int, default=1, help="different clips of each kind")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the loader")
    parser.add_argument("--seconds", type=float, default=120.0, help="time to stay within, roughly")
    parser.add_argument("--json", type=Path, help="write every raw timing here")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device")
    args.keyframes = [COPY if part == COPY else number("--keyframes", part) for part in args.keyframes.split(",")]
    args.frames = [number("--frames", part) for part in args.frames.split(",")]
    args.works = args.works.split(",")
    for work in args.works:
        if work not in WORKS:
            fail(f"--works: {work!r} is not one of {', '.join(WORKS)}")
    if max(args.frames) > CLIP_FRAMES:
        fail(f"--frames {max(args.frames)}: the clips have {CLIP_FRAMES}")
    if args.clips < 1:
        fail(f"--clips {args.clips}: at least 1 wanted")
    if args.footage:
        args.clips = 1
        if not args.footage.is_file():
            fail(f"--footage {args.footage}: no such file")
    if not args.seconds > 0:
        fail(f"--seconds {args.seconds}: a positive time wanted")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        fail(f"--json {args.json}: a file in an existing folder wanted")
    return args


def number(option: str, given: str) -> int:
    if not given.isdecimal() or not int(given):
        fail(f"{option}: {given!r} is not a positive whole number")
    return int(given)


# Each contender takes a file and sorted frame numbers and gives uint8 (n, H, W, 3), RGB. One thread each.


def converter() -> Callable[[av.VideoFrame], np.ndarray]:
    """Frames to RGB, as exactly as ours, so that the pixels may be compared and the work is the same."""
    convert = functools.partial(VideoReformatter().reformat, format="rgb24", interpolation=EXACT_COLOUR, threads=1)
    return lambda frame: convert(frame).to_ndarray()


def full_decode(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """Decode all frames, convert those that are wanted."""
    wanted, to_rgb = set(numbers), converter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return np.stack([to_rgb(frame) for place, frame in enumerate(container.decode(stream)) if place in wanted])


def seek_for_each(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """For each frame a seek to the keyframe before it, and decoding up to it: the usual loop."""
    found, to_rgb = [], converter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for place in numbers:
            time = (stream.start_time or 0) + round(place / stream.average_rate / stream.time_base)
            container.seek(time, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= time)
            found.append(to_rgb(frame))
    return np.stack(found)


def opencv(path: Path, numbers: Sequence[int], seek: bool) -> np.ndarray:
    import cv2

    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    found = []
    try:
        if seek:
            for place in numbers:
                capture.set(cv2.CAP_PROP_POS_FRAMES, place)
                found.append(capture.read()[1])
        else:
            wanted = set(numbers)
            for place in range(CLIP_FRAMES):
                if not capture.grab():
                    break
                if place in wanted:
                    found.append(capture.retrieve()[1])
        return np.stack([cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) for picture in found])
    finally:
        capture.release()


def torchcodec(path: Path, numbers: Sequence[int], mode: str) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
    return decoder.get_frames_at(list(numbers)).data.numpy()


def contenders_of(plans: dict[Path, Source]) -> Iterator[tuple[str, Callable[..., np.ndarray] | str]]:
    """By name, what to call; or why it is not there."""
    yield FULL, full_decode
    yield PLANNED, decode_frames
    yield STORED, lambda path, numbers: decode_frames(plans[path], numbers)
    yield SEEKING, seek_for_each
    cv2 = {OPENCV: functools.partial(opencv, seek=False), OPENCV_SEEKING: functools.partial(opencv, seek=True)}
    codec = {name: functools.partial(torchcodec, mode=name.split()[-1]) for name in (EXACT, APPROXIMATE)}
    for module, package, entries in (("cv2", "opencv-python-headless", cv2), ("torchcodec", "torchcodec", codec)):
        note = ""
        if importlib.util.find_spec(module) is None:
            note = f"not installed: pip install {package}"
        else:
            try:
                importlib.import_module(module)
            except (ImportError, OSError, RuntimeError) as error:
                cause: BaseException = error
                while cause.__cause__ or cause.__context__:  # the last says what is missing
                    cause = cause.__cause__ or cause.__context__ or cause
                note = f"does not load here: {(str(cause) or type(cause).__name__).splitlines()[0]}"
        for name, call in entries.items():
            yield name, note or call


Times = tuple[float, float]  # seconds by the clock, and of the processor: the second hardly sees what else runs


def timed(call: Callable[[], Any]) -> tuple[Any, Times]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def take_turns(calls: dict[str, Callable[[], Any]], first: dict[str, Times], seconds: float) -> dict[str, list[Times]]:
    """The times of each call, in turn (A B A B ...), within about `seconds`.

    `first`: what each took before, as a warm-up; for a peer that was long, it counts, and there is no other.
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


def ratio(theirs: Sequence[float], mine: Sequence[float]) -> dict[str, float]:
    """How many times faster: of medians, and the range over the turns that both had."""
    pairs = [a / b for a, b in zip(theirs, mine, strict=False)]
    return {
        "median": statistics.median(theirs) / statistics.median(mine),
        "low": min(pairs),
        "high": max(pairs),
        "pairs": len(pairs),
    }


def file_rows(kind: int | str, frames: int, paths: list[Path], plans: dict[Path, Source], seconds: float) -> list[dict]:
    """One thread, one file after another."""
    numbers = frame_indices(CLIP_FRAMES, frames, "sparse").tolist()
    truth = [full_decode(path, numbers) for path in paths]
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}
    first: dict[str, Times] = {}
    for name, call in contenders_of(plans):
        row: dict[str, Any] = {"work": "file", "keyframe_every": kind, "frames": frames, "contender": name, "note": ""}
        rows.append(row)
        if isinstance(call, str):
            row["note"] = call
            continue
        every = functools.partial(lambda call: [call(path, numbers) for path in paths], call)
        try:
            found, first[name] = timed(every)
        except (av.FFmpegError, ImportError, OSError, RuntimeError, ValueError) as error:
            row["note"] = f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
            continue
        row["note"] = compare(row, found, truth, exact=name in (FULL, PLANNED, STORED, SEEKING))
        if not row["note"]:
            calls[name] = every
    times = take_turns(calls, first, seconds - (time.perf_counter() - begin))
    for row in rows:
        if row["contender"] not in times:
            continue
        (mine, cpu), (full, full_cpu) = (zip(*times[name], strict=True) for name in (row["contender"], FULL))
        row |= {"seconds": mine, "cpu_seconds": cpu, "n": len(mine), "median_s": statistics.median(mine)}
        row["clips_per_second"] = len(paths) / row["median_s"]
        row["frames_per_second"] = frames * row["clips_per_second"]
        row["ratio_to_full"], row["cpu_ratio_to_full"] = ratio(full, mine), ratio(full_cpu, cpu)
    return rows


def compare(row: dict[str, Any], found: list[np.ndarray], truth: list[np.ndarray], exact: bool) -> str:
    """Note the largest mean difference of a frame in `row`; say what is wrong with the pixels, if anything is."""
    if [clip.shape for clip in found] != [clip.shape for clip in truth]:
        return f"outputs differ: {found[0].shape} instead of {truth[0].shape}"
    each = [abs(a.astype(np.int16) - b).mean((1, 2, 3)).max() for a, b in zip(found, truth, strict=True)]
    row["largest_mean_difference"] = float(max(each))
    if row["largest_mean_difference"] > (0 if exact else NEAR):
        return f"outputs differ from the full decode's by {max(each):.3g} levels on average"
    return ""


def loader_rows(kind: int | str, frames: int, paths: list[Path], device: str, seconds: float) -> list[dict]:
    """The loader over many files, all cores: cropped, resized batches on the device."""
    with tempfile.TemporaryDirectory(dir=paths[0].parent) as folder:
        for place in range(LOADED_FILES):
            shutil.copy(paths[place % len(paths)], Path(folder) / f"{place:03}.mp4")
        manifest = index(folder, workers=0)
        loaders: dict[str, Any] = {}
        rows = []
        for name, decoder in ((LOADER, "cpu"), (LOADER_DALI, "dali")):
            row: dict[str, Any] = {"work": "loader", "keyframe_every": kind, "frames": frames, "contender": name}
            rows.append(row | {"note": ""})
            try:
                loaders[name] = make_loader(manifest, frames, device, decoder)
            except (ImportError, ValueError) as error:
                rows[-1]["note"] = "not run: " + str(error).splitlines()[0]
        try:
            run_loaders(rows, loaders, device, seconds)
        finally:
            for each in loaders.values():
                each.close()
    return rows


def make_loader(manifest: Manifest, frames: int, device: str, decoder: str) -> Any:
    from xclip_fast.data.loader import loader

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
    """Epochs in turn. The time of one is that from its first batch to its last: starting up is not counted."""
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
        row |= {"n": len(mine), "rates": mine, "clips_per_second": statistics.median(mine)}
        row["frames_per_second"] = row["frames"] * row["clips_per_second"]
        if row["contender"] != LOADER:
            row["largest_mean_difference"] = (firsts[row["contender"]] - firsts[LOADER]).abs().mean().item()
            row["ratio_to_pyav"] = statistics.median(mine) / statistics.median(rates[LOADER])
            if row["largest_mean_difference"] > NEAR:
                row["note"] = f"outputs differ by {row['largest_mean_difference']:.3g} levels on average"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as the content of the JSON."""
    deadline = time.perf_counter() + args.seconds
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        print(f"writing {args.clips} clips of each kind ...", file=sys.stderr)
        files = write_clips(Path(folder), args.keyframes, args.clips, CLIP_FRAMES, CLIP_SIZE, args.footage)
        clips = [clip_facts(kind, path) for kind, paths in files.items() for path in paths]
        # The loader with the fewest frames: there decoding weighs most.
        cells = [(work, kind, frames) for work in args.works for kind in args.keyframes for frames in args.frames]
        ends = args.keyframes[0], args.keyframes[-1]
        cells = [cell for cell in cells if cell[0] == "file" or (cell[1] in ends and cell[2] == min(args.frames))]
        for done, (work, kind, frames) in enumerate(cells):
            seconds = max(0.5, deadline - time.perf_counter()) / (len(cells) - done)
            if work == "file":
                plans = {
                    path: Source(str(path), size=path.stat().st_size, plan=probe(path).plan) for path in files[kind]
                }
                rows += file_rows(kind, frames, files[kind], plans, seconds)
            else:
                rows += loader_rows(kind, frames, files[kind], args.device, seconds)
            print(f"{work}, keyframe every {kind}, {frames} frames: done", file=sys.stderr)
    environment = measuring.environment(args.device)
    return {"environment": environment, "clips": clips, "rows": rows}


def clip_facts(kind: int | str, path: Path) -> dict[str, Any]:
    info = probe(path)
    keyframes = len(info.plan.keyframes) if info.plan else None
    facts = {"keyframe_every": kind, "frames": info.frames, "width": info.width, "height": info.height}
    size = os.path.getsize(path)
    return facts | {
        "codec": info.codec,
        "keyframes": keyframes,
        "bytes": size,
        "kbit_per_s": size / info.duration / 125,
    }


def print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rates = {clip["keyframe_every"]: clip["kbit_per_s"] for clip in report["clips"]}
    shown = ", ".join(f"{rate:.0f} ({kind})" for kind, rate in rates.items())
    table = Table(title=f"{report['environment']['device']}; kbit/s of the clips by keyframes: {shown}")
    table.add_column("keyframe every")
    table.add_column("frames", justify="right")
    table.add_column("contender", no_wrap=True)
    for column in ("clips/s", "frames/s", "x full decode", "x by CPU time", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    notes: dict[str, None] = {}
    before = None
    for row in report["rows"]:
        cell = row["work"], row["keyframe_every"], row["frames"]
        if before not in (None, cell):
            table.add_section()
        before = cell
        start = [str(row["keyframe_every"]), str(row["frames"]), row["contender"]]
        if "clips_per_second" not in row:
            table.add_row(*start, row["note"].split(":")[0])
            notes.setdefault(f"{row['contender']}: {row['note']}", None)
            continue
        ratios = [row[key] for key in ("ratio_to_full", "cpu_ratio_to_full") if key in row]
        texts = [f"{each['median']:.2f} ({each['low']:.2f}-{each['high']:.2f})" for each in ratios] or ["", ""]
        speeds = (f"{row[key]:.3g}" for key in ("clips_per_second", "frames_per_second"))
        table.add_row(*start, *speeds, *texts, str(row["n"]))
        if row["note"]:
            notes.setdefault(f"{row['contender']}: {row['note']}", None)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    for note in notes:
        print(note)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    report = run(args)
    print_table(report)
    if args.json:
        measuring.write_json(args.json, report)
    wrong = [row for row in report["rows"] if row["note"].startswith(("outputs differ", "failed"))]
    return 1 if any(row["contender"] in OURS for row in wrong) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
