"""Decoding by DALI: routing, order and what happens when it fails (anywhere); pixels with DALI's CPU operators (where
DALI is installed) and on a GPU."""

import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from xclip_fast.data.decode import dali_support
from xclip_fast.data.decode.decoder import VideoError, decode_frames, decode_views, probe
from xclip_fast.data.decode.plan import Plan
from xclip_fast.data.decode.video import Video, pack_plan
from xclip_fast.data.loader import dali, dali_graph
from xclip_fast.data.loader.loader import loader
from xclip_fast.data.manifest.manifest import Manifest
from xclip_fast.data.motion import render, write_clip
from xclip_fast.data.sampling import sample_rng
from xclip_fast.data.threads import Job, Threads
from xclip_fast.data.transforms import TestTransform, TrainTransform, View

needs_dali = pytest.mark.skipif(dali_support.missing() is not None, reason=str(dali_support.missing()))
CLIPS = (  # name, codec, options of the encoder; two that DALI's CPU operators decode, two that they do not
    ("vp9.webm", "libvpx-vp9", {"g": 10}),
    ("mjpeg.mkv", "mjpeg", {"pix_fmt": "yuvj420p", "qscale": 2}),
    ("h264.mp4", "libx264", {"g": 12}),
    ("wide.webm", "libvpx-vp9", {"g": 30}),
    ("vp9 of 444.webm", "libvpx-vp9", {"pix_fmt": "yuv444p"}),
)


def row(root, name, label=None, **facts):
    return replace(probe(root / name), path=name, label=label, size=os.path.getsize(root / name), **facts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("dali")
    for number, (name, codec, options) in enumerate(CLIPS):
        size = (96, 160) if name.startswith("wide") else (128, 128)
        clip = render("moving right", 3, number, frames=30 - number, size=size)
        write_clip(root / name, clip, codec=codec, **options)
    return root


@pytest.fixture(scope="module")
def manifest(folder):
    return Manifest(folder, ("a", "b"), tuple(row(folder, name, n % 2) for n, (name, _, _) in enumerate(CLIPS)))


def expected(manifest, transform, number, seed=0, epoch=0):
    video = manifest.videos[number]
    rng = sample_rng(seed, epoch, number) if transform.random else None
    views = transform.views(video.frames, video.width, video.height, rng)
    pixels = decode_views(manifest.source(number), views)
    return pixels[0] if len(views) == 1 else pixels


# --- what goes to DALI


GOOD = Video("a.mp4", 0, size=1000, frames=4, width=320, height=240, codec="h264", pix_fmt="yuv420p")
PLAN = Plan([0, 1, 2, 3], [0, 0, 1, 1], [(0, -1), (2, 1)])


@pytest.mark.parametrize(
    ("facts", "plan", "why"),
    [
        ({}, PLAN, None),
        ({"codec": "hevc"}, PLAN, None),
        ({"pix_fmt": "yuvj420p"}, PLAN, None),
        ({"codec": "av1"}, PLAN, "codec"),
        ({"codec": "vp9"}, PLAN, "codec"),
        ({"codec": "mpeg4"}, PLAN, "codec"),
        ({"pix_fmt": "yuv420p10le"}, PLAN, "pixel format"),
        ({"pix_fmt": "yuv444p"}, PLAN, "pixel format"),
        ({"rotation": 90}, PLAN, "rotation"),
        ({"width": 321}, PLAN, "odd side"),
        ({"width": 8192}, PLAN, "size"),
        ({"height": 128, "codec": "hevc"}, PLAN, "size"),
        ({"size": 1 << 30}, PLAN, "large file"),
        ({"error": "cut off"}, PLAN, "has an error"),
        ({}, None, "packets"),
        ({}, replace(PLAN, pts=[-1, 0, 1, 2]), "edit list"),
        ({}, replace(PLAN, keyframes=[(0, -1), (-5, -6)]), "edit list"),
        ({}, replace(PLAN, keyframes=[(0, -3), (2, 0)]), "keyframes too close"),
        ({"codec": "hevc"}, Plan([0, 1, 2, 9], [0, 0, 0, 1], [(0, -1), (9, 7)]), "open groups"),
        ({"codec": "h264"}, Plan([0, 1, 2, 9], [0, 0, 0, 1], [(0, -1), (9, 7)]), None),
    ],
)
def test_routing(facts, plan, why):
    found = dali.supported(replace(GOOD, packed=plan and pack_plan(plan), **facts))
    assert found == why if why is None else why in (found or ""), found


def test_routing_by_color():
    good = replace(GOOD, packed=pack_plan(PLAN))
    assert dali.supported(replace(good, colorspace=1)) is None
    assert "number 9" in dali.supported(replace(good, colorspace=9))
    assert "interlaced" in dali.supported(replace(good, interlaced=True))


@pytest.mark.parametrize(
    ("codec", "options", "why"),
    [
        ("libx264", {}, None),
        ("libx264", {"g": 12, "bf": 0}, None),
        ("libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0"}, None),  # sought at the IDR frame only
        ("libx264", {"g": 2, "bf": 3, "x264-params": "b-adapt=0"}, "keyframes too close"),
        ("libx265", {"x265-params": "open-gop=0:keyint=12:bframes=3:log-level=none"}, None),
        ("libx265", {"x265-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:log-level=none"}, "open groups"),
        ("libx264", {"flags": "+ildct+ilme"}, "interlaced"),
        ("mpeg4", {}, "codec"),
    ],
)
def test_routing_of_real_files(tmp_path, codec, options, why):
    write_clip(tmp_path / "a.mp4", render("growing", 1, frames=40, size=(144, 144)), codec=codec, **options)
    found = dali.supported(row(tmp_path, "a.mp4"))
    assert found == why if why is None else why in (found or ""), found


def test_container_by_its_first_bytes(folder):
    assert dali_support.container((folder / "h264.mp4").read_bytes()[:8]) is None
    assert dali_support.container((folder / "vp9.webm").read_bytes()[:8]) is None
    assert "neither" in dali_support.container(b"RIFF\x00\x00\x00\x00")
    assert "neither" in dali_support.container(b"")


def test_without_dali(monkeypatch, manifest):
    monkeypatch.setattr(dali_support.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install nvidia-dali"):
        next(dali.dali_batches(manifest, TestTransform(), [np.array([0])], device="cpu"))
    assert "nvidia.dali" not in sys.modules or dali_support.missing()


def test_frames_are_asked_for_once():
    views = [View(np.array([7, 7, 2]), (1, 2, 30, 40), 8), View(np.array([2, 5, 9]), (0, 0, 9, 9), 8, flip=True)]
    inputs = dali_graph.inputs_of(np.zeros(3, np.uint8), views, 2)
    assert inputs["frames"].tolist() == [2, 5, 7, 9]
    assert inputs["frames"][inputs["order"]].tolist() == [[7, 7, 2], [2, 5, 9]]
    assert inputs["start"].tolist() == [[1, 2], [0, 0]]
    assert inputs["shape"].tolist() == [[30, 40], [9, 9]]
    assert inputs["flip"].tolist() == [0, 1]
    assert inputs["color"].tolist() == [np.eye(3, 4).tolist()] * 2


def test_color_correction_leaves_gray_alone():
    assert np.allclose(dali_graph.CORRECTION.sum(axis=1), 1)
    # A red of BT.709 (Y' 0.2126, Cr 0.5, Cb by definition), decoded as BT.601 and corrected, is red again.
    ycc = np.array([0.2126, -0.2126 / (2 * (1 - 0.0722)), 0.5])
    wrong = np.array([ycc[0] + 1.402 * ycc[2], ycc[0] - 0.344136 * ycc[1] - 0.714136 * ycc[2], ycc[0] + 1.772 * ycc[1]])
    assert np.allclose(dali_graph.CORRECTION @ wrong, [1, 0, 0], atol=1e-4)


# --- order and failures, with a stand-in for DALI


class Stand:
    """Gives, for each sample, its encoded bytes' first eight as pixels; or fails, or hangs."""

    def __init__(self, trouble=lambda names: None):
        self.trouble = trouble

    def build(self):
        pass

    def run(self, encoded, order, **_):
        self.trouble(encoded)
        value = np.array([int(data[:2000].astype(np.int64).sum()) % 251 for data in encoded], np.uint8)
        pixels = np.broadcast_to(value[:, None, None, None, None], (len(value), order[0].shape[1], 8, 8, 3)).copy()
        pixels = torch.from_numpy(pixels)
        return [type("List", (), {"as_tensor": lambda self: pixels})()]


@pytest.fixture
def stand(monkeypatch):
    """Batches by the stand-in, with `trouble(list of encoded arrays)` before each run."""
    monkeypatch.setattr(dali, "require", lambda: None)
    made = []

    def batches(manifest, rows, trouble=lambda encoded: None, **options):
        for name, usual in (("ahead", 3), ("streams", 2), ("memory", 2 << 30)):
            monkeypatch.setattr(dali, f"_{name.upper()}", options.pop(name, usual))

        def make(**_):
            made.append(time.monotonic())
            return Stand(trouble)

        monkeypatch.setattr(dali, "make_pipeline", make)
        transform = options.pop("transform", TestTransform(frames=2, size=8))
        return dali.dali_batches(manifest, transform, rows, device="cpu", **options)

    batches.made = made
    return batches


def test_order_with_rows_of_both_kinds(stand, manifest):
    rows = [np.array([4, 0, 2]), np.array([1, 3]), np.array([2]), np.array([], np.int64), np.array([3, 4, 1, 0])]
    got = list(stand(manifest, rows, workers=2))
    assert [batch.samples.tolist() for batch in got] == [part.tolist() for part in rows]
    assert [batch.labels.tolist() for batch in got] == [[n % 2 for n in part] for part in rows]
    transform = TestTransform(frames=2, size=8)
    for batch in got:
        assert batch.frames.dtype == torch.uint8
        assert batch.frames.shape == (len(batch.samples), 2, 8, 8, 3)
        for number, frames in zip(batch.samples.tolist(), batch.frames, strict=True):
            if number in (2, 4):  # not for DALI
                assert np.array_equal(frames, expected(manifest, transform, number))
            else:
                data = np.fromfile(manifest.source(number).path, np.uint8)[:2000]
                assert set(frames.flatten().tolist()) == {int(data.astype(np.int64).sum()) % 251}


def test_large_batches_are_split(stand, manifest):
    runs = []
    rows = [np.array([0, 1, 3, 0, 1, 3])]
    one = 2 * 128 * 128 * 3
    (batch,) = stand(manifest, rows, lambda encoded: runs.append(len(encoded)), memory=2 * one, streams=1)
    assert runs == [2, 2, 2]
    (whole,) = stand(manifest, rows)
    assert torch.equal(batch.frames, whole.frames)


def test_a_failed_run_is_decoded_on_the_cpu(stand, manifest, tmp_path, caplog):
    """The bad file is named, the others are delivered, and the next epoch's runs leave it out."""
    bad = replace(manifest.videos[0], path="bad.webm", label=None)
    data = bytearray((manifest.root / "vp9.webm").read_bytes())
    data[200:] = bytes(len(data) - 200)
    (manifest.root / "bad.webm").write_bytes(data)
    manifest = replace(manifest, videos=(*manifest.videos, bad))
    routes, told, sizes = {}, [], []

    def trouble(encoded):
        sizes.append(len(encoded))
        if any(not part[200:].any() for part in encoded):
            raise RuntimeError("Critical error in pipeline:\nError in CPU operator\nencountered:\nno frame in it\nC++")

    options = {"routes": routes, "on_bad": lambda row, why: told.append((row, why)), "streams": 1}
    (batch,) = stand(manifest, [np.array([0, 5, 2, 1])], trouble, **options)
    assert batch.samples.tolist() == [0, 2, 1]
    transform = TestTransform(frames=2, size=8)
    for number, frames in zip((0, 2, 1), batch.frames, strict=True):
        assert np.array_equal(frames, expected(manifest, transform, number))
    assert [number for number, _ in told] == [5]
    assert "bad.webm" in told[0][1]
    assert "DALI failed: no frame in it\n" in caplog.text
    assert {number for number, why in routes.items() if why} == {2, 5}
    list(stand(manifest, [np.array([0, 5, 2, 1])], trouble, **options))
    assert sizes == [3, 2]
    assert [number for number, _ in told] == [5, 5]


def test_missing_and_changed_files(stand, manifest):
    lost = replace(manifest.videos[0], path="lost.webm")
    grown = replace(manifest.videos[1], size=manifest.videos[1].size - 1)
    manifest = replace(manifest, videos=(lost, grown, manifest.videos[3]))
    told = {}
    batch = next(stand(manifest, [np.array([0, 1, 2])], on_bad=told.__setitem__))
    assert batch.samples.tolist() == [1, 2]
    assert np.array_equal(batch.frames[0], expected(manifest, TestTransform(frames=2, size=8), 1))
    assert "lost.webm" in told[0]


def test_reads_that_give_less_than_asked(stand, manifest, monkeypatch):
    """As on some network file systems."""
    whole, routes = os.read, {}
    monkeypatch.setattr(os, "read", lambda file, count: whole(file, min(count, 100)))
    assert next(stand(manifest, [np.array([0])], routes=routes)).samples.tolist() == [0]
    assert routes == {0: None}


def test_a_row_without_facts_is_a_bad_one(stand, manifest):
    manifest = replace(
        manifest, videos=(manifest.videos[0], replace(manifest.videos[1], codec="", frames=0, packed=None))
    )
    told = {}
    (batch,) = stand(manifest, [np.array([0, 1])], on_bad=told.__setitem__)
    assert batch.samples.tolist() == [0]
    assert told == {1: "the manifest has no facts about it; index the data again"}


def test_on_bad_may_stop(stand, manifest):
    manifest = replace(manifest, videos=(replace(manifest.videos[0], path="lost.webm"),))

    def stop(row, why):
        raise KeyError(why)

    before = threading.active_count()
    with pytest.raises(KeyError):
        list(stand(manifest, [np.array([0])], on_bad=stop))
    assert threading.active_count() == before


def test_breaking_off_ends_the_threads(stand, manifest):
    before = threading.active_count()
    batches = stand(manifest, [np.array([0, 1])] * 10)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_breaking_off_drops_the_samples_ahead(stand, manifest, monkeypatch):
    decoded = []

    def slow(source, views):
        time.sleep(0.2)
        decoded.append(source)
        return decode_views(source, views)

    monkeypatch.setattr(dali, "decode_views", slow)
    batches = stand(manifest, [np.array([0]), np.array([2] * 9 + [0])], workers=1)
    next(batches)
    batches.close()
    assert len(decoded) <= 3


def test_a_broken_dali_is_an_error(stand, manifest):
    """Not a silent, slow epoch on the CPU."""

    def trouble(encoded):
        raise RuntimeError("NVDEC is not there")

    got = []
    rows = [np.array([number % 2 * 3]) for number in range(8)]
    with pytest.raises(RuntimeError, match=r"5 times in a row.*NVDEC is not there"):
        got.extend(batch.samples.tolist() for batch in stand(manifest, rows, trouble, routes=Forgetful(), streams=1))
    assert got == [part.tolist() for part in rows[:4]]


class Forgetful(dict):
    def __setitem__(self, key, value):
        super().__setitem__(key, None)


def test_a_dead_pipeline_is_built_anew(stand, manifest):
    """After a failure the pipeline is tried again; if that fails too, the run gets a new one."""
    state = {"runs": 0, "dead": None}

    def trouble(encoded):
        state["runs"] += 1
        if state["runs"] == 2:
            state["dead"] = len(stand.made)
        if state["dead"] == len(stand.made):
            raise RuntimeError("dead")

    rows = [np.array([0])] * 4
    batches = stand(manifest, rows, trouble, routes=Forgetful(), streams=1, ahead=0)
    assert [batch.samples.tolist() for batch in batches] == [[0]] * 4
    assert len(stand.made) == 2
    assert state["runs"] == 5  # the third run was tried on both


def test_a_hung_pipeline_is_left_behind(stand, manifest):
    release = threading.Event()
    hung = []

    def trouble(encoded):
        if len(encoded) == 2:
            hung.append(threading.current_thread())
            release.wait(20)

    rows = [np.array([0, 1]), np.array([3]), np.array([1])]
    start = time.monotonic()
    routes = {}
    got = list(stand(manifest, rows, trouble, streams=1, time_limit=0.4, routes=routes))
    assert time.monotonic() - start < 10
    assert [batch.samples.tolist() for batch in got] == [[0, 1], [3], [1]]
    assert np.array_equal(got[0].frames[0], expected(manifest, TestTransform(frames=2, size=8), 0))
    assert "did not advance for 0.4 seconds" in routes[0]
    assert routes[3] is None
    release.set()
    hung[0].join(5)
    assert not hung[0].is_alive()


def test_a_hung_file_is_a_bad_one(stand, manifest, monkeypatch):
    release = threading.Event()

    def hang(source, views):
        release.wait(20)
        raise VideoError("too late")

    monkeypatch.setattr(dali, "decode_views", hang)
    told = {}
    batch = next(stand(manifest, [np.array([0, 2])], on_bad=told.__setitem__, time_limit=0.4))
    release.set()
    assert batch.samples.tolist() == [0]
    assert "did not advance" in told[2]


def test_threads_find_hung_jobs_that_come_before():
    """Both threads hang on jobs that nobody waits for yet."""
    release = threading.Event()
    threads = Threads(2, "test", lambda: None, 0.3)
    stuck = [threads.submit(Job(lambda _: release.wait(20))) for _ in range(2)]
    assert threads.result(threads.submit(Job(lambda _: "done"))) == "done"
    for job in stuck:
        with pytest.raises(TimeoutError):
            threads.result(job)
    release.set()
    threads.close()
    assert not any(thread.is_alive() for thread in threads.threads)


def test_threads_end_before_the_interpreter_does():
    """A thread that is inside torch at the interpreter's end aborts the process."""
    code = """if True:
        import torch
        from xclip_fast.data.threads import Job, Threads, progress
        begun = torch.tensor(0)
        def work(_):
            a = torch.ones(1500, 1500)
            while True:
                a @ a
                begun.fill_(1)
                progress()
        threads = Threads(2, "test", lambda: None, 20)
        threads.submit(Job(work))
        while not begun:
            pass
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_threads_end_before_the_interpreter_does_after_ctrl_c_while_they_are_closed():
    code = """if True:
        import signal, threading, time
        import torch
        from xclip_fast.data.threads import Job, Threads
        begun = threading.Event()
        def work(_):
            begun.set()
            while not threads.closed:
                pass
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            a, end = torch.ones(500, 500), time.monotonic() + 0.3
            while time.monotonic() < end:
                a @ a
        threads = Threads(2, "test", lambda: None, 20)
        threads.submit(Job(work))
        begun.wait()
        threads.close()
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")


def test_threads_are_closed_by_one_of_them():
    """As when garbage that holds a reader of videos is collected there."""
    threads = Threads(2, "test", lambda: None, 20)
    threads.result(threads.submit(Job(lambda _: threads.close(patience=20))))
    threads.close()
    assert not any(thread.is_alive() for thread in threads.threads)


def test_reasons_are_logged_once_a_kind(stand, manifest, caplog):
    with caplog.at_level(logging.WARNING):
        list(stand(manifest, [np.array([2, 4]), np.array([2, 4])]))
    assert caplog.text.count("decoded on the CPU: codec") == 1
    assert caplog.text.count("decoded on the CPU: pixel format") == 1


# --- DALI's CPU operators


def run_dali(encoded, views, colorspace=2, device_id=None):
    """uint8 (samples, T, S, S, 3), or (samples, V, T, S, S, 3)."""
    first = views[0]
    pipe = dali_graph.make_pipeline(
        views=len(first), size=first[0].size, batch_size=len(views), threads=2, device_id=device_id
    )
    pipe.build()
    samples = [dali_graph.inputs_of(data, part, colorspace) for data, part in zip(encoded, views, strict=True)]
    inputs = {name: [sample[name] for sample in samples] for name in samples[0]}
    return torch.from_dlpack(pipe.run(**inputs)[0].as_tensor()).cpu().numpy()


def whole(frames, side=128):
    return View(np.asarray(frames, np.int64), (0, 0, side, side), side)


@needs_dali
@pytest.mark.parametrize(
    ("name", "codec", "times"),
    [
        ("constant.webm", "libvpx-vp9", None),
        ("variable.webm", "libvpx-vp9", np.random.default_rng(1).uniform(0.01, 0.2, 40).cumsum()),
        ("late.mp4", "libvpx-vp9", 1 + np.arange(40) / 25),  # an edit list delays it
        ("cut.mov", "mjpeg", np.arange(-9, 31) / 25),  # an edit list hides nine frames
    ],
)
def test_frame_numbers(tmp_path, name, codec, times):
    """Unsorted numbers with repeats give the frames of those numbers."""
    clip = render("moving right", 5, frames=40, size=(128, 128))
    options = {"pix_fmt": "yuvj420p"} if codec == "mjpeg" else {"g": 7, "cpu-used": 8}
    write_clip(tmp_path / name, clip, codec=codec, times=None if times is None else times.tolist(), **options)
    video = row(tmp_path, name)
    assert video.frames == (31 if name == "cut.mov" else 40)
    assert dali.supported(video, gpu=False) is None
    numbers = np.random.default_rng(0).integers(0, video.frames, 12)
    (got,) = run_dali([np.fromfile(tmp_path / name, np.uint8)], [[whole(numbers)]])
    all_frames = decode_frames(tmp_path / name, range(video.frames)).astype(np.float32)
    nearest = [int(np.abs(all_frames - frame).mean((1, 2, 3)).argmin()) for frame in got]
    assert nearest == numbers.tolist()


@needs_dali
def test_a_frame_that_is_not_there_is_an_error(folder):
    with pytest.raises(RuntimeError, match="out-of-bounds"):
        run_dali([np.fromfile(folder / "vp9.webm", np.uint8)], [[whole([29, 30])]])


@needs_dali
@pytest.mark.parametrize(
    ("transform", "draws"),
    [
        (TrainTransform(frames=3, size=112), 60),
        (TrainTransform(2, 224), 20),
        (TestTransform(3, 112, clips=2, crops=3), 1),
    ],
)
def test_views_agree_with_the_torch_ones(manifest, transform, draws):
    """From the file to the pixels. Either rounds once with colors, and then a level apart is a tie; without them the
    resize here is in fixed point, up to a level from the exact value."""
    for number in (0, 1, 3):
        video = manifest.videos[number]
        encoded = np.fromfile(manifest.source(number).path, np.uint8)
        drawn = [
            transform.views(video.frames, video.width, video.height, sample_rng(1, epoch, number))
            for epoch in range(draws)
        ]
        got = run_dali([encoded] * draws, drawn)
        colored = [views[0].color is not None for views in drawn]
        assert draws == 1 or len(set(colored)) == 2
        for views, parts, colors in zip(drawn, got if len(drawn[0]) > 1 else got[:, None], colored, strict=True):
            difference = np.abs(decode_views(manifest.source(number), views).astype(int) - parts)
            assert difference.max() <= 1
            assert not colors or (difference > 0).mean() < 1e-3


@needs_dali
@pytest.mark.parametrize("transform", [TrainTransform(frames=3, size=64), TestTransform(3, 64, clips=2, crops=3)])
def test_batches_agree_with_the_cpu_path(manifest, transform):
    rows = [np.array([0, 2, 1]), np.array([4, 3]), np.array([3, 1, 0])]
    got = list(dali.dali_batches(manifest, transform, rows, seed=7, epoch=2, device="cpu", workers=2))
    assert [batch.samples.tolist() for batch in got] == [part.tolist() for part in rows]
    for batch in got:
        for number, frames in zip(batch.samples.tolist(), batch.frames.numpy(), strict=True):
            difference = np.abs(expected(manifest, transform, number, 7, 2).astype(int) - frames)
            assert difference.max() <= (0 if number in (2, 4) else 1)


@needs_dali
def test_batches_are_not_overwritten(manifest):
    """A batch is DALI's own memory; it must stay as it is while later ones are made."""
    rows = [np.array([0, 1, 3]), *[np.array([3, 0, 1])] * 6]
    batches = dali.dali_batches(manifest, TestTransform(2, 32), rows, device="cpu")
    first = next(batches)
    kept = first.frames.clone()
    rest = list(batches)
    del batches
    assert torch.equal(first.frames, kept)
    assert all(torch.equal(batch.frames, rest[0].frames) for batch in rest)
    assert torch.equal(rest[0].frames, kept[[2, 0, 1]])


@needs_dali
def test_a_corrupt_file_in_a_batch(manifest, caplog):
    name = "corrupt.webm"
    data = bytearray((manifest.root / "vp9.webm").read_bytes())
    data[60:] = np.random.default_rng(0).bytes(len(data) - 60)
    (manifest.root / name).write_bytes(data)
    manifest = replace(manifest, videos=(*manifest.videos, replace(manifest.videos[0], path=name)))
    told = {}
    rows = [np.array([0, 5, 1]), np.array([3, 1])]
    got = list(dali.dali_batches(manifest, TestTransform(2, 32), rows, device="cpu", on_bad=told.__setitem__))
    assert [batch.samples.tolist() for batch in got] == [[0, 1], [3, 1]]
    assert list(told) == [5]
    assert "DALI failed: Assert" in caplog.text
    (alone,) = dali.dali_batches(manifest, TestTransform(2, 32), [np.array([3, 1])], device="cpu")
    assert torch.equal(alone.frames, got[1].frames)


@needs_dali
def test_tar_members(manifest, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(manifest.root / "h264.mp4", "other.mp4")
        tar.add(manifest.root / "vp9.webm", "clip.webm")
    with tarfile.open(tmp_path / "shard.tar") as tar:
        offset = tar.getmember("clip.webm").offset_data
    member = replace(manifest.videos[0], path="shard.tar", member="clip.webm", offset=offset)
    transform, routes = TestTransform(2, 32), {}
    shard = Manifest(tmp_path, manifest.classes, (member,))
    (got,) = dali.dali_batches(shard, transform, [np.array([0])], device="cpu", routes=routes)
    (plain,) = dali.dali_batches(manifest, transform, [np.array([0])], device="cpu")
    assert routes == {0: None}
    assert torch.equal(got.frames, plain.frames)


@needs_dali
def test_bt709_is_corrected(tmp_path):
    """A clip tagged BT.709: what DALI decodes by the wrong matrix comes out like the CPU path's."""
    clip = render("moving right", 2, frames=8, size=(128, 128))
    clip = (clip * 0.8 + 20).astype(np.uint8)  # no color that the wrong matrix would cut off
    write_clip(tmp_path / "a.webm", clip, codec="libvpx-vp9", colorspace="bt709", crf=10)
    view = whole([1, 6])
    wanted = decode_views(tmp_path / "a.webm", [view])[0].astype(int)
    encoded = np.fromfile(tmp_path / "a.webm", np.uint8)
    errors = {}
    for tag in (1, 2):
        errors[tag] = np.abs(run_dali([encoded], [[view]], tag)[0] - wanted).mean()
    print("mean error in levels, corrected and not:", errors[1], errors[2])
    assert errors[1] < 0.9
    assert errors[2] > 1.5 * errors[1]


@needs_dali
def test_gpu_graph_is_well_formed():
    """Without a GPU the graph cannot be built, but which operator runs where can be seen."""
    from nvidia.dali import backend

    pipe = dali_graph.make_pipeline(views=2, size=224, batch_size=8, threads=4, device_id=0)
    try:
        pipe.build()
    except RuntimeError as error:
        assert "CUDA" in str(error)  # noqa: PT017
    kinds = {"Slice", "SequenceRearrange", "Resize", "Flip", "CoordTransform", "Cast", "Stack"}
    assert kinds <= set(backend.RegisteredGPUOps())
    assert "decoders__Video" in backend.RegisteredMixedOps()
    seen = {}
    for op in pipe._ops:
        outputs = {node.device for node in op.outputs}
        for kind in (*kinds, "Video"):
            if any(f"__{kind}_" in node.name for node in op.outputs):
                seen[kind] = outputs
    assert seen == {kind: {"gpu"} for kind in (*kinds, "Video")}


# --- on a GPU. Where one is demanded, DALI is as well: without it these fail and say what to install.


def on_gpu(test):
    absent = dali_support.missing() is not None and os.environ.get("XCLIP_FAST_REQUIRE_GPU") != "1"
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason=str(dali_support.missing()))(test))


@pytest.fixture(scope="module")
def gpu_manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("dali-gpu")
    rows = []
    for number in range(16):
        codec, name = ("libx264", f"{number}.mp4") if number % 4 else ("libx265", f"{number}.mp4")
        options = {"x265-params": "open-gop=0:keyint=12:log-level=none"} if codec == "libx265" else {"g": 12}
        clip = render("moving right", 3, number, frames=60, size=(256, 336))
        write_clip(root / name, clip, codec=codec, **options)
        rows.append(row(root, name, number % 2))
    return Manifest(root, ("a", "b"), tuple(rows))


@on_gpu
@pytest.mark.parametrize(
    ("name", "codec", "options", "times"),
    [
        ("b frames.mp4", "libx264", {"g": 12}, None),
        ("open.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0"}, None),
        ("one keyframe.mkv", "libx264", {"g": 250}, None),
        ("variable.mp4", "libx264", {"g": 12}, np.random.default_rng(1).uniform(0.01, 0.2, 40).cumsum()),
        ("late.mp4", "libx264", {"g": 12, "bf": 0}, 1 + np.arange(40) / 25),
        ("closed.mp4", "libx265", {"x265-params": "open-gop=0:keyint=12:bframes=3:log-level=none"}, None),
    ],
)
def test_gpu_frame_numbers(tmp_path, name, codec, options, times):
    clip = render("moving right", 5, frames=40, size=(160, 160))
    write_clip(tmp_path / name, clip, codec=codec, times=None if times is None else times.tolist(), **options)
    assert dali.supported(row(tmp_path, name)) is None
    numbers = np.random.default_rng(0).integers(0, 40, 12)
    (got,) = run_dali([np.fromfile(tmp_path / name, np.uint8)], [[whole(numbers, 160)]], device_id=0)
    all_frames = decode_frames(tmp_path / name, range(40)).astype(np.float32)
    nearest = [int(np.abs(all_frames - frame).mean((1, 2, 3)).argmin()) for frame in got]
    assert nearest == numbers.tolist()


@on_gpu
def test_gpu_corrupt_file_in_a_batch(gpu_manifest):
    data = bytearray((gpu_manifest.root / "1.mp4").read_bytes())
    data[40:] = np.random.default_rng(0).bytes(len(data) - 40)
    (gpu_manifest.root / "corrupt.mp4").write_bytes(data)
    manifest = replace(gpu_manifest, videos=(*gpu_manifest.videos, replace(gpu_manifest.videos[1], path="corrupt.mp4")))
    told = {}
    rows = [np.array([0, 16, 1]), np.array([2, 3])]
    got = list(dali.dali_batches(manifest, TestTransform(), rows, on_bad=told.__setitem__))
    assert [batch.samples.tolist() for batch in got] == [[0, 1], [2, 3]]
    assert list(told) == [16]


@on_gpu
@pytest.mark.parametrize("transform", [TrainTransform(), TestTransform(clips=2, crops=3)])
def test_gpu_agrees_with_the_cpu_path(gpu_manifest, transform):
    routes = {}
    rows = [np.arange(10), np.array([12, 3, 11])]
    for batch in dali.dali_batches(gpu_manifest, transform, rows, seed=1, routes=routes):
        assert batch.frames.is_cuda
        for number, frames in zip(batch.samples.tolist(), batch.frames.cpu().numpy(), strict=True):
            difference = np.abs(expected(gpu_manifest, transform, number, 1).astype(int) - frames)
            # They may differ in how they enlarge the color planes, which shows at edges and which colors amplify.
            assert difference.mean() < 4, (number, gpu_manifest.videos[number].codec)
            assert np.quantile(difference, 0.99) < 24
    assert set(routes.values()) == {None}


@on_gpu
def test_gpu_batches_are_not_overwritten(gpu_manifest):
    rows = [np.arange(8)] * 2 + [np.arange(8, 16)] * 6
    batches = dali.dali_batches(gpu_manifest, TestTransform(), rows)
    first, second = next(batches), next(batches)
    kept = first.frames.clone()
    del second  # its memory goes back to DALI while work on it may be queued
    list(batches)
    assert torch.equal(first.frames, kept)


@on_gpu
def test_gpu_loader(gpu_manifest):
    data = loader(gpu_manifest, TestTransform(), 5, device="cuda")
    assert data.decoder == "dali"
    got = list(data)
    assert torch.cat([batch.samples for batch in got]).tolist() == list(range(16))
    assert all(batch.frames.is_cuda and batch.labels.is_cuda for batch in got)
    assert data.report.delivered == 16


@on_gpu
def test_gpu_speed(gpu_manifest, record_property):
    rows = [np.arange(16)] * 12
    batches = dali.dali_batches(gpu_manifest, TrainTransform(), rows)
    next(batches)
    start, clips = time.monotonic(), 0
    for batch in batches:
        clips += len(batch.samples)
    torch.cuda.synchronize()
    rate = clips / (time.monotonic() - start)
    record_property("clips_per_second", rate)
    print(f"DALI: {rate:.0f} clips/s of 8 frames (60 frames of 336x256, a keyframe every 12)")
    assert rate > 0
