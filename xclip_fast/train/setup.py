"""The start of a training run: data and model, checked against each other, and the module that is trained.

B videos, T frames, S side in pixels, K labels, E embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..config import XCLIPConfig
from ..data.loader.loader import Loader
from ..data.manifest.labels import label_rows
from ..data.manifest.manifest import Manifest
from ..data.sampling import epoch_order
from ..data.transforms import TrainTransform
from ..evaluate.sample_lists import few_shot
from ..files import read_json
from ..inference.processes import Process
from ..model import XCLIP
from ..schema import ConfigError, config_errors
from ..text.labels import readable, refuse_same_texts
from ..text.templates import TEMPLATES
from ..text.tokenizer import tokenize
from ..weights import checkpoint
from . import config as train_config
from .config import DataConfig, ModelConfig

SHAPE = "model.json"  # the model's shape, in the output folder


@dataclasses.dataclass(frozen=True)
class Data:
    train: Manifest
    val: Manifest | None
    texts: tuple[str, ...]  # K, the text of each class


def read_data(data: DataConfig, seed: int) -> Data:
    """Read both manifests, check them against each other, and choose few-shot and held-out videos.

    Raises:
        ConfigError: if a file is missing or damaged, has no usable video, or has videos without labels; if the classes
            of the two manifests differ.
    """
    if data.train is None:
        raise ConfigError(
            "data.train is missing; give the manifest of the training videos, which `xclip-fast index` writes"
        )
    train = _manifest("data.train", data.train)
    val = None
    if data.val is not None:
        val = _manifest("data.val", data.val)
        if val.classes != train.classes:
            odd = sorted(set(val.classes) ^ set(train.classes))
            raise ConfigError(
                f"data.val has {len(val.classes)} classes and data.train {len(train.classes)}; "
                + (f"not in both: {', '.join(odd[:5])}" if odd else "they are the same in another order")
                + "; index both with the same list of classes"
            )
    elif data.val_fraction:
        train, val = _hold_out(train, data.val_fraction, seed)
    if data.shots is not None:
        with config_errors("data.shots"):
            train = train.select(few_shot(train, data.shots, data.shots_seed))
    texts = [readable(name) for name in train.classes]
    if data.labels is not None:
        with config_errors(f"data.labels: {data.labels} cannot be read"):
            texts = [name for _, name in label_rows(data.labels)]
        if len(texts) != len(train.classes):
            raise ConfigError(
                f"data.labels: {data.labels} has {len(texts)} lines, and the data {len(train.classes)} classes "
                f"({', '.join(train.classes[:3])}, ...); one line for each class wanted, in that order"
            )
    return Data(train, val, tuple(texts))


def _manifest(key: str, path: str) -> Manifest:
    """The manifest that a key of the configuration names: every usable video has a label."""
    if not Path(path).exists():
        raise ConfigError(
            f"{key}: there is no file {path}; `xclip-fast index` makes a manifest of your videos, and "
            "`xclip-fast motion data/motion` generates videos to try"
        )
    with config_errors(key):
        manifest = Manifest.read(path)
    usable = manifest.usable
    if not len(usable):
        bad = next(iter(manifest.bad.items()), None)
        raise ConfigError(
            f"{key}: {path} has no video that can be read"
            + (f"; the first of {len(manifest)}: {manifest.name(bad[0])}: {bad[1]}" if bad else ": it is empty")
        )
    without = [row for row in usable if manifest.labels[row] < 0]
    if without:
        raise ConfigError(
            f"{key}: {len(without)} of {len(usable)} videos in {path} have no label, "
            f"the first {manifest.name(without[0])}; index them with labels"
        )
    return manifest


def _hold_out(manifest: Manifest, fraction: float, seed: int) -> tuple[Manifest, Manifest]:
    """Returns (rest, held out). Each class with two videos or more gives this share, at least one."""
    held: list[int] = []
    for label in range(len(manifest.classes)):
        rows = manifest.usable[manifest.labels[manifest.usable] == label]
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        if count > 0:
            held += rows[epoch_order(len(rows), seed, label, True)[:count]].tolist()
    if not held:
        raise ConfigError(
            f"data.val_fraction is {fraction}, and no class has the two videos that this needs; set it to 0"
        )
    chosen = set(held)
    return manifest.select(row for row in range(len(manifest)) if row not in chosen), manifest.select(sorted(held))


def build_model(
    settings: ModelConfig, texts: Sequence[str], *, seed: int, size: int | None = None, templates: bool = False
) -> XCLIP:
    """The model in float32 on the CPU, from ``model.init`` or with random weights.

    ``texts``: the text of each class. ``size``: ``data.size``. ``templates``: ``text_templates``.

    Raises:
        ConfigError: if the weights cannot be read, or the model's shape does not fit the labels or the size.
    """
    torch.manual_seed(seed)  # the same new parameters in every process
    init = settings.init
    try:
        base = None if init is None or settings.variant else checkpoint.read(init).config
        shape = train_config.model_config(settings, base)
        _check_fit(shape, texts, size, templates)
        if init is None:
            return XCLIP(shape)
        model = XCLIP.from_pretrained(init, config=shape, dtype=torch.float32)
        if settings.init_text is not None:
            model.expand_from(settings.init_text, part="text")
    except (checkpoint.CheckpointError, OSError) as error:
        raise ConfigError(f"model.init: {error}") from error
    return model


def resume_model(folder: Path, seed: int) -> XCLIP:
    """The model of the run in an output folder, with random weights: its checkpoint is read into it.

    Raises:
        ConfigError: if the folder's ``model.json`` is missing or damaged.
    """
    torch.manual_seed(seed)
    with config_errors(f"{folder / SHAPE}", "; start over with --fresh"):
        return XCLIP(XCLIPConfig.from_dict(read_json(folder / SHAPE)))


def _check_fit(shape: XCLIPConfig, texts: Sequence[str], size: int | None, templates: bool) -> None:
    if shape.num_classes is not None and shape.num_classes != len(texts):
        raise ConfigError(
            f"model.num_classes is {shape.num_classes}, and the data has {len(texts)} classes; make them equal"
        )
    if size is not None and size != shape.vision.image_size:
        raise ConfigError(f"data.size is {size}, and the model takes {shape.vision.image_size}; leave data.size out")
    if templates and (shape.num_classes is not None or shape.prompt == "vectors"):
        raise ConfigError("text_templates is true, and the model has a linear head or learned vectors; set it to false")
    if shape.num_classes is None:
        with config_errors("the labels", "; data.labels takes a file of texts"):
            refuse_same_texts(texts, shape.label_tokens)


def training_loader(
    data: DataConfig, seed: int, manifest: Manifest, shape: XCLIPConfig, batch_size: int, process: Process
) -> Loader:
    frames, size = data.frames or shape.num_frames, shape.vision.image_size
    transform = TrainTransform(frames, size, data.sampling, data.stride, **data.augmentation)
    return Loader(
        manifest,
        transform,
        batch_size,
        device=process.device,
        seed=seed,
        shuffle=True,
        rank=process.rank,
        world=process.world,
        max_bad=data.max_bad,
        workers=data.workers,
    )


class Objective(nn.Module):
    """The model, its labels and the loss as one module for DDP or FSDP2.

    Text features without a gradient are computed once, here. Others are computed in every step.
    """

    def __init__(
        self, model: XCLIP, texts: Sequence[str], device: torch.device, *, bf16: bool = False, templates: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast = bf16
        self.templates = templates
        self.texts = list(texts)
        self.tokens_KL = None if model.head is not None else tokenize(self.texts, model.config.label_tokens)
        self.fixed_KE: Tensor | None = None
        if model.head is None:
            features_KE = self._text()
            self.fixed_KE = None if features_KE.requires_grad else features_KE.to(device)

    def forward(self, frames: Tensor, targets_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (cross entropy, 1 if the largest logit is the largest target), both float32 (B,).

        frames: uint8 (B, T, S, S, 3). targets_BK: float32 (B, K).
        """
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.autocast):
            found = self.model.encode_video(frames)
            text_KE = None if self.model.head is not None else self._text() if self.fixed_KE is None else self.fixed_KE
            logits_BK = self.model.similarity(found, text_KE).float()
        losses_B = -(targets_BK * F.log_softmax(logits_BK, -1)).sum(-1)
        return losses_B, (logits_BK.detach().argmax(-1) == targets_BK.argmax(-1)).float()

    def _text(self) -> Tensor:
        if self.templates:
            return self.model.encode_text_ensemble(self.texts, TEMPLATES)
        assert self.tokens_KL is not None
        return self.model.encode_text(self.tokens_KL)


def parallelize(objective: Objective, process: Process, strategy: str, compiled: bool, *, recompute: bool) -> nn.Module:
    """Wraps the objective in DDP or FSDP2 if there are several processes; ``compiled`` compiles the video tower.

    The rest of the model is small, and packed labels have no fixed shape. ``recompute``: activations are checkpointed,
    so each block is compiled alone.
    """
    model: Any = objective.model
    sharded = strategy == "fsdp2" and dist.is_initialized()
    if compiled:
        if sharded or recompute:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # drop path differs
            for block in model.visual.transformer.resblocks:
                block.compile()
        else:
            model.visual.compile()
    if not dist.is_initialized():
        return objective
    if not sharded:
        ids = [process.device.index] if process.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(process.device.type, (process.world,))
    towers = [model.visual, *([] if model.text is None else [model.text])]
    for tower in towers:
        for block in tower.transformer.resblocks:
            fully_shard(block, mesh=mesh)
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}  # FSDP2 takes none
    return fully_shard(objective, mesh=mesh, ignored_params=scalars)  # type: ignore[return-value]


def gather_full_model(objective: Objective, ema: dict[str, Tensor] | None, device: torch.device) -> XCLIP:
    """The model to validate and to keep: with averaged weights if there are any, and gathered if they are sharded.

    Other weights are shared with the objective, not copied. Every process must call this.
    """
    averaged = {name.removeprefix("model."): value for name, value in (ema or {}).items()}
    weights: dict[str, Tensor] = {}
    for name, own in objective.model.state_dict().items():
        value: Any = averaged.get(name, own)
        weights[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
    with torch.device("meta"):
        model = XCLIP(objective.model.config)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()
