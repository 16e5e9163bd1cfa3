"""The shapes that tuning measures: those of one model at a few numbers of videos."""

from ..common.example import Sizes

SHAPES = {
    "B/32": Sizes(patch=32),
    "B/16": Sizes(),
    "L/14": Sizes(width=1024, patch=14),
    "L/14@336": Sizes(width=1024, patch=14, image=336, frames=16),
}
BATCHES = (1, 32)  # videos
LENGTHS = tuple(sorted({shape.tokens for shape in SHAPES.values()}))


def boundaries(values: tuple[int, ...], value: int) -> list[int]:
    """The range of sizes that a measured value stands for: up to the middle, by ratio, of its neighbors."""
    index = values.index(value)
    low = 0 if index == 0 else int((values[index - 1] * value) ** 0.5) + 1
    high = 2**31 - 1 if index == len(values) - 1 else int((value * values[index + 1]) ** 0.5)
    return [low, high]
