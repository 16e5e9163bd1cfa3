"""Reading of video files: I/O errors are never the end of a file, nothing else is opened, sizes are bounded."""

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from xclip_fast.data.decode import chosen, decode, decode_frames, probe, reading, source
from xclip_fast.data.decode.ahead import decode_ahead
from xclip_fast.data.decode.fields import may_hold_fields
from xclip_fast.data.decode.picture import EXACT_COLOR
from xclip_fast.data.decode.reading import all_frames, open_video
from xclip_fast.data.decode.source import ReadError, Source, VideoError
from xclip_fast.data.decode.windows import decode_windows
from xclip_fast.data.manifest import index
from xclip_fast.data.motion import render, write_clip
from xclip_fast.inference.batches import Finished, Reading, answers

FORMS = {"mp4": {}, "mkv": {}, "ts": {}, "flv": {}, "avi": {"codec": "mpeg4"}, "webm": {"codec": "libvpx-vp9"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    frames = render("moving right", 0, frames=40)
    for suffix, options in FORMS.items():
        write_clip(root / f"EIO_a.{suffix}", frames, **options)
    return root


@pytest.fixture
def failing(monkeypatch):
    """Reads beyond a byte fail, this often."""
    monkeypatch.setattr(source, "RETRIES", (0.0, 0.0, 0.0))
    real = os.read
    state = {"left": 0, "from": 0, "errno": errno.EIO, "failed": 0}

    def read(descriptor, count):
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        if at + count > state["from"] and state["left"] > 0:
            if at < state["from"]:
                return real(descriptor, state["from"] - at)
            state["left"] -= 1
            state["failed"] += 1
            raise OSError(state["errno"], os.strerror(state["errno"]))
        return real(descriptor, count)

    monkeypatch.setattr(reading.os, "read", read)
    return state


@pytest.mark.parametrize("suffix", FORMS)
def test_a_read_error_is_not_the_end_of_the_file(suffix, folder, failing):
    """Before, five of six were taken for whole videos of 5 to 27 frames."""
    path = folder / f"EIO_a.{suffix}"
    failing.update({"left": 10**9, "from": path.stat().st_size * 6 // 10})
    for use in (probe, decode, lambda path: decode_frames(path, [0, 39])):
        with pytest.raises(ReadError, match=r"EIO_a\.\w+: cannot be read now \(Input/output error\)"):
            use(path)
    assert failing["failed"]


@pytest.mark.parametrize("suffix", FORMS)
def test_an_error_that_passes_is_tried_again(suffix, folder, failing):
    path = folder / f"EIO_a.{suffix}"
    expected = decode_frames(path, range(0, 40, 3))
    for number in (errno.EIO, errno.ESTALE):
        failing.update({"left": 3, "from": path.stat().st_size // 2, "errno": number, "failed": 0})
        assert np.array_equal(decode_frames(path, range(0, 40, 3)), expected)
        assert failing["failed"] == 3


def test_a_read_error_with_a_stored_plan(folder, failing):
    path = folder / "EIO_a.mkv"
    source = Source(str(path), size=path.stat().st_size, plan=probe(path).plan)
    failing.update({"left": 10**9, "from": path.stat().st_size * 6 // 10})
    with pytest.raises(ReadError):
        decode_frames(source, [39])


def test_an_index_keeps_no_read_error(folder, tmp_path, failing):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    failing.update({"left": 10**9, "from": 2000})
    sick = index(data, workers=0)
    assert {reason for reason in sick.bad.values()} == {"cannot be read now (Input/output error)"}
    assert len(sick.bad) == 6
    assert {video.mtime_ns for video in sick.videos} == {0}
    failing["left"] = 0
    assert [video.frames for video in index(data, workers=0).videos] == [40] * 6


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="needs gcc, on Linux")
def test_an_index_beside_a_sick_disk(folder, tmp_path):
    """The read() of the C library fails, as of a broken disk."""
    code = r"""
    #define _GNU_SOURCE
    #include <dlfcn.h>
    #include <errno.h>
    #include <stdio.h>
    #include <string.h>
    #include <unistd.h>
    static ssize_t (*real)(int, void *, size_t);
    ssize_t read(int file, void *to, size_t count) {
        char link[64], path[4096];
        if (!real) real = dlsym(RTLD_NEXT, "read");
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        ssize_t length = readlink(link, path, sizeof path - 1);
        path[length < 0 ? 0 : length] = 0;
        if (!strstr(path, "/EIO_")) return real(file, to, count);
        off_t at = lseek(file, 0, SEEK_CUR);
        if (at >= 2000) return errno = EIO, -1;
        return real(file, to, at + (off_t)count > 2000 ? 2000 - at : count);
    }
    """
    (tmp_path / "sick.c").write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "sick.so", "sick.c", "-ldl"], cwd=tmp_path, check=True)
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    script = (
        "import sys; from xclip_fast.data.decode import source; source.RETRIES = ();"
        "from xclip_fast.data.manifest import index;"
        "print(sorted(set(index(sys.argv[1]).bad.values())), len(index(sys.argv[1]).bad))"
    )
    command, sick = [sys.executable, "-c", script, str(data)], {"LD_PRELOAD": str(tmp_path / "sick.so")}
    run = subprocess.run(command, env=os.environ | sick, capture_output=True, text=True, check=True)
    assert run.stdout == "['cannot be read now (Input/output error)'] 6\n"
    assert not index(data).bad
    text = data / "EIO_list.txt"  # the error of a list names it
    text.write_text("EIO_a.mp4\n" * 400)
    command = [sys.executable, "-m", "xclip_fast", "index", str(text)]
    run = subprocess.run(command, env=os.environ | sick, capture_output=True, text=True)
    assert (run.returncode, f"{text}: Input/output error" in run.stderr) == (1, True), run.stderr


def test_lack_of_memory_is_no_damage(folder, monkeypatch):
    def none(*_, **__):
        raise MemoryError

    monkeypatch.setattr(chosen, "VideoReformatter", lambda: type("Reformatter", (), {"reformat": none})())
    with pytest.raises(ReadError, match="not enough memory"):
        decode_frames(folder / "EIO_a.mp4", [0])
    ((_, bad),) = decode_ahead([str(folder / "EIO_a.mp4")], Reading(2, 224).windows, 1)
    assert isinstance(bad, ReadError)


# ---- nothing else is opened


TEXTS = {
    "concat": "ffconcat version 1.0\nfile pipe\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\npipe\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1"><BaseURL>pipe</BaseURL></Representation></AdaptationSet></Period>'
    "</MPD>",
}


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "mpd", "sdp", "ffconcat", "ts"])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_name_other_files(text, suffix, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for ever
    path = tmp_path / f"list.{suffix}"
    path.write_text(TEXTS[text])
    begun = time.monotonic()
    with pytest.raises(VideoError):
        probe(path)
    assert time.monotonic() - begun < 5


# ---- bounds


GIF = b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(3) + b"\xff" * 3 + b"!\xff\x0bNETSCAPE2.0\x03\1\0\0\0"
GIF += (b"!\xf9\4\0\5\0\0\0" + b",\0\0\0\0\xff\xff\xff\xff\0\2\2\x44\1\0") * 2 + b";"


def test_a_picture_size_that_no_file_needs(tmp_path):
    """A few bytes that ask for 17 GB; the limit of memory would end the process that allocates them."""
    path = tmp_path / "bomb.mp4"
    path.write_bytes(GIF)
    script = (
        "import resource, sys; from xclip_fast.data.decode import probe, decode\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for use in (probe, decode):\n"
        "    try:\n        use(sys.argv[1])\n"
        "    except ValueError as error:\n        print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    *errors, grown = run.stdout.splitlines()
    assert len(errors) == 2, run.stdout
    assert int(grown) < 400


def test_bounds_can_be_raised(folder, tmp_path, monkeypatch):
    path = folder / "EIO_a.mp4"
    for name, value, why in (
        ("XCLIP_FAST_MAX_PIXELS", 128 * 128 - 1, "128x128 pixels"),
        ("XCLIP_FAST_MAX_FRAMES", 39, "more than 39 frames"),
    ):
        monkeypatch.setenv(name, str(value))
        with pytest.raises(ReadError, match=f"{why}.*{name} allows more"):
            decode(path)
        manifest = index(path.parent, tmp_path / f"{name}.jsonl", workers=0)
        assert why in manifest.videos[[video.path for video in manifest.videos].index(path.name)].error
        monkeypatch.setenv(name, str(value + 1))
        assert decode(path).shape == (8, 224, 224, 3)
        assert not index(path.parent, tmp_path / f"{name}.jsonl", workers=0).bad  # a limit is no fact about the file
        monkeypatch.setenv(name, "many")
        with pytest.raises(ValueError, match=f"{name} is 'many'; a whole number"):
            decode(path)
        monkeypatch.delenv(name)


def test_packets_without_a_frame_are_bounded(folder, monkeypatch):
    class Deaf:
        def decode(self, packet):
            return []

    monkeypatch.setenv("XCLIP_FAST_MAX_LEADING_PACKETS", "5")
    with open_video(folder / "EIO_a.mp4") as (container, stream):
        packets = list(container.demux(stream))
        monkeypatch.setattr(reading, "packets_of", lambda *_: iter(packets))
        with pytest.raises(VideoError, match="first 5 packets give no frame"):
            list(reading.all_frames(container, type("Stream", (), {"codec_context": Deaf()})))


# ---- fields


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
def test_progressive_streams_hold_no_fields(suffix, folder):
    with open_video(folder / f"EIO_a.{suffix}") as (_, stream):
        assert not may_hold_fields(stream.codec_context.extradata)
    assert may_hold_fields(None)
    assert may_hold_fields(b"\1\2")
    assert may_hold_fields(b"\0\0\1\x67\x4d")


class Bits:
    """Bits of H.264 syntax: fixed lengths and Exp-Golomb codes."""

    def __init__(self):
        self.text = ""

    def __call__(self, *codes):
        for code in codes:
            if isinstance(code, tuple):
                value, length = code
                self.text += format(value, f"0{length}b")
            else:
                binary = format(code + 1, "b")
                self.text += "0" * (len(binary) - 1) + binary
        return self

    def bytes(self):
        text = self.text + "0" * (-len(self.text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big")


def unit(header, payload):
    """A NAL unit: no three bytes in it may look like a start code."""
    for byte in (3, 0, 1, 2):
        payload = payload.replace(bytes([0, 0, byte]), bytes([0, 0, 3, byte]))
    return b"\0\0\0\1" + bytes([header]) + payload


def field_pictures(count, paired=lambda number: True):
    """H.264 of 32x32 pixels, uncompressed: frame `number` has the level 20 + 7 number, and is coded as two fields, or
    as one picture where `paired` says no."""
    sets = Bits()((77, 8), (0, 8), (30, 8), 0, 0, 0, 4, 1, (0, 1), 1, 0, (0, 1), (0, 1), (1, 1), (0, 1), (1, 1))
    sets((0, 4), (1, 1), (1, 32), (50, 32), (1, 1), (0, 4), (1, 1))  # 25 frames a second
    start = unit(0x67, sets.bytes())
    start += unit(0x68, Bits()(0, 0, (0, 2), 0, 0, 0, (0, 3), 0, 0, 0, (1, 1), (0, 2), (1, 1)).bytes())
    for number in range(count):
        first = number % 8 == 0
        for bottom in (0, 1) if paired(number) else (None,):
            idr = first and not bottom
            bits = Bits()(0, 7, 0, (number % 8, 4), (int(bottom is not None), 1))
            if bottom is not None:
                bits((bottom, 1))
            if idr:
                bits(number // 8 % 2)
            bits((2 * (number % 8) + (bottom or 0), 8), (0, 2 if idr else 1), 0, 1)
            data = b""
            for _ in range(2 if bottom is not None else 4):  # macroblocks
                bits(25)
                data += bits.bytes() + bytes([20 + 7 * number]) * 256 + bytes([128]) * 128
                bits = Bits()
            data += bits((1, 1)).bytes()
            yield unit(9, b"\x10") + (start if idr else b"") + unit(0x25 if idr else 0x21, data)


@pytest.mark.parametrize("kind", ["fields", "frames", "mixed"])
@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
def test_field_coded_h264(kind, suffix, tmp_path):
    """A field is not a frame: 24 frames at 25 a second were counted as 48 at 50, and their decoding as damage."""
    paired = {"fields": lambda number: True, "frames": lambda number: False, "mixed": lambda number: number % 3 > 0}
    raw, path = tmp_path / "raw.h264", tmp_path / f"a.{suffix}"
    raw.write_bytes(b"".join(field_pictures(24, paired[kind])))
    with av.open(str(raw)) as source, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        time = 0
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.time_base = stream, Fraction(1, 50)
                packet.pts = packet.dts = time
                time += packet_fields(bytes(packet))
                copy.mux(packet)
    info = probe(path)
    assert info.frames == 24
    assert abs(info.fps - 25) < 0.1
    assert info.interlaced == (kind == "fields")  # as its first frame is
    assert (info.plan is not None) == (kind == "frames")
    levels = decode_frames(path, range(24))[:, 16, 16, 0].astype(int)
    assert (np.diff(levels) >= 6).all()
    source = Source(str(path), size=path.stat().st_size, plan=info.plan)
    assert (decode_frames(source, [3, 20])[:, 16, 16, 0] == levels[[3, 20]]).all()
    assert index(tmp_path, workers=0, format="flat").videos[0].frames == 24


def packet_fields(data):
    """1 for a packet of one field, 2 for one of a frame."""
    at = max(data.find(b"\0\0\1\x25"), data.find(b"\0\0\1\x21"))
    assert at >= 0
    return 1 if (len(data) - at) < 1000 else 2


# ---- files that hang their decoder


@pytest.fixture
def hanging(tmp_path, folder, monkeypatch):
    """Three videos, of which the second hangs its decoder."""
    paths = [tmp_path / f"{name}.mp4" for name in "abc"]
    for path in paths:
        shutil.copy(folder / "EIO_a.mp4", path)
    real = reading.File.read

    def read(self, count):
        while self.name.endswith("b.mp4"):
            time.sleep(0.05)
        return real(self, count)

    monkeypatch.setattr(reading.File, "read", read)
    monkeypatch.setenv("XCLIP_FAST_MAX_SECONDS", "1")
    return [str(path) for path in paths]


def test_a_hung_file_does_not_stop_classify(hanging, tiny_model):
    wanted, begun = Reading(frames=3, size=32), time.monotonic()
    found = list(answers(tiny_model, hanging, wanted, lambda features: (features.video,), workers=1))
    ends = [item for item in found if isinstance(item, Finished)]
    assert [item.error is None for item in ends] == [True, False, True]
    late = r"b\.mp4: decoding did not advance for 1 seconds.*XCLIP_FAST_MAX_SECONDS allows more"
    assert re.search(late, str(ends[1].error))
    assert time.monotonic() - begun < 10


def test_slow_is_not_hung(folder, monkeypatch):
    """A packet every 0.05 s, for longer than the limit."""
    real, start = reading.progress, time.monotonic()

    def slow():
        time.sleep(0.05)
        real()

    monkeypatch.setattr(reading, "progress", slow)
    monkeypatch.setenv("XCLIP_FAST_MAX_SECONDS", "1")
    window = next(decode_ahead([str(folder / "EIO_a.webm")], Reading(2, 224).windows, 1))[1]
    assert window.frames.shape == (2, 224, 224, 3)
    assert time.monotonic() - start > 1.5


# ---- what a file is


@pytest.mark.parametrize("begin", [0, 2, 0.82, 30, 100, 400])  # seconds, of the first recording's clock
def test_joined_transport_streams(tmp_path, begin):
    """The second recording's clock starts at 0, also before, among and after the times of the first, and far before.

    The frames were those in the order of their times, and FFmpeg adds 26.5 hours to times far before the first.
    """
    whole = b""
    for number, frames in enumerate((40, 25)):
        part = tmp_path / f"{number}.ts"
        times = [(begin, 0)[number] + frame / 25 for frame in range(frames)]
        write_clip(part, render("moving up", number, frames=frames), times=times, bf=0)
        whole += part.read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(whole)
    with open_video(path) as (container, stream):
        shown = [
            picture.to_ndarray(format="rgb24", interpolation=EXACT_COLOR) for picture in all_frames(container, stream)
        ]
    info = probe(path)
    assert info.frames == len(shown) >= 64
    assert info.duration == pytest.approx(65 / 25, abs=0.09)
    assert info.fps == pytest.approx(25, abs=0.8)
    wanted = [0, 20, 39, 41, 60]
    assert np.array_equal(decode_frames(path, wanted), np.stack(shown)[wanted])
    assert next(decode_windows(path)).end == pytest.approx(info.duration)


def test_a_slow_rate_on_a_fine_clock(tmp_path):
    """A frame lasts 3e10 units of the clock: more than 32 bits."""
    path = tmp_path / "slow.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(1, 30))
        stream.width, stream.height = 64, 48
        for frame in np.zeros((3, 48, 64, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    scale = b"\x2a\xd7\xb1\x83"  # Matroska's TimestampScale in ns, three bytes
    assert data.count(scale + b"\x0f\x42\x40") == 1
    path.write_bytes(data.replace(scale + b"\x0f\x42\x40", scale + b"\0\0\1"))
    assert probe(path).frames == 3


def test_animated_webp(tmp_path):
    """PyAV 19's FFmpeg decodes it. PyAV 18's does not, and the error names it."""
    image = pytest.importorskip("PIL.Image")
    frames = render("moving up", 0, frames=3)
    pictures = [image.fromarray(frame) for frame in frames]
    path = tmp_path / "a.mp4"
    pictures[0].save(path, "WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    if av.__version__.startswith("18."):
        with pytest.raises(VideoError, match=r"is an animated WebP, which FFmpeg cannot decode; convert it to mp4"):
            probe(path)
    else:
        assert probe(path).frames == 3
        assert np.array_equal(decode_frames(path, [2, 0, 1]), np.stack(frames)[[2, 0, 1]])
    pictures[0].save(path, "WEBP")
    with pytest.raises(VideoError, match="is a picture, not a video"):
        probe(path)
