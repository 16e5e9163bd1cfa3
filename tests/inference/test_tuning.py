"""Tuning: its rehearsal on the CPU, and jobs that do it by themselves."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from xclip_fast.kernels.dispatch import INTERPRETED, choices, tables
from xclip_fast.kernels.tune import __main__ as kernels_tune

from xclip_fast import VARIANTS
from xclip_fast.cli.main import app
from xclip_fast.inference import tuning

B16, CUDA = VARIANTS["B/16-8f"], torch.device("cuda")
LONG_JOB = math.ceil(1000 * tuning.SECONDS / tuning.SAVED["B/16"][False])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.forget()
    return tmp_path


@pytest.mark.skipif(not INTERPRETED, reason="a rehearsal runs in Triton's interpreter")
def test_the_rehearsal_measures_and_writes_nothing(home: Path) -> None:
    done = CliRunner().invoke(app, ["tune", "--rehearse", "--seconds", "4"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("a rehearsal: nothing is written") == 2
    for table in ("attention", "gemm", "norm_linear", "layer_norm"):
        assert f"\n{table} {{" in f"\n{done.stdout}", table
    assert " ms" in done.stdout
    assert not list(home.iterdir())


@pytest.fixture
def gpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A GPU of an architecture that no table knows; the calls of the measurement, which leaves a row."""
    calls: list[list[str]] = []

    def measured(arguments: list[str], progress: Any) -> int:
        calls.append(arguments)
        progress(1, 1)
        if "--backends" in arguments:
            row = {"arch": 100, "where": {}, "milliseconds": {"library": 1.0}}
            kernels_tune.merge(tables.user_table("choices.json"), {"norm_linear": [row]})
            tables.forget()
        return 0

    monkeypatch.setattr(kernels_tune, "main", measured)
    monkeypatch.setattr(choices, "architecture", lambda device: 100 if device.type == "cuda" else None)
    yield calls
    tables.forget()


def test_a_long_job_tunes_once_within_its_minute(gpu: list[list[str]]) -> None:
    for _ in range(2):
        tuning.tune_before(B16, LONG_JOB, CUDA)
    assert [arguments[:2] for arguments in gpu] == [["--model", "B/16"]] * 2  # tiles, then backends
    assert sum(float(arguments[3]) for arguments in gpu) <= 60


def test_no_job_tunes_where_the_shipped_table_knows_the_gpu(
    gpu: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "architecture", lambda x: 90)
    tuning.tune_before(B16, LONG_JOB, CUDA)
    assert not gpu


def test_training_earns_the_minute_back_sooner(gpu: list[list[str]]) -> None:
    tuning.tune_before(B16, LONG_JOB // 2, CUDA, training=True)
    assert len(gpu) == 2


def test_a_short_job_says_that_it_would_pay(gpu: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    tuning.tune_before(B16, LONG_JOB - 1, CUDA)
    tuning.tune_before(B16, LONG_JOB, "cpu")  # nothing to measure
    assert gpu == []
    assert capsys.readouterr().err.count("`xclip-fast tune --model B/16` takes a minute, once") == 1
