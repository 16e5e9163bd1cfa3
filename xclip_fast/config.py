"""Model shapes as frozen dataclasses, and the variants of the paper by name.

Sizes follow the paper (Ni et al., ECCV 2022): the width of a tower is D, its head size 64, the shared
embedding E.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the released X-CLIP weights, which do not use CLIP's own mean
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


PROMPTS = ("video", "vectors", "none")
ACTIVATIONS = ("quick_gelu", "gelu")


# The largest value of each size that a file may ask for: far above any real model, far below sizes that hang.
LARGEST = {
    **dict.fromkeys(("layers", "mit_layers", "prompt_layers", "heads", "mit_heads", "prompt_heads"), 1024),
    **dict.fromkeys(
        ("width", "embed_dim", "image_size", "patch_size", "window", "head_size", "context_length", "num_frames"),
        65_536,
    ),
    "mit_positions": 65_536,
    **dict.fromkeys(("vocab_size", "num_classes", "prompt_vectors"), 10_000_000),
}


PAIRS = (
    1 << 28
)  # of tokens in the windows of all blocks of a Swin, whose masks take a byte each; X-Florence has 5 million


def _check_numbers(where: str, config: object, optional: tuple[str, ...] = ()) -> None:
    """Refuses numbers that have a wrong type, are not finite, or are too large. Turns whole numbers of float fields
    into floats.

    ``optional``: fields that may be None.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        kind = str(field.type).removesuffix(" | None")
        if kind not in ("int", "float") or (value is None and field.name in optional):
            continue
        if isinstance(value, bool) or not isinstance(value, int if kind == "int" else int | float):
            wanted = "a whole number" if kind == "int" else "a number"
            hint = "; YAML reads 1e-6 as text: write 1.0e-6" if kind == "float" and isinstance(value, str) else ""
            raise ValueError(
                f"{where}{field.name} is {str(value)[:40]!r} ({type(value).__name__}); {wanted} wanted{hint}"
            )
        if kind == "int" and value > LARGEST.get(field.name, value):
            raise ValueError(f"{where}{field.name} is {value}; at most {LARGEST[field.name]} wanted")
        if kind == "float":
            if not math.isfinite(value):
                raise ValueError(f"{where}{field.name} is {value}; a finite number wanted")
            object.__setattr__(config, field.name, float(value))


def _check_heads(where: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"{where}: width {width} does not divide into {heads} heads; choose a divisor of {width}")


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; True or False wanted")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _check_eps(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name} is {value!r}; a number of at least 0 wanted")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The cross-frame communication transformer (paper, section 3.2).

    The last four fields describe other encoders than X-CLIP's. ``cross_frame=False``: plain blocks without messages, as
    in an image CLIP (the baseline of Table 6). ``activation="gelu"``, ``pre_norm=False`` (no LayerNorm before the first
    block) and ``layer_norm_eps=1e-6``: the ViTs that were pretrained on images alone (Table 10).
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    cross_frame: bool = True
    activation: str = "quick_gelu"
    pre_norm: bool = True
    layer_norm_eps: float | None = None  # of the whole tower; None: the model's

    def __post_init__(self) -> None:
        _check_numbers("vision: ", self, ("layer_norm_eps",))
        if self.layers < 1 or self.patch_size < 1 or self.width < 1:
            raise ValueError(
                f"vision: layers {self.layers}, width {self.width} and patch_size {self.patch_size} must be at least 1"
            )
        _check_heads("vision", self.width, self.heads)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                "choose an image size that the patches tile"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"vision: drop_path {self.drop_path} must be at least 0 and below 1")
        _check_choice("vision: activation", self.activation, ACTIVATIONS)
        for name in ("cross_frame", "pre_norm"):
            _check_switch(f"vision: {name}", getattr(self, name))
        if self.layer_norm_eps is not None:
            _check_eps("vision: layer_norm_eps", self.layer_norm_eps)

    @property
    def patches(self) -> int:
        """N, the patches of a frame."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """A vision tower with attention in windows, frame by frame: Florence's CoSwin, or Swin.

    X-Florence has CoSwin-H in the place of the cross-frame communication transformer (Tables 1 to 5). Florence's code
    is not public: the sizes here are derived from the FLOPs and the number of parameters that the papers report.

    ``convolutional``: CoSwin's overlapping convolutions (7 x 7 of stride 4, then 3 x 3 of stride 2) before the stages.
    False: Swin's 4 x 4 patches, and merged groups of 2 x 2 neighbors, which UniCL's weights have.
    """

    image_size: int = 224
    widths: tuple[int, ...] = (256, 512, 1024, 2048)  # of each stage
    depths: tuple[int, ...] = (2, 2, 24, 6)  # blocks of each stage
    head_size: int = 32
    window: int = 7  # side of a window; a stage whose grid is no larger has one window
    convolutional: bool = True
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    layer_norm_eps: float | None = None  # of the blocks and around them; None: the model's

    cross_frame: ClassVar[bool] = False
    activation: ClassVar[str] = "gelu"

    def __post_init__(self) -> None:
        _check_numbers("vision: ", self, ("layer_norm_eps",))
        for name in ("widths", "depths"):
            given = getattr(self, name)
            whole = isinstance(given, list | tuple) and all(type(value) is int and value >= 1 for value in given)
            if not whole or not 1 <= len(given) <= 8 or max(given) > LARGEST["width"]:
                raise ValueError(
                    f"vision: {name} is {str(given)[:80]!r}; one to eight whole numbers of at least 1 wanted"
                )
            object.__setattr__(self, name, tuple(given))
        if len(self.widths) != len(self.depths) or sum(self.depths) > LARGEST["layers"]:
            raise ValueError(
                f"vision: {len(self.widths)} widths and depths {self.depths} given; as many of both wanted, and at "
                f"most {LARGEST['layers']} blocks in all"
            )
        for width in self.widths:
            if self.head_size < 1 or width % self.head_size:
                raise ValueError(f"vision: width {width} does not divide into heads of {self.head_size}")
        _check_switch("vision: convolutional", self.convolutional)
        if not self.convolutional and any(b != 2 * a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"vision: widths {self.widths}; without convolutions, each is twice the one before")
        if self.image_size < 1 or self.image_size % (4 << (len(self.widths) - 1)):
            raise ValueError(
                f"vision: image_size {self.image_size} is not a multiple of {4 << (len(self.widths) - 1)}, the pixels "
                "of a token's side in the last stage"
            )
        if self.window < 1 or any(grid > self.window and grid % self.window for grid in self.grids):
            raise ValueError(
                f"vision: windows of {self.window} do not tile the grids of {self.grids} tokens a side of images of "
                f"{self.image_size}; Swin has 7 at 224, and CoSwin here 12 at 384"
            )
        pairs = sum(d * (grid * min(self.window, grid)) ** 2 for d, grid in zip(self.depths, self.grids, strict=True))
        if pairs > PAIRS:
            raise ValueError(
                f"vision: {pairs} pairs of tokens in windows of {self.window} of images of {self.image_size}; at most "
                f"{PAIRS} are accepted"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"vision: drop_path {self.drop_path} must be at least 0 and below 1")
        if self.layer_norm_eps is not None:
            _check_eps("vision: layer_norm_eps", self.layer_norm_eps)

    @property
    def grids(self) -> tuple[int, ...]:
        """Tokens of a side in each stage."""
        return tuple(self.image_size // (4 << stage) for stage in range(len(self.widths)))

    @property
    def width(self) -> int:
        """D, of the last stage."""
        return self.widths[-1]

    @property
    def layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def heads(self) -> int:
        """H, of the last stage."""
        return self.width // self.head_size

    @property
    def patches(self) -> int:
        """N, the tokens of a frame behind the last stage."""
        return self.grids[-1] ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """CLIP's causal text encoder (paper, section 3.3); most of open_clip's own models have ``activation="gelu"``."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        _check_numbers("text: ", self)
        _check_choice("text: activation", self.activation, ACTIVATIONS)
        _check_heads("text", self.width, self.heads)
        for name, least in (("layers", 1), ("width", 1), ("vocab_size", 1), ("context_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"text: {name} {getattr(self, name)} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class XCLIPConfig:
    """A whole X-CLIP.

    ``mit_heads`` and ``prompt_heads`` default to E / 64, as in the released code. ``mit_residual`` is the outer
    residual of the multi-frame transformer, which the released weights need. ``False`` gives the paper's equation 6.

    The ablations of section 4.5 are switches. ``vision.cross_frame=False``, ``mit_layers=0`` (the video is the mean of
    its frames) and ``prompt="none"`` together are CLIP-Mean; switched on one after the other, they give Table 6.
    ``prompt="vectors"`` (Table 9) learns ``prompt_vectors`` context vectors before the words of every label.
    ``num_classes`` (Table 8) replaces the text by a linear head; ``prompt`` is then "none". For Table 10 see
    ``VisionConfig``.

    Others' models on the same parts: ``mit_positions`` is the length of a temporal embedding of which T frames use the
    first T (ActionCLIP: 77); with None it has ``num_frames`` and is interpolated to others. ``mit_eps`` is the epsilon
    of MIT's LayerNorms, if not the model's. ``logit_bias``, a learnt number, is added to the logits (SigLIP's loss).
    """

    vision: VisionConfig | SwinConfig = VisionConfig()
    text: TextConfig = TextConfig()
    embed_dim: int = 512
    num_frames: int = 8
    mit_layers: int = 1
    mit_heads: int | None = None
    mit_residual: bool = True
    mit_positions: int | None = None
    mit_eps: float | None = None
    prompt_layers: int = 2
    prompt_heads: int | None = None
    prompt_alpha: float = 0.1
    layer_norm_eps: float = 1e-5
    logit_scale: float = math.log(1 / 0.07)  # the initial value, as a logarithm
    logit_bias: float | None = None  # the initial value; None: without
    temporal_std: float = 0.02  # initial standard deviation of the temporal embedding; from scratch a larger one helps
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    prompt: str = "video"  # "video" (section 3.3), "vectors" or "none"
    prompt_vectors: int = 16
    num_classes: int | None = None

    def __post_init__(self) -> None:
        _check_numbers("", self, ("mit_heads", "prompt_heads", "num_classes", "mit_positions", "mit_eps", "logit_bias"))
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim {self.embed_dim} must be at least 1")
        for name in ("mit_heads", "prompt_heads"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, max(1, self.embed_dim // 64))
            _check_heads(name, self.embed_dim, getattr(self, name))
        for name in ("image_mean", "image_std"):
            given = getattr(self, name)
            right = isinstance(given, list | tuple) and len(given) == 3
            if not right or not all(isinstance(value, int | float) and math.isfinite(value) for value in given):
                raise ValueError(f"{name} is {str(given)[:80]!r}; three numbers wanted, one for each channel")
            object.__setattr__(self, name, tuple(float(value) for value in given))
        if not self.temporal_std > 0:
            raise ValueError(f"temporal_std {self.temporal_std} must be above 0")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std {self.image_std} must be above 0")
        for name, least in (("num_frames", 1), ("mit_layers", 0), ("prompt_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        _check_choice("prompt", self.prompt, PROMPTS)
        _check_switch("mit_residual", self.mit_residual)
        _check_eps("layer_norm_eps", self.layer_norm_eps)
        _check_eps("mit_eps", self.mit_eps or 0.0)
        if self.mit_positions is not None and self.mit_positions < self.num_frames:
            raise ValueError(f"mit_positions {self.mit_positions} must be at least num_frames {self.num_frames}")
        if self.num_classes is not None:
            if self.num_classes < 1:
                raise ValueError(f"num_classes {self.num_classes} must be at least 1, or None for labels as text")
            if self.prompt == "vectors":
                raise ValueError(f"prompt 'vectors' with num_classes {self.num_classes}: a linear head has no text")
            object.__setattr__(self, "prompt", "none")
        if self.prompt == "vectors" and not 1 <= self.prompt_vectors <= self.text.context_length - 3:
            raise ValueError(
                f"prompt_vectors {self.prompt_vectors} must be at least 1, and leave room for start, one token and end "
                f"in the context of {self.text.context_length}"
            )

    @property
    def vision_eps(self) -> float:
        """Epsilon of the vision tower's LayerNorms."""
        return self.layer_norm_eps if self.vision.layer_norm_eps is None else self.vision.layer_norm_eps

    @property
    def label_tokens(self) -> int:
        """The most tokens of a label, with start and end: the text context without the learned vectors."""
        return self.text.context_length - (self.prompt_vectors if self.prompt == "vectors" else 0)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary for JSON. ``from_dict`` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> XCLIPConfig:
        """The config from a dictionary of ``to_dict``. Raises ValueError for unknown keys and names them."""
        values = dict(values)
        vision = values.pop("vision", {})
        kind = SwinConfig if isinstance(vision, dict) and "depths" in vision else VisionConfig
        vision = _from_fields(kind, "vision", vision)
        text = _from_fields(TextConfig, "text", values.pop("text", {}))
        return _from_fields(cls, "model", {**values, "vision": vision, "text": text})


def _from_fields(cls: Any, where: str, values: dict[str, Any]) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} config is {values!r}; an object with keys is wanted")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where} config has unknown keys {unknown[:5]}; known are {sorted(known)}")
    try:
        return cls(**values)
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} config has a value of a wrong type: {error}") from error


def _variant(patch: int, frames: int, *, large: bool = False, image_size: int = 224) -> XCLIPConfig:
    vision = VisionConfig(
        image_size=image_size,
        patch_size=patch,
        width=1024 if large else 768,
        layers=24 if large else 12,
        heads=16 if large else 12,
    )
    text = TextConfig(width=768, heads=12) if large else TextConfig()
    return XCLIPConfig(vision=vision, text=text, embed_dim=768 if large else 512, num_frames=frames)


def _florence(frames: int, image_size: int, window: int) -> XCLIPConfig:
    """X-Florence, derived: the paper and its supplement say CoSwin-H and four layers of MIT."""
    return XCLIPConfig(
        vision=SwinConfig(image_size=image_size, window=window),
        text=TextConfig(width=1280, heads=20),
        embed_dim=768,
        num_frames=frames,
        mit_layers=4,
    )


# The rows of X-CLIP and X-Florence in Table 1, and the 32-frame B/16 of the few- and zero-shot tables (3 to 5).
VARIANTS: dict[str, XCLIPConfig] = {
    "B/32-8f": _variant(32, 8),
    "B/32-16f": _variant(32, 16),
    "B/16-8f": _variant(16, 8),
    "B/16-16f": _variant(16, 16),
    "L/14-8f": _variant(14, 8, large=True),
    "L/14@336-16f": _variant(14, 16, large=True, image_size=336),
    "B/16-32f": _variant(16, 32),
    "Florence-8f-384": _florence(8, 384, 12),
    "Florence-32f": _florence(32, 224, 7),
}


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """The row of Table 1 for one variant on Kinetics-400 (accuracy in %, 4 x 3 views)."""

    top1: float
    top5: float
    gflops: float  # multiply-adds of one view, in units of 10^9
    views_per_second: float  # on one V100


PAPER_TABLE1: dict[str, PaperRow] = {
    "B/32-8f": PaperRow(80.4, 95.0, 39, 136),
    "B/32-16f": PaperRow(81.1, 95.5, 75, 69),
    "B/16-8f": PaperRow(83.8, 96.7, 145, 33),
    "B/16-16f": PaperRow(84.7, 96.8, 287, 17),
    "L/14-8f": PaperRow(87.1, 97.6, 658, 8),
    "L/14@336-16f": PaperRow(87.7, 97.4, 3086, 2),
    "Florence-8f-384": PaperRow(86.2, 96.6, 2114, 6),
    "Florence-32f": PaperRow(86.5, 96.9, 2822, 2),
}


def variant(name: str) -> XCLIPConfig:
    """The config of a variant by name. Raises ValueError with the known names for another name."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise ValueError(f"no variant is called {name!r}; known are {', '.join(VARIANTS)}") from None
