"""The log of a training run: JSON lines, TensorBoard, a progress bar or lines on the terminal, a report at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..console import Bar
from ..evaluate.result import percent
from ..files import parse_json, write_text
from .config import LogConfig, TrainConfig, to_yaml

log = logging.getLogger("xclip_fast")

FILE = "log.jsonl"


class Log:
    """Shows and stores records: plain numbers with a ``kind`` (``train`` or ``validation``) and a ``step``.

    ``silent``: it does nothing, as in all processes but the first.
    """

    def __init__(self, folder: Path, config: LogConfig, steps: int, *, silent: bool = False) -> None:
        self.folder, self.steps, self.silent = folder, steps, silent
        self.file: Any = None
        self.board: Any = None
        self.bar = Bar(steps, name="step", text=True, hidden=silent or not config.progress)
        if silent:
            return
        self.file = (folder / FILE).open("a", encoding="utf-8")
        if config.tensorboard is not False:
            self.board = _tensorboard(folder / "tensorboard", wanted=config.tensorboard is True)
        self.bar.__enter__()

    def write(self, record: Mapping[str, Any]) -> None:
        if self.silent:
            return
        record = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        if self.board:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.board.add_scalar(f"{record['kind']}/{key}", value, record["step"])
        if not self.bar:
            self.say(f"step {record['step']}/{self.steps}  {_sentence(record)}")
        elif record["kind"] == "train":
            self.bar.update(record["step"], self.steps, _sentence(record, short=True))
        else:
            self.say(_sentence(record))

    def say(self, text: str) -> None:
        """Prints a line for people on standard error."""
        if self.silent:
            return
        with self.bar.aside():
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.__exit__()
        if self.board:
            self.board.close()
        if self.file:
            self.file.close()


def cut(folder: Path, step: int) -> None:
    """Drops the records after ``step``: a resumed run writes them again."""
    path = folder / FILE
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in records(folder) if record["step"] <= step]
    write_text(path, "".join(kept))


def records(folder: Path) -> list[dict[str, Any]]:
    """All records so far, without damaged lines, such as a last one that a kill cut short."""
    found = []
    for line in (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append(record)
    return found


def memory(device: torch.device) -> int:
    """The peak memory in bytes: allocated by torch on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def report(folder: Path, config: TrainConfig, about: Mapping[str, Any]) -> Path:
    """Writes ``report.md`` and returns its path. If matplotlib is installed, ``curves.png`` is written beside it."""
    found = records(folder)
    steps = [record for record in found if record["kind"] == "train"]
    validations = [record for record in found if record["kind"] == "validation"]
    lines = [f"# Training run {folder.name}", "", time.strftime("%d %B %Y, %H:%M"), ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in about.items())]
    if steps:
        rates = sorted(record["clips_per_second"] for record in steps)
        waits = [record["data_wait"] for record in steps]
        lines += [
            f"| loss, first and last | {steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f} |",
            f"| clips/s, median | {rates[len(rates) // 2]:.1f} |",
            f"| share of time waiting for data | {100 * sum(waits) / len(waits):.0f} % |",
            f"| peak memory | {max(record['memory'] for record in steps) / 2**30:.2f} GiB |",
        ]
    lines.append("")
    if validations:
        best = max(validations, key=lambda record: rank(record, config.checkpoint.metric))
        lines += [
            "## Validation",
            "",
            "| epoch | step | top-1 | top-5 | loss | videos | unreadable | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {record['epoch']} | {record['step']} | {percent(record['top1'])} | {percent(record['top5'])} "
            f"| {_loss(record)} | {record['predicted']} | {record['failed']} | {'best ' * (record is best)}|"
            for record in validations
        ]
        lines.append("")
    mixing = config.mixing
    batches = "training batches" + ", mixed" * (mixing.probability * (mixing.mixup + mixing.cutmix) > 0)
    if _draw(folder / "curves.png", steps, validations, batches):
        lines += ["![Loss, learning rate, accuracy and speed by step](curves.png)", ""]
    lines += ["## Configuration", "", "```yaml", to_yaml(config).rstrip(), "```", ""]
    path = folder / "report.md"
    write_text(path, "\n".join(lines))
    return path


def _draw(path: Path, steps: list[dict[str, Any]], validations: list[dict[str, Any]], batches: str) -> bool:
    if not steps:
        return False
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no curves: matplotlib is not installed (pip install 'xclip-fast[plot]')")
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    x = [record["step"] for record in steps]
    for panel, (key, name) in zip(
        panels,
        (("loss", "loss"), ("lr", "learning rate"), ("top1", "top-1, %"), ("clips_per_second", "clips/s")),
        strict=True,
    ):
        if key == "top1":
            panel.plot(x, [100 * record["correct"] for record in steps], color="0.7", label=batches)
            if validations:
                y = [100 * (record["top1"] or 0.0) for record in validations]
                panel.plot([record["step"] for record in validations], y, "o-", label="validation")
            panel.legend(frameon=False, loc="lower right")  # free of curves if accuracy rises
        else:
            panel.plot(x, [record[key] for record in steps])
        panel.set_title(name, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))  # shared by all panels: there is no step 1.5
    figure.supxlabel("step", fontsize=10)
    figure.savefig(path, dpi=120)
    return True


def _sentence(record: Mapping[str, Any], *, short: bool = False) -> str:
    if record["kind"] == "validation":
        return (
            f"epoch {record['epoch']}: top-1 {percent(record['top1'])}"
            + ("" if record["top5"] is None else f", top-5 {percent(record['top5'])}")
            + f", loss {_loss(record)} of {record['predicted']} videos"
            + (f", {record['failed']} unreadable" if record["failed"] else "")
        )
    left = (
        time.strftime("%H:%M:%S", time.gmtime(record["eta"]))
        if record["eta"] < 86400
        else f"{record['eta'] / 86400:.1f} d"
    )
    speed = f"{record['clips_per_second']:.1f} clips/s  data wait {100 * record['data_wait']:.0f} %"
    if short:
        return f"loss {_loss(record)}  {speed}  {left}"
    return f"loss {_loss(record)}  lr {record['lr']:.2e}  {speed}  {record['memory'] / 2**30:.1f} GiB  {left} left"


def rank(record: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """The sort key of validations, the best last: by accuracy, then by the smaller loss."""
    loss = record["loss"]
    return record[metric] or 0.0, -math.inf if loss is None else -loss


def _loss(record: Mapping[str, Any]) -> str:
    return "-" if record["loss"] is None else f"{record['loss']:.4f}"


def _tensorboard(folder: Path, *, wanted: bool) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if wanted:
            raise ImportError(
                "log.tensorboard is true and tensorboard is not installed: pip install tensorboard"
            ) from None
        return None
    return SummaryWriter(str(folder))
