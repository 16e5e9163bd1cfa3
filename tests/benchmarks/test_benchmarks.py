"""The benchmarks run, say what they did, and refuse what they cannot do."""

import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from xclip_fast.config import VARIANTS

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def throughput(monkeypatch, tiny_config):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(VARIANTS, "tiny", tiny_config)
    return importlib.import_module("throughput")


@pytest.fixture
def measuring(throughput):
    return throughput.measuring


@pytest.fixture
def contenders(throughput):
    return importlib.import_module("contenders")


@pytest.fixture
def quick(contenders, measuring, monkeypatch, one_thread):
    """A run of seconds: one thread, two runs without pauses, small clips, no large GEMM."""
    monkeypatch.setattr(measuring, "gemm_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(measuring, "CPU_RUNS", 2)
    monkeypatch.setattr(measuring, "measure", functools.partial(measuring.measure, pause=0.0))
    monkeypatch.setattr(contenders, "CLIP_FRAMES", 6)
    monkeypatch.setattr(contenders, "CLIP_SIZE", (64, 80))


def tiny_run(throughput, tmp_path, *options):
    path = tmp_path / "out.json"
    given = ["--variants", "tiny", "--labels", "6", "--device", "cpu", "--seconds", "200", "--json", str(path)]
    code = throughput.main([*given, *options])
    return code, json.loads(path.read_text())


@pytest.mark.usefixtures("quick")
def test_every_work_beside_its_peer(throughput, contenders, tmp_path, capsys):
    pytest.importorskip("transformers")
    code, report = tiny_run(throughput, tmp_path, "--precisions", "fp32,bf16", "--batch-sizes", "1,2")
    assert code == 0
    rows = {(row["precision"], row["batch"], row["work"], row["contender"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 2 * 2 * 9
    for (precision, batch, work, contender), row in rows.items():
        assert row["note"] == ""
        assert row["n"] == len(row["seconds"]) == 2
        videos = batch * (contenders.BATCHES_A_CALL if work == "files" else 1)
        assert row["views_per_second"] == pytest.approx(videos / row["median_s"])
        assert row["ratio_to_paper"] is None  # no such row in Table 1
        if contender == "Hugging Face":
            assert row["largest_error"] < (1e-4 if precision == "fp32" else 5e-2)
        elif work == "files":
            assert contender in ("xclip-fast", "decoding alone", "model alone")
            assert ("ratio" in row) == (contender != "xclip-fast")
        else:
            peer = rows[precision, batch, work, "Hugging Face"]
            ratio = peer["ratio"]
            assert ratio["low"] <= ratio["median"] <= ratio["high"]
            assert ratio["median"] == pytest.approx(peer["median_s"] / row["median_s"])
            assert row["flop_per_s"] == pytest.approx(2 * row["multiply_adds"] / row["median_s"])
            assert row["share_of_own_gemms"] > 0
    one, two = (rows["fp32", batch, "tower", "xclip-fast"]["multiply_adds"] for batch in (1, 2))
    assert two == 2 * one
    cached, encoded = (rows["fp32", 1, work, "xclip-fast"]["multiply_adds"] for work in ("cached", "encoded"))
    assert one < cached < encoded
    assert report["labels"]["count"] == 6
    assert {"device", "cpu", "torch", "transformers", "xclip_fast", "date", "command", "commit"} <= set(
        report["environment"]
    )
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) < 80
    for words in ("tiny fp32, 2 videos, labels encoded", "speed of ours over it", "Hugging Face"):
        assert words in table


@pytest.mark.usefixtures("quick")
def test_graphs_stand_beside_the_eager_calls_and_have_ratios_of_their_own(
    throughput, contenders, tmp_path, monkeypatch, capsys
):
    """On a GPU, for small batches; here the CPU plays one, and the eager tower the graph."""
    pytest.importorskip("transformers")
    made, cleared, wrong = [], [], []

    class Graphed:
        def __init__(self, model, batch, frames):
            made.append((batch, frames))
            self.model = model

        def __call__(self, video):
            features = self.model.encode_video(video)
            return features._replace(video=features.video * 1.5) if wrong else features

        def logits(self, video, text):
            return self.model.similarity(self(video), text)

    monkeypatch.setitem(throughput.GRAPHED_UP_TO, "cpu", 2)
    monkeypatch.setattr(throughput.xclip_fast.XCLIP, "graphed", lambda *sizes: Graphed(*sizes))
    monkeypatch.setattr(throughput.xclip_fast.XCLIP, "clear_graphs", lambda model: cleared.append(model))
    options = ("--precisions", "fp32", "--works", "tower,cached,encoded", "--batch-sizes", "2,3")
    code, report = tiny_run(throughput, tmp_path, *options)
    assert code == 0
    assert made == [(2, 3)] * 2
    assert len(cleared) == 6
    rows = {(row["batch"], row["work"], row["contender"]): row for row in report["rows"]}
    assert len(rows) == 6 * 2 + 2
    for work in ("tower", "cached"):
        ours, graphed, peer = (rows[2, work, name] for name in ("xclip-fast", "xclip-fast graph", "Hugging Face"))
        assert graphed["largest_error"] == 0
        assert peer["ratio"]["median"] == pytest.approx(peer["median_s"] / ours["median_s"])
        assert graphed["own_gemms_s"] == ours["own_gemms_s"]
        assert graphed["share_of_gemm"] > 0
    times = [
        f"{rows[2, work, 'Hugging Face']['median_s'] / rows[2, work, 'xclip-fast graph']['median_s']:.2f}x"
        for work in ("tower", "cached")
    ]
    graph_lines = [line for line in capsys.readouterr().out.splitlines() if "xclip-fast graph" in line]
    assert all(time in line for time, line in zip(times, graph_lines, strict=True))
    wrong.append(True)
    code, report = tiny_run(throughput, tmp_path, "--precisions", "fp32", "--works", "tower", "--batch-sizes", "1")
    assert code == 1
    ours, graphed, peer = report["rows"]
    assert "outputs differ from those of xclip-fast" in graphed["note"]
    assert "seconds" not in graphed
    assert "ratio" in peer


@pytest.mark.usefixtures("quick")
def test_missing_peer_is_a_row_that_says_so(throughput, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "HF_INSTALLED", False)
    code, report = tiny_run(throughput, tmp_path, "--precisions", "fp32", "--works", "tower")
    assert code == 0
    assert [row["contender"] for row in report["rows"]] == ["xclip-fast", "Hugging Face"]
    assert "pip install" in report["rows"][1]["note"]
    assert "pip install 'xclip-fast[hf]'" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_engines_get_the_same_tower_and_must_agree(throughput, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    options = ("--precisions", "fp32,bf16", "--works", "tower", "--engines", "openvino,onnxruntime")
    built = []

    def build(name, module, example, dtype):
        built.append((name, dtype, example.dtype))
        if name == "ONNX Runtime":
            raise ValueError("no such dtype")
        found = module(example)
        return lambda: (found[0] * (2 if dtype == torch.bfloat16 else 1), found[1])

    monkeypatch.setattr(throughput.cpu_engines, "missing", lambda name: None)
    monkeypatch.setattr(throughput.cpu_engines, "build", build)
    code, report = tiny_run(throughput, tmp_path, *options)
    assert code == 1  # OpenVINO's wrong numbers
    rows = {(row["precision"], row["contender"]): row for row in report["rows"]}
    assert [name for name, *_ in built] == ["OpenVINO", "ONNX Runtime"] * 2
    assert all(given == torch.float32 for _, _, given in built)
    compared = {key for key, row in rows.items() if "ratio" in row}
    assert compared == {("fp32", "Hugging Face"), ("fp32", "OpenVINO"), ("bf16", "Hugging Face")}
    assert "outputs differ" in rows["bf16", "OpenVINO"]["note"]
    assert rows["fp32", "ONNX Runtime"]["note"] == "failed: ValueError: no such dtype"

    monkeypatch.setattr(throughput.cpu_engines, "missing", lambda name: f"not installed: pip install {name}")
    code, report = tiny_run(throughput, tmp_path, *options)
    assert [row["contender"] for row in report["rows"][:4]] == [
        "xclip-fast",
        "Hugging Face",
        "OpenVINO",
        "ONNX Runtime",
    ]
    assert "not installed: pip install OpenVINO" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["OpenVINO", "ONNX Runtime"])
def test_an_engine_computes_what_the_module_does(throughput, name):
    if throughput.cpu_engines.missing(name):
        pytest.skip(throughput.cpu_engines.missing(name))
    module = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU(), Both())
    x = torch.randn(3, 8)
    found = throughput.cpu_engines.build(name, module, x, torch.float32)()
    with torch.no_grad():
        for given, wanted in zip(found, module(x), strict=True):
            assert torch.allclose(given, wanted, atol=1e-5)


class Both(torch.nn.Module):
    def forward(self, x):
        return x + 1, x.sum(1)


@pytest.mark.usefixtures("quick")
def test_one_call_gives_no_ratio_and_a_busy_machine_is_named(throughput, measuring, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(measuring, "CPU_RUNS", 1)
    monkeypatch.setattr(measuring.os, "getloadavg", lambda: (50.0, 1.0, 1.0))
    code, report = tiny_run(throughput, tmp_path, "--precisions", "fp32", "--works", "tower")
    assert code == 0
    assert report["rows"][1]["ratio"] == {}
    table = capsys.readouterr().out
    assert "no ratio of one call" in table
    assert "Busy machine: the load average before this run was 50.0" in table


@pytest.mark.usefixtures("quick")
def test_too_little_time_is_said(throughput, tmp_path, monkeypatch, capsys, measuring):
    monkeypatch.setattr(measuring, "gemm_rate", lambda dtype, device: 1.0)
    code, report = tiny_run(throughput, tmp_path, "--precisions", "fp32", "--works", "tower,encoded")
    assert code == 0
    assert all(row["note"].startswith("not run") and "views_per_second" not in row for row in report["rows"])
    out = capsys.readouterr().out
    assert "2 kinds of work were not run: a forward would take longer than --seconds" in out
    assert "views/s" not in out  # no empty tables


@pytest.mark.usefixtures("quick")
def test_wrong_answers_get_no_ratio(throughput, contenders, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    right = contenders.hf_video

    def wrong(hf, video):
        return right(hf, video)[0] * 1.01, right(hf, video)[1]

    monkeypatch.setattr(contenders, "hf_video", wrong)
    code, report = tiny_run(throughput, tmp_path, "--precisions", "fp32", "--works", "tower")
    ours, peer = report["rows"]
    assert code == 1
    assert ours["seconds"]
    assert "ratio" not in peer
    assert "outputs differ" in peer["note"]


@pytest.mark.usefixtures("quick")
def test_compiled_peer_and_failing_compiler(throughput, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    options = ("--precisions", "fp32", "--works", "tower", "--compile")
    monkeypatch.setattr(torch, "compile", lambda call, mode: call)
    code, report = tiny_run(throughput, tmp_path, *options)
    assert code == 0
    assert [row["contender"] for row in report["rows"] if "ratio" in row] == ["Hugging Face", "HF compiled"]

    def broken(*args):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda call, mode: broken)
    code, report = tiny_run(throughput, tmp_path, *options)
    assert code == 0
    assert report["rows"][2]["note"] == "failed: no compiler here"
    assert [row["contender"] for row in report["rows"] if "ratio" in row] == ["Hugging Face"]


@pytest.mark.usefixtures("quick")
def test_the_peer_is_compiled_once_a_variant_and_within_its_time(throughput, tmp_path, monkeypatch, tiny_config):
    pytest.importorskip("transformers")
    monkeypatch.setitem(VARIANTS, "B/16-8f", tiny_config)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, mode: compiled.append(mode) or call)
    variants = ("B/16-8f", "tiny")
    cells = itertools.product(variants, ("fp32", "bf16"), (1, 8, 64), ("cached", "tower"))
    chosen = throughput.compiled_cells([throughput.Cell(*cell) for cell in cells])
    assert chosen == {throughput.Cell(variant, "fp32", 8, "tower") for variant in variants}

    options = ("--variants", "tiny,B/16-8f", "--precisions", "fp32", "--batch-sizes", "1,2", "--compile")
    code, report = tiny_run(throughput, tmp_path, *options, "--works", "tower")
    assert code == 0
    assert compiled == ["default"] * 2
    rows = [row for row in report["rows"] if row["contender"] == "HF compiled"]
    assert [(row["variant"], row["batch"]) for row in rows] == [(variant, 2) for variant in variants]

    monkeypatch.setitem(throughput.COMPILE_SECONDS, "cpu", 1e9)
    code, report = tiny_run(throughput, tmp_path, "--precisions", "fp32", "--works", "tower", "--compile")
    assert code == 0
    assert len(compiled) == 2
    assert report["rows"][2]["contender"] == "HF compiled"
    assert report["rows"][2]["note"] == "not run: 1e+09 s"


class OutOfResources(Exception):
    """Triton's, like its CompilationError and PTXASError, is no RuntimeError."""


@pytest.mark.usefixtures("quick")
def test_one_failing_cell_costs_that_cell(throughput, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "HF_INSTALLED", False)
    real = throughput.xclip_fast.XCLIP.encode_video

    def out_of_shared_memory(model, video):
        if len(video) == 2:
            raise OutOfResources("out of resource: shared memory")
        return real(model, video)

    monkeypatch.setattr(throughput.xclip_fast.XCLIP, "encode_video", out_of_shared_memory)
    options = ("--precisions", "fp32", "--works", "tower,cached", "--batch-sizes", "1,2")
    code, report = tiny_run(throughput, tmp_path, *options)
    assert code == 1
    notes = {(row["batch"], row["work"]): row["note"] for row in report["rows"] if row["contender"] == "xclip-fast"}
    failed = "failed: OutOfResources: out of resource: shared memory"
    assert notes == {(1, "tower"): "", (1, "cached"): "", (2, "tower"): failed, (2, "cached"): failed}


@pytest.mark.usefixtures("quick")
def test_a_stopped_run_keeps_its_rows(throughput, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "HF_INSTALLED", False)
    real = throughput.contenders_of

    def stopped(work, *rest, **options):
        if work == "cached":
            raise KeyboardInterrupt
        return real(work, *rest, **options)

    monkeypatch.setattr(throughput, "contenders_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(throughput, tmp_path, "--precisions", "fp32", "--works", "tower,cached")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["work"], row["contender"]) for row in rows] == [("tower", "xclip-fast"), ("tower", "Hugging Face")]


@pytest.mark.usefixtures("quick")
def test_without_av_the_other_works_are_measured(throughput, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "AV_INSTALLED", False)
    monkeypatch.setattr(throughput, "HF_INSTALLED", False)
    code, report = tiny_run(throughput, tmp_path, "--precisions", "fp32")
    assert code == 0
    rows = {row["work"]: row for row in report["rows"] if row["contender"] == "xclip-fast"}
    assert set(rows) == set(throughput.WORKS)
    assert rows["files"]["note"] == "not installed: pip install av"
    assert all(row["views_per_second"] > 0 for work, row in rows.items() if work != "files")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--variants", "B/8"], "'B/8' is not one of"),
        (["--precisions", "int8"], "'int8' is not one of"),
        (["--works", "tower,"], "'' is not one of"),
        (["--batch-sizes", "1,0"], "whole number of at least 1"),
        (["--batch-sizes", "many"], "whole number of at least 1"),
        (["--labels", "0"], "1 to 10000"),
        (["--labels", "/no/such/file"], "No such file"),
        (["--labels", "/dev/null"], "no labels"),
        (["--threads", "0"], "at least 1"),
        (["--threads", "two"], "at least 1"),
        (["--seconds", "-1"], "positive"),
        (["--seconds", "nan"], "positive"),
        (["--backend", "magic"], "no backend is called 'magic'"),
        (["--json", "/no/such/folder/out.json"], "existing folder"),
        (["--device", "tpu"], "not one of auto, cpu, cuda"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_wrong_arguments_are_one_line(throughput, options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        throughput.main(options)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_absent_gpu_is_an_error(throughput, capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


SCRIPTS = ("throughput", "training", "decode", "motion", "scale", "search", "soak", "host_time", "cold_start")
SCRIPTS += ("image_clip", "exported", "plot_peers", "accuracy_flops", "gpu_bundle", "gpu_check")


# in a process of their own, because some read the environment when they are imported
RUN_ALL = """
import contextlib, io, json, runpy, sys
found = {}
for path in sys.argv[1:]:
    for option in ("--help", "--nonsense"):
        out, err = io.StringIO(), io.StringIO()
        sys.argv = [path, option]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            found[path + option] = end.code, out.getvalue(), err.getvalue()
print(json.dumps(found))
"""


def test_every_help_fits_a_terminal_and_a_wrong_option_is_one_line():
    paths = [str(FOLDER / f"{name}.py") for name in SCRIPTS]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(FOLDER), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", RUN_ALL, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for path, name in zip(paths, SCRIPTS, strict=True):
        code, out, _ = found[path + "--help"]
        assert code == 0
        assert not [line for line in out.splitlines() if len(line) > 80 and not line.startswith("    python ")]
        code, _, err = found[path + "--nonsense"]
        assert code == 2
        assert err.startswith(f"{name}.py: error: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise KeyboardInterrupt", -signal.SIGINT, ""),
        ("import no_such_package", 1, "error: No module named 'no_such_package' (pip install no_such_package)"),
        ("open('/no/such/file')", 1, "error: [Errno 2] No such file or directory: '/no/such/file'"),
        ("import subprocess; subprocess.run(['false'], check=True)", 1, "error: false ended with exit code 1\n"),
    ],
)
def test_a_benchmark_ends_with_one_line_at_most(body, code, said):
    command = [sys.executable, "-c", f"import arguments\n{body}"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("image_clip", ["--precisions", "int8"], "'int8' is not one of"),
        ("image_clip", ["--frames", "0"], "at least 1"),
        ("image_clip", ["--labels", "100000"], "1 to 10000"),
        ("motion", ["--models", "CLIP"], "'CLIP' is not one of"),
        ("cold_start", ["--random", "B/32-8f", "--runs", "0"], "at least 1"),
        ("soak", ["--samples", "60"], "at least 100"),
        ("search", ["film", "--minutes", "1"], "at least 2"),
        ("exported", ["--seconds", "0"], "positive"),
        *((name, ["--json", "/no/such/folder/out.json"], "existing folder") for name in ("motion", "soak", "exported")),
        ("plot_peers", ["in.json", "--out", "/no/such/folder/out.svg"], "existing folder"),
    ],
)
@pytest.mark.usefixtures("throughput")
def test_what_a_benchmark_cannot_do_is_refused_before_it_starts(script, options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(options)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused(throughput, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput.arguments.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit):
        throughput.main(["--json", str(tmp_path / "out.json")])
    assert "no permission to write it" in capsys.readouterr().err


@pytest.mark.usefixtures("throughput")
def test_labels(tmp_path):
    labels = importlib.import_module("labels")
    found = labels.label_list(400)
    assert len(set(found)) == 400
    assert {len(label.split()) for label in found} == {1, 2, 3, 4}
    assert found[:100] == labels.label_list(100)
    assert len(labels.label_list(labels.MOST)) == labels.MOST
    (tmp_path / "labels.txt").write_text("riding a bike\n\n  swimming \n")
    assert labels.read_labels(str(tmp_path / "labels.txt")) == ["riding a bike", "swimming"]


def test_plan_keeps_to_the_time(throughput):
    cells = [
        throughput.Cell("tiny", precision, 1, work) for precision in ("fp32", "bf16") for work in ("tower", "cached")
    ]
    costs = dict(zip(cells, [(1.0, 50.0), (2.0, 5.0), (3.0, 5.0), (40.0, 1.0)], strict=True))
    planned = throughput.plan(costs, 20.0)
    assert list(planned.values()) == [(2.0, 0.0), (4.0, 5.5), (6.0, 0.0), (0.0, 0.0)]
    assert throughput.plan(costs, math.inf)[cells[3]] == (80.0, pytest.approx(1.1))


def test_measure_takes_turns(measuring):
    calls = []

    def contender(name):
        return lambda: calls.append(name) or torch.zeros(1)

    results = measuring.measure({"a": contender("a"), "b": contender("b")}, "cpu", 60.0, pause=0.0)
    rounds = [calls[start : start + 2] for start in range(0, len(calls), 2)]
    assert len(rounds) == 1 + measuring.CPU_RUNS
    assert all(sorted(names) == ["a", "b"] for names in rounds)
    assert ["a", "b"] in rounds[1:]
    assert ["b", "a"] in rounds[1:]
    for result in results.values():
        assert len(result["seconds"]) == measuring.CPU_RUNS
        assert result["warm_ups"] == 1


def test_measure_without_time_takes_the_first_call(measuring):
    calls = []
    results = measuring.measure({"a": lambda: calls.append(1) or torch.zeros(1)}, "cpu", 0.0)
    assert len(calls) == len(results["a"]["seconds"]) == 1
    assert results["a"]["warm_ups"] == 0


def test_peak_memory_sees_what_a_call_takes(measuring):
    result, peak = measuring.peak_memory(lambda: torch.ones(16 << 20).sum(), "cpu")
    assert result == 16 << 20
    assert peak is None or 60 << 20 < peak < 160 << 20


def test_gemms_of_the_model_are_weighted_by_their_number(measuring, monkeypatch):
    products = measuring.Product
    seen = []
    monkeypatch.setattr(measuring, "limit_seconds", lambda *shape: seen.append(shape[:3]) or 1.0)
    listed = [products("mlp", 2, 3, 4, 12), products("text", 2, 3, 4), products("mlp", 1, 1, 1, 7, weight=False)]
    assert measuring.own_gemms(listed, torch.float32, "cpu") == 13
    assert seen == [(2, 3, 4)]


def test_a_slow_contender_does_not_stop_the_others(measuring):
    def waits(seconds):
        return lambda: time.sleep(seconds) or torch.zeros(1)

    results = measuring.measure({"slow": waits(0.3), "a": waits(0.0), "b": waits(0.0)}, "cpu", 0.6, pause=0.0)
    assert len(results["slow"]["seconds"]) == 1
    assert results["slow"]["warm_ups"] == 0
    assert len(results["a"]["seconds"]) == len(results["b"]["seconds"]) == 10


def test_gemm_seconds_are_measured(measuring):
    assert 0 < measuring.limit_seconds(8, 8, 8, torch.float32, "cpu") < 1


def test_json_is_whole_or_not_there(measuring, tmp_path):
    path = tmp_path / "out.json"
    measuring.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        measuring.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_order_of_frames_is_counted_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    motion = importlib.import_module("motion")
    confusion = np.zeros((10, 10), int)
    confusion[0, 0], confusion[0, 1], confusion[3, 3], confusion[2, 9] = 3, 1, 2, 4
    assert motion.by_order(confusion) == (0.6, 5 / 6)


@pytest.fixture
def training(throughput, measuring, monkeypatch):
    monkeypatch.setattr(measuring, "gemm_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(measuring, "CPU_RUNS", 1)
    return importlib.import_module("training")


def training_run(training, tmp_path, *options):
    path = tmp_path / "training.json"
    given = ["--variants", "tiny", "--labels", "4", "--device", "cpu", "--seconds", "100", "--batch-size", "2"]
    code = training.main([*given, "--json", str(path), *options])
    return code, json.loads(path.read_text())


def test_training_steps_beside_the_peer(training, tmp_path):
    pytest.importorskip("transformers")
    code, report = training_run(training, tmp_path, "--text", "frozen,trained")
    assert code == 0
    assert [(row["towers"], row["contender"]) for row in report["rows"]] == [
        (towers, contender) for towers in ("visual", "both") for contender in ("xclip-fast", "Hugging Face")
    ]
    assert all(row["clips_per_second"] > 0 for row in report["rows"])


def test_a_training_cell_that_fails_costs_that_cell(training, tmp_path, monkeypatch):
    real = training.contenders_of

    def failing(cell, *rest):
        if cell.recompute:
            raise OutOfResources("out of resource: shared memory")
        return real(cell, *rest)

    monkeypatch.setattr(training, "contenders_of", failing)
    code, report = training_run(training, tmp_path, "--recompute", "yes,no", "--no-peers")
    assert code == 1
    assert [row["note"] for row in report["rows"]] == ["failed: OutOfResources: out of resource: shared memory", ""]


def test_peers_are_drawn_over_hugging_face(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    plot_peers = importlib.import_module("plot_peers")
    row = {"variant": "B/16-8f", "precision": "fp32", "batch": 1, "work": "tower"}
    speeds = {"Hugging Face": 2.0, "OpenVINO": 3.0, "xclip-fast": 4.0, "ONNX Runtime": None}
    rows = [row | {"contender": name, "views_per_second": speed} for name, speed in speeds.items()]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"rows": rows, "environment": {"device": "some CPU", "threads": 2}}))
    found = plot_peers.speeds([json.loads(path.read_text())], "tower")
    assert found == {"B/16-8f fp32": {"Hugging Face": 1.0, "OpenVINO": 1.5, "xclip-fast": 2.0}}
    if importlib.util.find_spec("matplotlib"):
        assert plot_peers.main([str(path), "--out", str(tmp_path / "peers.svg")]) == 0
        drawn = (tmp_path / "peers.svg").read_text()
        assert "xclip-fast" in drawn
        assert "2.00" in drawn
    with pytest.raises(SystemExit):
        plot_peers.main([str(path), "--work", "encoded", "--out", str(tmp_path / "none.svg")])
    assert "no row of work 'encoded'" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rows": rows, "environment": {"device": "another", "threads": 2}}))
    with pytest.raises(SystemExit):
        plot_peers.main([str(path), str(other), "--out", str(tmp_path / "none.svg")])
    assert "several machines: another, 2 threads, some CPU, 2 threads" in capsys.readouterr().err
    for content, said in (("{}", "no result of throughput.py"), ("", "cannot be read")):
        path.write_text(content)
        with pytest.raises(SystemExit):
            plot_peers.main([str(path), "--out", str(tmp_path / "none.svg")])
        assert said in capsys.readouterr().err


def test_a_missing_engine_is_named_before_the_first_export(throughput, monkeypatch, capsys):
    exported = importlib.import_module("exported")
    monkeypatch.setattr(exported, "export_model", lambda *_: pytest.fail("an export began"))
    monkeypatch.setattr(type(exported.OPENVINO), "missing", lambda form: "not installed: pip install it")
    with pytest.raises(SystemExit):
        exported.main([])
    assert "not installed: pip install it" in capsys.readouterr().err


def test_cold_start_adds_up(throughput, tmp_path, capsys):
    cold_start = importlib.import_module("cold_start")
    assert cold_start.main(["--random", "tiny", "--runs", "1", "--json", str(tmp_path / "out.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["seconds", *cold_start.PARTS, "answer", "exit"]
    [run] = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert min(wall for wall, _ in run.values()) > 0
    answer = sum(run[part][0] for part in cold_start.PARTS)
    assert lines[-2][1:3] == [f"{answer:.2f}", "100%"]
    assert lines[2][2] == f"{run['imports'][0] / answer:.0%}"


def test_queries_of_a_store_are_timed(throughput, tmp_path, capsys):
    pytest.importorskip("lancedb")
    importlib.import_module("search").main(["rows", "--count", "200", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out).items() <= written.items()
    assert 0 < written["exact"]["median_s"] < 10
