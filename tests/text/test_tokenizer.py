"""The tokenizer against `transformers.CLIPTokenizer`, built from the same merges table."""

import gzip
import json
import random
import time
from importlib.resources import files

import pytest
import torch

from xclip_fast.text.tokenizer import EOT, SOT, clean, tokenize, tokenizer, vocabulary

HAND_WRITTEN = [
    "",
    " ",
    "\t\n\r\x0b\x0c ",
    "\u00a0\u2003\u3000",
    "a photo of a cat",
    "Riding A Mountain-Bike, fast!!!",
    "playing   volleyball\n(indoor)",
    "it's they've I'M we'LL he'd 'S don't rock'n'roll",
    "café CAFÉ cafe\u0301 naïve façade Ångström Ångström ÅNGSTRÖM",
    "İstanbul ıstanbul ẞ straße ŒUVRE ǅ Σίσυφος ΣΊΣΥΦΟΣ",
    "наука и техника; Київ",
    "中文字幕 日本語のテキスト 한국어 조선글 ㍿",
    "العربية עברית हिन्दी ไทย தமிழ்",
    "👍 👍🏽 👩‍👩‍👧‍👦 🇨🇭 ❤️ 🤷🏾‍♀️ #️⃣",
    "&amp; &lt;b&gt; &#39; &nbsp; &amp;amp; &eacute; &#x1F600;",
    "<b>bold</b> <|startoftext|> a <|endoftext|> b",
    "<|STARTOFTEXT|><|EndOfText|>",
    "x<|endoftext|>",
    "\x00\x01\x02\x1f\x7f\x80\x9f",
    "zero\u200bwidth\u200djoin\ufeffbom\u2060\u00adsoft",
    "½ ² ① Ⅷ ﬁ ﬀ ㎏ ℃ ™",
    "1234567890 3.14 1,000 0x1F 10:30",
    "http://example.org/a_b?c=d&e=f#g",
    "....!!!???---___***",
    "$100 €5 £3 ¥7 ₿1",
    "\U0001d54f\U0001d7d9 \U00010348 \U0010ffff \ufffd \ufffe",
    "a" * 300,
    "word " * 200,
    "word " * 75,
    "word " * 74 + "end",
    "word " * 76,
    "👩‍👩‍👧‍👦" * 60,
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "'",
    '"\'"',
    "\\ / | ~ ` ^",
    "e\u0301\u0302\u0303\u0304 Z̸a̷l̵g̶o̴",
]


def random_strings(count: int) -> list[str]:
    """Seeded mixtures of scripts, marks, controls, emoji, entities and English words, many of them over 77 tokens."""
    ranges = [(0x20, 0x7E)] * 6 + [(0, 0x1F), (0x7F, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x3FF)]
    ranges += [(0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F), (0x2000, 0x206F), (0x2070, 0x214F), (0x3000, 0x30FF)]
    ranges += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFD), (0x1D400, 0x1D7FF), (0x1F1E6, 0x1FAFF)]
    words = ["Riding a bike,", "throwing the ball: don't", "we'll", "CAN'T", "42", "&amp;", "&quot;", "<|endoftext|>"]
    words += ["playing-guitar", "\t", "\n"]
    rng = random.Random(0)
    result = []
    for _ in range(count):
        parts = []
        for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 40])):
            if rng.random() < 0.4:
                parts.append(rng.choice(words))
            else:
                low, high = rng.choice(ranges)
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))))
        result.append(rng.choice(["", " ", " ", "  "]).join(parts))
    return result


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """CLIPTokenizer read from a folder with vocab.json and merges.txt, as published checkpoints hold them.

    The folder comes from the table alone (nothing of ours is called), so a fault in `vocabulary` cannot hide itself.
    """
    transformers = pytest.importorskip("transformers")
    table = gzip.decompress(files("xclip_fast.text").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = table.splitlines()[1:48895]
    hidden = [*range(0, 33), *range(127, 161), 173]
    letters = [chr(b) for b in range(256) if b not in hidden] + [chr(256 + n) for n in range(len(hidden))]
    tokens = letters + [x + "</w>" for x in letters] + ["".join(m.split()) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip_tokenizer")
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_equals_hugging_face(hugging_face):
    texts = HAND_WRITTEN + random_strings(1500)
    expected = hugging_face([clean(text) for text in texts], truncation=True, max_length=77)["input_ids"]
    tokens_KL = tokenize(texts)
    assert tokens_KL.dtype == torch.int64
    assert tokens_KL.shape == (len(texts), 77)
    assert sum(len(row) == 77 for row in expected) > 100  # truncation is exercised
    for text, row, ours in zip(texts, expected, tokens_KL.tolist(), strict=True):
        assert ours[: len(row)] == row, repr(text)
        assert not any(ours[len(row) :]), repr(text)


def test_known_ids():
    assert tokenize("a photo of a cat").tolist() == [[SOT, 320, 1125, 539, 320, 2368, EOT]]
    assert tokenize("").tolist() == [[SOT, EOT]]
    vocab, merges = vocabulary()
    assert len(vocab) == 49408
    assert len(merges) == 48894
    assert (vocab["<|startoftext|>"], vocab["<|endoftext|>"]) == (SOT, EOT)
    assert max(vocab.values()) == EOT


def test_padding_and_trimming():
    texts = ["a cat", "a very long sentence about a cat on a mat", ""]
    trimmed, padded = tokenize(texts), tokenize(texts, pad=True)
    assert padded.shape == (3, 77)
    assert trimmed.shape[1] == int(trimmed[1].argmax()) + 1  # as long as the longest, no longer
    assert torch.equal(trimmed.argmax(-1), padded.argmax(-1))
    assert torch.equal(padded[:, : trimmed.shape[1]], trimmed)
    assert not padded[:, trimmed.shape[1] :].any()


def test_truncation_keeps_the_end_token():
    long = tokenize("word " * 500)
    assert long.shape == (1, 77)
    assert long[0, 0] == SOT
    assert long[0, -1] == EOT
    assert (long == EOT).sum() == 1
    assert tokenize("word " * 500, context_length=10)[0].tolist() == [SOT, *long[0, 1:9].tolist(), EOT]
    assert tokenize("word", context_length=2).tolist() == [[SOT, EOT]]


def test_repeated_calls_do_not_depend_on_each_other():
    before = tokenize(["a cat"])
    tokenize(["x" * 1000], context_length=5)
    assert torch.equal(tokenize(["a cat"]), before)
    assert tokenizer() is tokenizer()
    assert tokenizer().decode(before[0, 1:-1].tolist()).replace("</w>", " ").strip() == "a cat"


def test_bad_input():
    with pytest.raises(ValueError, match="empty list"):
        tokenize([])
    with pytest.raises(TypeError, match="item 1 is bytes"):
        tokenize(["a", b"b"])
    with pytest.raises(TypeError, match="item 0 is NoneType"):
        tokenize([None])
    with pytest.raises(ValueError, match="context_length is 1"):
        tokenize("a", context_length=1)
    with pytest.raises(ValueError, match="text 1 is not valid Unicode"):
        tokenize(["fine", "bad \ud800 text"])


def test_four_hundred_labels_are_quick():
    labels = [f"playing instrument number {n} in a band" for n in range(400)]
    tokenize(labels)
    start = time.perf_counter()
    tokenize(labels)
    assert time.perf_counter() - start < 0.25  # about 10 ms; the slack is for a busy machine


@pytest.mark.parametrize("ftfy", [True, False])
@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("a dog\u2019s \u201cnew\u201d trick", 'a dog\'s "new" trick'),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper \u2018x\u2019", "salt & pepper 'x'"),
        ("the o\ufb03ce \ufb01le", "the office file"),
        ("\uff32\uff35\uff2e\uff01", "run!"),
        ("\ufeffrun", "run"),
    ],
)
def test_text_is_cleaned_as_openai_s_tokenizer_does(given, plain, ftfy, monkeypatch):
    if ftfy:
        pytest.importorskip("ftfy")
    else:
        monkeypatch.setattr("xclip_fast.text.tokenizer._ftfy", lambda: None)
    assert tokenize(given).tolist() == tokenize(plain).tolist()
