"""gpu_check.py: rehearsed on the CPU; what goes wrong in a case costs that case."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu_check")


def rehearse(out, *options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return done, rows


def leaders_below(process):
    """The process ids below this one that lead a process group."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child] if os.getpgid(child) == child else []
            found += leaders_below(child)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_sigterm_ends_the_cases_too(tmp_path):
    """Each case leads a process group, so it would outlive the run and disturb what is measured next."""
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(tmp_path), "--stages", "machine,smoke"]
    command += ["--cases", "versions,quick_gelu triton", "--break", "quick_gelu triton=hang"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert any("versions" in line for line in run.stderr)  # the next case hangs for seconds
        while not (cases := leaders_below(run.pid)) and run.poll() is None:
            time.sleep(0.05)
        assert cases
        run.terminate()
        assert run.wait(20) == 143
        assert not [case for case in cases if Path(f"/proc/{case}").exists()]
    finally:
        run.kill()
        run.stderr.close()


def test_every_stage_gives_its_rows_and_a_fault_costs_its_case_alone(tmp_path):
    """A case that is killed, one that hangs and one that is wrong: all other rows are there. The bundle's test below
    has the stage tests."""
    cases = ["versions", "ceilings", "overhead", "quick_gelu triton", "layer_norm triton", "tower triton"]
    cases += ["cosine_logits triton", "B/16 1", "kernels 1", "qkv", "197 tokens"]
    faults = ["--break", "layer_norm triton=kill", "--break", "quick_gelu triton=wrong", "--break", "qkv 12608=hang"]
    done, rows = rehearse(tmp_path, "--cases", ",".join(cases), *faults)
    assert done.returncode == 1, done.stderr
    stages = dict.fromkeys(row["stage"] for row in rows)
    assert list(stages) == ["machine", "smoke", "headline", "products", "attention"]
    noted = {(row["case"], row["note"].split(":")[0]) for row in rows if row.get("note")}
    noted = {(case, note) for case, note in noted if note not in ("refused", "skipped")}
    assert noted == {
        ("layer_norm triton", "killed by signal 9"),
        ("quick_gelu triton", "WRONG"),
        ("qkv 12608", "stopped after 4 s"),
    }, done.stderr

    def of(case):
        return [row for row in rows if row["case"] == case]

    # the killed case went on without what killed it
    assert [row["precision"] for row in of("layer_norm triton") if row.get("right")] == ["fp16", "fp32", "fp32"]
    wrong = [row for row in of("quick_gelu triton") if row.get("right") is False]
    assert [(row["precision"], row["direction"]) for row in wrong] == [("fp16", "forward")]
    assert sum(bool(row.get("right")) for row in of("quick_gelu triton")) == 3
    assert {row["contender"] for row in of("B/16 1")} == {
        *("limit", "xclip-fast", "xclip-fast reference", "xclip-fast graph", "Hugging Face"),
    }
    timed = [row for row in rows if "ms" in row]
    assert all(row["ms"] > 0 for row in timed)
    assert {row["stage"] for row in timed} == {"machine", "headline", "products", "attention"}
    for row in rows[1:]:  # the first one finds what the others carry
        assert {"device", "torch", "python", "date", "command", "at_s"} <= set(row)
        assert row["rehearsed"] is True
    assert all({"precision", "batch", "variant"} <= set(row) for row in rows if row["stage"] == "headline")
    table = (tmp_path / "table.txt").read_text()
    assert "-- wrong: quick_gelu triton" in table
    assert table in done.stdout
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "results.json", "log.txt", "table.txt"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["device"]
    assert len(results["rows"]) == len(rows)


def test_what_the_cases_are_forked_from_starts_no_cuda(check):
    """CUDA does not survive a fork."""
    run = importlib.import_module("gpu.run")
    code = (
        "import torch\n"
        "def started(*_): raise SystemExit('CUDA was asked for')\n"
        "torch._C._cuda_init = torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = started\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch._C._cuda_getCurrentRawStream = started\n"
        f"import {', '.join(run.PRELOADED)}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_failed_test_marks_its_op_and_backend(check):
    names_in = importlib.import_module("gpu.suite").names_in
    assert names_in("tests/kernels/test_ops.py::test_forward[dtype0-cct_block-triton]") == {
        "op": "cct_block",
        "contender": "triton",
    }
    assert names_in("tests/nn/test_cct.py::test_block") == {}


def test_a_test_that_fails_or_hangs_leaves_the_others(check, tmp_path, monkeypatch):
    """The plugin, in a run of two workers: a row for each test, also where a worker is ended."""
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(
        "import time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_hangs(): time.sleep(60)\n"
        "def test_loses_the_gpu(): raise RuntimeError('CUDA error: an illegal memory access')\n"
        "def test_right_after(): pass\n"
    )
    results = tmp_path / "results"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(SCRIPT.parent), "GPU_CHECK_RESULTS": str(results), "GPU_CHECK_TEST_SECONDS": "2"}
    command = [sys.executable, "-m", "pytest", "test_some.py", "-q", "-n", "2", "--max-worker-restart", "9"]
    command += ["-p", "gpu.watch", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=100)
    found = {}
    for row in map(json.loads, results.read_text().splitlines()):
        found.setdefault(row["test"].split("::")[1], row)
    outcomes = {name: row["outcome"] for name, row in found.items()}
    assert outcomes == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_hangs": "failed",
        "test_loses_the_gpu": "failed",
        "test_right_after": "passed",
    }
    assert found["test_wrong"]["right"] is False
    assert "1 == 2" in found["test_wrong"]["note"]


def test_the_table_shows_the_best_of_each_kind_and_names_what_is_wrong(check):
    report = importlib.import_module("gpu.report")
    product = {"stage": "products", "case": "qkv 1576", "op": "qkv", "m": 1576}
    rows = [
        {"stage": "machine", "case": "versions", "environment": {"device": "a GPU", "torch": "2.11"}},
        {**product, "contender": "cuBLAS alone", "kind": "bare", "ms": 1.0},
        {**product, "contender": "triton 64x64", "kind": "triton", "ms": 3.0},
        {**product, "contender": "triton 128x128", "kind": "triton", "ms": 2.0},
        {**product, "contender": "cutlass wide", "kind": "cutlass", "ms": 0.5, "right": False, "note": "WRONG: 1"},
        {**product, "contender": "cutlass", "kind": "cutlass", "note": "refused: device cpu is not cuda"},
    ]
    text = "\n".join(report.lines(rows, {"products": 12.0}))
    assert "qkv 1576: cuBLAS alone 1.0000 ms, triton 128x128 2.0000 ms" in text
    assert "-- products: 5 rows, 1 in trouble, 12 s" in text
    assert text.endswith("-- wrong: qkv cutlass wide")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stages", "smoke,magic"], "'magic'"),
        (["--seconds", "0"], "a positive number wanted"),
        (["--break", "a=kill"], "add --rehearse"),
        (["--rehearse", "--break", "a=eat"], "one of kill, hang, wrong"),
    ],
)
def test_wrong_arguments(check, options, said, capsys, tmp_path):
    with pytest.raises(SystemExit):
        check.parse(["--out", str(tmp_path), *options])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--cases", "quick_gelu,kernel 1"], ["--break", "kernel 1=hang"]])
def test_a_case_that_is_none_is_refused(check, options, capsys, tmp_path):
    args = check.parse(["--out", str(tmp_path), "--rehearse", *options])
    with pytest.raises(SystemExit):
        check.plan(args)
    assert "no case of these stages is called 'kernel 1': ceilings, overhead, " in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path):
    code = "import sys, torch, runpy; torch.cuda.is_available = lambda: False\nsys.argv = sys.argv[1:]\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, str(SCRIPT), "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_a_bundle_is_laid_out_as_pip_would_and_nothing_is_built(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bundle = importlib.import_module("gpu_bundle")
    folder = tmp_path / "bundle"
    assert bundle.main([str(folder), "--no-library", "--no-wheels"]) == 0
    (folder / "kernels" / "libxclip_fast.so").write_bytes(b"a library")
    code = (
        "import importlib.util, pathlib, sys, gpu_check\n"
        "gpu_check.lay_out(pathlib.Path(sys.argv[1]))\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import xclip_fast, xclip_fast.kernels\n"
        "print(xclip_fast.kernels.__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder / "benchmarks")}
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    kernels = tmp_path / "site" / "xclip_fast" / "kernels"
    assert done.stdout.strip() == str(kernels / "__init__.py")
    assert (kernels / "libxclip_fast.so").read_bytes() == b"a library"
    (folder / "kernels" / "libxclip_fast.so").unlink()
    command = [sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--out", "out", "--cases", "overhead,pytest"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert "restarted" not in done.stderr
    rows = [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]
    assert sum(row.get("outcome") == "passed" for row in rows) > 10
    assert bundle.main([str(folder), "--no-library", "--no-wheels"]) == 0  # in place of the old one
    other = tmp_path / "mine"
    other.mkdir()
    with pytest.raises(SystemExit):
        bundle.main([str(other)])
