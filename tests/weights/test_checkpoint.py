"""Reading and writing weights: every layout, wrong keys, and pickles that must not run."""

import dataclasses
import json
import logging
import os
import pickle
import re
import stat
import sys
import types
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xclip_fast import VARIANTS, XCLIP, TextConfig, VisionConfig, XCLIPConfig
from xclip_fast.weights import checkpoint
from xclip_fast.weights.checkpoint import CheckpointError
from xclip_fast.weights.huggingface import config_from_huggingface, warn_of_heads
from xclip_fast.weights.layouts import from_huggingface, to_huggingface

CONFIG = XCLIPConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2),
    text=TextConfig(vocab_size=300, context_length=12, width=64, layers=3, heads=1),
    embed_dim=64,
    num_frames=3,
    mit_layers=2,
    prompt_layers=1,
)
# what shapes alone tell, and what an image CLIP starts with
CLIP_CONFIG = dataclasses.replace(CONFIG, num_frames=8, mit_layers=1, prompt_layers=2)


def random_state(config=CONFIG, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in checkpoint.shapes(config, **kwargs).items()
    }


def root_text(state):
    """The text tower's names as in VideoX and OpenAI's CLIP."""
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}


def hf_config(config=CONFIG, model_type="xclip"):
    vision, text, E = config.vision, config.text, config.embed_dim
    values = {
        "model_type": model_type,
        "projection_dim": E,
        "vision_config": {
            "hidden_size": vision.width,
            "intermediate_size": 4 * vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
        },
    }
    if model_type == "xclip":
        values |= {"prompt_layers": config.prompt_layers, "prompt_num_attention_heads": config.prompt_heads}
        values["logit_scale_init_value"] = config.logit_scale
        values["vision_config"] |= {
            "num_frames": config.num_frames,
            "mit_hidden_size": E,
            "mit_intermediate_size": 4 * E,
            "mit_num_hidden_layers": config.mit_layers,
            "mit_num_attention_heads": config.mit_heads,
        }
    return values


def hf_clip_names(state):
    renamed = to_huggingface(state)
    return {name.replace("pre_layernorm", "pre_layrnorm"): tensor.contiguous() for name, tensor in renamed.items()}


def write_json(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")


def same(found, state):
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


# --- our own layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_layout_round_trip(tmp_path, dtype):
    config = dataclasses.replace(CONFIG, mit_residual=False, image_mean=(0.1, 0.2, 0.3), layer_norm_eps=1e-6)
    model = XCLIP(config).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = XCLIP.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == config
    assert not again.training
    assert all(parameter.requires_grad and parameter.dtype == dtype for parameter in again.parameters())
    same(again.state_dict(), model.state_dict())
    found = checkpoint.read(tmp_path / "new" / "folder" / "model.safetensors")  # the config beside it counts
    assert (found.kind, found.complete, found.config) == ("xclip_fast", True, config)


def test_single_file_of_ours_is_inferred(tmp_path):
    state = random_state()
    save_file(state, tmp_path / "weights")  # no extension: the content says what it is
    found = checkpoint.read(tmp_path / "weights")
    assert (found.kind, found.config) == ("xclip_fast", CONFIG)
    same(found.state, state)


def test_write_refuses_to_overwrite_and_keeps_other_files(tmp_path):
    checkpoint.write(random_state(), CONFIG, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.safetensors, config\.json"):
        checkpoint.write(random_state(), CONFIG, tmp_path)
    other = {name: tensor + 1 for name, tensor in random_state().items()}
    checkpoint.write(other, CONFIG, tmp_path, overwrite=True)
    same(checkpoint.read(tmp_path).state, other)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes.txt"]
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    assert len(modes) == 1  # as any file the user makes


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.write(random_state(), CONFIG, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(
            {name: tensor + 1 for name, tensor in random_state().items()}, CONFIG, tmp_path, overwrite=True
        )
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_write_checks_weights_and_layout(tmp_path):
    with pytest.raises(CheckpointError, match="1 missing"):
        checkpoint.write({k: v for k, v in random_state().items() if k != "logit_scale"}, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="choose 'xclip_fast' or 'huggingface'"):
        checkpoint.write(random_state(), CONFIG, tmp_path, layout="onnx")
    plain = dataclasses.replace(CONFIG, mit_residual=False)
    with pytest.raises(CheckpointError, match="mit_residual"):
        checkpoint.write(random_state(), plain, tmp_path, layout="huggingface")
    assert not os.listdir(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    checkpoint.write(random_state(), CONFIG, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", values | {"xclip_fast_format": 2})
    with pytest.raises(CheckpointError, match="format 2"):
        checkpoint.read(tmp_path)


# --- Hugging Face


def test_names_go_to_huggingface_and_back():
    state = random_state()
    theirs = to_huggingface(state)
    assert not set(theirs) & {name for name in state if name.startswith(("visual.", "text."))}
    assert theirs["vision_model.encoder.layers.1.message_attn.v_proj.weight"].equal(
        state["visual.transformer.resblocks.1.message_attn.in_proj_weight"][256:]
    )
    assert theirs["text_projection.weight"].equal(state["text.text_projection"].T)
    same(from_huggingface(theirs), state)


def save_bin(state, folder):
    torch.save(state, folder / "pytorch_model.bin")


def save_safetensors(state, folder):
    save_file(state, folder / "model.safetensors")


def save_sharded(state, folder, *, extension, save, index):
    names = sorted(state)
    shards = {f"part-{i}-of-2.{extension}": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        save({name: state[name] for name in keys}, folder / shard)
    write_json(folder / index, {"weight_map": {name: shard for shard, keys in shards.items() for name in keys}})


def save_sharded_bin(state, folder):
    save_sharded(state, folder, extension="bin", save=torch.save, index="pytorch_model.bin.index.json")


def save_sharded_safetensors(state, folder):
    save_sharded(state, folder, extension="safetensors", save=save_file, index="model.safetensors.index.json")


@pytest.mark.parametrize("save", [save_bin, save_safetensors, save_sharded_bin, save_sharded_safetensors])
def test_huggingface_folder_however_it_is_stored(tmp_path, save):
    state = random_state()
    theirs = {name: tensor.contiguous() for name, tensor in to_huggingface(state).items()}
    theirs["text_model.embeddings.position_ids"] = torch.arange(12)[None]  # buffers of older versions
    theirs["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save(theirs, tmp_path)
    write_json(tmp_path / "config.json", hf_config())
    write_json(tmp_path / "preprocessor_config.json", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    found = checkpoint.read(tmp_path)
    assert found.kind == "huggingface"
    assert found.config == dataclasses.replace(CONFIG, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))
    same(found.state, state)
    assert all(tensor.is_contiguous() for tensor in found.state.values())


def test_a_missing_shard_is_named(tmp_path):
    save_sharded_bin(to_huggingface(random_state()), tmp_path)
    (tmp_path / "part-1-of-2.bin").unlink()
    with pytest.raises(CheckpointError, match=r"part-1-of-2\.bin"):
        checkpoint.read(tmp_path)
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": {"a": "../elsewhere.bin"}})
    with pytest.raises(CheckpointError, match="elsewhere"):
        checkpoint.read(tmp_path)


def test_old_configurations_with_dict_keys(tmp_path):
    values = hf_config()
    save_safetensors({k: v.contiguous() for k, v in to_huggingface(random_state()).items()}, tmp_path)
    for part in ("vision_config", "text_config"):
        values[f"{part}_dict"] = values.pop(part)
        values[part] = {"hidden_size": 999}  # overruled, as in transformers
    values["vision_config_dict"]["image_size"] = [32, 32]
    write_json(tmp_path / "config.json", values)
    assert checkpoint.read(tmp_path).config == CONFIG


def test_defaults_of_a_short_configuration():
    values = {
        "model_type": "xclip",
        "text_config": {"dropout": 0.0},
        "vision_config": {"model_type": "xclip_vision_model"},
    }

    ours = config_from_huggingface(values, {}, "here")
    assert ours == dataclasses.replace(VARIANTS["B/32-8f"], logit_scale=2.6592)


def test_configurations_agree_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    values = hf_config()
    values["text_config_dict"] = values.pop("text_config")
    write_json(tmp_path / "config.json", values)
    config = transformers.XCLIPConfig.from_pretrained(tmp_path)
    save_safetensors({k: v.contiguous() for k, v in to_huggingface(random_state()).items()}, tmp_path)
    ours = checkpoint.read(tmp_path).config
    assert ours.text.width == config.text_config.hidden_size
    assert ours.text.layers == config.text_config.num_hidden_layers
    assert ours.vision.heads == config.vision_config.num_attention_heads


def test_other_head_counts_are_kept_with_a_warning(tmp_path, caplog):
    values = hf_config()
    values["vision_config"]["mit_num_attention_heads"] = 8
    save_safetensors({k: v.contiguous() for k, v in to_huggingface(random_state()).items()}, tmp_path)
    write_json(tmp_path / "config.json", values)
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        found = checkpoint.read(tmp_path)
    assert (found.config.mit_heads, found.config.prompt_heads) == (8, 1)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "mit_heads is 8, by its configuration. The released code has E / 64 = 1" in said
    assert "config=dataclasses.replace(model.config, mit_heads=None, prompt_heads=None)" in said
    caplog.clear()
    assert checkpoint.read(tmp_path, dataclasses.replace(found.config, mit_heads=None)).config.mit_heads == 1
    assert not caplog.records


def test_the_large_models_of_hugging_face_name_the_variant_to_ask_for(caplog):
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        warn_of_heads(dataclasses.replace(VARIANTS["L/14-8f"], mit_heads=8, prompt_heads=8, logit_scale=2.6592), "here")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "mit_heads is 8 and prompt_heads is 8" in said
    assert "config='L/14-8f' (--variant L/14-8f)" in said


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "hidden_act", "gelu"),
        ("vision_config", "hidden_act", "gelu"),
        ("vision_config", "intermediate_size", 500),
        ("vision_config", "mit_hidden_size", 32),
        ("text_config", "layer_norm_eps", 1e-6),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path, part, key, value):
    values = hf_config()
    values[part][key] = value
    save_safetensors({k: v.contiguous() for k, v in to_huggingface(random_state()).items()}, tmp_path)
    write_json(tmp_path / "config.json", values)
    with pytest.raises(CheckpointError, match=key) as error:
        checkpoint.read(tmp_path)
    assert str(value) in str(error.value)


# --- VideoX


@pytest.mark.parametrize("wrap", [lambda state: {"model": state, "epoch": 3}, lambda state: state])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_videox_file(tmp_path, wrap, prefix, zipped):
    state = random_state()
    theirs = OrderedDict((prefix + name, tensor) for name, tensor in root_text(state).items())
    torch.save(wrap(theirs), tmp_path / "k400.pth", _use_new_zipfile_serialization=zipped)
    found = checkpoint.read(tmp_path / "k400.pth")
    assert (found.kind, found.config) == ("videox", CONFIG)
    same(found.state, state)


@pytest.fixture
def fake_yacs(monkeypatch):
    """A stand-in for yacs, only to write the pickle; reading must do without."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, *args):
            super().__init__(*args)
            self.__dict__["immutable"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        context.setitem(sys.modules, "yacs.config", module)
        yield CfgNode


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_yacs_config_is_refused_and_can_be_dropped(tmp_path, fake_yacs, monkeypatch, zipped):
    state = random_state()
    config = fake_yacs({"DATA": fake_yacs({"ROOT": "k400", "NUM_FRAMES": 8}), "OUTPUT": [1, (2, "three")]})
    path = tmp_path / "old.pth"
    saved = {"config": config, "model": root_text(state), "max_accuracy": 80.4}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    with pytest.raises(
        CheckpointError, match=re.escape(f"xclip-fast convert {path} NEW_FOLDER --drop-config")
    ) as error:
        checkpoint.read(path)
    assert "yacs.config.CfgNode" in str(error.value)

    checkpoint.convert(path, tmp_path / "new", drop_config=True)
    found = checkpoint.read(tmp_path / "new")
    assert (found.kind, found.config) == ("xclip_fast", CONFIG)
    same(found.state, state)
    assert "yacs.config" not in sys.modules


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("drop_config", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_does_not_run(tmp_path, fake_yacs, drop_config, zipped):
    state = root_text(random_state())
    saved = {"config": fake_yacs({"a": 1}), "hook": Attack(tmp_path / "harm"), "model": state}
    torch.save(saved, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="system" if drop_config else "CfgNode"):
        checkpoint.read(tmp_path / "bad.pth", drop_config=drop_config)
    del saved["config"]
    torch.save(saved, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="system"):
        checkpoint.convert(tmp_path / "bad.pth", tmp_path / "new", drop_config=drop_config)
    assert not (tmp_path / "harm").exists()


# --- image CLIP


def tree(root, state):
    """Hang tensors into a module tree by their dotted names."""
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return root


def openai_archive(state, path):
    """A TorchScript archive, as OpenAI publishes CLIP: half precision, three integers among the weights."""
    module = tree(nn.Module(), {name: tensor.half() for name, tensor in state.items()})
    for name, value in {"input_resolution": 32, "context_length": 12, "vocab_size": 300}.items():
        module.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
        torch.jit.script(module).save(path)


def clip_files(kind, state, tmp_path):
    """Write an image CLIP in one of the ways it is published; returns what to read."""
    path = tmp_path / "clip"
    if kind == "openai":
        openai_archive(root_text(state), path)
    elif kind == "openai state dict":
        torch.save(root_text(state) | {"input_resolution": 32, "context_length": 12, "vocab_size": 300}, path)
    elif kind == "open_clip":
        training = {f"module.{name}": tensor for name, tensor in root_text(state).items()}
        torch.save({"epoch": 3, "name": "vit", "state_dict": training}, path)
    elif kind == "open_clip custom text":
        save_file(state | {"text.attn_mask": torch.zeros(12, 12)}, path)
    else:
        path.mkdir()
        save_safetensors(hf_clip_names(state), path)
        write_json(path / "config.json", hf_config(model_type="clip"))
    return path


CLIPS = ["openai", "openai state dict", "open_clip", "open_clip custom text", "huggingface"]


@pytest.mark.parametrize("kind", CLIPS)
def test_image_clip(tmp_path, kind, caplog):
    state = random_state(only_clip=True)
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        found = checkpoint.read(clip_files(kind, state, tmp_path))
    assert (found.kind, found.complete) == ("clip", False)
    scale = 2.6592 if kind == "huggingface" else CONFIG.logit_scale
    assert found.config == dataclasses.replace(CLIP_CONFIG, logit_scale=scale)
    if kind == "openai":
        state = {name: tensor.half() for name, tensor in state.items()}
    same(found.state, state)
    assert bool(caplog.records) == (kind == "open_clip")  # whose activation the file does not tell


@pytest.mark.parametrize("kind", CLIPS)
def test_from_pretrained_expands_an_image_clip(tmp_path, kind):
    state = random_state(only_clip=True)
    path = clip_files(kind, state, tmp_path)
    torch.manual_seed(3)
    fresh = XCLIP(CLIP_CONFIG).state_dict()
    torch.manual_seed(3)
    model = XCLIP.from_pretrained(path)
    new = {name for name in fresh if re.search(r"message_|^mit\.|^prompts", name)}
    assert len(fresh) == len(new) + len(state)
    for name, tensor in model.state_dict().items():
        wanted = fresh[name] if name in new else state[name]
        assert torch.allclose(tensor, wanted, rtol=1e-3, atol=1e-3), name  # OpenAI's is in half precision


def test_expand_from_modules_and_dicts(tmp_path):
    state = random_state(only_clip=True)
    sources = [tree(nn.Module(), root_text(state)), root_text(state), checkpoint.clip_state(root_text(state))]
    transformers = pytest.importorskip("transformers")
    values = {name: value for name, value in hf_config(model_type="clip").items() if name != "model_type"}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**values))
    theirs.load_state_dict(hf_clip_names(state))
    for source in [*sources, theirs]:
        model = XCLIP(CONFIG)
        assert model.expand_from(source) is model
        same({name: model.state_dict()[name] for name in state}, state)


def test_expand_interpolates_another_grid_and_refuses_other_widths(caplog):
    clip = random_state(
        dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, image_size=64)), only_clip=True
    )
    model = XCLIP(CONFIG)
    with caplog.at_level(logging.INFO, "xclip_fast"):
        model.expand_from(clip)
    assert "4 x 4 grid are interpolated to 2 x 2" in caplog.text
    position, source = model.visual.positional_embedding, clip["visual.positional_embedding"]
    assert torch.equal(position[0], source[0])
    grid = source[1:].T.reshape(1, 128, 4, 4)
    wanted = nn.functional.interpolate(grid, size=(2, 2), mode="bicubic", align_corners=False)
    assert torch.allclose(position[1:].T.reshape(1, 128, 2, 2), wanted)

    wider = dataclasses.replace(CONFIG, embed_dim=128)
    with pytest.raises(CheckpointError, match=r"misshapen:\n  visual.proj is \[128, 64\], wanted \[128, 128\]"):
        XCLIP(wider).expand_from(random_state(only_clip=True))


def test_expand_refuses_a_whole_xclip_and_other_heads(tmp_path):
    with pytest.raises(CheckpointError, match="from_pretrained"):
        XCLIP(CONFIG).expand_from(random_state())
    path = clip_files("huggingface", random_state(only_clip=True), tmp_path)
    heads = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, heads=4))
    with pytest.raises(CheckpointError, match="has 2 heads in the vision"):
        XCLIP(heads).expand_from(path)


def test_convert_refuses_an_image_clip(tmp_path):
    with pytest.raises(CheckpointError, match="image CLIP"):
        checkpoint.convert(clip_files("huggingface", random_state(only_clip=True), tmp_path), tmp_path / "new")


def test_wide_towers_need_a_configuration(tmp_path):
    vision = VisionConfig(image_size=32, patch_size=16, width=1280, layers=1, heads=16)
    config = dataclasses.replace(CLIP_CONFIG, vision=vision)
    save_file(random_state(config, only_clip=True), tmp_path / "vit-h")
    with pytest.raises(CheckpointError, match="config="):
        checkpoint.read(tmp_path / "vit-h")
    assert checkpoint.read(tmp_path / "vit-h", config).config.vision.heads == 16
    assert XCLIP.from_pretrained(tmp_path / "vit-h", config=config).config == config


def test_torchscript_code_does_not_run(tmp_path):
    """An archive whose pickle asks for more than tensors is refused."""
    path = tmp_path / "bad"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps(Attack(tmp_path / "harm")))
        archive.writestr("bad/constants.pkl", pickle.dumps(()))
    with pytest.raises(CheckpointError, match="system"):
        checkpoint.read(path)
    assert not (tmp_path / "harm").exists()


# --- errors


def test_every_wrong_key_is_listed(tmp_path):
    state = root_text(random_state())
    for i in range(CONFIG.vision.layers):
        del state[f"visual.transformer.resblocks.{i}.message_fc.weight"]
    del state["prompts_generator.alpha"]
    state["visual.proj"] = state["visual.proj"][:, :7]
    state["head.weight"] = torch.zeros(2)
    state["logit_scale"] = torch.tensor(4)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(tmp_path / "odd.pth")
    said = str(error.value)
    assert "3 missing:" in said
    assert "visual.transformer.resblocks.*.message_fc.weight (in 2 layers)" in said
    assert "prompts_generator.alpha" in said
    assert "1 unexpected:\n  head.weight" in said
    assert "1 misshapen:\n  visual.proj is [128, 7], wanted [128, 64]" in said
    assert "1 not floating:\n  logit_scale is torch.int64" in said


def test_a_lone_part_of_an_attention_is_listed(tmp_path):
    theirs = {name: tensor.contiguous() for name, tensor in to_huggingface(random_state()).items()}
    del theirs["mit.encoder.layers.0.self_attn.k_proj.bias"]
    save_safetensors(theirs, tmp_path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(tmp_path)
    assert "1 missing:\n  mit.resblocks.*.attn.in_proj_bias (in 1 layers)" in str(error.value)
    assert "2 unexpected:\n  mit.resblocks.*.attn.q_proj.bias" in str(error.value)


def test_a_foreign_state_dict_is_not_listed_without_end():
    with pytest.raises(CheckpointError) as error:
        checkpoint.check_keys({}, {f"layer_{i}": torch.zeros(1) for i in range(1000)}, "foreign")
    assert "1000 unexpected" in str(error.value)
    assert "and 960 more lines" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "neither a safetensors nor a PyTorch file"),
        (b"", "neither a safetensors nor a PyTorch file"),
        (b"PK\x03\x04 and no more", "damaged or incomplete"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00{", "damaged or incomplete"),
        (b"\x80\x02cut off", "damaged or incomplete"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.read(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice is to switch that off: not ours


def test_truncated_files(tmp_path):
    save_file(random_state(), tmp_path / "a")
    torch.save(random_state(), tmp_path / "b")
    for name in "ab":
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            checkpoint.read(path)


def test_other_things_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        checkpoint.read(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no weights in this folder"):
        checkpoint.read(tmp_path)
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(CheckpointError, match="list found"):
        checkpoint.read(tmp_path / "list")
    torch.save({"a": 1}, tmp_path / "numbers")
    with pytest.raises(CheckpointError, match="not names of tensors"):
        checkpoint.read(tmp_path / "numbers")
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet")
    with pytest.raises(CheckpointError, match="vision transformer"):
        checkpoint.read(tmp_path / "resnet")
    save_safetensors({"visual.conv1.weight": torch.zeros(64, 3, 4, 4)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"one cannot be inferred without .*text_projection"):
        checkpoint.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        checkpoint.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="list found"):
        checkpoint.read(tmp_path)
    assert load_file(tmp_path / "model.safetensors")


# --- wrappers


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def fsdp(state):
    """FSDP and activation checkpointing put a segment inside names."""
    inner = {re.sub(r"(resblocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name): t for name, t in state.items()}
    return under("_fsdp_wrapped_module.", inner)


WRAPPERS = {
    "compile(DDP)": lambda state: under("_orig_mod.module.", state),
    "DDP(compile)": lambda state: under("module._orig_mod.", state),
    "Lightning": lambda state: {"state_dict": under("model.", state) | {"loss.weight": torch.ones(2)}, "epoch": 1},
    "Lightning, compiled": lambda state: {"state_dict": under("net._orig_mod.", state)},
    "mmaction2": lambda state: {"meta": {}, "state_dict": under("backbone.", state), "message_hub": {}},
    "DeepSpeed": lambda state: {"module": state, "param_shapes": [{"a": torch.Size([1])}], "dp_world_size": 8},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **under("module.", state)},
    "two levels": lambda state: {"checkpoint": {"model": state}},
    "beside an average": lambda state: {"model_ema": {n: t + 1 for n, t in state.items()}, "model": state},
    "prefix of an average": lambda state: {f"ema.{n}": t + 1 for n, t in state.items()} | under("online.", state),
    "only an average": lambda state: {"state_dict_ema": state},
    "FSDP": fsdp,
    "scale of shape (1,)": lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)},
    "numbers beside": lambda state: {**state, "epoch": 3, "step": 4.5},
}


@pytest.mark.parametrize("names", [root_text, to_huggingface])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_found_by_their_content(tmp_path, wrapper, names):
    state = random_state()
    torch.save(WRAPPERS[wrapper](names(state)), tmp_path / "x")
    same(checkpoint.read(tmp_path / "x").state, state)


def test_a_dictionary_inside_itself_ends(tmp_path):
    knot: dict = {}
    knot.update({str(number): knot for number in range(100)})
    torch.save(knot, tmp_path / "x")
    with pytest.raises(CheckpointError, match="not names of tensors"):
        checkpoint.read(tmp_path / "x")


# --- image processors


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        ({"do_normalize": False, "image_mean": [0.5, 0.4, 0.3]}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        (
            {"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 2 / 255},
            (0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5),
        ),
    ],
)
def test_the_image_processor_s_values_are_read(tmp_path, nested, processor, mean, std):
    save_safetensors({k: v.contiguous() for k, v in to_huggingface(random_state()).items()}, tmp_path)
    write_json(tmp_path / "config.json", hf_config())
    if nested:  # transformers 5
        write_json(
            tmp_path / "processor_config.json", {"image_processor": processor, "processor_class": "XCLIPProcessor"}
        )
    else:
        write_json(tmp_path / "preprocessor_config.json", processor)
    found = checkpoint.read(tmp_path).config
    assert found.image_mean == pytest.approx(mean)
    assert found.image_std == pytest.approx(std)


def test_other_pictures_than_ours_are_told(tmp_path, caplog):
    save_safetensors({k: v.contiguous() for k, v in to_huggingface(random_state()).items()}, tmp_path)
    write_json(tmp_path / "config.json", hf_config())
    write_json(
        tmp_path / "preprocessor_config.json", {"crop_size": {"height": 30, "width": 30}, "resample": 3, "size": 32}
    )
    with caplog.at_level(logging.INFO, "xclip_fast"):
        checkpoint.read(tmp_path)
    said = " ".join(record.getMessage() for record in caplog.records)
    for part in ("crops to 30, the model takes 32", "filter 3", "short side to 32; decode() resizes to 36"):
        assert part in said


def test_convert_replaces_what_belonged_to_the_old_weights(tmp_path):
    for name, number in (("a", 0), ("b", 1)):
        state = {key: tensor + number for key, tensor in random_state().items()}
        checkpoint.write(
            state, CONFIG, tmp_path / name, beside={"trained.json": '{"labels": {"x": "y"}}'} if number else {}
        )
    checkpoint.convert(tmp_path / "a", tmp_path / "b", overwrite=True)
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]
    for source in ("b", "b/model.safetensors"):
        with pytest.raises(ValueError, match="own conversion; choose another folder"):
            checkpoint.convert(tmp_path / source, tmp_path / "b", "huggingface", overwrite=True)
    checkpoint.convert(tmp_path / "a", tmp_path / "c")
    assert os.listdir(tmp_path / "c")
