"""Inference engines that a CPU user would take instead of PyTorch, each given the same PyTorch module."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from xclip_fast.export.formats import ONNX, OPENVINO, quiet
from xclip_fast.export.graphs import Graph, trace

FORMATS = {each.engine: each for each in (OPENVINO, ONNX)}
Engine = Callable[[], tuple[Tensor, ...]]


def missing(name: str) -> str | None:
    """How to install what an engine needs, or None."""
    return FORMATS[name].missing()


def build(name: str, module: nn.Module, example: Tensor, dtype: torch.dtype) -> Engine:
    """A call that runs ``module`` on ``example`` in an engine with as many threads as torch has.

    Args:
        module: in float32, without gradients; it returns a tuple of tensors.
        example: float32. Its shape is fixed in the graph.
        dtype: to compute in. OpenVINO obeys it where the CPU has its instructions; ONNX Runtime has float32 only.

    Raises:
        ValueError: if the engine does not compute in ``dtype`` on a CPU.
    """
    chosen = FORMATS[name]
    if chosen is ONNX and dtype != torch.float32:
        raise ValueError("ONNX Runtime computes in float32 on a CPU")
    with torch.no_grad():
        outputs = tuple(f"output{index}" for index in range(len(module(example))))
    graph = Graph("tower", module, ("video",), outputs, ({},), lambda batch, labels: (example,))
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / chosen.files[0].format(graph.name)
        chosen.write(graph, trace(graph), path, torch.float32)
        run = chosen.open(path, graph, torch.get_num_threads(), dtype)
    return lambda: tuple(run((example,)))
