"""The configuration of a training run: dataclasses, YAML over them, ``key=value`` over that.

The defaults are the paper's fully supervised recipe on Kinetics-400 (B/16, 8 frames), so a YAML file only says what
differs. Unknown keys and values of a wrong type are refused, and the nearest known key is named.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import math
import os
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..config import SwinConfig, TextConfig, VisionConfig, XCLIPConfig, variant
from ..data.transforms import TrainTransform
from ..files import require_regular

ALIASES = 20  # in a YAML file, at most
YAML_BYTES = 1 << 20  # of a YAML file, at most
CONFIGS = Path(__file__).parents[1] / "configs"  # the shipped ones

# What may differ from the run that a checkpoint belongs to: where things lie, how fast they run, what is shown.
# (Data that moved is the same data: the loader compares its fingerprint.)
MAY_CHANGE = (
    *("output", "log", "checkpoint", "validation", "device", "strategy", "compile", "activation_checkpointing"),
    *("stop_after", "data.train", "data.val", "data.workers", "data.cache", "data.cache_bytes", "data.max_bad"),
    "optim.device_batch",
)


class ConfigError(ValueError):
    """A configuration that is refused; the message says what was given, what was wanted and what to do."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """``model:``, where every key of ``XCLIPConfig`` may stand too (collected in ``shape``), over the variant's."""

    variant: str | None = None  # None: the shape of init, or B/16-8f
    init: str | None = None  # weights to start from: an X-CLIP, an image CLIP or a timm ViT; None: random
    init_text: str | None = None  # an image CLIP whose text tower goes with the ViT of init
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str | None = None  # manifest, from `xclip-fast index`
    val: str | None = None
    val_fraction: float = 0.0  # of the training videos of each class held out, where there is no val
    labels: str | None = None  # texts of the classes, one a line in the manifest's order, if not the classes' names
    shots: int | None = None  # K random videos a class (few-shot); all if None
    shots_seed: int = 0
    frames: int | None = None  # T; None: the model's
    size: int | None = None  # pixels of a side; None: the model's
    # the rest of the picture's preparation: as in data.transforms.TrainTransform, which has the defaults
    sampling: Literal["sparse", "dense"] = TrainTransform.sampling
    stride: int = TrainTransform.stride  # of dense sampling
    scales: tuple[float, ...] = TrainTransform.scales
    flip: float = TrainTransform.flip
    jitter_probability: float = TrainTransform.jitter_probability
    brightness: float = TrainTransform.brightness
    contrast: float = TrainTransform.contrast
    saturation: float = TrainTransform.saturation
    hue: float = TrainTransform.hue
    grey: float = TrainTransform.grey
    workers: int | None = None  # None: the loader's choice
    cache: str | None = None  # folder of decoded frames, for small data
    cache_bytes: int | None = None
    max_bad: float = 0.05  # share of unreadable videos that is too much


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "apex"] = "adamw"  # apex: FusedAdam of NVIDIA's apex
    schedule: Literal["released", "cosine"] = "released"  # optim.released_learning_rate, cosine_learning_rate
    lr: float = 8e-6
    new_lr_factor: float = 10.0  # of parameters that an image CLIP does not have
    final_lr_factor: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 1e-3
    epochs: int = 30
    warmup_epochs: float = 5.0
    batch_size: int = 256  # of a step, over all devices
    device_batch: int = 32  # at most so many videos at once on a device; the rest is accumulation
    also_new: tuple[str, ...] = ()  # parameters, by the start of their names, that are new too (a projection)
    clip_grad: float | None = None  # largest norm of the gradient
    ema: float | None = None  # decay of an exponential moving average of the weights, which is then validated and kept


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    mixup: float = 0.8  # of Beta(a, a); 0: none
    cutmix: float = 1.0
    switch: float = 0.5  # probability of cutmix where both are on
    probability: float = 1.0  # that a batch is mixed at all
    label_smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int | None = 1
    every_steps: int | None = None
    every_minutes: float | None = 20.0
    keep_last: int = 2
    metric: Literal["top1", "top5"] = "top1"  # of validation; the best is kept


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    every_epochs: int = 1
    batch_size: int | None = None  # None: optim.device_batch
    clips: int = 1
    crops: int = 1


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps
    tensorboard: bool | None = None  # None: if it is installed
    progress: bool = True  # a bar on a terminal


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    output: str = "runs/xclip"
    seed: int = 0
    device: str = "auto"
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16: autocast
    train_towers: Literal["visual", "text", "both", "none"] = "visual"  # Table 7; new parameters are always trained
    text_templates: bool = False  # the mean over 16 sentences a label instead of the label alone (Table 9)
    strategy: Literal["ddp", "fsdp2"] = "ddp"  # where there is more than one process
    compile: bool = False
    activation_checkpointing: bool = False
    stop_after: int | None = None  # steps, to try something out; the schedule stays that of the whole run
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mixing: MixingConfig = MixingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()


def load(config: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a YAML file, or of a shipped name (``k400-b16-8f``), with ``a.b=value`` over it.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a value of a wrong type or out of range.
    """
    path = Path(config)
    if not path.is_file():
        path = CONFIGS / (path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml")
        if len(Path(config).parts) > 1 or not path.is_file():
            known = shipped()
            near = difflib.get_close_matches(str(config), known, 3)
            raise ConfigError(
                f"{config}: no such file, and no shipped configuration"
                + (f" (near: {', '.join(near)})" if near else f"; shipped are {', '.join(known)}")
            )
    try:
        if require_regular(path) > YAML_BYTES:
            raise ConfigError(f"{path}: has more than {YAML_BYTES} bytes; this is not a configuration")
        values = _yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: keys and values wanted, a {type(values).__name__} found")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: key=value wanted, such as optim.lr=1e-5")
        try:
            value = _yaml(text)
        except ValueError as error:
            raise ConfigError(f"override {override!r:.200}: {text!r:.200} is no YAML value: {error}") from error
        _set(values, key, value)
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def _yaml(text: str) -> Any:
    """The value of a YAML text. Few aliases are allowed: a small text of many stands for an endless value.

    Raises:
        ValueError: if it is not YAML, or has too many aliases.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                self.aliases += 1
                if self.aliases > ALIASES:
                    raise ValueError(f"it has more than {ALIASES} aliases (*name); write the values out")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _short(value: Any) -> str:
    """A value as an error shows it."""
    return reprlib.repr(value)


def shipped() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Builds the configuration from plain values. Missing keys take their defaults."""
    config = _build(TrainConfig, values, "")
    _check(config)
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values (JSON- and YAML-ready) that ``from_dict`` reads back."""
    values = _plain(dataclasses.asdict(config))
    values["model"] |= values["model"].pop("shape")
    return values


def to_yaml(config: TrainConfig) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """``key: old -> new`` of every key that differs and may not (``MAY_CHANGE``)."""
    before, after = (dict(_flat(to_dict(config))) for config in (old, new))
    changed = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) == after.get(key) or any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
            continue
        changed.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
    return changed


def model_config(config: ModelConfig, base: XCLIPConfig | None = None) -> XCLIPConfig:
    """The X-CLIP that ``model:`` describes: the variant, or ``base``, or B/16-8f, with ``shape`` over it."""
    start = variant(config.variant) if config.variant else base or variant("B/16-8f")
    values = start.to_dict()
    if "embed_dim" in config.shape:  # the numbers of heads follow, unless they are given
        values["mit_heads"] = values["prompt_heads"] = None
    for key, value in config.shape.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    try:
        return XCLIPConfig.from_dict(values)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def accumulation(config: OptimConfig, world: int) -> tuple[int, int]:
    """(videos at once on a device, ``grad_accum_steps``) for a total of ``batch_size`` over ``world`` processes.

    Raises:
        ConfigError: if the total does not divide by the number of processes.
    """
    share, rest = divmod(config.batch_size, world)
    if rest or share < 1:
        near = sorted({max(1, share) * world, (share + 1) * world})
        raise ConfigError(
            f"optim.batch_size: {config.batch_size} videos a step do not divide over {world} processes; "
            f"give {' or '.join(str(size) for size in near)}, or another number of processes"
        )
    size = next(size for size in range(min(share, config.device_batch), 0, -1) if share % size == 0)
    return size, share // size


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    here = values
    for name in path:
        if here.get(name) is None:
            here[name] = {}
        here = here[name]
        if not isinstance(here, dict):
            raise ConfigError(f"override {key}: {name} is {here!r}, which has no keys")
    here[last] = value


def _build(cls: Any, values: Any, where: str) -> Any:
    """A dataclass from plain values, checked key by key."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is {_short(values)}; keys and values wanted")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    values = dict(values)
    if cls is ModelConfig:
        fields.discard("shape")
        shape = {key: values.pop(key) for key in list(values) if key not in fields}
        given = {"shape": _checked_shape(shape)}
    else:
        given = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise _unknown(name, str(key), fields)
        given[key] = _convert(value, hints[key], name)
    return cls(**given)


def _checked_shape(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of ``XCLIPConfig``, checked but not completed: the variant says the rest."""
    nested = {"vision": (VisionConfig, SwinConfig), "text": (TextConfig,)}
    own = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "shape"]
    shape: dict[str, Any] = {}
    for key, value in values.items():
        hints = typing.get_type_hints(XCLIPConfig)
        if key not in hints:
            raise _unknown(f"model.{key}", str(key), [*hints, *own])
        if key in nested:
            if not isinstance(value, Mapping):
                raise ConfigError(f"model.{key} is {_short(value)}; keys and values wanted")
            inner: dict[str, Any] = {}
            for cls in nested[key]:
                names = {field.name for field in dataclasses.fields(cls)}
                inner |= {name: hint for name, hint in typing.get_type_hints(cls).items() if name in names}
            for name in value:
                if name not in inner:
                    raise _unknown(f"model.{key}.{name}", str(name), inner)
            shape[key] = {name: _convert(item, inner[name], f"model.{key}.{name}") for name, item in value.items()}
        else:
            shape[key] = _convert(value, hints[key], f"model.{key}")
    return shape


def _unknown(name: str, key: str, known: Any) -> ConfigError:
    near = difflib.get_close_matches(key, list(known), 1, 0.5)
    return ConfigError(
        f"{name}: unknown key" + (f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}")
    )


def _convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the annotation wants it; whole numbers pass as floats, lists as tuples, nothing else is bent."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (hint,) = (part for part in inner if part is not type(None))
        return _convert(value, hint, name)
    if origin is Literal:
        if value in inner and isinstance(value, str):
            return value
        near = difflib.get_close_matches(_short(value).strip("'"), inner, 1)
        raise ConfigError(
            f"{name} is {_short(value)}; one of {', '.join(inner)} wanted" + (f" (near: {near[0]})" if near else "")
        )
    if origin is tuple:
        many = len(inner) == 2 and inner[1] is Ellipsis
        if isinstance(value, (list, tuple)) and (many or len(value) == len(inner)):
            kinds = [inner[0]] * len(value) if many else inner
            return tuple(_convert(item, kind, name) for item, kind in zip(value, kinds, strict=True))
        raise ConfigError(f"{name} is {_short(value)}; a list of {'' if many else f'{len(inner)} '}numbers wanted")
    if hint is float and not isinstance(value, bool):
        number: float | None = None
        if isinstance(value, (int, float)):
            number = float(value)
        elif isinstance(value, str):  # YAML 1.1 reads 8e-6, which has no point, as a string
            with contextlib.suppress(ValueError):
                number = float(value)
        if number is not None and math.isfinite(number):
            return number
    elif hint is int and isinstance(value, bool):
        pass
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}.get(hint, str(hint))
    raise ConfigError(f"{name} is {_short(value)} ({type(value).__name__}); {wanted} wanted")


def _check(config: TrainConfig) -> None:
    """Values out of range; what needs files is checked by the run."""
    optim, mixing, data = config.optim, config.mixing, config.data
    least: list[tuple[str, float | None, float]] = [
        ("optim.epochs", optim.epochs, 1),
        ("optim.batch_size", optim.batch_size, 1),
        ("optim.device_batch", optim.device_batch, 1),
        ("optim.lr", optim.lr, 0),
        ("optim.new_lr_factor", optim.new_lr_factor, 0),
        ("optim.weight_decay", optim.weight_decay, 0),
        ("optim.warmup_epochs", optim.warmup_epochs, 0),
        ("mixing.mixup", mixing.mixup, 0),
        ("mixing.cutmix", mixing.cutmix, 0),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("checkpoint.every_epochs", config.checkpoint.every_epochs, 1),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 1),
        ("validation.every_epochs", config.validation.every_epochs, 1),
        ("validation.clips", config.validation.clips, 1),
        ("validation.batch_size", config.validation.batch_size, 1),
        ("log.every", config.log.every, 1),
        ("data.shots", data.shots, 1),
        ("data.frames", data.frames, 1),
        ("data.size", data.size, 1),
        ("data.workers", data.workers, 0),
        ("data.cache_bytes", data.cache_bytes, 0),
        ("stop_after", config.stop_after, 1),
        ("seed", config.seed, 0),
    ]
    for name, value, smallest in least:
        if value is not None and value < smallest:
            raise ConfigError(f"{name} is {value}; at least {smallest} wanted")
    most: list[tuple[str, int | None, int]] = [
        ("optim.batch_size", optim.batch_size, 1 << 20),
        ("optim.device_batch", optim.device_batch, 1 << 16),
        ("validation.batch_size", config.validation.batch_size, 1 << 16),
        ("validation.clips", config.validation.clips, 1024),
        ("optim.epochs", optim.epochs, 10**6),
        ("data.workers", data.workers, max(64, 4 * (os.cpu_count() or 1))),
        ("data.frames", data.frames, 1024),
    ]
    for name, value, largest in most:
        if value is not None and value > largest:
            raise ConfigError(f"{name} is {value}; at most {largest} is accepted on this machine")
    shares: list[tuple[str, float | None]] = [
        ("mixing.switch", mixing.switch),
        ("mixing.probability", mixing.probability),
        ("mixing.label_smoothing", mixing.label_smoothing),
        ("data.val_fraction", data.val_fraction),
        ("data.flip", data.flip),
        ("data.grey", data.grey),
        ("data.jitter_probability", data.jitter_probability),
        ("data.max_bad", data.max_bad),
        ("optim.final_lr_factor", optim.final_lr_factor),
        ("optim.ema", optim.ema),
    ]
    for name, value in shares:
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value}; a number from 0 to 1 wanted")
    if config.seed >= 2**63:
        raise ConfigError(f"seed is {config.seed}; a number below 2^63 wanted")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas is {optim.betas}; numbers from 0 to below 1 wanted")
    for name, value in (
        ("optim.eps", optim.eps),
        ("optim.clip_grad", optim.clip_grad),
        ("checkpoint.every_minutes", config.checkpoint.every_minutes),
    ):
        if value is not None and value <= 0:
            none = "" if name == "optim.eps" else ", or null for none"
            raise ConfigError(f"{name} is {value}; a number above 0 wanted{none}")
    if config.validation.crops not in (1, 3):
        raise ConfigError(f"validation.crops is {config.validation.crops}; 1 or 3 wanted")
    if data.val is not None and data.val_fraction:
        raise ConfigError("data.val and data.val_fraction exclude each other: give one of them")
    if config.model.variant is not None:
        try:
            variant(config.model.variant)
        except ValueError as error:
            raise ConfigError(f"model.variant: {error}") from error
    if config.model.init is None:
        shape = model_config(config.model)
        if data.size is not None and data.size != shape.vision.image_size:
            raise ConfigError(
                f"data.size is {data.size} and model.vision.image_size is {shape.vision.image_size}; "
                "make them equal, or leave data.size out"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else copy.copy(value)


def _flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
