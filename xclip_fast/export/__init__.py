"""A model as graphs that other engines run: ONNX, OpenVINO, TensorRT and torch.export."""

from .folder import ExportError, export_model

__all__ = ["ExportError", "export_model"]
