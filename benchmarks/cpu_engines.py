"""Inference engines that a CPU user would take instead of PyTorch, each given the same PyTorch module."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPENVINO, ONNXRUNTIME = "OpenVINO", "ONNX Runtime"
PACKAGES = {OPENVINO: ("openvino",), ONNXRUNTIME: ("onnxruntime", "onnx", "onnxscript")}
Engine = Callable[[], tuple[Tensor, ...]]


def missing(name: str) -> str | None:
    """How to install what an engine needs, or None."""
    wanted = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    return f"not installed: pip install {' '.join(wanted)}" if wanted else None


def build(name: str, module: nn.Module, example: Tensor, dtype: torch.dtype) -> Engine:
    """A call that runs ``module`` on ``example`` in an engine with as many threads as torch has.

    Args:
        module: in float32, without gradients; it returns a tuple of tensors.
        example: float32.
        dtype: to compute in. OpenVINO obeys it where the CPU has its instructions; ONNX Runtime has float32 only.

    Raises:
        ValueError: if the engine does not compute in ``dtype`` on a CPU.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracers' notes on shapes that are fixed here
        return {OPENVINO: _openvino, ONNXRUNTIME: _onnxruntime}[name](module, example, dtype)


def _openvino(module: nn.Module, example: Tensor, dtype: torch.dtype) -> Engine:
    import openvino

    core = openvino.Core()
    half = {torch.bfloat16: "BF16", torch.float16: "FP16"}.get(dtype)
    native = half in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": str(half).lower() if native else "f32",
    }
    model = openvino.convert_model(module, example_input=example)
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    given = example.numpy()

    def run() -> tuple[Tensor, ...]:
        found: Any = request.infer([given], share_inputs=True, share_outputs=True)
        return tuple(torch.from_numpy(found[index]) for index in range(len(found)))

    return run


def _onnxruntime(module: nn.Module, example: Tensor, dtype: torch.dtype) -> Engine:
    import onnxruntime

    if dtype != torch.float32:
        raise ValueError("ONNX Runtime computes in float32 on a CPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tower.onnx"
        torch.onnx.export(module, (example,), path, dynamo=True, external_data=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: example.numpy()}
    return lambda: tuple(torch.from_numpy(found) for found in session.run(None, given))
