"""Pages and clips: text stays text, nothing is fetched, nothing is overwritten; and a real browser shows it."""

import io
import os
import re
import shutil
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest

from xclip_fast.data.motion import render, write_clip
from xclip_fast.search.media import cut, pictures
from xclip_fast.search.page import Page, clock
from xclip_fast.search.query import Hit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seconds whose gray goes from 0 to 240, with a tone, below a folder that is markup."""
    folder = tmp_path_factory.mktemp("page") / "<script>alert(1)<"
    folder.mkdir()
    path = folder / 'script> & "x".mp4'
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=44100)
        video.height, video.width, video.pix_fmt = 90, 160, "yuv420p"
        for number in range(120):
            frame = av.VideoFrame.from_ndarray(np.full((90, 160, 3), 2 * number, np.uint8), "rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(44100 * 12) / 44100)).astype(np.float32)
        for start in range(0, len(tone) - 1024, 1024):
            sound = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], "fltp", layout="mono")
            sound.rate, sound.pts, sound.time_base = 44100, start, Fraction(1, 44100)
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return path


def hit(path: Path, start: float = 2, end: float = 6) -> Hit:
    return Hit(str(path), start, end, 0.25, (start, end))


class Text(HTMLParser):
    """The tags and the text that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_pictures_are_of_their_time(film):
    still, preview = pictures(str(film), 2, 6)
    with av.open(io.BytesIO(still)) as picture:
        (frame,) = picture.decode(video=0)
    assert frame.to_ndarray(format="rgb24").mean() == pytest.approx(80, abs=3)  # 4 s: frame 40
    with av.open(io.BytesIO(preview)) as video:
        levels = [each.to_ndarray(format="rgb24").mean() for each in video.decode(video=0)]
        assert len(levels) == 24
        assert not video.streams.audio
    assert levels == pytest.approx(np.linspace(40, 120, 24, endpoint=False), abs=4)
    whole, _ = pictures(str(film), 0, 0)
    with av.open(io.BytesIO(whole)) as picture:
        assert next(picture.decode(video=0)).to_ndarray(format="rgb24").mean() == pytest.approx(120, abs=5)


def test_a_page_is_text_and_needs_nothing_else(film, tmp_path):
    page = Page(tmp_path / "page.html")
    page.add_hits(
        "a <b>bold</b> & \x1b[31m query", [hit(film), hit(tmp_path / "gone.mp4"), hit("s3://bucket/a.mp4")][:2]
    )
    page.add_hits("nothing", [])
    page.add_labels(str(film), 0, 5, [('<img src=x onerror="alert(1)">', 0.9), ("swimming", 0.1)])
    page.write()
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    seen = Text(text)
    assert seen.tags.count("script") == 1
    assert "b" not in seen.tags
    for words in ("a <b>bold</b> & \\x1b[31m query", "<script>alert(1)</script>", '<img src=x onerror="alert(1)">'):
        assert words in seen.text
    assert "No picture" in seen.text
    assert "Nothing was found" in seen.text
    assert "not a probability" in " ".join(seen.text.split())
    for name, address in re.findall(r'\b(src|href)="([^"]*)"', text):
        assert address.startswith("data:" if name == "src" else "file:///")
    assert "http:" not in text
    assert "https:" not in text


def test_a_page_has_a_limit_and_says_so(film, tmp_path):
    page = Page(tmp_path / "page.html", limit=6000)
    page.add_hits("q", [hit(film, start, start + 2) for start in range(8)])
    page.write()
    assert (tmp_path / "page.html").stat().st_size < 30_000
    assert re.search(r"[1-8] results have no preview", page.render())


def test_a_page_replaces_only_a_page_and_only_when_told(tmp_path):
    out = tmp_path / "page.html"
    Page(out).write()
    with pytest.raises(FileExistsError, match="--overwrite"):
        Page(out)
    Page(out, overwrite=True).write()
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="not a page of results"):
        Page(out, overwrite=True)
    with pytest.raises(ValueError, match="does not exist"):
        Page(tmp_path / "no" / "page.html")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe"):
        Page(tmp_path / "pipe", overwrite=True)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00.0"), (59.96, "1:00.0"), (61.25, "1:01.2"), (3723.4, "1:02:03.4")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_clips_are_cut_with_sound_and_replace_nothing(film, tmp_path):
    first = cut(hit(film), tmp_path / "out")
    second = cut(hit(film), tmp_path / "out")
    assert (first.name, second.name) == ("script_ _ _x_ 2.0-6.0.mp4", "script_ _ _x_ 2.0-6.0 (2).mp4")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([first.name, second.name])
    with av.open(str(first)) as container:
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
        (sound,) = container.streams.audio
        assert float(sound.duration * sound.time_base) == pytest.approx(4, abs=0.1)
        assert sound.codec_context.name == "aac"
    assert levels == pytest.approx([2 * number for number in range(20, 60)], abs=3)
    with pytest.raises(ValueError, match="no such file"):
        cut(hit(tmp_path / "gone.mp4"), tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_clips_of_a_video_without_sound_and_with_odd_sides(tmp_path):
    path = tmp_path / "odd.mkv"
    write_clip(path, render("growing", 0, frames=20, size=(33, 47)), 10, "ffv1", pix_fmt="bgr0")
    out = cut(hit(path, 0.5, 1.5), tmp_path)
    with av.open(str(out)) as container:
        assert not container.streams.audio
        assert (container.streams.video[0].width, container.streams.video[0].height) == (46, 32)
        assert len(list(container.decode(video=0))) == 10


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mkv", {"bf": 2, "g": 30}),
        ("a.ts", {"bf": 2, "g": 30}),  # seeks arrive between two keyframes
        ("a.flv", {"bf": 2}),
        ("a.avi", {"codec": "mpeg4", "bf": 2, "qmax": 2}),  # no times of display
        ("a.h264.mp4", {"bf": 0}),  # no times at all
    ],
)
@pytest.mark.parametrize(("first", "last"), [(0, 120), (20, 60), (90, 120)])
def test_any_container(tmp_path, name, options, first, last):
    """Pictures and clips of an MPEG-TS lacked frames, or all of them. Clips of an AVI with B frames failed."""
    path, rate = tmp_path / name, 10
    write_clip(path, [np.full((90, 160, 3), 2 * number, np.uint8) for number in range(120)], rate, **options)
    if "h264" in name:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            bare = av.BitStreamFilterContext("h264_mp4toannexb", stream)
            data = b"".join(bytes(out) for packet in container.demux(stream) for out in bare.filter(packet))
        path.write_bytes(data)
        rate = 25  # FFmpeg's guess
    start, end = first / rate, last / rate
    _, preview = pictures(str(path), start, end)
    with av.open(io.BytesIO(preview)) as video:
        levels = [each.to_ndarray(format="rgb24").mean() for each in video.decode(video=0)]
    assert levels == pytest.approx(2 * np.linspace(first, last, 24, endpoint=False), abs=5)
    with av.open(str(cut(hit(path, start, end), tmp_path / "out"))) as container:
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert levels == pytest.approx([2 * number for number in range(first, last)], abs=4)


def test_a_moment_between_two_frames_shows_the_one_before(tmp_path):
    for path in (tmp_path / "a.mp4", tmp_path / "a.ts"):
        write_clip(path, [np.full((64, 64, 3), 50 * number, np.uint8) for number in range(4)], times=[0, 10, 20, 30])
        still, _ = pictures(str(path), 12, 16)
        with av.open(io.BytesIO(still)) as picture:
            assert next(picture.decode(video=0)).to_ndarray(format="rgb24").mean() == pytest.approx(50, abs=3)
        with pytest.raises(ValueError, match=r"no frame can be decoded from 90 s on"):
            pictures(str(path), 90, 94)


def test_the_sound_of_a_clip_may_change(tmp_path):
    """From stereo to mono at another rate, as between broadcasts, whose times overlap: no clip could be cut out."""
    data = b""
    for part, (rate, layout) in enumerate([(48000, "stereo"), (32000, "mono")]):
        with av.open(str(tmp_path / "part.ts"), "w") as container:
            video, audio = container.add_stream("libx264", rate=10), container.add_stream("mp2", rate=rate)
            video.height = video.width = 64
            audio.layout = layout
            for number in range(20):
                frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
                frame.pts, frame.time_base = 20 * part + number, Fraction(1, 10)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
            for number in range(2 * rate // 1152):
                sound = av.AudioFrame(format="s16", layout=layout, samples=1152)
                sound.rate, sound.pts, sound.time_base = rate, int(1.9 * part * rate) + 1152 * number, Fraction(1, rate)
                container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
        data += (tmp_path / "part.ts").read_bytes()
    path = tmp_path / "a.ts"
    path.write_bytes(data)
    with av.open(str(cut(hit(path, 0, 4), tmp_path / "out"))) as container:
        (sound,) = container.streams.audio
        assert float(sound.duration * sound.time_base) == pytest.approx(4, abs=0.2)


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(film, tmp_path, scheme):
    """Opened from disk: no script from a name runs, nothing is fetched, the preview plays on hover and by keyboard."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no driver: pip install playwright")
    page = Page(tmp_path / "page.html")
    page.add_hits("fading to white", [hit(film), hit(film, 6, 10)])
    page.write()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page(color_scheme=scheme, viewport={"width": 900, "height": 700})
        said: list[str] = []
        asked: list[str] = []
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("dialog", lambda dialog: said.append(dialog.message))
        view.on("request", lambda request: asked.append(request.url[:5]))
        view.goto((tmp_path / "page.html").as_uri())
        assert view.locator("h1").inner_text() == "Results of xclip-fast"
        assert view.locator(".path").first.inner_text() == str(film)
        buttons = view.get_by_role("button", name=re.compile("^Play a preview of script>"))
        assert buttons.count() == 2
        playing = "button => { const v = button.querySelector('video'); return !v.paused && v.currentTime > 0 }"
        buttons.first.hover()
        view.wait_for_function(f"({playing})(document.querySelector('button'))", timeout=10_000)
        view.mouse.move(0, 0)
        assert not buttons.first.evaluate(playing)
        buttons.nth(1).focus()
        view.keyboard.press("Enter")
        view.wait_for_function(f"({playing})(document.querySelectorAll('button')[1])", timeout=10_000)
        assert buttons.nth(1).get_attribute("aria-pressed") == "true"
        view.keyboard.press("Escape")
        assert buttons.nth(1).get_attribute("aria-pressed") == "false"
        back, front = (view.evaluate(f"getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color"))
        light, dark = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in (back, front))
        assert (light > 600 and dark < 200) if scheme == "light" else (light < 200 and dark > 600)
        assert said == []
        assert set(asked) == {"file:"}
        assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
