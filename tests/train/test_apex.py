"""FusedAdam of NVIDIA's apex where it is installed: a stand-in with its signature."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from xclip_fast.train import optim
from xclip_fast.train.config import ConfigError, OptimConfig

# as published: apex/optimizers/fused_adam.py
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
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "optimizers" / "__init__.py").write_text(FUSED_ADAM)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield
    forget()


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
