"""Exported graphs beside the model, on a CPU: differences and times with 1 and 3 videos, 1 and 400 labels.

    python benchmarks/exported.py --json exported.json
    python benchmarks/exported.py --processor-time --seconds 300    # on a busy machine: what one thread computed

Each graph gets the inputs that the model gets, in turn with it. "ours over it" is the engine's time over the model's.
"""

from __future__ import annotations

import math
import sys
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


def main(argv: list[str] | None = None) -> None:
    parser = arguments.parser(__doc__, json_help="write every raw timing here")
    parser.add_argument(
        "--variant", default="B/16-8f", metavar="NAME", choices=xclip_fast.VARIANTS, help="a shape (default B/16-8f)"
    )
    parser.add_argument(
        "--seconds", type=arguments.positive, default=120.0, help="to time within, conversion not counted (default 120)"
    )
    parser.add_argument("--processor-time", action="store_true", help="of one thread, for a busy machine")
    args = parser.parse_args(argv)
    if args.processor_time:
        torch.set_num_threads(1)
        measuring.clock = time.process_time
    for form in FORMATS:  # before the first export, which takes a minute
        if reason := form.missing():
            arguments.fail(f"{form.engine}: {reason}", 1)
    torch.manual_seed(0)
    model = xclip_fast.XCLIP(args.variant).eval()
    report: dict[str, Any] = {"environment": measuring.environment("cpu"), "variant": args.variant, "rows": []}
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
            rows = measuring.rows(results, {"graph": name, "videos": batch, "labels": labels}, math.inf)
            report["rows"] += rows
            for row in rows:
                if "median_s" in row:
                    ratio, difference = measuring.ratio_text(row.get("ratio")), row.get("largest_error")
                    told = f"{1e3 * row['median_s']:9.2f} {ratio:>22} {measuring.shown(difference, '{:.1e}'):>11}"
                print(f"{name:11} {batch:6} {labels:6}  {row['contender']:13} {row['note'] or told}")
            measuring.write_json(args.json, report)  # a run that is stopped keeps what it measured


def ours(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], model: xclip_fast.XCLIP) -> Callable[[], Any]:
    def call() -> Any:
        model.text.forget()  # labels seen before would not be encoded again
        return module(*inputs)

    return call


if __name__ == "__main__":
    sys.exit(main())
