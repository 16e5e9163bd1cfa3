"""The install on machines that lack something: nothing that is there is lost, and what can run does."""

import importlib.util
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from xclip_fast.kernels.cpu import library as cpu_library

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """setup.py's build command on an empty folder, and the names of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("XCLIP_FAST_CUDA", "")
    names = runpy.run_path(str(ROOT / "setup.py"))
    command = names["BuildLibrary"](setuptools.Distribution({"name": "xclip-fast"}))
    command.build_lib = str(tmp_path / "build")
    extension = setuptools.Extension("xclip_fast.kernels.libxclip_fast", [], optional=True)
    space = command.build_extension.__func__.__globals__
    space["ROOT"] = tmp_path
    (tmp_path / "kernels").mkdir()
    return command, extension, space


@pytest.mark.parametrize("editable", [False, True])
def test_an_install_that_cannot_build_keeps_the_library_that_is_there(build: Any, tmp_path: Path, editable: bool):
    command, extension, space = build
    command.editable_mode = editable
    target = tmp_path / "build" / "xclip_fast" / "kernels" / "libxclip_fast.so"
    beside = tmp_path / "kernels" / "libxclip_fast.so"  # where an editable install keeps it
    target.parent.mkdir(parents=True)
    for file in (target, beside):
        file.write_bytes(b"built before")

    def cannot(nvcc: str) -> Path:
        raise RuntimeError("CUTLASS's headers are not here")

    space["build_library"] = cannot
    command.build_extension(extension)
    assert target.read_bytes() == beside.read_bytes() == b"built before"
    note = (beside if editable else target).with_suffix(".failed")
    assert "CUTLASS's headers are not here" in note.read_text()

    made = tmp_path / "made.so"
    made.write_bytes(b"built now")
    space["build_library"] = lambda nvcc: made
    command.build_extension(extension)
    assert target.read_bytes() == b"built now"
    assert not note.exists()
    assert [file.name for file in target.parent.iterdir()] == ["libxclip_fast.so"]


def test_a_wish_for_the_library_makes_its_absence_an_error(build: Any):
    command, extension, space = build
    space.update(WISH="1", build_library=lambda nvcc: (_ for _ in ()).throw(RuntimeError("no cmake")))
    with pytest.raises(RuntimeError, match="no cmake"):
        command.build_extension(extension)


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="needs Linux on x86_64")
def test_no_function_of_another_instruction_set_serves_a_cpu_without_it(build: Any, tmp_path: Path):
    """Of functions that several objects share by name (weak symbols), the linker takes any, also one with AVX-512."""
    _, _, space = build
    library = space["build_cpu_library"](["g++"])
    assert set(cpu_library.SETS) == set(space["CPU_SETS"])
    for name in space["CPU_SETS"]:
        command = ["nm", "--defined-only", library.with_name(f"{name}.o")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        symbols = [line.split()[-2:] for line in done.stdout.splitlines()]
        assert all(symbol.endswith(f"_{name}") for kind, symbol in symbols if kind == "T")
        shared = {symbol for kind, symbol in symbols if kind in "WVuiC"}
        assert shared <= {"DW.ref.__gxx_personality_v0"}  # an address of the C++ library
    exported = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    functions = {line.split()[-1] for line in exported.stdout.splitlines()}
    calls = ("abi", "product", "block", "patches")
    assert functions == {f"xclip_fast_cpu_{call}_{name}" for call in calls for name in space["CPU_SETS"]}


@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("cmake") is None, reason="needs nvcc and cmake")
def test_code_is_optimized_and_a_traced_library_says_why_a_launch_failed(tmp_path: Path):
    header = tmp_path / "cutlass" / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    options = [f"-DCUTLASS_DIR={tmp_path / 'cutlass'}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    for trace in (False, True):
        command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", *options, f"-DXCLIP_FAST_TRACE={trace}"]
        subprocess.run(command, check=True, capture_output=True)
        commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
        by_file = {Path(one["file"]).name: one["command"] for one in commands}
        assert all(" -O3" in command for command in by_file.values())
        products = [command for name, command in by_file.items() if name.startswith("product_")]
        assert len(products) == 3
        assert all(("CUTLASS_DEBUG_TRACE_LEVEL=1" in command) is trace for command in products)


def collected(tmp_path: Path, missing: str, *files: str) -> str:
    """What pytest says when it collects the files where a package is missing."""
    (tmp_path / f"{missing}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{missing}'\", name='{missing}')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-rs", "-n", "0", "--no-cov", *files]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def file_of(name: str) -> str:
    return str(next((ROOT / "tests").rglob(f"{name}.py")).relative_to(ROOT))


def test_without_av_the_files_that_need_it_are_skipped_and_the_others_run(tmp_path: Path):
    said = collected(tmp_path, "av", *map(file_of, ("test_transforms", "test_gpu", "test_decode", "test_cct")))
    assert "test_the_five_positions_and_ten_shapes_are_equally_likely" in said
    assert "test_compute_sanitizer_finds_nothing" in said
    assert said.count("av is not installed") == 1
    assert "test_decode.py:0: av is not installed" in said


WITHOUT_TRITON = """
import torch
import xclip_fast
from xclip_fast import info, kernels
from xclip_fast.kernels.tune.__main__ import main

block = xclip_fast.FastCCTBlock(128, 2, 3, batch_first=True)
x = torch.randn(6, 5, 128, requires_grad=True)
block(x).sum().backward()
assert x.grad.isfinite().all()
for op, places in info.collect()["ops"].items():
    part = op.startswith(" ")  # of the block; a plan without Triton does without some
    assert part or places["cpu"]["chosen"] in ("reference", "sdpa", "onednn"), (op, places["cpu"])
    for name, reason in places["cpu"]["backends"].items():
        assert name != "triton" or "triton is not installed" in reason, (op, name, reason)
with kernels.backend("library"):
    block(x).sum().backward()
try:
    with kernels.backend("triton"):
        kernels.quick_gelu(x)
except kernels.BackendError as error:
    assert "the package triton is not installed (pip install triton)" in str(error)
else:
    raise AssertionError("triton ran")
torch.cuda.is_available = lambda: True
assert main([]) == main(["--backends"]) == 1
"""


def test_without_triton(tmp_path: Path) -> None:
    """The package runs, says what is missing, and its tests skip what needs it."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "class Find:\n"
        "    find = PathFinder.find_spec\n"
        "    def __call__(self, name, *rest):\n"
        "        return None if name.split('.')[0] == 'triton' else Find.find(name, *rest)\n"
        "PathFinder.find_spec = Find()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("tuning times with Triton, which is not installed (pip install triton)") == 2
    files = [file_of(name) for name in ("test_choices", "test_launches", "test_triton_compile")]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-n", "0", "--no-cov", "-p", "no:cacheprovider"]
    command += ["-k", "launch or compile or unmeasured or tile", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "triton is not installed" in done.stdout


def test_the_tests_of_the_kernels_are_collected_where_there_is_a_gpu(tmp_path: Path):
    """Nothing at import may break because torch.cuda.is_available() is True."""
    (tmp_path / "has_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "has_gpu", "--collect-only", "-q", "-n", "0", "--no-cov"]
    command += ["-p", "no:cacheprovider", "tests/kernels", "tests/inference", "tests/nn"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_model_with_kernels_is_as_exact_as_torch" in done.stdout


def test_every_folder_of_kernels_is_a_package_of_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setenv("XCLIP_FAST_CUDA", "0")
    runpy.run_path(str(ROOT / "setup.py"))
    folders = {str(file.parent.relative_to(ROOT)) for file in (ROOT / "kernels").rglob("__init__.py")}
    assert {folder for name, folder in given["package_dir"].items() if name in given["packages"]} == folders


def test_a_machine_that_refuses_compute_sanitizer_is_not_an_error_of_ours():
    spec = importlib.util.spec_from_file_location("gpu_tests", ROOT / file_of("test_gpu"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    refused = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"
    assert module.sanitizer_refusal(refused) == "Error: Device not supported. Please refer to the documentation"
    found = "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 1 error\n"
    assert module.sanitizer_refusal(found) is None
    assert module.sanitizer_refusal(found + refused) is None
    assert module.sanitizer_refusal("AssertionError") is None


def test_type_checkers_see_an_editable_install(tmp_path: Path) -> None:
    """mypy on a user's file. It does not run the finder of setuptools, which an editable install relies on."""
    pytest.importorskip("mypy")
    installed = [path for path in map(Path, sys.path) if (path / "xclip_fast_stubs.pth").exists()]
    if not installed:
        pytest.skip("xclip-fast is not installed in editable mode here: pip install -e .")
    (tmp_path / "user.py").write_text(
        "import xclip_fast\n"
        "from xclip_fast.kernels import layer_norm\n"
        "from xclip_fast.text.labels import readable\n"
        "reveal_type(xclip_fast.XCLIP.from_pretrained('weights'))\n"
        "reveal_type(layer_norm)\n"
        "readable(3)\n"
    )
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # or it reads all of torch
    arguments = ["--config-file", "mypy.ini", "--python-executable", sys.executable, "--no-incremental", "user.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    said = done.stdout
    assert 'user.py:4: note: Revealed type is "xclip_fast.model.XCLIP"' in said
    assert 'user.py:5: note: Revealed type is "def (x: ' in said
    assert 'user.py:6: error: Argument 1 to "readable" has incompatible type "int"' in said
    assert "user.py:2: error" not in said
