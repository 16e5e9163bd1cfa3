"""The commands of README and docs/search.md, run as they are written, in one folder and in their order."""

import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small import CONFIG

from xclip_fast import XCLIP
from xclip_fast.cli import main as cli
from xclip_fast.data.motion import CLASSES, render, write_clip

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name: str) -> list[str]:
    """The indented blocks of a page."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE).lstrip("\n") for block in found]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new user's folder: weights, a few clips, a film."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    XCLIP(CONFIG).save_pretrained("xclip-base-patch16")
    (tmp_path / "videos").mkdir()
    for name, label in (("juggling", CLASSES[0]), ("dog", CLASSES[1])):
        write_clip(f"videos/{name}.mp4", render(label, 0, frames=12, size=(48, 64)))
    write_clip("videos/film.mp4", render("growing", 0, frames=80, size=(48, 64)), 2)
    return tmp_path


def test_readme(here, capsys):
    """Without the lines that need a network, a GPU or a VideoX file."""
    pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'xclip-fast[search]'")
    page = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for kind, block in fences if kind == "bash" for line in block.splitlines()]
    shutil.copy("videos/dog.mp4", "clip.mp4")
    for folder in ("my_videos", "val"):
        shutil.copytree("videos", f"{folder}/riding")
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("xclip-fast ")]
    ours = [command for command in commands if command[0] in ("classify", "embed", "search", "index", "info")]
    assert len(ours) == 6
    for command in ours:
        with pytest.raises(SystemExit) as left:
            cli.main(command)
        out, err = capsys.readouterr()
        assert (left.value.code, bool(out)) == (0, True), (command, err)
    assert (here / "page.html").exists()
    code = next(block for kind, block in fences if kind == "python")
    exec(compile(code.replace("frames=8", "frames=3, size=32"), "README.md", "exec"), {})  # of the test's weights
    assert capsys.readouterr().out in ("riding a bike\n", "swimming\n")


def test_search_page(here, monkeypatch, capsys):
    pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'xclip-fast[search]'")
    commands = [line for block in blocks("search.md") for line in block.splitlines() if "xclip-fast " in line]
    assert len(commands) > 15
    for line in commands:
        piped, _, command = line.rpartition("| ")
        typed = piped.strip().removeprefix("echo ").strip('"') + "\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as left:
            cli.main(shlex.split(command)[1:])
        out, err = capsys.readouterr()
        if "--index" in line:
            assert "an index is worth building from" in err
        else:
            assert left.value.code == 0, (line, err)
            assert out
    for made in ("juggling.html", "page.html", "labels.html", "found"):
        assert (here / made).exists()
    (block,) = [block for block in blocks("search.md") if "rows.parquet" in block and "import" in block]
    names: dict = {}
    exec(compile(block, "docs/search.md", "exec"), names)
    assert names["features"].shape == (len(names["table"]), CONFIG.embed_dim)


def test_python_of_the_search_page(here, capsys):
    pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'xclip-fast[search]'")
    (block,) = [block for block in blocks("search.md") if block.startswith("from xclip_fast")]
    exec(compile(block, "docs/search.md", "exec"), {})
    assert capsys.readouterr().out.count(".mp4 ") >= 3


def test_python_of_the_scale_page(here):
    (block,) = [block for block in blocks("scale.md") if block.startswith("from xclip_fast")]
    block = block.replace("frames=8, size=224", "frames=3, size=32")  # of the test's weights
    names: dict = {}
    exec(compile(block, "docs/scale.md", "exec"), names)
    assert set(names["rows"]) == {"path", "number", "start", "end", "error", "again", "vector"}
    assert names["rows"]["start"].tolist() == [0, 5, 10, 15, 20, 25, 30, 0]
