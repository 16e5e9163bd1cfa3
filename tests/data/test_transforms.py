"""Views: where they may lie, how often, in what colors; and their execution against float64 references."""

import colorsys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from xclip_fast.data.sampling import frame_indices, sample_rng
from xclip_fast.data.transforms import TestTransform, TrainTransform, View, apply, apply_frame, jitter, recolor

SIZES = [(340, 256), (256, 340), (224, 224), (1920, 1080), (97, 71), (5, 3), (2, 2), (1, 1), (1, 900), (2048, 1)]


def reference_resize(box_HWC, *sizes):
    """To one size, or to (height, width): bilinear with half-pixel centers, clamped at the edges, in float64."""
    picture = box_HWC.astype(np.float64)
    for axis in (0, 1):
        length, size = picture.shape[axis], sizes[axis % len(sizes)]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.minimum(place.astype(int), length - 1)
        high = np.minimum(low + 1, length - 1)
        part = np.expand_dims(place - low, (1, 2) if axis == 0 else (0, 2))
        picture = np.take(picture, low, axis) * (1 - part) + np.take(picture, high, axis) * part
    return picture


def reference_jitter(rgb, brightness, contrast, saturation, hue, order):
    """The four changes one by one on levels, float64 (..., 3). Hue turns the (I, Q) plane, as complex numbers."""
    for step in order:
        gray = (0.299 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2])[..., None]
        if step == 0:
            rgb = rgb * brightness
        elif step == 1:
            rgb = 127.5 + (rgb - 127.5) * contrast
        elif step == 2:
            rgb = gray + (rgb - gray) * saturation
        else:
            i = 0.595716 * rgb[..., 0] - 0.274453 * rgb[..., 1] - 0.321263 * rgb[..., 2]
            q = 0.211456 * rgb[..., 0] - 0.522591 * rgb[..., 1] + 0.311135 * rgb[..., 2]
            turned = (i + 1j * q) * np.exp(-2j * np.pi * hue)
            i, q = turned.real, turned.imag
            y = gray[..., 0]
            rgb = np.stack(
                [y + 0.9563 * i + 0.6210 * q, y - 0.2721 * i - 0.6474 * q, y - 1.1070 * i + 1.7046 * q], axis=-1
            )
    return rgb


def drawn(transform, count, total=50, size=(340, 256), seed=0):
    return [transform.views(total, *size, sample_rng(seed, 0, sample))[0] for sample in range(count)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_training_boxes(size):
    width, height = size
    short = min(size)
    allowed = [max(1, round(scale * short)) for scale in (1, 0.875, 0.75, 0.66)]
    places = Counter()
    shapes = set()
    for view in drawn(TrainTransform(), 400, size=size):
        left, top, across, down = view.crop
        assert all(isinstance(value, int) for value in view.crop)
        assert 0 <= left <= left + across <= width
        assert 0 <= top <= top + down <= height
        assert min(across, down) >= 1
        spare = width - across, height - down
        corners = {(x, y) for x in (0, spare[0]) for y in (0, spare[1])}
        assert (left, top) in corners | {(spare[0] // 2, spare[1] // 2)}
        shapes.add((across, down))
        if short > 200:
            places[(left / spare[0] if spare[0] else None, top / spare[1] if spare[1] else None)] += 1
            assert abs(allowed.index(across) - allowed.index(down)) <= 1
    assert shapes == {
        (allowed[i], allowed[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1
    }  # all ten, where the picture tells them apart
    if size == (340, 256):
        assert {(x, y) for x in (0.0, 1.0) for y in (0.0, 1.0)} < places.keys()
        assert any(0.4 < (x or 0) < 0.6 for x, _ in places)


def test_the_five_positions_and_ten_shapes_are_equally_likely():
    views = drawn(TrainTransform(), 3000, size=(1000, 900))
    shapes = Counter(view.crop[2:] for view in views)
    assert len(shapes) == 10
    assert all(220 < count < 380 for count in shapes.values())
    where = Counter(
        "center" if 0 < left < 1000 - width else (left > 0, top > 0)
        for left, top, width, height in (view.crop for view in views)
        if height < 900
    )
    total = sum(where.values())
    assert len(where) == 5
    assert all(0.16 < count / total < 0.24 for count in where.values())


def test_training_probabilities():
    plain = TrainTransform(jitter_probability=0, gray=0)
    assert 0.46 < np.mean([view.flip for view in drawn(plain, 2000)]) < 0.54
    assert all(view.color is None for view in drawn(plain, 50))
    views = drawn(TrainTransform(), 2000)
    gray = np.mean([view.color is not None and np.ptp(view.color, axis=0).max() == 0 for view in views])
    none = np.mean([view.color is None for view in views])
    assert 0.17 < gray < 0.23  # every row the same: all three channels are
    assert 0.13 < none < 0.19  # 0.2 x 0.8
    for view in views[:50]:
        assert view.color is None or (view.color.dtype == np.float32 and view.color.shape == (3, 4))
    assert all(view.color is not None for view in drawn(TrainTransform(jitter_probability=1), 50))
    assert not any(view.flip for view in drawn(TrainTransform(flip=0), 50))
    assert all(view.flip for view in drawn(TrainTransform(flip=1), 50))


def test_one_setting_shifts_no_other():
    base = TrainTransform(jitter_probability=1, gray=0)
    views = drawn(base, 40)
    for change in (
        {"flip": 0.9},
        {"jitter_probability": 0.0},
        {"gray": 1.0},
        {"hue": 0.5},
        {"brightness": 0.0},
        {"scales": (1.0, 0.5)},
        {"size": 96},
    ):
        for one, other in zip(views, drawn(replace(base, **change), 40), strict=True):
            assert np.array_equal(one.frames, other.frames)
            assert one.crop == other.crop or "scales" in change
            assert one.flip == other.flip or "flip" in change
            if not change.keys() & {"jitter_probability", "gray", "hue", "brightness"}:
                assert np.array_equal(one.color, other.color)
    # The picture part is the same for every sampling and frame count.
    for one, other in zip(views, drawn(replace(base, sampling="dense", frames=3), 40), strict=True):
        assert (one.crop, one.flip) == (other.crop, other.flip)
        assert np.array_equal(one.color, other.color)


def test_views_depend_on_the_generator_alone():
    transform = TrainTransform(4)
    (one,) = transform.views(300, 340, 256, sample_rng(1, 2, 3))
    (two,) = transform.views(300, 340, 256, sample_rng(1, 2, 3))
    assert one.crop == two.crop
    assert np.array_equal(one.frames, two.frames)
    assert one.drawn_from == (300, 340, 256)
    rng = sample_rng(1, 2, 3)
    rng.random(13)
    assert np.array_equal(one.frames, frame_indices(300, 4, rng=rng))
    assert transform.random
    assert not TestTransform().random
    # These exact draws must not change: runs are resumed by them.
    assert one.frames.tolist() == [26, 149, 152, 281]
    assert one.crop == (0, 0, 224, 224)
    assert one.flip
    assert one.color[0].tolist() == pytest.approx([1.05652666, 0.05856303, 0.15425615, -30.5015602])


def test_jitter_is_the_four_changes_in_any_order():
    rng = np.random.default_rng(0)
    rgb = rng.uniform(0, 255, (50, 3))
    for _ in range(60):
        factors = (*rng.uniform(0, 2, 3), rng.uniform(-0.5, 0.5))
        order = rng.permutation(4)
        matrix = jitter(*factors, order)
        expected = reference_jitter(rgb, *factors, order)
        assert np.abs(rgb @ matrix[:, :3].T + matrix[:, 3] - expected).max() < 0.3  # the inverse has four digits
    same = jitter(1, 1, 1, 0, np.arange(4))
    assert np.allclose(same, np.eye(3, 4), atol=1e-12)
    gray = np.full(3, 90.0)
    for order in (np.arange(4), np.array([3, 2, 1, 0])):  # neither hue nor saturation touches gray
        assert np.allclose(jitter(1, 1, 0.3, 0.2, order)[:, :3] @ gray, gray)


def test_hue_turns_the_way_of_the_color_circle():
    """As in HSV: red goes towards yellow for a positive turn, towards magenta for a negative one."""
    for turn in (0.05, -0.05, 0.1):
        rgb = jitter(1, 1, 1, turn, np.arange(4))[:, :3] @ [0.6, 0.3, 0.3]
        hue = colorsys.rgb_to_hsv(*rgb)[0]
        assert (hue + 0.5) % 1 - 0.5 == pytest.approx(turn, abs=abs(turn) * 0.6)


def test_jitter_ranges():
    """One change at a time: the factor read back from the matrix fills its range and no more."""
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gray": 0.0, "jitter_probability": 1.0}
    for name, part, low, high in (
        ("brightness", 0.4, 0.6, 1.4),
        ("brightness", 1.7, 0.0, 2.7),
        ("contrast", 0.4, 0.6, 1.4),
        ("saturation", 0.2, 0.8, 1.2),
    ):
        found = []
        for view in drawn(TrainTransform(**{**off, name: part}), 300):
            matrix = view.color.astype(np.float64)
            factor = matrix[0, 0] - matrix[1, 0]  # each is factor x identity, plus the same in every row
            assert np.allclose(matrix[:, 3], (1 - factor) * 127.5 if name == "contrast" else 0, atol=1e-3)
            found.append(factor)
        assert low - 1e-6 <= min(found) < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < max(found) <= high + 1e-6
    assert all(view.color is None for view in drawn(TrainTransform(**off), 20))  # every factor is 1: nothing to do


def test_gray_is_luma_in_all_channels():
    picture = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    (view,) = drawn(TrainTransform(jitter_probability=0, gray=1), 1)
    out = np.empty_like(picture)
    recolor(picture, view.color, out)
    assert np.array_equal(out, np.repeat(np.rint(picture @ [0.299, 0.587, 0.114])[..., None], 3, -1))
    views = drawn(TrainTransform(jitter_probability=1, gray=1), 20)
    assert all(np.ptp(view.color, axis=0).max() == 0 for view in views)  # gray comes after the jitter


def test_colors_round_once_half_to_even_and_are_cut():
    picture = np.array([[[0, 1, 2], [3, 4, 255], [200, 101, 7]]], np.uint8)
    out = np.empty_like(picture)
    recolor(picture, np.array([[0.5, 0, 0, 0], [0, 2, 0, -3], [0, 0, 1.5, 0]], np.float32), out)
    assert out.tolist() == [[[0, 0, 3], [2, 5, 255], [100, 199, 10]]]  # 1.5 -> 2, 10.5 -> 10, -1 -> 0, 382 -> 255
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 50, 3), np.uint8)
    out = np.empty_like(picture)
    for view in drawn(TrainTransform(jitter_probability=1), 30):
        recolor(picture, view.color, out)
        exact = picture @ view.color[:, :3].T.astype(np.float64) + view.color[:, 3]
        assert np.abs(np.clip(exact, 0, 255) - out).max() <= 0.5001


@pytest.mark.parametrize(
    ("box", "size"),
    [((20, 10, 200, 220), 224), ((0, 0, 340, 256), 112), ((7, 3, 224, 224), 224), ((339, 255, 1, 1), 8),
     ((0, 0, 2, 3), 32), ((100, 50, 60, 40), 224), ((0, 0, 340, 1), 5), ((5, 6, 50, 60), 1)],
)  # fmt: skip
def test_apply_against_float64(box, size):
    frames = np.random.default_rng(1).integers(0, 256, (2, 256, 340, 3), np.uint8)
    left, top, width, height = box
    color = jitter(1.2, 0.8, 1.1, 0.05, np.array([2, 0, 3, 1])).astype(np.float32)
    plain = apply(View(np.arange(2), box, size), frames)
    assert plain.shape == (2, size, size, 3)
    assert plain.dtype == np.uint8
    for frame, picture in zip(frames, plain, strict=True):
        exact = reference_resize(frame[top : top + height, left : left + width], size)
        assert np.abs(picture - exact).max() <= 1.001
    assert np.array_equal(apply(View(np.arange(2), box, size, flip=True), frames), plain[:, :, ::-1])
    colored = apply(View(np.arange(2), box, size, flip=True, color=color), frames)
    for frame, picture in zip(frames, colored, strict=True):
        exact = reference_resize(frame[top : top + height, left : left + width], size)[:, ::-1]
        exact = np.clip(exact @ color[:, :3].T.astype(np.float64) + color[:, 3], 0, 255)
        assert np.abs(picture - exact).max() <= 0.5005  # rounded once


def test_apply_takes_any_memory():
    frames = np.random.default_rng(2).integers(0, 256, (3, 40, 60, 3), np.uint8)
    view = View(np.arange(3), (5, 4, 30, 20), 16, flip=True)
    expected = apply(view, frames)
    fixed = frames.copy()
    fixed.flags.writeable = False  # as of a memory map
    assert np.array_equal(apply(view, fixed), expected)
    turned = np.ascontiguousarray(frames[:, ::-1, ::-1])[:, ::-1, ::-1]  # as of a turned video
    assert np.array_equal(apply(view, turned), expected)
    assert np.array_equal(
        apply(view, np.ascontiguousarray(frames.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)), expected
    )
    for crop in ((50, 0, 20, 20), (0, 30, 20, 20), (-1, 0, 5, 5), (0, 0, 0, 5)):
        with pytest.raises(ValueError, match="crop"):
            apply_frame(View(np.arange(1), crop, 8), frames[0], np.empty((8, 8, 3), np.uint8))


def test_test_views():
    (view,) = TestTransform(8, 224).views(300, 340, 256)
    assert view.crop == (0, 0, 340, 256)
    assert (view.scaled, view.corner) == ((340, 256), (58, 16))  # at a short side of 256 nothing is resized
    assert view.frames.tolist() == frame_indices(300, 8).tolist()
    assert (view.flip, view.color, view.size, view.drawn_from) == (False, None, 224, (300, 340, 256))
    frame = np.random.default_rng(0).integers(0, 256, (1, 256, 340, 3), np.uint8)
    assert np.array_equal(apply(view, frame)[0], frame[0, 16:240, 58:282])
    (view,) = TestTransform(8, 336).crops_of(1280, 720)
    assert (view.scaled, view.corner) == ((683, 384), (173, 24))

    views = TestTransform(8, 224, clips=4, crops=3).views(300, 340, 256)
    assert [view.scaled for view in views] == [(298, 224)] * 12
    assert [view.corner for view in views] == [(0, 0), (37, 0), (74, 0)] * 4
    for number, view in enumerate(views):
        assert view.frames.tolist() == frame_indices(300, 8, clip=number // 3, clips=4).tolist()
    assert [view.corner for view in TestTransform(crops=3).crops_of(101, 200)] == [(0, 0), (0, 110), (0, 220)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crops", [1, 3])
def test_test_crops_lie_inside(size, crops):
    for side in (1, 2, 16, 224, 336):
        views = TestTransform(2, side, crops=crops).crops_of(*size)
        assert len(views) == crops
        for view in views:
            assert view.crop == (0, 0, *size)
            for corner, length in zip(view.corner, view.resized, strict=True):
                assert 0 <= corner <= corner + side <= length


FRAMES = [(340, 256), (320, 240), (384, 288), (1280, 720), (360, 640), (171, 128), (101, 77), (224, 224), (64, 48)]


@pytest.mark.parametrize("shape", [*FRAMES, (7, 500)], ids=str)
@pytest.mark.parametrize("crops", [1, 3])
def test_test_crops_are_cut_from_the_resized_frame(shape, crops):
    """As the released pipeline: the whole frame is resized, then cropped. Old and new differed by 35 levels here."""
    frame = np.random.default_rng(1).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    for size in (32, 224):
        for view in TestTransform(8, size, crops=crops).crops_of(*shape):
            (width, height), (x, y) = view.resized, view.corner
            assert min(width, height) == (size if crops == 3 else size * 256 // 224)
            exact = reference_resize(frame, height, width)[y : y + size, x : x + size]
            for flip in (False, True):
                expected = exact[:, ::-1] if flip else exact
                out = np.empty((size, size, 3), np.uint8)
                apply_frame(replace(view, flip=flip), frame, out)
                assert np.abs(out - expected).max() <= 1.001
                apply_frame(replace(view, flip=flip, color=np.eye(3, 4, dtype=np.float32)), frame, out)
                assert np.abs(out - expected).max() <= 0.501


@pytest.mark.parametrize("shape", FRAMES, ids=str)
def test_test_crops_are_opencvs(shape):
    cv2 = pytest.importorskip("cv2")
    frame = np.random.default_rng(2).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    for transform in (TestTransform(8, 224), TestTransform(8, 224, crops=3)):
        for view in transform.crops_of(*shape):
            x, y = view.corner
            expected = cv2.resize(frame, view.resized, interpolation=cv2.INTER_LINEAR)[y : y + 224, x : x + 224]
            out = np.empty((224, 224, 3), np.uint8)
            apply_frame(view, frame, out)
            assert np.abs(out.astype(int) - expected).max() <= 1


def test_bad_settings():
    for setting, message in (
        ({"size": 0}, "size is 0"),
        ({"frames": 0}, "frames is 0"),
        ({"sampling": "all"}, "sampling is 'all'"),
        ({"flip": 1.5}, "flip is 1.5; at most 1 wanted"),
        ({"gray": -1}, "gray is -1"),
        ({"hue": 0.6}, "hue is 0.6; at most 0.5 wanted"),
        ({"contrast": -0.1}, "contrast is -0.1"),
        ({"brightness": float("nan")}, "brightness is nan"),
        ({"scales": ()}, "scales is"),
        ({"scales": (1.0, 1.2)}, "scales is"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainTransform(**setting)
    for setting, message in (({"crops": 2}, "crops is 2; one of 1, 3 wanted"), ({"clips": 0}, "clips is 0")):
        with pytest.raises(ValueError, match=message):
            TestTransform(**setting)
    for transform in (TrainTransform(), TestTransform()):
        with pytest.raises(ValueError, match="0 frames of 5x5 pixels"):
            transform.views(0, 5, 5, sample_rng(0, 0, 0))
