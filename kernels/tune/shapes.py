"""The shapes that tuning measures: those of one model at a few numbers of videos."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A video tower: D, L of a frame with its class token, pixels a side of a frame and of a patch, T."""

    width: int
    tokens: int
    image: int
    patch: int
    frames: int = 8

    def rows(self, batches: tuple[int, ...]) -> tuple[int, ...]:
        """M of the tower's products, for each number of videos."""
        return tuple(self.frames * self.tokens * batch for batch in batches)


SHAPES = {
    "B/32": Shape(768, 50, 224, 32),
    "B/16": Shape(768, 197, 224, 16),
    "L/14": Shape(1024, 257, 224, 14),
    "L/14@336": Shape(1024, 577, 336, 14, frames=16),
}
BATCHES = (1, 32)  # videos
LENGTHS = tuple(sorted({shape.tokens for shape in SHAPES.values()}))


def boundaries(values: tuple[int, ...], value: int) -> list[int]:
    """The range of sizes that a measured value stands for: up to the middle, by ratio, of its neighbours."""
    index = values.index(value)
    low = 0 if index == 0 else int((values[index - 1] * value) ** 0.5) + 1
    high = 2**31 - 1 if index == len(values) - 1 else int((value * values[index + 1]) ** 0.5)
    return [low, high]
