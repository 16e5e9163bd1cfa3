"""Kills a writing command at its changes to files, one after another, or fills the disk there; run by test_kills.py.

    LD_PRELOAD=file_events.so python tests/attack/killed.py FOLDER COMMAND=COUNT...

COUNT changes of each command, spread over the run, or all of them (0). After each kill every file in its place is
whole; the same command run again gives what an unbroken run gives, and leaves nothing beside it. Where the disk is
full, the command ends with an error that says so. Prints how many were tried.

Each try runs in a fork of one process that has imported everything, and starts with a copy of one earlier result.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import io
import json
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.motion import CLASSES, render, write_clip, write_dataset
from xclip_fast.data.transcode import transcode
from xclip_fast.evaluate.loop import evaluate
from xclip_fast.evaluate.report import reserved, write
from xclip_fast.search import Index, add
from xclip_fast.search.query import Hit
from xclip_fast.search.store import Store, is_store
from xclip_fast.weights import checkpoint

EVENTS = ctypes.CDLL(None)
ACTS = ("kill", "full")
Content = dict[str, Any]


def forked(work: Callable[[], Any], arm: tuple[Path, int, int] | None = None) -> tuple[int, Any]:
    """(exit status, (what `work` returned, changes to files)) of a fork. Its changes count if it is armed.

    What the fork imported, this process imports too: the next forks have it.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        with contextlib.suppress(BaseException):
            os.close(reader)
            sys.stderr = io.StringIO()
            if arm:
                EVENTS.arm(os.fsencode(arm[0]), ctypes.c_long(arm[1]), arm[2])
            try:
                answer = work()
                status = 0
            except BaseException as error:
                kinds = [kind.__name__ for kind in type(error).__mro__]
                answer = (kinds, str(error), traceback.format_exc())
                status = 2
            seen = ctypes.c_long.in_dll(EVENTS, "seen").value
            EVENTS.arm(b"", ctypes.c_long(-1), 0)
            with open(writer, "wb") as file:
                pickle.dump((answer, seen, list(sys.modules)), file)
        os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    answer, seen, modules = pickle.loads(data) if data else (None, 0, [])
    for module in modules:
        if module not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    return status, (answer, seen)


def files(folder: Path) -> Content:
    """Every file that is in its place: hidden names, and what `index` keeps to go on from, are not."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and "/." not in f"/{name}" and not name.endswith(".partial"):
            found[name] = path.read_bytes()
    return found


class Command:
    """A command on small data. `run(out)` does the work; `content(out)` is what there is, by name."""

    whole = False  # are all files replaced in one step?
    overwrites = True  # an earlier result is there
    extra: tuple[str, ...] = ()  # hidden files that may stay, by the beginning of their names

    def __init__(self, data: Path) -> None:
        self.data = data

    def old(self, out: Path) -> None:
        """An earlier result."""

    def run(self, out: Path) -> None:
        raise NotImplementedError

    def content(self, out: Path) -> Content:
        return files(out)


class IndexCommand(Command):
    def old(self, out: Path) -> None:
        index(self.data / "videos", out / "m.jsonl", workers=0)
        manifest = Manifest.read(out / "m.jsonl")
        manifest.with_errors({0: "was bad"}).write(out / "m.jsonl")

    def run(self, out: Path) -> None:
        index(self.data / "videos", out / "m.jsonl", workers=0)


class Transcode(Command):
    def old(self, out: Path) -> None:
        transcode(self.data / "earlier", out, workers=1, preset="ultrafast")

    def run(self, out: Path) -> None:
        summary = transcode(self.data / "videos", out, workers=1, preset="ultrafast")
        assert list(map(os.path.basename, summary.failed)) == ["broken.mp4"]


class Motion(Command):
    def run(self, out: Path) -> None:
        write_dataset(out, 1, frames=4, size=(16, 16))


class Convert(Command):
    whole = True

    def old(self, out: Path) -> None:
        checkpoint.convert(self.data / "a", out / "w")

    def run(self, out: Path) -> None:
        checkpoint.convert(self.data / "b", out / "w", "huggingface", overwrite=True)


class Evaluate(Command):
    """The figures are computed once: an evaluation changes no file before its report."""

    whole = True

    def __init__(self, data: Path) -> None:
        super().__init__(data)

        def figures() -> list[Any]:
            model, manifest = XCLIP.from_pretrained(data / "a"), Manifest.read(data / "m.jsonl")
            return [evaluate(model, manifest.select(rows), workers=0) for rows in ([0, 1], [1, 2])]

        status, told = forked(figures)
        assert status == 0, told
        self.results = told[0]

    def _write(self, out: Path, result: Any) -> None:
        with reserved(out / "e", True):
            write(result, out / "e", overwrite=True)

    def old(self, out: Path) -> None:
        self._write(out, self.results[0])

    def run(self, out: Path) -> None:
        self._write(out, self.results[1])


class Embed(Command):
    """Into a store, a commit a file. What was embedded before has changed, is gone, or is new."""

    name = "store"
    extra = (".lock", ".claims")

    def _add(self, out: Path, videos: str) -> None:
        add._SECONDS = 0.0
        opened = Index.open(out / self.name, self.data / "a", device="cpu", dtype="float32", root=self.data / videos)
        opened.add(self.data / videos, batch_size=1, workers=1)

    def old(self, out: Path) -> None:
        self._add(out, "earlier")

    def run(self, out: Path) -> None:
        add._SECONDS = 0.0
        opened = Index.open(out / self.name, self.data / "a", device="cpu", dtype="float32", root=self.data / "earlier")
        # the same root with other files in it
        opened.root = str(self.data / "videos")
        opened.store.settings = replace(opened.store.settings, root=opened.root)
        opened.add(self.data / "videos", batch_size=1, workers=1)

    def content(self, out: Path) -> Content:
        if not is_store(out / self.name):
            return {}
        return self._rows(Store.open(out / self.name).table.to_arrow().to_pylist())

    def _rows(self, rows: list[dict[str, Any]]) -> Content:
        found: Content = {}
        for row in rows:
            key = f"{row['path']} {row['start']:g}"
            assert key not in found, f"{key} is there twice"
            found[key] = (row["end"], row["error"], row["size"], str(row["vector"]))
        by_file: Content = {}
        for key, row in found.items():
            by_file.setdefault(key.split()[0], []).append((key, row))
        return {name: sorted(each) for name, each in by_file.items()}


class EmbedParquet(Embed):
    name = "rows.parquet"
    extra = ()

    def content(self, out: Path) -> Content:
        import pyarrow.parquet as pq

        parts = sorted((out / self.name).glob("part-*.parquet"))
        return self._rows([row for part in parts for row in pq.read_table(part).to_pylist()])


class Train(Command):
    """Goes on from the checkpoint after the first of two steps. Only the weights must be whole at each moment."""

    def _train(self, out: Path, stop_after: int | None) -> None:
        from xclip_fast.train.config import from_dict
        from xclip_fast.train.loop import train

        vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "heads": 1}
        text = {"width": 64, "layers": 1, "heads": 1}
        model = {"vision": vision, "text": text, "embed_dim": 64, "num_frames": 2, "num_classes": len(CLASSES)}
        values = {
            **{"output": str(out / "run"), "precision": "fp32", "device": "cpu", "model": model},
            "data": {"train": str(self.data / "m.jsonl"), "workers": 0},
            "optim": {"lr": 1e-3, "epochs": 2, "warmup_epochs": 1, "batch_size": len(CLASSES)},
            "log": {"every": 1, "tensorboard": False},
            "checkpoint": {"every_epochs": None, "every_minutes": None, "every_steps": 1, "keep_last": 1},
            "stop_after": stop_after,
        }
        train(from_dict(values))

    def old(self, out: Path) -> None:
        self._train(out, 1)

    def run(self, out: Path) -> None:
        self._train(out, None)
        lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]

    def content(self, out: Path) -> Content:
        return {name: data for name, data in files(out).items() if name.endswith("/model.safetensors")}


class Look(Command):
    """`search --html --clips`. The next cut of a clip removes what a kill left beside it."""

    extra = (".0 0.0-0.2.mp4.", ".1 0.0-0.2.mp4.")

    def run(self, out: Path) -> None:
        from xclip_fast.search.media import cut
        from xclip_fast.search.page import Page

        hits = [Hit(str(self.data / "videos" / f"{n}.mp4"), 0.0, 0.2, 0.5, (0.0, 0.2)) for n in (0, 1)]
        page = Page(out / "page.html", overwrite=True)
        page.add_hits("a cat", hits)
        for hit in hits:
            if not list((out / "clips").glob(f"{Path(hit.path).stem} *")):
                cut(hit, out / "clips")
        page.write()


COMMANDS: dict[str, type[Command]] = {
    "index": IndexCommand,
    "transcode": Transcode,
    "motion": Motion,
    "convert": Convert,
    "evaluate": Evaluate,
    "train": Train,
    "embed": Embed,
    "embed-parquet": EmbedParquet,
    "search-html-clips": Look,
}


def prepare(data: Path) -> None:
    """Videos, two checkpoints and a manifest, made once."""
    config = XCLIPConfig(
        vision=VisionConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1),
        text=TextConfig(width=64, layers=1, heads=1),
        embed_dim=64,
        num_frames=3,
    )
    for name in "ab":
        XCLIP(config).save_pretrained(data / name)
    for folder in ("earlier", "videos"):
        (data / folder).mkdir()
    for number in range(3):
        write_clip(data / f"videos/{number}.mp4", render(CLASSES[number], 0, frames=8, size=(32, 48)))
    (data / "videos/broken.mp4").write_text("no video\n" * 99)
    shutil.copy2(data / "videos/0.mp4", data / "earlier/0.mp4")
    write_clip(data / "earlier/1.mp4", render(CLASSES[4], 0, frames=10, size=(32, 48)))
    shutil.copy2(data / "videos/0.mp4", data / "earlier/gone.mp4")
    write_dataset(data / "motion", 1, frames=4, size=(32, 32))
    index(data / "motion", data / "m.jsonl", workers=0)


def hidden(folder: Path, extra: tuple[str, ...]) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if ((path.name.startswith(".") and not path.name.startswith(extra)) or path.name.endswith(".partial"))
        and "moments.lance" not in path.parts  # LanceDB's own
    ]


def attack(command: Command, folder: Path, count: int, name: str) -> None:
    """Tries `count` changes, or all (0), with each of the acts, and prints how many of how many."""

    def in_fork(*works: Callable[[Path], Any], out: Path) -> Any:
        status, told = forked(lambda: [work(out) for work in works][-1])
        assert status == 0, f"{out.name}: {told[0]}"
        return told[0]

    earlier = folder / "earlier"
    earlier.mkdir()
    in_fork(command.old, out=earlier)

    def fresh(name: str) -> Path:
        return Path(shutil.copytree(earlier, folder / name, symlinks=True))

    whole = fresh("whole")
    old = in_fork(command.content, out=whole)
    status, told = forked(lambda: command.run(whole), (whole, -1, 0))
    assert status == 0, told
    new, changes = in_fork(command.content, out=whole), told[1]
    assert new != old
    assert changes > 3, changes
    moments = range(1, changes + 1)
    if count and count < changes:
        moments = sorted({1 + round(at * (changes - 1) / max(1, count - 1)) for at in range(count)})
    for act in ACTS:
        for moment in moments:
            out = fresh(f"{act}-{moment}")
            where = f"{act} at change {moment} of {changes}"
            status, told = forked(lambda out=out: command.run(out), (out, moment, 0 if act == "kill" else errno.ENOSPC))
            if act == "kill":
                assert status in (-signal.SIGKILL, 0), f"{where}: exit status {status}: {told}"
            elif status:  # where nothing is written any more, all is well
                kinds, message, trace = told[0]
                assert {"OSError", "ValueError"} & {*kinds}, f"{where}: {kinds[0]}: {message}\n{trace}"
                assert "no space" in message.lower(), f"{where}: {message}"
            found = in_fork(command.content, out=out)
            if command.whole:
                assert found in (old, new), f"{where}: neither the old nor the new state: {sorted(found)}"
            for path, value in found.items():
                assert value in (old.get(path), new.get(path)), f"{where}: {path} is neither the old nor the new one"
            found = in_fork(command.run, command.content, out=out)
            assert found == new, f"{where}, then run again: {sorted(found)} are there, or other contents"
            assert not (left := hidden(out, command.extra)), f"{where}, then run again: {left} are left"
            shutil.rmtree(out)
        print(f"{name} {act}: {len(moments)} tried of {changes} changes", flush=True)


def main() -> None:
    if not hasattr(EVENTS, "arm"):
        raise SystemExit("file_events.so is not preloaded; docs/reliability.md shows how to build it")
    folder = Path(os.path.realpath(sys.argv[1]))
    torch.set_num_threads(1)
    (folder / "data").mkdir()
    status, told = forked(lambda: prepare(folder / "data"))
    assert status == 0, told
    failed = False
    for given in sys.argv[2:]:
        name, _, count = given.partition("=")
        (folder / name).mkdir()
        try:
            attack(COMMANDS[name](folder / "data"), folder / name, int(count), name)
        except AssertionError as error:
            failed = True
            print(f"{name}: FAILED: {error}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
