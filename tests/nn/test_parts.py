"""Parts of a block that are not plain modules are called: adapters, hooks, parametrizations, patched forwards."""

import copy
import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from xclip_fast.kernels import dispatch

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig

LABELS = torch.tensor([[97, 5, 99, 0], [97, 7, 8, 99]])


def make_model() -> XCLIP:
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1)
    text = TextConfig(100, 8, width=64, layers=2, heads=1)
    model = XCLIP(XCLIPConfig(vision=vision, text=text, embed_dim=64, num_frames=3)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_video() -> Tensor:
    return torch.randint(0, 255, (2, 3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _log_again() -> None:
    dispatch._logged.clear()


def leaves(model: nn.Module) -> list[str]:
    """Every module that holds parameters of its own, but the towers and what the model calls anyway."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.MultiheadAttention, nn.Conv2d, nn.Embedding))
    ]


NAMES = leaves(make_model())


def test_called_modules_compute_the_same_as_their_parameters() -> None:
    model, video = make_model(), make_video()
    wanted = model(video, LABELS)
    gradients = torch.autograd.grad(wanted.sum(), list(model.parameters()), allow_unused=True)
    called = []
    for name in NAMES:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    got = model(video, LABELS)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # constants of the normalization are float32
    assert {*called} >= {name for name in NAMES if not name.endswith("out_proj")}
    for a, b in zip(
        torch.autograd.grad(got.sum(), list(model.parameters()), allow_unused=True), gradients, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_hook_on_any_part_acts() -> None:
    model, video = make_model(), make_video()
    with torch.no_grad():
        wanted = model(video, LABELS)
        for name in NAMES:
            if name.endswith("out_proj"):  # torch's attention reads its output layer
                continue
            handle = model.get_submodule(name).register_forward_hook(
                lambda module, args, out: (out[0] * 1.5, None) if isinstance(out, tuple) else out * 1.5
            )
            assert (model(video, LABELS) - wanted).abs().max() > 1e-9, name
            handle.remove()
            assert torch.equal(model(video, LABELS), wanted)


def test_a_hook_on_a_whole_block_sees_and_changes_tokens() -> None:
    model, video, seen = make_model(), make_video(), []
    with torch.no_grad():
        wanted = model(video, LABELS)
        block = model.visual.transformer.resblocks[1]
        handle = block.register_forward_hook(lambda module, args, out: seen.extend([args[0].shape, out.shape]))
        torch.testing.assert_close(model(video, LABELS), wanted, rtol=1e-9, atol=1e-9)
        assert seen == [(6, 5, 64)] * 2
        handle.remove()
        block.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
        assert (model(video, LABELS) - wanted).abs().max() > 1e-6


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def test_an_adapter_on_any_linear_layer_acts_and_learns() -> None:
    model, video = make_model(), make_video()
    wanted = model(video, LABELS)
    for name in NAMES:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            continue
        parent, _, child = name.rpartition(".")
        adapter = Lora(layer).double()
        setattr(model.get_submodule(parent), child, adapter)
        got = model(video, LABELS)
        assert (got - wanted).abs().max() > 1e-9, name
        got.sum().backward()
        assert adapter.down.weight.grad is not None, name
        assert adapter.down.weight.grad.abs().max() > 0, name
        setattr(model.get_submodule(parent), child, layer)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class LinearSubclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def subclassed(block: nn.Module) -> None:
    fc = block.mlp.c_fc
    block.mlp.c_fc = LinearSubclass(fc.in_features, fc.out_features).double()
    block.mlp.c_fc.load_state_dict(fc.state_dict())


def plain(path: str) -> Callable[[nn.Module], None]:
    """Puts a plain tensor in place of a parameter, as tools do that compute weights."""

    def change(block: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        module = block.get_submodule(parent)
        weight = getattr(module, name).detach() * 2 + 1
        delattr(module, name)
        setattr(module, name, weight)

    return change


CHANGES = {
    "plain weight": plain("mlp.c_fc.weight"),
    "plain weight of a norm": plain("ln_2.weight"),
    "plain weight of the attention": plain("attn.in_proj_weight"),
    "plain bias of the attention": plain("attn.in_proj_bias"),
    "plain weight of its output": plain("attn.out_proj.weight"),
    "parametrization": lambda block: parametrize.register_parametrization(block.attn, "in_proj_weight", Double()),
    "parametrized norm": lambda block: parametrize.register_parametrization(block.ln_2, "weight", Double()),
    "weight_norm": lambda block: (
        nn.utils.parametrizations.weight_norm(block.mlp.c_fc).parametrizations["weight"].original0.mul_(2)
    ),
    "prune": lambda block: prune.l1_unstructured(block.mlp.c_proj, "weight", 0.5),
    "pre-hook": lambda block: block.ln_1.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "patched forward": lambda block: setattr(block.mlp.c_fc, "forward", lambda x: x.repeat(1, 1, 4)),
    "subclass": subclassed,
    "activation": lambda block: setattr(block.mlp, "gelu", nn.ReLU()),
    "hook on the mlp": lambda block: block.mlp.register_forward_hook(lambda module, args, out: out * 2),
    "norm": lambda block: setattr(block, "ln_2", nn.RMSNorm(64).double()),
    "epsilon": lambda block: setattr(block.ln_2, "eps", 0.5),
    "heads": lambda block: setattr(block.attn, "num_heads", 4),
    "bias of a norm": lambda block: setattr(block, "ln_1", nn.LayerNorm(64, bias=False).double()),
}


@pytest.mark.parametrize("tower", ["visual.transformer.resblocks.0", "text.transformer.resblocks.1", "mit.resblocks.0"])
@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_block_is_computed_and_logged_once(
    change: str, tower: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, video = make_model(), make_video()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "xclip_fast"):
        wanted = model(video, LABELS)
        assert not caplog.records
        CHANGES[change](model.get_submodule(tower))
        got = model(video, LABELS)
        assert (got - wanted).abs().max() > 1e-7
        assert torch.equal(model(video, LABELS), got)
    assert len(caplog.records) == 1
    model(video, LABELS).sum().backward()


def test_gradient_hooks_of_modules_fire() -> None:
    model, seen = make_model(), []
    model.visual.transformer.resblocks[1].mlp.register_full_backward_hook(lambda *_: seen.append("mlp"))
    model.text.transformer.resblocks[0].ln_1.register_full_backward_pre_hook(lambda *_: seen.append("ln_1"))
    model(make_video(), LABELS).sum().backward()
    assert sorted(seen) == ["ln_1", "mlp"]


def test_drop_path_and_attention_dropout_with_called_modules() -> None:
    model = make_model()
    block = model.visual.transformer.resblocks[1]
    block.drop_path = 0.5
    block.ln_1.register_forward_hook(lambda *_: None)
    x = torch.randn(3 * 40, 5, 64, dtype=torch.float64)
    with torch.no_grad():
        wanted = block(x)
        block.train()
        moved = (block(x) - x).unflatten(0, (40, 3)).abs().amax((1, 2, 3))
    assert 1 <= int((moved == 0).sum()) <= 25  # both residual branches dropped: a quarter of the videos
    assert (wanted - x).abs().max() > 0
    block.attn.dropout, block.drop_path = 0.9, 0.0
    assert not block.is_plain()
    assert not torch.equal(block(x), block(x))


def test_the_check_sees_a_part_that_becomes_plain_again() -> None:
    model = make_model()
    block = model.visual.transformer.resblocks[0]
    assert block.is_plain()
    handle = block.mlp.c_fc.register_forward_hook(lambda *_: None)
    assert not block.is_plain()
    assert not copy.deepcopy(block).is_plain()
    handle.remove()
    assert block.is_plain()


def test_traced_blocks_with_a_replaced_part() -> None:
    block = make_model().visual.transformer.resblocks[0]
    x = torch.randn(6, 5, 64, dtype=torch.float64)
    block.mlp.c_fc = Lora(block.mlp.c_fc).double()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


def test_bfloat16_and_autocast_keep_the_dtype_of_the_residual_stream() -> None:
    block = make_model().visual.transformer.resblocks[0].float()
    block.ln_2.register_forward_hook(lambda *_: None)
    x = torch.randn(6, 5, 64)
    with torch.no_grad():
        wanted = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = block(x)
        low = block.bfloat16()(x.bfloat16())
    assert mixed.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    assert math.isclose(float((mixed - wanted).abs().mean()), 0, abs_tol=0.05)
    assert math.isclose(float((low - wanted).abs().mean()), 0, abs_tol=0.05)
