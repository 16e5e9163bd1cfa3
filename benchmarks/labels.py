"""Generated action labels for the benchmarks: any number of different ones, the same in each run."""

from __future__ import annotations

import random

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
