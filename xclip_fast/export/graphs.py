"""The parts of an X-CLIP that are exported: the video tower, the text tower and the similarity.

B videos, T frames, S pixels of a side, N patches, K labels, L tokens of the longest label, E embedding size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import TextConfig
from ..nn.features import VideoFeatures

if TYPE_CHECKING:
    from ..model import XCLIP

# The largest size of each axis that may vary. torch.export and TensorRT want bounds.
MOST = {"batch": 4096, "labels": 65_536}


@dataclasses.dataclass(frozen=True)
class Graph:
    """One part of a model, and inputs to trace and check it with."""

    name: str  # of its file, without the suffix
    module: nn.Module  # takes tensors, returns a tuple of tensors
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[dict[int, str], ...]  # of each input: the name of each axis that may vary ("batch", "labels", "tokens")
    example: Callable[[int, int], tuple[Tensor, ...]]  # inputs of that many videos and labels
    most: dict[str, int] = dataclasses.field(default_factory=lambda: dict(MOST))  # the largest size of each axis


class _Part(nn.Module):
    def __init__(self, model: XCLIP) -> None:
        super().__init__()
        self.model = model


class _Video(_Part):
    """uint8 videos (B, T, S, S, 3) to features (B, E) and, if labels are prompted, patch features (B, N, E)."""

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        found = self.model.encode_video(video)
        return tuple(found) if self.model.prompts_generator is not None else (found.video,)


class _Text(_Part):
    """Tokens (K, L) to features (K, E)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return (self.model.encode_text(tokens),)


class _Similarity(_Part):
    """The outputs of both towers to logits (B, K), or those of the video tower to the logits of a linear head."""

    def forward(self, video: Tensor, text: Tensor | None = None, patches: Tensor | None = None) -> tuple[Tensor, ...]:
        patches = video.new_empty(video.shape[0], 0, video.shape[1]) if patches is None else patches
        return (self.model.similarity(VideoFeatures(video, patches), text),)


def graphs_of(model: XCLIP, frames: int) -> list[Graph]:
    """The parts of a model for videos of ``frames`` frames. One with a linear head has no text tower."""
    config, dtype = model.config, model.visual.proj.dtype
    size, patches, E = config.vision.image_size, config.vision.patches, config.embed_dim
    prompted = model.prompts_generator is not None
    given = ("video",) if model.head is not None else ("video", "text", "patches") if prompted else ("video", "text")

    def videos(batch: int, labels: int) -> tuple[Tensor, ...]:
        return (torch.randint(256, (batch, frames, size, size, 3), dtype=torch.uint8, generator=_seeded()),)

    def tokens(batch: int, labels: int) -> tuple[Tensor, ...]:
        return (random_tokens(config.text, labels, config.label_tokens),)

    def features(batch: int, labels: int) -> tuple[Tensor, ...]:
        shapes = [(batch, E), (labels, E), (batch, patches, E)][: len(given)]
        generator = _seeded()
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    found = [Graph("video", _Video(model), ("frames",), given[::2], ({0: "batch"},), videos)]
    if model.head is None:
        most = {**MOST, "tokens": config.label_tokens}
        found.append(Graph("text", _Text(model), ("tokens",), ("text",), ({0: "labels", 1: "tokens"},), tokens, most))
    axes = ({0: "batch"}, {0: "labels"}, {0: "batch"})[: len(given)]
    return [*found, Graph("similarity", _Similarity(model), given, ("logits",), axes, features)]


def random_tokens(config: TextConfig, labels: int, context: int) -> Tensor:
    """Random labels (K, L), int64: words between start and end, then zeros. Label k has one to five words."""
    start, end, longest = config.vocab_size - 2, config.vocab_size - 1, min(context, 7)
    tokens = torch.zeros(labels, longest, dtype=torch.int64)
    for row, line in enumerate(tokens):
        words = max(0, min(1 + row % 5, longest - 2))
        line[0], line[1 + words] = start, end
        line[1 : 1 + words] = torch.randint(1, max(2, start), (words,), generator=_seeded(row))
    used = int(tokens.argmax(1).max()) + 1
    return tokens[:, :used].contiguous()  # a view's strides would become constants of the graph


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """The graph in plain ATen operations, without any of this package's own."""
    least = {"tokens": 3}  # start, a word, end
    dims = {name: torch.export.Dim(name, min=least.get(name, 1), max=most) for name, most in graph.most.items()}
    shapes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in graph.axes)
    with torch.no_grad(), kernels.backend("reference"):
        program = torch.export.export(graph.module, graph.example(2, 3), dynamic_shapes=shapes)
    specs, nodes = program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder")
    for node, spec in zip(nodes, list(specs), strict=True):
        if spec.target in program.state_dict and not node.users:  # weights of the other parts; a .pt2 would hold them
            program.graph.erase_node(node)
            specs.remove(spec)
            del program.state_dict[spec.target]
    return program


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
