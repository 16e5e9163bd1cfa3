"""Float32 products on a CPU: the library of csrc/cpu, MKL and oneDNN.

    OMP_NUM_THREADS=2 pytest benchmarks/ops/test_cpu_products.py -n 0 --benchmark-only --no-cov

B/32's rows of 8 frames, its 8 messages, and B/16's rows. Eight weights follow one another, as those of a model do.
"""

import pytest
import torch
import torch.nn.functional as F

from xclip_fast import kernels

WAYS = {
    "ours": kernels.cpu.linear,
    "mkl": F.linear,
    "onednn": lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""),
}


@pytest.mark.parametrize("rows", [8, 408, 1584])
@pytest.mark.parametrize(("inner", "columns"), [(768, 2304), (768, 768), (768, 3072), (3072, 768)])
@pytest.mark.parametrize("way", WAYS)
def test_product(benchmark, way, inner, columns, rows):
    torch.manual_seed(0)
    x, bias = torch.randn(rows, inner), torch.randn(columns)
    weights = [torch.randn(columns, inner) * inner**-0.5 for _ in range(8)]
    with torch.inference_mode():
        assert torch.allclose(WAYS[way](x, weights[0], bias), F.linear(x, weights[0], bias), atol=1e-4)
        benchmark.group = f"{rows} x {inner} to {columns}"
        benchmark.pedantic(lambda: [WAYS[way](x, weight, bias) for weight in weights], warmup_rounds=1, rounds=9)
    gflop = 2e-9 * rows * inner * columns * len(weights)
    benchmark.extra_info.update(gflop_per_s=round(gflop / benchmark.stats.stats.min), threads=torch.get_num_threads())
