"""The CUDA library: its interface and cuda_library.py agree, its kernels are compiled as they should be, its plumbing
computes the ops. Nothing here needs a GPU except what is marked so.

The library is what the install built, or ``XCLIP_FAST_CUDA_LIBRARY`` names; ``XCLIP_FAST_TEST_BUILD=1`` builds one.
"""

import ctypes
import functools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from xclip_fast.kernels import cuda_library, dispatch
from xclip_fast.kernels.cct_block import plans, products
from xclip_fast.kernels.cct_block.example import example
from xclip_fast.kernels.cct_block.products import LINEAR_RESIDUAL, NORM_LINEAR
from xclip_fast.kernels.dispatch import INTERPRETED, OPS
from xclip_fast.kernels.dispatch.parts import PARTS, Case, Part

from xclip_fast import info, kernels

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc" / "include" / "xclip_fast.h"
EPS = 1e-5
PARTIALS = 40  # floats of a partial result where the library is played; the real one asks for more
TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def declared() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """The header's functions: name -> result, [(type, name of the parameter)]; a type is that of SIGNATURES."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    found = {}
    for result, name, inside in re.findall(r"XCLIP_FAST_API ([\w ]+?[ *]+)(\w+)\(([^)]*)\);", text):
        parameters = [part.strip() for part in inside.split(",") if part.strip() != "void"]
        split = [re.fullmatch(r"(.*?[ *])(\w+)", part) for part in parameters]
        found[name] = (result.strip(), [(match[1].strip(), match[2]) for match in split if match])
        assert len(found[name][1]) == len(parameters)
    return found


def constants() -> dict[str, int]:
    return {
        name: int(value.strip("()"))
        for name, value in re.findall(r"#define XCLIP_FAST_(\w+) (\(?-?\d+\)?)", HEADER.read_text())
    }


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = cuda_library.path()
    if not file.exists() and os.environ.get("XCLIP_FAST_TEST_BUILD") == "1":
        build = tmp_path_factory.mktemp("build")
        subprocess.run(["cmake", "-S", ROOT, "-B", build, f"-DPython3_EXECUTABLE={sys.executable}"], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", "2"], check=True)
        file = build / file.name
    if not file.exists():
        missing = "nvcc is not on the PATH" if shutil.which("nvcc") is None else "this install built none"
        pytest.skip(f"no CUDA library: {missing} (XCLIP_FAST_TEST_BUILD=1 builds it, which takes minutes)")
    return file


# ---- the interface


def test_signatures_are_those_of_the_header() -> None:
    functions = declared()
    assert set(functions) == set(cuda_library.SIGNATURES)
    for name, (result, parameters) in functions.items():
        wanted_result, wanted = cuda_library.SIGNATURES[name]
        assert wanted_result is (ctypes.c_char_p if "*" in result else TYPES[result]), name
        kinds = [ctypes.c_void_p if "*" in kind else TYPES[kind] for kind, _ in parameters]
        assert kinds == wanted, name


def test_constants_are_those_of_the_header() -> None:
    defined = constants()
    assert defined["ABI"] == cuda_library.ABI
    assert {name: defined[f"TILE_{name.upper()}"] for name in cuda_library.TILES} == cuda_library.TILES
    names = {torch.bfloat16: "BF16", torch.float16: "FP16"}
    assert {dtype: defined[name] for dtype, name in names.items()} == cuda_library.DTYPES


def test_tiles_are_those_of_the_source() -> None:
    kinds = {"bfloat16_t": torch.bfloat16, "half_t": torch.float16}
    source = "".join(file.read_text() for file in sorted((ROOT / "csrc").glob("product_*.cu")))
    built = {
        (epilogue, kinds[element]): tuple(name.removesuffix("Statistics").lower() for name in names.split(", "))
        for element, epilogue, names in re.findall(r"run_on_tile<cutlass::(\w+), (\w+), ([\w, ]+)>", source)
    }
    assert built == cuda_library.BUILT
    assert cuda_library.tiles("NormGelu", torch.bfloat16) == ("auto", "wide", "square")
    assert cuda_library.tiles("ResidualStatistics", torch.bfloat16) == ("auto", "wide", "square")
    assert cuda_library.tiles("Residual", torch.float32) == ()


def test_exported_symbols_are_the_interface(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    # weak ones are inline functions of the C++ library
    strong = {line.split()[-1] for line in listed.splitlines() if line.split()[-2] != "W"}
    assert strong == set(cuda_library.SIGNATURES)


def test_library_loads_and_checks_its_arguments_without_a_gpu(library: Path) -> None:
    loaded, reason = cuda_library.load(library)
    assert reason is None
    codes = {value: name for name, value in constants().items() if name.startswith("BAD")}
    assert loaded.xclip_fast_error(0) == b"success"
    assert all(loaded.xclip_fast_error(code) != b"no such error code" for code in codes)
    assert loaded.xclip_fast_error(-5) == b"no such error code"

    def residual(**changes: Any) -> str:
        aligned = 1 << 20  # never read: every call here is refused, or needs a device that is not there
        given = dict.fromkeys(("x", "w", "residual", "y"), aligned) | dict.fromkeys(
            ("bias", "scale", "stream", "partials", "mean", "rstd")
        )
        given |= {"dtype": 0, "tile": -1, "m": 64, "n": 128, "k": 64, "x_row": 64, "w_row": 64, "residual_row": 128}
        given |= {"device": 10_000, "eps": 0.0, **changes}
        names = [name for _, name in declared()["xclip_fast_linear_residual"][1]]
        code = loaded.xclip_fast_linear_residual(*(given[name] for name in names))
        return codes.get(code, str(code))

    assert residual() == "BAD_DEVICE"
    assert residual(dtype=1) == "BAD_DEVICE"
    assert residual(dtype=2) == "BAD_DTYPE"
    assert residual(n=68, residual_row=68) == "BAD_ALIGNMENT"
    assert residual(x=None) == "BAD_POINTER"
    assert residual(y=(1 << 20) + 8) == "BAD_ALIGNMENT"
    assert residual(k=60) == "BAD_ALIGNMENT"
    assert residual(x_row=68) == "BAD_ALIGNMENT"
    assert residual(x_row=56) == "BAD_SIZE"
    assert residual(residual_row=120) == "BAD_SIZE"
    assert residual(m=-1) == "BAD_SIZE"
    assert residual(m=1 << 31) == "BAD_SIZE"


def test_every_call_checks_its_arguments(library: Path) -> None:
    """What no GPU is needed for: no call reads the memory that is named here."""
    loaded, _ = cuda_library.load(library)
    codes = {value: name for name, value in constants().items()}
    aligned = 1 << 20
    sizes = {"m": 64, "n": 128, "k": 64}
    strides = dict.fromkeys(("x_row", "w_row", "u_row", "residual_row"), 128)
    usual = {**sizes, **strides, "device": 10_000, "stream": None, "tile": -1, "dtype": 0, "eps": 1e-5}
    usual |= {"activation": 1}

    def call(name: str, **changes: Any) -> str:
        given = {**usual, **changes}
        names = [name for _, name in declared()[f"xclip_fast_{name}"][1]]
        code = getattr(loaded, f"xclip_fast_{name}")(*(given.get(name, aligned) for name in names))
        return codes.get(code, str(code))

    for name in ("norm_linear", "slope", "linear_residual"):
        assert call(name) == "BAD_DEVICE"
        assert call(name, y=aligned + 8) == "BAD_ALIGNMENT"
        assert call(name, w=None) == "BAD_POINTER"
    assert call("norm_linear", mean=None) == call("norm_linear", w_sums=None) == "BAD_POINTER"
    assert call("norm_linear", mean=None, rstd=None, w_sums=None) == "BAD_DEVICE"
    assert call("norm_linear", activation=0) == "BAD_POINTER"  # u is what it is applied to
    assert call("norm_linear", activation=0, u=None) == call("norm_linear", dtype=1, u=None) == "BAD_DEVICE"
    assert call("norm_linear", dtype=1) == call("slope", dtype=1) == "BAD_DTYPE"
    assert call("norm_linear", u=aligned + 8) == call("slope", h=aligned + 8) == "BAD_ALIGNMENT"
    assert call("slope", u=None) == call("slope", h=None) == call("slope", partials=None) == "BAD_POINTER"
    assert call("slope", u_row=120) == call("slope", w_row=120) == "BAD_SIZE"
    assert call("linear_residual", mean=None) == call("linear_residual", partials=None) == "BAD_POINTER"
    assert call("linear_residual", partials=None, mean=None, rstd=None) == "BAD_DEVICE"


def dumped(library: Path, what: str) -> str:
    triton = pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, f"--dump-{what}", library], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def bodies(library: Path) -> dict[str, str]:
    """The machine code of each kernel."""
    return {part.split("\n", 1)[0].strip(): part for part in dumped(library, "sass").split("Function : ")[1:]}


def test_kernels_use_tensor_cores_and_tma_and_do_not_spill(library: Path, bodies: dict[str, str]) -> None:
    usage = dumped(library, "resource-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    products = [name for name, *_ in found if "GemmUniversal" in name]
    assert len(products) == sum(map(len, cuda_library.BUILT.values()))
    for name, _, stack, local in found:
        assert stack == local == "0", name
    for name in products:
        for instruction in ("HGMMA", "UTMALDG", "UTMASTG"):
            assert instruction in bodies[name], (instruction, name)
        assert not re.search(r"\b(LDL|STL)\b", bodies[name]), name


def test_kernels_start_early_and_wait_before_they_touch_memory(bodies: dict[str, str]) -> None:
    """PREEXIT lets the next kernel start, ACQBULK waits for the one before. In a product the warps that load wait; the
    others read and write behind their first WGMMA, which needs a load."""
    for name, body in bodies.items():
        product = "GemmUniversal" in name
        assert "PREEXIT" in body, name
        assert body.count("ACQBULK") == (2 if "SrcFetch" in name else 1), name
        before, after = re.split("HGMMA" if product else "ACQBULK", body, maxsplit=1)
        assert re.search(r"\b(LDG|STG)\b", after), name
        assert not re.search(r"\b(LDG|STG)\b", before), name
        if product:
            assert body.index("ACQBULK") < body.index("UTMALDG"), name


# ---- refusals


def kind(dtype: torch.dtype = torch.bfloat16, **more: Any) -> Case:
    """A kind of call of a block 128 wide."""
    given: dict[str, Any] = {
        "device": torch.device("cpu"),
        "dtype": dtype,
        "stream": dtype,
        "sequences": 6,
        "length": 5,
    }
    given |= {"rows": 30, "heads": 2, "channels": 64, "width": 128, "hidden": 512, "frames": 3}
    return Case(**{**given, "forced": kernels.forced_backend(), **more})


def reason(part: Part, given: Case) -> str | None:
    return part.refusals(given)["cuda"]


def test_the_backend_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "refuse_device", lambda *_: None)
    for part in (NORM_LINEAR, LINEAR_RESIDUAL):
        with kernels.backend("auto"):
            assert "not measured" in (reason(part, kind()) or "")
        with kernels.backend("cuda"):
            assert reason(part, kind()) is None
    assert {name for name, op in OPS.items() if "cuda" in op.names} == {"cct_block"}
    assert {name for name, part in PARTS.items() if "cuda" in part.names} == {"linear_residual", "norm_linear"}


def test_reasons_of_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernels.backend("cuda"):
        assert reason(NORM_LINEAR, kind()) == "device cpu is not cuda"
        monkeypatch.setattr(cuda_library, "refuse_device", lambda *_: None)
        assert "float32 is not among" in (reason(NORM_LINEAR, kind(torch.float32)) or "")
        assert "multiples of 8" in (reason(NORM_LINEAR, kind(width=100)) or "")
        assert "multiples of 8" in (reason(LINEAR_RESIDUAL, kind(hidden=97)) or "")
        assert "beside weights" in (reason(LINEAR_RESIDUAL, kind(stream=torch.float32)) or "")
        assert "quick_gelu only" in (reason(NORM_LINEAR, kind(activation="gelu")) or "")


def test_a_library_that_is_missing_or_broken_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "libxclip_fast.so"
    assert "no CUDA library" in (cuda_library.load(file)[1] or "")
    file.with_suffix(".failed").write_text("nvcc found no C++ compiler\n")
    cuda_library.load.cache_clear()
    assert "nvcc found no C++ compiler" in (cuda_library.load(file)[1] or "")
    monkeypatch.setattr(cuda_library, "path", lambda: file)
    told = info._versions()["CUDA library"]
    assert told["version"] is None
    assert "nvcc found no C++ compiler" in (told["note"] or "")
    file.write_bytes(b"not a library")
    cuda_library.load.cache_clear()
    assert "does not load" in (cuda_library.load(file)[1] or "")


def test_a_library_of_another_interface_is_a_reason(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "ABI", cuda_library.ABI + 1)
    cuda_library.load.cache_clear()
    assert "install again" in (cuda_library.load(library)[1] or "")
    cuda_library.load.cache_clear()


# ---- the plumbing, with the library's kernels played by torch on the CPU


def quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


def quick_gelu_slope(u: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * u)
    return s + 1.702 * u * s * (1 - s)


class Memory:
    """Plays the library: reads and writes the memory that its arguments name, as the header says."""

    kinds = {value: key for key, value in cuda_library.DTYPES.items()}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        names = [parameter for _, parameter in declared()[name][1]]

        def call(*args: Any) -> int:
            assert len(args) == len(names)
            self.calls.append(name.removeprefix("xclip_fast_"))
            return getattr(Memory, self.calls[-1])(self, **dict(zip(names, args, strict=True))) or 0

        return call

    def at(self, pointer: int | None, rows: int, columns: int, row: int, dtype: torch.dtype, column: int = 1) -> Tensor:
        size = torch.empty(0, dtype=dtype).element_size()
        assert pointer
        assert pointer % size == 0
        count = (rows - 1) * row + (columns - 1) * column + 1
        data = torch.frombuffer((ctypes.c_char * (count * size)).from_address(pointer), dtype=dtype)
        return data.as_strided((rows, columns), (row, column))

    def row(self, pointer: int | None, count: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if pointer is None else self.at(pointer, 1, count, count, dtype)[0]

    def product(self, g: dict[str, Any], transposed: bool = True) -> Tensor:
        kind = self.kinds[g["dtype"]]
        assert g["x"] % 16 == g["w"] % 16 == g["y"] % 16 == g["x_row"] % 8 == g["w_row"] % 8 == 0
        x = self.at(g["x"], g["m"], g["k"], g["x_row"], kind).float()
        shape = (g["n"], g["k"]) if transposed else (g["k"], g["n"])
        w = self.at(g["w"], *shape, g["w_row"], kind).float()
        return x @ (w.T if transposed else w)

    def out(self, g: dict[str, Any], value: Tensor, name: str = "y") -> None:
        self.at(g[name], g["m"], g["n"], g["n"], self.kinds[g["dtype"]]).copy_(value)

    def norm_linear(self, **g: Any) -> None:
        u = self.product(g)
        if g["mean"] is not None:
            mean, rstd, sums = self.row(g["mean"], g["m"]), self.row(g["rstd"], g["m"]), self.row(g["w_sums"], g["n"])
            u = rstd[:, None] * (u - mean[:, None] * sums)  # type: ignore[index,operator]
        if g["bias"] is not None:
            u = u + self.row(g["bias"], g["n"])
        if g["u"] is not None:
            self.out(g, u, "u")
        self.out(g, quick_gelu(u) if g["activation"] else u)

    def slope(self, **g: Any) -> None:
        u = self.at(g["u"], g["m"], g["n"], g["u_row"], self.kinds[g["dtype"]]).float()
        du = self.product(g, transposed=False) * quick_gelu_slope(u)
        self.out(g, quick_gelu(u), "h")
        self.out(g, du)
        parts = self.at(g["partials"], 4 * -(-g["m"] // 128), g["n"], g["n"], torch.float32)
        parts.zero_()[-1] = du.sum(0)

    def linear_residual(self, **g: Any) -> None:
        value = self.added(g)
        self.out(g, value)
        assert (g["partials"] is None) == (g["mean"] is None) == (g["rstd"] is None)
        if g["mean"] is not None:
            self.at(g["partials"], 1, PARTIALS, PARTIALS, torch.float32).fill_(torch.nan)
            variance, mean = torch.var_mean(value, -1, correction=0)
            self.at(g["mean"], 1, g["m"], g["m"], torch.float32).copy_(mean)
            self.at(g["rstd"], 1, g["m"], g["m"], torch.float32).copy_((variance + g["eps"]).rsqrt())

    def added(self, g: dict[str, Any]) -> Tensor:
        value = self.product(g)
        if g["bias"] is not None:
            value = value + self.row(g["bias"], g["n"])
        if g["scale"] is not None:
            value = value * self.row(g["scale"], g["m"])[:, None]  # type: ignore[index]
        residual = self.at(g["residual"], g["m"], g["n"], g["residual_row"], self.kinds[g["dtype"]])
        return residual.float() + value

    def statistics_floats(self, **g: Any) -> int:
        return PARTIALS


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    played = Memory()
    monkeypatch.setattr(cuda_library, "refuse_device", lambda *_: None)
    monkeypatch.setattr(cuda_library, "_library", lambda: played)
    monkeypatch.setattr(cuda_library, "_statistics_floats", cuda_library._statistics_floats.__wrapped__)
    monkeypatch.setattr(cuda_library, "_place", lambda _: (0, None))
    return played


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def linear(out: int, width: int) -> tuple[Tensor, Tensor]:
    return normal(out, width, scale=width**-0.5), normal(out, scale=0.1)


def error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1))


def cast(block: kernels.Block, dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in block)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the library itself is checked")


@interpreted
@pytest.mark.parametrize("folds", [0, 10**6], ids=["folded", "normalized first"])
@pytest.mark.parametrize("drops", [False, True])
def test_plumbing_computes_the_block(folds: int, drops: bool, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product by the library, the rest by Triton's interpreter, which has no bfloat16."""
    monkeypatch.setattr(products, "FOLD_FROM", folds)
    folded, norm_linear = [], memory.norm_linear
    monkeypatch.setattr(Memory, "norm_linear", lambda self, **g: folded.append(g["mean"]) or norm_linear(**g))
    op, block = OPS["cct_block"], cast(example(4, 5, 128, drops=drops, dtype=torch.float64), torch.float16)

    with torch.no_grad():
        with kernels.backend("reference"):
            exact = op(*cast(kernels.Block(*block), torch.float64))[0]
            limit = error(op(*block)[0], exact)
        with kernels.backend("cuda"):
            got = op(*block)[0]
    assert error(got, exact) <= 2 * limit + 4 * torch.finfo(torch.float16).eps
    assert (folded[0] is not None) == (folds == 0)
    assert {"norm_linear", "linear_residual"} <= set(memory.calls)


@interpreted
def test_a_block_in_training_takes_the_library_and_says_so(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_logged", set())
    block = cast(example(4, 5, 128, dtype=torch.float64), torch.float16)
    weight = block[kernels.Block._fields.index("in_weight")].requires_grad_()
    with kernels.backend("cuda"):
        OPS["cct_block"](*block)[0].sum().backward()
    assert weight.grad.isfinite().all()
    assert memory.calls == []
    assert (
        "norm_linear runs on the backend library; cuda: it was not built for training in torch.float16" in caplog.text
    )
    assert "linear_residual runs on the backend library; cuda: it computes no gradients" in caplog.text


@interpreted
@pytest.mark.parametrize("autocast", [False, True])
def test_training_takes_the_products_around_the_activation(
    autocast: bool, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if they were built for float16: Triton's interpreter has no bfloat16."""
    both = {(name, torch.float16): ("square",) for name in ("NormGeluKept", "Slope")}
    monkeypatch.setattr(cuda_library, "BUILT", {**cuda_library.BUILT, **both})
    plans.plan.cache_clear()
    op, block = OPS["cct_block"], example(4, 5, 128, drops=True, dtype=torch.float64)
    lowered = kernels.Block(*cast(block, torch.float32 if autocast else torch.float16))

    def gradients(given: kernels.Block, name: str) -> dict[str, Tensor]:
        leaves = {
            field: value.detach().requires_grad_()
            for field, value in given._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point() and not field.startswith("drop")
        }
        lowering = autocast and given.x.dtype != torch.float64
        with kernels.backend(name):
            with torch.autocast("cpu", torch.float16, enabled=lowering):
                y = op(*given._replace(**leaves))[0]
            weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
            found = torch.autograd.grad(y[:, :-1].double().mul(weights[:, :-1]).sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    exact = gradients(kernels.Block(*cast(lowered, torch.float64)), "reference")
    torchs, got = gradients(lowered, "reference"), gradients(lowered, "cuda")
    plans.plan.cache_clear()
    assert {"norm_linear", "slope"} <= set(memory.calls)
    for name, right in exact.items():
        assert error(got[name], right) <= 2 * error(torchs[name], right) + 4 * torch.finfo(torch.float16).eps, name


def test_errors_of_the_library_carry_its_words(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def xclip_fast_norm_linear(self, *_: Any) -> int:
            return 3

        def xclip_fast_error(self, code: int) -> bytes:
            return b"this call does not take this element type"

    monkeypatch.setattr(cuda_library, "_library", Refusing)
    with pytest.raises(RuntimeError, match=r"norm_linear failed .*\(3, 8\).*element type \(code 3\)"):
        cuda_library.norm_linear(torch.ones(3, 8, dtype=torch.float16), torch.ones(8, 8, dtype=torch.float16))


# ---- the algebra, exactly


def test_folded_layer_norm_is_layer_norm() -> None:
    """LN(x) W^T + b = r (x W'^T - mu s) + b', with W' = W diag(gamma), s its row sums, b' = W beta + b."""
    x, gamma, beta, (weight, bias) = normal(9, 64) + 3, normal(64), normal(64), linear(24, 64)
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd, folded = (variance + EPS).rsqrt(), weight * gamma
    got = rstd * (x @ folded.T - mean * folded.sum(1)) + weight @ beta + bias
    wanted = F.linear(F.layer_norm(x, (64,), gamma, beta, EPS), weight, bias)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


# ---- every call against float64: on a GPU the library itself, elsewhere as torch plays it


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("memory")
    elif refused := cuda_library.refuse_device("cuda", None):
        pytest.skip(refused)
    return str(request.param)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What lies behind the memory that ``torch.empty`` gives: bytes of 255, as in that memory, NaN in every dtype."""
    behind: list[Tensor] = []
    empty = torch.empty

    def guarded(*shape: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        whole = empty(size + 4096, dtype=torch.uint8, device=device).fill_(255)
        behind.append(whole[size:])
        return whole[:size].view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    return behind


def spread(rows: int, columns: int, gap: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """A random matrix whose rows are ``gap`` elements further apart than they are long; NaN lies between them."""
    whole = torch.full((rows, columns + gap), torch.nan, device=device)
    whole[:, :columns] = torch.randn(rows, columns, device=device) * scale
    return whole.to(dtype)[:, :columns]


def near(size: int, device: str, scale: float = 1.0, center: float = 0.0) -> Tensor:
    return torch.randn(size, device=device) * scale + center


Wanted = tuple[Tensor, float, float]  # in float64, with the relative and the absolute error that it may have


def judge(guards: list[Tensor], tile: str, calls: dict[str, tuple[Callable[[], Any], list[Wanted]]]) -> None:
    """Compares each call's results."""
    for name, (call, wanted) in calls.items():
        guards.clear()
        found = call()
        found = found if isinstance(found, tuple) else (found,)
        for got, (exact, rtol, atol) in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                got.double(), exact, rtol=rtol, atol=atol, msg=lambda said, name=name: f"{name}, {tile}: {said}"
            )
        assert guards, name
        assert all(bool((guard == 255).all()) for guard in guards), f"{name}, {tile}: wrote past the end"


def built(
    tile: str, calls: dict[str, Any], epilogues: dict[str, str], dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """The calls whose product has this tile; without a GPU all of them, as no tile is played."""
    return {
        name: call
        for name, call in calls.items()
        if device == "cpu" or tile in cuda_library.tiles(epilogues.get(name, "Norm"), dtype)
    }


# rows, columns, depth; the first ones for the CPU too; with many rows every group of warps has several tiles
PRODUCTS = [(1, 128, 64), (65, 136, 72), (127, 8, 8), (300, 384, 768), (1000, 520, 2304), (1576, 768, 768)]
PRODUCTS += [(20000, 520, 64), (50, 3072, 768), (12608, 3072, 768), (12608, 768, 3072), (16448, 4096, 1024)]
PRODUCTS += [(16448, 1024, 4096), (131, 1664, 6656), (131, 6656, 1664)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", cuda_library.TILES)
def test_products(tile: str, dtype: torch.dtype, device: str, guards: list[Tensor]) -> None:
    half_ulp = 1.01 * torch.finfo(dtype).eps / 2
    for m, n, k in PRODUCTS[: 3 if device == "cpu" else None]:
        x, w = spread(m, k, 8, dtype, device), spread(n, k, 16, dtype, device, k**-0.5)
        source, drop_scale = spread(m, n, 8, dtype, device, 2.0), near(m, device, 0.5, 1.0)
        mean, rstd, sums, bias = near(m, device, 0.5), near(m, device, 0.1, 1.0), near(n, device), near(n, device)
        product = x.double() @ w.double().T
        normed = rstd[:, None].double() * (product - mean[:, None].double() * sums.double()) + bias.double()
        added = source.double() + drop_scale[:, None].double() * (product + bias.double())
        variance, center = torch.var_mean(added, -1, correction=0)
        statistics = [(center, 1e-5, 1e-5), ((variance + EPS).rsqrt(), 1e-4, 0.0)]

        across, u = spread(k, n, 8, dtype, device, k**-0.5), spread(m, n, 8, dtype, device, 2.0)
        du = (x.double() @ across.double()) * quick_gelu_slope(u.double())
        sums_of_du = (du.sum(0), 1e-4, 1e-5 * m**0.5)

        def rounded(exact: Tensor) -> Wanted:
            return exact, half_ulp, 1e-4

        norm_linear = functools.partial(cuda_library.norm_linear, x, w, tile=tile)
        fold = functools.partial(norm_linear, bias=bias, norm=(mean, rstd, sums))
        add = functools.partial(cuda_library.linear_residual, x, w, residual=source, tile=tile)
        scaled = functools.partial(add, bias=bias, drop_scale=drop_scale)
        calls: dict[str, tuple[Callable[[], Any], list[Wanted]]] = {
            "bias": (functools.partial(norm_linear, bias=bias), [rounded(product + bias.double())]),
            "norm": (fold, [rounded(normed)]),
            "quick_gelu": (functools.partial(fold, activation=True), [rounded(quick_gelu(normed))]),
            "kept": (
                functools.partial(fold, activation=True, keep=True),
                [rounded(quick_gelu(normed)), rounded(normed)],
            ),
            "slope": (
                functools.partial(cuda_library.slope, x, across, u, tile=tile),
                [rounded(du), sums_of_du, rounded(quick_gelu(u.double()))],
            ),
            "residual": (scaled, [rounded(added)]),
            "residual alone": (add, [rounded(source.double() + product)]),
            "statistics": (functools.partial(scaled, statistics_eps=EPS), [rounded(added), *statistics]),
        }
        epilogues = {"quick_gelu": "NormGelu", "kept": "NormGeluKept", "slope": "Slope", "residual": "Residual"}
        epilogues |= {"residual alone": "Residual", "statistics": "ResidualStatistics"}
        judge(guards, tile, built(tile, calls, epilogues, dtype, device))


@pytest.mark.gpu
def test_a_call_on_a_stream_and_in_a_graph_gives_the_same_bits() -> None:
    if refused := cuda_library.refuse_device("cuda", None):
        pytest.skip(refused)
    x, w, source = (spread(*size, 0, torch.bfloat16, "cuda", 0.2) for size in ((300, 768), (384, 768), (300, 384)))
    add = functools.partial(cuda_library.linear_residual, x, w, bias=near(384, "cuda"), residual=source)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (direct,) = add()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        (replayed,) = add()
    replayed.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(replayed, direct)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [300, 20_000])
def test_products_in_a_row_give_the_same_bits_as_products_apart(rows: int) -> None:
    """Each kernel starts while the one before it runs, and reads what that one writes, in memory that is used again."""
    if refused := cuda_library.refuse_device("cuda", None):
        pytest.skip(refused)
    x, up, down = (spread(*size, 0, torch.bfloat16, "cuda", 0.05) for size in ((rows, 768), (3072, 768), (768, 3072)))
    sums, bias = up.float().sum(1), near(3072, "cuda")

    def chain(pause: Callable[[], None]) -> list[Tensor]:
        z, mean, rstd = x, x.float().mean(1), torch.ones(rows, device="cuda")
        for _ in range(20):
            (h,) = cuda_library.norm_linear(z, up, bias=bias, norm=(mean, rstd, sums), activation=True)
            pause()
            z, mean, rstd = cuda_library.linear_residual(h, down, residual=z, statistics_eps=EPS)
            pause()
        return [z, mean, rstd]

    apart = chain(torch.cuda.synchronize)
    for _ in range(5):
        for got, wanted in zip(chain(lambda: None), apart, strict=True):
            assert torch.equal(got, wanted)
    assert torch.isfinite(apart[0]).all()


def test_a_call_goes_to_the_device_and_the_stream_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on cuda:1 while cuda:0 is current: the library makes the device current that it is given."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    x = FakeTensor(FakeTensorMode(), torch.empty(4, device="meta"), torch.device("cuda:1"))
    assert cuda_library._place(x) == (1, 101)
