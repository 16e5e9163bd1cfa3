"""Multiply-adds of an X-CLIP from its config, counted the paper's way and as this package computes.

The unit is one multiply-add, as in the paper's Table 1 (its "FLOPs"); torch's counter counts two for each. Only matrix
products count. It is arithmetic on the sizes, without torch.

B videos, T frames, F = B T, N patches, L = N + 1, D width, K labels, S tokens of all labels, W text width, E embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from .config import PAPER_TABLE1, VARIANTS, SwinConfig, TextConfig, VisionConfig, XCLIPConfig

Counting = Literal["paper", "actual"]

LABEL_TOKENS = 5  # of the labels in ``table``: start, three word pieces ("playing basket ball"), end


@dataclasses.dataclass(frozen=True)
class Product:
    """``times`` products of (rows, inner) and (inner, columns) matrices. ``weight``: the second is a parameter."""

    part: str
    rows: int
    inner: int
    columns: int
    times: int = 1
    weight: bool = True

    @property
    def multiply_adds(self) -> int:
        return self.rows * self.inner * self.columns * self.times


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiply-adds by part. ``message_kv`` to ``mlp`` are the blocks of the vision tower, by op."""

    patch_embed: int = 0
    message_kv: int = 0  # message token and CFA
    ln_linear: int = 0  # queries, keys and values of IFA, the message's too
    diffusion_attention: int = 0
    linear_residual: int = 0  # output projection of IFA
    mlp: int = 0
    frame_projection: int = 0  # class tokens to E
    mit: int = 0
    patch_projection: int = 0  # patch tokens to E, for the prompts
    text: int = 0
    prompts: int = 0
    similarity: int = 0  # or the linear head

    @property
    def video(self) -> int:
        """The video tower: all parts without labels."""
        return self.total - self.text - self.prompts - self.similarity

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        """Every part, ``video`` and ``total``."""
        return {**dataclasses.asdict(self), "video": self.video, "total": self.total}


def count(
    config: XCLIPConfig,
    *,
    frames: int | None = None,
    labels: int | Sequence[int] = 1,
    batch: int = 1,
    counting: Counting = "paper",
) -> Flops:
    """Multiply-adds of one forward.

    Args:
        config: the shape of the model.
        frames: T of each video; by default the config's.
        labels: K, the number of labels that each fill the text context (77 tokens); or the K token counts, with start
            and end, as ``tokenize`` gives them. They do not count in a model with ``num_classes``.
        batch: B.
        counting: ``"paper"``: the released computation, with the message as a full token of the sequence, labels padded
            to the context, and patches projected frame by frame (one video and one label give Table 1).
            ``"actual"``: the computation of ``XCLIP`` without cached text: the message as one row of the projection
            (fused blocks compute its row of the FFN too, for nothing), one projection of the mean patches, the first
            prompt layer's query once for the batch, and packed labels (their attention pads to the longest label, as
            every backend does). After the last attention of the labels only their end-of-text rows are computed, and
            without video-specific prompts only the class tokens after that of the frames. Learned vectors count as
            tokens.

    Raises:
        ValueError: if a size is below 1, a label has more tokens than the context, or ``counting`` is another word.
    """
    parts = {field.name: 0 for field in dataclasses.fields(Flops)}
    for product in products(config, frames=frames, labels=labels, batch=batch, counting=counting):
        parts[product.part] += product.multiply_adds
    return Flops(**parts)


def products(
    config: XCLIPConfig,
    *,
    frames: int | None = None,
    labels: int | Sequence[int] = 1,
    batch: int = 1,
    counting: Counting = "paper",
) -> list[Product]:
    """The matrix products of one forward, with the arguments of ``count``."""
    if counting not in ("paper", "actual"):
        raise ValueError(f'counting {counting!r} given; "paper" or "actual" wanted')
    frames = config.num_frames if frames is None else frames
    context = config.label_tokens
    lengths = [context] * labels if isinstance(labels, int) else [int(length) for length in labels]
    if min(frames, batch, len(lengths), *lengths) < 1 or max(lengths, default=0) > context:
        raise ValueError(
            f"batch {batch}, {frames} frames, {len(lengths)} labels of {min(lengths, default=0)} to "
            f"{max(lengths, default=0)} tokens given; at least 1 of each and at most {context} tokens a label wanted"
        )
    paper = counting == "paper"
    if paper:
        lengths = [context] * len(lengths)
    found = list(_video(config, batch, frames, paper))
    if config.num_classes is not None:
        return [*found, Product("similarity", batch, config.embed_dim, config.num_classes)]
    vectors = config.text.context_length - context
    found += _text(config.text, config.embed_dim, [length + vectors for length in lengths], paper)
    if config.prompt == "video":
        found += _prompts(config, batch, len(lengths), paper)
    return [*found, Product("similarity", 1, config.embed_dim, len(lengths), batch, weight=False)]


def _video(config: XCLIPConfig, batch: int, frames: int, paper: bool) -> Iterator[Product]:
    vision, E, F = config.vision, config.embed_dim, batch * frames
    if isinstance(vision, SwinConfig):
        yield from _windows(vision, F)
    else:
        yield from _cross_frame(vision, batch, frames, paper or config.prompt == "video")
    yield Product("frame_projection", F, vision.width, E)
    yield from _block("mit", F, E, config.mit_layers)
    assert config.mit_heads is not None
    yield from _attention("mit", frames, frames, E, config.mit_heads, batch * config.mit_layers)
    if config.prompt == "video":
        yield Product("patch_projection", (F if paper else batch) * vision.patches, vision.width, E)


def _cross_frame(vision: VisionConfig, batch: int, frames: int, patches: bool) -> Iterator[Product]:
    D, N, F, layers = vision.width, vision.patches, batch * frames, vision.layers
    L = N + 1
    messages = int(vision.cross_frame)
    rows = L + messages  # the message is one more row up to the FFN
    yield Product("patch_embed", F * N, 3 * vision.patch_size**2, D)
    if messages:
        yield Product("message_kv", F, D, D, layers)  # message token
        yield Product("message_kv", F, D, 3 * D, layers)
        yield from _attention("message_kv", frames, frames, D, vision.heads, batch * layers)
        yield Product("message_kv", F, D, D, layers)
    yield Product("ln_linear", F * rows, D, 3 * D, layers)
    yield from _attention("diffusion_attention", rows, rows, D, vision.heads, F * layers)
    whole = layers if patches else layers - 1  # blocks that compute all tokens after their attention
    yield Product("linear_residual", F * rows, D, D, whole)
    yield from _feed_forward("mlp", F * L, D, whole)
    if not patches:
        yield Product("linear_residual", F, D, D)
        yield from _feed_forward("mlp", F, D, 1)


def _windows(vision: SwinConfig, F: int) -> Iterator[Product]:
    """The stages of a Swin or CoSwin. What lies between them counts as patch embedding."""
    before = 3
    for width, depth, grid in zip(vision.widths, vision.depths, vision.grids, strict=True):
        kernel = (3 if before > 3 else 7) if vision.convolutional else (2 if before > 3 else 4)
        rows, length = F * grid**2, min(vision.window, grid) ** 2
        yield Product("patch_embed", rows, before * kernel**2, width)
        yield Product("ln_linear", rows, width, 3 * width, depth)
        heads = width // vision.head_size
        yield from _attention("diffusion_attention", length, length, width, heads, rows // length * depth)
        yield Product("linear_residual", rows, width, width, depth)
        yield from _feed_forward("mlp", rows, width, depth)
        before = width


def _text(text: TextConfig, E: int, lengths: list[int], paper: bool) -> Iterator[Product]:
    K, S, longest, last = len(lengths), sum(lengths), max(lengths), text.layers - 1
    yield from _block("text", S, text.width, last)
    yield Product("text", S, text.width, 3 * text.width)
    rows = S if paper else K  # of the last block, past its attention, ours takes the ends alone
    yield Product("text", rows, text.width, text.width)
    yield from _feed_forward("text", rows, text.width, 1)
    yield from _attention("text", longest, longest, text.width, text.heads, K * text.layers)
    yield Product("text", K, text.width, E)


def _prompts(config: XCLIPConfig, batch: int, K: int, paper: bool) -> Iterator[Product]:
    E, N, layers = config.embed_dim, config.vision.patches, config.prompt_layers
    assert config.prompt_heads is not None
    for layer in range(layers):
        shared = layer == 0 and not paper  # the first layer's text is the same for every video
        yield Product("prompts", (1 if shared else batch) * K, E, E)
    yield Product("prompts", batch * N, E, E, 2 * layers)  # keys and values
    yield from _attention("prompts", K, N, E, config.prompt_heads, batch * layers)
    yield Product("prompts", batch * K, E, E, layers)
    yield from _feed_forward("prompts", batch * K, E, layers)


def _block(part: str, rows: int, width: int, layers: int) -> Iterator[Product]:
    """The weights of a plain transformer's blocks; attention apart."""
    yield Product(part, rows, width, 3 * width, layers)
    yield Product(part, rows, width, width, layers)
    yield from _feed_forward(part, rows, width, layers)


def _feed_forward(part: str, rows: int, width: int, layers: int) -> Iterator[Product]:
    yield Product(part, rows, width, 4 * width, layers)
    yield Product(part, rows, 4 * width, width, layers)


def _attention(part: str, queries: int, keys: int, width: int, heads: int, times: int) -> Iterator[Product]:
    """q k^T and its product with v; a causal one counts in full, as it runs and as torch counts."""
    yield Product(part, queries, width // heads, keys, heads * times, weight=False)
    yield Product(part, queries, keys, width // heads, heads * times, weight=False)


def table() -> list[dict[str, Any]]:
    """A row for each variant of Table 1, in 10^9 multiply-adds of one video (``parts``: of ``ours_1``, by part).

    ``paper``: Table 1's number; ``counted``: the paper's way, from the config. ``ours_1`` and ``ours_400``: what
    really runs with 1 and 400 labels of ``LABEL_TOKENS`` tokens; ``padded_400``: the released computation with 400
    labels, each padded to the context.
    """
    rows = []
    for name, row in PAPER_TABLE1.items():
        config = VARIANTS[name]
        ours = count(config, labels=[LABEL_TOKENS], counting="actual")
        totals = {
            "paper": row.gflops,
            "counted": count(config).total / 1e9,
            "ours_1": ours.total / 1e9,
            "ours_400": count(config, labels=[LABEL_TOKENS] * 400, counting="actual").total / 1e9,
            "padded_400": count(config, labels=400).total / 1e9,
        }
        parts = {part: amount / 1e9 for part, amount in ours.to_dict().items()}
        rows.append({"variant": name, **totals, "parts": parts})
    return rows
