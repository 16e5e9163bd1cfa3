"""Read and write weights: our own files, Hugging Face, VideoX, ViFi-CLIP, ActionCLIP, image CLIPs, timm's ViTs.

The content of a file decides its layout, not its name. Nothing here runs code from a checkpoint (weight_files.py).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import XCLIPConfig
from ..files import staged
from . import hub, neighbors, open_clip, timm_vit, unicl
from .huggingface import config_from_huggingface, config_to_huggingface, read_processor, tokenizer_files, warn_of_heads
from .layouts import CheckpointError, State, check_keys, infer_config, refused, shapes, to_huggingface, to_ours
from .open_clip import config_from_open_clip
from .recipe import FILE as TRAINED
from .recipe import Trained
from .renaming import resize_grid
from .weight_files import read_object, read_weights, write_weights
from .wrappers import unwrap

__all__ = ["Checkpoint", "CheckpointError", "check_keys", "clip_state", "convert", "expand", "read", "shapes", "write"]

log = logging.getLogger("xclip_fast")

Layout = Literal["xclip_fast", "huggingface"]
Part = Literal["both", "visual", "text"]
Start = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | Any  # an image CLIP; Any: a Checkpoint
MODEL_TYPE = "xclip_fast"  # what transformers finds it by, see ``huggingface.register``
_FORMAT = "xclip_fast_format"  # the key that marks a config.json as ours; its value is the version
WEIGHTS = (  # the weight files of a folder; the first one found is read
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    *open_clip.WEIGHTS,
)
_TEXT = ("text.", "logit_scale", "logit_bias")  # the text tower, in our names


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights with the names of ``XCLIP.state_dict()``, on the CPU, in their stored dtype."""

    config: XCLIPConfig
    state: State
    kind: str  # "xclip_fast", "huggingface", "videox", "vificlip", "actionclip", "clip" or "timm"

    @property
    def complete(self) -> bool:
        """False for an image CLIP or ViT: ``expand`` puts it into a freshly initialized X-CLIP."""
        return self.kind not in ("clip", "timm")


def read(
    path: str | os.PathLike[str],
    config: XCLIPConfig | None = None,
    *,
    drop_config: bool = False,
    clip: Start | None = None,
    check: bool = True,
) -> Checkpoint:
    """The weights and configuration at ``path``, with the arguments and errors of ``XCLIP.from_pretrained``.

    Args:
        path: only the files of a folder need certain names. A folder may be sharded, a file a TorchScript archive.
        config: replaces the config that is found or inferred from shapes. The default for an image CLIP has the mean
            and standard deviation of the released X-CLIP recipe (ImageNet's, not CLIP's).
        drop_config: leave out pickled objects of unknown classes, such as VideoX's training configuration. Otherwise
            they are an error. None of their code runs.
        check: whether the weights of an X-CLIP must fit the config. Without it, the caller compares them with a model.
    """
    embedding_VW = None if clip is None else clip_state(clip).state.get("text.token_embedding.weight")
    return _interpret(*_load(Path(path), drop_config), config=config, embedding_VW=embedding_VW, check=check)


def own_config(values: Mapping[str, Any]) -> XCLIPConfig:
    """The config in our own ``config.json``. Unknown keys are a ``ValueError`` that names them."""
    return XCLIPConfig.from_dict({name: value for name, value in values.items() if name not in (_FORMAT, "model_type")})


def find_weights(path: str | os.PathLike[str]) -> Path:
    """The file of weights at ``path``: a file, a folder, or the name of a repository on the Hugging Face Hub.

    Raises:
        CheckpointError: if there is none. The message says where the weights are, or how to download them.
    """
    path = hub.locate(path, WEIGHTS)
    if not path.is_dir():
        return path
    if found := [path / name for name in WEIGHTS if (path / name).exists()]:
        return found[0]
    if any((path / "best" / name).exists() for name in WEIGHTS):
        raise CheckpointError(f"{path} is the output folder of a training. Its weights are in {path / 'best'}")
    if (path / "config.yaml").exists():
        raise CheckpointError(f"{path} is the output folder of a training that has no weights yet")
    raise CheckpointError(f"{path}: no weights in this folder. It needs one of {', '.join(WEIGHTS)}")


def _load(path: Path, drop_config: bool = False) -> tuple[dict[str, Any], Path, dict[str, Any], dict[str, Any]]:
    """State dict, its path, configuration and preprocessor configuration (both empty if missing)."""
    weights = find_weights(path)
    folder = weights.parent
    values, preprocessor = {}, {}
    if weights.name in WEIGHTS:  # the configuration beside such a file belongs to it
        values = read_object(folder / open_clip.FILE) if weights.name in open_clip.WEIGHTS else {}
        values = values or read_object(folder / "config.json")
        preprocessor = read_processor(folder)
    return read_weights(weights, drop_config), path, values, preprocessor


def write(
    state: Mapping[str, Tensor],
    config: XCLIPConfig,
    folder: str | os.PathLike[str],
    layout: Layout = "xclip_fast",
    *,
    overwrite: bool = False,
    beside: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Writes ``XCLIP.state_dict()`` as safetensors with its configuration, all files in one step (``files.staged``).

    Args:
        folder, layout, overwrite: as for ``XCLIP.save_pretrained``.
        beside: further text files that belong to these weights, by name. None: a file of that name is removed.

    Raises:
        CheckpointError: if the weights do not fit the configuration, or the layout cannot hold it.
        FileExistsError: if the folder holds a checkpoint and ``overwrite`` is not set.
        OSError: if the folder cannot be written. Its old content stays.
    """
    folder = Path(folder)
    check_keys(shapes(config), state, "write")
    there = [name for name in (*WEIGHTS, "config.json") if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} holds a checkpoint ({', '.join(there)}); choose another folder, or replace it with --overwrite "
            "(overwrite=True in Python)"
        )
    dtype = state["visual.proj"].dtype
    if layout == "huggingface":
        model, preprocessor = config_to_huggingface(config, dtype)
        files = {"config.json": model, "preprocessor_config.json": preprocessor} | tokenizer_files(config)
        state = to_huggingface(state)
    elif layout == "xclip_fast":
        files = {"config.json": {_FORMAT: 1, "model_type": MODEL_TYPE, **config.to_dict()}}
    else:
        raise ValueError(f"layout {layout!r}; choose 'xclip_fast' or 'huggingface'")
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, indent=2) + "\n" for name, value in files.items()
    }
    texts |= {name: text for name, text in beside.items() if text is not None}
    owned = {*texts, *beside, "model.safetensors", *(["processor_config.json"] if layout == "huggingface" else [])}
    with staged(folder, owned, last="model.safetensors") as part:
        write_weights(state, part / "model.safetensors")
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    layout: Layout = "xclip_fast",
    *,
    drop_config: bool = False,
    overwrite: bool = False,
    clip: Start | None = None,
) -> None:
    """Reads an X-CLIP from ``source`` in any layout and writes it to ``folder``; see ``read`` and ``write``.

    The ``trained.json`` of the source (class texts, frames, sampling) goes with the weights. Raises ValueError if the
    result would replace the source.
    """
    if Path(source).resolve() in (Path(folder).resolve(), Path(folder, "model.safetensors").resolve()):
        raise ValueError(f"{source}: would be replaced by its own conversion; choose another folder")
    trained = Trained.read(source)
    found = read(source, drop_config=drop_config, clip=clip)
    if not found.complete:
        raise CheckpointError(
            f"{source}: is an image CLIP, not an X-CLIP; XCLIP.from_pretrained starts an X-CLIP from it"
        )
    beside = {TRAINED: None if trained == Trained() else trained.to_json()}
    write(found.state, found.config, folder, layout, overwrite=overwrite, beside=beside)


def clip_state(clip: Start, config: XCLIPConfig | None = None, part: Part = "both") -> Checkpoint:
    """An image CLIP, or a ViT of timm, in our names.

    Args:
        clip: a path, a state dict, or a module: OpenAI's, open_clip's or Hugging Face's CLIP, or timm's ViT.
        config: of the X-CLIP to start; by default the CLIP's own. Position embeddings are interpolated to its grid. A
            text tower is left out if the config has none. All other weights must fit.
        part: the tower to take, "visual", "text" (with the logit scale) or "both".

    Raises:
        CheckpointError: if it is not an image CLIP or ViT, or does not fit.
    """
    if part not in ("both", "visual", "text"):
        raise ValueError(f"part {part!r}; choose 'both', 'visual' or 'text'")
    if isinstance(clip, Checkpoint):
        found = _interpret(clip.state, "CLIP", config=config or clip.config, kind=clip.kind, part=part)
    elif isinstance(clip, nn.Module):
        described: Any = getattr(clip, "config", None)
        values = described.to_dict() if hasattr(described, "to_dict") else {}
        gelu = open_clip.has_gelu(clip)
        found = _interpret(clip.state_dict(), type(clip).__name__, values, config=config, part=part, gelu=gelu)
    elif isinstance(clip, Mapping):
        found = _interpret(clip, "state dict", config=config, part=part)
    else:
        found = _interpret(*_load(Path(clip)), config=config, part=part)
    if found.complete:
        raise CheckpointError("this is a whole X-CLIP, and an image CLIP is wanted; use from_pretrained")
    return found


def expand(model: Any, clip: Start, part: Part = "both") -> None:
    """Copies an image CLIP into an ``XCLIP``, in place. See ``XCLIP.expand_from``."""
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
    embedding_VW: Tensor | None = None,
    gelu: bool | None = None,
    check: bool = True,
) -> Checkpoint:
    """``embedding_VW``: for a ViFi-CLIP. ``gelu``: whether the module that the state is of computes exact GELU."""
    given = neighbor = None
    if kind is None:
        state = unwrap(state, where)
        neighbor = neighbors.kind_of(state)
        ours, kind = to_ours(neighbors.rename(state, where) if neighbor else state, where)
    else:  # already in our names
        ours = dict(state)
    if neighbor == "vificlip":
        neighbors.add_token_embedding(ours, state, embedding_VW, where)
    elif embedding_VW is not None:
        raise CheckpointError(f"{where}: clip is for ViFi-CLIP files, which lack the token embedding; this is none")
    if neighbor is not None:
        kind, given = neighbor, neighbors.infer(ours, neighbor, where)
        if len({tensor.dtype for tensor in ours.values()}) > 1:  # both train CLIP with some weights in half precision
            ours = {name: tensor.float() for name, tensor in ours.items()}
    if _FORMAT in values:
        if values[_FORMAT] != 1:
            raise CheckpointError(f"{where}: has format {values[_FORMAT]}; this version of xclip-fast reads format 1")
        kind = "xclip_fast"  # an ablated one may look like an image CLIP
        with refused(str(where)):
            given = own_config(values)
    elif values.get("model_type") in ("xclip", "clip"):
        given = config_from_huggingface(values, preprocessor, where)
    elif "model_cfg" in values:
        given = config_from_open_clip(values, where)
    elif kind == "clip" and gelu is not None:
        if gelu:
            given = infer_config(ours, where)
            towers = {name: dataclasses.replace(getattr(given, name), activation="gelu") for name in ("vision", "text")}
            given = dataclasses.replace(given, **towers)
    elif kind == "clip" and "token_embedding.weight" in state and "context_length" not in state:
        # a file of open_clip: OpenAI's own files hold the context length and use quick GELU
        log.warning(
            "%s: the weights alone do not tell CLIP's activation. OpenAI's quick GELU is used, not GELU, which most of "
            "open_clip's own models have. A folder with %s tells it",
            where,
            open_clip.FILE,
        )
    if given and config:
        _check_same(given, config, where, part)
    if given and not config and kind == "huggingface":
        warn_of_heads(given, where)
    config = config or given or infer_config(ours, where, timm=kind == "timm")
    if not check and kind not in ("clip", "timm"):
        return Checkpoint(config, ours, kind)
    name = "visual.positional_embedding"
    wanted = shapes(config, only_clip=kind in ("clip", "timm"))
    if kind in ("clip", "timm"):
        if name in ours:
            ours[name] = _fit_positions(ours[name], config.vision.patches + 1)
        unicl.fit_windows(ours, wanted)
        left_out: tuple[str, ...] = {"both": (), "visual": _TEXT, "text": ("visual.",)}[part]
        left_out += _TEXT if config.num_classes is not None else ()
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith(left_out)}
        left_out += (*_TEXT, "visual.proj") if kind == "timm" else ()
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(left_out)}
        reason = timm_vit.refusal(config) if kind == "timm" else None
        if not ours or reason:
            raise CheckpointError(f"{where}: {reason or f'it has no weights for the {part} tower'}")
    check_keys(wanted, ours, where)
    return Checkpoint(config, ours, kind)


def _check_same(given: XCLIPConfig, config: XCLIPConfig, where: object, part: Part) -> None:
    """Other heads or activations than the checkpoint's fit its shapes, and compute something else."""
    for name, said in (("heads", "{} heads"), ("activation", "the activation {}")):
        has, wanted = ([getattr(tower, name) for tower in (each.vision, each.text)] for each in (given, config))
        visual = part != "text" and has[0] != wanted[0]
        text = part != "visual" and config.num_classes is None and has[1] != wanted[1]
        if visual or text:
            raise CheckpointError(
                f"{where}: has {said.format(has[0])} in the vision and {said.format(has[1])} in the text tower; "
                f"{wanted[0]} and {wanted[1]} are wanted"
            )


def _fit_positions(position_LD: Tensor, tokens: int) -> Tensor:
    """Interpolates position embeddings of a class token and a square grid to another grid (bicubic)."""
    old, new = math.isqrt(position_LD.shape[0] - 1), math.isqrt(tokens - 1)
    if old == new or old * old + 1 != position_LD.shape[0]:
        return position_LD
    log.info("position embeddings of a %d x %d grid are interpolated to %d x %d", old, old, new, new)
    return torch.cat([position_LD[:1], resize_grid(position_LD[1:], old, new)])
