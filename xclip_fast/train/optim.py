"""The optimizer of the recipe: trained parameters, groups, schedule, gradient clipping, moving average.

Source: the paper's supplement and section 4.5 (Table 7).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..schema import ConfigError
from ..weights import layouts
from .config import OptimConfig


def is_new(name: str, also: Iterable[str] = ()) -> bool:
    """Whether a parameter of ``XCLIP`` is one that an image CLIP does not have, or starts with one of ``also``."""
    return layouts.is_new(name) or name.startswith(tuple(also))


def freeze(model: nn.Module, towers: str, also_new: Iterable[str] = ()) -> None:
    """Sets which parameters are trained (Table 7): new ones always, inherited ones only in the given towers.

    ``towers``: "visual", "text", "both" or "none". The logit scale belongs to the text tower, as in the released code.
    """
    for name, parameter in model.named_parameters():
        tower = "visual" if name.startswith("visual.") else "text"
        parameter.requires_grad_(is_new(name, also_new) or towers in (tower, "both"))


def groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups. ``peak_lr`` of a group is its full learning rate.

    New parameters have ``new_lr_factor`` times the rate. Parameters with fewer than two dimensions and position
    embeddings have no weight decay.
    """
    found: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            positions = "positional_embedding", "relative_position_bias_table"
            decays = parameter.dim() > 1 and not name.endswith(positions)
            # a fused kernel takes only sharded tensors or only whole ones
            key = (is_new(name, config.also_new), decays, hasattr(parameter, "to_local"))
            found.setdefault(key, []).append(parameter)
    if not found:
        raise ConfigError(
            "train_towers is 'none' and the model has no new parameters (cross-frame attention, MIT, prompts, head): "
            "nothing is left to train; choose visual, text or both"
        )
    return [
        {
            "params": parameters,
            "peak_lr": config.lr * (config.new_lr_factor if new else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (new, decays, _), parameters in sorted(found.items())
    ]


def optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with its state allocated, so that a checkpoint can be read into it."""
    options: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if config.optimizer == "apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            raise ConfigError(
                "optim.optimizer is apex, and NVIDIA's apex is not installed (it is not the package `apex` on PyPI): "
                "build it from github.com/NVIDIA/apex, or leave optim.optimizer out"
            ) from error
        made: torch.optim.Optimizer = FusedAdam(groups(model, config), adam_w_mode=True, **options)
    else:
        made = torch.optim.AdamW(groups(model, config), fused=True, **options)
    for group in made.param_groups:
        for parameter in group["params"]:
            made.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            if config.optimizer == "adamw":
                made.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return made


def released_learning_rate(step: int, total: int, warmup: int, base: float, low: float) -> float:
    """The learning rate of the released X-CLIP pipeline at ``step`` (counted from 0) of ``total``.

    It rises linearly from 0 over ``warmup`` steps, then follows half a cosine from ``base`` to ``low``. The cosine
    counts from step 0, not from the end of the warm-up, so there the rate drops to the cosine's value.
    """
    if step < warmup:
        return base * step / warmup
    return low + (base - low) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def cosine_learning_rate(step: int, total: int, warmup: int, base: float, low: float) -> float:
    """A linear rise over ``warmup`` steps, above 0 from the first, then half a cosine from ``base`` to ``low``."""
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - 1 - warmup)
    return low + (base - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_rate(made: torch.optim.Optimizer, config: OptimConfig, step: int, total: int, warmup: int) -> float:
    """Sets the learning rate of every group for ``step``. Returns the rate of inherited parameters.

    The released schedule ends at ``final_lr_factor * lr`` for all groups, the other one at ``final_lr_factor`` times
    the group's own rate.
    """

    def rate(base: float) -> float:
        if config.schedule == "released":
            return released_learning_rate(step, total, warmup, base, config.final_lr_factor * config.lr)
        return cosine_learning_rate(step, total, warmup, base, config.final_lr_factor * base)

    for group in made.param_groups:
        group["lr"] = rate(group["peak_lr"])
    return rate(config.lr)


def set_step(made: torch.optim.Optimizer, step: int) -> None:
    """Sets the step count of an optimizer that keeps it outside of its state tensors (apex)."""
    for group in made.param_groups:
        if type(made).__name__ == "FusedAdam":
            group["step"] = step


@contextlib.contextmanager
def reduce_gradients(net: Any, now: bool) -> Iterator[None]:
    """Sums gradients over the processes in the last accumulation step alone."""
    if hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        net.set_requires_gradient_sync(now)
    waits = isinstance(net, nn.parallel.DistributedDataParallel) and not now
    with net.no_sync() if waits else contextlib.nullcontext():
        yield


def reduce_scalars(model: nn.Module, world: int) -> None:
    """Averages the gradients of scalar parameters over the processes. FSDP2 leaves them out."""
    for parameter in model.parameters():
        if parameter.dim() == 0 and parameter.grad is not None and world > 1:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scales all gradients so that their norm is at most ``largest``, without a synchronization.

    Parameters may be sharded (DTensor), whole, or mixed. Returns the norm before the scaling, float32 ().
    """
    whole: list[nn.Parameter] = []
    sharded: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (sharded if hasattr(parameter.grad, "to_local") else whole).append(parameter)
    parts = [part for part in (whole, sharded) if part]  # torch takes gradients of one kind
    norms = []
    for part in parts:
        norm: Any = nn.utils.get_total_norm([parameter.grad for parameter in part if parameter.grad is not None])
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    total = nn.utils.get_total_norm(norms)
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, largest, total)
    return total


def start_ema(model: nn.Module) -> dict[str, Tensor]:
    """The initial moving average: a copy of the trained parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def update_ema(ema: Mapping[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """One step: ema = d ema + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps makes the average forget the initial weights sooner.
    """
    weights = dict(model.named_parameters())
    decay = min(decay, (1 + step) / (10 + step))
    kept: Any = [getattr(value, "_local_tensor", value) for value in ema.values()]
    new: Any = [getattr(weights[name], "_local_tensor", weights[name]).detach() for name in ema]
    torch._foreach_lerp_(kept, new, 1 - decay)
