"""The NVIDIA DALI 2 pipeline that decodes videos and cuts views.

DALI (2.4) converts every video to RGB by the BT.601 matrix. For a video tagged BT.709, a linear map turns the result
into that of its own matrix; the map is part of the sample's color matrix. Values that the wrong matrix cut off at 0 or
255 stay wrong: those of strongly saturated colors. Over all RGB colors the largest channel's error has a median of 1
level, a 90th percentile of 8 and a maximum of 37. Without the map the median is 11 and the 90th percentile 22.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..decode.dali_support import BT709
from ..transforms import View


def _matrix(red: float, blue: float) -> np.ndarray:
    """Y'CbCr to R'G'B' for these luma weights of red and blue: float64 (3, 3)."""
    green = 1 - red - blue
    r, b = 2 * (1 - red), 2 * (1 - blue)
    return np.array([[1, 0, r], [1, -b * blue / green, -r * red / green], [1, b, 0]])


# From RGB by the BT.601 matrix to RGB by the BT.709 matrix, for full and limited range alike.
CORRECTION = _matrix(0.2126, 0.0722) @ np.linalg.inv(_matrix(0.299, 0.114))


def color_of(view: View, colorspace: int) -> np.ndarray:
    """float32 (3, 4): the color matrix of the view for frames as DALI decodes them."""
    color = np.eye(3, 4) if view.color is None else view.color.astype(np.float64)
    if colorspace == BT709:
        color = np.column_stack([color[:, :3] @ CORRECTION, color[:, 3]])
    return color.astype(np.float32)


def make_pipeline(*, views: int, size: int, batch_size: int, threads: int, device_id: int | None) -> Any:
    """The DALI pipeline, not built yet. `device_id=None`: the same graph with CPU operators.

    `run(**inputs)` takes for each input a list with one array for each sample (U: different frames of the sample):
    encoded uint8 (bytes,), frames int32 (U,) ascending, order int32 (V, T) into those; start, shape and corner int32
    (V, 2) as (x, y); scaled float32 (V, 2) as (height, width); flip int32 (V,), color float32 (V, 3, 4).
    The output is uint8 (T, S, S, 3) for each sample, (V, T, S, S, 3) for V > 1.

    The frames of all views are decoded once, and each view is a branch of the graph. Otherwise three crops of a clip
    would decode it three times.
    """
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=1,  # several pipelines run side by side instead
        exec_dynamic=True,  # outputs belong to their holder, and a failed run does not end the pipeline
    )
    def graph() -> Any:
        def given(name: str, ndim: int, dtype: Any = types.INT32) -> Any:
            return fn.external_source(name=name, ndim=ndim, dtype=dtype)

        start, shape, corner, flip = given("start", 2), given("shape", 2), given("corner", 2), given("flip", 1)
        order, scaled, color = given("order", 2), given("scaled", 2, types.FLOAT), given("color", 3, types.FLOAT)
        video = fn.decoders.video(
            given("encoded", 1, types.UINT8),
            device="cpu" if device_id is None else "mixed",
            frames=given("frames", 1),
            pad_mode="none",  # a missing frame is an error, not a copy of another
            build_index=True,
            affine=False,  # pinned threads of several processes would share the first cores
        )
        done = []
        for view in range(views):
            x = fn.slice(video, start[view], shape[view], axis_names="WH")
            x = fn.sequence_rearrange(x, new_order=order[view])
            x = fn.resize(x, size=scaled[view], interp_type=types.INTERP_LINEAR, antialias=False, dtype=types.FLOAT)
            x = fn.slice(x, corner[view], [size, size], axis_names="WH")
            x = fn.flip(x, horizontal=flip[view])
            # Rounded once, at the end: the colors would amplify an earlier rounding.
            done.append(fn.cast(fn.coord_transform(x, MT=color[view]), dtype=types.UINT8))
        return done[0] if views == 1 else fn.stack(*done, axis=0)

    return graph()


def inputs_of(encoded: np.ndarray, views: Sequence[View], colorspace: int) -> dict[str, np.ndarray]:
    """The inputs of one sample for `make_pipeline`."""
    frames, order = np.unique(np.stack([view.frames for view in views]), return_inverse=True)
    boxes = np.array([view.crop for view in views], np.int32)
    return {
        "encoded": encoded,
        "frames": frames.astype(np.int32),
        "order": order.reshape(len(views), -1).astype(np.int32),
        "start": boxes[:, :2].copy(),
        "shape": boxes[:, 2:].copy(),
        "scaled": np.array([view.resized[::-1] for view in views], np.float32),
        "corner": np.array([view.corner for view in views], np.int32),
        "flip": np.array([view.flip for view in views], np.int32),
        "color": np.stack([color_of(view, colorspace) for view in views]),
    }
