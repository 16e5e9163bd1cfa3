"""Model shapes as frozen dataclasses, and the variants of the paper by name.

Sizes follow the paper (Ni et al., ECCV 2022): the width of a tower is D, its head size 64, the shared
embedding E.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from .schema import NotNegative, Positive, Range, build, check

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the released X-CLIP weights, which do not use CLIP's own mean
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


Activation = Literal["quick_gelu", "gelu"]
ACTIVATIONS = get_args(Activation)

# Bounds of the values that a file may ask for: far above any real model, far below sizes that hang.
Size = Annotated[int, Range(1, 65_536)]
Layers = Annotated[int, Range(1, 1024)]
OptionalLayers = Annotated[int, Range(0, 1024)]
Entries = Annotated[int, Range(1, 10_000_000)]
DropPath = Annotated[float, Range(0, below=1)]  # of the last block; grows linearly from 0 at the first
PAIRS = 1 << 28  # of tokens in the windows of all blocks of a Swin; its masks take a byte each. X-Florence: 5 million


def _check_heads(where: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{where}: width {width} does not divide into {heads} heads; choose a divisor of {width}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The cross-frame communication transformer (paper, section 3.2).

    The last four fields describe other encoders than X-CLIP's. ``cross_frame=False``: plain blocks without messages, as
    in an image CLIP (the baseline of Table 6). ``activation="gelu"``, ``pre_norm=False`` (no LayerNorm before the first
    block) and ``layer_norm_eps=1e-6``: the ViTs that were pretrained on images alone (Table 10).
    """

    image_size: Size = 224
    patch_size: Size = 16
    width: Size = 768
    layers: Layers = 12
    heads: Layers = 12
    drop_path: DropPath = 0.0
    cross_frame: bool = True
    activation: Activation = "quick_gelu"
    pre_norm: bool = True
    layer_norm_eps: NotNegative | None = None  # of the whole tower; None: the model's

    def __post_init__(self) -> None:
        check(self, "vision")
        _check_heads("vision", self.width, self.heads)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                "choose an image size that the patches tile"
            )

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

    image_size: Size = 224
    widths: tuple[Size, ...] = (256, 512, 1024, 2048)  # of each stage
    depths: tuple[Layers, ...] = (2, 2, 24, 6)  # blocks of each stage
    head_size: Size = 32
    window: Size = 7  # side of a window; a stage whose grid is no larger has one window
    convolutional: bool = True
    drop_path: DropPath = 0.0
    layer_norm_eps: NotNegative | None = None  # of the blocks and around them; None: the model's

    cross_frame: ClassVar[bool] = False
    activation: ClassVar[Activation] = "gelu"

    def __post_init__(self) -> None:
        check(self, "vision")
        stages = len(self.widths)
        if not 1 <= stages == len(self.depths) <= 8 or sum(self.depths) > 1024:
            raise ValueError(
                f"vision: {stages} widths and depths {self.depths} given; as many of both wanted, one to eight, and at "
                "most 1024 blocks in all"
            )
        for width in self.widths:
            if width % self.head_size:
                raise ValueError(f"vision: width {width} does not divide into heads of {self.head_size}")
        if not self.convolutional and any(b != 2 * a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"vision: widths {self.widths}; without convolutions, each is twice the one before")
        if self.image_size % (4 << (stages - 1)):
            raise ValueError(
                f"vision: image_size {self.image_size} is not a multiple of {4 << (stages - 1)}, the pixels of a "
                "token's side in the last stage"
            )
        if any(grid > self.window and grid % self.window for grid in self.grids):
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

    vocab_size: Entries = 49408
    context_length: Annotated[int, Range(2, 65_536)] = 77
    width: Size = 512
    layers: Layers = 12
    heads: Layers = 8
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        check(self, "text")
        _check_heads("text", self.width, self.heads)


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
    of MIT's LayerNorms, if not the model's. ``logit_bias``, a learned number, is added to the logits (SigLIP's loss).
    """

    vision: VisionConfig | SwinConfig = VisionConfig()
    text: TextConfig = TextConfig()
    embed_dim: Size = 512
    num_frames: Size = 8
    mit_layers: OptionalLayers = 1
    mit_heads: Layers | None = None
    mit_residual: bool = True
    mit_positions: Size | None = None
    mit_eps: NotNegative | None = None
    prompt_layers: OptionalLayers = 2
    prompt_heads: Layers | None = None
    prompt_alpha: float = 0.1
    layer_norm_eps: NotNegative = 1e-5
    logit_scale: float = math.log(1 / 0.07)  # the initial value, as a logarithm
    logit_bias: float | None = None  # the initial value; None: without
    temporal_std: Positive = 0.02  # initial, of the temporal embedding; a larger one helps training from scratch
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    prompt: Literal["video", "vectors", "none"] = "video"  # "video": section 3.3
    prompt_vectors: Annotated[int, Range(0, 10_000_000)] = 16
    num_classes: Entries | None = None

    def __post_init__(self) -> None:
        check(self)
        for name in ("mit_heads", "prompt_heads"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, max(1, self.embed_dim // 64))
            _check_heads(name, self.embed_dim, getattr(self, name))
        if self.mit_positions is not None and self.mit_positions < self.num_frames:
            raise ValueError(f"mit_positions {self.mit_positions} must be at least num_frames {self.num_frames}")
        if self.num_classes is not None:
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

    @property
    def variant_name(self) -> str | None:
        """The name of the variant with this shape, or None. Initial values and drop path do not count."""
        vision = dataclasses.replace(self.vision, drop_path=0.0)
        scale, std = XCLIPConfig.logit_scale, XCLIPConfig.temporal_std
        plain = dataclasses.replace(self, vision=vision, logit_scale=scale, temporal_std=std)
        return next((name for name, row in VARIANTS.items() if row == plain), None)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary for JSON. ``from_dict`` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> XCLIPConfig:
        """The config from a dictionary of ``to_dict``. Missing keys take their defaults.

        Raises:
            ConfigError: for an unknown key, and for a value of a wrong type or out of range.
        """
        vision, text = values.get("vision", {}), values.get("text", {})
        kind = SwinConfig if isinstance(vision, Mapping) and "depths" in vision else VisionConfig
        return build(cls, {**values, "vision": build(kind, vision, "vision"), "text": build(TextConfig, text, "text")})


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
    if name not in VARIANTS:
        raise ValueError(f"no variant is called {name!r}; known are {', '.join(VARIANTS)}")
    return VARIANTS[name]
