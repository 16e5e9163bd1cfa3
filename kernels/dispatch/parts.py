"""The parts of a block and their backends as data. One choice per part and kind of call is made once and kept.

A part (a projection, the message path, the attention) is a plain function with several implementations. Nothing of it
is registered with torch: the block around the parts is the unit of autograd and of torch.library (cct_block).
"""

from typing import Any, NamedTuple

import torch

from . import choices, log_once
from .support import Backend, Call, asked


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
    activation: str = "quick_gelu"
    forced: str = ""  # the backend that is asked for
    traced: bool = False  # in a graph: nothing measured is asked
    interpreted: int = 0  # Triton's kernels take tensors that are on no GPU (see dispatch.off_gpu)

    def sizes(self) -> dict[str, Any]:
        """The numbers that the measured table bounds."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "stream": str(self.stream).removeprefix("torch."),
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


def refusal(backend: Backend, case: Case) -> str | None:
    """Why a backend of a part does not take this case, or None."""
    if backend.backward is not None and backend.saved is None and case.traced and case.training:
        return "what it saves for backward is not known when a graph is traced"
    call = Call(case.device, (case.dtype,), case.training, case.interpreted)
    return backend.refusal(call, case)


class Part:
    """A part with its backends in order of preference."""

    def __init__(self, name: str, *backends: Backend) -> None:
        self.name = name
        self.backends = backends
        self.names = tuple(each.name for each in backends)
        PARTS[name] = self

    def refusals(self, case: Case, **sizes: int) -> dict[str, str | None]:
        """Every backend in the order in which it is asked, with the reason why it is not taken, or None.

        Args:
            sizes: more numbers that the measured table bounds.
        """
        measured: tuple[str, ...] = ()
        architecture = None if case.traced else choices.architecture(case.device)
        if architecture is not None and choices.known(self.name):
            measured = choices.order(self.name, architecture, {**case.sizes(), **sizes})
        found = asked(self.backends, case.forced, measured, lambda each: refusal(each, case))
        return {each.name: reason for each, reason in found}

    def choose(self, case: Case, **sizes: int) -> Backend | str:
        """The backend for this case, or every reason why there is none."""
        refusals = self.refusals(case, **sizes)
        for name, reason in refusals.items():
            if reason is None:
                if case.forced in self.names and name != case.forced and not case.traced:
                    log_once(f"{self.name} runs on the backend {name}; {case.forced}: {refusals[case.forced]}")
                return self.backends[self.names.index(name)]
        return "; ".join(f"{self.name} {name}: {reason}" for name, reason in refusals.items())


PARTS: dict[str, Part] = {}
