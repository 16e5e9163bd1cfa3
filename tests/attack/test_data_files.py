"""Damaged data files by the hundred: each gives its right value or an error that names it, soon and in little memory.

Counts of a long run stand in docs/reliability.md.
"""

import importlib.util
import io
import json
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from xclip_fast.data.decode import VideoError, decode_frames, probe
from xclip_fast.data.decode.source import Source
from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.manifest.labels import read_labels
from xclip_fast.data.manifest.sources import read_source
from xclip_fast.data.motion import render, write_clip

_spec = importlib.util.spec_from_file_location("attack", Path(__file__).with_name("attack.py"))
attack = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attack)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set as on Linux")

FORMS = {
    "mp4": {},
    "mkv": {"bf": 2},
    "ts": {},
    "flv": {},
    "avi": {"codec": "mpeg4"},
    "webm": {"codec": "libvpx-vp9", "cpu-used": 8, "deadline": "realtime"},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for suffix, options in FORMS.items():
        write_clip(folder / f"a.{suffix}", render("growing", 0, frames=12, size=(32, 48)), **options)
    return folder


def told(record_property, name, counts, wrong):
    text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    record_property(name, text)
    print(f"{name}: {sum(counts.values())} tried: {text}")
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("suffix", FORMS)
def test_damaged_videos(suffix, clips, tmp_path, record_property):
    """Right: as many frames come as the probe counted, those that the probe's plan gives among them."""
    whole = (clips / f"a.{suffix}").read_bytes()
    path = tmp_path / f"a.{suffix}"

    def attempt(seed):
        path.write_bytes(attack.mutant(whole, seed))
        try:
            info = probe(path)
            if info.frames > 5000:  # a damaged clock
                return "right"
            numbers = [0, info.frames // 2, info.frames - 1]
            plain = decode_frames(path, numbers)
            planned = decode_frames(Source(str(path), size=path.stat().st_size, plan=info.plan), numbers)
        except VideoError as error:
            message = str(error)
            return "error" if "\n" not in message and str(path) in message else f"wrong: {message!r}"
        except IndexError:
            return "wrong: fewer frames than counted"
        return "right" if np.array_equal(plain, planned) else "wrong: other frames with the stored plan"

    told(record_property, suffix, *attack.outcomes(range(45 * attack.TIMES), attempt))


def test_damaged_manifests(clips, tmp_path, record_property):
    manifest = index(clips, tmp_path / "m.jsonl", workers=0)
    whole = (tmp_path / "m.jsonl").read_bytes()
    path = tmp_path / "a.jsonl"

    def attempt(seed):
        path.write_bytes(attack.mutant(whole, seed))
        try:
            found = Manifest.read(path)
        except ValueError as error:
            return "error" if str(path) in str(error) else f"wrong: {error}"
        for row, video in enumerate(found.videos):
            try:
                plan = found.source(row).plan
            except ValueError as error:
                if not any(word in str(error) for word in ("index again", "cannot be used")):
                    return f"wrong: {error}"
                continue
            if plan is not None and len(plan.pts) != video.frames:
                return "wrong: a plan of another length"
        return "right"

    assert manifest.usable.size
    told(record_property, "manifests", *attack.outcomes(range(400 * attack.TIMES), attempt))


def test_damaged_tar_files(tmp_path, record_property):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            for suffix, content in (("mp4", b"x" * 700), ("json", json.dumps({"label": number % 2}).encode())):
                info = tarfile.TarInfo(f"{'long' * 40}/é{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    whole, path = data.getvalue(), tmp_path / "a.tar"

    def attempt(seed):
        path.write_bytes(attack.mutant(whole, seed))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                listing = read_source(path, labels=["a", "b"])
        except ValueError as error:
            return "error" if str(path) in str(error) else f"wrong: {error}"
        size = path.stat().st_size
        sound = [entry for entry in listing.entries if entry.error is None]
        inside = all(0 <= entry.offset <= entry.offset + entry.size <= size for entry in sound)
        return "right" if inside else "wrong: a member outside of the file"

    told(record_property, "tar", *attack.outcomes(range(400 * attack.TIMES), attempt))


@pytest.mark.parametrize("kind", ["labels", "lists"])
def test_damaged_lists(kind, tmp_path, record_property):
    names = ("ride a bike", "swim, fast", "été")
    labels = "id,name\n" + "".join(f'{number},"{name}"\n' for number, name in enumerate(names))
    lines = "".join(f"clips {number}/a.mp4 {number % 3}\n" for number in range(20))
    whole = (labels if kind == "labels" else lines).encode()
    path = tmp_path / ("a.csv" if kind == "labels" else "a.txt")

    def attempt(seed):
        path.write_bytes(attack.mutant(whole, seed))
        try:
            if kind == "labels":
                found = read_labels(path)
                return "right" if found and len(set(found)) == len(found) else "wrong: names"
            listing = read_source(path, labels=names)
            sane = all(entry.label is None or 0 <= entry.label < 3 for entry in listing.entries)
            return "right" if sane else "wrong: a label"
        except ValueError as error:
            return "error" if str(path) in str(error) else f"wrong: {error}"

    told(record_property, kind, *attack.outcomes(range(400 * attack.TIMES), attempt))
