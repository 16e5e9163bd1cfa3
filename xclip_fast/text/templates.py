"""Sentences around a label: the prompt ensemble of Table 9 (paper, section 4.5)."""

from __future__ import annotations

from collections.abc import Sequence

# "{}" stands for the label, which names an action: "riding a bike", "swimming"
TEMPLATES: tuple[str, ...] = (
    "{}",
    "a video of {}.",
    "a short clip that shows {}.",
    "several frames of {}, one after another.",
    "someone is {}.",
    "two people are {} together.",
    "a child is {}.",
    "people can be seen {} outdoors.",
    "people can be seen {} indoors.",
    "an example of {}.",
    "this is what {} looks like.",
    "a recording from a phone: {}.",
    "seen from close by: {}.",
    "seen from far away: {}.",
    "a blurred, moving picture of {}.",
    "the action in this video is {}.",
)


def fill(labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every label in every template: all sentences of the first label, then of the next.

    Raises:
        ValueError: if there is no template, or a template does not have exactly one ``{}``.
    """
    if isinstance(templates, str) or not templates:
        raise ValueError(
            f"templates is {templates!r}; a sequence of sentences wanted, with {{}} in the place of the label"
        )
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"each template needs exactly one {{}}, in the place of the label; these differ: {wrong}")
    return [template.replace("{}", label) for label in labels for template in templates]
