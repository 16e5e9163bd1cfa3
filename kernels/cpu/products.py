"""Products of inference on a CPU with LayerNorm, activation and residual around them, on the fastest library there is.

That is the one of csrc/cpu. For what it does not take, and where it was not built, oneDNN multiplies if the CPU has
AVX-512, or instructions for the half-precision dtype, and else torch's own choice (docs/performance.md). There
quick_gelu is torch's SiLU, since u sigmoid(1.702 u) = silu(1.702 u) / 1.702: the LayerNorm before the first product
carries the factor, and the second product carries its inverse.

F frames, L rows of a frame, M rows, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.block import GELUS, Block, first_rows
from ..dispatch import forced_backend
from ..linear import NATIVE_ON_CPU
from ..quick_gelu import SLOPE
from . import buffers, library

Norm = tuple[Any, Any, float]  # weight, bias, eps of a LayerNorm; Any: a block's parameters are optional
_pointwise: Any = torch.ops.mkldnn._linear_pointwise


class Products:
    """Products in the dtype that this CPU computes ``given`` in.

    Attributes:
        dtype: of x and the results; float32 for a half-precision dtype without instructions.
        library: the functions of this package's library for this dtype, or None.
        onednn: whether oneDNN multiplies what the library does not take.
    """

    def __init__(self, given: torch.dtype) -> None:
        forced = forced_backend() == "onednn"
        native = NATIVE_ON_CPU.get(given, True)
        if given == torch.float16 and not forced and library.functions(torch.float32) is not None:
            native = torch.cpu._is_amx_fp16_supported()  # without AMX, oneDNN's float16 is no faster than float32
        self.dtype = given if native else torch.float32
        self.library = None if forced else library.functions(self.dtype)
        wide = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
        self.onednn = forced or NATIVE_ON_CPU.get(self.dtype, wide)

    def library_takes(self, *weights: Tensor) -> bool:
        """Whether the library multiplies with these."""
        return self.library is not None and library.takes(self.dtype, *weights)

    def takes_block(self, b: Block) -> bool:
        """Whether the library computes this block as a whole."""
        if self.library is None or b.x.dim() != 3 or b.activation != "quick_gelu" or b.causal:
            return False
        if b.bias is not None or b.offsets is not None or not (b.rows is None or b.rows.equal(first_rows(b.x))):
            return False
        weights: list[Any] = [b.in_weight, b.out_weight, b.fc_weight, b.projection_weight]
        if b.frames:
            weights += [b.message_fc_weight, b.message_in_weight, b.message_out_weight]
        return b.x.shape[-1] // b.heads % self.library.unit == 0 and self.library_takes(*weights)

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Any,
        *,
        norm: Norm | None = None,
        last: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        name: str = "",
    ) -> Tensor:
        """LN(x) W^T + b + residual.

        Args:
            x: (M, I), or (F, L, I) of any strides.
            weight: (O, I). bias: (O,).
            norm: weight, bias and eps of LN; None: no LN.
            last: (F, I), in place of the last row of each frame of ``x``.
            residual: as many rows of O as ``x`` has, (M, O) or (F, L, O).
            out: like ``residual``, overwritten with the result; it may be ``residual``.
            name: of the buffer for the result if ``out`` is None; "": new memory.

        Returns:
            ``out``, or (M, O).
        """
        columns, width, count = len(weight), x.shape[-1], x.numel() // x.shape[-1] if x.numel() else 0
        if x.numel() == 0:
            return x.new_empty(0, columns) if out is None else out
        if not self.library_takes(weight):
            y = self._plain(_normed(x, norm, last), weight, bias, name)
            if residual is None:
                return y
            return torch.add(residual, y.view(residual.shape), out=out)
        y = out if self._is_direct(out) else buffers.take(name, count, columns, self.dtype)
        library.product(
            count,
            self._panels("panels", count, width),
            weight,
            self._vector(bias),
            x=_beside(x),
            norm=self._vectors(norm),
            last=last,
            y=y,
            residual=None if residual is None else _beside(residual),
        )
        return y if out is None or y is out else out.copy_(y.view(out.shape))

    def attention(self, qkv: Tensor, queries: int) -> Tensor:
        """Attention of the first ``queries`` rows of each frame, (F, S, 3, H, C) to (F, queries, H C)."""
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query[:, :, :queries], key, value).transpose(1, 2).flatten(2)

    def mlp(
        self,
        x: Tensor,
        norm: Norm,
        fc: Sequence[Tensor],
        projection: Sequence[Tensor],
        activation: str,
        out: Tensor,
    ) -> Tensor:
        """x + W2 act(W1 LN(x) + b1) + b2: (M, D) or (F, L, D), written to ``out``, which may be of a narrower dtype."""
        (hidden, width), count = fc[0].shape, x.numel() // x.shape[-1]
        if self.library_takes(fc[0], projection[0]):
            x = _beside(x)
            y = out if self._is_direct(out) else torch.empty_like(x, memory_format=torch.contiguous_format)
            panels, ln = self._panels("panels", count, width), self._vectors(norm)
            first, second = (fc[0], self._vector(fc[1])), (projection[0], self._vector(projection[1]))
            if activation == "quick_gelu":
                inner = self._panels("wide", count, hidden)
                library.product(count, panels, *first, x=x, norm=ln, y_panels=inner)
                library.product(count, inner, *second, y=y, residual=x)
            else:
                rows = buffers.take("wide", count, hidden, self.dtype)
                library.product(count, panels, *first, x=x, norm=ln, y=rows)
                torch.ops.aten.gelu_(rows, approximate=GELUS[activation])
                library.product(count, self._panels("inner", count, hidden), *second, x=rows, y=y, residual=x)
            return y if y is out else out.copy_(y)
        scale = SLOPE if activation == "quick_gelu" else 1.0
        at_least = torch.promote_types(self.dtype, torch.float32)  # the scaled vectors are not rounded once more
        normed = _normed(x, (norm[0].to(at_least) * scale, norm[1].to(at_least) * scale, norm[2]))
        bias = (fc[1].to(at_least) * scale).to(self.dtype)
        inner = self._plain(normed, fc[0], bias, "wide", activation)
        y = self._plain(inner, projection[0], projection[1], "product", alpha=1 / scale)
        return torch.add(x, y.view(x.shape), out=out)

    def _vector(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous()

    def _vectors(self, norm: Norm | None) -> Norm | None:
        return None if norm is None else (self._vector(norm[0]), self._vector(norm[1]), norm[2])

    def _panels(self, name: str, rows: int, width: int) -> Tensor:
        return buffers.take(name, 1, library.panel_size(rows, width, self.dtype), self.dtype)

    def _is_direct(self, out: Tensor | None) -> TypeGuard[Tensor]:
        """Whether the library can write to ``out`` itself."""
        return out is not None and out.dtype == self.dtype and out.stride(-1) == 1

    def _plain(
        self, x: Tensor, weight: Tensor, bias: Tensor, name: str, activation: str = "", alpha: float = 1.0
    ) -> Tensor:
        """act(alpha x W^T + b) by oneDNN or by torch's own choice: (M, I) to (M, O). act is SiLU for "quick_gelu"."""
        weight = weight.to(self.dtype)
        if self.onednn:
            attribute = "gelu" if activation in GELUS else "swish" if activation else "none"
            y = _pointwise(x, weight, (bias / alpha).to(x.dtype), attribute, [], GELUS.get(activation, ""))
            return y if alpha == 1.0 else y.mul_(alpha)
        y = buffers.take(name, len(x), len(weight), x.dtype)
        torch.addmm(bias.to(x.dtype), x, weight.T, alpha=alpha, out=y)
        if activation in GELUS:
            return torch.ops.aten.gelu_(y, approximate=GELUS[activation])
        return F.silu(y, inplace=True) if activation else y


def _normed(x: Tensor, norm: Norm | None, last: Tensor | None = None) -> Tensor:
    """LN(x) with ``last`` in place of each frame's last row, as (M, I)."""
    width = x.shape[-1:]
    if norm is not None:
        weight, bias, eps = norm[0].to(x.dtype), norm[1].to(x.dtype), norm[2]
        x = F.layer_norm(x, width, weight, bias, eps)
        if last is not None:
            x[:, -1] = F.layer_norm(last, width, weight, bias, eps)
    return x.reshape(-1, *width)


def _beside(x: Tensor) -> Tensor:
    """x with neighboring columns."""
    return x if x.stride(-1) == 1 else x.contiguous()
