"""The cases of each stage and the time limits, the most valuable stage first.

benchmarks/README.md estimates how long each takes on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from .case import Case

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {  # limit of each stage; 380 s for the first four
    "machine": 30.0,
    "smoke": 70.0,
    "headline": 190.0,
    "products": 90.0,
    "attention": 50.0,
    "tests": 100.0,
}
BACKENDS = ("reference", "library", "triton", "cuda")  # each is forced, in addition to the default


def machine(rehearse: bool) -> list[Case]:
    return [
        Case("versions", "machine:versions", {}, 40),
        Case("ceilings", "machine:ceilings", {}, 30),
        Case("overhead", "machine:overhead", {}, 15),
    ]


def smoke(rehearse: bool) -> list[Case]:
    from xclip_fast.kernels.dispatch import OPS

    cases = []
    if not rehearse:
        options = {"files": ["tests/kernels/test_cuda_library.py"], "select": "gpu", "workers": 2, "matching": ""}
        cases.append(Case("CUDA library", "suite:tests", options, 60, together=True))
    for op, entry in OPS.items():
        for name in entry.names:
            if name != "reference" and not (rehearse and name == "cuda"):
                options = {"op": op, "backend": name}
                cases.append(Case(f"{op} {name}", "smoke:op", options, 40, together=True))
    names = ("auto", "triton", "cuda", "library")
    models = [(kind, name) for kind in ("tower", "training step") for name in names]
    models += [("whole", "auto"), ("graph", "auto")]
    if rehearse:
        models = [("tower", "triton"), ("training step", "triton"), *models[-2:]]
    for kind, name in models:
        # several steps of 32 at a time do not fit into the memory of an H100
        batch = 1 if rehearse or kind == "graph" else 8 if kind == "training step" and name != "auto" else 32
        options = {"variant": "B/16-8f", "batch": batch, "backend": name, "kind": kind}
        cases.append(Case(f"{kind} {name}", "smoke:model", options, 60, together=True))
    if not rehearse:
        for variant, batch in (("B/16-8f", 8), ("L/14-8f", 32), ("B/32-8f", 32)):
            options = {"variant": variant, "batch": batch, "backend": "auto", "kind": "tower"}
            cases.append(Case(f"tower {variant} {batch}", "smoke:model", options, 60, together=True))
    return cases


def headline(rehearse: bool) -> list[Case]:
    names = ("reference", "triton") if rehearse else BACKENDS
    many, some, few = (2, 3, 1) if rehearse else (32, 8, 1)

    def inference(name: str, variant: str, batch: int, seconds: float, **more: object) -> Case:
        return Case(name, "headline:inference", {"variant": variant, "batch": batch, **more}, seconds)

    def kernels(name: str, batch: int, **more: object) -> Case:
        return Case(name, "profiled:kernels", {"variant": "B/16-8f", "batch": batch, **more}, 30)

    peer = {"variant": "B/16-8f", "batch": many}
    cases = [
        inference("B/16 32", "B/16-8f", many, 60, kinds=("tower", "whole"), backends=names, graph=True),
        Case("B/16 step", "headline:step", {"variant": "B/16-8f", "batch": many, "backends": names[1:]}, 60),
        inference("B/16 1", "B/16-8f", few, 40, backends=names[:1], graph=True),
        Case("HF compiled", "headline:compiled", peer, 90, early=True),
        inference("B/32 32", "B/32-8f", many, 30, graph=True),
        inference("B/16 8", "B/16-8f", some, 50, backends=names[1:], graph=True),
        inference("L/14 32", "L/14-8f", many, 40),
        Case("HF compiled step", "headline:compiled", {**peer, "step": True}, 90, early=True),
        inference("B/16 256", "B/16-8f", 4 if rehearse else 256, 50),
        kernels("kernels", many, backends=names[1:]),
        kernels("kernels step", many, step=True),
        kernels("kernels 1", few, graph=True),
    ]
    if importlib.util.find_spec("transformers") is None:
        cases = [case for case in cases if not case.early]
    return cases


def products(rehearse: bool) -> list[Case]:
    from . import products as stage

    cases = []
    for rows in (stage.ROWS[1],) if rehearse else (stage.ROWS[1], stage.ROWS[2], stage.ROWS[0]):
        for product in stage.SHAPES:
            cases.append(Case(f"{product} {rows}", "products:product", {"product": product, "rows": rows}, 30))
    return cases


def attention(rehearse: bool) -> list[Case]:
    sizes = ((197, 256, 12),) if rehearse else ((197, 256, 12), (257, 256, 16), (50, 256, 12))
    keys = ("tokens", "frames", "heads")
    return [Case(f"{size[0]} tokens", "attention:sizes", dict(zip(keys, size, strict=True)), 25) for size in sizes]


def tests(rehearse: bool) -> list[Case]:
    word = "def test" if rehearse else "mark.gpu"
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if word in path.read_text(encoding="utf-8")
    ]
    options = {"files": files, "select": "gpu", "workers": 12}
    if rehearse:
        files = [file for file in files if file.endswith("test_sampling.py")]
        options = {"files": files, "select": "not gpu", "workers": 1}
    return [Case("pytest", "suite:tests", options, SECONDS["tests"])]


STAGES: dict[str, Callable[[bool], list[Case]]] = {
    "machine": machine,
    "smoke": smoke,
    "headline": headline,
    "products": products,
    "attention": attention,
    "tests": tests,
}
assert set(STAGES) == set(SECONDS)
