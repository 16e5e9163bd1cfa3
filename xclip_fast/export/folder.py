"""A folder of exported graphs: written whole, and only if every graph computes what the model does."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..files import staged
from .formats import FORMATS, Format, quiet
from .graphs import Graph, graphs_of, trace

if TYPE_CHECKING:
    from ..model import XCLIP

SUMMARY = "export.json"
# The largest difference from the model in float32 that is accepted, relative to the largest value of an output.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHECKED = ((1, 1), (3, 5))  # videos and labels that every graph is run with after it is written
NAMES = ("video", "text", "similarity")


class ExportError(ValueError):
    """A graph that cannot be written, or that does not compute what the model does. Nothing was written."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """One written graph."""

    file: str
    bytes: int  # of all of its files
    difference: float  # the largest from the model in float32, relative to the largest value


def export_model(
    model: XCLIP,
    folder: str | os.PathLike[str],
    format: str = "onnx",
    *,
    dtype: torch.dtype = torch.float32,
    frames: int | None = None,
    overwrite: bool = False,
) -> list[Exported]:
    """Write a model as graphs: the video tower, the text tower and the similarity.

    ``video`` takes uint8 (B, T, S, S, 3), as decoded, and gives the video features (B, E) and patch features (B, N, E).
    ``text`` takes int64 tokens (K, L) from ``xclip_fast.tokenize`` and gives (K, E). ``similarity`` takes all three and
    gives logits (B, K). B, K and L may vary. ``export.json`` holds names, types and shapes, and the model's config.

    Each graph is opened again in its engine and compared with the model in float32, with one video and label and with
    several. All files appear in one step, and only if all graphs pass.

    Args:
        model: any X-CLIP. It stays as it is; a copy on the CPU is traced.
        folder: made if it does not exist; its other files stay.
        format: a name in ``FORMATS``: "onnx", "openvino", "tensorrt" or "torch".
        dtype: of the weights and, except for OpenVINO, of the computation.
        frames: T; by default the config's.
        overwrite: replace an export that is there.

    Returns:
        what was written, a graph each.

    Raises:
        ExportError: if a graph differs from the model by more than ``TOLERANCE``, or holds NaN.
        FileExistsError: if ``folder`` holds an export and ``overwrite`` is not set.
        ImportError: if a package is missing; with the command that installs it.
        ValueError: if the format, the dtype, the frames or the model cannot be exported.
    """
    if format not in FORMATS:
        raise ValueError(f"no format is called {format!r}; choose one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    if dtype not in chosen.dtypes:
        known = ", ".join(map(_name, chosen.dtypes))
        raise ValueError(f"{format} in {_name(dtype)} is not supported; choose one of {known}")
    frames = model.config.num_frames if frames is None else frames
    if frames < 1:
        raise ValueError(f"frames {frames} must be at least 1")
    if reason := chosen.missing():
        raise ImportError(f"{format}: {reason}")
    if reason := chosen.refuse():
        raise ValueError(reason)
    folder = Path(folder)
    if (folder / SUMMARY).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} holds an export; choose another folder, or replace it with --overwrite (overwrite=True in "
            "Python)"
        )
    precise = copy.deepcopy(model).to("cpu", torch.float32).eval()
    # OpenVINO stores float16 weights of a float32 graph, and chooses the precision of its computation
    stored = precise if dtype == torch.float32 or format == "openvino" else copy.deepcopy(precise).to(dtype)
    wanted = {graph.name: graph for graph in graphs_of(precise, frames)}
    owned = {file.format(name) for each in FORMATS.values() for file in each.files for name in NAMES} | {SUMMARY}
    graphs = graphs_of(stored, frames)
    with staged(folder, owned, last=SUMMARY) as part, quiet():
        found = []
        for graph in graphs:
            path = part / chosen.files[0].format(graph.name)
            chosen.write(graph, trace(graph), path, dtype)
            difference = _difference(chosen, path, graph, wanted[graph.name])
            if not difference <= TOLERANCE[dtype]:
                raise ExportError(
                    f"{path.name}: differs from the model by {difference:.1e} of the largest value in "
                    f"{chosen.engine}; at most {TOLERANCE[dtype]:.0e} is accepted. Nothing was written"
                )
            files = [part / file.format(graph.name) for file in chosen.files]
            found.append(Exported(path.name, sum(file.stat().st_size for file in files if file.exists()), difference))
        summary = _summary(model, chosen, dtype, frames, graphs, found)
        (part / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return found


def _difference(chosen: Format, path: Path, graph: Graph, wanted: Graph) -> float:
    """The largest difference of a written graph's outputs from the model's, relative to the largest value."""
    run = chosen.open(path, graph, None, torch.float32)
    differences: list[Tensor] = []
    for sizes in CHECKED:
        with torch.no_grad():
            expected = wanted.module(*wanted.example(*sizes))
        for name, mine, theirs in zip(graph.outputs, run(graph.example(*sizes)), expected, strict=True):
            if mine.shape != theirs.shape:
                raise ExportError(
                    f"{path.name}: {name} has the shape {tuple(mine.shape)} in {chosen.engine}; {tuple(theirs.shape)} "
                    "wanted. Nothing was written"
                )
            exact = theirs.double()
            differences.append((mine.double() - exact).abs().max() / exact.abs().max())
    return torch.stack(differences).max().item()  # NaN if one is


def _summary(
    model: XCLIP, chosen: Format, dtype: torch.dtype, frames: int, graphs: Sequence[Graph], found: Sequence[Exported]
) -> dict[str, Any]:
    """The facts that a program needs to run the graphs, as plain values for JSON."""
    described = {}
    for graph, written in zip(graphs, found, strict=True):
        inputs = {
            name: {
                "dtype": _name(example.dtype),
                "shape": [axes.get(axis, size) for axis, size in enumerate(example.shape)],
            }
            for name, example, axes in zip(graph.inputs, graph.example(2, 3), graph.axes, strict=True)
        }
        described[written.file] = {
            "inputs": inputs,
            "outputs": list(graph.outputs),
            "difference": written.difference,
        }
    return {
        "xclip_fast_version": __version__,
        "format": chosen.name,
        "dtype": _name(dtype),
        "frames": frames,
        "label_tokens": model.config.label_tokens,  # the most of one label, as tokenize's second argument
        "graphs": described,
        "model": model.config.to_dict(),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
