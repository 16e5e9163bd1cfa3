"""Every kernel that production shapes launch compiles for sm_80, sm_90 and sm_100, fits, and does not spill."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
ARCHS = sorted(SHARED_LIMIT)


@cache
def compiled(arch: int) -> list[dict[str, Any]]:
    """All architectures at once, a process each: compiling is what takes the time."""
    script = Path(__file__).with_name("ahead_of_time.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(arch)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("arch", ARCHS)
def test_production_kernels_compile_fit_and_do_not_spill(arch: int) -> None:
    found = compiled(arch)
    assert len({row["kernel"] for row in found}) > 10
    for row in found:
        assert row["shared"] <= SHARED_LIMIT[arch], row
        assert row["stack"] == row["local"] == 0, row


def test_tensor_cores_of_hopper_are_used() -> None:
    found = compiled(90)
    for kernel in ("gemm", "diffusion_attention"):
        rows = [row for row in found if row["kernel"].startswith(kernel) and row["dot"] and row["half"]]
        assert rows, kernel
        for row in rows:
            assert row["wgmma"], row
    assert any(row["tma"] for row in found if row["kernel"].startswith("gemm"))
