"""Commands that are killed at their changes to files, one after another, or find the disk full there.

Some changes of each command (`XCLIP_FAST_ATTACK=4`: all); counts of a long run stand in docs/reliability.md.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TIMES = int(os.environ.get("XCLIP_FAST_ATTACK", "1"))
COUNTS = {  # changes that are tried in a plain run: the slower the command, the fewer
    "index": 4,
    "transcode": 5,
    "motion": 3,
    "convert": 3,
    "evaluate": 2,
    "train": 3,
    "embed": 4,
    "embed-parquet": 3,
    "search-html-clips": 2,
}


@pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux", reason="needs gcc, on Linux: the library is preloaded"
)
def test_killed_and_full_at_changes_to_files(tmp_path):
    commands = dict(COUNTS)
    if importlib.util.find_spec("lancedb") is None:
        del commands["embed"], commands["embed-parquet"]
    library = tmp_path / "file_events.so"
    build = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HERE / "file_events.c", "-ldl"]
    subprocess.run(build, check=True)
    ran = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", HERE / "killed.py", tmp_path),
            *(f"{name}={count if TIMES < 4 else 0}" for name, count in commands.items()),
        ],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(ran.stdout, end="")
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.count("tried of") == 2 * len(commands)


def test_without_the_library_it_says_so(tmp_path):
    ran = subprocess.run([sys.executable, HERE / "killed.py", tmp_path, "index=1"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "file_events.so is not preloaded" in ran.stderr
    assert not list(tmp_path.iterdir())
