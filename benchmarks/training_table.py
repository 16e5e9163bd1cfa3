"""The table that training.py prints. The JSON has the rest."""

from __future__ import annotations

from typing import Any

from contenders import COMPILED, EAGER
from measuring import ratio_text, shown
from rich.console import Console
from rich.table import Table


def print_table(report: dict[str, Any]) -> None:
    environment = report["environment"]
    peers = [name for name in (EAGER, COMPILED) if any(row["contender"] == name for row in report["rows"])]
    table = Table(title=f"{environment['device']}, training step, {report['labels']['count']} labels")
    for column in ("variant", "precision", "trained", "recompute", "model"):
        table.add_column(column, no_wrap=True)
    columns = ("batch", "clips/s", *(f"x {peer}" for peer in peers))
    for column in (*columns, "forward", "backward", "optimizer", "of GEMM", "state", "peak", "n"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        recompute = "yes" if row["recompute"] else "no"
        cells = [row["variant"], row["precision"], row["towers"], recompute, row["contender"], str(row["batch"])]
        if "median_s" not in row:
            table.add_row(*cells, row["note"].split(":")[0])
            continue
        cells.append(f"{row['clips_per_second']:.3g}")
        cells += [ratio_text(row.get("ratios", {}).get(peer, {})) for peer in peers]
        cells += [f"{1e3 * seconds:.3g} ms" for seconds in row["parts_s"].values()]
        cells += [shown(row.get("share_of_gemm"), "{:.0%}")]
        cells += [shown(row[name], "{:.2f} GB", 1e-9) for name in ("state_bytes", "peak_bytes")]
        table.add_row(*cells, str(row["n"]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    console.print(table)
    for row in report["rows"]:
        if row["note"]:
            console.print(f"{row['variant']} {row['contender']}: {row['note']}", markup=False, highlight=False)
    for row in report["loading"]:
        if "note" in row:
            console.print(f"data: {row['note']}", markup=False, highlight=False)
            continue
        console.print(
            f"data: {1e3 * row['seconds']:.3g} ms for a batch of {row['batch']} from mp4 files ({row['variant']}, "
            f"{row['decoder']}), beside the step above"
        )
    for row in report["table7"]:
        total = shown(row.get("total_bytes"), "{:.2f} GB", 1e-9) or row["note"] or "unknown"
        console.print(
            f"Table 7, trained: {row['towers']}: {total} with {row['contender']}; the paper says {row['paper_gb']} GB",
            markup=False,
        )
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in report["gemm_flop_per_s"].items())
    console.print(f"GEMM rate in this run, GFLOP/s: {rates}")
