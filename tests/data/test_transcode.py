"""Copies for fast decoding: the same frames at the same times, and nothing lost, half-written or overwritten."""

import errno
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from xclip_fast.data.decode.decoder import decode_frames, probe
from xclip_fast.data.decode.reading import all_frames, open_video
from xclip_fast.data.decode.source import Source
from xclip_fast.data.decode.times import frame_times
from xclip_fast.data.motion import render, write_clip
from xclip_fast.data.transcode import reencode as encoder
from xclip_fast.data.transcode import transcoder as module
from xclip_fast.data.transcode.transcoder import transcode
from xclip_fast.files import replaced

QUALITY = {"crf": 12}  # nearly the source's pixels
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT  # others darken by a level


def textured(frames=30, size=(64, 96), seed=0):
    clip = render("moving right", seed, frames=frames, size=size)
    grain = np.random.default_rng(seed).integers(0, 12, (1, *size, 1), np.uint8)
    return clip + grain  # still grain: detail that a codec keeps


def packets(path):
    with av.open(str(path)) as container:
        found = [packet for packet in container.demux(video=0) if packet.size]
        return [(packet.pts * packet.time_base, packet.is_keyframe, packet.dts == packet.pts) for packet in found]


def times(path):
    """Of the decoded frames, in seconds from the first one."""
    with av.open(str(path)) as container:
        found = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    return [each - found[0] for each in found]


def psnr(a, b):
    """Of each frame, in decibels."""
    error = np.mean((np.asarray(a, np.float64) - b) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(255**2 / error)


def resized(frames_THWC, width, height):
    return np.stack(
        [
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            .reformat(width, height, "rgb24", interpolation=Interpolation.BICUBIC)
            .to_ndarray()
            for frame in frames_THWC
        ]
    )


def everything(path):
    return decode_frames(path, range(probe(path).frames))


def only(summary):
    """The single outcome, which went well."""
    assert (len(summary.done), summary.failed, summary.damaged) == (1, {}, {}), summary
    return summary


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_frames_times_and_keyframes_are_kept(source, tmp_path):
    path = source / "clip.mkv"
    write_clip(path, textured(40), g=250, bf=3, crf=10)
    before = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    calls = []
    only(transcode(source, tmp_path / "out", progress=lambda *n: calls.append(n), **QUALITY))
    copy = tmp_path / "out" / "clip.mp4"
    assert psnr(everything(path), everything(copy)).min() > 38
    assert times(copy) == times(path)
    keys = [key for _, key, _ in packets(copy)]
    assert keys == [number % 12 == 0 for number in range(40)]
    assert all(in_order for *_, in_order in packets(copy))  # no B frames
    assert calls == [(1, 1)]
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) == before
    assert os.listdir(tmp_path / "out") == ["clip.mp4"]
    data = copy.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(copy)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == ("h264", "yuv420p", 6, 1)
        assert not context.has_b_frames
        assert stream.average_rate == 25
        # Closed groups: from each keyframe on everything decodes, to the same frames.
        whole = [frame.to_ndarray() for frame in container.decode(video=0)]
    with av.open(str(copy)) as container:
        stream = container.streams.video[0]
        container.seek(int(24 / 25 / stream.time_base), stream=stream)
        rest = [frame.to_ndarray() for frame in container.decode(stream)]
    assert len(rest) == 16
    np.testing.assert_array_equal(rest, whole[24:])


def test_settings_are_used(source, tmp_path):
    write_clip(source / "clip.mp4", textured(11))
    only(transcode(source / "clip.mp4", tmp_path / "out", short_side=32, keyframe_every=4, crf=30, preset="ultrafast"))
    copy = tmp_path / "out" / "clip.mp4"
    assert [key for _, key, _ in packets(copy)] == [number % 4 == 0 for number in range(11)]
    assert (probe(copy).width, probe(copy).height) == (48, 32)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((64, 96), 256, (64, 96)), ((65, 97), 256, (64, 96)), ((63, 33), 32, (62, 32)), ((101, 150), 48, (48, 72))],
)
def test_size_is_even_and_never_larger(source, tmp_path, size, short_side, expected):
    clip = textured(3, size)
    write_clip(source / "clip.mkv", clip, codec="ffv1", pix_fmt="bgr0")
    only(transcode(source, tmp_path / "out", short_side=short_side, **QUALITY))
    found = everything(tmp_path / "out" / "clip.mp4")
    assert found.shape == (3, *expected, 3)
    assert psnr(found, resized(clip, expected[1], expected[0])).min() > 32  # chroma has half the resolution


@pytest.mark.parametrize("turn", range(8))
def test_rotation_and_mirroring_are_baked_in(source, tmp_path, turn):
    plain = source / "plain.mp4"
    write_clip(plain, textured(3))
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][turn % 4]
    if turn >= 4:
        a, c = -a, -c
    matrix = b"".join(
        int(value).to_bytes(4, "big", signed=True)
        for value in (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    )
    identity = b"".join(value.to_bytes(4, "big") for value in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    data = plain.read_bytes()
    at = data.rindex(identity)  # the first is the movie's, the last the track's
    plain.write_bytes(data[:at] + matrix + data[at + len(identity) :])
    only(transcode(source, tmp_path / "out", **QUALITY))
    copy = tmp_path / "out" / "plain.mp4"
    assert probe(copy).rotation == 0
    shown = everything(plain)
    assert shown.shape == ((3, 96, 64, 3) if turn % 2 else (3, 64, 96, 3))
    with av.open(str(copy)) as container:  # without our own rotation
        found = [frame.to_ndarray(format="rgb24", interpolation=EXACT) for frame in container.decode(video=0)]
    assert psnr(shown, np.stack(found)).min() > 33


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mkv", "libx264", {"pix_fmt": "yuv420p10le", "crf": 10}),
        (".mp4", "libx264", {"pix_fmt": "yuv422p", "crf": 10}),
        (".avi", "mjpeg", {"pix_fmt": "yuvj420p", "qmin": 1, "qmax": 3}),
        (".avi", "mpeg4", {"bf": 2, "qmax": 3}),
        (".avi", "libx264", {"bf": 2, "crf": 10}),  # a container without presentation times
        (".webm", "libvpx-vp9", {"crf": 10, "deadline": "realtime", "cpu-used": 8}),
        (".ts", "libx264", {"bf": 2, "crf": 10}),
    ],
)
def test_any_codec(source, tmp_path, suffix, codec, options):
    path = source / f"clip{suffix}"
    write_clip(path, textured(14), codec=codec, **options)
    only(transcode(source, tmp_path / "out", **QUALITY))
    copy = tmp_path / "out" / "clip.mp4"
    assert psnr(everything(path), everything(copy)).min() > 33
    if suffix != ".avi" or codec == "mjpeg":
        assert times(copy) == times(path)
    else:
        assert np.all(np.diff(times(copy)) > 0)


@pytest.mark.parametrize(("space", "levels"), [(1, 1), (1, 2), (9, 1), (5, 2)])
def test_colors_become_bt601(source, tmp_path, space, levels):
    """Whatever the source's matrix and range, a decoder that knows only BT.601 in limited range is right."""
    path = source / "clip.mkv"
    clip = textured(3)
    matrix = {1: Colorspace.ITU709, 5: Colorspace.ITU601, 9: Colorspace.BT2020}[space]
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "6"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, levels
        for array in clip:
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            frame = frame.reformat(format="yuv444p", dst_colorspace=matrix, dst_color_range=ColorRange(levels))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert psnr(everything(path), clip).min() > 40
    only(transcode(source, tmp_path / "out", **QUALITY))
    with av.open(str(tmp_path / "out" / "clip.mp4")) as container:
        planes = [frame.to_ndarray() for frame in container.decode(video=0)]
    blind = []
    for array in planes:
        frame = av.VideoFrame.from_ndarray(array, "yuv420p")
        frame.colorspace, frame.color_range = 5, 1
        blind.append(frame.to_ndarray(format="rgb24", interpolation=EXACT))
    assert psnr(clip, np.stack(blind)).min() > 31
    assert abs(np.mean(blind, axis=(0, 1, 2)) - clip.mean((0, 1, 2))).max() < 1


def test_variable_frame_rate_stays(source, tmp_path):
    path = source / "clip.mkv"
    moments = np.cumsum([0.5, *([0.04, 0.1, 0.013, 0.3] * 4)])
    write_clip(path, textured(len(moments)), times=moments.tolist(), bf=2)
    only(transcode(source, tmp_path / "out"))
    assert times(tmp_path / "out" / "clip.mp4") == times(path)
    assert times(path)[1:3] == [Fraction(40, 1000), Fraction(140, 1000)]
    assert packets(tmp_path / "out" / "clip.mp4")[0][0] == 0


def test_a_copy_of_a_copy_has_its_times(source, tmp_path):
    """Its pictures need no conversion, and the frames themselves were given the even times of the encoder."""
    moments = np.cumsum([0.04, 0.1, 0.013, 0.3] * 4)
    write_clip(source / "clip.mkv", textured(len(moments)), times=moments.tolist())
    only(transcode(source, tmp_path / "once"))
    only(transcode(tmp_path / "once", tmp_path / "twice", purpose="training"))
    assert times(tmp_path / "twice" / "clip.mp4") == times(source / "clip.mkv")


def frames_of(path):
    """What decoding from end to end gives, as our reader does it."""
    with open_video(Source(str(path))) as (container, stream):
        return [frame.to_ndarray(format="rgb24", interpolation=EXACT) for frame in all_frames(container, stream)]


def joined(path, *clips):
    """One MPEG stream with a new beginning for each clip."""
    data = b""
    for number, clip in enumerate(clips):
        part = path.with_name(f"part{number}.ts")
        write_clip(part, clip, bf=0)
        data += part.read_bytes()
        part.unlink()
    path.write_bytes(data)


def test_joined_recordings(source, tmp_path):
    """The picture's size changes and the clock starts again; the shape stays."""
    path = source / "clip.ts"
    joined(path, textured(10, (64, 96)), textured(10, (128, 192), 1))
    only(transcode(source, tmp_path / "out"))
    copy = tmp_path / "out" / "clip.mp4"
    shown = frames_of(path)  # the packet at the seam is marked as corrupt, and passed over as `decode` does
    assert len(shown) == len(packets(copy)) >= 19
    found = everything(copy)
    for frame, array in zip(shown, found, strict=True):
        assert psnr(resized(frame[None], 96, 64), array[None]) > 28
    assert np.allclose(np.diff(times(copy)).astype(float), 0.04)


def test_change_of_shape_is_refused(source, tmp_path):
    joined(source / "clip.ts", textured(5, (64, 96)), textured(5, (64, 64)))
    summary = transcode(source, tmp_path / "out")
    assert "changes from 96x64 to 64x64" in summary.failed[str(source / "clip.ts")]
    assert os.listdir(tmp_path / "out") == []


def test_bad_files_are_named_and_do_not_stop_the_others(source, tmp_path):
    write_clip(source / "good.mp4", textured(5))
    (source / "empty.mp4").write_bytes(b"")
    (source / "text.avi").write_text("not a video\n" * 100)
    (source / "notes.txt").write_text("not looked at")
    (source / ".hidden.mp4").write_text("nor this")
    (source / "cut.mp4").write_bytes((source / "good.mp4").read_bytes()[:1500])
    with av.open(source / "sound.mkv", "w") as container:
        stream = container.add_stream("flac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    missing = str(source / "missing.mp4")
    os.symlink("nowhere", missing)
    summary = transcode(source, tmp_path / "out")
    assert summary.done == [str(source / "good.mp4")]
    assert {Path(name).name for name in summary.failed} == {
        "cut.mp4", "empty.mp4", "missing.mp4", "sound.mkv", "text.avi"
    }  # fmt: skip
    for name, reason in summary.failed.items():
        assert reason.startswith(f"{name}: ")
        assert "\n" not in reason
    assert "empty (zero bytes)" in summary.failed[str(source / "empty.mp4")]
    assert "audio" in summary.failed[str(source / "sound.mkv")]
    assert "no such file" in summary.failed[missing].lower()
    assert str(summary) == "1 transcoded, 0 exist already, 5 failed"
    assert sorted(os.listdir(tmp_path / "out")) == ["good.mp4"]
    again = transcode(source, tmp_path / "out")
    assert (len(again.skipped), len(again.failed)) == (1, 5)


def test_damaged_source_is_copied_as_far_as_it_goes_and_listed(source, tmp_path):
    rng = np.random.default_rng(0)
    whole = source / "cut.mp4"
    write_clip(whole, textured(40), movflags="faststart")
    with av.open(str(whole)) as container, encoder.writing(source / "front.mp4", movflags="+faststart") as copy:
        stream = copy.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    data = (source / "front.mp4").read_bytes()
    whole.write_bytes(data[: len(data) * 2 // 3])
    (source / "front.mp4").unlink()
    spoilt = source / "spoilt.mp4"
    write_clip(spoilt, textured(40))
    data = bytearray(spoilt.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 400] = rng.bytes(400)
    spoilt.write_bytes(data)
    summary = transcode(source, tmp_path / "out")
    assert sorted(summary.done) == [str(whole), str(spoilt)]
    assert set(summary.damaged) == {str(whole), str(spoilt)}
    assert "cut short" in summary.damaged[str(whole)]
    for path in (whole, spoilt):
        assert 1 < len(frames_of(path)) <= 40
        assert len(packets(tmp_path / "out" / path.name)) == len(frames_of(path))
    assert len(frames_of(whole)) < 40
    again = transcode(source, tmp_path / "out")
    assert again.damaged == summary.damaged
    assert len(again.skipped) == 2
    assert "2 from damaged sources" in str(again)


def test_packets_without_a_frame_are_bounded(source, tmp_path, monkeypatch):
    write_clip(source / "clip.mp4", textured(20))
    data = bytearray((source / "clip.mp4").read_bytes())
    start = data.index(b"mdat")
    end = start - 4 + int.from_bytes(data[start - 4 : start], "big")
    data[start + 4 : end] = bytes(end - start - 4)
    (source / "clip.mp4").write_bytes(data)
    monkeypatch.setenv("XCLIP_FAST_MAX_LEADING_PACKETS", "5")
    failed = transcode(source, tmp_path / "out").failed
    assert "its first 5 packets give no frame" in failed[str(source / "clip.mp4")]


def test_tree_is_kept_and_a_second_run_skips(source, tmp_path):
    names = ["a/b/x.mp4", "a/y.AVI", "z.mkv", "odd ,name\n%d\udce9.mp4"]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(source / "new.mp4", textured(3))
        os.rename(source / "new.mp4", os.fsencode(source / name))
    out = source / "fast"  # inside the source folder: not to be taken for sources
    summary = transcode(source, out, short_side=32)
    assert len(summary.done) == 4
    assert not summary.failed
    copies = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert copies == sorted(["a/b/x.mp4", "a/y.mp4", "z.mp4", "odd ,name\n%d\udce9.mp4"])
    stamps = {name: (out / name).stat().st_mtime_ns for name in copies}
    again = transcode(source, out, short_side=32)
    assert (len(again.skipped), again.done, again.failed) == (4, [], {})
    assert {name: (out / name).stat().st_mtime_ns for name in copies} == stamps
    # A source with other content is done anew, also one of equal size that is older; one that was touched is not.
    later = time.time() + 10
    os.utime(source / "z.mkv", (later, later))
    data = bytearray((source / "a/b/x.mp4").read_bytes())
    data[-1] ^= 1  # its length stays
    (source / "a/b/x.mp4").write_bytes(data)
    os.utime(source / "a/b/x.mp4", (1e9, 1e9))
    again = transcode(source, out, short_side=32)
    assert again.done == [str(source / "a/b/x.mp4")]
    assert len(transcode(source, out, short_side=32).skipped) == 4
    # Other settings do not mix in by accident.
    other = transcode(source, out, short_side=48)
    assert len(other.failed) == 4
    assert "other settings (short_side 32" in other.failed[str(source / "z.mkv")]
    assert len(transcode(source, out, short_side=48, overwrite=True).done) == 4
    assert probe(out / "z.mp4").height == 48


def test_nothing_is_written_for_copies_that_are_there(source, tmp_path, monkeypatch):
    write_clip(source / "a.mp4", textured(2))
    out = tmp_path / "out"
    transcode(source, out)
    (out / ".a.mp4.part").mkdir()  # left by a killed run
    assert len(transcode(source, out).skipped) == 1
    assert os.listdir(out) == ["a.mp4"]
    plain = os.open

    def read_only(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", path)
        return plain(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    assert len(transcode(source, out).skipped) == 1
    shutil.copy(source / "a.mp4", source / "b.mp4")
    with pytest.raises(OSError, match="Read-only file system, after"):
        transcode(source, out)


def test_a_subfolder_that_cannot_be_listed_is_named(source, tmp_path, unlistable):
    for name in ("a.mp4", "locked/b.mp4"):
        (source / name).parent.mkdir(exist_ok=True)
        write_clip(source / name, textured(2))
    unlistable(source / "locked")
    summary = transcode(source, tmp_path / "out")
    assert summary.done == [str(source / "a.mp4")]
    assert summary.failed == {str(source / "locked"): "is a folder that cannot be listed (Permission denied)"}


def test_long_names_and_copies_above_their_sources(source, tmp_path):
    names = ["z" * 250 + "a.mp4", "z" * 250 + "b.mp4", "д" * 125 + ".mp4"]
    for name in names:
        write_clip(source / "new.mp4", textured(2))
        os.rename(source / "new.mp4", source / name)
    summary = transcode(source, source.parent)
    assert (len(summary.done), summary.failed) == (3, {})
    assert {path.name for path in source.parent.glob("*.mp4")} == set(names)
    assert len(transcode(source, source.parent).skipped) == 3


def test_two_sources_of_one_name_are_refused(source, tmp_path):
    write_clip(source / "a.avi", textured(2), codec="mpeg4")
    write_clip(source / "a.mkv", textured(2))
    write_clip(source / "b.mkv", textured(2))
    summary = transcode(source, tmp_path / "out")
    assert summary.done == [str(source / "b.mkv")]
    assert len(summary.failed) == 2
    assert "a.mkv" in summary.failed[str(source / "a.avi")]
    assert os.listdir(tmp_path / "out") == ["b.mp4"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_source_is_overwritten(source, tmp_path, overwrite):
    (source / "sub").mkdir()
    path = source / "clip.mp4"
    write_clip(path, textured(3))
    write_clip(source / "sub" / "clip.mp4", textured(3, seed=1))
    before = {file: file.read_bytes() for file in (path, source / "sub" / "clip.mp4")}
    with pytest.raises(ValueError, match="folder of the sources"):
        transcode(source, source, overwrite=overwrite)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="folder of the sources"):
        transcode(source, tmp_path / "link", overwrite=overwrite)
    for name, link in (("hard", os.link), ("soft", os.symlink)):
        out = tmp_path / name
        out.mkdir()
        link(source / "sub" / "clip.mp4", out / "clip.mp4")  # the other source, under the name of a copy
        summary = transcode(source, out, overwrite=overwrite)
        assert summary.done == [str(source / "sub" / "clip.mp4")]
        assert "is a source" in summary.failed[str(path)]
    summary = transcode(path, source, overwrite=overwrite)
    assert "is a source" in summary.failed[str(path)]
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    "comment",
    [
        "Caf\u00e9",
        f'{module._MAKER}: {{"settings": [], "size": 1, "mtime_ns": 1, "damage": null}}',
        f"{module._MAKER}: {'[' * 30000}",
    ],
)
def test_a_file_of_others_is_not_replaced(source, tmp_path, comment):
    write_clip(source / "clip.mkv", textured(3))
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / "clip.mp4"
    with av.open(str(theirs), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for packet in (*stream.encode(av.VideoFrame.from_ndarray(textured(1)[0], "rgb24")), *stream.encode(None)):
            container.mux(packet)
    before = theirs.read_bytes().replace("Caf\u00e9".encode(), "Caf\u00e9!".encode("latin-1"))  # no UTF-8
    theirs.write_bytes(before)
    summary = transcode(source, tmp_path / "out")
    assert "is not a copy by xclip-fast" in summary.failed[str(source / "clip.mkv")]
    assert theirs.read_bytes() == before
    assert len(transcode(source, tmp_path / "out", overwrite=True).done) == 1
    assert probe(theirs).frames == 3


def test_kill_and_resume(source, tmp_path):
    out = tmp_path / "out"
    for number in range(4):
        write_clip(source / f"{number}.mp4", textured(60, (128, 192), number), preset="ultrafast", crf=10)
    run = "import sys; from xclip_fast.data.transcode import transcode; transcode(*sys.argv[1:], workers=1, crf=15)"
    process = subprocess.Popen([sys.executable, "-c", run, str(source), str(out)])
    deadline = time.monotonic() + 60
    while not list(out.glob("*.mp4")) or not list(out.glob(".*.part/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sorted(path.name for path in out.glob("*.mp4"))
    assert 1 <= len(whole) < 4
    assert all(probe(out / name).frames == 60 for name in whole)
    assert list(out.glob(".*.part/*"))
    last = out / "3.mp4"
    with replaced(last):  # another run is at work on it
        summary = transcode(source, out, crf=15, workers=2)
    assert sorted(Path(name).name for name in summary.skipped) == whole
    assert "is writing to it" in summary.failed[str(source / "3.mp4")]
    assert len(transcode(source, out, crf=15, workers=2).done) == 1
    assert sorted(os.listdir(out)) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]


def test_interrupt_stops_soon_and_leaves_nothing(source, tmp_path, monkeypatch):
    for number in range(3):
        write_clip(source / f"{number}.mp4", textured(20, seed=number))
    frames, started = encoder._frames, threading.Event()

    def slow(*args):
        for frame in frames(*args):
            started.set()
            time.sleep(0.05)
            yield frame

    def interrupted(*args, **kwargs):
        started.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder, "_frames", slow)
    monkeypatch.setattr(module, "wait", interrupted)
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        transcode(source, tmp_path / "out", workers=2)
    assert time.monotonic() - before < 5
    assert os.listdir(tmp_path / "out") == []


def test_disk_full_ends_the_run_and_leaves_nothing(source, tmp_path, monkeypatch):
    for number in range(3):
        write_clip(source / f"{number}.mp4", textured(5, seed=number))
    replace, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*args)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device, after 1 of 3 videos") as caught:
        transcode(source, tmp_path / "out", workers=1)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path / "out") == ["0.mp4"]


def test_what_ffmpeg_cannot_write_is_an_error(source, tmp_path):
    """A real limit on the size of files: FFmpeg's own writes fail half-way."""
    write_clip(source / "clip.mp4", textured(60, (128, 128)), crf=10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        summary = transcode(source, tmp_path / "out", crf=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    failed = summary.failed[str(source / "clip.mp4")]
    assert f"{tmp_path / 'out' / 'clip.mp4'}: could not be written, a file would be larger than" in failed
    assert os.listdir(tmp_path / "out") == []


def test_source_that_changes_meanwhile(source, tmp_path, monkeypatch):
    write_clip(source / "clip.mp4", textured(3))
    note = module.finish

    def meddle(*args):
        os.utime(source / "clip.mp4", (1, 1))
        note(*args)

    monkeypatch.setattr(module, "finish", meddle)
    summary = transcode(source, tmp_path / "out")
    assert "changed while it was read" in summary.failed[str(source / "clip.mp4")]
    assert os.listdir(tmp_path / "out") == []


def test_a_copy_that_lost_frames_is_noticed(source, tmp_path, monkeypatch):
    write_clip(source / "clip.mp4", textured(3))

    def shorten(draft, whole, clock, text):
        with av.open(str(draft)) as container, encoder.writing(whole) as copy:
            stream = copy.add_stream_from_template(container.streams.video[0])
            packet = next(container.demux(video=0))
            packet.stream = stream
            copy.mux(packet)

    monkeypatch.setattr(module, "finish", shorten)
    summary = transcode(source, tmp_path / "out")
    assert "has 1 frames instead of 3" in summary.failed[str(source / "clip.mp4")]
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"short_side": 255}, "even"),
        ({"short_side": 0}, "at least 16"),
        ({"keyframe_every": 0}, "at least 1 wanted"),
        ({"crf": 52}, "at most 51"),
        ({"preset": "quick"}, "one of ultrafast"),
        ({"workers": 0}, "at least 1"),
    ],
)
def test_senseless_arguments(source, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        transcode(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        transcode(tmp_path / "nowhere", tmp_path / "out")


def test_a_copy_for_training_has_keyframes_only(tmp_path):
    """Eight frames are decoded for eight: the plan starts each at itself."""
    write_clip(tmp_path / "a.mp4", render("moving up", 0, frames=60, size=(64, 64)), g=60)
    assert not transcode(tmp_path / "a.mp4", tmp_path / "any").failed
    assert not transcode(tmp_path / "a.mp4", tmp_path / "training", purpose="training").failed
    for folder, starts in (("any", [number // 12 for number in range(60)]), ("training", list(range(60)))):
        assert probe(tmp_path / folder / "a.mp4").plan.start == starts
    again = transcode(tmp_path / "a.mp4", tmp_path / "any", purpose="training")
    assert "made with other settings" in next(iter(again.failed.values()))
    with pytest.raises(ValueError, match="purpose is 'fun'"):
        transcode(tmp_path / "a.mp4", tmp_path / "x", purpose="fun")


@pytest.mark.parametrize(("codec", "options"), [("libx264", {"bf": 3, "g": 50}), ("mpeg4", {"bf": 2, "g": 25})])
def test_avi_with_b_frames(codec, options, source, tmp_path):
    """AVI keeps no times of display. Each step back was taken for a joined recording: copies lasted twice as long."""
    write_clip(source / "a.avi", textured(100), codec=codec, **options)
    assert not transcode(source, tmp_path / "out").failed
    copy = probe(tmp_path / "out/a.mp4")
    assert (copy.frames, round(copy.duration, 3), copy.fps) == (100, 4.0, 25.0)
    assert set(np.diff(copy.plan.pts).tolist()) == {512}  # of 12800 a second


BACK_AND_FORTH = [1, 3, 4, 2, 6, 7, 5, 8, 9, 10, 12, 13, 11]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], []),
        ([5], [0]),
        ([0, 1, 2, 4, 9], [0, 1, 2, 4, 9]),
        ([None] * 4, [0, 1, 2, 3]),
        ([3, None, 5, None], [0, 1, 2, 3]),
        (BACK_AND_FORTH, list(range(13))),
        ([2, 1, 0], [0, 1, 2]),
        ([0, 0, 1, 1], [0, 1, 2, 3]),
        ([*range(10), *range(10)], list(range(20))),
        ([*range(10), *range(3)], list(range(13))),
        ([*range(10), *range(100)], list(range(110))),
        ([*range(500), *range(100, 120), *range(50)], list(range(570))),
    ],
    ids=str,
)
def test_frame_times(given, wanted):
    """Times that go back and forth are sorted; a clock that was set back goes on."""
    assert frame_times(given, 1) == wanted
