"""Configurations: what ships, overrides, refusals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from xclip_fast import XCLIP, SwinConfig, XCLIPConfig, tokenize
from xclip_fast.config import VARIANTS
from xclip_fast.nn.layers import WithoutInit
from xclip_fast.schema import ConfigError
from xclip_fast.train import config as train_config
from xclip_fast.train import optim
from xclip_fast.train.config import OptimConfig, TrainConfig, from_dict


@pytest.mark.parametrize("name", train_config.shipped())
def test_shipped_configurations_are_whole(name: str) -> None:
    config = train_config.load(name)
    assert from_dict(yaml.safe_load(train_config.to_yaml(config))) == config  # what a run writes, it can read
    train_config.accumulation(config.optim, 1)
    assert config.data.train
    if config.model.variant:
        shape = train_config.model_config(config.model)
        assert shape.vision.width == VARIANTS[config.model.variant].vision.width


def test_every_row_of_the_paper_has_a_configuration() -> None:
    names = set(train_config.shipped())
    table1 = {"b32-8f", "b32-16f", "b16-8f", "b16-16f", "l14-8f", "l14-336-16f"}
    assert {f"k400-{row}" for row in table1} | {"k600-b16-8f", "k600-b16-16f", "k600-l14-8f"} <= names
    assert {"hmdb51-few-shot", "ucf101-few-shot", "zero-shot-b16-32f", "motion", "template"} <= names


# Every entry of Tables 1 to 5 that is X-CLIP's or X-Florence's: its configuration, and what is changed in it.
PAPER = {
    "Table 1, B/16 IN-21k": "ablation-in21k",
    "Table 1, B/32 8f": "k400-b32-8f",
    "Table 1, B/32 16f": "k400-b32-16f",
    "Table 1, B/16 8f": "k400-b16-8f",
    "Table 1, B/16 16f": "k400-b16-16f",
    "Table 1, L/14 8f": "k400-l14-8f",
    "Table 1, L/14@336 16f": "k400-l14-336-16f",
    "Table 1, X-Florence 8f 384": "k400-florence-8f-384",
    "Table 1, X-Florence 32f": "k400-florence-32f",
    "Table 2, B/16 8f": "k600-b16-8f",
    "Table 2, B/16 16f": "k600-b16-16f",
    "Table 2, L/14 8f": "k600-l14-8f",
    "Tables 3 and 4, B/16": "zero-shot-b16-32f",
    "Tables 3 and 4, X-Florence": "zero-shot-florence-32f",
    **{
        f"Table 5, {data} {model or 'B/16'} K={shots}": f"{data}-few-shot{model} data.shots={shots}"
        for data in ("hmdb51", "ucf101")
        for model in ("", "-florence")
        for shots in (2, 4, 8, 16)
    },
}


@pytest.mark.parametrize("row", PAPER)
def test_a_training_step_of_every_row_of_the_paper(row: str) -> None:
    """At full width and depth, on the meta device: shapes alone."""
    name, *overrides = PAPER[row].split()
    config = train_config.load(name, overrides)
    if overrides:
        assert config.data.shots == int(row.rpartition("=")[2])
    shape = train_config.model_config(config.model)
    assert ("X-Florence" in row or "-florence" in row) == isinstance(shape.vision, SwinConfig)
    trained_step(shape, config.optim, config.train_towers)


@functools.cache
def trained_step(shape: XCLIPConfig, settings: OptimConfig, towers: Any) -> None:
    with torch.device("meta"), WithoutInit():
        model = XCLIP(shape).train()
    optim.freeze(model, towers, settings.also_new)
    size = shape.vision.image_size
    frames = torch.empty(2, shape.num_frames, size, size, 3, dtype=torch.uint8, device="meta")
    logits_BK = model(frames, tokenize(["running", "a swim"], shape.label_tokens))
    assert logits_BK.shape == (2, 2)
    F.cross_entropy(logits_BK, torch.empty(2, dtype=torch.long, device="meta")).backward()
    trained = [parameter for group in optim.groups(model, settings) for parameter in group["params"]]
    assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in trained)
    torch.optim.SGD(optim.groups(model, settings), lr=settings.lr).step()  # fused AdamW has no meta device


def test_the_paper_s_recipes() -> None:
    """Learning rate, epochs and total batch of the supplement's table of hyperparameters."""
    for name, rate, epochs, batch, frames in (
        ("k400-b16-8f", 8e-6, 30, 256, 8),
        ("hmdb51-few-shot", 2e-6, 50, 64, 32),
        ("zero-shot-b16-32f", 8e-6, 10, 256, 32),
    ):
        config = train_config.load(name)
        assert (config.optim.lr, config.optim.epochs, config.optim.batch_size) == (rate, epochs, batch)
        assert train_config.model_config(config.model).num_frames == frames
        assert (config.mixing.mixup, config.mixing.cutmix, config.mixing.label_smoothing) == (0.8, 1.0, 0.1)


def test_ablations_are_what_they_say() -> None:
    def shape(name: str) -> tuple[bool, int, str, int | None]:
        config = train_config.model_config(train_config.load(f"ablation-{name}").model)
        return config.vision.cross_frame, config.mit_layers, config.prompt, config.num_classes

    assert shape("clip-mean") == (False, 0, "none", None)
    assert shape("cct") == (True, 0, "none", None)
    assert shape("mit") == (True, 1, "none", None)
    assert shape("prompt-vectors") == (True, 1, "vectors", None)
    assert shape("no-text") == (True, 1, "none", 400)


def test_overrides_are_yaml() -> None:
    config = train_config.load(
        "k400-b16-8f",
        ["optim.lr=1e-5", "optim.betas=[0.9, 0.999]", "data.val=null", "model.vision.drop_path=0.1", "compile=yes"],
    )
    assert config.optim.lr == 1e-5
    assert config.optim.betas == (0.9, 0.999)
    assert config.data.val is None
    assert config.compile is True
    assert train_config.model_config(config.model).vision.drop_path == 0.1
    assert train_config.model_config(config.model).vision.width == 768  # the rest is the variant's
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate: unknown key"),
        ({"optim": {"epoch": 1}}, "did you mean epochs"),
        ({"optmi": {}}, "did you mean optim"),
        ({"model": {"mit_layer": 1}}, "model.mit_layer: unknown key; did you mean mit_layers"),
        ({"model": {"vision": {"depth": 1}}}, "model.vision.depth: unknown key"),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast' .str.; a finite number wanted"),
        ({"optim": {"epochs": 2.5}}, "a whole number wanted"),
        ({"optim": {"epochs": True}}, "a whole number wanted"),
        ({"compile": 1}, "true or false wanted"),
        ({"data": ["a"]}, "data is .*keys and values wanted"),
        ({"optim": {"betas": [0.9]}}, "a list of 2 numbers wanted"),
        ({"train_towers": "vision"}, "one of visual, text, both, none wanted"),
        ({"optim": {"epochs": 0}}, "at least 1"),
        ({"mixing": {"switch": 2}}, "mixing.switch is 2.0; at most 1 wanted"),
        ({"model": {"variant": "B/15"}}, "model.variant: no variant"),
        ({"model": {"vision": {"patch_size": 15}}}, "model: .*multiple of patch_size"),
        ({"data": {"val": "a", "val_fraction": 0.1}}, "exclude each other"),
        ({"validation": {"crops": 2}}, "one of 1, 3 wanted"),
        ({"optim": {"clip_grad": 0}}, "clip_grad is 0.0; a number above 0 wanted, or null"),
        ({"optim": {"lr": float("nan")}}, "optim.lr is nan .*a finite number wanted"),
        ({"optim": {"lr": "inf"}}, "optim.lr is 'inf' .*a finite number wanted"),
        ({"optim": {"eps": 0}}, "optim.eps is 0.0; a number above 0 wanted$"),
        ({"optim": {"betas": [0.9, 1]}}, "optim.betas"),
        ({"seed": 2**63}, "seed is 9223372036854775808; at most 9223372036854775807 wanted"),
        ({"validation": {"batch_size": 0}}, "validation.batch_size is 0"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_files_that_are_not_there_or_not_yaml(tmp_path) -> None:
    with pytest.raises(ConfigError, match="similar names: k400-b16-8f"):
        train_config.load("k400-b16-f8")
    (tmp_path / "a.yaml").write_text("optim: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        train_config.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("just words")
    with pytest.raises(ConfigError, match="keys and values wanted"):
        train_config.load(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("")
    assert train_config.load(tmp_path / "c.yaml") == TrainConfig()
    with pytest.raises(ConfigError, match="key=value wanted"):
        train_config.load(tmp_path / "c.yaml", ["optim.lr"])
    with pytest.raises(ConfigError, match="seed is 0, which has no keys"):
        train_config.load(tmp_path / "c.yaml", ["seed=0", "seed.x=1"])


def test_accumulation() -> None:
    def divided(total: int, most: int, world: int) -> tuple[int, int]:
        return train_config.accumulation(from_dict({"optim": {"batch_size": total, "device_batch": most}}).optim, world)

    assert divided(256, 32, 8) == (32, 1)
    assert divided(256, 32, 1) == (32, 8)
    assert divided(64, 32, 8) == (8, 1)  # less than fits
    assert divided(60, 32, 1) == (30, 2)  # parts are equal
    with pytest.raises(ConfigError, match="256 videos a step do not divide over 6 processes; give 252 or 258"):
        divided(256, 32, 6)


def test_what_may_change_between_a_run_and_its_resume() -> None:
    old = from_dict({"optim": {"lr": 1.0}, "model": {"vision": {"drop_path": 0.1}}})
    free = dataclasses.replace(old, output="elsewhere", strategy="fsdp2", device="cuda")
    assert train_config.differences(old, free) == []
    other = from_dict({"optim": {"lr": 2.0}, "seed": 3})
    assert train_config.differences(old, other) == [
        "seed: 0 -> 3",
        "model.vision.drop_path: 0.1 -> None",
        "optim.lr: 1.0 -> 2.0",
    ]


def test_small_texts_that_stand_for_endless_values(tmp_path) -> None:
    levels = "".join(f",&{b} [" + ",".join([f"*{a}"] * 10) + "]" for a, b in itertools.pairwise("abcdefgh"))
    for text, message in (
        (f"precision: [&a [x,x,x,x,x,x,x,x,x,x]{levels}]", "more than 20 aliases"),
        ("optim: &a {lr: 1}\n" + "".join(f"k{i}: {{<<: [{','.join(['*a'] * 10)}]}}\n" for i in range(9)), "aliases"),
        ("[" * 10_000, "nested too deeply|cannot be read as YAML"),
        ("#" * (1 << 20) + "\n#", "more than 1048576 bytes"),
        ("precision: [" + "x, " * 10_000 + "]", r"precision is \['x', 'x', .*\.\.\.\]"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            train_config.load(tmp_path / "x.yaml")
        assert len(str(error.value)) < 2000
    with pytest.raises(ConfigError, match="aliases"):
        train_config.load("template", [f"data.scales=[&a 1{', *a' * 30}]"])
    (tmp_path / "x.yaml").write_text("optim: &a {lr: 1.0e-5}\nmixing: {mixup: 0}\n")
    assert train_config.load(tmp_path / "x.yaml").optim.lr == 1e-5


@pytest.mark.parametrize("key", ["optim.batch_size", "optim.device_batch", "data.workers", "data.frames"])
def test_sizes_that_take_a_machine_down(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 1000000000; at most"):
        train_config.load("template", [f"{key}=1000000000"])


def test_accumulation_of_a_prime_is_quick() -> None:
    config = dataclasses.replace(TrainConfig().optim, batch_size=1_048_573, device_batch=65_536)
    assert train_config.accumulation(config, 1) == (1, 1_048_573)
