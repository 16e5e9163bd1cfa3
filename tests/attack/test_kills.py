"""Commands that are killed at their changes to files, one after another, or find the disk full there.

Ten changes of each command (`XCLIP_FAST_ATTACK=4`: all); counts of a long run stand in docs/reliability.md.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TIMES = int(os.environ.get("XCLIP_FAST_ATTACK", "1"))
COUNTS = {  # changes that are tried in a plain run: the slower the command, the fewer
    "index": 8,
    "transcode": 10,
    "motion": 8,
    "convert": 10,
    "few-shot": 8,
    "evaluate": 3,
    "embed": 6,
    "embed-parquet": 5,
    "embed-safetensors": 5,
    "search-html-clips": 5,
}

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux", reason="needs gcc, on Linux: the library is preloaded"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("library") / "file_events.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", out, HERE / "file_events.c", "-ldl"]
    subprocess.run(command, check=True)
    return out


@pytest.mark.parametrize("command", COUNTS)
def test_killed_and_full_at_changes_to_files(command, library, tmp_path):
    if command.startswith("embed") and command != "embed-safetensors":
        pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'xclip-fast[search]'")
    count = COUNTS[command] if TIMES < 4 else 0
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "killed.py", command, tmp_path, str(count)],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(ran.stdout, end="")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("tried of") == 2
