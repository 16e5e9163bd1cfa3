"""CLIP's text encoder without the work behind the end-of-text token (paper, section 3.3).

K labels, S tokens of all labels, W width, E embedding size.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import TextConfig
from ..kernels.common import derived
from ..kernels.linear import linear
from .layers import TransformerBlock, init_block, run_block
from .parts import PLAIN, find_change, layer_norm

CACHED_LABEL_SETS = 16
LABELS_AT_ONCE = 1024  # bounds memory, whatever their number


class Transformer(nn.Module):
    """A list of blocks under the released name ``resblocks``."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)


_PLAIN = {
    activation: kinds | {kind: kind.forward for kind in (Transformer, nn.ModuleList, nn.Embedding, TransformerBlock)}
    for activation, kinds in PLAIN.items()
}


class TextEncoder(nn.Module):
    """Tokens (K, any length) to text features (K, E), read at each label's end-of-text token.

    The encoder is causal, so later tokens do not matter, and labels are packed without them. While torch.compile or
    torch.export traces, shapes must not depend on values, so the tokens are not trimmed: pass trimmed ones
    (``tokenize`` trims).

    If the parameters get no gradient, the features of the last ``CACHED_LABEL_SETS`` sets of tokens are cached. A
    changed parameter empties the cache (see ``forget`` for the exceptions). Nothing is cached while a parameter holds a
    gradient, or if a module of the encoder is not plain (an adapter, a hook).
    """

    def __init__(self, config: TextConfig, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # see XCLIP.checkpoint_activations
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(
            [TransformerBlock(width, config.heads, eps, activation=config.activation) for _ in range(config.layers)]
        )
        self.ln_final = nn.LayerNorm(width, eps)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self._cache: collections.OrderedDict[tuple[object, ...], Tensor] = collections.OrderedDict()
        # storage, address, version of each parameter, and the changes so far that raise no version
        self._encoded_with: list[tuple[Any, int, int, int]] = []
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            init_block(block, width, config.layers)

    def forward(self, tokens_KL: Tensor, vectors_PW: Tensor | None = None) -> Tensor:
        """Text features.

        Args:
            tokens_KL: int32 or int64 (K, any length up to the context). Each row ends with the end-of-text token, the
                largest number of the vocabulary. Later tokens are ignored.
            vectors_PW: P learned vectors that follow the start-of-text token of every label (Table 9, "Vectors").

        Returns:
            (K, E).

        Raises:
            ValueError: if the tokens have another shape or dtype, or are too many.
        """
        if tokens_KL.dim() != 2 or tokens_KL.dtype not in (torch.int32, torch.int64) or tokens_KL.shape[1] == 0:
            raise ValueError(
                f"tokens of shape {tuple(tokens_KL.shape)} {tokens_KL.dtype} given; "
                "int32 or int64 (K, L) with L >= 1 wanted"
            )
        if tokens_KL.shape[1] > self.config.context_length:
            raise ValueError(f"{tokens_KL.shape[1]} tokens a label given; at most {self.config.context_length} fit")
        if vectors_PW is not None:
            tokens_KL = _with_places(tokens_KL, vectors_PW.shape[0])
        if torch.compiler.is_compiling():
            return self._encode_padded(tokens_KL, vectors_PW)
        if find_change(self._modules, _PLAIN[self.config.activation], self.config.heads, self.ln_final.eps) is not None:
            return self._encode_trimmed(tokens_KL, vectors_PW)
        parameters: list[Tensor] = list(self.parameters())
        is_replica = not parameters  # of DataParallel
        parameters += [] if vectors_PW is None else [vectors_PW]
        # a training step follows, and fused optimizers do not raise the versions of weights
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        if trains or is_replica or any(map(_untraceable, parameters)):
            self._clear()
            return self._encode_packed(tokens_KL, vectors_PW)
        return self._cached(tokens_KL, parameters, vectors_PW)

    def forget(self) -> None:
        """Empties the cache, and that of what a GPU's kernels make of the weights of any model.

        Call it after editing weights through ``.data`` or ``.numpy()``. Other changes (any ``torch.optim`` optimizer,
        ``load_state_dict``, ``to``, ``train``, new parameters) are noticed.
        """
        derived.changes[0] += 1
        self._clear()

    def _clear(self) -> None:
        self._cache.clear()
        self._encoded_with = []

    def train(self, mode: bool = True) -> TextEncoder:
        self._clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> TextEncoder:
        self._clear()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": collections.OrderedDict(), "_encoded_with": []}

    def _cached(self, tokens_KL: Tensor, parameters: list[Tensor], vectors_PW: Tensor | None) -> Tensor:
        # the storages are kept, so that no other weight can get the address of an old one
        state = [(p.untyped_storage(), p.data_ptr(), p._version, derived.changes[0]) for p in parameters]
        if [item[1:] for item in state] != [item[1:] for item in self._encoded_with]:
            self._clear()
            self._encoded_with = state
        key = (
            tuple(tokens_KL.shape),
            tokens_KL.dtype,
            tokens_KL.cpu().numpy().tobytes(),
            vectors_PW is not None,
            kernels.dispatch.autocast_dtype(parameters[0].device.type),
            kernels.forced_backend(),
        )
        features_KE = self._cache.pop(key, None)
        if features_KE is None:
            with torch.inference_mode(False), torch.no_grad():  # usable in a later training step
                features_KE = self._encode_packed(tokens_KL, vectors_PW)
        self._cache[key] = features_KE
        if len(self._cache) > CACHED_LABEL_SETS:
            self._cache.popitem(last=False)
        return features_KE.clone()  # the caller may normalize it in place

    def _encode_packed(self, tokens_KL: Tensor, vectors_PW: Tensor | None) -> Tensor:
        if tokens_KL.shape[0] > LABELS_AT_ONCE:  # attention pads to the longest of them
            parts = tokens_KL.split(LABELS_AT_ONCE)
            return torch.cat([self._encode_packed(part_KL, vectors_PW) for part_KL in parts])
        device = self.positional_embedding.device
        # on the tokens' device, usually the CPU, where reading the lengths does not wait
        lengths_K = tokens_KL.argmax(1) + 1
        # labels of one length beside each other: the attention of a CPU needs no padding
        lengths_K, order_K = lengths_K.sort(stable=True)
        tokens_KL = tokens_KL[order_K]
        offsets = F.pad(lengths_K.cumsum(0), (1, 0))
        label_S, place_S = (torch.arange(tokens_KL.shape[1], device=tokens_KL.device) < lengths_K[:, None]).nonzero(
            as_tuple=True
        )
        longest = int(lengths_K.max()) if len(lengths_K) else 0
        self._check_room(longest, vectors_PW)
        ids_S, place_S = tokens_KL[label_S, place_S].to(device), place_S.to(device)
        offsets = offsets.to(device)
        x_SW = self.token_embedding(ids_S)
        if vectors_PW is not None:
            vector_S = place_S - 1  # a vector's number, if it is one
            inside_S1 = ((vector_S >= 0) & (vector_S < vectors_PW.shape[0]))[:, None]
            x_SW = torch.where(inside_S1, vectors_PW[vector_S.clamp(0, vectors_PW.shape[0] - 1)], x_SW)
        x_SW = x_SW + self.positional_embedding[place_S]

        ends = offsets[1:][order_K.argsort().to(device)] - 1
        return self._project(self._through(x_SW, (True, offsets, longest), ends))

    def _encode_trimmed(self, tokens_KL: Tensor, vectors_PW: Tensor | None) -> Tensor:
        """Calls the modules on padded labels (longest, K, W). Hooks want every call, so nothing is cached."""
        self._clear()
        longest = int(tokens_KL.argmax(1).max()) + 1 if len(tokens_KL) else 1
        parts = tokens_KL[:, :longest].split(LABELS_AT_ONCE)
        return torch.cat([self._encode_padded(part_KL, vectors_PW) for part_KL in parts])

    def _encode_padded(self, tokens_KL: Tensor, vectors_PW: Tensor | None) -> Tensor:
        tokens_KL = tokens_KL.to(self.positional_embedding.device)
        self._check_room(tokens_KL.shape[1], vectors_PW)
        x_KLW = self.token_embedding(tokens_KL)
        if vectors_PW is not None:
            inside_KPW = vectors_PW.expand(tokens_KL.shape[0], -1, -1)
            x_KLW = torch.cat([x_KLW[:, :1], inside_KPW, x_KLW[:, 1 + vectors_PW.shape[0] :]], 1)
        x_KLW = x_KLW + self.positional_embedding[: tokens_KL.shape[1]]
        end_K = tokens_KL.argmax(1)
        ends_K = torch.arange(end_K.shape[0], device=end_K.device) * tokens_KL.shape[1] + end_K
        return self._project(self._through(x_KLW, (True, None, 0), ends_K))

    def _through(self, x: Tensor, sequences: tuple[bool, Tensor | None, int], ends_K: Tensor) -> Tensor:
        """All blocks. Returns the end-of-text rows (K, W), the only rows that the last block computes.

        Args:
            sequences: whether they are causal, the offsets of packed sequences, and the longest of these.
            ends_K: each label's end among all rows of x.
        """
        last = len(self.transformer.resblocks) - 1
        with kernels.cpu.workspace():
            for index, block in enumerate(self.transformer.resblocks):
                x = run_block(block, self.recompute, x, *sequences, ends_K if index == last else None)
        return x

    def _check_room(self, longest: int, vectors_PW: Tensor | None) -> None:
        if longest > self.config.context_length:  # by vectors alone: forward has checked the tokens
            count = 0 if vectors_PW is None else vectors_PW.shape[0]
            raise ValueError(
                f"{longest - count} tokens a label given; at most {self.config.context_length - count} fit beside "
                f"{count} learned vectors: shorten the labels, or cut the padding after their ends"
            )

    def _project(self, end_KW: Tensor) -> Tensor:
        return linear(layer_norm(self.ln_final, end_KW), self.text_projection.T)


def _untraceable(parameter: Tensor) -> bool:
    """Whether a change may go unnoticed: an inference tensor has no version, and a gradient announces an optimizer."""
    return parameter.is_inference() or (parameter.requires_grad and parameter.is_leaf and parameter.grad is not None)


def _with_places(tokens_KL: Tensor, count: int) -> Tensor:
    """Inserts ``count`` zeros after the first token, the places of the vectors."""
    places = tokens_KL.new_zeros(tokens_KL.shape[0], count)
    return torch.cat([tokens_KL[:, :1], places, tokens_KL[:, 1:]], 1)
