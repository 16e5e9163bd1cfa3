"""``trained.json``: the class texts and the frame sampling that a checkpoint was trained with."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Annotated, Any

from ..data.sampling import Sampling
from ..files import read_json
from ..schema import Count, Frames, build
from ..text.labels import plain_name, readable
from ..text.templates import TEMPLATES
from .hub import cached

FILE = "trained.json"  # beside the weights


class _NotBlank:
    def refusal(self, text: str) -> str | None:
        return None if text.strip() else "a text wanted"


Text = Annotated[str, _NotBlank()]


@dataclasses.dataclass(frozen=True)
class Trained:
    """The content of ``trained.json``, which training writes beside the weights.

    Attributes:
        labels: the texts of the classes, by class, in the order of the training data (and of a linear head's outputs).
        frames: T of a view. sampling, stride: as for ``data.sampling.frame_indices``.
        templates: whether a text's features are the mean over the 16 sentences of ``templates.TEMPLATES``.
    """

    labels: dict[str, Text] = dataclasses.field(default_factory=dict)
    frames: Frames | None = None  # None: the model's
    sampling: Sampling = "sparse"
    stride: Count = 1
    templates: bool = False

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, checkpoint: str | os.PathLike[str] | None) -> Trained:
        """Reads the file beside weights: of their folder, of their own file in it, or of a local copy from the Hub.

        If there is no file or no checkpoint, returns the defaults.

        Raises:
            ValueError: if the file is damaged.
        """
        path = cached(checkpoint or "")
        path = (path.parent if path.name == "model.safetensors" else path) / FILE
        if checkpoint is None or not path.is_file():
            return cls()
        try:
            found: Trained = build(cls, read_json(path))
            return found
        except ValueError as error:
            said = str(error).removeprefix(f"{path}: ")
            raise ValueError(f"{path}: {said}; correct it, or delete it and give the options yourself") from error

    def texts(self, classes: Sequence[str], linear_head: bool) -> list[str] | dict[str, str] | None:
        """The ``labels`` of ``evaluate``: each class with its text in training, or its name as words if it is new.

        For a linear head it returns the names of the outputs in order. If they are not known it returns None; then the
        classes must have the order of the training.
        """
        if linear_head:
            return list(self.labels) or None
        known = {plain_name(name): text for name, text in self.labels.items()} | self.labels
        return {name: known.get(name) or known.get(plain_name(name)) or readable(name) for name in classes}

    def choose(
        self,
        frames: int | None = None,
        sampling: Sampling | None = None,
        stride: int | None = None,
        templates: bool | Sequence[str] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """``frames``, ``sampling``, ``stride`` and ``templates`` (sentences or None); missing ones are as trained.

        With another sampling than the trained one, the default stride is 1. Other ``settings`` stay as they are.
        """
        if templates is None:
            templates = self.templates
        sentences = (TEMPLATES if templates else None) if isinstance(templates, bool) else templates
        same = sampling in (None, self.sampling)
        return {
            **settings,
            "frames": frames or self.frames,
            "sampling": sampling or self.sampling,
            "stride": stride or (self.stride if same else 1),
            "templates": sentences or None,
        }
