"""FP8 inference: the methods ``XCLIP.quantize`` and ``XCLIP.dequantize``. docs/kernels.md describes the scheme.

F frames of all videos, L tokens of a frame, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import kernels
from ..kernels.fp8 import LARGEST
from ..kernels.linear import linear
from ..nn.cct import FastCCTBlock, Stream
from ..nn.fp8 import Fp8Weights

if TYPE_CHECKING:
    from ..model import XCLIP

MODES = ("fp8",)
# Factor of the static scales over the largest value in the calibration. Larger values saturate. e4m3 is a
# floating-point format, so the margin costs accuracy only for the smallest values (docs/kernels.md has figures).
MARGIN = 2.0


def mode_of(model: XCLIP) -> str | None:
    """The mode that ``model`` is quantized to, or None."""
    return "fp8" if any(getattr(block, "fp8", None) is not None for block in _blocks(model)) else None


def quantize(model: XCLIP, mode: Literal["fp8"], *, calibration: Tensor | Iterable[Tensor]) -> XCLIP:
    """Computes the large products of the vision tower in float8 (e4m3), for inference.

    These are the QKV projection of the frame tokens and both layers of the FFN in every block; docs/kernels.md
    describes the scales. It needs the CUDA library, a GPU of compute capability 9.0 and a model in bfloat16.
    Elsewhere float8 is emulated, which is slow.

    The model keeps its weights beside the float8 copies, which take half the memory of bfloat16 weights.
    ``state_dict`` and ``save_pretrained`` write only the weights, so quantization is not saved. It survives ``to``
    (the copies keep their dtypes), copying and ``torch.compile``. Weights that are changed in place are not
    noticed: call ``dequantize`` and quantize again. If this fails, the model is unchanged, except that it is in
    evaluation mode.

    Args:
        mode: "fp8".
        calibration: typical videos, as for ``encode_video``: one batch (B, T, H, W, 3), or an iterable of batches,
            such as ``(batch.frames for batch in loader)``. They are moved to the model's device.

    Returns:
        the model itself, in evaluation mode. Training it, or computing gradients, is an error.

    Raises:
        ValueError: for another mode, for no calibration video or one of a wrong shape, for values that are not
            finite, or for a vision tower without cross-frame communication or quick_gelu.
        TypeError: if ``calibration`` is neither a tensor nor an iterable of tensors.
        RuntimeError: if the model is quantized already.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} given; {' or '.join(map(repr, MODES))} wanted")
    if mode_of(model):
        raise RuntimeError(
            f"the model is quantized to {mode_of(model)} already; to calibrate it again, dequantize() it first"
        )
    blocks = _blocks(model)
    if not all(isinstance(block, FastCCTBlock) for block in blocks):
        raise ValueError(
            "the vision tower has plain blocks (cross_frame=False), and fp8 is only for cross-frame communication "
            "blocks: keep this model in bfloat16"
        )
    if model.config.vision.activation != "quick_gelu":
        raise ValueError(
            f"the vision tower has the activation {model.config.vision.activation!r}; fp8 is only for "
            "'quick_gelu': keep this model in bfloat16"
        )
    model.eval()
    with torch.inference_mode(False), torch.no_grad():  # the buffers stay, so they must not be inference tensors
        largest = hidden_ranges(model, calibration)
        made = []
        for index, block in enumerate(blocks):
            scale = MARGIN * largest[index] / LARGEST if largest[index] else 1.0
            try:
                made.append(
                    Fp8Weights(block.attn.in_proj_weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight, scale)
                )
            except ValueError as error:
                raise ValueError(f"block {index} of the vision tower: {error}") from error
    for block, weights in zip(blocks, made, strict=True):
        block.fp8 = weights
    return model


def dequantize(model: XCLIP) -> XCLIP:
    """Undoes ``quantize``: the model computes as before, to the last bit.

    Returns:
        the model itself. A model that is not quantized stays as it is.
    """
    for block in _blocks(model):
        if isinstance(block, FastCCTBlock):
            block.fp8 = None
    return model


def refuse_change(model: Any, what: str) -> None:
    """Raise RuntimeError if weights that ``what`` would change have float8 copies, which would stay the same."""
    if mode_of(model):
        raise RuntimeError(
            f"{what} changes weights, and this model computes with {mode_of(model)} copies of the old ones: "
            "dequantize() it first, and quantize() it afterwards"
        )


def hidden_ranges(model: Any, calibration: Tensor | Iterable[Tensor]) -> list[float]:
    """The largest |quick_gelu(u)| in each block of the vision tower over the calibration videos.

    Args:
        calibration: as for ``XCLIP.quantize``.
    """
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    elif not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration is a {type(calibration).__name__}; a batch of videos, or an iterable of batches, wanted"
        )
    largest = [0.0] * len(_blocks(model))
    videos = 0
    with _observed(model) as seen:
        for number, video in enumerate(calibration):
            video = video.to(model.visual.conv1.weight.device) if isinstance(video, Tensor) else video
            model.encode_video(video)  # raises if it is not a video
            videos += len(video)
            for index, value in enumerate(seen):
                if len(video) and not value.isfinite():
                    raise ValueError(
                        f"calibration batch {number}: the activations of block {index} are not finite: look for NaN "
                        "in the videos and in the weights"
                    )
                largest[index] = max(largest[index], value.item())
    if not videos:
        raise ValueError("calibration has no video; a few dozen that are like those to come are wanted")
    return largest


@contextlib.contextmanager
def _observed(model: Any) -> Iterator[list[Tensor]]:
    """In the block, each forward writes the largest |quick_gelu(u)| of every block into the list."""
    blocks = _blocks(model)
    seen = [torch.zeros(()) for _ in blocks]

    def observe(index: int, block: FastCCTBlock, args: tuple[Any, ...]) -> None:
        x_FLD, frames = args
        norm, fc = block.ln_2, block.mlp.c_fc
        z_FLD = block.diffuse(Stream(x_FLD).with_spare_row(), frames)[:, :-1]  # without the spare row
        hidden = linear(kernels.layer_norm(z_FLD, norm.weight, norm.bias, norm.eps), fc.weight, fc.bias)
        hidden = kernels.quick_gelu(hidden)
        seen[index] = hidden.abs().amax() if hidden.numel() else hidden.new_zeros(())

    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(
                lambda block, args, index=index: observe(index, block, args),
            )
            hooks.callback(handle.remove)
        yield seen


def _blocks(model: Any) -> list[Any]:
    return list(model.visual.transformer.resblocks)
