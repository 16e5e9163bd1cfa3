"""Generated action labels for the benchmarks: any number of different ones, the same in each run."""

from __future__ import annotations

import random
from argparse import ArgumentTypeError
from pathlib import Path

VERBS = (
    "riding throwing catching washing painting folding climbing cutting carving pushing pulling opening cooking "
    "juggling kicking drawing building fixing playing shaking tying cleaning driving lifting balancing"
)
THINGS = (
    "horse ball dishes wall paper tree onion pumpkin cart rope bottle eggs pencil snowman bicycle drums tie window "
    "tractor weights bowling guitar hair shoes kite"
)
KINDS = "small big old red wooden heavy broken new wet round"
PLACES = "outdoors underwater indoors quickly slowly together backwards alone"
MOST = 10_000


def label_list(count: int) -> list[str]:
    """``count`` (1 to ``MOST``) different action phrases of 1 to 4 words, mostly two."""
    rng = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        verb, kind, thing, place = (rng.choice(words.split()) for words in (VERBS, KINDS, THINGS, PLACES))
        phrases = [verb, f"{verb} {thing}", f"{verb} {kind} {thing}", f"{verb} {kind} {thing} {place}"]
        found.setdefault(rng.choices(phrases, weights=(1, 5, 3, 1))[0])
    return list(found)


def read_labels(given: str) -> list[str]:
    """The labels of ``--labels``: a number of generated ones, or a text file with one on each line."""
    if given.isdecimal():
        if not 1 <= int(given) <= MOST:
            raise ArgumentTypeError(f"{given}: a number from 1 to {MOST} wanted, or a text file with one label a line")
        return label_list(int(given))
    try:
        labels = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArgumentTypeError(f"{given}: neither a number nor a readable text file: {reason}") from error
    if not labels:
        raise ArgumentTypeError(f"{given}: the file holds no labels")
    return labels
