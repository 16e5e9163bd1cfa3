"""The parts of a block and their backends as data. One choice per part and kind of call is made once and kept.

A part (a projection, the message path, the attention) is a plain function with several implementations. Nothing of it
is registered with torch: the block around the parts is the unit of autograd and of torch.library (cct_block).
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import choices

HALF = (torch.bfloat16, torch.float16)
UNMEASURED = (
    "not measured on this GPU, so taken only if asked for (XCLIP_FAST_BACKEND or backend(...)); "
    "xclip-fast tune measures"
)


class Case(NamedTuple):
    """What a choice depends on: one kind of call of a block."""

    device: torch.device
    dtype: torch.dtype  # of the weights, and so of products and attention
    stream: torch.dtype  # of the residual stream
    sequences: int  # F frames, labels
    length: int  # rows of a sequence; of the longest label where labels are packed
    rows: int  # of all sequences
    heads: int
    channels: int  # of a head
    width: int
    hidden: int  # of the FFN
    frames: int = 0  # T; 0: a block without a message
    causal: bool = False
    packed: bool = False  # sequences of unequal length, one after another
    windows: int = 0  # W, of the bias on the scores; 0: without
    training: bool = False
    drops: bool = False  # drop path factors are given
    activation: str = "quick_gelu"
    forced: str = ""  # the backend that is asked for
    traced: bool = False  # in a graph: nothing measured is asked
    interpreted: int = 0  # Triton's kernels take tensors that are on no GPU (see dispatch.off_gpu)

    def sizes(self) -> dict[str, Any]:
        """The numbers that the measured table bounds."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "training": self.training,
            "m": self.sequences,
            "rows": self.rows,
            "length": self.length,
            "heads": self.heads,
            "channels": self.channels,
            "k": self.width,
            "frames": self.frames,
            "causal": self.causal,
        }


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of a part and what it supports. What the functions take is said where the part is defined."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    dtypes: tuple[torch.dtype, ...] = HALF
    device_types: tuple[str, ...] = ("cuda",)  # empty: any
    capability: int = 0  # the least major compute capability
    package: str = ""
    install: str = ""  # the command that installs the package
    opt_in: str = ""  # why it is taken only where it is asked for or was measured
    inference_only: bool = False
    refuse: Callable[[Case], str | None] | None = None  # what the fields cannot say
    # empty tensors of the kind that forward saves; None: not known beforehand, so it does not train in a traced graph
    saved: Callable[..., tuple[torch.Tensor, ...]] | None = None

    def refusal(self, case: Case) -> str | None:
        """Why it does not take this case, or None."""
        if self.inference_only and case.training:
            return "it computes no gradients"
        if self.backward is not None and self.saved is None and case.traced and case.training:
            return "what it saves for backward is not known when a graph is traced"
        if self.package and not installed(self.package):
            return f"the package {self.package} is not installed ({self.install or f'pip install {self.package}'})"
        if case.dtype not in self.dtypes:
            return f"dtype {case.dtype} is not among {', '.join(str(dtype) for dtype in self.dtypes)}"
        assumed = case.interpreted > 1
        interpreted = assumed or (self.name == "triton" and case.interpreted)
        if self.device_types and case.device.type not in self.device_types and not interpreted:
            return f"device {case.device.type} is not {' or '.join(self.device_types)}"
        if self.capability and (assumed or case.device.type == "cuda"):
            major = case.interpreted // 10 if assumed else torch.cuda.get_device_properties(case.device).major
            if major < self.capability:
                return f"compute capability {major}.x is below {self.capability}.0"
        return self.refuse(case) if self.refuse else None


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a part of a package whose parent is missing
        return False


# what torch.compiler.assume_constant_result does, which would import the compiler with this package
installed._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Part:
    """A part with its candidates in order of preference."""

    def __init__(self, name: str, *candidates: Candidate) -> None:
        self.name = name
        self.candidates = candidates
        self.names = tuple(candidate.name for candidate in candidates)
        PARTS[name] = self

    def order(self, case: Case, **sizes: int) -> tuple[list[Candidate], tuple[str, ...]]:
        """The candidates to ask, the first choice first, and those that were measured for such a case.

        Args:
            sizes: more numbers that the measured table bounds.
        """
        if case.forced in self.names:
            asked = [candidate for candidate in self.candidates if candidate.name == case.forced]
            if asked[0].inference_only:
                asked += [candidate for candidate in self.candidates if candidate.name != case.forced]
            return asked, ()
        measured: tuple[str, ...] = ()
        architecture = None if case.traced else choices.architecture(torch.empty(0, device=case.device))
        if architecture is not None and case.stream == case.dtype and choices.known(self.name):
            measured = choices.order(self.name, architecture, {**case.sizes(), **sizes})
        names = (*measured, *self.names)
        return sorted(self.candidates, key=lambda candidate: names.index(candidate.name)), measured

    def refusals(self, case: Case, **sizes: int) -> dict[str, str | None]:
        """Every candidate in order, each with the reason why it is not taken, or None."""
        candidates, measured = self.order(case, **sizes)
        return {
            candidate.name: candidate.refusal(case)
            or (None if candidate.name in (case.forced, *measured) else candidate.opt_in or None)
            for candidate in candidates
        }

    def choose(self, case: Case, **sizes: int) -> Candidate | str:
        """The candidate for this case, or every reason why there is none."""
        refusals = self.refusals(case, **sizes)
        for name, reason in refusals.items():
            if reason is None:
                return self.candidates[self.names.index(name)]
        return "; ".join(f"{self.name} {name}: {reason}" for name, reason in refusals.items())


PARTS: dict[str, Part] = {}
