"""Class names as data sets spell them, and the label of a list that each of them means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence


def readable(name: str) -> str:
    """A class name as words: underscores become blanks, and ``ApplyEyeMakeup`` becomes "Apply Eye Makeup"."""
    words = " ".join(name.replace("_", " ").split())
    return words if " " in words else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)


def plain_name(name: str) -> str:
    """A class name for comparison, without case, blanks, underscores and punctuation.

    ``ApplyEyeMakeup``, ``apply_eye_makeup`` and ``Apply Eye Makeup`` are the same. A name of punctuation alone stays.
    """
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


def candidates(
    classes: Sequence[str], labels: Sequence[str] | Mapping[str, str] | None
) -> tuple[tuple[str, ...], list[str], list[int]]:
    """The names of the labels, their texts, and for each class the index of its label (-1 for none)."""
    if isinstance(labels, str):
        raise ValueError(f"labels {labels!r} is one string; a list of strings wanted")
    names = tuple(classes if labels is None else labels)
    texts = list(labels.values()) if isinstance(labels, Mapping) else list(names)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if not names or repeated:
        what = f"{', '.join(map(repr, repeated[:3]))} more than once" if repeated else "none"
        where = "the manifest's classes" if labels is None else "labels"
        raise ValueError(f"{where}: {what}; at least one name wanted, and each name once (--labels, labels=[...])")
    if labels is None:
        return names, texts, list(range(len(names)))
    exact = {name: index for index, name in enumerate(names)}
    loose: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        loose.setdefault(plain_name(name), []).append(index)
    truth_of_class = []
    for name in classes:
        found = [exact[name]] if name in exact else loose.get(plain_name(name), [])
        if len(found) > 1:
            raise ValueError(
                f"class {name!r} could be {' or '.join(repr(names[i]) for i in found)}; spell it like one of them"
            )
        truth_of_class.append(found[0] if found else -1)
    taken = [index for index in truth_of_class if index >= 0]
    if classes and not taken:
        raise ValueError(
            f"none of the {len(classes)} classes ({', '.join(classes[:3])}, ...) is among the {len(names)} labels "
            f"({', '.join(names[:3])}, ...); spell them alike, or give a mapping from class to text"
        )
    twice = next((index for index, count in Counter(taken).items() if count > 1), None)
    if twice is not None:
        which = [name for name, index in zip(classes, truth_of_class, strict=True) if index == twice]
        raise ValueError(
            f"classes {', '.join(map(repr, which))} all match the label {names[twice]!r}; one class wanted"
        )
    return names, texts, truth_of_class


def refuse_same_texts(texts: Sequence[str], context_length: int) -> None:
    """Raises ValueError if two labels are the same text for the model: each would get half of the probability.

    The model reads the first ``context_length`` tokens, without case.
    """
    from .tokenizer import tokenize

    first: dict[tuple[int, ...], str] = {}
    pairs = []
    for text, row in zip(texts, tokenize(list(texts), context_length).tolist(), strict=True):
        if (tokens := tuple(row)) in first:
            pairs.append(f"{first[tokens]!r:.80} and {text!r:.80}")
        first.setdefault(tokens, text)
    if pairs:
        raise ValueError(
            f"labels that are the same text for the model, which reads {context_length} tokens without case: "
            f"{'; '.join(pairs[:3])}. Leave out one of each, or write different texts"
        )
