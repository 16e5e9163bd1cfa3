"""Exported graphs beside the model, on a CPU: differences and times with 1 and 3 videos, 1 and 400 labels.

    python benchmarks/exported.py --json exported.json
    python benchmarks/exported.py --processor-time --seconds 300    # on a busy machine: what one thread computed

Each graph gets the inputs that the model gets, in turn with it. "ours over it" is the engine's time over the model's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arguments
import measuring
import torch

import xclip_fast
from xclip_fast.export import export_model
from xclip_fast.export.formats import ONNX, OPENVINO
from xclip_fast.export.graphs import graphs_of

FORMATS = (ONNX, OPENVINO)
SIZES = ((1, 1), (3, 400))  # videos, labels


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--variant", default="B/16-8f", choices=xclip_fast.VARIANTS)
    parser.add_argument("--seconds", type=float, default=120.0, help="to time within, conversion not counted")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, for a busy machine")
    parser.add_argument("--json", type=Path, help="write every raw timing here")
    args = parser.parse_args()
    if args.processor_time:
        torch.set_num_threads(1)
        measuring.clock = time.process_time
    torch.manual_seed(0)
    model = xclip_fast.XCLIP(args.variant).eval()
    report: dict[str, Any] = {"environment": measuring.environment("cpu"), "variant": args.variant, "rows": []}
    report["environment"]["clock"] = measuring.clock.__name__
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[tuple[str, int, int], dict[str, Callable[[], Any]]] = {}
        for form in FORMATS:
            begin, path = time.perf_counter(), Path(folder) / form.name
            written = export_model(model, path, form.name)
            size = sum(each.bytes for each in written) / 1e6
            print(f"{form.engine}: written and checked in {time.perf_counter() - begin:.0f} s, {size:.0f} MB")
            for graph in graphs_of(model, model.config.num_frames):
                run = form.open(path / form.files[0].format(graph.name), graph, torch.get_num_threads(), torch.float32)
                for sizes in SIZES:
                    inputs = graph.example(*sizes)
                    group = calls.setdefault((graph.name, *sizes), {"xclip-fast": ours(graph.module, inputs, model)})
                    group[form.engine] = lambda run=run, inputs=inputs: tuple(run(inputs))
        print(f"{'':11} videos labels  {'':13} {'ms':>9} {'ours over it':>22} {'difference':>11}")
        costs = {"video": 3, "text": 2, "similarity": 1}
        total = sum(costs[name] for name, *_ in calls)
        for (name, batch, labels), group in calls.items():
            with torch.inference_mode():
                results = measuring.measure(group, "cpu", args.seconds * costs[name] / total)
            report["rows"] += rows(name, batch, labels, results)
    if args.json:
        measuring.write_json(args.json, report)


def ours(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], model: xclip_fast.XCLIP) -> Callable[[], Any]:
    def call() -> Any:
        model.text.forget()  # labels seen before would not be encoded again
        return module(*inputs)

    return call


def rows(name: str, batch: int, labels: int, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found, mine = [], results["xclip-fast"]
    for contender, result in results.items():
        row: dict[str, Any] = {"graph": name, "videos": batch, "labels": labels, "contender": contender}
        if "note" in result:
            found.append(row | {"note": result["note"]})
            print(f"{name:11} {batch:6} {labels:6}  {contender:13} {result['note']}")
            continue
        row |= measuring.timings(result)
        ratio, difference = "", ""
        if contender != "xclip-fast":
            row["ratio"] = measuring.ratio(result["seconds"], mine["seconds"])
            row["difference"] = measuring.largest_error(result["output"], mine["output"])
            ratio, difference = measuring.ratio_text(row["ratio"]), f"{row['difference']:.1e}"
        print(
            f"{name:11} {batch:6} {labels:6}  {contender:13} {1e3 * row['median_s']:9.2f} {ratio:>22} {difference:>11}"
        )
        found.append(row)
    return found


if __name__ == "__main__":
    main()
