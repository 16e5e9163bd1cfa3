"""The time model, in a process without Triton's interpreter: it records launches on a GPU that is not there."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

SCRIPT = """
import dataclasses, json, torch
from xclip_fast import time_model as t, flops
from xclip_fast.config import VARIANTS

gpu, found = t.GPUS["h100"], {}
small = VARIANTS["B/32-8f"]
VARIANTS["tiny"] = dataclasses.replace(small, vision=dataclasses.replace(small.vision, layers=2))
for plan in t.PLANS:
    works = t.record("tiny", 4, gpu, plan=plan)
    training = t.record("tiny", 4, gpu, training=True, plan=plan)
    found[plan] = {
        "operations": sum(each.operations for each in works),
        "training": sum(each.operations for each in training),
        "names": [each.name for each in works],
        "predicted": dataclasses.asdict(t.predict("tiny", 4, gpu, plan=plan)),
    }
actual = flops.count(VARIANTS["tiny"], labels=400, batch=4, counting="actual")
found["actual"] = 2 * (actual.total - actual.text - actual.similarity)
large = t.Work("mm", "product", 0, 2 * 128 * 132 * 128 * 4096, 128 * 132, 128, 4096)
one_more = t.Work("mm", "product", 0, 2 * 128 * 132 * 128 * 4096, 128 * 132 + 1, 128, 4096)
found["waves"] = one_more.seconds(gpu) / large.seconds(gpu)
print(json.dumps(found))
"""


def test_every_operation_is_counted_and_every_launch_has_a_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for plan in ("library", "triton"):
        # the count beside is of the config: the patch embedding's rows of class and spare, 4 % of B/32's, are not in it
        assert found[plan]["operations"] == pytest.approx(found["actual"], rel=0.015)
        # pixels have no gradient: the patch embedding, a seventh of this model, is two products in training, not three
        assert 2.85 < found[plan]["training"] / found[plan]["operations"] < 3.2
        predicted = found[plan]["predicted"]
        assert predicted["launches"] == len(found[plan]["names"])
        assert predicted["limit"] < predicted["seconds"] < 20 * predicted["limit"]
        assert sum(predicted["parts"].values()) == pytest.approx(predicted["seconds"])
        assert "_scaled_dot_product_cudnn_attention" in found[plan]["names"]
    assert found["library"]["names"].count("gemm_kernel") == 0
    assert found["triton"]["names"].count("gemm_kernel") >= 8
    assert found["waves"] == pytest.approx(2.0, rel=0.02)  # one row past a full wave is another wave
