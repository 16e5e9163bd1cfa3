"""CLIP's byte-pair tokenizer on the `tokenizers` library.

The ids equal those of `transformers.CLIPTokenizer`: NFC, runs of white space to one space, lower case, CLIP's word
pattern, bytes, merges. OpenAI's own tokenizer first repairs broken Unicode (ftfy) and unescapes HTML entities; Hugging
Face's does neither, and neither do we: unescape a label list yourself if it came from a web page.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SOT = 49406
"""Id of the start-of-text token."""
EOT = 49407
"""Id of the end-of-text token: the largest id, so `tokens.argmax(-1)` finds its first occurrence."""
CONTEXT_LENGTH = 77
"""Positions of CLIP's text encoder."""

_SOT_TEXT, _EOT_TEXT = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49152 - 256 - 2  # CLIP cuts the table of merges here
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_letters() -> list[str]:
    """The letter that stands for each byte, in vocabulary order: printable bytes as themselves, then the other 68."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The 49408 tokens with their ids and the 48894 merges in order of rank, from the packaged table."""
    data = files("xclip_fast.text").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(data).decode("utf-8").split("\n")[1 : 1 + _MERGES]  # the first line is a version
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), _SOT_TEXT, _EOT_TEXT]
    return {token: index for index, token in enumerate(tokens)}, merges


@functools.cache
def tokenizer() -> Tokenizer:
    """The `tokenizers.Tokenizer`, built once per process (0.2 s). It adds no special tokens and never truncates."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab, merges = vocabulary()
    bpe = models.BPE(
        vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=_EOT_TEXT
    )
    result = Tokenizer(bpe)
    result.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    # A special token written out in a text is that token, as in Hugging Face's tokenizer.
    result.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (_SOT_TEXT, _EOT_TEXT)])
    return result


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, pad: bool = False) -> torch.Tensor:
    """Token ids of one text or of several: int64 (K, L).

    Every row is start-of-text, the words, end-of-text, then zeros. L is the longest row's length, or `context_length`
    when `pad`. A text that does not fit loses its tail, never its end-of-text token. Zeros (OpenAI's padding) leave the
    end-of-text token where `argmax` finds it.

    Raises TypeError for anything but strings, ValueError for an empty list, for a `context_length` under 2, or for a
    text that is no valid Unicode.
    """
    batch = [texts] if isinstance(texts, str) else list(texts)
    if not batch:
        raise ValueError("tokenize got an empty list; give at least one text")
    for index, text in enumerate(batch):
        if not isinstance(text, str):
            raise TypeError(f"tokenize wants strings; item {index} is {type(text).__name__}: {text!r:.80}")
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}; it must hold at least the start and end tokens (2)")
    try:
        encodings = tokenizer().encode_batch_fast(batch, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        for index, text in enumerate(batch):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"text {index} is no valid Unicode (a lone surrogate): {text!r:.80}") from None
        raise
    rows = [[SOT, *encoding.ids[: context_length - 2], EOT] for encoding in encodings]
    tokens_KL = np.zeros((len(rows), context_length if pad else max(map(len, rows))), np.int64)
    for tokens_L, row in zip(tokens_KL, rows, strict=True):
        tokens_L[: len(row)] = row
    return torch.from_numpy(tokens_KL)
