"""on_fake_gpu.py in a process of its own: this one may have Triton's interpreter, which launches nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")


def test_every_launch_binds() -> None:
    file = Path(__file__).with_name("on_fake_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--no-cov", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, cwd=file.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
