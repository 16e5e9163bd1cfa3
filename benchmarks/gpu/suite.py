"""Stage 6: the GPU tests, in parallel. A failed test marks its op and backend and does not stop the others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .case import Job, Row

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # limit of a test
# Not from the current folder, whose package has no kernels if it is a bare copy of the repository.
PYTEST = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def tests(job: Job, files: list[str], select: str, workers: int, matching: str) -> Iterator[Row]:
    """A row for each test, when it ends."""
    if importlib.util.find_spec("pytest") is None:
        yield {"note": "not run: pytest is not installed"}
        return
    command = [sys.executable, "-c", PYTEST, *files, "-m", select, "-q", "-p", "no:cacheprovider", "-p", "gpu.watch"]
    command += ["-o", "addopts=--import-mode=importlib", "-k", matching]
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--max-worker-restart", "1000"]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        path = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
        # with the variables of a pytest around this one, this run would be its worker
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = {**outside, "PYTHONPATH": path, "GPU_CHECK_RESULTS": str(results)}
        environment |= {"GPU_CHECK_TEST_SECONDS": str(SECONDS), "XCLIP_FAST_REQUIRE_GPU": str(int(not job.tiny))}
        if not job.tiny:
            environment.pop("TRITON_INTERPRET", None)
        begin = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        with results.open() as lines:
            while True:
                ended = process.poll() is not None
                for line in lines:
                    found = json.loads(line)
                    yield {**found, **names_in(found["test"])}
                if ended:
                    break
                time.sleep(0.2)
        yield {"contender": "pytest", "seconds": time.monotonic() - begin, "exit_code": process.returncode}


def names_in(test: str) -> Row:
    """The op and the backend that a test's name contains, if any."""
    from xclip_fast.kernels.dispatch import OPS, backends

    inside = test.split("[", 1)[-1].rstrip("]").replace(" ", "-").split("-") if "[" in test else []
    ops = [op for op in sorted(OPS, key=len, reverse=True) if op in inside or f"test_{op}" in test]
    named = [name for name in backends() if name in inside]
    return {**({"op": ops[0]} if ops else {}), **({"contender": named[0]} if named else {})}
