import numpy as np
import pytest

from xclip_fast.data.decode.decoder import decode_frames, probe
from xclip_fast.data.motion import CLASSES, render, write_clip, write_dataset

PAIRS = list(zip(CLASSES[::2], CLASSES[1::2], strict=True))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_paired_classes_hold_the_same_frames_in_reverse_order(one, other):
    """So no model that ignores the order of frames can tell them apart: their bags of frames are equal."""
    for index in range(3):
        forwards = render(one, 7, index, frames=12, size=(48, 64))
        backwards = render(other, 7, index, frames=12, size=(48, 64))
        assert forwards.dtype == np.uint8
        assert forwards.shape == (12, 48, 64, 3)
        assert np.array_equal(forwards, backwards[::-1])
        assert not np.array_equal(forwards, backwards)


def lit(clip, reference):
    """Mask (T, H, W) of the pixels far from the still background, the darkest value each pixel ever takes."""
    return clip.max(-1).astype(int) > reference.max(-1).astype(int) + 30


def test_the_labels_say_what_happens():
    for index in range(4):
        for axis, label in ((1, "moving right"), (0, "moving down")):
            clip = render(label, 3, index, frames=9)
            mask = lit(clip, clip.min(0))
            centers = np.array([np.argwhere(frame)[:, axis].mean() for frame in mask])
            assert (np.diff(centers) > 0).all(), label
        clip = render("growing", 3, index, frames=9)
        areas = (clip.max(-1) > 120).sum((1, 2))
        assert (np.diff(areas) > 0).all()
        clip = render("red then blue", 3, index, frames=9)
        red, blue = (clip[..., 0] > 200).any((1, 2)), (clip[..., 2] > 200).any((1, 2))
        assert red[0]
        assert blue[-1]
        assert (red ^ blue).all()
        clip = render("turning clockwise", 3, index, frames=9)
        y, x = np.mgrid[0:128, 0:128] - 63.5
        turns = []
        for frame in clip.max(-1) > 120:
            turns.append(np.arctan2(y[frame].mean(), x[frame].mean()))  # y points down: growing is clockwise
        steps = (np.diff(turns) + np.pi) % (2 * np.pi) - np.pi
        assert (steps > 0.05).all()


def test_clips_depend_on_label_seed_and_index_alone():
    def first(*args):
        return render(*args, frames=4, size=(32, 32))

    assert np.array_equal(first("growing", 1, 2), first("growing", 1, 2))
    for other in [("growing", 1, 3), ("growing", 2, 2), ("moving up", 1, 2)]:
        assert not np.array_equal(first("growing", 1, 2), first(*other))
    assert render("moving left", 0, frames=1, size=(16, 20)).shape == (1, 16, 20, 3)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="unknown label 'jumping'; the classes are: moving right"):
        render("jumping", 0)
    with pytest.raises(ValueError, match="at least 1 frame and 16 pixels"):
        render("growing", 0, frames=0)
    with pytest.raises(ValueError, match="no frames to write"):
        write_clip(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError, match="1 times for 2 frames"):
        write_clip(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), times=[0.0])
    with pytest.raises(ValueError, match="needs even sides"):
        write_clip(tmp_path / "a.mp4", np.zeros((2, 17, 16, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_written_clip_comes_back(tmp_path):
    clip = render("moving up", 0, frames=10, size=(64, 96))
    write_clip(tmp_path / "a.mp4", clip, fps=10, crf=10, pix_fmt="yuv444p")
    back = decode_frames(tmp_path / "a.mp4", range(10))
    assert back.shape == clip.shape
    assert np.abs(back.astype(int) - clip).mean() < 3
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.fps, info.codec) == (10, 10.0, "h264")


def test_a_failed_write_leaves_nothing_and_harms_nothing(tmp_path):
    path = tmp_path / "a.mp4"
    write_clip(path, render("growing", 0, frames=3, size=(32, 32)))
    before = path.read_bytes()
    mixed = [np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)]  # the second is no RGB frame
    with pytest.raises(ValueError):
        write_clip(path, mixed)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_dataset(tmp_path):
    ticks = []
    settings = {"frames": 6, "size": (32, 48), "g": 3}
    write_dataset(tmp_path, 2, 5, progress=lambda *tick: ticks.append(tick), **settings)
    found = [tmp_path / label.replace(" ", "_") / f"{number:05d}.mp4" for label in CLASSES for number in range(2)]
    assert ticks == [(done, 20) for done in range(1, 21)]
    assert sorted(tmp_path.rglob("*.mp4")) == sorted(found)  # no leftovers
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    write_dataset(tmp_path, 2, 5, **settings)  # the same again: files stay untouched
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found} == before

    with pytest.raises(FileExistsError, match="exists with other content"):
        write_dataset(tmp_path, 2, 6, **settings)
    assert {path: path.read_bytes() for path in found} == {path: data for path, (data, _) in before.items()}
    assert not list(tmp_path.rglob(".*"))


def test_no_room_for_a_dataset(tmp_path, file_limit):
    """The error named no file."""
    file_limit(0)
    with pytest.raises(OSError, match=r"moving_right: could not be written, .*; make room and start again"):
        write_dataset(tmp_path, 1)
