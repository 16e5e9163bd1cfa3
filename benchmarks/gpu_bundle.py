"""Makes a folder with all that gpu_check.py needs on another machine: ``make gpu-bundle``.

    python benchmarks/gpu_bundle.py dist/gpu-bundle
    (on the machine, in that folder)  python3 benchmarks/gpu_check.py --out DIR

The folder holds the repository's files, the CUDA library (kernels/libxclip_fast.so) and wheels of av for Python 3.12
(wheels/), so that nothing is built on that machine. Building the library here takes nvcc, cmake and CUTLASS's headers;
without them the script leaves it out and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import arguments

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 60 << 20
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_OUT = ("benchmarks/results/", "docs/")  # large, and nothing there reads them


def copy_tree(to: Path) -> None:
    """Every file that git knows or would add."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith(LEFT_OUT):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def add_library(to: Path) -> None:
    """Build the CUDA library with CMake in a folder that is kept, and copy it into the bundle."""
    work = ROOT / "build" / "gpu-bundle"
    subprocess.run(["cmake", "-S", ROOT, "-B", work, f"-DPython3_EXECUTABLE={sys.executable}"], check=True)
    subprocess.run(["cmake", "--build", work, "--parallel", str(os.cpu_count() or 1)], check=True)
    shutil.copy2(work / "libxclip_fast.so", to / "kernels")


def add_wheels(to: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    python = ["--python-version", "3.12", "--implementation", "cp"]
    subprocess.run([*pip, *python, *platforms, "-d", str(to / "wheels"), "av>=18,<20"], check=True)


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundle; an older bundle there is replaced")
    parser.add_argument("--no-library", action="store_true", help="leave out the CUDA library")
    parser.add_argument("--no-wheels", action="store_true", help="leave out the wheels of av")
    args = parser.parse_args(argv)
    if args.folder.exists():
        if not (args.folder / "benchmarks" / "gpu_check.py").exists():
            parser.error(f"{args.folder} exists and is not a bundle: choose another folder")
        shutil.rmtree(args.folder)
    args.folder.mkdir(parents=True)
    copy_tree(args.folder)
    described = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    (args.folder / "benchmarks" / "COMMIT").write_text(commit + "\n", encoding="utf-8")  # measuring.py reads it
    if not args.no_library:
        try:
            add_library(args.folder)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no CUDA library in the bundle: {error}", file=sys.stderr)
    if not args.no_wheels:
        try:
            add_wheels(args.folder)
        except subprocess.CalledProcessError as error:
            print(f"no wheels of av in the bundle: {error}", file=sys.stderr)
    sizes = {path.relative_to(args.folder): path.stat().st_size for path in args.folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    for path in sorted(sizes, key=sizes.__getitem__, reverse=True)[:4]:
        print(f"{sizes[path] / 2**20:6.1f} MiB  {path}")
    print(f"{total / 2**20:6.1f} MiB in {len(sizes)} files: {args.folder}")
    if total > MOST_BYTES:
        print(f"error: more than {MOST_BYTES >> 20} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
