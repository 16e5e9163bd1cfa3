"""`embed --ray` on a cluster of two nodes on this machine (loopback only): generated clips, some broken, some on S3.

    pip install 'xclip-fast[ray]' s3fs 'moto[server]'
    python benchmarks/scale.py --clips 2000

Both nodes and moto, which serves S3, have the address 127.0.0.1. The script kills the driver, runs the command again
and kills an actor, then runs it once more. It checks that each file is in the store once, that the errors name their
files, that the vectors equal those of plain `embed`, and that each run embeds only what the runs before left
unfinished. Prints one JSON object.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arguments
import measuring
import numpy as np

BUCKET, ON_S3 = "clips", 50
BROKEN = 50  # one file of so many is
LOOPBACK = "127.0.0.1"


def main(argv: list[str] | None = None) -> None:
    parser = arguments.parser(__doc__, json_help="write the result here")
    parser.add_argument("--clips", type=arguments.count, default=2000, help="number of clips (default 2000)")
    options = parser.parse_args(argv)
    import ray  # noqa: F401 -- a missing package is named before anything starts
    import s3fs  # noqa: F401
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3 = ThreadedMotoServer(ip_address=LOOPBACK, port=0)
    s3.start()
    host, port = s3.get_host_and_port()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "OMP_NUM_THREADS": "1",
        # Else Ray turns 127.0.0.1 into this machine's other address, where no node listens. Read when Ray is imported.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    try:
        with tempfile.TemporaryDirectory(prefix="xclip-scale-") as folder:
            result = run(Path(folder), options.clips)
    finally:
        s3.stop()
    versions = {name: importlib.metadata.version(name) for name in ("ray", "lancedb", "moto")}
    environment = measuring.environment("cpu") | versions
    print(json.dumps(result, indent=1))
    measuring.write_json(options.json, {"environment": environment, **result})


def run(folder: Path, clips: int) -> dict[str, Any]:
    from ray.cluster_utils import Cluster

    begun = time.perf_counter()
    bad = _make_clips(folder, clips)
    result: dict[str, Any] = {"clips": clips, "broken": len(bad), "on_s3": ON_S3, "make_s": _since(begun)}
    weights = folder / "weights"
    measuring.small_model().save_pretrained(weights)
    node = {"num_cpus": 2, "node_ip_address": LOOPBACK}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node})
    cluster.add_node(**node)
    result["addresses"] = sorted({each["NodeManagerAddress"] for each in cluster.global_state.node_table()})
    try:
        store = folder / "store"
        command = [
            *(sys.executable, "-m", "xclip_fast", "embed", str(folder / "videos"), str(folder / "s3.txt")),
            *("--out", str(store), "-c", str(weights), "--device", "cpu", "--dtype", "float32"),
            *("--ray", "--address", cluster.address, "--actors", "2", "--decoders", "2"),
        ]
        # Kill the driver when about a third is written.
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun = time.perf_counter()
        while len(_known(store)) < clips // 3 and first.poll() is None:
            time.sleep(0.5)
        first.send_signal(signal.SIGKILL)
        first.wait()
        before = _known(store)
        result |= {"driver_killed_after_s": _since(begun), "files_written_before": len(before)}
        print(result, file=sys.stderr)
        time.sleep(3)  # until its actors have ended
        # Kill an actor of the second run.
        begun = time.perf_counter()
        second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        killed = 0
        while second.poll() is None and not killed:
            time.sleep(0.5)
            if len(_known(store)) > len(before):
                killed = _kill_an_actor(cluster)
        out, err = second.communicate()
        result |= {
            "second_run_s": _since(begun),
            "actor_killed": bool(killed),
            "second_run": (out.strip().splitlines() or [""])[-1].split(": ", 1)[-1],  # above it, Ray tells of the actor
        }
        added = re.search(r"(\d+) added", out)
        assert added, err
        result["files_of_the_second_run"] = int(added[1]) + len(set(bad) - before)
        assert result["files_of_the_second_run"] == clips + ON_S3 - len(before), "other files than those left"
        named = [name for name in bad if name in err]
        result |= {"exit_code": second.returncode, "broken_named": len(named)}
        print(result, file=sys.stderr)
        begun = time.perf_counter()
        third = subprocess.run(command, capture_output=True, text=True)
        result |= {"third_run_s": _since(begun), "third_run": third.stdout.strip().splitlines()[-1].split(": ", 1)[-1]}
    finally:
        cluster.shutdown()
    begun = time.perf_counter()
    plain = [*command[: command.index("--ray")]]
    plain[plain.index(str(store))] = str(folder / "plain")
    subprocess.run(plain, capture_output=True, text=True)
    result["plain_embed_s"] = _since(begun)
    ours, theirs = (_vectors(path) for path in (store, folder / "plain"))
    assert ours.keys() == theirs.keys(), "the files differ from those of plain embed"
    assert len(ours) == clips + ON_S3 - len(bad)
    worst = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)
    return {**result, "moments": len(ours), "each_once": True, "largest_difference": worst}


def _make_clips(folder: Path, clips: int) -> list[str]:
    import s3fs

    from xclip_fast.data.motion import CLASSES, render, write_clip

    videos = folder / "videos"
    videos.mkdir()
    bad = []
    for number in range(clips):
        path = videos / f"{number:05}.mp4"
        if number % BROKEN == 3:
            path.write_bytes(b"broken" * 50)
            bad.append(path.name)
        else:
            pictures = render(CLASSES[number % 10], number, frames=16, size=(64, 64))
            write_clip(path, pictures, 8, preset="ultrafast")
    files = s3fs.S3FileSystem(endpoint_url=os.environ["FSSPEC_S3_ENDPOINT_URL"])
    files.mkdir(BUCKET)
    names = []
    for number in range(ON_S3):
        write_clip(folder / "one.mp4", render(CLASSES[number % 10], clips + number, frames=16, size=(64, 64)), 8)
        files.put(str(folder / "one.mp4"), f"{BUCKET}/{number:03}.mp4")
        names.append(f"s3://{BUCKET}/{number:03}.mp4")
    (folder / "s3.txt").write_text("\n".join(names))
    return bad


def _known(store: Path) -> set[str]:
    """The names of the files in the store."""
    from xclip_fast.search.store import Store

    if not (store / "moments.lance" / "_versions").exists():
        return set()
    return {os.path.basename(path) if not path.startswith("s3:") else path for path in Store.open(store).known()}


def _vectors(store: Path) -> dict[str, np.ndarray]:
    from xclip_fast.search.store import Store

    found = Store.open(store).table.search().where("error IS NULL").select(["path", "vector"]).to_arrow().to_pylist()
    assert len(found) == len({row["path"] for row in found}), "a file has two rows"
    return {row["path"]: np.array(row["vector"], np.float32) for row in found}


def _kill_an_actor(cluster: Any) -> int:
    """Kill one process of this cluster that holds a model (SIGKILL); return its pid, or 0 if there is none."""
    nodes = {
        process.process.pid
        for node in cluster.list_all_nodes()
        for each in node.all_processes.values()
        for process in each
    }
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if "(VideoStage)" in title and parent in nodes:
            os.kill(int(entry.name), signal.SIGKILL)
            return int(entry.name)
    return 0


def _since(begun: float) -> float:
    return round(time.perf_counter() - begun, 1)


if __name__ == "__main__":
    sys.exit(main())
