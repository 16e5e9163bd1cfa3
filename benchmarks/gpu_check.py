"""Everything that a GPU should be asked, in order of value, in minutes, on a bare machine without a network.

    python benchmarks/gpu_check.py --out DIR                    # all stages
    python benchmarks/gpu_check.py --out DIR --stages machine,smoke,headline
    python benchmarks/gpu_check.py --out DIR --rehearse         # on a CPU, tiny: every stage must give its rows

Every case runs in a process of its own with a time limit, and every row goes to DIR/rows.jsonl at once, so a crash, a
hang or a wrong result costs that case alone. DIR gets rows.jsonl, log.txt (the end of each case's output), table.txt
and choices.json. It runs from an install, or from a bare copy of the repository (``make gpu-bundle``), for which it
lays the package out itself. README.md beside this file lists the stages.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu.case import Case
from gpu.run import PATIENCE, Rows
from gpu.stages import SECONDS, STAGES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STAGE_NAMES = tuple(STAGES)
FAULTS = ("kill", "hang", "wrong")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for the results; made if it is missing")
    parser.add_argument("--stages", default=",".join(STAGE_NAMES), help=f"some of {', '.join(STAGE_NAMES)}")
    parser.add_argument("--cases", default="", help="comma-separated: only cases whose name holds one of these")
    parser.add_argument("--seconds", type=float, help="the most that any stage may take (default: each stage's own)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, with Triton's interpreter")
    parser.add_argument(
        "--break",
        dest="faults",
        action="append",
        default=[],
        metavar="CASE=HOW",
        help=f"with --rehearse: {', '.join(FAULTS)}; what the first contender of a case does",
    )
    args = parser.parse_args(argv)
    args.stages = [name.strip() for name in args.stages.split(",")]
    if unknown := [name for name in args.stages if name not in STAGE_NAMES]:
        parser.error(f"--stages: {', '.join(map(repr, unknown))}; some of {', '.join(STAGE_NAMES)} wanted")
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds {args.seconds}: a positive time wanted")
    if args.faults and not args.rehearse:
        parser.error("--break is for rehearsals: add --rehearse")
    pairs = [fault.rsplit("=", 1) for fault in args.faults]
    if any(len(pair) != 2 or pair[1] not in FAULTS for pair in pairs):
        parser.error(f"--break {' '.join(args.faults)}: CASE=HOW wanted, HOW one of {', '.join(FAULTS)}")
    args.faults = {case: how for case, how in pairs}
    return args


def lay_out(site: Path) -> None:
    """Put the package, as pip would, and the wheels that travel with it into a folder; nothing is built."""
    shutil.copytree(ROOT / "xclip_fast", site / "xclip_fast", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", site / "xclip_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for wheel in sorted((ROOT / "wheels").glob("*.whl")):
        if importlib.util.find_spec(wheel.name.split("-")[0]) is None:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            done = subprocess.run(
                [*pip, "--target", str(site), str(wheel)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{wheel.name} is not installed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)


def prepare(scratch: Path, rehearse: bool) -> None:
    """The environment of every case: where the package is, and one cache for what Triton and Inductor compile."""
    paths = [str(HERE)]
    if importlib.util.find_spec("xclip_fast") is None:
        lay_out(scratch / "site")
        paths.append(str(scratch / "site"))
    sys.path[:0] = [path for path in paths if path not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.chdir(scratch)  # a new Python looks here first: not into a tree whose package is not laid out
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")  # no table that was measured before decides here
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not start CUDA before a fork
    os.environ.setdefault("OMP_NUM_THREADS", "1" if rehearse else "4")
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def write_results(out: Path, rows: list[dict], seconds: dict[str, float]) -> None:  # type: ignore[type-arg]
    """The table and, from the rows of the stage "table", choices.json; printed as well."""
    from gpu import report

    text = "\n".join(report.lines(rows, seconds))
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    table: dict[str, list[object]] = {}
    for row in rows:
        if "entry" in row:
            table.setdefault(row["op"], []).append(row["entry"])
    if table:
        (out / "choices.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        prepare(Path(folder), args.rehearse)
        import torch

        if not args.rehearse and not torch.cuda.is_available():
            print(
                "error: no CUDA device: torch.cuda.is_available() is False; --rehearse runs on a CPU", file=sys.stderr
            )
            return 1
        return run(args, Path(folder))


def run(args: argparse.Namespace, scratch: Path) -> int:
    from gpu.report import trouble
    from gpu.run import Runner, say

    rows = Rows(args.out / "rows.jsonl")
    command = shlex.join(["python", *(sys.argv or ["gpu_check.py"])])
    rows.stamp = {"command": command, "rehearsed": args.rehearse}
    runner = Runner(rows, scratch, args.out / "log.txt", args.rehearse, args.faults, say)
    seconds: dict[str, float] = {}
    plans = plan(args)
    try:
        runner.run("machine", STAGES["machine"](args.rehearse)[:1], 60.0)
        if not stamp(rows):  # this CUDA does not start in a forked process
            say("the first case failed; cases are started anew instead of forked, which takes longer")
            runner.start_anew()
            runner.run("machine", STAGES["machine"](args.rehearse)[:1], 60.0)
            stamp(rows)
        for stage, cases in plans.items():
            for case in cases:
                if case.early:
                    runner.start_early(stage, case)
        for stage, cases in plans.items():
            begin = time.monotonic()
            most = PATIENCE * SECONDS[stage] if args.rehearse else SECONDS[stage]
            runner.run(stage, cases, min(most, args.seconds or most))
            seconds[stage] = time.monotonic() - begin
    finally:
        runner.stop()
        rows.close()
        write_results(args.out, rows.all, seconds)
    empty = [stage for stage in plans if not any(good(row) for row in rows.all if row["stage"] == stage)]
    if empty:
        print(f"error: no figure came from {', '.join(empty)}", file=sys.stderr)
    return 1 if empty or any(map(trouble, rows.all)) else 0


def plan(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases of each stage that is asked for; the first of all, "versions", runs anyway."""
    parts = [part.strip() for part in args.cases.split(",")]
    plans = {}
    for stage in STAGE_NAMES:
        cases = STAGES[stage](args.rehearse)[1 if stage == "machine" else 0 :] if stage in args.stages else []
        cases = [case for case in cases if any(part in case.name for part in parts)]
        if cases:
            plans[stage] = cases
    return plans


def good(row: dict[str, object]) -> bool:
    return not row.get("note")


def stamp(rows: Rows) -> bool:
    """Every later row carries the device and the versions that the first case found, if it did."""
    for row in rows.all:
        if "environment" in row:
            known = row["environment"]
            names = ("device", "torch", "triton", "transformers", "python", "xclip_fast", "commit", "nvidia_smi")
            rows.stamp |= {name: known[name] for name in names if known.get(name)}
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
