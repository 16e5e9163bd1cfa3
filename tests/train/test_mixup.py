"""Mixup, cutmix and label smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xclip_fast.train.config import MixingConfig
from xclip_fast.train.mixup import draw, mix

K = 5


def batch(count: int = 4, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    frames = torch.randint(256, (count, 2, size, size, 3), dtype=torch.uint8)
    return frames, torch.arange(count) % K


@pytest.mark.parametrize("config", [MixingConfig(), MixingConfig(cutmix=0), MixingConfig(mixup=0)])
@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_targets_sum_to_one_and_bytes_stay_bytes(config: MixingConfig, count: int) -> None:
    frames, labels_B = batch(count)
    for step in range(20):
        mixed, targets_BK = mix(frames, labels_B, K, config, (0, step, 0))
        assert mixed.dtype == torch.uint8
        assert mixed.shape == frames.shape
        assert targets_BK.shape == (count, K)
        torch.testing.assert_close(targets_BK.sum(1), torch.ones(count))
        assert (targets_BK > 0).all()  # smoothing


def test_mixup_and_cutmix_are_what_their_targets_say() -> None:
    frames, labels_B = batch()
    before = frames.clone()
    kinds = set()
    for step in range(40):
        config = MixingConfig(label_smoothing=0.0)
        share, box = draw(config, (16, 16), (7, step, 0))
        mixed, targets_BK = mix(frames, labels_B, K, config, (7, step, 0))
        torch.testing.assert_close(targets_BK[0, 0], torch.tensor(share, dtype=torch.float32))
        torch.testing.assert_close(targets_BK[0, 3], torch.tensor(1 - share, dtype=torch.float32))
        if box is None:
            kinds.add("mixup")
            expected = share * frames.double() + (1 - share) * frames.flip(0).double()
            assert (mixed.double() - expected).abs().max() <= 0.5 + 1e-4  # rounded to the nearest level
        else:
            kinds.add("cutmix")
            left, top, right, bottom = box
            inside = torch.zeros(16, 16, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert torch.equal(mixed[:, :, inside], frames.flip(0)[:, :, inside])
            assert torch.equal(mixed[:, :, ~inside], frames[:, :, ~inside])
            assert share == pytest.approx(1 - inside.float().mean().item())
    assert kinds == {"mixup", "cutmix"}
    assert torch.equal(frames, before)  # the input is not written to


def test_draws_follow_from_the_key_and_the_distribution() -> None:
    config = MixingConfig()
    assert draw(config, (224, 224), (1, 2, 3)) == draw(config, (224, 224), (1, 2, 3))
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]
    assert len({draw(config, (224, 224), key) for key in keys}) == 4
    draws = [draw(config, (224, 224), (0, step, 0)) for step in range(2000)]
    assert 0.45 < np.mean([box is not None for _, box in draws]) < 0.55  # switch
    mixups = [share for share, box in draws if box is None]
    assert abs(np.mean(mixups) - 0.5) < 0.03  # Beta(0.8, 0.8)
    assert abs(np.var(mixups) - 1 / (4 * 2.6)) < 0.01
    half = MixingConfig(probability=0.5)
    assert 0.45 < np.mean([draw(half, (8, 8), (0, step, 0)).share == 1.0 for step in range(2000)]) < 0.55


def test_nothing_to_mix() -> None:
    frames, labels_B = batch()
    for config in (MixingConfig(probability=0), MixingConfig(mixup=0, cutmix=0)):
        mixed, targets_BK = mix(frames, labels_B, K, config, (0, 0, 0))
        assert torch.equal(mixed, frames)
        torch.testing.assert_close(targets_BK[1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
