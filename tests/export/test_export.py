"""Exported graphs: the same numbers in other engines for any number of videos and labels, and nothing else is kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xclip_fast
from xclip_fast import XCLIP, SwinConfig, TextConfig, VisionConfig, XCLIPConfig
from xclip_fast.cli.main import main
from xclip_fast.export import ExportError, export_model, folder, formats
from xclip_fast.export.formats import FORMATS, ONNX, TENSORRT, TORCH, Format, quiet
from xclip_fast.export.graphs import graphs_of, trace

LABELS = [f"doing thing {number}" if number % 3 else f"a{number}" for number in range(400)]
CONFIG = XCLIPConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=128, layers=1, heads=2),
    text=TextConfig(width=64, layers=1, heads=1),
    embed_dim=64,
    num_frames=3,
)


@pytest.fixture(scope="module")
def model() -> XCLIP:
    torch.manual_seed(0)
    return XCLIP(CONFIG).eval()


@pytest.fixture(scope="module")
def programs(model: XCLIP) -> dict[str, Any]:
    """Its graphs, traced once: tracing takes seconds."""
    return {graph.name: trace(graph) for graph in graphs_of(model, 3)}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, programs: dict[str, Any]) -> None:
    monkeypatch.setattr(folder, "trace", lambda graph: programs[graph.name])


def installed(name: str) -> Format:
    if reason := FORMATS[name].missing():
        pytest.skip(f"{name}: {reason}")
    return FORMATS[name]


def opened(model: XCLIP, form: Format, path: Path) -> dict[str, Any]:
    """The graphs of a folder as calls of tensors, by name."""
    return {
        graph.name: form.open(path / form.files[0].format(graph.name), graph, 1, torch.float32)
        for graph in graphs_of(model, 3)
    }


def test_each_weight_is_in_one_graph(model: XCLIP, programs: dict[str, Any]) -> None:
    """A .pt2 file holds a program's whole state."""
    held = [name.removeprefix("model.") for program in programs.values() for name in program.state_dict]
    assert sorted(held) == sorted(model.state_dict())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_graphs_give_the_model_s_logits(model: XCLIP, tmp_path: Path, name: str) -> None:
    """From pixels and labels to logits with 1 and 3 videos, 1 and 400 labels."""
    form = installed(name)
    (tmp_path / "mine.txt").write_text("kept")
    found = export_model(model, tmp_path, name)
    assert [each.file for each in found] == [form.files[0].format(graph) for graph in ("video", "text", "similarity")]
    assert all(each.difference < 1e-5 and each.bytes > 1000 for each in found)
    graphs = opened(model, form, tmp_path)
    for batch, count in ((1, 1), (3, 400)):
        video = torch.randint(256, (batch, 3, 32, 32, 3), dtype=torch.uint8)
        tokens = xclip_fast.tokenize(LABELS[:count])
        features, patches = graphs["video"]((video,))
        (text,) = graphs["text"]((tokens.long(),))
        (logits,) = graphs["similarity"]((features, text, patches))
        with torch.no_grad():
            torch.testing.assert_close(logits, model(video, tokens), rtol=1e-4, atol=1e-4)
    summary = json.loads((tmp_path / "export.json").read_text())
    assert summary["graphs"][found[0].file]["inputs"] == {
        "frames": {"dtype": "uint8", "shape": ["batch", 3, 32, 32, 3]}
    }
    assert XCLIPConfig.from_dict(summary["model"]) == model.config
    names = {file.format(graph) for graph in ("video", "text", "similarity") for file in form.files}
    assert {path.name for path in tmp_path.iterdir()} <= {*names, "export.json", "mine.txt"}
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_model(model, tmp_path, name)


SIGNALS = """
import faulthandler, signal, subprocess, sys
from pathlib import Path
import torch
from xclip_fast.export.formats import OPENVINO
faulthandler.enable()  # gives signals a stack of their own
signal.signal(signal.SIGCHLD, lambda *_: None)
first, second = (OPENVINO.open(Path(sys.argv[1]), None, 1, torch.float32) for _ in range(2))
del first
del second
subprocess.run(["true"], check=True)
print("alive")
"""


def test_signals_after_two_openvino_graphs_have_gone(tmp_path: Path, programs: dict[str, Any], model: XCLIP) -> None:
    form, graph = installed("openvino"), graphs_of(model, 3)[2]
    path = tmp_path / "similarity.xml"
    with quiet():
        form.write(graph, programs[graph.name], path, torch.float32)
    run = subprocess.run([sys.executable, "-c", SIGNALS, path], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "alive"), run.stderr


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_half_precision_halves_the_file(model: XCLIP, tmp_path: Path, programs: Any, name: str) -> None:
    form, wanted = installed(name), graphs_of(model, 3)[2]
    graph = graphs_of(copy.deepcopy(model).half(), 3)[2] if name == "onnx" else wanted
    path = tmp_path / form.files[0].format(graph.name)
    with quiet():
        form.write(graph, trace(graph) if name == "onnx" else programs[graph.name], path, torch.float16)
    weights = sum(tensor.nbytes for tensor in model.prompts_generator.state_dict().values())
    assert 0.4 * weights < (tmp_path / form.files[1].format(graph.name)).stat().st_size < 0.7 * weights
    assert 1e-6 < folder._difference(form, path, graph, wanted) < folder.TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("changes", "graph"),
    [({"num_classes": 5}, 1), ({"prompt": "vectors"}, 1), ({"prompt": "none", "mit_layers": 0}, 2)],
)
def test_ablated_models(changes: dict[str, Any], graph: int) -> None:
    """The graphs that differ: of a head, of learnt vectors, of plain cosines."""
    found = graphs_of(XCLIP(dataclasses.replace(CONFIG, **changes)).eval(), 3)
    assert [each.name for each in found] == (
        ["video", "similarity"] if "num_classes" in changes else list(folder.NAMES)
    )
    program = trace(found[graph]).module()
    for sizes in folder.CHECKED:
        inputs = found[graph].example(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs), found[graph].module(*inputs), rtol=1e-4, atol=1e-5)


def test_a_tower_with_windows_in_onnx(tmp_path: Path) -> None:
    """X-Florence's: its attention has a bias, which ONNX's exporter takes apart."""
    form = installed("onnx")
    vision = SwinConfig(224, (32, 64, 64, 64), (1, 1, 1, 1), head_size=16)
    torch.manual_seed(0)
    graph = graphs_of(XCLIP(dataclasses.replace(CONFIG, vision=vision)).eval(), 2)[0]
    with quiet():
        form.write(graph, trace(graph), tmp_path / "video.onnx", torch.float32)
    assert folder._difference(form, tmp_path / "video.onnx", graph, graph) < 1e-5


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("wrong", [lambda x: x * 1.001, lambda x: x * torch.nan, lambda x: x[..., :1]])
def test_a_graph_that_differs_is_not_kept(
    model: XCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    def open_changed(*args: Any) -> Any:
        run = TORCH.open(*args)
        return lambda inputs: [wrong(each) for each in run(inputs)]

    monkeypatch.setitem(folder.FORMATS, "torch", dataclasses.replace(TORCH, open=open_changed))
    with pytest.raises(ExportError, match="Nothing was written"):
        export_model(model, tmp_path / "new", "torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced")
def test_the_command(model: XCLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["export", *arguments])
        return stopped.value.code or 0, *capsys.readouterr()  # type: ignore[return-value]

    model.save_pretrained(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("weights", "--format", "torch")
    files = [line.split("\t")[0] for line in out.splitlines()]
    assert (code, files) == (0, ["video.pt2", "text.pt2", "similarity.pt2"])
    assert json.loads((tmp_path / "weights-torch" / "export.json").read_text())["frames"] == 3
    code, _, err = run("weights", "--format", "torch")
    assert code == 1
    assert "weights-torch holds an export" in err
    before = (tmp_path / "weights" / "model.safetensors").read_bytes()
    assert run("weights", "weights", "--format", "torch")[0] == 0  # beside the source, which stays
    assert (tmp_path / "weights" / "model.safetensors").read_bytes() == before
    code, _, err = run("weights", "out", "--format", "onnx", "--dtype", "bfloat16")
    assert code == 1
    assert "onnx in bfloat16 is not supported; choose one of float32, float16" in err
    monkeypatch.setattr(folder, "FORMATS", {"onnx": dataclasses.replace(ONNX, packages=("no_such_package",))})
    code, _, err = run("weights", "out")
    assert code == 1
    assert "pip install no_such_package, or pip install 'xclip-fast[onnx]'" in err
    assert not (tmp_path / "out").exists()


def test_other_frames(model: XCLIP, tmp_path: Path) -> None:
    assert graphs_of(model, 2)[0].example(1, 1)[0].shape == (1, 2, 32, 32, 3)
    with pytest.raises(ValueError, match="frames 0 must be at least 1"):
        export_model(model, tmp_path, "torch", frames=0)


# ---- TensorRT: no GPU here, so its published calls are played by stand-ins


def test_tensorrt_is_built_from_the_onnx_file(model: XCLIP, programs: Any, tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[tuple[Any, ...]] = []
    graph, path = graphs_of(model, 3)[1], tmp_path / "text.plan"
    written = dataclasses.replace(ONNX, write=lambda graph, program, path, dtype: path.write_text("onnx"))
    monkeypatch.setattr(formats, "ONNX", written)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(calls))
    TENSORRT.write(graph, programs["text"], path, torch.float32)
    assert path.read_bytes() == b"plan"
    assert ("profile", "tokens", (1, 3), (400, 8), (4096, 77)) in calls
    (tokens,) = graph.example(2, 3)
    with monkeypatch.context() as here:  # a GPU's memory by the CPU's
        here.setattr(Tensor, "cuda", lambda self: self)
        here.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0, synchronize=list))
        empty = torch.zeros
        here.setattr(torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype))
        (text,) = TENSORRT.open(path, graph, None, torch.float32)((tokens,))
    assert text.shape == (3, 64)
    assert text.dtype == torch.float32
    assert [name for kind, name, *_ in calls if kind == "address"] == ["tokens", "text"]
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(calls, reads=False))
    with pytest.raises(ValueError, match=r"cannot read text\.onnx: no such operator"):
        TENSORRT.write(graph, programs["text"], path, torch.float32)
    if not torch.cuda.is_available():
        assert "cuda.is_available() is False" in str(TENSORRT.refuse())


def fake_tensorrt(calls: list[tuple[Any, ...]], reads: bool = True) -> Any:
    """The part of TensorRT's Python interface that is called, without computing anything."""

    class Parser:
        num_errors = 1

        def __init__(self, network: Any, logger: Any) -> None:
            pass

        def parse_from_file(self, path: str) -> bool:
            assert Path(path).read_text() == "onnx"
            return reads

        def get_error(self, index: int) -> str:
            return "no such operator"

    context = types.SimpleNamespace(
        set_input_shape=lambda name, shape: True,
        get_tensor_shape=lambda name: (3, 64),
        set_tensor_address=lambda name, address: calls.append(("address", name, address)),
        execute_async_v3=lambda stream: True,
    )
    engine = types.SimpleNamespace(create_execution_context=lambda: context, get_tensor_dtype=lambda name: "FLOAT")
    profile = types.SimpleNamespace(set_shape=lambda *shapes: calls.append(("profile", *shapes)))
    builder = types.SimpleNamespace(
        create_network=lambda flags: None,
        create_builder_config=lambda: types.SimpleNamespace(add_optimization_profile=lambda profile: 0),
        create_optimization_profile=lambda: profile,
        build_serialized_network=lambda network, config: b"plan",
    )
    return types.SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Builder=lambda logger: builder,
        NetworkDefinitionCreationFlag=types.SimpleNamespace(STRONGLY_TYPED=1),
        OnnxParser=Parser,
        Runtime=lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        DataType=types.SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BF16="BF16"),
    )
