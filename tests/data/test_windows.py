"""Parts of videos by time: the frames are those that decoding the whole file and looking at the times gives."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import xclip_fast
from xclip_fast.data.decode import chosen, plan
from xclip_fast.data.decode.decoder import VideoError, decode, probe
from xclip_fast.data.decode.source import ReadError
from xclip_fast.data.decode.windows import decode_windows, window_spans
from xclip_fast.data.motion import render, write_clip
from xclip_fast.data.sampling import frame_indices


def film(path: Path, frames: int = 90, fps: int = 10, codec: str = "libx264", **options: object) -> Path:
    """A clip whose frames all differ: frame i is gray i of `frames`, with a moving shape."""
    pictures = render("moving right", 0, frames=frames, size=(32, 48)) // 2
    pictures += (np.arange(frames) * 100 // frames).astype(np.uint8)[:, None, None, None]
    write_clip(path, pictures, fps, codec, **options)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("windows") / "film.mp4", g=25, bf=2)


def expected(path: Path, start: float, end: float, frames: int, fps: int = 10) -> torch.Tensor:
    """The frames of [start, end) of a film of constant rate, each from a full decode."""
    every = decode(path, 90, size=32)
    numbers = [number for number in range(90) if start - 1e-6 <= number / fps < end - 1e-6]
    return every[numbers[0] + frame_indices(len(numbers), frames)]


def test_windows_hold_the_frames_of_their_times(clip):
    found = list(decode_windows(clip, 2.0, 1.0, 4, size=32))
    assert [(part.start, part.end) for part in found] == [(float(i), i + 2.0) for i in range(8)]
    for part in found:
        assert torch.equal(part.frames, expected(clip, part.start, part.end, 4))


@pytest.mark.parametrize(("window", "stride"), [(2.5, 0.7), (4.0, 4.0), (1.0, 3.0), (8.9, 0.05)])
def test_windows_of_any_size_cover_the_video(clip, window, stride):
    found = list(decode_windows(clip, window, stride, 3, size=32))
    assert found[0].start == 0
    assert found[-1].end == (9.0 if stride <= window else 7.0)
    for number, part in enumerate(found):
        assert part.start == pytest.approx(number * stride)
        assert part.end == pytest.approx(min(part.start + window, 9.0))
        assert torch.equal(part.frames, expected(clip, part.start, part.end, 3))


def test_a_short_video_is_one_window_with_the_frames_of_decode(clip):
    (whole,) = decode_windows(clip, 9.0, frames=5, size=32)
    assert (whole.start, whole.end) == (0.0, 9.0)
    assert torch.equal(whole.frames, decode(clip, 5, size=32))


@pytest.mark.parametrize("frame_stride", [1, 3])
def test_dense_windows(clip, frame_stride):
    part = list(decode_windows(clip, 3.0, 3.0, 4, "dense", size=32, frame_stride=frame_stride))[1]
    numbers = 30 + frame_indices(30, 4, "dense", stride=frame_stride)
    assert torch.equal(part.frames, decode(clip, 90, size=32)[numbers])


@pytest.mark.parametrize(("start", "end"), [(3.0, 5.0), (None, 1.0), (8.5, None), (0, 100.0), (4.01, 4.02)])
def test_decode_takes_a_part(clip, start, end):
    got = decode(clip, 4, size=32, start=start, end=end)
    nothing_begins = end == 4.02  # the frame before is still shown
    want = decode(clip, 90, size=32)[[40] * 4] if nothing_begins else expected(clip, start or 0, end or 9.0, 4)
    assert torch.equal(got, want)


def test_random_frames_of_a_part_stay_in_it(clip):
    every = decode(clip, 90, size=32)
    got = decode(clip, 6, size=32, start=2.0, end=4.0, rng=np.random.default_rng(3))
    want = every[20 + frame_indices(20, 6, rng=np.random.default_rng(3))]
    assert torch.equal(got, want)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 3), (5, 4), (None, 0), (float("nan"), None)])
def test_parts_that_make_no_sense(clip, start, end):
    with pytest.raises(ValueError, match="0 <= start < end"):
        decode(clip, start=start, end=end)


def test_a_start_after_the_end_names_the_length(clip):
    with pytest.raises(VideoError, match=r"lasts 9\.000 seconds, and the start is 12"):
        decode(clip, start=12)


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (1, 0), (-1, 1), (1, float("nan")), (float("inf"), 1)])
def test_windows_that_make_no_sense(clip, window, stride):
    with pytest.raises(ValueError, match="must be positive"):
        decode_windows(clip, window, stride)


def test_spans():
    assert window_spans(23, 10, 5) == [(0, 10), (5, 15), (10, 20), (15, 23)]
    assert window_spans(20, 10, 5) == [(0, 10), (5, 15), (10, 20)]
    assert window_spans(3, 10, 5) == [(0, 3)]
    assert window_spans(10, 2, 9.99999) == [(0, 2)]


def test_the_number_of_windows_is_bounded(tmp_path):
    path = tmp_path / "far.mkv"
    write_clip(path, np.zeros((2, 32, 32, 3), np.uint8), times=[0, 30_000])
    with pytest.raises(ReadError, match=r"far.mkv: would have \d{8} windows in .* seconds; .*XCLIP_FAST_MAX_WINDOWS"):
        list(decode_windows(path, 0.002))
    with pytest.raises(ReadError, match="would have 9007199254740993 windows"):
        window_spans(10, 2, 5e-324)


def test_uneven_times(tmp_path):
    """Half of the frames lie in the first second: windows go by time, not by frame number."""
    times = [i / 20 for i in range(20)] + [1 + i / 2 for i in range(20)]
    pictures = (np.arange(40, dtype=np.uint8) * 6)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    write_clip(tmp_path / "v.mp4", pictures, times=times, g=5, crf=1)
    found = list(decode_windows(tmp_path / "v.mp4", 1.0, 1.0, 2, size=32))
    level = [part.frames.float().mean((1, 2, 3)).div(6).round().int().tolist() for part in found]
    assert level[:3] == [[5, 15], [20, 21], [22, 23]]
    assert found[-1].end == pytest.approx(probe(tmp_path / "v.mp4").duration)


def test_without_a_plan_it_decodes_from_end_to_end(clip, tmp_path, monkeypatch):
    want = list(decode_windows(clip, 2.0, 1.0, 4, size=32))
    avi = film(tmp_path / "film.avi", bf=2)  # H.264 with B frames in AVI has no plan
    assert probe(avi).plan is None
    found = list(decode_windows(avi, 2.0, 1.0, 4, size=32))
    assert [(part.start, part.end) for part in found] == [(part.start, part.end) for part in want]
    every = decode(avi, 90, size=32)
    assert torch.equal(found[3].frames, every[30 + frame_indices(20, 4)])

    # a plan that fails on the way: nothing is given twice, nothing is left out
    honest = plan.planned_frames

    def failing(*given):
        for number, pair in enumerate(honest(*given)):
            if number == 9:
                raise plan.PlanFails
            yield pair

    monkeypatch.setattr(chosen, "planned_frames", failing)
    again = list(decode_windows(clip, 2.0, 1.0, 4, size=32))
    assert [part.start for part in again] == [part.start for part in want]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(again, want, strict=True))


def test_each_frame_is_decoded_once_and_memory_is_bounded(tmp_path, monkeypatch):
    """One group of pictures, 300 overlapping windows: no seek per window, no frame kept that no window needs."""
    path = film(tmp_path / "long.mp4", frames=600, g=600)
    decoded, most = [], 0
    honest = plan.planned_frames

    def counting(*given):
        for number, frame in honest(*given):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(chosen, "planned_frames", counting)
    tracemalloc.start()
    count = 0
    for part in decode_windows(path, 1.0, 0.2, 8, size=224):
        count += 1
        most = max(most, tracemalloc.get_traced_memory()[1])
        del part
    tracemalloc.stop()
    assert count == 296
    assert decoded == sorted(set(decoded))
    assert most < 12e6  # 296 windows of 1.2 MB would be 356 MB


def test_bad_files(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        next(decode_windows(tmp_path / "bad.mp4"))
    with pytest.raises(VideoError, match="no such file"):
        decode(tmp_path / "missing.mp4", start=1)


def test_decode_is_public(clip):
    assert xclip_fast.decode is decode
    assert xclip_fast.decode_windows is decode_windows
    with pytest.raises(AttributeError, match="no attribute 'decoder'"):
        _ = xclip_fast.decoder
