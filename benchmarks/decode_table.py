"""The table that decode.py prints. The JSON has the rest."""

from __future__ import annotations

import sys
from typing import Any

from measuring import ratio_text
from rich.console import Console
from rich.table import Table


def print_table(report: dict[str, Any]) -> None:
    table = Table(title=report["environment"]["device"])
    table.add_column("pictures")
    table.add_column("keyframe every")
    table.add_column("frames", justify="right")
    table.add_column("contender", no_wrap=True)
    for column in ("clips/s", "frames/s", "x full decode", "x by CPU time", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    notes: dict[str, None] = {}
    before = None
    for row in report["rows"]:
        cell = row["work"], row["pictures"], row["keyframe_every"], row["frames"]
        if before not in (None, cell):
            table.add_section()
        before = cell
        start = [row["pictures"], str(row["keyframe_every"]), str(row["frames"]), row["contender"]]
        if "clips_per_second" not in row:
            table.add_row(*start, row["note"].split(":")[0])
            notes.setdefault(f"{row['contender']}: {row['note']}", None)
            continue
        texts = [ratio_text(row.get(key, {})) for key in ("ratio_to_full", "cpu_ratio_to_full")]
        speeds = (f"{row[key]:.3g}" for key in ("clips_per_second", "frames_per_second"))
        table.add_row(*start, *speeds, *texts, str(row["n"]))
        if row["note"]:
            notes.setdefault(f"{row['contender']}: {row['note']}", None)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for clip in report["clips"]:
        print(
            f"{clip['pictures']}, keyframe every {clip['keyframe_every']}: {clip['keyframes']} keyframes, "
            f"{clip['referenced']} of {clip['frames']} frames are referred to, {clip['kbit_per_s']:.0f} kbit/s"
        )
    for note in notes:
        print(note)
