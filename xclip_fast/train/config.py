"""The configuration of a training run: dataclasses, YAML over them, ``key=value`` over that.

The defaults are the paper's fully supervised recipe on Kinetics-400 (B/16, 8 frames). A YAML file holds only the keys
that differ. ``schema`` checks every key and every value.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from ..config import XCLIPConfig, variant
from ..data.sampling import Sampling
from ..data.transforms import TrainTransform
from ..files import require_regular
from ..schema import ConfigError, Count, Frames, NotNegative, Positive, Range, Share, build, config_errors

YAML_BYTES = 1 << 20  # the largest YAML file that is read
ALIASES = 20  # the most aliases in one YAML text
CONFIGS = Path(__file__).parents[1] / "configs"  # the shipped ones

# Keys that may change when a run goes on from a checkpoint: file locations, speed, logging.
# data.train and data.val may move: the loader compares the data's fingerprint.
MAY_CHANGE = (
    *("output", "log", "checkpoint", "validation", "device", "strategy", "compile", "activation_checkpointing"),
    *("stop_after", "data.train", "data.val", "data.workers", "data.max_bad"),
    "optim.device_batch",
)

Beta = Annotated[float, Range(0, below=1)]
DeviceBatch = Annotated[int, Range(1, 1 << 16)]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """``model:``. Every key of ``XCLIPConfig`` may stand here too; ``shape`` collects them over the variant's."""

    variant: str | None = None  # None: the shape of init, or B/16-8f
    init: str | None = None  # initial weights: an X-CLIP, an image CLIP or a timm ViT; None: random
    init_text: str | None = None  # an image CLIP that gives the text tower beside the ViT of init
    shape: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"keys_of": XCLIPConfig})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """``data:``. The keys of ``TrainTransform`` stand here too; ``augmentation`` collects those that are no fields."""

    train: str | None = None  # manifest, from `xclip-fast index`
    val: str | None = None
    val_fraction: Share = 0.0  # of the training videos of each class, held out if there is no val
    labels: str | None = None  # file with the text of each class, one a line in the manifest's order; None: the names
    shots: Count | None = None  # random videos of each class (few-shot); None: all
    shots_seed: int = 0
    frames: Frames | None = None  # T; None: the model's
    size: Count | None = None  # pixels of a side; None: the model's
    sampling: Sampling = TrainTransform.sampling
    stride: Count = TrainTransform.stride  # of dense sampling
    workers: Annotated[int, Range(0, max(64, 4 * (os.cpu_count() or 1)))] | None = None  # None: the loader's default
    max_bad: Share = 0.05  # a larger share of unreadable videos stops the run
    augmentation: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"keys_of": TrainTransform})

    def __post_init__(self) -> None:
        every = dataclasses.asdict(TrainTransform(**self.augmentation))
        object.__setattr__(self, "augmentation", {key: every[key] for key in every if not hasattr(self, key)})


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "apex"] = "adamw"  # apex: FusedAdam of NVIDIA's apex
    schedule: Literal["released", "cosine"] = "released"  # optim.released_learning_rate, cosine_learning_rate
    lr: NotNegative = 8e-6
    new_lr_factor: NotNegative = 10.0  # for parameters that an image CLIP does not have
    final_lr_factor: Share = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 1e-3
    epochs: Annotated[int, Range(1, 10**6)] = 30
    warmup_epochs: NotNegative = 5.0
    batch_size: Annotated[int, Range(1, 1 << 20)] = 256  # of a step, over all devices
    device_batch: DeviceBatch = 32  # most videos at once on a device; larger shares are accumulated
    also_new: tuple[str, ...] = ()  # further parameters at new_lr_factor, by the start of their names
    clip_grad: Positive | None = None  # largest norm of the gradient
    ema: Share | None = None  # decay of a moving average of the weights; the average is validated and kept


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    mixup: NotNegative = 0.8  # a of Beta(a, a); 0: none
    cutmix: NotNegative = 1.0
    switch: Share = 0.5  # probability of cutmix if both are on
    probability: Share = 1.0  # that a batch is mixed at all
    label_smoothing: Share = 0.1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: Count | None = 1
    every_steps: Count | None = None
    every_minutes: Positive | None = 20.0
    keep_last: Count = 2
    metric: Literal["top1", "top5"] = "top1"  # of validation; the best weights are kept


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    every_epochs: Count = 1
    batch_size: DeviceBatch | None = None  # None: optim.device_batch
    clips: Annotated[int, Range(1, 1024)] = 1
    crops: Literal[1, 3] = 1


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: Count = 10  # steps
    tensorboard: bool | None = None  # None: if it is installed
    progress: bool = True  # a bar on a terminal


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    output: str = "runs/xclip"
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    device: str = "auto"
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16: autocast
    train_towers: Literal["visual", "text", "both", "none"] = "visual"  # Table 7; new parameters are always trained
    text_templates: bool = False  # the mean over 16 sentences of each label instead of the label alone (Table 9)
    strategy: Literal["ddp", "fsdp2"] = "ddp"  # with more than one process
    compile: bool = False
    activation_checkpointing: bool = False
    stop_after: Count | None = None  # steps, for a trial; the schedule stays that of the whole run
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mixing: MixingConfig = MixingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()


def load(config: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, or a shipped configuration by name (``k400-b16-8f``), and put ``a.b=value`` overrides over it.

    Raises:
        ConfigError: for a missing file, text that is not YAML, an unknown key, a value of a wrong type or out of range.
    """
    path = Path(config)
    if not path.is_file():
        path = CONFIGS / (path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml")
        if len(Path(config).parts) > 1 or not path.is_file():
            known = shipped()
            near = difflib.get_close_matches(str(config), known, 3)
            raise ConfigError(
                f"{config}: neither a file nor a configuration of the package"
                + (f"; similar names: {', '.join(near)}" if near else f"; the package has {', '.join(known)}")
            )
    with config_errors(f"{path}: cannot be read as YAML"):
        if require_regular(path) > YAML_BYTES:
            raise ConfigError(f"{path}: has more than {YAML_BYTES} bytes; this is not a configuration")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: keys and values wanted, {type(values).__name__} found")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: key=value wanted, such as optim.lr=1e-5")
        with config_errors(f"override {override!r:.200}: {text!r:.200} is not a YAML value"):
            value = parse_yaml(text)
        set_value(values, key, value)
    with config_errors(path.name):
        return from_dict(values)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: if the text is not YAML, is nested too deeply, or has more than ``ALIASES`` aliases. A small text
            with many aliases stands for an endless value.
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


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``values["a"]["b"]`` for the key ``a.b``. Missing levels are added."""
    *path, last = key.split(".")
    here = values
    for name in path:
        if here.get(name) is None:
            here[name] = {}
        here = here[name]
        if not isinstance(here, dict):
            raise ConfigError(f"override {key}: {name} is {here!r}, which has no keys")
    here[last] = value


def shipped() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Builds the configuration from plain values. Missing keys take their defaults.

    Values that do not fit each other are refused. The run itself checks what needs files.
    """
    config: TrainConfig = build(TrainConfig, values)
    if config.data.val is not None and config.data.val_fraction:
        raise ConfigError("data.val and data.val_fraction exclude each other: give one of them")
    if config.model.variant is not None:
        with config_errors("model.variant"):
            variant(config.model.variant)
    if config.model.init is None:
        model_config(config.model)
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values for JSON or YAML. ``from_dict`` reads them back."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    values["model"] |= values["model"].pop("shape")
    values["data"] |= values["data"].pop("augmentation")
    return values


def to_yaml(config: TrainConfig) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """``key: old -> new`` for every key that differs and must not (all but ``MAY_CHANGE``)."""
    before, after = (dict(_flat(to_dict(config))) for config in (old, new))
    changed = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) == after.get(key) or any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
            continue
        changed.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
    return changed


def model_config(config: ModelConfig, base: XCLIPConfig | None = None) -> XCLIPConfig:
    """The shape that ``model:`` describes: the variant, else ``base``, else B/16-8f, with ``shape`` over it."""
    start = variant(config.variant) if config.variant else base or variant("B/16-8f")
    values = start.to_dict()
    if "embed_dim" in config.shape:  # the numbers of heads follow from it if they are not given
        values["mit_heads"] = values["prompt_heads"] = None
    for key, value in config.shape.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with config_errors("model"):
        return XCLIPConfig.from_dict(values)


def accumulation(config: OptimConfig, world: int) -> tuple[int, int]:
    """How a step of ``batch_size`` videos is split: (videos at once on a device, ``grad_accum_steps``).

    Raises:
        ConfigError: if ``batch_size`` is not a multiple of ``world``, the number of processes.
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


def _flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
