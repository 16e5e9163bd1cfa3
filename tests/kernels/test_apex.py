"""NVIDIA's apex where it is installed: a stand-in with the signatures of its fused LayerNorm and Adam."""

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from xclip_fast.kernels.dispatch import support

from xclip_fast import kernels
from xclip_fast.train import optim
from xclip_fast.train.config import ConfigError, OptimConfig

module = importlib.import_module("xclip_fast.kernels.layer_norm")

# as published: apex/normalization/fused_layer_norm.py and apex/optimizers/fused_adam.py
LAYER_NORM = """
import torch

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert isinstance(normalized_shape, tuple)
    calls.append(eps)
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)

calls = []
"""
FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.adam_w_mode, self.set_grad_none = adam_w_mode, set_grad_none

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        assert self.adam_w_mode
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].mul_(first).add_(p.grad, alpha=1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                m = state["exp_avg"] / (1 - first ** group["step"])
                v = state["exp_avg_sq"] / (1 - second ** group["step"])
                p.sub_(group["lr"] * (m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p))
"""


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in (("normalization/fused_layer_norm", LAYER_NORM), ("optimizers/__init__", FUSED_ADAM)):
        file = tmp_path / "apex" / f"{name}.py"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        (file.parent / "__init__.py").touch()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(support, "_found", {})
    forget()
    yield
    forget()


@pytest.mark.usefixtures("apex")
def test_fused_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    op = module._op
    assert module._refuse_apex(torch.zeros(1)) == "device cpu is not cuda"
    here = tuple(dataclasses.replace(each, refuse=None) if each.name == "apex" else each for each in op.backends)
    monkeypatch.setattr(op, "backends", here)
    x = torch.randn(3, 5, 64).transpose(0, 1).requires_grad_()
    weight, bias = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    results = []
    for name in ("apex", "reference"):
        with kernels.backend(name):
            y: Tensor = kernels.layer_norm(x, weight, bias, 1e-3)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
    assert sys.modules["apex.normalization.fused_layer_norm"].calls == [1e-3]


@pytest.mark.usefixtures("apex")
def test_fused_adam_trains_and_resumes_as_adamw() -> None:
    def run(name: str, resumed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1))
        config = OptimConfig(optimizer=name)  # type: ignore[arg-type]
        made = optim.optimizer(model, config)
        for step in range(6):
            if resumed and step == 3:
                state = made.state_dict()
                made = optim.optimizer(model, config)
                made.load_state_dict(state)
                optim.set_step(made, step)
            optim.set_rate(made, config, step, 6, 2)
            made.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            made.step()
        return list(model.parameters())

    wanted = run("adamw", False)
    for resumed in (False, True):
        for got, right in zip(run("apex", resumed), wanted, strict=True):
            torch.testing.assert_close(got, right)


def test_apex_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match="NVIDIA's apex is not installed"):
        optim.optimizer(nn.Linear(2, 2), OptimConfig(optimizer="apex"))
