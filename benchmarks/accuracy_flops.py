"""Accuracy against FLOPs and throughput, as the paper's Figure 1, beside the paper's own points.

    python benchmarks/accuracy_flops.py           # the paper's points alone
    python benchmarks/accuracy_flops.py runs/ throughput.json --plot out.png

The arguments are, in any order, results of `xclip-fast evaluate --out` (summary.json, its folder, or a folder of such
folders) and of `benchmarks/throughput.py --json`. Each row names the source of its figures. Accuracies on other numbers
of classes than 400 are marked, because they cannot be compared with the paper's. Prints Markdown.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import arguments
from arguments import fail

from xclip_fast.config import PAPER_TABLE1, VARIANTS

PAPER_VIEWS = (4, 3)
PAPER_CLASSES = 400
PAPER, MEASURED, MIXED = "paper", "measured here", "accuracy: paper, views/s: here"
OURS = "xclip-fast"  # of throughput.py
PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
COLUMNS = ("origin", "model", "frames", "views", "top-1 %", "top-5 %", "data", "GFLOPs/view", "GFLOPs", "views/s", "on")


@dataclasses.dataclass(frozen=True)
class Point:
    """A model and its test. Accuracies are in %. GFLOPs are 10^9 multiply-adds, as in the paper's Table 1."""

    origin: str  # PAPER, MEASURED or MIXED
    model: str
    frames: int
    views: tuple[int, int]  # clips x crops
    top1: float
    top5: float | None
    data: str
    gflops_per_view: float
    views_per_second: float | None
    speed: str  # device and precision of the timing
    comparable: bool = True
    decoded: bool = False  # the speed includes decoding

    @property
    def gflops(self) -> float:
        """Of all views of a video."""
        return self.gflops_per_view * self.views[0] * self.views[1]


def paper_points() -> list[Point]:
    """Table 1's X-CLIP rows: Kinetics-400, 4 x 3 views."""
    points = []
    for name, row in PAPER_TABLE1.items():
        accuracies, cost = (row.top1, row.top5, "Kinetics-400"), (row.gflops, row.views_per_second, "one V100 (paper)")
        points.append(Point(PAPER, name, VARIANTS[name].num_frames, PAPER_VIEWS, *accuracies, *cost))
    return points


def read(paths: Iterable[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[dict[str, Any]]]:
    """The evaluations with their paths, and the rows of the throughput runs with their device."""
    evaluations, speeds = [], []
    for path in paths:
        files = sorted(path.rglob("summary.json")) if path.is_dir() else [path]
        if not files:
            fail(f"{path}: no summary.json in this folder; `xclip-fast evaluate ... --out FOLDER` writes one")
        for file in files:
            content = arguments.read_json(file)
            if isinstance(content, dict) and content.get("kind") == "xclip_fast evaluation":
                evaluations.append((file, content))
            elif isinstance(content, dict) and {"rows", "environment"} <= content.keys():
                speeds += [row | {"device": content["environment"]["device"]} for row in content["rows"]]
            else:
                fail(f"{file}: is neither the summary of an evaluation nor a result of throughput.py")
    return evaluations, speeds


def fastest(speeds: Sequence[dict[str, Any]], variant: str | None, dtype: str | None = None) -> dict[str, Any] | None:
    """Our fastest run with cached labels; in this precision if one is given."""
    wanted = {"contender": OURS, "work": "cached", "variant": variant}
    if dtype is not None:
        wanted["precision"] = PRECISION.get(dtype, dtype)
    rows = [row for row in speeds if row.get("views_per_second") and wanted.items() <= row.items()]
    return max(rows, key=lambda row: row["views_per_second"], default=None)


def measured_points(
    evaluations: Iterable[tuple[Path, dict[str, Any]]], speeds: Sequence[dict[str, Any]]
) -> list[Point]:
    points = []
    for path, found in evaluations:
        if found["top1"] is None:
            print(f"{path}: left out: no video with a label", file=sys.stderr)
            continue
        model = found["model"]
        run = fastest(speeds, model["variant"], model["dtype"])
        here = f"{found['environment']['device']}, {PRECISION.get(model['dtype'], model['dtype'])}, decoding included"
        missing = found["videos"] - found["predicted"]
        points.append(
            Point(
                MEASURED,
                model["variant"] or Path(model.get("checkpoint") or path.parent).name,
                found["frames"],
                (found["clips"], found["crops"]),
                100 * found["top1"],
                None if found["top5"] is None or found["top5_is_top"] < 5 else 100 * found["top5"],
                f"{found['labels']} classes, {found['counted']} videos" + (f", {missing} failed" if missing else ""),
                model["gflops_per_view"],
                run["views_per_second"] if run else found["views_per_second"],
                f"{run['device']}, {run['precision']}" if run else here,
                comparable=found["labels"] == PAPER_CLASSES,
                decoded=run is None,
            )
        )
    return points


def mixed_points(speeds: Sequence[dict[str, Any]], measured: Sequence[Point] = ()) -> list[Point]:
    """The paper's accuracy at the speed measured here, of variants whose accuracy was not measured."""
    done = {(point.model, point.views) for point in measured if point.comparable}
    points = []
    for point in paper_points():
        run = fastest(speeds, point.model)
        if run and (point.model, PAPER_VIEWS) not in done:
            here = {"views_per_second": run["views_per_second"], "speed": f"{run['device']}, {run['precision']}"}
            points.append(dataclasses.replace(point, origin=MIXED, **here))
    return points


def cells(point: Point) -> list[str]:
    return [
        point.origin,
        point.model,
        str(point.frames),
        f"{point.views[0]} x {point.views[1]}",
        f"{point.top1:.1f}" + ("" if point.comparable else " *"),
        "-" if point.top5 is None else f"{point.top5:.1f}",
        point.data,
        amount(point.gflops_per_view),
        amount(point.gflops),
        amount(point.views_per_second),
        point.speed,
    ]


def amount(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(points: Sequence[Point]) -> str:
    notes = ["GFLOPs are 10^9 multiply-adds, counted as in the paper's Table 1; the second column is of all views."]
    if not any(point.origin == MEASURED for point in points):
        notes.append("No accuracy was measured here: every accuracy is the paper's (Table 1, Kinetics-400).")
    if any(not point.comparable for point in points):
        notes.append(f"*: not on {PAPER_CLASSES} classes, so it cannot be compared with the paper's accuracies.")
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, points)]
    table = ["| " + " | ".join(map(escaped, line)) + " |" for line in lines]
    return "\n".join([*table, "", *map(escaped, notes)]) + "\n"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def plot(points: Sequence[Point], path: Path) -> None:
    """Top-1 against the GFLOPs of all views, and against views/s; both logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    styles = {  # marker, color, place of the names
        PAPER: ("o", "gray", (-6, -9)),  # below the curve, which rises in the first panel
        MEASURED: ("D", "#1f5fa8", (6, 4)),
        MIXED: ("^", "#c2571a", (-6, 4)),
    }
    costs = ("gflops", "GFLOPs of all views of a video"), ("views_per_second", "views per second")
    names: dict[Any, list[Any]] = {axes: [] for axes in panels}
    for axes, (cost, title) in zip(panels, costs, strict=True):
        for origin, (marker, color, place) in styles.items():
            # at the FLOPs a mixed point would be the paper's
            members = [
                p for p in points if p.origin == origin and getattr(p, cost) and (cost, origin) != ("gflops", MIXED)
            ]
            place = (6, -9) if (cost, origin) == ("gflops", PAPER) else place
            x, y = [getattr(point, cost) for point in members], [point.top1 for point in members]
            axes.plot(x, y, marker, color=color, label=origin)
            for point, *at in zip(members, x, y, strict=True):
                name = point.model + ("" if point.origin != MEASURED else " {}x{}".format(*point.views))
                name += "" if point.comparable else " *"
                name += ", with decoding" if point.decoded and cost == "views_per_second" else ""
                line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
                side = "left" if place[0] > 0 else "right"
                text = name.replace("$", r"\$")  # a dollar sign would begin a formula
                style = {"fontsize": 7.5, "color": color, "ha": side, "arrowprops": line}
                names[axes].append(axes.annotate(text, at, textcoords="offset points", xytext=place, **style))
        axes.set(xscale="log", xlabel=title)
        axes.margins(x=0.26, y=0.1)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"top-1 accuracy, % (*: not on {PAPER_CLASSES} classes)")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.draw_without_rendering()  # only then the places of the names are known
    for texts in names.values():
        keep_apart(texts)
    figure.savefig(path, dpi=150)


def keep_apart(texts: Sequence[Any]) -> list[Any]:
    """Moves names down until none covers another or a point. A line ties each to its point. Returns their boxes."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    corners = [text.axes.transData.transform(text.xy) - 4 for text in texts]  # of markers 8 pixels wide
    markers = [Bbox.from_bounds(*corner, 8, 8) for corner in corners]
    boxes: list[Any] = []
    for text in sorted(texts, key=lambda text: -Text.get_window_extent(text).y0):
        box = Text.get_window_extent(text)  # of the name alone, without its line
        while any(box.overlaps(other) for other in [*markers, *boxes]):
            across, up = text.xyann
            text.xyann = (across, up - 3)
            text.update_positions(text.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)
        boxes.append(box)
    return boxes


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="evaluations and throughput runs")
    parser.add_argument("--plot", type=arguments.output, help="draw here (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.plot:
        import matplotlib  # noqa: F401 -- if it is missing, nothing is computed
    evaluations, speeds = read(args.files)
    measured = measured_points(evaluations, speeds)
    points = [*paper_points(), *measured, *mixed_points(speeds, measured)]
    print(markdown(points), end="")
    if args.plot:
        plot(points, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
