"""A vision tower with attention in windows: CoSwin-H of X-Florence, or a Swin.

Swin (Liu et al., ICCV 2021) computes attention inside windows of tokens. In every second block the windows are shifted
by half a window. Shifted windows wrap around the edges, and a mask separates tokens that are no neighbors. CoSwin
(Florence, Yuan et al., 2021) has convolutions between the stages instead of merged patches.

Except for attention, a block works row by row. So a block is the plain block of the other towers on tokens in the order
of the windows: (F W, S, D), with a bias added to the scores of each window.

F frames, G tokens of a side of a stage's grid, N = G^2, W windows of a frame, S tokens of a window, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import SwinConfig, XCLIPConfig
from .layers import TransformerBlock, init_linear, run_block
from .parts import apply_linear, layer_norm
from .text import Transformer
from .vit import normalized


class WindowBlock(nn.Module):
    """A block that works on windows of a frame's tokens, (F, N, D) -> (F, N, D).

    Args:
        width: D. heads: H. grid: G. window: side of a window, a divisor of G.
        shifted: whether the windows are shifted by half of their side.
        eps: of the LayerNorms. drop_path: as in ``TransformerBlock``.
    """

    offset_SS: Tensor  # the row of the table for a query and a key
    order_N: Tensor | None  # the place of each token of the shifted windows among those of the plain ones
    place_N: Tensor | None  # the way back
    mask_WSS: Tensor | None  # whether a key is a neighbor

    def __init__(
        self, width: int, heads: int, grid: int, window: int, shifted: bool, eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.window = window
        self.block = TransformerBlock(width, heads, eps, drop_path=drop_path, activation="gelu")
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        order = mask = None
        if shifted:
            order, mask = _shift(grid, window)
        # on the CPU even if the parameters are on the meta device: a checkpoint does not hold these buffers
        for name, buffer in (
            ("offset_SS", _offsets(window)),
            ("order_N", order),
            ("place_N", None if order is None else order.argsort()),
            ("mask_WSS", mask),
        ):
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, x_FND: Tensor, samples: int | None = None) -> Tensor:
        """``samples``: the number of videos, for drop path (default: the number of frames)."""
        size = x_FND.shape
        x_FND = x_FND if self.order_N is None else x_FND.index_select(1, self.order_N.to(x_FND.device))
        windows = x_FND.reshape(-1, self.window**2, size[2])
        y = self.block(windows, samples=size[0] if samples is None else samples, bias=self.bias()).view(size)
        return y if self.place_N is None else y.index_select(1, self.place_N.to(y.device))

    def bias(self) -> Tensor:
        """The bias of the scores: (W, H, S, S), or (1, H, S, S) if all windows have the same."""
        table, length = self.relative_position_bias_table, self.offset_SS.shape[0]
        bias_HSS = table.index_select(0, self.offset_SS.flatten().to(table.device)).view(length, length, -1)
        bias_HSS = bias_HSS.permute(2, 0, 1)
        if self.mask_WSS is None:
            return bias_HSS[None]
        return bias_HSS.masked_fill(~self.mask_WSS[:, None].to(table.device), float("-inf"))


class Embedding(nn.Module):
    """A convolution over the grid, and a LayerNorm: pixels or tokens (F, C, G, G) to tokens (F, N, D)."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, padding: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x_FCGG: Tensor) -> Tensor:
        return layer_norm(self.norm, self.conv(x_FCGG).flatten(2).transpose(1, 2))


class Merging(nn.Module):
    """Swin's merging: it joins 2 x 2 neighbors, then a LayerNorm and a linear layer to half of their width."""

    def __init__(self, channels: int, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, eps)
        self.reduction = nn.Linear(4 * channels, width, bias=False)

    def forward(self, x_FCGG: Tensor) -> Tensor:
        x_FGGC = x_FCGG.permute(0, 2, 3, 1)
        parts = [x_FGGC[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return apply_linear("reduction", self.reduction, layer_norm(self.norm, torch.cat(parts, -1).flatten(1, 2)))


class SwinTower(nn.Module):
    """Frames to features, and to the tokens of the last stage as patches. It has the interface of ``VisionTower``."""

    def __init__(self, config: XCLIPConfig) -> None:
        super().__init__()
        vision = config.vision
        assert isinstance(vision, SwinConfig)
        self.config, self.vision = config, vision
        self.recompute = False  # see XCLIP.checkpoint_activations
        eps, channels = config.vision_eps, 3
        embeddings: list[nn.Module] = []
        for stage, width in enumerate(vision.widths):
            if vision.convolutional:
                kernel, stride, padding = (3, 2, 1) if stage else (7, 4, 2)
                embeddings.append(Embedding(channels, width, kernel, stride, padding, eps))
            else:
                embeddings.append(Merging(channels, width, eps) if stage else Embedding(3, width, 4, 4, 0, eps))
            channels = width
        self.embeddings = nn.ModuleList(embeddings)
        self.transformer = Transformer(_blocks(vision, eps))
        self.ln_post = nn.LayerNorm(vision.width, eps)
        self.proj = nn.Parameter(nn.init.normal_(torch.empty(vision.width, config.embed_dim), std=vision.width**-0.5))
        init_linear(self)

    def forward(self, frames: Tensor, num_frames: int, patches: bool = True) -> tuple[Tensor, Tensor]:
        """Frames to the feature of each (F, D), the mean of its normalized tokens, and its tokens (F, N, D).

        Args:
            frames: uint8 (F, H, W, 3) or normalized (F, 3, H, W), F = B * num_frames.
            patches: makes no difference here, since the feature wants all tokens.
        """
        x_FCGG = normalized(frames, self.proj, self.config.image_mean, self.config.image_std)
        blocks, samples = iter(self.transformer.resblocks), frames.shape[0] // num_frames
        for embedding, depth, grid in zip(self.embeddings, self.vision.depths, self.vision.grids, strict=True):
            window = min(self.vision.window, grid)
            x_FND = _to_windows(embedding(x_FCGG), grid, window)
            for _ in range(depth):
                x_FND = run_block(next(blocks), self.recompute, x_FND, samples)
            x_FND = _from_windows(x_FND, grid, window)
            x_FCGG = x_FND.transpose(1, 2).unflatten(2, (grid, grid))
        return layer_norm(self.ln_post, x_FND).mean(1), x_FND


def _blocks(vision: SwinConfig, eps: float) -> list[nn.Module]:
    found: list[nn.Module] = []
    for width, depth, grid in zip(vision.widths, vision.depths, vision.grids, strict=True):
        for index in range(depth):
            shifted = index % 2 == 1 and grid > vision.window
            drop_path = vision.drop_path * len(found) / max(1, vision.layers - 1)
            window, heads = min(vision.window, grid), width // vision.head_size
            found.append(WindowBlock(width, heads, grid, window, shifted, eps, drop_path))
    return found


def _to_windows(x_FND: Tensor, grid: int, window: int) -> Tensor:
    """Tokens row by row to tokens window by window."""
    count = grid // window
    return x_FND.unflatten(1, (count, window, count, window)).transpose(2, 3).flatten(1, 4)


def _from_windows(x_FND: Tensor, grid: int, window: int) -> Tensor:
    """Tokens window by window to tokens row by row."""
    count = grid // window
    return x_FND.unflatten(1, (count, count, window, window)).transpose(2, 3).flatten(1, 4)


def _offsets(window: int) -> Tensor:
    """The row of the bias table for each query and key (S, S): their distance down, then across."""
    place = torch.arange(window, device="cpu")
    distance = place[:, None] - place + window - 1
    down = distance[:, None, :, None].expand(window, window, window, window)
    across = distance[None, :, None, :].expand(window, window, window, window)
    return (down * (2 * window - 1) + across).reshape(window**2, window**2)


def _shift(grid: int, window: int) -> tuple[Tensor, Tensor]:
    """Of windows shifted by half a window: the places of their tokens in the order of the plain windows (N,), and which
    tokens of a window lie on the same side of the image's edges (W, S, S)."""
    shift, count = window // 2, grid // window
    token = torch.arange(grid**2, device="cpu")

    def shifted(values_N: Tensor) -> Tensor:
        rolled = values_N.view(grid, grid).roll((-shift, -shift), (0, 1))
        return _to_windows(rolled.reshape(1, -1, 1), grid, window).flatten()

    place_N = _to_windows(token[None, :, None], grid, window).flatten().argsort()  # of a token, in plain windows
    side = (torch.arange(grid, device="cpu") < shift).long()  # rolled to the other edge
    region_WS = shifted((side[:, None] * 2 + side).flatten()).view(count**2, -1)
    return place_N[shifted(token)], region_WS[:, :, None] == region_WS[:, None, :]
