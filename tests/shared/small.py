"""Shared by the test files: small models, random parameters, plain formulas, and comparisons."""

import torch
import torch.nn.functional as F
from torch import nn

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig

CONFIG = XCLIPConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2),
    text=TextConfig(width=64, layers=2, heads=1),
    embed_dim=64,
    num_frames=3,
)
ONE_LAYER = XCLIPConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=64, layers=1, heads=1),
    text=TextConfig(width=64, layers=1, heads=1),
    embed_dim=64,
    num_frames=2,
)


@torch.no_grad()
def randomize(model):
    """Gives every parameter random values, also those whose first value is 0 or 1. Returns the model."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        one = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.copy_(one + noise * (0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5))
    return model


def rough(model):
    """Moves norms and biases away from the neutral first values that hide a wrong one. Returns the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name != "logit_scale":
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_one_layer(path):
    """Writes the folder of an X-CLIP of one layer a tower. Returns its path."""
    torch.manual_seed(3)
    XCLIP(ONE_LAYER).save_pretrained(path)
    return path


def normalized(video, config):
    """uint8 frames (B, T, H, W, 3) as float64 (B, T, 3, H, W), by the mean and the deviation of the config."""
    mean, std = torch.tensor(config.image_mean).double(), torch.tensor(config.image_std).double()
    return ((video.double() / 255 - mean) / std).permute(0, 1, 4, 2, 3)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def gelu_mlp(x, fc, projection, gelu=False):
    """A perceptron of CLIP, with its sigmoid activation or torch's GELU."""
    return projection(F.gelu(fc(x)) if gelu else QuickGELU()(fc(x)))


def plain_transformer(blocks, x, mask=None, gelu=False):
    """Pre-norm blocks by torch's own modules."""
    for block in blocks:
        n = block.ln_1(x).transpose(0, 1)
        x = x + block.attn(n, n, n, attn_mask=mask)[0].transpose(0, 1)
        x = x + gelu_mlp(block.ln_2(x), block.mlp.c_fc, block.mlp.c_proj, gelu)
    return x


def is_swapped(module):
    return hasattr(type(module), "_accelerated_from")


def error(given, wanted):
    """The largest difference, relative to the largest value."""
    return ((given.double() - wanted).abs().max() / wanted.abs().max()).item()


def assert_close(got, wanted, relative=1e-5):
    """Compares two tensors by the largest difference, relative to the largest value."""
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= relative * wanted.abs().max()
