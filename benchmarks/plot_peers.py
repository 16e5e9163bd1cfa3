"""Draws the speed of each contender over Hugging Face's, from JSON files of throughput.py.

    python benchmarks/plot_peers.py benchmarks/results/cpu-xeon-amx-*-tower.json --out docs/cpu-peers.svg

One group of bars for each variant and precision. 1.0 is Hugging Face's eager model in the same run. Needs matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import arguments

ORDER = ("Hugging Face", "HF compiled", "ONNX Runtime", "OpenVINO", "xclip-fast")
COLORS = dict(zip(ORDER, ("#9aa5b1", "#7b8794", "#52606d", "#3e4c59", "#d64545"), strict=True))


def speeds(reports: list[dict[str, Any]], work: str) -> dict[str, dict[str, float]]:
    """Views per second over Hugging Face's eager model, by group and contender; the last report of a group counts."""
    found: dict[str, dict[str, float]] = {}
    for report in reports:
        groups: dict[str, dict[str, float]] = {}
        for row in report["rows"]:
            if row.get("work") == work and row.get("batch") == 1 and row.get("views_per_second"):
                group = groups.setdefault(f"{row['variant']} {row['precision']}", {})
                group[row["contender"]] = row["views_per_second"]
        for name, group in groups.items():
            if ORDER[0] in group:
                found[name] = {each: speed / group[ORDER[0]] for each, speed in group.items()}
    return found


def draw(groups: dict[str, dict[str, float]], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "xclip-fast", "font.family": "sans-serif"})
    contenders = [name for name in ORDER if any(name in group for group in groups.values())]
    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    width = 0.8 / len(contenders)
    for index, name in enumerate(contenders):
        places = [place + (index - (len(contenders) - 1) / 2) * width for place in range(len(groups))]
        heights = [group.get(name, 0.0) for group in groups.values()]
        bars = axes.bar(places, heights, width, label=name, color=COLORS[name])
        axes.bar_label(bars, [f"{height:.2f}" if height else "" for height in heights], fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("speed, Hugging Face = 1")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, ncols=len(contenders), loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of throughput.py")
    parser.add_argument("--work", default="tower", help="tower, cached, files or encoded (default tower)")
    parser.add_argument("--out", type=arguments.output, required=True, help="SVG or PNG")
    args = parser.parse_args(argv)
    reports = [arguments.read_json(path) for path in args.results]
    if not all(isinstance(report, dict) and {"rows", "environment"} <= report.keys() for report in reports):
        parser.error("a file is no result of throughput.py")
    machines = {(report["environment"]["device"], report["environment"]["threads"]) for report in reports}
    if len(machines) > 1:
        named = ", ".join(f"{device}, {threads} threads" for device, threads in sorted(machines))
        parser.error(f"the files are of several machines: {named}")
    groups = speeds(reports, args.work)
    if not groups:
        parser.error(f"no row of work {args.work!r} together with {ORDER[0]} in {', '.join(map(str, args.results))}")
    [(device, threads)] = machines
    title = f"{device}, {threads} thread{'s' * (threads > 1)}, one video, {args.work}"
    draw(groups, title, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
