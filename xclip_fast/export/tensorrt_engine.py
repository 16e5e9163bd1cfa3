"""TensorRT engines, built from the ONNX file of a graph on the GPU that will run them. No GPU has run this yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .formats import Run
    from .graphs import Graph

# An engine is tuned for the second size of each axis and takes no more than the third, for which it reserves memory.
SIZES = {"batch": (1, 8, 64), "labels": (1, 400, 4096), "tokens": (3, 8, 77)}


def refusal() -> str | None:
    """Why no engine can be built here, or None."""
    if torch.cuda.is_available():
        return None
    return (
        "TensorRT builds an engine on the GPU that runs it, and torch.cuda.is_available() is False here. Export on "
        "that machine, or take --format onnx and build there with trtexec"
    )


def build(graph: Graph, onnx: Path, path: Path) -> None:
    """Build an engine from the ONNX file of a graph and write it. Its precision is the file's (strongly typed).

    Raises:
        ValueError: if TensorRT refuses the graph. The message has its reason.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from TensorRT 11 on
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise ValueError(f"TensorRT cannot read {onnx.name}: {reasons}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, example, axes in zip(graph.inputs, graph.example(2, 3), graph.axes, strict=True):
        shapes = [list(example.shape) for _ in range(3)]
        for axis, kind in axes.items():
            for shape, size in zip(shapes, SIZES[kind], strict=True):
                shape[axis] = min(size, graph.most[kind])
        profile.set_shape(name, *map(tuple, shapes))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)  # reads the weights beside the ONNX file
    if plan is None:
        raise ValueError(f"TensorRT built no engine of {graph.name}; its log on standard error says why")
    path.write_bytes(memoryview(plan))


def open_engine(path: Path, graph: Graph, threads: int | None, dtype: torch.dtype) -> Run:
    """A call that runs an engine on the current CUDA device."""
    import tensorrt as trt

    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ValueError(f"{path}: TensorRT cannot read it; it belongs to another version of it or another GPU")
    context = engine.create_execution_context()
    dtypes = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16}

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, given in zip(graph.inputs, inputs, strict=True):
            tensors[name] = given.cuda().contiguous()
            if not context.set_input_shape(name, tuple(given.shape)):
                raise ValueError(f"{path.name}: takes no {name} of shape {tuple(given.shape)}")
        for name in graph.outputs:
            shape, kind = tuple(context.get_tensor_shape(name)), dtypes[engine.get_tensor_dtype(name)]
            tensors[name] = torch.empty(shape, dtype=kind, device="cuda")
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"{path.name}: TensorRT did not run it; its log on standard error says why")
        stream.synchronize()
        return [tensors[name].cpu() for name in graph.outputs]

    return run
