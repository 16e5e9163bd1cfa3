"""The formats a graph is written in, as data: how it is written, and how its file is opened and run again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tensorrt_engine
from .graphs import Graph

Program = torch.export.ExportedProgram
Run = Callable[[Sequence[Tensor]], list[Tensor]]  # inputs in the graph's order to its outputs, on the CPU
_HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    ``write(graph, program, path, dtype)`` writes the traced graph. ``open(path, graph, threads, dtype)`` returns a call
    that runs the file; the engine computes in ``dtype`` if it can choose, with ``threads`` threads (None: its default).
    """

    name: str
    engine: str  # that runs it
    files: tuple[str, ...]  # of one graph; {} is the graph's name. The first is the one to open
    packages: tuple[str, ...]  # by their name on PyPI
    dtypes: tuple[torch.dtype, ...]
    write: Callable[[Graph, Program, Path, torch.dtype], None]
    open: Callable[[Path, Graph, int | None, torch.dtype], Run]
    refuse: Callable[[], str | None] = lambda: None  # why it cannot be written on this machine

    def missing(self) -> str | None:
        """What has to be installed for this format, or None."""
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        command = f"pip install {' '.join(absent)}, or pip install 'xclip-fast[{self.name}]'"
        return f"not installed: {command}" if absent else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the tracers' warnings and log lines, which are about optional packages and their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_torch(graph: Graph, program: Program, path: Path, dtype: torch.dtype) -> None:
    torch.export.save(program, path)


def _open_torch(path: Path, graph: Graph, threads: int | None, dtype: torch.dtype) -> Run:
    module = torch.export.load(path).module()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*inputs))

    return run


def _write_onnx(graph: Graph, program: Program, path: Path, dtype: torch.dtype) -> None:
    torch.onnx.export(
        program,
        (),
        path,
        dynamo=True,
        external_data=True,  # a file of more than 2 GB cannot hold its weights
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        dynamic_shapes=graph.axes,
        verbose=False,
    )


def _open_onnx(path: Path, graph: Graph, threads: int | None, dtype: torch.dtype) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = {name: each.numpy() for name, each in zip(graph.inputs, inputs, strict=True)}
        return [torch.from_numpy(found) for found in session.run(list(graph.outputs), given)]

    return run


def _write_openvino(graph: Graph, program: Program, path: Path, dtype: torch.dtype) -> None:
    import openvino

    model = openvino.convert_model(program)
    for ports, names in ((model.inputs, graph.inputs), (model.outputs, graph.outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=dtype == torch.float16)


@functools.cache
def _openvino_core() -> Any:
    """The one ``openvino.Core`` of this process.

    OpenVINO 2026's CPU plugin gives the thread that makes a core its own stack for signals, and puts the former one
    back when the core goes. Two cores that go in the order in which they came leave a stack that is unmapped: the next
    signal with a handler ends the process.
    """
    import openvino

    return openvino.Core()


def _open_openvino(path: Path, graph: Graph, threads: int | None, dtype: torch.dtype) -> Run:
    core = _openvino_core()
    half = {torch.bfloat16: "BF16", torch.float16: "FP16"}.get(dtype)
    native = half in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": str(half).lower() if native else "f32",
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(path, "CPU", settings).create_infer_request()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = [each.numpy() for each in inputs]
        found: Any = request.infer(given, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(found[index]) for index in range(len(found))]

    return run


def _write_tensorrt(graph: Graph, program: Program, path: Path, dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # after a kill, the next export removes all of it
        onnx = Path(folder) / ONNX.files[0].format(graph.name)
        ONNX.write(graph, program, onnx, dtype)
        tensorrt_engine.build(graph, onnx, path)


TORCH = Format("torch", "PyTorch", ("{}.pt2",), (), (torch.float32, *_HALF), _write_torch, _open_torch)
ONNX = Format(
    "onnx",
    "ONNX Runtime",
    ("{}.onnx", "{}.onnx.data"),
    ("onnx", "onnxscript", "onnxruntime"),
    (torch.float32, torch.float16),  # ONNX Runtime has no bfloat16 on a CPU to check a graph with
    _write_onnx,
    _open_onnx,
)
OPENVINO = Format(
    "openvino",
    "OpenVINO",
    ("{}.xml", "{}.bin"),
    ("openvino",),
    (torch.float32, torch.float16),  # of the stored weights; the device chooses its own precision
    _write_openvino,
    _open_openvino,
)
TENSORRT = Format(
    "tensorrt",
    "TensorRT",
    ("{}.plan",),
    ("tensorrt", "onnx", "onnxscript"),
    (torch.float32, *_HALF),
    _write_tensorrt,
    tensorrt_engine.open_engine,
    tensorrt_engine.refusal,
)
FORMATS = {each.name: each for each in (ONNX, OPENVINO, TENSORRT, TORCH)}
