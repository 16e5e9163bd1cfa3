"""All checks and benchmarks of a GPU, the most valuable first: minutes on a machine without network access.

    python benchmarks/gpu_check.py --out DIR                    # all stages
    python benchmarks/gpu_check.py --out DIR --stages machine,smoke,headline
    python benchmarks/gpu_check.py --out DIR --rehearse         # on a CPU at tiny sizes

Each case runs in its own process with a time limit, and each row goes to DIR/rows.jsonl at once, so a crash, a hang or
a wrong result costs only that case. The script also writes log.txt (the end of each case's output), table.txt and
results.json. It works with an installed package or in a bare copy of the repository
(``make gpu-bundle``). README.md in this folder lists the stages.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arguments
from gpu.case import Case, Row
from gpu.run import PATIENCE, Rows
from gpu.stages import SECONDS, STAGES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FAULTS = ("kill", "hang", "wrong")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--stages",
        type=arguments.names(STAGES),
        default=list(STAGES),
        help=f"comma-separated: some of {', '.join(STAGES)} (default: all)",
    )
    parser.add_argument("--cases", default="", help="comma-separated: run only cases whose name contains one of these")
    parser.add_argument("--tests", default="", help="of the stage tests, run those that match (pytest's -k)")
    parser.add_argument("--seconds", type=arguments.positive, help="time limit of each stage (default: its own)")
    parser.add_argument(
        "--rehearse", action="store_true", help="run on the CPU at tiny sizes, with Triton's interpreter"
    )
    parser.add_argument(
        "--break",
        dest="faults",
        action="append",
        default=[],
        metavar="CASE=HOW",
        help=f"with --rehearse: let the first contender of this case fail, as {', '.join(FAULTS)}",
    )
    args = parser.parse_args(argv)
    if args.faults and not args.rehearse:
        parser.error("--break is for rehearsals: add --rehearse")
    pairs = [fault.rsplit("=", 1) for fault in args.faults]
    if any(len(pair) != 2 or pair[1] not in FAULTS for pair in pairs):
        parser.error(f"--break {' '.join(args.faults)}: give CASE=HOW, with HOW one of {', '.join(FAULTS)}")
    args.faults = {case: how for case, how in pairs}
    return args


def lay_out(site: Path) -> None:
    """Copy the package into a folder as pip would, and install the bundle's wheels there; nothing is built."""
    shutil.copytree(ROOT / "xclip_fast", site / "xclip_fast", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", site / "xclip_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for wheel in sorted((ROOT / "wheels").glob("*.whl")):
        if importlib.util.find_spec(wheel.name.split("-")[0]) is None:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            done = subprocess.run(
                [*pip, "--target", str(site), str(wheel)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{wheel.name} was not installed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)


def prepare(scratch: Path, rehearse: bool) -> None:
    """Set the environment of all cases: the path of the package, and shared caches of Triton and Inductor."""
    paths = [str(HERE)]
    if importlib.util.find_spec("xclip_fast") is None:
        lay_out(scratch / "site")
        paths.append(str(scratch / "site"))
    sys.path[:0] = [path for path in paths if path not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.chdir(scratch)  # Python imports from the current folder first: not from a bare copy
    os.environ.setdefault("TRITON_CACHE_DIR", str(scratch / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "inductor"))
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")  # ignore tables that were measured before
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # cuda.is_available() must not start CUDA before a fork
    os.environ.setdefault("OMP_NUM_THREADS", "1" if rehearse else "4")
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def write_results(out: Path, rows: list[Row], stamp: Row, seconds: dict[str, float]) -> None:
    """Write and print the table; write results.json, which has what all rows share once."""
    import measuring
    from gpu import report

    environment = next((row["environment"] for row in rows if "environment" in row), {})
    left_out = {*stamp, "date", "environment"}
    measured = [{key: rounded(value) for key, value in row.items() if key not in left_out} for row in rows]
    measuring.write_json(out / "results.json", {"environment": environment, "rows": measured})

    text = "\n".join(report.lines(rows, seconds))
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def rounded(value: Any) -> Any:
    """Floats in a value of JSON to five digits, as a name where they are no number."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ``run`` ends its cases
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        prepare(Path(folder), args.rehearse)
        import torch

        if not args.rehearse and not torch.cuda.is_available():
            arguments.fail("no CUDA device: torch.cuda.is_available() is False; --rehearse runs on a CPU", 1)
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
            say("the first case failed: from now on each case is a new process instead of a fork, which takes longer")
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
        write_results(args.out, rows.all, rows.stamp, seconds)
    empty = [stage for stage in plans if not any(good(row) for row in rows.all if row["stage"] == stage)]
    if empty:
        print(f"error: no results from {', '.join(empty)}", file=sys.stderr)
    return 1 if empty or any(map(trouble, rows.all)) else 0


def plan(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases of the chosen stages, without "versions", which always runs first."""
    parts = [part.strip() for part in args.cases.split(",")]
    found = {stage: STAGES[stage](args.rehearse)[1 if stage == "machine" else 0 :] for stage in args.stages}
    names = [case.name for cases in found.values() for case in cases]
    for part in [*parts, *args.faults]:
        if not any(part in name for name in [*names, "versions"]):
            arguments.fail(f"no case of these stages is called {part!r}: {', '.join(names)}")
    plans = {}
    for stage in filter(found.__contains__, STAGES):
        cases = [case for case in found[stage] if any(part in case.name for part in parts)]
        if stage == "tests":
            cases = [dataclasses.replace(case, options={**case.options, "matching": args.tests}) for case in cases]
        if cases:
            plans[stage] = cases
    return plans


def good(row: dict[str, object]) -> bool:
    return not row.get("note")


def stamp(rows: Rows) -> bool:
    """Add the device and the versions that the first case found to all later rows; False if it found none."""
    for row in rows.all:
        if "environment" in row:
            known = row["environment"]
            names = ("device", "torch", "triton", "transformers", "python", "xclip_fast", "commit", "nvidia_smi")
            rows.stamp |= {name: known[name] for name in names if known.get(name)}
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
