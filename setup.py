"""Maps the folders to packages and builds the libraries of csrc/; the rest is in pyproject.toml.

The CPU library is built on x86-64 Linux where g++ 11 or later is (CXX names another GCC), the CUDA library where nvcc
is.

XCLIP_FAST_CUDA=0 skips the CUDA library, =1 makes its absence an error; otherwise a failure to build a library is told
(by pip with -v, by ``xclip-fast info`` always) and the install goes on without. No GPU is asked for.
CUTLASS_DIR: a folder with include/cutlass/cutlass.h, else the package nvidia-cutlass, which pip brings as a requirement
of the build.
"""

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cuda"
WISH = os.environ.get("XCLIP_FAST_CUDA", "")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        (found for home in homes if home and (found := shutil.which(f"{home}/bin/nvcc"))), None
    )


def find_cutlass() -> Path | None:
    if os.environ.get("CUTLASS_DIR"):
        return Path(os.environ["CUTLASS_DIR"])
    package = importlib.util.find_spec("cutlass_library")
    return Path(next(iter(package.submodule_search_locations or ()))) / "source" if package else None


def told(*command: str | Path) -> None:
    """Run a command; if it fails, raise RuntimeError with the end of what it said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise RuntimeError(f"{Path(command[0]).name} failed: " + "\n".join((errors or lines)[-5:])[-1000:])


def fingerprint(nvcc: str, cutlass: Path) -> str:
    """Of everything that the library is made from: an install that would build the same one again does not."""
    files = [
        ROOT / "CMakeLists.txt",
        *sorted((ROOT / "csrc").glob("*.cu")),
        *sorted((ROOT / "csrc" / "include").iterdir()),
    ]
    files.append(cutlass / "include" / "cutlass" / "version.h")
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    return hashlib.sha256(b"\0".join([version, *(file.read_bytes() for file in files)])).hexdigest()


def build_library(nvcc: str) -> Path:
    cmake, cutlass = shutil.which("cmake"), find_cutlass()
    if cmake is None:
        raise RuntimeError("cmake is not on the PATH (pip install cmake)")
    if cutlass is None or not (cutlass / "include" / "cutlass" / "cutlass.h").exists():
        raise RuntimeError("CUTLASS's headers are not here (pip install --no-deps nvidia-cutlass, or set CUTLASS_DIR)")
    library, stamp = BUILD / "libxclip_fast.so", BUILD / "made_from"
    made_from = fingerprint(nvcc, cutlass)
    if library.exists() and stamp.exists() and stamp.read_text() == made_from:
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)  # it may know another nvcc or CUTLASS
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCUTLASS_DIR={cutlass}"]
    told(cmake, "-S", ROOT, "-B", BUILD, *options)
    told(cmake, "--build", BUILD, "--target", "xclip_fast", "--parallel", str(min(os.cpu_count() or 1, 4)))
    stamp.write_text(made_from)
    return library


def build_cpu_library(compiler: list[str]) -> Path:
    library = ROOT / "build" / "cpu" / "libxclip_fast_cpu.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    # OpenMP's functions are found in the process, where torch has loaded them: a second OpenMP would bring more threads
    options = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wno-subobject-linkage"]
    objects = []
    for name, flags in CPU_SETS.items():
        objects.append(library.with_name(f"{name}.o"))
        told(*compiler, *options, *flags, f"-DXCLIP_FAST_SET={name}", "-c", CPU_SOURCE, "-o", objects[-1])
    told(*compiler, "-shared", *objects, "-o", library)
    return library


class BuildLibrary(build_ext):
    """Our own builds in place of setuptools'; a library's name has no Python in it, for it serves every one."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # setuptools copies the library into the sources of an editable install, but not this note
        note = (ROOT / "kernels" if self.editable_mode else target.parent) / f"{target.stem}.failed"
        on_cpu = target.stem == CPU_LIBRARY
        try:
            library = build_cpu_library(CXX) if on_cpu else build_library(NVCC or "nvcc")
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if WISH == "1" and not on_cpu:
                raise
            # a CUDA library that is there stays: it still loads if its interface is the wanted one
            for old in (target, note.with_suffix(".so")) if on_cpu else ():
                old.unlink(missing_ok=True)
            note.write_text(f"its build failed at install: {error}\n", encoding="utf-8")
            print(f"xclip-fast: no new {target.name}: {error}", file=sys.stderr)
            return
        note.unlink(missing_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(library, part)
        part.replace(target)


def link_stubs(stubs: Path) -> None:
    shutil.rmtree(stubs, ignore_errors=True)
    for root, package in ((ROOT / "xclip_fast", Path()), (ROOT / "kernels", Path("kernels"))):
        for source in root.rglob("*.py"):
            link = stubs / "xclip_fast-stubs" / package / source.relative_to(root).with_suffix(".pyi")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)


class EditableWheel(editable_wheel):
    """An editable install that mypy and Pyright see, too: they do not run setuptools' finder.

    They take a package's types from a folder ``xclip_fast-stubs`` (PEP 561), which Python itself cannot import. Each of
    our modules has a link there. A module that is added later has one after the next install.
    """

    def _run_build_commands(self, dist_name: str, unpacked: str, *folders: Any) -> Any:
        stubs = ROOT / "build" / "stubs"
        try:
            link_stubs(stubs)
        except OSError as error:
            print(f"xclip-fast: type checkers will not see this install: {error}", file=sys.stderr)
        else:
            Path(unpacked, "xclip_fast_stubs.pth").write_text(f"{stubs}\n", encoding="utf-8")
        return super()._run_build_commands(dist_name, unpacked, *folders)


if WISH not in ("", "0", "1"):
    raise SystemExit(f"XCLIP_FAST_CUDA={WISH}: it is 0, 1 or not set")
NVCC = find_nvcc() if WISH != "0" and sys.platform == "linux" else None
if WISH == "1" and NVCC is None:
    raise SystemExit("XCLIP_FAST_CUDA=1, but nvcc is not on the PATH, in CUDA_HOME or in /usr/local/cuda/bin")

CPU_LIBRARY = "libxclip_fast_cpu"
CPU_SOURCE = ROOT / "csrc" / "cpu" / "library.cpp"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
CPU_SETS = {  # the instruction sets of csrc/cpu/vector.h
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": AMX,
    "amx_fp32": [*AMX, "-DXCLIP_FAST_SPLIT"],
}
CXX = shlex.split(os.environ.get("CXX") or "g++")
is_x86_linux = sys.platform == "linux" and platform.machine() == "x86_64"
has_compiler = bool(os.environ.get("CXX") or shutil.which("g++"))
LIBRARIES = [CPU_LIBRARY] * (is_x86_linux and has_compiler) + ["libxclip_fast"] * bool(NVCC)

FOLDERS = sorted(str(file.parent.relative_to(ROOT)) for file in (ROOT / "kernels").rglob("__init__.py"))
KERNELS = {f"xclip_fast.{folder}".replace("/", "."): folder for folder in FOLDERS}

setup(
    packages=[*find_packages(include=["xclip_fast*"]), *KERNELS],
    package_dir=KERNELS,
    package_data={
        "xclip_fast": ["py.typed", "configs/*.yaml"],
        "xclip_fast.search": ["page.css", "page.js"],
        "xclip_fast.text": ["*.gz", "*.txt"],
        "xclip_fast.kernels": ["*.json"],
        "xclip_fast.kernels.triton": ["*.json"],
    },
    ext_modules=[Extension(f"xclip_fast.kernels.{name}", [], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildLibrary, "editable_wheel": EditableWheel},
    setup_requires=["nvidia-cutlass>=4.2,<5"] if NVCC and find_cutlass() is None else [],
)
