"""How long an X-CLIP should take on a GPU: the launches that it really makes, each over what limits it.

The launches are recorded, not written down: the model runs on meta tensors on a GPU that is not there (``fake_gpu``),
with the backends that such a GPU would choose. A launch reads and writes every tensor that it is given once; its
operations are two for a multiply-add. The ceilings stand in ``GPUS``: measured for an H200, assumed for the others.
docs/kernels.md has the computed times beside measured ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from . import kernels
from .config import VARIANTS
from .kernels.cct_block import plans
from .kernels.fake_gpu import Launch, fake_gpu
from .model import XCLIP


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU's ceilings: what good kernels reach, not what its data sheet says.

    Attributes:
        architecture: compute capability, 90 for 9.0. sms: streaming multiprocessors.
        memory: bytes in a second; assumed: 0.9 of the data sheet's.
        product: bfloat16 operations in a second of a large product, by cuBLAS.
        attention: of attention with 64 channels a head and 200 to 260 rows.
        attention_backward: of its backward.
        launch: seconds of the smallest kernel, in a graph.
    """

    architecture: int
    sms: int
    memory: float
    product: float
    attention: float
    attention_backward: float
    launch: float = 2.5e-6


GPUS = {
    "h100": Gpu(90, 132, 3.0e12, 650e12, 250e12, 200e12),
    # measured in bfloat16 (torch 2.11, Triton 3.6): a copy of 4.3 GB; torch's product of 8192 x 8192 matrices; Triton's
    # attention of 198 rows, and its backward with the fastest tiles. The launch is assumed, as for the others.
    "h200": Gpu(90, 132, 4.27e12, 786e12, 200e12, 235e12),
    "a100": Gpu(80, 108, 1.8e12, 240e12, 140e12, 110e12),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """One launch. ``kind``: "product" (rows, columns and inner are its sizes), "attention" or "pass"."""

    name: str
    kind: str
    moved: int  # bytes
    operations: int = 0
    rows: int = 0
    columns: int = 0
    inner: int = 0

    def seconds(self, gpu: Gpu, *, bare: bool = False) -> float:
        """What limits it. ``bare``: of the product alone, without what rides in its epilogue."""
        moved, rate = self.moved, 1.0
        if self.kind == "product":
            tiles = -(-self.rows // 128) * -(-self.columns // 128)
            rate = gpu.product * tiles / (-(-tiles // gpu.sms) * gpu.sms)  # whole waves of tiles
            if bare:
                moved = 2 * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)
        elif self.kind == "attention":
            backward = any(part in self.name for part in _PRODUCTS)
            rate = gpu.attention_backward if backward else gpu.attention
        return max(moved / gpu.memory, self.operations / rate, gpu.launch)


class Recorder(TorchDispatchMode):
    """While it is open, every launch in order: Triton's, from ``launches``, and torch's.

    Attributes:
        calls: name, tensors and other arguments of each launch, results included.
    """

    FREE: tuple[str, ...] = (
        *("empty", "new_empty", "empty_like", "empty_strided", "view", "_unsafe_view", "slice", "select", "t"),
        *("transpose", "permute", "unbind", "detach", "promote_types", "expand", "unsqueeze", "squeeze", "split"),
        *("alias", "as_strided", "_reshape_alias", "unflatten", "chunk", "split_with_sizes", "lift_fresh"),
    )

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.collect()
        result = function(*args, **(kwargs or {}))
        if function._opname not in self.FREE:
            results = result if isinstance(result, tuple | list) else (result,)
            self._record(function._opname, dict(enumerate([*args, *results])))
        return result

    def _record(self, name: str, given: dict[Any, Any]) -> None:
        # not the tensors themselves: autograd copies a gradient that somebody else holds
        self.calls.append((name, tree_map_only(Tensor, Tensor.detach, given)))

    def collect(self) -> None:
        """Takes over what Triton launched since the last call of torch's."""
        for launch in self.launches:
            self._record(launch.kernel, launch.arguments)
        self.launches.clear()


def work(name: str, given: dict[str, Any]) -> Work:
    """A recorded call as work."""
    tensors = [each for each in given.values() if isinstance(each, Tensor)]
    for value in given.values():
        tensors += [each for each in value if isinstance(each, Tensor)] if isinstance(value, list | tuple) else []
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = tensors[-3:-1]
        rows, columns = a.shape[:-1].numel(), b.shape[-1]
        return _product(name, moved, rows, columns, a.shape[-1])
    if name in ("gemm_kernel", "message_rows_kernel"):
        x = given.get("x_ptr")
        if x is not None:  # the stream, of which the message path reads the class rows
            moved -= (x.numel() - given["M"] * given["K"]) * x.element_size()
        return _product(name, moved, given["M"], given["N"], given["K"])
    if name == "message_attention_kernel":
        rows, width = given["M"], given["K"]
        qkv = _product(name, moved, rows, 3 * width, width)
        return dataclasses.replace(qkv, operations=qkv.operations + 4 * rows * width * given["frames"])
    if "attention" in name:
        products = next((count for part, count in _PRODUCTS.items() if part in name), 2)
        packed = given.get("qkv_ptr")
        if packed is None:  # torch's: queries, keys, values (F, H, S, C); in backward a gradient comes first
            summed = tensors[0].numel() * tensors[1 + ("backward" in name)].shape[-2]
        else:
            summed = packed.numel() // 3 * packed.shape[1]
        return Work(name, "attention", moved, 2 * products * summed)
    return Work(name, "pass", moved)


# how many products of queries and keys a kernel makes: forward 2, backward 5, or 7 in two kernels
_PRODUCTS = {"_dq_": 3, "_dk_dv_": 4, "bwd": 5, "backward": 5}


def _product(name: str, moved: int, rows: int, columns: int, inner: int) -> Work:
    return Work(name, "product", moved, 2 * rows * columns * inner, rows, columns, inner)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What is computed for one model, batch and kind of work, in seconds."""

    variant: str
    batch: int
    training: bool
    plan: str
    launches: int
    seconds: float
    limit: float  # the bare products, and attention
    parts: dict[str, float]


PLANS = {"library": "auto", "triton": "triton"}  # which backend is asked for; attention is the library's


def predict(variant: str, batch: int, gpu: Gpu, *, training: bool = False, plan: str = "library") -> Prediction:
    """Videos against 400 labels that are encoded already, in bfloat16; training: with backward, without the optimizer.

    Args:
        plan: "library": what a GPU for which nothing was measured chooses; "triton": our products.
    """
    calls = record(variant, batch, gpu, training=training, plan=plan)
    parts = {"products": 0.0, "attention": 0.0, "message path": 0.0, "passes": 0.0}
    limit = 0.0
    for each in calls:
        seconds = each.seconds(gpu)
        kind = {"product": "products", "attention": "attention", "pass": "passes"}[each.kind]
        parts["message path" if each.name.startswith("message") else kind] += seconds
        limit += each.seconds(gpu, bare=True) if each.kind != "pass" else 0.0
    return Prediction(variant, batch, training, plan, len(calls), sum(parts.values()), limit, parts)


def record(variant: str, batch: int, gpu: Gpu, *, training: bool = False, plan: str = "library") -> list[Work]:
    """Every launch of a forward, or of a forward and backward, with the arguments of ``predict``."""
    with torch.device("meta"):
        config = VARIANTS[variant]
        model = XCLIP(config).bfloat16().train(training)
        size = config.vision.image_size
        video = torch.empty(batch, config.num_frames, size, size, 3, dtype=torch.uint8)
        labels = torch.empty(400, config.embed_dim, dtype=torch.bfloat16)

    def run() -> None:
        with torch.set_grad_enabled(training):
            logits = model.similarity(model.encode_video(video), labels)
        if training:
            logits.sum().backward()
            model.zero_grad(set_to_none=True)

    library = "cudnn" if gpu.architecture >= 90 else "flash"
    attention = contextlib.nullcontext() if plan == "library" else plans.swap("attention", library)
    with fake_gpu(gpu.architecture, gpu.sms, chooses=True) as launches, kernels.backend(PLANS[plan]), attention:
        run()  # folded weights are kept from here on
        launches.clear()
        with Recorder(launches) as recorder:
            run()
    recorder.collect()
    return [work(name, given) for name, given in recorder.calls]
