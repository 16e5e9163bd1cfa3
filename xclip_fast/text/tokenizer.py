"""CLIP's byte-pair tokenizer on the `tokenizers` library.

The ids equal those of OpenAI's tokenizer, with which X-CLIP was trained. The steps are cleaning (`clean`), NFC, one
space for each run of white space, lower case, CLIP's word pattern, bytes, merges. `transformers.CLIPTokenizer` gives
the same ids for text that needs no cleaning; it does not resolve HTML entities or curly quotes.
"""

from __future__ import annotations

import functools
import gzip
import html
import logging
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("xclip_fast")

SOT = 49406
"""Id of the start-of-text token."""
EOT = 49407
"""Id of the end-of-text token: the largest id, so `tokens.argmax(-1)` finds its first occurrence."""
CONTEXT_LENGTH = 77
"""Positions of CLIP's text encoder."""

_SOT_TEXT, _EOT_TEXT = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49152 - 256 - 2  # CLIP uses so many merges of the table
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_letters() -> list[str]:
    """The letter for each byte, in vocabulary order: printable bytes as themselves, then the other 68."""
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
    # A special token that is spelled out in a text becomes that token, as in Hugging Face's tokenizer.
    result.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (_SOT_TEXT, _EOT_TEXT)])
    return result


# The results of ftfy for these letters, for systems without ftfy.
_COMMON = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        **{"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl", "\ufb06": "st"},
        **{chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)},  # full-width letters
        "\u3000": " ",
        "\ufeff": None,
    }
)


def clean(text: str) -> str:
    """The text as OpenAI's tokenizer cleans it: broken Unicode repaired by ftfy, HTML entities resolved.

    Without ftfy, the common cases are handled here: curly quotes, ligatures, full-width letters, a byte order mark.
    Text in a wrong encoding (mojibake) then gets other ids than OpenAI's.
    """
    if text.isascii():
        return html.unescape(html.unescape(text)) if "&" in text else text
    fix = _ftfy()
    text = text.translate(_COMMON) if fix is None else fix(text)
    return html.unescape(html.unescape(text))


@functools.cache
def _ftfy() -> Callable[[str], str] | None:
    try:
        from ftfy import fix_text
    except ImportError:
        return None
    return fix_text


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, pad: bool = False) -> torch.Tensor:
    """Token ids of one text or of several: int64 (K, L).

    Every row is start-of-text, the words, end-of-text, then zeros. L is the length of the longest row, or with `pad`
    the `context_length`. A text that is too long loses its tail, but not its end-of-text token. With zeros as padding,
    like OpenAI's, `argmax` finds the end-of-text token.

    Raises TypeError for other values than strings, ValueError for an empty list, for a `context_length` below 2, or for
    a text that is not valid Unicode.
    """
    batch = [texts] if isinstance(texts, str) else list(texts)
    if not batch:
        raise ValueError("tokenize got an empty list; give at least one text")
    for index, text in enumerate(batch):
        if not isinstance(text, str):
            raise TypeError(f"tokenize takes strings; item {index} is {type(text).__name__}: {text!r:.80}")
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}; it must hold at least the start and end tokens (2)")
    try:
        encodings = tokenizer().encode_batch_fast([clean(text) for text in batch], add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        for index, text in enumerate(batch):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"text {index} is not valid Unicode (a lone surrogate): {text!r:.80}") from None
        raise
    long = [index for index, encoding in enumerate(encodings) if len(encoding.ids) > context_length - 2]
    if long:
        log.warning(
            "%d of %d texts have more than %d tokens and are cut; the first is %.60r (%d tokens)",
            *(len(long), len(batch), context_length, batch[long[0]], len(encodings[long[0]].ids) + 2),
        )
    rows = [[SOT, *encoding.ids[: context_length - 2], EOT] for encoding in encodings]
    tokens_KL = np.zeros((len(rows), context_length if pad else max(map(len, rows))), np.int64)
    for tokens_L, row in zip(tokens_KL, rows, strict=True):
        tokens_L[: len(row)] = row
    return torch.from_numpy(tokens_KL)
