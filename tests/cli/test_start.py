"""The start of the command line: quick, quiet when interrupted, and plain about checkpoints that are none."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import xclip_fast
from xclip_fast.cli import main as cli

COMMAND = [sys.executable, "-m", "xclip_fast"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120)


def seconds(*arguments: str) -> float:
    """Of the processor, the best of three: the machine may be busy."""
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(took)


def test_help_imports_in_less_than_a_third_of_a_second() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMAND[1:], "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    names = {line.split("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in names
    assert not names & {"torch", "numpy", "av", "transformers"}
    assert seconds(*COMMAND[1:], "--help") - seconds("-c", "pass") < 0.3


@pytest.mark.parametrize("command", ["index nothing", "transcode nothing out"])
def test_commands_on_files_do_not_wait_for_torch(command: str, tmp_path: Path) -> None:
    code = "import sys; from xclip_fast.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (1, "False\n"), done.stderr


def test_the_garbage_collector_is_off_during_imports_alone() -> None:
    code = (
        "import gc, sys; from xclip_fast.cli.options import quick_imports\n"
        "try:\n"
        "    with quick_imports(): raise ImportError\n"
        "except ImportError: print(gc.isenabled())\n"
        "for _ in range(2):\n"
        "    with quick_imports(): off = not gc.isenabled(); import torch\n"
        "    print(off, gc.isenabled(), gc.get_freeze_count() > 0); gc.unfreeze()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["True", "True True True", "False True False"], done.stderr


WITH_TORCH = """
    classify a.mp4 --random-weights --labels a
    embed . --out a --random-weights
    search a b
    train motion
    evaluate a b
    protocol few-shot-ucf101 a b --shots 1
    few-shot a --shots 1 --out a.jsonl
    convert a b
    export a
    info
    flops --time
"""


@pytest.mark.parametrize("command", WITH_TORCH.strip().splitlines())
def test_every_command_imports_torch_without_the_garbage_collector(command: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import gc\nprint(gc.isenabled())\nraise ImportError('seen')")
    (tmp_path / "a.mp4").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from xclip_fast.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.stdout.splitlines()[:1] == ["False"], done.stderr


def test_version_and_completion() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"xclip-fast {xclip_fast.__version__}\n")
    code = "import sys; sys.argv = ['xclip-fast']; from xclip_fast.__main__ import main; main()"
    given = {"_XCLIP_FAST_COMPLETE": "bash_complete", "COMP_WORDS": "xclip-fast classify --ran", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | given
    )
    assert (done.returncode, done.stdout) == (0, "plain,--random-weights\n"), done.stderr
    assert "_XCLIP_FAST_COMPLETE=bash_source" in run("--help").stdout


def test_an_interrupt_while_starting_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from xclip_fast.__main__ import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert complaint == ""
    assert process.returncode == -signal.SIGINT


NAMED = {
    "classify -c runs/mine clip.mp4": "the output folder of a training. Its weights are in runs/mine/best",
    "classify -c runs/new clip.mp4": "runs/new is the output folder of a training that has no weights yet",
    "classify -c nothing clip.mp4": "nothing: no such file or folder",
    "classify -c microsoft/xclip-base-patch32 a.mp4": "hf download microsoft/xclip-base-patch32 --local-dir",
    "evaluate runs/mine/best videos": "videos is a folder, not a manifest; `xclip-fast index videos` makes one of it",
    "index nothing": "error: nothing: No such file or directory\n",  # without Python's [Errno 2]
    "evaluate runs/mine/best nothing.jsonl": "error: nothing.jsonl: No such file or directory\n",
}


@pytest.mark.parametrize("command", NAMED)
def test_what_is_no_checkpoint_or_manifest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name in ("runs/mine/best", "runs/new", "videos"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/mine/best/model.safetensors").touch()
    (tmp_path / "runs/new/config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(command.split())
    complaint = capsys.readouterr().err
    assert left.value.code == 1
    assert complaint.startswith("error: ")
    assert NAMED[command] in complaint
    assert "label" not in complaint
