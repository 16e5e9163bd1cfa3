"""Shared by the test files: the shape of a small model, random parameters, and comparisons."""

import torch

from xclip_fast import TextConfig, VisionConfig, XCLIPConfig

CONFIG = XCLIPConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2),
    text=TextConfig(width=64, layers=2, heads=1),
    embed_dim=64,
    num_frames=3,
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


def assert_close(got, wanted, relative=1e-5):
    """Compares two tensors by the largest difference, relative to the largest value."""
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= relative * wanted.abs().max()
