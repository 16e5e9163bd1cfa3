"""The table that throughput.py prints. The JSON has the rest."""

from __future__ import annotations

import itertools
from typing import Any

from contenders import GRAPHED, OURS
from measuring import ratio, ratio_text, shown

BUSY = 0.25  # load average per core before the run; above it, other programs disturb the run
NOT_RUN = "not run: a forward would take longer than --seconds leaves (the JSON holds the estimates)"
CELL = ("variant", "precision", "batch", "work")


def print_table(report: dict[str, Any], works: dict[str, str]) -> None:
    """Prints a group of lines for each cell, at most 79 columns wide. ``works``: from a kind of work to its title."""
    environment, rows = report["environment"], report["rows"]
    threads = environment["threads"]
    print(f"{environment['device']}, {threads} thread{'s' * (threads > 1)}, {report['labels']['count']} labels")
    notes: dict[str, None] = {}
    empty = 0  # cells in which nothing was measured
    for key, group in itertools.groupby(rows, key=lambda row: [row[name] for name in CELL]):
        variant, precision, batch, work = key
        own = list(group)
        if all(row["note"].startswith("not run") for row in own):
            empty += 1
            continue
        print(f"\n{variant} {precision}, {'1 video' if batch == 1 else f'{batch} videos'}, {works[work]}")
        print(f"  {'':16} {'views/s':>8} {'x paper':>8}  {'speed of ours over it':24} {'of GEMM':>7} {'n':>4}")
        for row in own:
            if row["note"]:
                notes.setdefault(NOT_RUN if row["note"].startswith("not run") else row["note"], None)
                print(f"  {row['contender']:16} {row['note'].partition(':')[0]:>8}")
                continue
            paper, share = shown(row["ratio_to_paper"], "{:.3g}"), shown(row.get("share_of_own_gemms"), "{:.0%}")
            figures = f"{row['views_per_second']:8.3g} {paper:>8}  {speed_over(row, own):24} {share:>7} {row['n']:4}"
            print(f"  {row['contender']:16} {figures}")
    print()
    cores, load = environment["cores"], (environment["load_average"] or [0.0])[0]
    if load > BUSY * cores:
        print(f"Busy machine: the load average before this run was {load:.1f} on {cores} cores.")
        print("Times are longer than on an idle machine, and ratios vary. Run it again alone.")
    for note in notes:
        print(note)
    if empty:
        kinds = f"{empty} kinds of work were" if empty > 1 else "1 kind of work was"
        print(f"{kinds} {NOT_RUN}. Give a larger --seconds")


def speed_over(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """The ratio in a row: how many times faster ours is than a peer, or a variant of ours than its peer."""
    if row["contender"] == OURS:
        return ""
    if row["contender"] != GRAPHED:
        return ratio_text(row.get("ratio")) or "no ratio of one call"
    peers = (peer for peer in group if peer["contender"] not in (OURS, GRAPHED) and not peer["note"])
    return next((f"{ratio_text(ratio(peer['seconds'], row['seconds']))} {peer['contender']}" for peer in peers), "")
