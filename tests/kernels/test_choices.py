"""The measured table of backends: how it is read, that it changes nothing where it says nothing, and how it is made.

There is no GPU here: the CPU plays one of compute capability 9.0, and a fake clock the time.
"""

import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from xclip_fast.kernels import cuda_library, dispatch
from xclip_fast.kernels.cct_block import plans
from xclip_fast.kernels.cct_block.products import NORM_LINEAR
from xclip_fast.kernels.common.example import Sizes
from xclip_fast.kernels.dispatch import INTERPRETED, OPS, Op, choices, support, tables
from xclip_fast.kernels.dispatch.parts import PARTS, Case
from xclip_fast.kernels.dispatch.support import Backend
from xclip_fast.kernels.tune import __main__ as tune
from xclip_fast.kernels.tune import backends as tune_backends
from xclip_fast.kernels.tune import measuring
from xclip_fast.kernels.tune import tiles as tune_tiles
from xclip_fast.kernels.tune.shapes import BATCHES, SHAPES

from xclip_fast import info, kernels

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the user's table, of one op. There is no shipped one, and the CPU is an sm_90."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "TABLE", tmp_path / "shipped" / "choices.json")
    monkeypatch.setattr(choices, "architecture", lambda x: 90)
    monkeypatch.setattr(cuda_library, "refuse_device", lambda *_: None)
    tables.forget()

    def write(op: str, *rows: dict[str, Any], shipped: bool = False) -> None:
        path = choices.TABLE if shipped else tables.user_table("choices.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({op: rows}))
        tables.forget()

    yield write
    tables.forget()


def row(*order: str, arch: int = 90, **where: Any) -> dict[str, Any]:
    """A row that names these backends, the fastest first; the file need not be in that order."""
    medians = {name: 0.1 * (place + 1) for place, name in enumerate(order)}
    return {"arch": arch, "where": where, "milliseconds": dict(reversed(medians.items()))}


def kind(m: int = 6, dtype: torch.dtype = torch.bfloat16, training: bool = False, **more: Any) -> Case:
    """A kind of call of a block 64 wide, on the GPU that the CPU plays."""
    given: dict[str, Any] = {
        "device": torch.device("cpu"),
        "dtype": dtype,
        "stream": dtype,
        "sequences": m,
        "length": 5,
    }
    given |= {"rows": 5 * m, "heads": 1, "channels": 64, "width": 64, "hidden": 256, "training": training}
    return Case(**{**given, "forced": kernels.forced_backend(), **more})


def chosen(given: Case, n: int = 192) -> str:
    """The backend of the projection."""
    found = NORM_LINEAR.choose(given, n=n, k=64, activation=0)
    return found if isinstance(found, str) else found.name


# ---- reading


def test_without_a_table_nothing_changes(write: Write) -> None:
    assert chosen(kind()) == "library"
    assert "not measured on this GPU" in (NORM_LINEAR.refusals(kind())["cuda"] or "")


def cuda_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Typical arguments of each op, whose tensors say that they are on cuda:0."""
    mode = FakeTensorMode()

    def on_cuda(arg: Any) -> Any:
        return FakeTensor(mode, arg, torch.device("cuda:0")) if isinstance(arg, Tensor) else arg

    every = info.typical_arguments("meta", dtype)
    return {name: tuple(on_cuda(arg) for arg in args) for name, args in every.items()}


PASSES = {"patch_embed", "layer_norm", "quick_gelu", "cosine_logits"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("installed", [True, False])
def test_nothing_unmeasured_replaces_the_library(
    installed: bool, training: bool, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Hopper without a table: products by cuBLAS, attention by cuDNN, Triton for the passes and the messages."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *_: None)
    for name in ("cudnn", "flash", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", lambda *_: True)
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **o: empty(*a, **{**o, "device": "meta"} if "cuda" in str(o.get("device")) else o),
    )
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "off_gpu", False)
    monkeypatch.setattr(support, "installed", lambda package: installed and package == "triton")
    monkeypatch.setattr(plans, "installed", lambda package: installed and package == "triton")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        arguments = cuda_arguments(dtype)
        for name in PASSES:
            op = OPS[name]
            assert op.choose(arguments[name], training).name == ("triton" if installed else "reference")
        block = kernels.Block(*arguments["cct_block"])
        with torch.set_grad_enabled(training):
            found = plans.plan.__wrapped__(plans.case_of(block, training))
        if not installed:
            assert "triton is not installed" in str(found)
            continue
        assert isinstance(found, plans.Plan)
        attention = "efficient" if dtype == torch.float32 else "cudnn"
        names = [candidate.name for candidate in found if candidate is not None]
        assert names == ["library", "triton", attention, "library", "library", "library"]


def test_a_row_holds_for_its_class_alone(write: Write) -> None:
    write("norm_linear", row("cuda", "library", m=[5, 8], n=[192, 192], dtype=["bfloat16"] * 2, training=[False] * 2))
    assert chosen(kind()) == "cuda"
    assert chosen(kind(8)) == "cuda"
    assert chosen(kind(4)) == "library"
    assert chosen(kind(10)) == "library"
    assert chosen(kind(), n=104) == "library"
    assert chosen(kind(dtype=torch.float16)) == "library"
    assert chosen(kind(training=True)) == "library"


def test_the_fastest_that_takes_the_arguments(write: Write) -> None:
    write("norm_linear", row("triton", "cuda", "library"))
    assert chosen(kind()) == "cuda"  # triton does not run here
    assert chosen(kind(width=100)) == "library"  # and the CUDA library takes multiples of 8
    write("norm_linear", row("library", "cuda"))
    assert chosen(kind()) == "library"
    write("norm_linear", row("cuda", "a backend of another version"))
    assert chosen(kind()) == "cuda"
    write("norm_linear", row("a backend of another version"))
    assert chosen(kind()) == "library"


def test_training_has_rows_of_its_own(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    op, taken = OPS["layer_norm"], []
    for name in ("library", "onednn"):
        played = Backend(name, lambda *args, name=name: taken.append(name) or op.reference(*args))
        monkeypatch.setattr(op, "backends", (played, *op.backends))
    monkeypatch.setattr(op, "names", tuple(each.name for each in op.backends))
    write("layer_norm", row("onednn", training=[True] * 2), row("library", training=[False] * 2))
    x, norm = torch.randn(3, 64), torch.ones(64, requires_grad=True)
    op(x, norm, norm, 1e-5)
    with torch.no_grad():
        op(x, norm, norm, 1e-5)
    op(x, norm.detach(), norm.detach(), 1e-5)
    assert taken == ["onednn", "library", "library"]


def test_other_architectures_and_other_places(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("norm_linear", row("cuda", arch=80), row("cuda", arch=100))
    assert chosen(kind()) == "library"
    write("norm_linear", row("cuda"))
    assert chosen(kind()) == "cuda"
    monkeypatch.setattr(choices, "architecture", lambda x: None)
    assert chosen(kind()) == "library"


def test_the_users_table_comes_before_the_shipped_one(write: Write) -> None:
    write("norm_linear", row("cuda"), shipped=True)
    assert chosen(kind()) == "cuda"
    write("norm_linear", row("library", m=[6, 6]))
    assert chosen(kind()) == "library"
    assert chosen(kind(8)) == "cuda"


def test_what_was_measured_in_another_way_does_not_count(write: Write) -> None:
    write("norm_linear", row("cuda", stream=["bfloat16", "bfloat16"]))
    assert chosen(kind()) == "cuda"
    assert chosen(kind(stream=torch.float32)) == "library"  # as under autocast


def test_what_is_asked_for_wins(write: Write) -> None:
    write("norm_linear", row("cuda", "library"))
    with kernels.backend("library"):
        assert chosen(kind()) == "library"
    with kernels.backend("xformers"):  # which this part does not have: its choice stays automatic
        assert chosen(kind()) == "cuda"
    write("norm_linear", row("library"))
    with kernels.backend("cuda"):
        assert chosen(kind()) == "cuda"


def test_a_trace_does_not_ask(write: Write) -> None:
    write("norm_linear", row("cuda"))
    assert chosen(kind(traced=True)) == "library"


def test_a_plan_is_kept_until_the_tables_change(write: Write) -> None:
    given = kind(interpreted=True, forced="fused", dtype=torch.float16)
    first = plans.plan(given)
    assert plans.plan(given) is first
    write("norm_linear", row("cuda"))
    second = plans.plan(given)
    assert isinstance(first, plans.Plan)
    assert isinstance(second, plans.Plan)
    assert (first.qkv.name, second.qkv.name, second.out.name) == ("library", "cuda", "library")


def test_a_cpu_has_no_architecture() -> None:
    assert choices.architecture(torch.device("cpu")) is None


def test_info_tells_what_is_taken(write: Write) -> None:
    reason = info.collect()["ops"]["  norm_linear"]["cpu"]["backends"]["cuda"]
    assert reason == "dtype torch.float32 is not among torch.bfloat16, torch.float16"  # not that it wants measuring
    write("norm_linear", row("cuda", dtype=["float32"] * 2))
    assert "float32 is not among" in info.collect()["ops"]["  norm_linear"]["cpu"]["backends"]["cuda"]


# ---- making


def test_rows_are_measured_where_the_ops_look_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case of every op lies inside its own row, which bounds all sizes of the op."""
    monkeypatch.setattr(measuring, "DEVICE", "meta")
    ops = set(tune_backends.NAMES) - set(tune_backends.SLOTS)
    assert ops == {name for name, op in OPS.items() if op.sizes is not None}
    for name, shape in itertools.product(sorted(ops), SHAPES.values()):
        cases = list(tune_backends.cases(name, shape, BATCHES))
        assert len({json.dumps(where) for where, _ in cases}) == len(cases) == len(BATCHES)
        for where, args in cases:
            sizes = OPS[name].sizes
            assert sizes is not None
            found = sizes(*args)
            assert set(found) == set(where), name
            assert tables.holds({"where": where}, found), (name, where, found)
    assert set(tune_backends.SLOTS) == {name for name, part in PARTS.items() if len(part.backends) > 1}
    for where, block in tune_backends.blocks(TINY, BATCHES):
        case = plans.case_of(block, False)
        for _, _, own in plans.slots(case).values():
            assert tables.holds({"where": where}, {**case.sizes(), **own, "k": case.width})


TINY = Sizes(width=64, image=16, patch=8, frames=2)
FOREVER = float("inf")
NORM = ["--backends", "--op", "layer_norm", "--batch", "1", "3"]  # 10 and 30 rows


@pytest.fixture
def small(write: Write, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Measuring works on the CPU, with small shapes; the result says how long each backend takes."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")  # it has the clock
    clock: dict[str, float] = {}
    monkeypatch.setattr(measuring, "DEVICE", "cpu")
    monkeypatch.setitem(SHAPES, "B/16", TINY)
    monkeypatch.setattr(measuring, "milliseconds", lambda call: call() and clock[call.args[-1]])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a made-up GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return clock


def give(monkeypatch: pytest.MonkeyPatch, op: Op, *added: Backend) -> None:
    monkeypatch.setattr(op, "backends", (*added, op.backends[-1]))
    monkeypatch.setattr(op, "names", tuple(each.name for each in op.backends))


def test_what_is_measured_is_chosen(small: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    op = OPS["layer_norm"]
    give(monkeypatch, op, Backend("library", op.reference), Backend("onednn", op.reference))
    small.update(reference=0.3, library=0.1, onednn=0.2)
    assert tune.main(NORM) == 0
    path = tables.user_table("choices.json")
    rows = json.loads(path.read_text())["layer_norm"]
    assert len(rows) == 2 * 2  # two heights, with and without gradients
    assert rows[0]["where"] == {"dtype": ["bfloat16"] * 2, "training": [False] * 2, "m": [0, 17], "k": [64, 64]}
    assert rows[0]["milliseconds"] == {"library": 0.1, "onednn": 0.2, "reference": 0.3}
    assert rows[0]["measured"]["device"] == "a made-up GPU"
    assert set(rows[0]["measured"]) == {"device", "torch", "triton", "library", "date"}
    assert "library 0.1000 ms, onednn 0.2000 ms" in capsys.readouterr().out
    args = next(tune_backends.cases("layer_norm", TINY, (1,)))[1]
    half = tune_backends.cast(args, torch.bfloat16)
    assert op.choose(half).name == "library"
    small.update(library=0.5)
    assert tune.main(NORM) == 0  # measured anew: in place of the old rows
    assert len(json.loads(path.read_text())["layer_norm"]) == 4
    assert op.choose(half).name == "onednn"
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]  # nothing half-written is left


def wrong_forward(x: Tensor, *rest: Any) -> Tensor:
    y: Tensor = OPS["layer_norm"].reference(x, *rest)
    return torch.cat([y[:-1], 1.1 * y[-1:]])  # one row


def wrong_gradient(x: Tensor, *rest: Any) -> Tensor:
    y: Tensor = OPS["layer_norm"].reference(x, *rest)
    return 1.1 * y - 0.1 * y.detach()


def nan(x: Tensor, *rest: Any) -> Tensor:
    return OPS["layer_norm"].reference(x, *rest).index_fill(0, torch.tensor([1]), torch.nan)


def failing(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nand more")


@pytest.mark.parametrize(
    ("forward", "left_out"),
    [(wrong_forward, {False, True}), (wrong_gradient, {True}), (nan, {False, True}), (failing, {False, True})],
)
def test_what_is_wrong_is_left_out(
    forward: Any, left_out: set[bool], small: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    give(monkeypatch, OPS["layer_norm"], Backend("library", forward))
    small.update(reference=0.3, library=0.1)
    code = tune.main(NORM)
    said = capsys.readouterr()
    for found in json.loads(tables.user_table("choices.json").read_text())["layer_norm"]:
        assert ("library" not in found["milliseconds"]) == (found["where"]["training"][0] in left_out)
        assert "reference" in found["milliseconds"]
    if forward is failing:
        assert code == 0
        assert "library does not run: no kernel image is available\n" in said.out
    else:
        assert code == 1
        assert "library COMPUTES SOMETHING ELSE" in said.out
        assert f"{2 * len(left_out)} backends or tiles" in said.err


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, xclip-fast tune measures them")
@pytest.mark.parametrize("part", sorted(tune_backends.SLOTS))
def test_every_part_can_be_measured(part: str, small: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In its place in a block."""
    monkeypatch.setattr(measuring, "DTYPE", torch.float16)
    monkeypatch.setattr(cuda_library, "refuse_device", lambda *_: "no such device")
    small.update(dict.fromkeys(kernels.dispatch.backends(), 1.0))
    said: list[str] = []
    rows, wrong = measuring.measure(tune_backends, part, TINY, (1,), FOREVER, said.append)
    assert (wrong, len(rows)) == (0, 2 * len(tune_backends.SLOTS[part]))
    wanted = {"triton", "reference"} if part == "attention" else {"library", "triton"}
    assert all(set(found["milliseconds"]) == wanted for found in rows)
    assert any("cuda refuses" in line for line in said) == ("cuda" in PARTS[part].names)


@pytest.mark.parametrize("op", sorted({*tune_backends.NAMES} - {*tune_backends.SLOTS}))
def test_every_op_can_be_measured(op: str, small: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels too, where its interpreter runs them: in float16, because bfloat16 comes out wrong there."""
    monkeypatch.setattr(measuring, "DTYPE", torch.float16)
    monkeypatch.setattr(cuda_library, "refuse_device", lambda *_: "no such device")
    small.update(dict.fromkeys(kernels.dispatch.backends(), 1.0))
    said: list[str] = []
    rows, wrong = measuring.measure(tune_backends, op, TINY, (1, 3), FOREVER, said.append)
    assert (wrong, len(rows)) == (0, 2 * 2)
    usable = set(OPS[op].names) - {"cuda"} - (set() if INTERPRETED else {"triton"})
    assert all(set(found["milliseconds"]) == usable for found in rows)
    assert any("cuda refuses: no such device" in line for line in said) == ("cuda" in OPS[op].names)


def test_measuring_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--backends"]) == 1
    assert "measures on a GPU" in capsys.readouterr().err


def test_an_op_of_the_other_table_is_an_error(small: dict[str, float], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--backends", "--op", "gemm"])
    assert "--op gemm is measured without --backends" in capsys.readouterr().err


class Clock:
    """A time of its own, which each timing moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, seconds: float) -> None:
        self.now, self.timings, self.seconds = 0.0, 0, seconds
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "milliseconds", self.measured)

    def measured(self, call: Callable[[], Any]) -> float:
        self.now += self.seconds
        self.timings += 1
        return 1.0


def test_measuring_ends_in_time(small: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each op has its share; what was measured until then is written, and what was not is said."""
    for op in (OPS["patch_embed"], OPS["layer_norm"]):
        give(monkeypatch, op, Backend("library", op.reference))
    clock = Clock(monkeypatch, measuring, seconds=1)
    arguments = ["--backends", "--op", "patch_embed", "--op", "layer_norm", "--batch", "1", "2", "3"]
    assert tune.main([*arguments, "--seconds", "6"]) == 0
    assert clock.now <= 7
    table = json.loads(tables.user_table("choices.json").read_text())
    assert {name: len(rows) > 0 for name, rows in table.items()} == {"patch_embed": True, "layer_norm": True}
    assert "the time is over" in capsys.readouterr().out
    clock.now, before = 0.0, table
    assert tune.main(["--backends", "--op", "layer_norm", "--seconds", "0"]) == 0
    assert json.loads(tables.user_table("choices.json").read_text()) == before


def test_no_memory_for_the_reference_is_said(
    small: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def contest(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune_backends, "_contest", contest)
    assert tune.main(NORM) == 0
    assert "is not measured: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU make gpu-check measures")
@pytest.mark.parametrize("op", sorted(tune_tiles.WORK))
def test_every_tile_table_can_be_measured(op: str, small: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, in float16: each tile's result is compared with torch's, and a wrong one left out."""
    shape, taken = Sizes(width=64, image=64, patch=8, frames=1), 0.0

    def measured(call: Callable[[], Any]) -> float:
        nonlocal taken
        taken -= 1  # the last is the fastest
        return taken

    monkeypatch.setattr(measuring, "DTYPE", torch.float16)
    monkeypatch.setattr(choices, "architecture", lambda x: None)  # tiles are looked for under the interpreter's
    monkeypatch.setattr(tune_tiles, "TRIED", 2)
    monkeypatch.setattr(measuring, "milliseconds", measured)
    said: list[str] = []
    rows, wrong = measuring.measure(tune_tiles, op, shape, (1,), FOREVER, said.append)
    assert (wrong, len(rows)) == (0, 4 if op == "gemm" else 1), said
    tune.merge(tables.user_table("tiles.json"), {op: rows})
    launching = importlib.import_module("xclip_fast.kernels.triton.launching")
    tables.forget()
    for found in rows:
        sizes = {name: bounds[0] for name, bounds in found["where"].items()}
        assert launching.tile(op, torch.device("cpu"), **sizes) == found["use"]
    tables.forget()
    right = tune_tiles._right
    monkeypatch.setattr(tune_tiles, "_right", lambda *given, **options: 2 * right(*given, **options))
    monkeypatch.setattr(tune_tiles, "attention_reference", lambda qkv: 2 * qkv[:, :, 0])
    rows, wrong = measuring.measure(tune_tiles, op, shape, (1,), FOREVER, said.append)
    assert rows == []
    assert wrong == (8 if op == "gemm" else 2)
    assert measuring.measure(tune_tiles, op, shape, (1,), time.monotonic(), said.append) == ([], 0)
    assert "the time is over" in said[-1]
