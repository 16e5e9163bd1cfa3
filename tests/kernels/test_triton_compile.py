"""Every kernel that production shapes launch compiles for sm_80, sm_90 and sm_100, fits, and does not spill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
ARCHS = sorted(SHARED_LIMIT)


def compiled(arch: int) -> list[dict[str, Any]]:
    """What ahead_of_time.py prints; a process of its own, because this one may have Triton's interpreter."""
    script = Path(__file__).with_name("ahead_of_time.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", ARCHS)
def test_production_kernels_compile_fit_and_do_not_spill(arch: int) -> None:
    found = compiled(arch)
    assert len({row["kernel"] for row in found}) > 15
    for row in found:
        assert row["shared"] <= SHARED_LIMIT[arch], row
        assert row["stack"] == row["local"] == 0, row
    if arch != 90:
        return
    for kernel in ("gemm", "attention_fwd"):  # Hopper's tensor cores, and its copy engine
        rows = [row for row in found if row["kernel"].startswith(kernel) and row["dot"] and row["half"]]
        assert rows, kernel
        for row in rows:
            if row["constants"].get("S") == "8":  # the messages of 8 frames do not fill one
                continue
            assert row["wgmma"], row
            assert row["tma"] or kernel != "gemm", row
