"""The short table of a run, made from its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from .case import Row

QUIET_NOTES = ("refused:", "skipped")  # notes of rows that are fine


def trouble(row: Row) -> bool:
    note = str(row.get("note") or "")
    return row.get("right") is False or bool(note and not note.startswith(QUIET_NOTES))


def wrong(rows: Iterable[Row]) -> list[str]:
    """The op and backend of each wrong result, without repeats."""
    names = [
        f"{row.get('op', '')} {row.get('contender', '')}".strip() or str(row.get("test", row.get("case")))
        for row in rows
        if row.get("right") is False
    ]
    return list(dict.fromkeys(names))


def lines(rows: list[Row], seconds: dict[str, float]) -> Iterator[str]:
    """The table: one stage after the other, then the rows with trouble."""
    by_stage: dict[str, list[Row]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], []).append(row)
    for stage, mine in by_stage.items():
        bad = sum(map(trouble, mine))
        yield f"-- {stage}: {len(mine)} rows, {bad} in trouble, {seconds.get(stage, 0.0):.0f} s"
        yield from SHOWN.get(stage, _counts)(mine)
    bad_rows = [row for row in rows if trouble(row)]
    if bad_rows:
        yield f"-- in trouble: {len(bad_rows)}"
        yield from (_line(row, "stage", "case", "precision", "direction") for row in bad_rows[:40])
    if names := wrong(rows):
        yield f"-- wrong: {', '.join(names)}"


def _line(row: Row, *first: str) -> str:
    names = (*first, "op", "variant", "batch", "contender")
    parts = [str(row[name]) for name in names if row.get(name) not in (None, "")]
    forms = {
        "ms": "{:.3f} ms",
        "busy_ms": "its kernels {:.3f} ms",
        "launching_ms": "launched in {:.3f} ms",
        "views_per_second": "{:.0f} views/s",
        "over_limit": "{:.2f} of the limit",
        "to_ours": "{:.2f} of ours",
        "over_bare": "{:.2f} of bare",
        "terabytes_per_s": "{:.2f} TB/s",
        "teraflop_per_s": "{:.0f} TFLOP/s",
        "host_us": "{:.1f} us of the host",
        "compile_s": "compiled in {:.0f} s",
        "forward_ms": "forward {:.2f} ms",
        "backward_ms": "backward {:.2f} ms",
        "optimizer_ms": "optimizer {:.2f} ms",
    }
    parts += [form.format(row[name]) for name, form in forms.items() if isinstance(row.get(name), float)]
    return "  " + " | ".join([*parts, *([str(row["note"])[:140]] if row.get("note") else [])])


def _machine(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if "environment" in row:
            known = row["environment"]
            names = ("device", "sms", "torch", "triton", "transformers", "python", "nvidia_smi", "cuda_library")
            yield "  " + ", ".join(f"{name} {known[name]}" for name in names if known.get(name))
        else:
            yield _line(row, "precision")


def _counts(rows: list[Row]) -> Iterator[str]:
    def kind(row: Row) -> str:
        if trouble(row):
            return "in trouble"
        return str(row.get("outcome") or ("refused" if row.get("note") else "right"))

    yield "  " + ", ".join(f"{number} {name}" for name, number in Counter(map(kind, rows)).items())


def _every(rows: list[Row]) -> Iterator[str]:
    yield from (_line(row) for row in rows if not trouble(row))


def _best(rows: list[Row], *group: str) -> Iterator[str]:
    """The fastest contender of each kind in each group."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if "ms" in row and not trouble(row):
            best = groups.setdefault(tuple(row.get(name) for name in group), {})
            name = row.get("kind") or str(row["contender"]).split(" ")[0]
            if name not in best or row["ms"] < best[name]["ms"]:
                best[name] = row
    for key, best in groups.items():
        cells = [f"{row['contender']} {row['ms']:.4f} ms" for row in best.values()]
        yield f"  {' '.join(str(part) for part in key)}: {', '.join(cells)}"


SHOWN: dict[str, Any] = {
    "machine": _machine,
    "headline": _every,
    "products": lambda rows: _best(rows, "op", "m"),
    "attention": lambda rows: _best(rows, "tokens", "direction"),
}
