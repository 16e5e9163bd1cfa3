"""CUDA graphs of inference, for small batches, whose kernels take less time than their launches.

A graph replays the launches of one ``encode_video``, and if wanted of the ``similarity`` behind it, on the same memory:
its own buffers for input and results, and the weights. So it sees weights that changed in place. A check in each call
finds tensors that have moved; most of it runs on the CPU while the GPU already computes.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels import forced_backend
from ..kernels.dispatch import autocast_dtype
from ..nn.checks import check_video
from ..nn.features import VideoFeatures

if TYPE_CHECKING:
    from ..model import XCLIP

logger = logging.getLogger("xclip_fast")

TOPS = ("visual", "mit", "prompts_visual_ln", "prompts_generator", "head")  # what inference runs of a model
WARM_UPS = 3  # as torch.cuda.make_graphed_callables; the first one loads kernels and lets cuDNN plan

# Captures take turns, and so do the replays on one device, whatever their thread and stream: they share buffers.
_turn = threading.Lock()
_ended: dict[torch.device, torch.cuda.Event] = {}


class GraphedVideoTower:
    """``encode_video`` of at most ``batch`` videos of ``frames`` frames as CUDA graphs; ``XCLIP.graphed`` makes one.

    There is one graph for each dtype of the videos, backend and autocast dtype, and for ``logits`` one for each number
    and dtype of labels. The first call that needs a graph captures it, which takes as long as several eager calls. A
    graph keeps its own memory for its input, its results and all between them.

    Weights may change in place between calls (``load_state_dict``, an optimizer). If a parameter, a buffer or a module
    of the tower was replaced or moved (``to``, ``load_state_dict(assign=True)``), the next call captures again. Other
    settings of torch (TF32, its attention kernels) and forward hooks act when a graph is captured, not when it is
    replayed: call ``clear`` after changing them.
    """

    def __init__(self, model: XCLIP, batch: int, frames: int) -> None:
        for name, number in (("batch", batch), ("frames", frames)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} {number!r} given; a whole number of at least 1 wanted")
        _cuda_device(model)
        self.model, self.batch, self.frames = model, batch, frames
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._tower = _Tower(model)

    def __call__(self, video: Tensor) -> VideoFeatures:
        """Encode videos, with the same numbers as ``encode_video`` on ``batch`` videos.

        Args:
            video: as for ``encode_video``, of at most ``batch`` videos and exactly ``frames`` frames, on any device.
                Fewer videos take as long as ``batch`` videos.

        Returns:
            as ``encode_video``; copies that no later call changes.

        Raises:
            ValueError: if the video has another shape or dtype, or the model is not on a CUDA device.
            RuntimeError: if a gradient is required, the model is in training mode, or a CUDA graph is being captured.
        """
        return VideoFeatures(*self._replay(video))

    def logits(self, video: Tensor, text_features: Tensor | None = None) -> Tensor:
        """``similarity(encode_video(video), text_features)`` as one graph: one launch for a whole answer.

        Args:
            video: as for a call.
            text_features: (K, E), from ``encode_text``; None for a model with ``num_classes``.

        Returns:
            (B, K), float32 (or float64).

        Raises:
            as a call, and as ``similarity``.
        """
        return self._replay(video, True, text_features)[0]

    def _replay(self, video: Tensor, answers: bool = False, text_KE: Tensor | None = None) -> tuple[Tensor, ...]:
        """Copies of the features, or of the logits if it ``answers``."""
        check_video(self.model, video)
        count, frames = video.shape[:2]
        if count > self.batch or frames != self.frames:
            raise ValueError(
                f"{count} videos of {frames} frames given; at most {self.batch} of exactly {self.frames} wanted: take "
                f"model.graphed({count}, {frames}) for these, or model.encode_video"
            )
        device = _cuda_device(self.model)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and another cannot be replayed in it: call encode_video there"
            )
        text = None if text_KE is None else (text_KE.dtype, text_KE.shape)
        key = (video.dtype, autocast_dtype("cuda"), forced_backend(), answers, text)
        with _turn, torch.cuda.device(device):
            results = None
            captured = self._captured.get(key)
            # The GPU computes while the rest is looked at: as long as all tensors lie where they lay, a replay reads
            # no memory that is freed.
            if captured is not None and self._tower.stayed():
                results = captured.replay(video, text_KE)
            changed = self._tower.change()
            if changed:
                self._forget()
                logger.info("CUDA graphs of the video tower are captured again: %s", changed)
                self._tower = _Tower(self.model)
                results = None
            self._tower.check(*((video,) if text_KE is None else (video, text_KE)))
            if results is None:
                results = (self._captured.get(key) or self._capture(key, device)).replay(video, text_KE)
        return results

    def clear(self) -> None:
        """Free the graphs and their memory; the next call captures again."""
        with _turn:
            self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        # a pickled or copied model captures its own graphs
        return type(self.model).graphed, (self.model, self.batch, self.frames)

    def _forget(self) -> None:
        for captured in self._captured.values():
            torch.cuda.synchronize(captured.video.device)  # the last replay may still run
        self._captured.clear()

    def _capture(self, key: tuple[Any, ...], device: torch.device) -> _Captured:
        size = self.model.config.vision.image_size
        dtype, autocast_to, _, answers, text = key
        shape = (size, size, 3) if dtype == torch.uint8 else (3, size, size)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        # Autocast's cache would leave the casts of weights out of the graph, which would then read freed copies.
        autocast = torch.autocast("cuda", autocast_to, autocast_to is not None, cache_enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            video = torch.zeros(self.batch, self.frames, *shape, dtype=dtype, device=device)
            text_KE = None if text is None else torch.ones(text[1], dtype=text[0], device=device)

            def compute() -> tuple[Tensor, ...]:
                features = self.model.encode_video(video)
                return (self.model.similarity(features, text_KE),) if answers else features

            stream.wait_stream(torch.cuda.current_stream())
            # also around the capture: torch.cuda.graph leaves its stream current when a capture fails
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    compute()
                # cuBLAS keeps a workspace for each stream. The graph must not use an existing one: once freed, the
                # replays would still write to it (pytorch/pytorch#193402; torch.compile's graphs free all). So the
                # capture makes its own, in the graph's memory, and nothing else uses it afterwards.
                torch._C._cuda_clearCublasWorkspaces()
                # thread_local: other threads, such as a loader's that pins memory, may go on
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    results = compute()
                torch._C._cuda_clearCublasWorkspaces()
        self._captured[key] = _Captured(graph, video, text_KE, results)
        return self._captured[key]


@dataclasses.dataclass(frozen=True)
class _Captured:
    """A graph, its inputs and its results."""

    graph: torch.cuda.CUDAGraph
    video: Tensor
    text: Tensor | None
    results: tuple[Tensor, ...]

    @torch.no_grad()  # inputs that require a gradient are refused only afterwards: the buffers must not record them
    def replay(self, video: Tensor, text_KE: Tensor | None) -> tuple[Tensor, ...]:
        """Copies of the results for this input."""
        device, count = self.video.device, video.shape[0]
        stream, ended = torch.cuda.current_stream(), _ended.setdefault(device, torch.cuda.Event())
        stream.wait_event(ended)
        self.video[:count].copy_(video)
        if self.text is not None and text_KE is not None:
            self.text.copy_(text_KE)
        self.graph.replay()
        results = tuple(part[:count].clone() for part in self.results)
        ended.record(stream)
        return results


class _Tower:
    """The modules of the video tower and behind it, and the addresses of their tensors, which a capture relies on."""

    def __init__(self, model: XCLIP) -> None:
        self.model = model
        self.tops = self._tops()
        modules = [module for top in self.tops if isinstance(top, nn.Module) for module in top.modules()]
        self.modules = modules
        self.children = [(module._modules, *item) for module in modules for item in module._modules.items()]
        stores = [store for module in modules for store in (module._parameters, module._buffers)]
        self.tensors: list[tuple[dict[str, Any], str]] = [(store, name) for store in stores for name in store]
        self.tensors += [(model._parameters, name) for name in ("prompts_visual_proj", "logit_scale", "logit_bias")]
        self.places = self._places()
        held = [(pair, place[0]) for pair, place in zip(self.tensors, self.places, strict=True) if place is not None]
        self.held, self.addresses = [pair for pair, _ in held], [address for _, address in held]

    def _tops(self) -> list[nn.Module | None]:
        return [getattr(self.model, name, None) for name in TOPS]

    def _places(self) -> list[tuple[Any, ...] | None]:
        tensors = [store.get(name) for store, name in self.tensors]
        return [t if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]

    def stayed(self) -> bool:
        """Whether all tensors lie where they lay; for B/16 this takes a fifth of the CPU time of ``change``."""
        try:
            return [store[name].data_ptr() for store, name in self.held] == self.addresses
        except (KeyError, AttributeError):  # one is gone, or None
            return False

    def change(self) -> str | None:
        """What was replaced or moved since, or None."""
        if any(now is not then for now, then in zip(self._tops(), self.tops, strict=True)):
            return "a part of the model was replaced"
        for store, name, child in self.children:
            if store.get(name) is not child:
                return f"the module {name} was replaced"
        places = self._places()
        if places == self.places:
            return None
        moved = next(
            name for (_, name), now, then in zip(self.tensors, places, self.places, strict=True) if now != then
        )
        return f"the tensor {moved} was replaced, moved or cast"

    def check(self, *given: Tensor) -> None:
        """Raises RuntimeError where a replay would differ from the eager tower."""
        if any(module.training for module in self.modules):
            raise RuntimeError(
                "the model is in training mode, in which its results are random: call model.eval() first"
            )
        if torch.is_grad_enabled():
            tensors = [*given, *(store.get(name) for store, name in self.tensors)]
            if any(tensor is not None and tensor.requires_grad for tensor in tensors):
                raise RuntimeError(
                    "a gradient is required, and a CUDA graph has no backward pass: call it under "
                    "torch.inference_mode() or torch.no_grad(), or call model.encode_video instead"
                )


def _cuda_device(model: XCLIP) -> torch.device:
    device = model.visual.proj.device
    if device.type != "cuda":
        raise ValueError(
            f"the model is on the device {device}; CUDA graphs need a CUDA device: move it there with "
            "model.to('cuda'), or call model.encode_video, which runs anywhere"
        )
    return device
