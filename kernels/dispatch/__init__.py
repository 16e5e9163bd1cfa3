"""Picks a backend for each op, and runs it.

On a GPU the order of the backends is that of the measured table (choices.py) where it has a row, else the op's own.
``XCLIP_FAST_BACKEND`` (read once, at import) or ``with backend("triton"):`` overrides the choice.

A backend is either plain torch calls, differentiated by autograd, or a kernel with a backward of its own. Eager
calls run the chosen backend directly, because a registered Python op costs tens of microseconds. While torch.compile
or torch.export traces, plain torch calls are traced through, and a kernel is entered through its registered op
(registration.py).
"""

import contextlib
import inspect
import logging
import os
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.example import Maker, Sizes
from . import choices, registration
from .support import Backend, Call, asked

logger = logging.getLogger("xclip_fast")

OPS: dict[str, "Op"] = {}
_names = {"onednn"}  # of all backends


class BackendError(RuntimeError):
    """No backend takes these arguments; the message holds every backend's reason."""


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether Triton's kernels take tensors that are on no GPU, if they are asked for. A compute capability (90 for 9.0):
# every choice is that of such a GPU, wherever the tensors are (fake_gpu.py).
off_gpu = int(INTERPRETED)


def backends() -> tuple[str, ...]:
    """The names of all backends: those of the ops, those of the parts of a block, and onednn (cpu/)."""
    return tuple(sorted(_names))


def _checked(name: str) -> str:
    if name != "auto" and name not in _names:
        raise ValueError(f"no backend is called {name!r}; choose one of auto, {', '.join(backends())}")
    return name


_forced = os.environ.get("XCLIP_FAST_BACKEND") or "auto"  # checked at the first call


def forced_backend() -> str:
    """The backend that is asked for, or ``"auto"``."""
    return _forced


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every op that has it, in this process, until the block ends.

    Args:
        name: ``"auto"`` or one of ``backends()``. An op without that backend keeps the automatic choice.

    Raises:
        ValueError: if there is no such backend. An op that has the backend but cannot use it for its arguments
            raises ``BackendError`` with the reasons.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


class Op:
    """An op: its reference, its other backends in order of preference, and its torch.library registration.

    The reference is plain differentiable torch on any device and dtype.

    Args:
        reference: its name, without ``_reference``, is the op's.
        backends: the others; the reference comes last.
        example: makes the op's arguments from ``example.Sizes`` and ``example.Maker``. Tests, benchmarks and ``info``
            call the op with them.
        saved: for kernels: the tensors (as empty ones) that ``forward(True, *args)`` saves.
        autocast: the arguments that kernels take in the dtype of an enclosing ``torch.autocast``. Plain torch calls
            obey autocast themselves.
        sizes: of the arguments, by name: what the speed of the backends depends on. None: not in the measured table.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        *backends: Backend,
        example: Callable[[Sizes, Maker], tuple[Any, ...]],
        saved: Callable[..., tuple[Tensor, ...]] = lambda *_: (),
        autocast: tuple[str, ...] = (),
        sizes: Callable[..., dict[str, int]] | None = None,
    ) -> None:
        self.name = reference.__name__.removesuffix("_reference")
        self.reference = reference
        self.example = example
        self.saved = saved
        self.sizes = sizes
        self.backends = (*backends, Backend("reference", reference))
        self.names = tuple(name for candidate in self.backends for name in (candidate.name, *candidate.parts))
        returned = inspect.signature(reference, eval_str=True).return_annotation
        self.outputs = len(typing.get_args(returned)) or 1
        parameters = list(inspect.signature(reference).parameters)
        self.autocast = tuple(parameters.index(name) for name in autocast)
        OPS[self.name] = self
        _names.update(self.names)
        self.registered, self.registered_saving = registration.register(self)

    def asked(self, args: tuple[Any, ...], training: bool = False) -> Iterator[tuple[Backend, str | None]]:
        """The backends in the order in which they are asked, each with the reason why it is not taken, or None."""
        forced, tensors = _checked(_forced), [arg for arg in args if isinstance(arg, Tensor)]
        interpreted = off_gpu if off_gpu > 1 or forced == "triton" else 0
        dtypes = [each.dtype for each in tensors]
        floats = [each for each in dtypes if each.is_floating_point or each.is_complex]
        call = Call(tensors[0].device, floats, training, interpreted)
        measured = () if forced in self.names else self._measured(args, training)
        return asked(self.backends, forced, measured, lambda each: each.refusal(call, *args))

    def reasons(self, args: tuple[Any, ...], training: bool = False) -> dict[str, str | None]:
        """Why each backend is not taken, or None: it could be."""
        reasons = {each.name: reason for each, reason in self.asked(args, training)}
        return {each.name: reasons.get(each.name, f"backend {_forced} was asked for") for each in self.backends}

    def choose(self, args: tuple[Any, ...], training: bool = False, kernels: bool = False) -> Backend:
        """The backend for these arguments; ``BackendError`` with every reason if there is none.

        Args:
            training: gradients are wanted.
            kernels: only those with a backward of their own will do.
        """
        compiling = torch.compiler.is_compiling()
        if _forced != "auto" and _forced not in self.names and not compiling:
            log_once(f"{self.name} has no backend {_checked(_forced)}; the choice is automatic")
        reasons: list[str] = []
        for each, reason in self.asked(args, training):
            if kernels and each.backward is None:
                continue
            if reason is None:
                # on a CPU nothing else than a fallback is expected
                if reasons and not compiling and any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
                    log_once(f"{self.name} runs on the backend {each.name}; {'; '.join(reasons)}")
                return each
            reasons.append(f"{each.name}: {reason}")
        shapes = ", ".join(f"{tuple(arg.shape)} {arg.dtype}" for arg in args if isinstance(arg, Tensor))
        forced = f" (backend {_forced!r} was asked for)" if _forced in self.names else ""
        raise BackendError(f"no backend of {self.name} takes ({shapes}){forced}: {'; '.join(reasons)}")

    def _measured(self, args: tuple[Any, ...], training: bool) -> tuple[str, ...]:
        """The backends that were measured for such arguments on this GPU, the fastest first; none if nothing was.

        While torch.compile or torch.export traces, none: kernels that a graph enters by their registered ops choose
        when they run.
        """
        if self.sizes is None or torch.compiler.is_compiling() or not choices.known(self.name):
            return ()
        architecture = choices.architecture(args[0].device)
        if architecture is None:
            return ()
        dtype = args[self.autocast[0] if self.autocast else 0].dtype
        mixed = args[0].is_floating_point() and args[0].dtype != dtype
        if mixed or torch.is_autocast_enabled(args[0].device.type):
            return ()  # everything is measured in one dtype
        where = {"dtype": str(dtype).removeprefix("torch."), "training": training, **self.sizes(*args)}
        return choices.order(self.name, architecture, where)

    def __call__(self, *args: Any) -> Any:
        training = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        chosen = self.choose(args, training)
        if chosen.backward is None:
            return chosen.forward(*args)
        if torch.compiler.is_compiling():
            args = self.lowered(args)
            outputs = self.registered_saving(*args) if training else self.registered(*args)
        elif training:
            outputs = _Kernel.apply(self, chosen, *args)
        else:
            outputs = chosen.forward(False, *self.lowered(args))[0]
        return outputs[0] if self.outputs == 1 else tuple(outputs[: self.outputs])

    def lowered(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments under the enclosing autocast; in eager mode without a gradient through the casts."""
        if not self.autocast:
            return args
        dtype = autocast_dtype(next(arg.device.type for arg in args if isinstance(arg, Tensor)))
        if dtype is None:
            return args
        result = list(args)
        wide = [index for index in self.autocast if args[index] is not None and args[index].dtype != dtype]
        if torch.compiler.is_compiling():
            for index in wide:
                result[index] = args[index].to(dtype)
        elif wide:
            casts = [torch.empty_like(args[index], dtype=dtype) for index in wide]
            torch._foreach_copy_(casts, [args[index] for index in wide])  # one launch for all weights
            for index, cast in zip(wide, casts, strict=True):
                result[index] = cast
        return tuple(result)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the enclosing autocast on such a device, None outside of one."""
    # meta has no autocast: torch.amp.is_autocast_available says so too, but torch 2.11 cannot trace it
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Warn, unless the same was said before."""
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)


class _Kernel(torch.autograd.Function):
    """A kernel in eager mode: saves its arguments and what its forward hands over.

    Autocast's casts are inside, so that backward knows the dtypes of the parameters and computes gradients in them.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, chosen: Backend, *args: Any) -> tuple[Tensor, ...]:
        ctx.dtypes = [arg.dtype if isinstance(arg, Tensor) else None for arg in args]
        args = op.lowered(args)
        outputs, saved = chosen.forward(True, *args)
        ctx.chosen = chosen
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])  # row statistics: the first output alone has a gradient
        registration.save(ctx, args, saved)
        return outputs

    @staticmethod
    @once_differentiable  # else a gradient of a gradient would silently lack what a kernel computed
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
        needs = [dtype if need else None for dtype, need in wanted]
        args, saved = registration.restore(ctx)
        result = iter(ctx.chosen.backward(grads, saved, needs, *args))
        return (None, None, *(next(result) if need else None for need in needs))
