"""Exported graphs: the same numbers in other engines for any number of videos and labels, and nothing else is kept."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xclip_fast
from xclip_fast import XCLIP, XCLIPConfig
from xclip_fast.cli.main import main
from xclip_fast.export import ExportError, export_model, folder
from xclip_fast.export.formats import FORMATS, ONNX, TENSORRT, TORCH, Format
from xclip_fast.export.graphs import Graph, graphs_of, trace

LABELS = [f"doing thing {number}" if number % 3 else f"a{number}" for number in range(400)]


def installed(name: str) -> Format:
    if reason := FORMATS[name].missing():
        pytest.skip(f"{name}: {reason}")
    return FORMATS[name]


def opened(model: XCLIP, form: Format, path: Path) -> dict[str, Any]:
    """The graphs of a folder as calls of tensors, by name."""
    graphs = graphs_of(model, model.config.num_frames)
    return {graph.name: form.open(path / form.files[0].format(graph.name), graph, 1, torch.float32) for graph in graphs}


@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
def test_graphs_give_the_model_s_logits(tiny_model: XCLIP, tmp_path: Path, name: str) -> None:
    """From pixels and labels to logits with 1 and 3 videos, 1 and 400 labels."""
    form = installed(name)
    (tmp_path / "mine.txt").write_text("kept")
    found = export_model(tiny_model, tmp_path, name)
    assert [each.file for each in found] == [form.files[0].format(graph) for graph in ("video", "text", "similarity")]
    assert all(each.difference < 1e-5 and each.bytes > 1000 for each in found)
    graphs = opened(tiny_model, form, tmp_path)
    for batch, count in ((1, 1), (3, 400), (1, 400)):
        video = torch.randint(256, (batch, 3, 32, 32, 3), dtype=torch.uint8)
        tokens = xclip_fast.tokenize(LABELS[:count])
        features, patches = graphs["video"]((video,))
        (text,) = graphs["text"]((tokens.long(),))
        (logits,) = graphs["similarity"]((features, text, patches))
        with torch.no_grad():
            torch.testing.assert_close(logits, tiny_model(video, tokens), rtol=1e-4, atol=1e-4)
    summary = json.loads((tmp_path / "export.json").read_text())
    assert summary["graphs"][found[0].file]["inputs"] == {
        "frames": {"dtype": "uint8", "shape": ["batch", 3, 32, 32, 3]}
    }
    assert XCLIPConfig.from_dict(summary["model"]) == tiny_model.config
    names = {file.format(graph) for graph in ("video", "text", "similarity") for file in form.files}
    assert {path.name for path in tmp_path.iterdir()} <= {*names, "export.json", "mine.txt"}
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_model(tiny_model, tmp_path, name)


@pytest.mark.parametrize(("name", "dtype"), [("onnx", torch.float16), ("openvino", torch.float16)])
def test_half_precision_halves_the_files(tiny_model: XCLIP, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    installed(name)
    whole = export_model(tiny_model, tmp_path, name)
    half = export_model(tiny_model, tmp_path, name, dtype=dtype, overwrite=True)
    assert all(1e-5 < each.difference < 1e-2 for each in half)
    text = [each[1].bytes for each in (whole, half)]  # its weights are most of the file
    assert text[1] < 0.6 * text[0]
    assert next(iter(tiny_model.parameters())).dtype == torch.float32


@pytest.mark.parametrize("changes", [{"num_classes": 5}, {"prompt": "vectors"}, {"prompt": "none", "mit_layers": 0}])
def test_ablated_models(tiny_config: XCLIPConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = XCLIP(dataclasses.replace(tiny_config, **changes)).eval()
    found = export_model(model, tmp_path, "torch")
    assert [Path(each.file).stem for each in found] == [graph.name for graph in graphs_of(model, 3)]
    assert len(found) == (2 if model.head is not None else 3)


def test_a_graph_that_differs_is_not_kept(tiny_model: XCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (lambda x: x * 1.001, lambda x: x * torch.nan, lambda x: x[..., :1]):

        def open_changed(*args: Any, wrong: Any = wrong) -> Any:
            run = TORCH.open(*args)
            return lambda inputs: [wrong(each) for each in run(inputs)]

        changed = dataclasses.replace(TORCH, open=open_changed)
        monkeypatch.setitem(folder.FORMATS, "torch", changed)
        with pytest.raises(ExportError, match="Nothing was written"):
            export_model(tiny_model, tmp_path / "new", "torch")
        assert list(tmp_path.iterdir()) == []


def test_the_command(tiny_model: XCLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["export", *arguments])
        return stopped.value.code or 0, *capsys.readouterr()  # type: ignore[return-value]

    tiny_model.save_pretrained(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("weights", "--format", "torch", "--frames", "2")
    assert (code, [line.split("\t")[0] for line in out.splitlines()]) == (
        0,
        ["video.pt2", "text.pt2", "similarity.pt2"],
    )
    assert json.loads((tmp_path / "weights-torch" / "export.json").read_text())["frames"] == 2
    code, _, err = run("weights", "--format", "torch")
    assert code == 1
    assert "weights-torch holds an export" in err
    before = (tmp_path / "weights" / "model.safetensors").read_bytes()
    assert run("weights", "weights", "--format", "torch")[0] == 0  # beside the source, which stays
    assert (tmp_path / "weights" / "model.safetensors").read_bytes() == before
    code, _, err = run("weights", "out", "--format", "onnx", "--dtype", "bfloat16")
    assert code == 1
    assert "onnx in torch.bfloat16 is not supported" in err
    monkeypatch.setattr(folder, "FORMATS", {"onnx": dataclasses.replace(ONNX, packages=("no_such_package",))})
    code, _, err = run("weights", "out")
    assert code == 1
    assert "pip install no_such_package, or pip install 'xclip-fast[onnx]'" in err
    assert not (tmp_path / "out").exists()


def test_quantized_models_are_refused(tiny_model: XCLIP, tmp_path: Path) -> None:
    tiny_model.quantize("fp8", calibration=torch.randint(256, (1, 3, 32, 32, 3), dtype=torch.uint8))
    with pytest.raises(ValueError, match="dequantize"):
        export_model(tiny_model, tmp_path, "torch")


# ---- TensorRT: no GPU here, so its published calls are played by stand-ins


def test_tensorrt_is_built_from_the_onnx_file(tiny_model: XCLIP, tmp_path: Path, monkeypatch: Any) -> None:
    installed("onnx")
    calls: list[tuple[Any, ...]] = []
    graph = graphs_of(tiny_model, 3)[1]
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(calls, graph))
    TENSORRT.write(graph, trace(graph), tmp_path / "text.plan", torch.float32)
    assert (tmp_path / "text.plan").read_bytes() == b"plan"
    assert ("profile", "tokens", (1, 3), (400, 8), (4096, 77)) in calls
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0, synchronize=list))
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype))
    (tokens,) = graph.example(2, 3)
    (text,) = TENSORRT.open(tmp_path / "text.plan", graph, None, torch.float32)((tokens,))
    assert text.shape == (3, 64)
    assert text.dtype == torch.float32
    assert [name for kind, name, *_ in calls if kind == "address"] == ["tokens", "text"]
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(calls, graph, reads=False))
    with pytest.raises(ValueError, match=r"cannot read text\.onnx: no such operator"):
        TENSORRT.write(graph, trace(graph), tmp_path / "text.plan", torch.float32)


def fake_tensorrt(calls: list[tuple[Any, ...]], graph: Graph, reads: bool = True) -> Any:
    """The part of TensorRT's Python interface that is called, without computing anything."""

    class Parser:
        num_errors = 1

        def __init__(self, network: Any, logger: Any) -> None:
            pass

        def parse_from_file(self, path: str) -> bool:
            import onnx

            onnx.checker.check_model(path)
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
