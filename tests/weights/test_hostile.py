"""Files made to do harm: nothing of them runs, waits or grows, and the error names the file."""

import argparse
import collections
import inspect
import io
import json
import os
import pathlib
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.weights.test_checkpoint import CONFIG, random_state, root_text, same
from xclip_fast import XCLIP
from xclip_fast.config import XCLIPConfig
from xclip_fast.train import checkpoints
from xclip_fast.weights import checkpoint
from xclip_fast.weights.checkpoint import CheckpointError
from xclip_fast.weights.recipe import Trained


class Call:
    """Pickles as a call of a callable, named by module and name, with arguments."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


# Modules that a checkpoint's index was once allowed to call into, and those that torch's own reader allows names of.
REACHED = [
    *("torch._utils", "torch.storage", "torch.serialization", "torch.distributed.checkpoint.metadata"),
    *(
        "torch.distributed.checkpoint.filesystem",
        "collections",
        "pathlib",
        "builtins",
        "argparse",
        "copyreg",
        "_codecs",
    ),
]


def reachable():
    allowed = torch._weights_only_unpickler._get_allowed_globals().values()
    found = {id(value): value for value in allowed if callable(value)}
    for module in REACHED:
        __import__(module)
        for value in vars(sys.modules[module]).values():
            if callable(value) and not (inspect.isclass(value) and issubclass(value, BaseException)):
                found[id(value)] = value
    return list(found.values())


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module whose import, and a pickle whose reading, leaves a file."""
    harm = tmp_path / "harm"
    (tmp_path / "trapped_module.py").write_text(f"open({str(harm)!r}, 'w').close()\ndef run(*args): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    payload = pickle.dumps(Call(open, str(harm), "w"))
    yield harm, [("trapped_module.run",), (payload,), (str(harm), "w")]
    sys.modules.pop("trapped_module", None)


def test_nothing_that_a_pickle_can_reach_runs(tmp_path, trap):
    """Every callable under every name that was or is allowed, in every place of a checkpoint that is unpickled."""
    harm, arguments = trap
    saver = checkpoints.Checkpoints(tmp_path / "run", 2)
    saver.save({"weight": torch.zeros(3)}, {"step": 1})
    saver.finish()
    (good,) = checkpoints.complete(tmp_path / "run")
    (weights,) = good.glob("*.safetensors")
    archive, tried = io.BytesIO(), 0
    torch.save(0, archive)
    for function in reachable():
        for args in arguments:
            try:
                bad = pickle.dumps(Call(function, *args), 2)
            except Exception:  # not pickled by name: no file can reach it either
                continue
            tried += 1
            (good / ".metadata").write_bytes(bad)  # where torch looks
            replaced = io.BytesIO()
            with zipfile.ZipFile(archive) as old, zipfile.ZipFile(replaced, "w") as new:
                for entry in old.infolist():
                    new.writestr(entry.filename, bad if entry.filename.endswith("data.pkl") else old.read(entry))
            weights.write_bytes(replaced.getvalue())
            (tmp_path / "bad.pth").write_bytes(replaced.getvalue())
            (good / "progress.json").write_text(json.dumps({"files": {weights.name: weights.stat().st_size}}))
            with pytest.raises(ValueError, match="cannot be read into this model"):
                checkpoints.load(good, {"weight": torch.zeros(3)})
            with pytest.raises(CheckpointError, match=r"bad\.pth"):
                checkpoint.read(tmp_path / "bad.pth", drop_config=True)
            assert not harm.exists(), (function, args)
            assert "trapped_module" not in sys.modules, (function, args)
    assert tried > 300


@pytest.mark.parametrize("damage", ["missing", "longer", "cut", "header", "place", "offsets", "dtype", "shape", "name"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    saver = checkpoints.Checkpoints(tmp_path, 2)
    saver.save({"weight": torch.zeros(3)}, {"step": 1})
    saver.finish()
    (good,) = checkpoints.complete(tmp_path)
    (weights,) = good.glob("*.safetensors")
    data = weights.read_bytes()
    replaced = {
        "header": (data[:8], (10**12).to_bytes(8, "little")),
        "place": (b'"data_offsets":[0,12]', b'"data_offsets":[0,92]'),
        "offsets": (b'saved_offsets\\": [0]', b'saved_offsets\\": [5]'),
        "dtype": (b'"F32"', b'"X32"'),
        "shape": (b'"shape":[3]', b'"shape":[2]'),
        "name": (b'"weight":{"dtype"', b'"height":{"dtype"'),
    }
    if damage == "missing":
        weights.unlink()
    elif damage in ("longer", "cut"):
        weights.write_bytes(data + b"0" if damage == "longer" else data[:-1])
    else:
        old, new = replaced[damage]
        assert old in data
        weights.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match="step-00000001: cannot be read into this model"):
        checkpoints.load(good, {"weight": torch.zeros(3)})


def test_harmless_objects_beside_the_weights_do_not_stop_a_load(tmp_path):
    extras = {
        "args": argparse.Namespace(lr=1, out=pathlib.PurePosixPath("a")),
        "best": np.float64(0.8),
        "history": np.zeros(3),
        "meters": collections.defaultdict(list, loss=[1.0]),
        "kinds": {int, float},
    }
    for zipped in (True, False):
        torch.save(
            {"model": root_text(random_state()), **extras}, tmp_path / "x", _use_new_zipfile_serialization=zipped
        )
        same(checkpoint.read(tmp_path / "x").state, random_state())


class Unknown:
    def __init__(self):
        self.values = [1]

    def __getstate__(self):
        return (self.values, 2)


def test_unknown_objects_are_left_out_when_asked(tmp_path):
    torch.save({"model": root_text(random_state()), "extra": Unknown()}, tmp_path / "x")
    with pytest.raises(
        CheckpointError,
        match=r"pickled \S+Unknown beside the weights.*--drop-config` and use the new folder. It runs no",
    ):
        checkpoint.read(tmp_path / "x")
    same(checkpoint.read(tmp_path / "x", drop_config=True).state, random_state())


def test_files_that_unpack_to_more_than_they_are(tmp_path):
    state = root_text(random_state())
    torch.save(state, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as old, zipfile.ZipFile(tmp_path / "packed", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, bytes(len(old.read(entry))), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"packed: .*unpack to"):
        checkpoint.read(tmp_path / "packed")
    torch.save(state | {"visual.proj": torch.zeros(1).expand(10**6, 10**4)}, tmp_path / "expanded")
    with pytest.raises(CheckpointError, match=r"expanded: .*hold tensors of"):
        checkpoint.read(tmp_path / "expanded")


def test_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(CheckpointError, match="a regular file is wanted"):
            checkpoint.read(path)
    save_file(random_state(), tmp_path / "model.safetensors")
    os.rename(tmp_path / "fifo", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is a pipe"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {"layers": 10**9}}, "layers is 1000000000; at most 1024"),
        ({"vision": {"layers": "12"}}, "a whole number wanted"),
        ({"vision": {"layers": True}}, "a whole number wanted"),
        ({"vision": {"patch_size": 0}}, "patch_size is 0; at least 1 wanted"),
        ({"text": {"vocab_size": 10**30}}, "vocab_size is 1"),
        ({"text": []}, "text is"),
        ({"num_frames": 2.5}, "num_frames is 2.5"),
        ({"prompt_alpha": "x"}, "prompt_alpha is 'x'"),
        ({"prompt_alpha": float("nan")}, "a finite number wanted"),
        ({"image_mean": "abc"}, "a list of 3 numbers wanted"),
        ({"image_std": [1, "a", 2]}, "image_std is 'a' .str.; a finite number wanted"),
        ({"prompt": ["video"]}, "one of video, vectors, none wanted"),
    ],
)
@pytest.mark.parametrize("layout", ["xclip_fast", "huggingface"])
def test_wrong_values_in_a_configuration(tmp_path, layout, change, message):
    checkpoint.write(random_state(), CONFIG, tmp_path, layout=layout)
    values = json.loads((tmp_path / "config.json").read_text())
    if layout == "huggingface":
        inner = change.get("vision") or change.get("text")
        if not isinstance(inner, dict):
            return
        names = {"layers": "num_hidden_layers"}
        part = values["vision_config" if "vision" in change else "text_config"]
        part.update({names.get(name, name): value for name, value in inner.items()})
    else:
        for key, value in change.items():
            values[key] = values[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.read(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_other_wrong_files(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(CheckpointError, match="weight_map must be an object"):
        checkpoint.read(tmp_path)
    (tmp_path / "trained.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"trained\.json: is not JSON: it is nested too deeply; correct it"):
        Trained.read(tmp_path)


def test_a_whole_number_where_a_fraction_stands():
    values = CONFIG.to_dict() | {"prompt_alpha": 1}
    model = XCLIP(XCLIPConfig.from_dict(values))
    assert model.prompts_generator.alpha.dtype == torch.float32
    assert model.config.prompt_alpha == 1.0


def test_mutants_end_in_an_error_that_names_the_file_or_load(tmp_path):
    """A few hundred damaged copies of each kind of file: a clean error or a model, never another exception."""
    rng = np.random.default_rng(0)
    state = root_text(random_state())
    torch.save({"model": state, "args": argparse.Namespace(a=1)}, tmp_path / "zip")
    torch.save({"model": state}, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "safe")
    for name in ("zip", "old", "safe"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(40):
            mutant = bytearray(whole)
            for place in rng.integers(0, 4000 if rng.random() < 0.7 else len(whole), rng.integers(1, 8)):
                mutant[place] = rng.integers(256)
            if rng.random() < 0.2:
                mutant = mutant[: rng.integers(len(mutant))]
            path = tmp_path / "mutant"
            path.write_bytes(mutant)
            said = str(path)
            try:
                checkpoint.read(path)
            except CheckpointError as error:
                said = str(error)
            assert str(path) in said
