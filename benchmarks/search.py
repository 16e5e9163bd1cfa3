"""Search at full size: many rows, and a long film.

    python benchmarks/search.py rows --count 1000000     # time of a query, of adding 100 videos, of building the index
    python benchmarks/search.py film --minutes 60        # known events found, peak memory, time next to decoding alone

Each prints one JSON object; --json FILE keeps it. The models are small and have random weights; the vectors of
`rows` are random.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import statistics
import subprocess
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
import pyarrow as pa
import torch

from xclip_fast import decode_windows
from xclip_fast.data.decode.reading import all_frames, open_video
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.data.threads import usable_cores
from xclip_fast.search import Index
from xclip_fast.search.rows import StoreSettings, schema_of
from xclip_fast.search.store import Store

E, CHUNK = 512, 20_000


def main(argv: list[str] | None = None) -> None:
    parser = arguments.parser(__doc__, json_help="write the result here")
    count = arguments.count
    parser.add_argument("what", choices=("rows", "film"))
    parser.add_argument("--count", type=count, default=1_000_000, help="number of rows (default 1000000)")
    parser.add_argument("--patches", type=count, default=0, help="patch features to store with each row (default 0)")
    parser.add_argument("--minutes", type=count, default=60, help="length of the film, from 2 on (default 60)")
    options = parser.parse_args(argv)
    if options.minutes < 2:
        arguments.fail("--minutes: the twelve events of ten seconds take at least 2")
    with tempfile.TemporaryDirectory(prefix="xclip-search-") as scratch:
        if options.what == "rows":
            result = rows(Path(scratch), options.count, options.patches)
        else:
            result = film(Path(scratch), options.minutes)
    versions = {name: importlib.metadata.version(name) for name in ("lancedb", "pyarrow")}
    environment = measuring.environment("cpu") | {"usable_cores": usable_cores()} | versions
    print(json.dumps(result, indent=1))
    measuring.write_json(options.json, {"environment": environment, **result})


def rows(folder: Path, count: int, patches: int) -> dict[str, Any]:
    """Random rows: time of queries without and with an index, each in a new process."""
    settings = StoreSettings("0" * 64, "", "", E, 8, "sparse", 1, 10.0, 5.0, 30.0, patches=patches)
    store = Store.create(folder / "store", settings)
    rng = np.random.default_rng(0)

    def batch(first: int, size: int) -> Any:
        vectors = rng.standard_normal((size, E), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        columns = [
            pa.array([f"{first + i:024x}" for i in range(size)]),
            pa.array([f"/videos/{(first + i) // 10:07}.mp4" for i in range(size)]),
            pa.array(np.arange(first, first + size) % 10 * 5.0),
            pa.array(np.arange(first, first + size) % 10 * 5.0 + 10),
            pa.array(np.full(size, 1_000_000)),
            pa.array(["0"] * size),
            pa.nulls(size, pa.string()),
            pa.nulls(size, pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1).astype(np.float16)), E),
        ]
        if patches:
            values = rng.standard_normal(size * patches * E, dtype=np.float32).astype(np.float16)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values), patches * E))
        return pa.record_batch(columns, schema=schema_of(settings))

    def batches(first: int, last: int, step: int) -> Any:
        made = (batch(at, min(step, last - at)) for at in range(first, last, step))
        return pa.RecordBatchReader.from_batches(schema_of(settings), made)

    step = CHUNK if not patches else 100
    writing = _seconds(lambda: store.commit(batches(0, count, step), [], []))
    result: dict[str, Any] = {"rows": count, "patches": patches, "write_s": writing}
    result["exact"] = _queries(folder / "store")
    adding = [_seconds(lambda at=at: store.commit(batches(at, at + 100, 100), [], [])) for at in (count, count + 100)]
    result["add_100_s"] = statistics.median(adding)
    print(result, file=sys.stderr, flush=True)
    if count >= 100_000:
        result["index_s"] = _seconds(store.build_index)
        result["indexed"] = _queries(folder / "store")
        result["recall_at_10"] = _recall(store)
        result["add_100_with_index_s"] = _seconds(lambda: store.commit(batches(count + 200, count + 300, 100), [], []))
    size = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
    return {**result, "bytes_per_row": round(size / count)}


_QUERY = """
import json, sys, time
import torch
from xclip_fast.search.query import find
from xclip_fast.search.store import Store
import lancedb, pyarrow, numpy
model = None
if int(sys.argv[2]):
    from xclip_fast import XCLIP, VARIANTS
    torch.manual_seed(0)
    model = XCLIP(VARIANTS["B/16-8f"]).eval()
begun = time.perf_counter()
store = Store.open(sys.argv[1])
opened = time.perf_counter() - begun
times = []
generator = torch.Generator().manual_seed(0)
for _ in range(11):
    query = torch.randn(1, 512, generator=generator)
    begun = time.perf_counter()
    hits = find(store, query, model=model, top=10)
    times.append(time.perf_counter() - begun)
    assert len(hits) == 10
print(json.dumps({"open_s": opened, "first_s": times[0], "median_s": sorted(times[1:])[5], "worst_s": max(times[1:])}))
"""


def _queries(store: Path) -> dict[str, float]:
    """Seconds to open the store, the first query and ten more, in a new process, without imports and the model."""
    patches = Store.open(store).settings.patches
    command = [sys.executable, "-c", _QUERY, str(store), str(patches)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _recall(store: Any) -> float:
    """The share of the ten exact nearest rows of random queries that the index finds."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(20):
        query = rng.standard_normal(E, dtype=np.float32)
        query /= np.linalg.norm(query)
        build = store.table.search(query).distance_type("dot").select(["id", "_distance"]).limit(10)
        exact = set(build.bypass_vector_index().to_arrow()["id"].to_pylist())
        table = store.nearest(torch.from_numpy(query), 100)
        rows = table["_rowid"].to_pylist()[:10]
        ids = store.table.take_row_ids(rows).select(["id"]).to_arrow()["id"].to_pylist()
        found += len(exact & set(ids))
    return found / 200


def film(folder: Path, minutes: int) -> dict[str, Any]:
    """A film with twelve known events: whether a search by example finds their moments."""
    path, events = _make_film(folder, minutes)
    weights = folder / "weights"
    measuring.small_model(32, 8).save_pretrained(weights)
    run = "import resource, sys; from xclip_fast.search import Index; "
    run += "i = Index.open(sys.argv[1], sys.argv[2], device='cpu', dtype='float32'); s = i.add(sys.argv[3]); "
    run += "assert not s.failed, s.failed; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, s.moments)"
    seconds: dict[str, float] = {}
    peak: dict[str, int] = {}
    (folder / "two").mkdir()
    short, _ = _make_film(folder / "two", 2)
    moments = 0
    for name, source in (("short", short), ("film", path)):
        begun = time.perf_counter()
        command = [sys.executable, "-c", run, str(folder / name), str(weights), str(source)]
        kilobytes, moments = map(
            int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
        seconds[name], peak[name] = time.perf_counter() - begun, round(kilobytes / 1024)
    decoding = _seconds(lambda: [None for _ in decode_windows(path, 10, 5, 8, size=32)])
    full = _seconds(lambda: _decode_everything(path))

    index = Index.open(folder / "film", device="cpu", dtype="float32")
    right = []
    for start, clip in events:
        best = index.search(index.features(clip), top=1)[0].best
        right.append(abs((best[0] + best[1]) / 2 - (start + 5)) <= 10)
    return {
        "minutes": minutes,
        "moments": moments,
        "events": len(events),
        "events_within_one_window": sum(right),
        "peak_mb_of_2_minutes": peak["short"],
        "peak_mb": peak["film"],
        "embed_s": round(seconds["film"], 1),
        "decode_windows_s": round(decoding, 1),
        "decode_every_frame_s": round(full, 1),
    }


def _decode_everything(path: Path) -> None:
    with open_video(path) as (container, stream):
        assert sum(1 for _ in all_frames(container, stream))


def _make_film(folder: Path, minutes: int) -> tuple[Path, list[tuple[float, Path]]]:
    """240x320, 10 frames a second: a dim, slowly changing scene with twelve events of ten seconds."""
    rng = random.Random(0)
    total = minutes * 60
    starts = sorted(rng.sample(range(0, total // 10), 12))
    events = {start * 10: number for number, start in enumerate(starts)}
    clips: list[tuple[float, Path]] = []
    path = folder / "film.mp4"
    y_HW, x_HW = np.mgrid[0:240, 0:320].astype(np.float32)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "g": "100"})
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuv420p"
        for second in range(0, total, 10):
            if second in events:
                number = events[second]
                pictures = render(CLASSES[number % 10], 100 + number, number, frames=100, size=(240, 320))
                clips.append((float(second), folder / f"event{number}.mp4"))
                write_clip(clips[-1][1], pictures, 10, preset="ultrafast")
            else:
                phase = (np.arange(100) + second * 10)[:, None, None] / 600
                waves = 40 + 20 * np.sin(x_HW / 40 + phase) + 15 * np.sin(y_HW / 30 - 2 * phase)
                pictures = np.repeat(waves.astype(np.uint8)[..., None], 3, 3)
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")))
        container.mux(stream.encode(None))
    return path, clips


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return round(time.perf_counter() - begun, 3)


if __name__ == "__main__":
    sys.exit(main())
