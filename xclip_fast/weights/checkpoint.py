"""Read and write weights: our own files, Hugging Face, VideoX, OpenAI CLIP and open_clip, timm's ViTs.

What a file is, its content says, not its name. Nothing here runs code that comes with a checkpoint: pickles go through
torch's ``weights_only`` reader, TorchScript archives through a reader that knows tensors only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import XCLIPConfig
from . import timm_vit
from .layouts import (
    CheckpointError,
    State,
    check_keys,
    config_from_huggingface,
    config_to_huggingface,
    infer_config,
    shapes,
    to_huggingface,
    to_ours,
)

__all__ = ["Checkpoint", "CheckpointError", "check_keys", "clip_state", "convert", "expand", "read", "shapes", "write"]

log = logging.getLogger("xclip_fast")

Layout = Literal["xclip_fast", "huggingface"]
Part = Literal["both", "visual", "text"]
Start = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | Any  # of an expansion; Any: a Checkpoint
_FORMAT = "xclip_fast_format"  # the key that marks a config.json as ours; its value is the version
_WEIGHTS = (  # the weight files of a folder; the first that is there is read
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_TEXT = ("text.", "logit_scale")  # what belongs to the text tower, in our names
_YACS = "yacs.config.CfgNode"  # VideoX's training script pickles its configuration into the checkpoint


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights under the names of ``XCLIP.state_dict()``, on the CPU, in the dtype they were stored in."""

    config: XCLIPConfig
    state: State
    kind: str  # "xclip_fast", "huggingface", "videox", "clip" or "timm"

    @property
    def complete(self) -> bool:
        """False for an image CLIP or ViT: ``expand`` puts it into a freshly initialised X-CLIP."""
        return self.kind not in ("clip", "timm")


def read(path: str | os.PathLike[str], config: XCLIPConfig | None = None, *, drop_config: bool = False) -> Checkpoint:
    """The weights and configuration at ``path``.

    Args:
        path: a folder (ours, Hugging Face X-CLIP or CLIP, sharded or not) or a file (safetensors, VideoX ``.pth``,
            OpenAI CLIP or open_clip, TorchScript archive included, a ViT of timm's). Names don't matter, except inside
            a folder.
        config: taken instead of the one that is found or inferred from shapes. An image CLIP's has, by default, 8
            frames and the mean and deviation that the released X-CLIP recipe uses (ImageNet's, not CLIP's own).
        drop_config: leave out a pickled yacs configuration, which is otherwise an error.

    Raises:
        CheckpointError: if nothing is there, it cannot be read without running foreign code, it is no X-CLIP or
            CLIP, or keys are missing, unexpected or misshapen (all are listed).
    """
    return _interpret(*_load(Path(path), drop_config), config=config)


def _load(path: Path, drop_config: bool = False) -> tuple[dict[str, Any], Path, dict[str, Any], dict[str, Any]]:
    """State dict, where it is from, configuration and preprocessor configuration (empty if there is none)."""
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder. Weights are read from disk; fetch them first, for example with "
            "`hf download microsoft/xclip-base-patch16 --local-dir xclip-base-patch16`"
        )
    if path.is_dir():
        folder, found = path, [path / name for name in _WEIGHTS if (path / name).exists()]
        if not found:
            raise CheckpointError(f"{path}: no weights in this folder; one of {', '.join(_WEIGHTS)} is wanted")
        weights = found[0]
    else:
        folder, weights = path.parent, path
    load = _read_shards if weights.suffix == ".json" else _read_file
    values, preprocessor = {}, {}
    if weights.name in _WEIGHTS:  # the configuration beside such a file belongs to it
        values = _read_json(folder / "config.json")
        preprocessor = _read_json(folder / "preprocessor_config.json")
    return load(weights, drop_config), path, values, preprocessor


def write(
    state: Mapping[str, Tensor],
    config: XCLIPConfig,
    folder: str | os.PathLike[str],
    layout: Layout = "xclip_fast",
    *,
    overwrite: bool = False,
) -> None:
    """Write ``XCLIP.state_dict()`` as safetensors with its configuration; each file appears whole or not at all.

    Args:
        folder: made if it is not there; its other files stay as they are.
        layout: "xclip_fast", or "huggingface" for ``transformers.XCLIPModel.from_pretrained`` and ``AutoProcessor``.
        overwrite: replace a checkpoint that is there.

    Raises:
        CheckpointError: if the weights don't fit the configuration, or the layout cannot hold it.
        FileExistsError: if a checkpoint is there and ``overwrite`` is not set.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    check_keys(shapes(config), state, "write")
    there = [name for name in (*_WEIGHTS, "config.json") if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{folder} holds a checkpoint ({', '.join(there)}): choose another folder or overwrite")
    dtype = state["visual.conv1.weight"].dtype
    if layout == "huggingface":
        model, preprocessor = config_to_huggingface(config, dtype)
        files = {"config.json": model, "preprocessor_config.json": preprocessor} | _tokenizer_files(config)
        state = to_huggingface(state)
    elif layout == "xclip_fast":
        files = {"config.json": {_FORMAT: 1, **config.to_dict()}}
    else:
        raise ValueError(f"layout {layout!r}; choose 'xclip_fast' or 'huggingface'")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode)  # it comes private
        for name in (*files, "model.safetensors"):  # weights last: without them the folder is no checkpoint yet
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary)


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    layout: Layout = "xclip_fast",
    *,
    drop_config: bool = False,
    overwrite: bool = False,
) -> None:
    """Read an X-CLIP from ``source`` in any layout and write it to ``folder``; see ``read`` and ``write``."""
    found = read(source, drop_config=drop_config)
    if not found.complete:
        raise CheckpointError(f"{source}: an image CLIP, not an X-CLIP; XCLIP.from_pretrained starts an X-CLIP from it")
    write(found.state, found.config, folder, layout, overwrite=overwrite)


def clip_state(clip: Start, config: XCLIPConfig | None = None, part: Part = "both") -> Checkpoint:
    """An image CLIP, or a ViT of timm's, in our names.

    Args:
        clip: a path, a state dict, or a module of OpenAI's, open_clip's or Hugging Face's CLIP or timm's ViT.
        config: of the X-CLIP it is for; by default the CLIP's own. Position embeddings of another grid are
            interpolated to it, and a text tower that it has not is left out; everything else has to fit.
        part: the tower that is wanted, "visual", "text" (the temperature with it) or "both".

    Raises:
        CheckpointError: if it is no image CLIP or ViT, or does not fit.
    """
    if part not in ("both", "visual", "text"):
        raise ValueError(f"part {part!r}; choose 'both', 'visual' or 'text'")
    if isinstance(clip, Checkpoint):
        if config is None and part == "both":
            found = clip
        else:
            found = _interpret(clip.state, "CLIP", config=config or clip.config, kind=clip.kind, part=part)
    elif isinstance(clip, nn.Module):
        described: Any = getattr(clip, "config", None)
        values = described.to_dict() if hasattr(described, "to_dict") else {}
        found = _interpret(clip.state_dict(), type(clip).__name__, values, config=config, part=part)
    elif isinstance(clip, Mapping):
        found = _interpret(clip, "state dict", config=config, part=part)
    else:
        found = _interpret(*_load(Path(clip)), config=config, part=part)
    if found.complete:
        raise CheckpointError("an image CLIP is wanted to start from, and this is a whole X-CLIP: use from_pretrained")
    return found


def expand(model: Any, clip: Start, part: Part = "both") -> None:
    """Put an image CLIP into an X-CLIP, in place (paper, section 3.2, "Initialization").

    IFA (``attn``), its norms, the FFN, the embeddings, the projections and the text tower inherit; CFA (``message_*``),
    MIT and the prompts keep the initialisation they have.

    Args:
        model: an ``XCLIP``. clip, part: as for ``clip_state``.
    """
    found = clip_state(clip, model.config, part)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in found.state.items():
            parameters[name].copy_(tensor)


def _interpret(
    state: Mapping[Any, Any],
    where: object,
    values: Mapping[str, Any] = MappingProxyType({}),
    preprocessor: Mapping[str, Any] = MappingProxyType({}),
    *,
    config: XCLIPConfig | None = None,
    kind: str | None = None,
    part: Part = "both",
) -> Checkpoint:
    if kind is None:
        ours, kind = to_ours(state, where)
    else:  # of our names already
        ours = dict(state)
    names = {str(name).removeprefix("module.") for name in state}
    given = None
    if _FORMAT in values:
        if values[_FORMAT] != 1:
            raise CheckpointError(f"{where}: of format {values[_FORMAT]}; this version of xclip-fast reads format 1")
        kind = "xclip_fast"  # an ablated one may look like an image CLIP
        try:
            given = XCLIPConfig.from_dict({name: value for name, value in values.items() if name != _FORMAT})
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
    elif values.get("model_type") in ("xclip", "clip"):
        given = config_from_huggingface(values, preprocessor, where)
    elif kind == "clip" and "token_embedding.weight" in names and "context_length" not in names:
        # open_clip's, then: OpenAI's own files carry the length, and have quick GELU
        log.warning("%s: weights alone don't tell CLIP's activation; quick GELU (OpenAI's) is taken, not GELU", where)
    if given and config:
        _check_heads(given, config, where, part)
    config = config or given or infer_config(ours, where, timm=kind == "timm")
    name = "visual.positional_embedding"
    wanted = shapes(config, only_clip=kind in ("clip", "timm"))
    if kind in ("clip", "timm"):
        if name in ours:
            ours[name] = _fit_positions(ours[name], config.vision.patches + 1)
        left_out: tuple[str, ...] = {"both": (), "visual": _TEXT, "text": ("visual.",)}[part]
        left_out += _TEXT if config.num_classes is not None else ()
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith(left_out)}
        left_out += (*_TEXT, "visual.proj") if kind == "timm" else ()
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(left_out)}
        refused = timm_vit.refusal(config) if kind == "timm" else None
        if not ours or refused:
            raise CheckpointError(f"{where}: {refused or f'nothing of it is left to start the {part} tower from'}")
    check_keys(wanted, ours, where)
    return Checkpoint(config, ours, kind)


def _check_heads(given: XCLIPConfig, config: XCLIPConfig, where: object, part: Part) -> None:
    """Other heads than the checkpoint's fit its shapes, and compute something else."""
    visual = part != "text" and given.vision.heads != config.vision.heads
    text = part != "visual" and config.num_classes is None and given.text.heads != config.text.heads
    if visual or text:
        raise CheckpointError(
            f"{where}: has {given.vision.heads} heads in the vision and {given.text.heads} in the text tower; "
            f"{config.vision.heads} and {config.text.heads} are wanted"
        )


def _fit_positions(position_LD: Tensor, tokens: int) -> Tensor:
    """Position embeddings of a class token and a square grid, for another grid (bicubic)."""
    old, new = math.isqrt(position_LD.shape[0] - 1), math.isqrt(tokens - 1)
    if old == new or old * old + 1 != position_LD.shape[0]:
        return position_LD
    log.info("position embeddings of a %d x %d grid are interpolated to %d x %d", old, old, new, new)
    grid = position_LD[1:].float().T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([position_LD[:1], grid[0].flatten(1).T.to(position_LD.dtype)])


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a JSON object is wanted, {type(values).__name__} found")
    return values


def _read_shards(index: Path, drop_config: bool) -> dict[str, Any]:
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    if bad := [name for name in names if Path(name).name != name or not (index.parent / name).exists()] or not names:
        raise CheckpointError(f"{index}: its shards are not all in the folder: {bad if names else 'it names none'}")
    return {name: tensor for shard in names for name, tensor in _read_file(index.parent / shard, drop_config).items()}


def _read_file(path: Path, drop_config: bool) -> dict[str, Any]:
    """The state dict of one file, in whatever names it has."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":
            return load_file(path)
        if head[:2] in (b"PK", b"\x80\x02"):  # torch.save since 1.6, and before
            return _read_torch(path, drop_config)
    except (SafetensorError, RuntimeError, zipfile.BadZipFile, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: damaged or incomplete; fetch it again ({error})") from error
    raise CheckpointError(f"{path}: neither a safetensors nor a PyTorch file (it begins with {head!r})")


class _Inert:
    """Stands in a pickle for a class that is never imported: whatever is made of it is an empty OrderedDict."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict()


def _read_torch(path: Path, drop_config: bool) -> dict[str, Any]:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_torchscript(archive)
    placeholders = torch.serialization.safe_globals([(_Inert, _YACS)]) if drop_config else contextlib.nullcontext()
    try:
        with placeholders:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if (name := re.search(r"GLOBAL (\S+)", str(error))) is None:
            detail = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
            raise CheckpointError(f"{path}: damaged or incomplete, or more than tensors: {detail}") from error
        if name[1] == _YACS:
            advice = f"leave it out with `xclip-fast convert {path} NEW_FOLDER --drop-config`, and use the new folder"
        else:
            advice = "if you trust the file, save the state dict alone, as safetensors, where it was made"
        raise CheckpointError(
            f"{path}: holds a pickled {name[1]}, and to unpickle it would run code that came with the file; {advice}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a state dict is wanted, {type(found).__name__} found")
    # out of the mapped file, which may be large with optimizer state, or be replaced
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}


class _TorchScriptReader(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive, which is how OpenAI publishes CLIP; its code is not looked at."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(archive.open(data))
        self.archive, self.root = archive, data.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Inert
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} does not belong into a TorchScript archive of CLIP")

    def persistent_load(self, saved: Any) -> Tensor:
        _, storage, key, _, _ = saved
        dtypes = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64}
        data = bytearray(self.archive.read(f"{self.root}data/{key}"))
        return torch.frombuffer(data, dtype=dtypes[storage.removesuffix("Storage")])


def _read_torchscript(archive: zipfile.ZipFile) -> State:
    state: State = {}

    def collect(module: Any, prefix: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                state[prefix + name] = value
            elif isinstance(value, OrderedDict):
                collect(value, f"{prefix}{name}.")

    collect(_TorchScriptReader(archive).load(), "")
    return state


def _tokenizer_files(config: XCLIPConfig) -> dict[str, Any]:
    """What ``transformers`` needs for CLIP's tokenizer, if the text tower has CLIP's vocabulary."""
    from ..text.tokenizer import vocabulary

    tokens, merges = vocabulary()
    if config.text.vocab_size != len(tokens):
        return {}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.text.context_length}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings |= {"pad_token": "<|endoftext|>"}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    return {"vocab.json": json.dumps(tokens), "merges.txt": "\n".join(lines) + "\n", "tokenizer_config.json": settings}
