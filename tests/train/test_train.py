"""The training loop, on generated videos: repeatable, resumable, the same over processes, safe against bad ends."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from xclip_fast import XCLIP
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.motion import write_dataset
from xclip_fast.evaluate.loop import evaluate
from xclip_fast.inference.processes import Process
from xclip_fast.schema import ConfigError
from xclip_fast.train import checkpoints as training_checkpoint
from xclip_fast.train import config as train_config
from xclip_fast.train import log as training_log
from xclip_fast.train import loop as module
from xclip_fast.train import mixup as mixing
from xclip_fast.train import optim
from xclip_fast.train.checkpoints import Checkpoints, complete, latest
from xclip_fast.train.config import DataConfig, from_dict
from xclip_fast.train.loop import Diverged, SaveError, train
from xclip_fast.train.metrics import LAG, Measured, Meter
from xclip_fast.train.setup import read_data
from xclip_fast.weights.recipe import Trained

CLASSES = 10


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of 20 and 10 small videos."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count, seed in (("train", 2, 0), ("val", 1, 1)):
        write_dataset(folder / name, count, seed, frames=6, size=(32, 32))
        index(folder / name, folder / f"{name}.jsonl")
    return folder


def settings(videos: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A model of two small layers with a linear head, eight videos a step; three steps an epoch."""
    values: dict[str, Any] = {
        "output": str(output),
        "precision": "fp32",
        "device": "cpu",
        "model": {
            "vision": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "heads": 1, "drop_path": 0.2},
            "text": {"width": 64, "layers": 1, "heads": 1},
            "embed_dim": 64,
            "num_frames": 2,
            "num_classes": CLASSES,
        },
        "data": {"train": str(videos / "train.jsonl"), "workers": 0},
        "optim": {"lr": 1e-3, "new_lr_factor": 2, "epochs": 2, "warmup_epochs": 1, "batch_size": 8, "device_batch": 4},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every_epochs": None, "every_minutes": None},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        here = values
        for name in path:
            here = here.setdefault(name, {})
        here[last] = value
    return values


def run(videos: Path, output: Path, **changes: Any) -> Path:
    return train(from_dict(settings(videos, output, **changes)))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))  # each once, also after a resume
    return [line["loss"] for line in steps]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


TEXT = {"model__num_classes": None, "train_towers": "both", "optim__ema": 0.9, "optim__clip_grad": 1.0}


@pytest.fixture(scope="module")
def unbroken(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with the text tower trained, drop path, mixing, accumulation, averaging and clipping."""
    return run(videos, tmp_path_factory.mktemp("unbroken") / "out", **TEXT)


def test_resumed_run_is_the_unbroken_one_to_the_bit(videos: Path, unbroken: Path, tmp_path: Path) -> None:
    folder = run(videos, tmp_path, **TEXT, stop_after=2)  # in the middle of an epoch
    assert len(losses(folder)) == 2
    assert not (folder / "last").exists()
    run(videos, tmp_path, **TEXT, stop_after=4)
    run(videos, tmp_path, **TEXT)
    assert losses(folder) == losses(unbroken)
    assert_same(weights(folder), weights(unbroken))
    average = weights(unbroken)["mit.positional_embedding"]
    assert average.isfinite().all()


def test_killed_while_a_checkpoint_is_written(videos: Path, unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL from inside the second checkpoint's first fsync: the first one is what is gone on from."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings(videos, tmp_path / "out", **TEXT, checkpoint__every_steps=1)))
    script = """
        import json, os, signal, sys
        from xclip_fast.train import train
        from xclip_fast.train.config import from_dict
        sync, calls = os.fsync, []
        def fsync(handle):
            if "/checkpoints" in os.readlink(f"/proc/self/fd/{handle}"):
                calls.append(handle)
            if len(calls) == 5:  # data, index, numbers and folder of the first checkpoint; then
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)
        os.fsync = fsync
        train(from_dict(json.load(open(sys.argv[1]))))
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), config], env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    checkpoints = tmp_path / "out" / "checkpoints"
    assert [path.name for path in complete(checkpoints)] == ["step-00000001"]
    assert (checkpoints / ".step-00000002.part").exists()
    folder = run(videos, tmp_path / "out", **TEXT)
    assert losses(folder) == losses(unbroken)
    assert_same(weights(folder), weights(unbroken))
    assert not list(checkpoints.glob(".*"))


def _several(rank: int, videos: str, output: str) -> None:
    """The body of one of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{output}/meet", rank=rank, world_size=2)
    here, there = Path(videos), Path(output)
    plain = {"model__vision__drop_path": 0.0, "mixing__probability": 0.0}
    run(here, there / "ddp", **plain, optim__ema=0.9, data__val=f"{videos}/val.jsonl")
    # 20 videos in batches of 2 x 3 leave 2: of the last part of the last step, one process has none
    run(
        here,
        there / "fsdp2",
        **plain,
        **TEXT,
        strategy="fsdp2",
        optim__batch_size=6,
        optim__device_batch=3,
        stop_after=4,
    )
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # the processes import tests.train.test_train
    # one import of torch for both
    torch.multiprocessing.start_processes(_several, (str(videos), str(tmp_path)), nprocs=2, start_method="forkserver")
    plain = {"model__vision__drop_path": 0.0, "mixing__probability": 0.0}
    one = run(videos, tmp_path / "one", **plain, optim__ema=0.9, data__val=str(videos / "val.jsonl"))
    torch.testing.assert_close(losses(tmp_path / "ddp"), losses(one), rtol=1e-5, atol=1e-6)
    _assert_close(weights(tmp_path / "ddp"), weights(one))
    validations = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if "validation" in line]
        for folder in (tmp_path / "ddp", one)
    ]
    several, single = ([record.pop("loss") for record in records] for records in validations)
    assert several == pytest.approx(single, rel=1e-5)
    assert validations[0] == validations[1]
    assert validations[0][0]["predicted"] == 10
    # a sharded run of two goes on as a whole one of one
    changes = {**plain, **TEXT, "optim__batch_size": 6, "optim__device_batch": 6}
    single = run(videos, tmp_path / "single", **changes)
    resumed = run(videos, tmp_path / "fsdp2", **changes)
    assert len(losses(resumed)) == 8
    torch.testing.assert_close(losses(resumed), losses(single), rtol=1e-5, atol=1e-6)
    _assert_close(weights(resumed), weights(single))


def _assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Within what float rounding makes of a few steps of Adam, whose first steps have the size of the rate whatever the
    gradient's: of nearly all weights, and loosely of all."""
    assert a.keys() == b.keys()
    difference = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert difference.kthvalue(int(0.99 * difference.numel()))[0] < 1e-5
    assert difference.max() < 5e-3


def test_accumulation_is_a_big_batch(videos: Path, tmp_path: Path) -> None:
    plain = {"model__vision__drop_path": 0.0, "mixing__probability": 0.0, "optim__clip_grad": 1.0, "optim__epochs": 1}
    parts = run(videos, tmp_path / "parts", **plain, optim__device_batch=2)
    whole = run(videos, tmp_path / "whole", **plain, optim__device_batch=8)
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-5, atol=1e-6)
    _assert_close(weights(parts), weights(whole))


@pytest.mark.parametrize("towers", ["visual", "text", "none"])
def test_frozen_towers_do_not_change(videos: Path, tmp_path: Path, towers: Any) -> None:
    folder = run(videos, tmp_path, model__num_classes=None, train_towers=towers, optim__epochs=1, stop_after=2)
    resume = latest(folder / "checkpoints")
    assert resume is not None
    torch.manual_seed(0)
    before = XCLIP(train_config.model_config(from_dict(settings(videos, tmp_path, model__num_classes=None)).model))
    after = copy.deepcopy(before)
    tensors = {f"model.model.{name}": value.detach() for name, value in after.named_parameters()}
    training_checkpoint.load(resume, tensors)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        tower = "visual" if name.startswith("visual.") else "text"
        trained = optim.is_new(name) or towers == tower
        assert torch.equal(old, new) != trained, name


def test_loss_that_is_no_number_stops_the_run(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mixing.mix

    def poisoned(frames: Any, labels: Any, classes: int, config: Any, key: tuple[int, int, int]) -> Any:
        frames, targets_BK = plain(frames, labels, classes, config, key)
        if key[1:] == (3, 1):  # the fourth step's second part
            targets_BK = targets_BK.clone()
            targets_BK[0, 0] = float("nan")
        return frames, targets_BK

    monkeypatch.setattr(mixing, "mix", poisoned)
    with pytest.raises(Diverged) as error:
        run(videos, tmp_path, checkpoint__every_steps=2, optim__epochs=4)
    assert "step 4: the loss is nan" in str(error.value)
    assert str(tmp_path / "checkpoints" / "step-00000002") in str(error.value)
    guilty = [
        row for row in range(20) if f" {row} ({Manifest.read(videos / 'train.jsonl').name(row)})" in str(error.value)
    ]
    assert len(guilty) == 1
    assert [path.name for path in complete(tmp_path / "checkpoints")] == ["step-00000002"]
    monkeypatch.undo()
    assert len(losses(run(videos, tmp_path, checkpoint__every_steps=2, optim__epochs=4))) == 12


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(1000.0)}
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(tensors, {"step": 1})
    checkpoints.finish()
    part = tmp_path / ".step-00000002.part"
    part.mkdir()
    (part / "shard-00001-model-00001-of-00001.safetensors").symlink_to(
        "/dev/full"
    )  # every write to it fails as on a full disk
    checkpoints.save(tensors, {"step": 2})
    with pytest.raises(
        SaveError, match=r"step-00000002 could not be written: no space left.*last good one is .*step-00000001"
    ):
        checkpoints.finish()
    assert [path.name for path in complete(tmp_path)] == ["step-00000001"]
    assert not part.exists()
    read = {"weight": torch.zeros(1000)}
    training_checkpoint.load(tmp_path / "step-00000001", read)
    assert torch.equal(read["weight"], tensors["weight"])


def test_full_disk_ends_the_run_with_that_message(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = dcp.HuggingFaceStorageWriter.write_data

    def full(self: Any, *args: Any) -> Any:
        if "step-00000002" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *args)

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(SaveError, match=r"no space left on the disk.*step-00000001; make room"):
        run(videos, tmp_path, checkpoint__every_steps=1)


def test_checkpoints_are_copies_and_old_ones_go(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(100_000)}
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 5):
        checkpoints.save(tensors, {"step": step, "best": None})
        tensors["weight"] += 1  # while it is written
    checkpoints.finish()
    assert [path.name for path in complete(tmp_path)] == ["step-00000003", "step-00000004"]
    assert training_checkpoint.numbers(complete(tmp_path)[1]).items() >= {"step": 4, "best": None}.items()
    read = {"weight": torch.ones(100_000)}
    training_checkpoint.load(complete(tmp_path)[1], read)
    assert (read["weight"] == 3).all()


def test_a_checkpoint_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_checkpoint, "_FILE", 100)
    tensors = {f"weight{number}": torch.full((10,), float(number)) for number in range(5)}
    tensors |= {"step": torch.tensor(3.0), "half": torch.ones(2, 3, dtype=torch.bfloat16)}
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(tensors, {"step": 1})
    checkpoints.finish()
    (found,) = complete(tmp_path)
    files = sorted(found.glob("*.safetensors"))
    assert len(files) == 3
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    training_checkpoint.load(found, read)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    files[1].unlink()
    with pytest.raises(ValueError, match=r"cannot be read into this model .*are wanted"):
        training_checkpoint.load(found, read)


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step on Linux")
def test_a_checkpoint_of_the_same_step_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while the old one is deleted leaves the new one."""

    def killed(folder: Path) -> None:
        next(folder.glob("*.safetensors")).unlink()
        raise SystemExit

    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save({"weight": torch.zeros(3)}, {"step": 1})
    checkpoints.save({"weight": torch.ones(3)}, {"step": 1})
    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            checkpoints.finish()
    (found,) = complete(tmp_path)
    training_checkpoint.load(found, loaded := {"weight": torch.zeros(3)})
    assert loaded["weight"].tolist() == [1, 1, 1]
    Checkpoints(tmp_path, keep_last=1)
    assert list(tmp_path.iterdir()) == [found]


def test_damaged_lines_of_a_log_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('5\n{"a": 1}\n' + "[" * 30000 + '\n{"step": 1}\n{"st')
    training_log.cut(tmp_path, 3)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    plain = mixing.mix

    def asked(*args: Any) -> Any:
        if args[-1][1:] == (1, 0):
            os.kill(os.getpid(), number)
        return plain(*args)

    monkeypatch.setattr(mixing, "mix", asked)
    with pytest.raises(SystemExit) as ended:
        run(videos, tmp_path, optim__epochs=20)
    assert ended.value.code == 128 + number
    last = latest(tmp_path / "checkpoints")
    assert last is not None
    assert training_checkpoint.numbers(last)["step"] == 2  # the signal came in the second step


@pytest.mark.parametrize(("world", "steps"), [(1, 3), (2, 3 + LAG)])
def test_a_signal_ends_a_run_on_a_gpu_after_its_step(tmp_path: Path, world: int, steps: int) -> None:
    """A single process does not wait for measurements of steps before; several agree on the step, by measurements."""
    records = training_log.Log(tmp_path, train_config.LogConfig(), 100, silent=True)
    numbers: dict[str, Any] = {"step": 0, "steps": 100, "epoch_steps": 100, "log_every": 100}
    process = Process(torch.device("cuda"), 0, world)
    meter = Meter(records, process, str, **numbers, save_minutes=None, with_norm=False)
    done = 0
    while not meter.stop:
        if done == 2:
            meter.signal = signal.SIGTERM
        measured = Measured(done, 0.1)
        measured.sums = torch.tensor([1.0, 1.0, 0.0, 1.0, *meter.wishes()])
        meter.take(measured)
        done += 1
    assert done == steps


def test_what_a_run_leaves(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    changes = {"model__num_classes": None, "data__val": str(videos / "val.jsonl"), "checkpoint__every_epochs": 1}
    folder = run(videos, tmp_path / "out", **changes)
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    text = (folder / "report.md").read_text()
    assert "| 2 | 6 |" in text
    table = [line for line in text.splitlines() if line.startswith(("| epoch", "| 1 | 3", "| 2 | 6"))]
    assert {line.count("|") for line in table} == {9}
    assert sum("best" in line for line in table) == 1
    assert "curves.png" in text
    best = XCLIP.from_pretrained(folder / "best")
    texts = {name: name.replace("_", " ") for name in Manifest.read(videos / "val.jsonl").classes}
    assert Trained.read(folder / "best") == Trained.read(folder / "last") == Trained(texts, frames=2)
    again = evaluate(best, Manifest.read(videos / "val.jsonl"), workers=0)
    assert json.loads((folder / "best" / "metrics.json").read_text())["top1"] == pytest.approx(again.top1)
    assert train_config.load(folder / "config.yaml") == from_dict(settings(videos, folder, **changes))
    said = capsys.readouterr().err
    assert "step 6/6" in said
    assert "note: 6 steps at a learning rate of 0.001 change little" in said
    validations = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if "validation" in line]
    assert validations[-1]["loss"] > 0
    run(videos, folder, **changes)  # nothing left to do
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 -> 0.002(.|\n)*--fresh"):
        run(videos, folder, **changes, optim__lr=2e-3)
    fresh = train(from_dict(settings(videos, folder, **changes, optim__lr=2e-3, stop_after=1)), fresh=True)
    assert fresh == tmp_path / "out-2"
    assert (folder / "best" / "model.safetensors").exists()


def test_refused_before_the_first_step(videos: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            run(videos, tmp_path / "out", **changes)

    whole = Manifest.read(videos / "train.jsonl")
    whole.select([]).write(tmp_path / "empty.jsonl")
    refused(
        "data.train: .*empty.jsonl has no video that can be read: it is empty", data__train=f"{tmp_path}/empty.jsonl"
    )
    nameless = dataclasses.replace(whole, videos=tuple(dataclasses.replace(v, label=None) for v in whole.videos))
    nameless.write(tmp_path / "nameless.jsonl")
    refused("20 of 20 videos in .* have no label", data__train=str(tmp_path / "nameless.jsonl"))
    dataclasses.replace(whole, classes=(*whole.classes, "dancing")).write(tmp_path / "more.jsonl")
    refused("data.val has 11 classes and data.train 10; not in both: dancing", data__val=str(tmp_path / "more.jsonl"))
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    refused("labels.txt has 2 lines, and the data 10 classes", data__labels=str(tmp_path / "labels.txt"))
    refused("model.num_classes is 400, and the data has 10 classes", model__num_classes=400)
    refused("data.size is 112, and the model takes 16; leave data.size out", data__size=112)
    refused("data.train: there is no file .*missing.jsonl", data__train=str(tmp_path / "missing.jsonl"))
    refused("is a folder, not a manifest; `xclip-fast index", data__train=str(videos / "train"))
    refused("data.train is missing", data__train=None)
    refused("model.init: nowhere.pt: no such file", model__init="nowhere.pt")
    refused("data.shots: 3 usable videos of each class wanted", data__shots=3)
    refused(
        "nothing is left to train",
        train_towers="none",
        model__vision__cross_frame=False,
        model__mit_layers=0,
        model__prompt="none",
        model__num_classes=None,
    )
    refused("text_templates is true", text_templates=True)
    (tmp_path / "labels.txt").write_text("\n".join(["One Thing", *"abcdefgh", "one  thing"]))
    refused(
        "same text for the model.*'One Thing' and 'one  thing'.*data.labels",
        data__labels=str(tmp_path / "labels.txt"),
        model__num_classes=None,
    )
    refused("device is 'tpu', not auto, cpu", device="tpu")
    with pytest.raises(ConfigError, match=r"output: .*labels.txt/out: .*give a folder that can be written"):
        run(videos, tmp_path / "labels.txt" / "out")


# Trains, and in the second step of the first try says so and waits to be killed.
WAITS = """
    import json, sys, time
    from xclip_fast.train import mixup as mixing
    from xclip_fast.train import train
    from xclip_fast.train.config import from_dict
    plain = mixing.mix
    def mix(*args):
        if args[-1][1] == 1:
            print("training", flush=True)
            time.sleep(600)
        return plain(*args)
    mixing.mix = mix
    train(from_dict(json.loads(sys.argv[1])))
"""


def test_a_folder_is_one_run_s(videos: Path, tmp_path: Path) -> None:
    values = json.dumps(settings(videos, tmp_path / "out", checkpoint__every_steps=1))
    command = [sys.executable, "-c", textwrap.dedent(WAITS), values]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"training\n"
            log = (tmp_path / "out" / "log.jsonl").read_bytes()
            said = rf"another process \({other.pid} on .*\) is writing to it; wait .*--fresh"
            for _ in range(2):  # being refused takes nothing from the first
                with pytest.raises(ConfigError, match=said):
                    run(videos, tmp_path / "out")
            assert (tmp_path / "out" / "log.jsonl").read_bytes() == log
        finally:
            other.kill()
    folder = run(videos, tmp_path / "out")  # SIGKILL left nothing behind that would stop this one
    assert len(losses(folder)) == 6
    run(videos, tmp_path / "out")  # nor did the end of that one, in this very process


def test_torchrun_starts_again_what_was_killed(videos: Path, tmp_path: Path) -> None:
    """One of two processes kills itself once there is a checkpoint of the second step; the restart goes on from it."""
    script = tmp_path / "dies.py"
    script.write_text(
        textwrap.dedent("""
        import json, os, signal, sys
        from xclip_fast.train import checkpoints as training_checkpoint, mixup as mixing
        from xclip_fast.train import train
        from xclip_fast.train.config import from_dict
        values, plain = json.load(open(sys.argv[1])), mixing.mix
        def mix(*args):
            folder = os.path.join(values["output"], "checkpoints", "step-00000002")
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if first and os.environ["RANK"] == "1" and os.path.exists(folder):
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args)
        mixing.mix = mix
        train(from_dict(values))
    """)
    )
    plain = {"model__vision__drop_path": 0.0, "mixing__probability": 0.0}
    values = settings(videos, tmp_path / "out", **plain, checkpoint__every_steps=1)
    (tmp_path / "config.json").write_text(json.dumps(values))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "--monitor-interval=0.1", script, tmp_path / "config.json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on after step [2-5],", done.stderr)
    single = run(videos, tmp_path / "single", **plain)
    torch.testing.assert_close(losses(tmp_path / "out"), losses(single), rtol=1e-5, atol=1e-6)


def test_held_out_and_few_shot_videos(videos: Path, tmp_path: Path) -> None:
    data = read_data(DataConfig(train=str(videos / "train.jsonl"), val_fraction=0.3), seed=0)
    assert data.val is not None
    assert sorted(data.val.labels) == sorted(data.train.labels) == list(range(CLASSES))
    assert not {v.path for v in data.val.videos} & {v.path for v in data.train.videos}
    few = read_data(DataConfig(train=str(videos / "train.jsonl"), shots=1), seed=0)
    assert sorted(few.train.labels) == list(range(CLASSES))


def test_groups_of_the_recipe() -> None:
    config = train_config.load("k400-b16-8f", ["model.vision.layers=1", "model.text.layers=1"])
    with torch.device("meta"):
        model = XCLIP(train_config.model_config(config.model))
    optim.freeze(model, "visual")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    group_of = {
        names[id(parameter)]: group for group in optim.groups(model, config.optim) for parameter in group["params"]
    }
    assert not any(name.startswith("text.") for name in group_of)
    assert "logit_scale" not in group_of
    for name, rate, decay in (
        ("visual.conv1.weight", 8e-6, 1e-3),
        ("visual.positional_embedding", 8e-6, 0.0),
        ("visual.transformer.resblocks.0.attn.in_proj_bias", 8e-6, 0.0),
        ("visual.transformer.resblocks.0.message_fc.weight", 8e-5, 1e-3),
        ("visual.transformer.resblocks.0.message_ln.weight", 8e-5, 0.0),
        ("mit.positional_embedding", 8e-5, 0.0),
        ("prompts_visual_proj", 8e-5, 1e-3),
        ("prompts_generator.alpha", 8e-5, 0.0),
    ):
        assert (group_of[name]["peak_lr"], group_of[name]["weight_decay"]) == (pytest.approx(rate), decay), name


def test_the_released_schedule() -> None:
    """timm's cosine, from which the warm-up is not subtracted: 30 epochs of 1000 steps, 5 of warm-up."""
    epoch, total, warmup, low = 1000, 30_000, 5_000, 8e-8
    for base in (8e-6, 8e-5):
        rate = functools.partial(optim.released_learning_rate, total=total, warmup=warmup, base=base, low=low)
        assert rate(0) == 0
        assert rate(warmup - 1) == pytest.approx(base * 4999 / 5000)
        for at in (5, 10, 20):
            want = low + (base - low) / 2 * (1 + math.cos(math.pi * at / 30))
            assert rate(at * epoch) == pytest.approx(want)
        assert rate(total) == pytest.approx(low)
    rate = functools.partial(optim.released_learning_rate, total=total, warmup=warmup, base=8e-6, low=low)
    assert (round(rate(5 * epoch), 8), round(rate(10 * epoch), 8)) == (7.47e-6, 6.02e-6)


def test_the_paper_s_configurations_take_it() -> None:
    for name in train_config.shipped():
        assert (train_config.load(name).optim.schedule == "released") == (name != "motion"), name
    config = train_config.load("k400-b16-8f").optim
    made = torch.optim.SGD([{"params": [torch.zeros(1)], "peak_lr": lr} for lr in (8e-6, 8e-5)], lr=0.0)
    assert optim.set_rate(made, config, 100, 100, 10) == pytest.approx(8e-8)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([8e-8, 8e-8])
    optim.set_rate(made, dataclasses.replace(config, schedule="cosine"), 99, 100, 10)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([8e-8, 8e-7])


def test_the_other_schedule() -> None:
    rates = [optim.cosine_learning_rate(step, 100, 10, 1.0, 0.01) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.01)
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[54] == pytest.approx(0.01 + 0.99 * 0.5, abs=0.01)


def test_the_best_of_equals_has_the_smaller_loss() -> None:
    records = [{"top1": 0.5, "loss": 0.9}, {"top1": 0.5, "loss": 0.7}, {"top1": 0.4, "loss": 0.1}]
    assert max(records, key=lambda record: training_log.rank(record, "top1")) is records[1]
    assert training_log.rank({"top1": None, "loss": None}, "top1") < training_log.rank(records[2], "top1")


def test_clipping_and_average() -> None:
    model = torch.nn.Linear(4, 3)
    model(torch.randn(5, 4)).square().sum().backward()
    twin = copy.deepcopy(model)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert own.grad is not None
        other.grad = own.grad.clone()
    norm = optim.clip_gradients(model.parameters(), 0.5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5))
    torch.testing.assert_close(model.weight.grad, twin.weight.grad)
    average = optim.start_ema(model)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    optim.update_ema(average, model, decay=0.99, step=1)
    torch.testing.assert_close(average["weight"], first + 1 - 2 / 11)
    optim.update_ema(average, model, decay=0.99, step=10_000)
    torch.testing.assert_close(average["weight"], first + 1 - 2 / 11 * 0.99)


@pytest.mark.parametrize("error", [Diverged("step 4: the loss is nan"), SaveError("no space left on the disk")])
def test_the_command_says_what_stopped_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from xclip_fast.cli import main as cli

    def stopped(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "motion"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_checkpoint_s_damaged_numbers_are_named(tmp_path: Path) -> None:
    scores = (f'{{"step": 1, "best": {best}}}' for best in ('{"score": 3}', '{"score": ["x", null]}', "0"))
    for text in ("{}", '{"step": "a"}', '{"step": true}', *scores):
        (tmp_path / "progress.json").write_text(text)
        with pytest.raises(ValueError, match=r"progress.json: is damaged.*delete that folder"):
            training_checkpoint.numbers(tmp_path)
    (tmp_path / "progress.json").write_text('{"step": 1}')
    with pytest.raises(ConfigError, match="was trained on other training videos"):
        training_checkpoint.resumed(tmp_path, {"data": "a", "epoch_steps": 2})
    (tmp_path / "progress.json").write_text("{")
    with pytest.raises(ValueError, match=r"progress.json: is not JSON.*delete that folder"):
        training_checkpoint.numbers(tmp_path)


def test_a_run_of_an_earlier_version_is_named(videos: Path, tmp_path: Path) -> None:
    (checkpoint := tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (checkpoint / "progress.json").write_text('{"step": 1}')
    (tmp_path / "config.yaml").write_text("data: {cache: null}\n")
    said = rf"{tmp_path} holds checkpoints .* earlier version \(config.yaml: data.cache: unknown key.*--fresh"
    with pytest.raises(ConfigError, match=said):
        run(videos, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "data: {cache: null}\n"


def test_a_bad_video_is_told_once_and_stops_nothing(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of 20 is 5 %; the notice came after every epoch."""
    shutil.copytree(videos / "train", tmp_path / "train")
    shutil.copy(videos / "train.jsonl", tmp_path)
    lost, *_ = sorted((tmp_path / "train").glob("*/*.mp4"))
    lost.write_bytes(b"")
    folder = run(tmp_path, tmp_path / "out", data__max_bad=0.01)
    told = capsys.readouterr()
    assert (told.out + told.err).count("could not be read") == 1
    assert (folder / "quarantined.jsonl").exists()
