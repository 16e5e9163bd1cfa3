"""The measured table of backends: how it is read, that it changes nothing where it says nothing, and how it is made.

There is no GPU here: the CPU plays one of compute capability 9.0, and a fake clock the time.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from xclip_fast.kernels import _choices, _cuda, _dispatch, _tables, tune, tune_backends
from xclip_fast.kernels._dispatch import INTERPRETED, OPS, Backend, Op

from xclip_fast import info, kernels

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the user's table, of one op. There is no shipped one, and the CPU is an sm_90."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_choices, "TABLE", tmp_path / "shipped" / "choices.json")
    monkeypatch.setattr(_choices, "architecture", lambda x: 90)
    monkeypatch.setattr(_cuda, "refuse_device", lambda *_: None)
    _choices.forget()

    def write(op: str, *rows: dict[str, Any], shipped: bool = False) -> None:
        path = _choices.TABLE if shipped else _tables.user_table("choices.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({op: rows}))
        _choices.forget()

    yield write
    _choices.forget()


def row(*order: str, arch: int = 90, **where: Any) -> dict[str, Any]:
    """A row that names these backends, the fastest first; the file need not be in that order."""
    medians = {name: 0.1 * (place + 1) for place, name in enumerate(order)}
    return {"arch": arch, "where": where, "milliseconds": dict(reversed(medians.items()))}


def ln_linear(m: int = 6, dtype: torch.dtype = torch.bfloat16, grad: bool = False, n: int = 96) -> tuple[Any, ...]:
    x, norm, weight = (torch.randn(*shape, dtype=dtype) for shape in ((2, m // 2, 64), (64,), (n, 64)))
    return x, norm, norm, weight.requires_grad_(grad), None, 1e-5, False


def chosen(*args: Any, op: str = "ln_linear", **options: Any) -> str:
    return OPS[op].choose(args, **options).name


# ---- reading


def test_without_a_table_nothing_changes(write: Write) -> None:
    assert chosen(*ln_linear()) == "reference"
    cuda = next(each for each in OPS["ln_linear"].backends if each.name == "cuda")
    assert "not measured here" in (OPS["ln_linear"].refusal(cuda, ln_linear()) or "")


def cuda_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Typical arguments of each op, whose tensors say that they are on cuda:0."""
    mode = FakeTensorMode()

    def on_cuda(arg: Any) -> Any:
        return FakeTensor(mode, arg, torch.device("cuda:0")) if isinstance(arg, Tensor) else arg

    every = info.typical_arguments("meta", dtype)
    return {name: tuple(on_cuda(arg) for arg in args) for name, args in every.items()}


LIBRARY = {
    "ln_linear": "library",
    "linear_residual": "library",
    "mlp": "library",
    "diffusion_attention": "sdpa",
}
PASSES = {"message_kv", "patch_embed", "layer_norm", "quick_gelu", "cosine_logits", "causal_attention_packed"}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("installed", [True, False])
def test_nothing_unmeasured_replaces_the_library(
    installed: bool, trained: bool, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Hopper without a table: products by cuBLAS, attention by torch's choice, Triton for the passes alone."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setattr(_dispatch, "_INSTALLED", {"triton"} if installed else set())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        arguments = cuda_arguments(dtype)
        found = {name: chosen(*args, op=name, trained=trained) for name, args in arguments.items() if "fp8" not in name}
        wanted = LIBRARY | dict.fromkeys(PASSES, "triton")
        if dtype == torch.float32:
            wanted |= {"message_kv": "reference", "causal_attention_packed": "sdpa"}
        if not installed:
            wanted = dict.fromkeys(found, "reference") | {
                name: "sdpa" for name in ("diffusion_attention", "causal_attention_packed")
            }
        assert found == wanted, dtype
    if installed:  # a measurement says otherwise
        write("ln_linear", row("triton", "library"))
        assert chosen(*arguments["ln_linear"]) == "library"  # float32
        assert chosen(*cuda_arguments(torch.bfloat16)["ln_linear"]) == "triton"


def test_a_row_holds_for_its_class_alone(write: Write) -> None:
    write("ln_linear", row("cuda", "reference", m=[5, 8], n=[96, 96], dtype=["bfloat16"] * 2, training=[False] * 2))
    assert chosen(*ln_linear()) == "cuda"
    assert chosen(*ln_linear(8)) == "cuda"
    assert chosen(*ln_linear(4)) == "reference"
    assert chosen(*ln_linear(10)) == "reference"
    assert chosen(*ln_linear(n=104)) == "reference"
    assert chosen(*ln_linear(dtype=torch.float16)) == "reference"
    assert chosen(*ln_linear(), trained=True) == "reference"


def test_the_fastest_that_takes_the_arguments(write: Write) -> None:
    write("ln_linear", row("triton", "cuda", "reference"))
    assert chosen(*ln_linear()) == "cuda"  # triton does not run here
    assert chosen(*ln_linear(n=97)) == "reference"  # and the library takes multiples of 8
    write("ln_linear", row("reference", "cuda"))
    assert chosen(*ln_linear()) == "reference"
    write("ln_linear", row("cuda", "a backend of another version"))
    assert chosen(*ln_linear()) == "cuda"
    write("ln_linear", row("a backend of another version"))
    assert chosen(*ln_linear()) == "reference"


def test_training_has_rows_of_its_own(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    op, taken = OPS["layer_norm"], []
    for name in ("library", "apex"):
        played = Backend(name, lambda *args, name=name: taken.append(name) or op.reference(*args))
        monkeypatch.setattr(op, "backends", (played, *op.backends))
    monkeypatch.setattr(op, "names", tuple(each.name for each in op.backends))
    write("layer_norm", row("apex", training=[True] * 2), row("library", training=[False] * 2))
    x, norm = torch.randn(3, 64), torch.ones(64, requires_grad=True)
    op(x, norm, norm, 1e-5)
    with torch.no_grad():
        op(x, norm, norm, 1e-5)
    op(x, norm.detach(), norm.detach(), 1e-5)
    assert taken == ["apex", "library", "library"]


def test_other_architectures_and_other_places(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("ln_linear", row("cuda", arch=80), row("cuda", arch=100))
    assert chosen(*ln_linear()) == "reference"
    write("ln_linear", row("cuda"))
    assert chosen(*ln_linear()) == "cuda"
    monkeypatch.setattr(_choices, "architecture", lambda x: None)
    assert chosen(*ln_linear()) == "reference"


def test_the_users_table_comes_before_the_shipped_one(write: Write) -> None:
    write("ln_linear", row("cuda"), shipped=True)
    assert chosen(*ln_linear()) == "cuda"
    write("ln_linear", row("reference", m=[6, 6]))
    assert chosen(*ln_linear()) == "reference"
    assert chosen(*ln_linear(8)) == "cuda"


def test_what_was_measured_in_another_way_does_not_count(write: Write) -> None:
    write("ln_linear", row("cuda"))
    half = ln_linear()
    assert chosen(half[0].float(), *half[1:]) == "reference"  # a float32 residual stream
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(*half) == "reference"


def test_what_is_asked_for_wins(write: Write) -> None:
    write("ln_linear", row("cuda", "reference"))
    with kernels.backend("reference"):
        assert chosen(*ln_linear()) == "reference"
    with kernels.backend("sdpa"):  # which this op has not: its choice stays automatic
        assert chosen(*ln_linear()) == "cuda"
    write("ln_linear", row("reference"))
    with kernels.backend("cuda"):
        assert chosen(*ln_linear()) == "cuda"


def test_a_trace_does_not_ask(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("ln_linear", row("cuda"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(*ln_linear()) == "reference"


def test_a_graph_that_saves_for_backward_gets_a_kernel(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the table says that torch's own calls are faster: the registered op has no other backward."""
    write("ln_linear", row("reference", "cuda"))
    assert chosen(*ln_linear(), trained=True) == "reference"
    assert chosen(*ln_linear(), trained=True, kernels=True) == "cuda"
    op, asked = OPS["ln_linear"], []
    real = op.choose
    monkeypatch.setattr(Op, "choose", lambda self, *args, **options: asked.append(options) or real(*args, **options))
    monkeypatch.setattr(_cuda, "norm_linear", lambda x, weight, *_, **__: (x.new_zeros(len(x), len(weight)), None))
    monkeypatch.setattr(_cuda, "row_statistics", lambda x, eps: (x[:, 0].float(), x[:, 0].float()))
    for name in ("norm_linear", "row_statistics"):
        monkeypatch.setattr(f"xclip_fast.kernels._cuda_ops.{name}", getattr(_cuda, name))
    y, *saved = op.registered_saving(*ln_linear(grad=True))
    y.backward(torch.ones_like(y))
    assert asked == [{"trained": True, "kernels": True}] * 2
    assert len(saved) == 2


def test_a_cpu_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No size is taken where nothing was measured."""
    op = OPS["ln_linear"]
    monkeypatch.setattr(op, "sizes", lambda *_: pytest.fail("sizes were asked for"))
    assert op.measured(ln_linear()) == ()
    assert _choices.architecture(torch.zeros(1)) is None


def test_info_tells_what_is_taken(write: Write) -> None:
    write("mlp", row("cuda", dtype=["float32"] * 2))
    assert "not measured here" in info.collect()["ops"]["ln_linear"]["cpu"]["backends"]["cuda"]
    assert "float32 is not bfloat16" in info.collect()["ops"]["mlp"]["cpu"]["backends"]["cuda"]


def test_tiles_of_the_library(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int] = []
    monkeypatch.setattr(_cuda, "_call", lambda name, dtype, tile, *rest: tiles.append(tile))
    monkeypatch.setattr(_cuda, "_place", lambda x: (0, None))
    x, weight = torch.zeros(8, 64, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16)
    y = torch.zeros(8, 16, dtype=torch.bfloat16)

    def calls(**options: Any) -> list[str]:
        tiles.clear()
        _cuda.norm_linear(x, weight, **options)
        _cuda.norm_linear(x, weight, activation=True, **options)
        _cuda.linear_residual(x, weight, None, y, **options)
        _cuda.linear_slope(x, weight, y, **options)
        names = {number: name for name, number in _cuda.TILES.items()}
        return [names[tile] for tile in tiles]

    assert calls() == ["auto"] * 4
    sizes = {"m": [1, 8], "n": [16, 16], "k": [64, 64]}
    write("cuda norm_linear", row("square", "small", activation=[1, 1], **sizes))
    assert calls() == ["auto", "square", "auto", "auto"]
    assert calls(tile="small") == ["small"] * 4
    write("cuda linear_residual", row("wide", **sizes))
    assert calls() == ["auto", "auto", "wide", "auto"]
    write("cuda linear_slope", row("small", **{**sizes, "m": [9, 99]}))
    assert calls() == ["auto"] * 4


# ---- making


def test_rows_are_measured_where_the_ops_look_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case of every op lies inside its own row, which bounds all sizes of the op."""
    monkeypatch.setattr(tune_backends, "DEVICE", "meta")
    assert set(tune_backends.WORK) == {name for name, op in OPS.items() if op.sizes is not None}
    for name, work in tune_backends.WORK.items():
        cases = list(work())
        assert len({json.dumps(where) for where, _ in cases}) == len(cases) >= 12
        for where, args in cases:
            sizes = OPS[name].sizes
            assert sizes is not None
            found = sizes(*args)
            assert set(found) == set(where), name
            assert _tables.holds({"where": where}, found), (name, where, found)


@pytest.fixture
def small(write: Write, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Measuring works on the CPU, with small shapes; the result says how long each backend takes."""
    clock: dict[str, float] = {}
    for name, value in {"DEVICE": "cpu", "WIDTHS": (64,), "ROWS": (4, 16), "FRAMES": (8,), "LENGTHS": (5,)}.items():
        monkeypatch.setattr(tune_backends, name, value)
    for name, value in {"VIDEO_FRAMES": (8,), "IMAGES": ((16, 8),), "DTYPES": (torch.bfloat16,)}.items():
        monkeypatch.setattr(tune_backends, name, value)
    monkeypatch.setattr(tune_backends, "milliseconds", lambda call: call() and clock[call.args[-1]])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a made-up GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return clock


def give(monkeypatch: pytest.MonkeyPatch, op: Op, *added: Backend) -> None:
    monkeypatch.setattr(op, "backends", (*added, op.backends[-1]))
    monkeypatch.setattr(op, "names", tuple(each.name for each in op.backends))


def test_what_is_measured_is_chosen(small: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    op = OPS["mlp"]
    give(monkeypatch, op, Backend("library", op.reference), Backend("apex", op.reference))
    small.update(reference=0.3, library=0.1, apex=0.2)
    assert tune.main(["--backends", "--op", "mlp"]) == 0
    path = _tables.user_table("choices.json")
    rows = json.loads(path.read_text())["mlp"]
    assert len(rows) == 2 * 2  # two heights, with and without gradients
    assert rows[0]["where"] == {"dtype": ["bfloat16"] * 2, "training": [False] * 2, "m": [0, 8], "k": [64, 64]}
    assert rows[0]["milliseconds"] == {"library": 0.1, "apex": 0.2, "reference": 0.3}
    assert rows[0]["measured"]["device"] == "a made-up GPU"
    assert set(rows[0]["measured"]) == {"device", "torch", "triton", "library", "date"}
    assert "library 0.1000 ms, apex 0.2000 ms" in capsys.readouterr().out
    args = next(tune_backends._mlp())[1]
    half = tune_backends._cast(args, torch.bfloat16)
    assert chosen(*half, op="mlp") == "library"
    small.update(library=0.5)
    assert tune.main(["--backends", "--op", "mlp"]) == 0  # measured anew: in place of the old rows
    assert len(json.loads(path.read_text())["mlp"]) == 4
    assert chosen(*half, op="mlp") == "apex"
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]  # nothing half-written is left


def wrong_forward(x: Tensor, *rest: Any) -> Tensor:
    y: Tensor = OPS["mlp"].reference(x, *rest)
    return torch.cat([y[:-1], 1.1 * y[-1:]])  # one row


def wrong_gradient(x: Tensor, *rest: Any) -> Tensor:
    y: Tensor = OPS["mlp"].reference(x, *rest)
    return 1.1 * y - 0.1 * y.detach()


def nan(x: Tensor, *rest: Any) -> Tensor:
    return OPS["mlp"].reference(x, *rest).index_fill(0, torch.tensor([1]), torch.nan)


def failing(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nand more")


@pytest.mark.parametrize(
    ("forward", "left_out"),
    [(wrong_forward, {False, True}), (wrong_gradient, {True}), (nan, {False, True}), (failing, {False, True})],
)
def test_what_is_wrong_is_left_out(
    forward: Any, left_out: set[bool], small: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    give(monkeypatch, OPS["mlp"], Backend("library", forward))
    small.update(reference=0.3, library=0.1)
    code = tune.main(["--backends", "--op", "mlp"])
    said = capsys.readouterr()
    for found in json.loads(_tables.user_table("choices.json").read_text())["mlp"]:
        assert ("library" not in found["milliseconds"]) == (found["where"]["training"][0] in left_out)
        assert "reference" in found["milliseconds"]
    if forward is failing:
        assert code == 0
        assert "library does not run: no kernel image is available\n" in said.out
    else:
        assert code == 1
        assert "library COMPUTES SOMETHING ELSE" in said.out
        assert f"{2 * len(left_out)} backends or tiles" in said.err


@pytest.mark.parametrize("op", sorted(tune_backends.WORK))
def test_every_op_can_be_measured(op: str, small: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels too, where its interpreter runs them: in float16, because bfloat16 comes out wrong there."""
    monkeypatch.setattr(tune_backends, "DTYPES", (torch.float16,))
    monkeypatch.setattr(_cuda, "refuse_device", lambda *_: "no such device")
    small.update(dict.fromkeys(kernels._dispatch.BACKENDS, 1.0))
    said: list[str] = []
    rows, wrong = tune_backends.measure(op, said.append)
    assert (wrong, len(rows)) == (0, 2 * len(list(tune_backends.WORK[op]())))
    usable = set(OPS[op].names) - {"cuda"} - (set() if INTERPRETED else {"triton"})
    assert all(set(found["milliseconds"]) == usable for found in rows)
    assert any("cuda refuses: no such device" in line for line in said) == ("cuda" in OPS[op].names)


@pytest.mark.parametrize("name", sorted(tune_backends.TILE_WORK))
def test_every_product_can_be_measured(name: str, small: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    small.update(small=0.2, square=0.1)
    exact: dict[str, Callable[..., Tensor]] = {
        "norm_linear": lambda x, w, b, activation=False, tile="": (
            (kernels.quick_gelu if activation else lambda u: u)(x @ w.T + b),
            None,
        ),
        "linear_residual": lambda x, w, b, residual, tile="": residual + x @ w.T + b,
        "linear_slope": lambda x, w, u, tile="": (tune_backends._slope_exactly(x, w, u)[0], None),
    }
    call = name.removeprefix("cuda ")

    def product(*args: Any, **options: Any) -> Any:
        if options["tile"] == "wide":
            raise RuntimeError("this product was not built with this tile")
        result = exact[call](*args, **options)
        return (
            result
            if options["tile"] == "square"
            else torch.utils._pytree.tree_map_only(Tensor, lambda y: y * wrong, result)
        )

    monkeypatch.setattr(_cuda, call, product)
    for wrong, kept in ((1.0, {"small", "square"}), (1.2, {"square"})):
        rows, count = tune_backends.measure(name, lambda line: None)
        assert count == (0 if wrong == 1.0 else len(rows))
        assert rows
        assert all(set(found["milliseconds"]) == kept for found in rows)
        assert {"m", "n", "k", "dtype"} <= set(rows[0]["where"])


def test_measuring_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--backends"]) == 1
    assert "measures on a GPU" in capsys.readouterr().err


def test_an_op_of_the_other_table_is_an_error(small: dict[str, float], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--backends", "--op", "gemm"])
    assert "--op gemm is measured without --backends" in capsys.readouterr().err
