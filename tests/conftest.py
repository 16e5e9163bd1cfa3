"""Shared by all tests: seeds, the GPU rule, small configurations."""

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core already, and so for the programs that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU where a test asks for them

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; a test's programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file's name is not looked up on the Hugging Face Hub

from small import rough

import xclip_fast
from xclip_fast import TextConfig, VisionConfig, XCLIPConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, or let them fail if the run demands one."""
    if torch.cuda.is_available() or os.environ.get("XCLIP_FAST_REQUIRE_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):  # not the keyword, which a folder named gpu is too
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip the files that need ``av`` where it is not installed: GPU images lack it, and the rest should run there."""
    report = yield
    if report.outcome == "failed" and "No module named 'av'" in str(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, "Skipped: av is not installed")
    return report


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unlistable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that makes a folder one that cannot be listed, also for the superuser."""
    scandir = os.scandir
    refused: set[str] = set()

    def refusing(path: str | os.PathLike[str] | int = ".") -> Any:
        if not isinstance(path, int) and os.path.abspath(path) in refused:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    return lambda folder: refused.add(os.path.abspath(folder))


@pytest.fixture
def file_limit() -> Generator[Callable[[int], None], None, None]:
    """A function that makes the system refuse larger files, in bytes, until the test ends."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def one_thread() -> Generator[None, None, None]:
    """The products of tiny models are slower in two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config() -> XCLIPConfig:
    """An X-CLIP of two layers a tower, 3 frames of 32 x 32 pixels in 16 patches."""
    return XCLIPConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=128, layers=2, heads=2),
        text=TextConfig(width=64, layers=2, heads=1),
        embed_dim=64,
        num_frames=3,
    )


@pytest.fixture
def tiny_model(tiny_config: XCLIPConfig) -> xclip_fast.XCLIP:
    return rough(xclip_fast.XCLIP(tiny_config).eval())


@pytest.fixture
def shallow_model(tiny_model: xclip_fast.XCLIP) -> xclip_fast.XCLIP:
    """Every kind of layer once: tracing takes seconds a layer, and compiling more."""
    for layers in (tiny_model.visual.transformer.resblocks, tiny_model.text.transformer.resblocks):
        del layers[1:]
    del tiny_model.prompts_generator.decoder[1:]
    return tiny_model
