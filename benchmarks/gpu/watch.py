"""A pytest plugin: writes each test's result to a file at once; a test that hangs ends its worker, not the run."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import pytest

RESULTS = os.environ.get("GPU_CHECK_RESULTS", "")
SECONDS = float(os.environ.get("GPU_CHECK_TEST_SECONDS", "60"))
_lost = False  # whether a GPU error makes every later test of this process fail


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the result, in the process that collects them: the only one, or xdist's controller."""
    if not RESULTS or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    found = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome != "passed":
        lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("E ")] or lines[-1:]
        word = "skipped" if report.outcome == "skipped" else "WRONG"
        found["note"] = f"{word}: {said[0].removeprefix('E ').strip() if said else ''}"[:300]
        found["right"] = None if report.outcome == "skipped" else False
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End this process if the test takes too long or the GPU is lost; xdist starts another."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    timer = threading.Timer(SECONDS, os._exit, (4,))  # a hang inside CUDA ignores signals
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()
        if _lost:
            os._exit(3)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    global _lost
    if call.excinfo is not None and "CUDA error" in str(call.excinfo.value):
        _lost = True
