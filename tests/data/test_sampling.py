from itertools import pairwise

import numpy as np
import pytest

from xclip_fast.data.sampling import epoch_batches, epoch_order, frame_indices, sample_rng


def test_sparse_takes_the_middle_of_each_segment():
    assert frame_indices(300, 8).tolist() == [18, 56, 93, 131, 168, 206, 243, 281]
    assert frame_indices(8, 8).tolist() == list(range(8))
    assert frame_indices(16, 8).tolist() == list(range(1, 16, 2))
    assert frame_indices(9, 1).tolist() == [4]


def test_short_videos_repeat_frames_evenly():
    assert frame_indices(1, 8).tolist() == [0] * 8
    assert frame_indices(2, 8).tolist() == [0] * 4 + [1] * 4
    assert frame_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    for sampling in ("sparse", "dense"):
        assert frame_indices(4, 8, sampling, stride=3).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_dense_is_one_centerd_window():
    assert frame_indices(300, 8, "dense").tolist() == list(range(146, 154))
    assert frame_indices(300, 8, "dense", stride=4).tolist() == list(range(135, 164, 4))
    assert frame_indices(20, 8, "dense", stride=4).tolist() == [2, 4, 6, 8, 10, 12, 14, 16]  # 4 does not fit, 2 does
    assert frame_indices(5, 1, "dense", stride=9).tolist() == [2]


@pytest.mark.parametrize("sampling", ["sparse", "dense"])
@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_always_in_range_and_monotone(sampling, rng):
    for total in [1, 2, 3, 7, 8, 9, 31, 300]:
        for frames in [1, 2, 3, 8, 16, 64]:
            for stride in [1, 2, 5]:
                found = frame_indices(total, frames, sampling, stride=stride, rng=rng)
                assert found.dtype == np.int64
                assert found.shape == (frames,)
                assert found.min() >= 0
                assert found.max() < total
                steps = np.diff(found)
                assert (steps >= (1 if total >= frames else 0)).all()
                assert len(np.unique(found)) == min(frames, total) or rng is not None


def test_random_sparse_frames_stay_in_their_segments_and_reach_all_of_them():
    total, frames = 50, 8
    drawn = np.stack([frame_indices(total, frames, rng=sample_rng(0, 0, n)) for n in range(2000)])
    bounds = np.arange(frames + 1) * total // frames
    for segment in range(frames):
        wanted = np.arange(bounds[segment], bounds[segment + 1])
        found, counts = np.unique(drawn[:, segment], return_counts=True)
        assert found.tolist() == wanted.tolist()
        assert counts.min() > 0.7 * 2000 / len(wanted)


def test_random_dense_windows_reach_both_ends():
    starts = {int(frame_indices(20, 8, "dense", stride=2, rng=sample_rng(0, 0, n))[0]) for n in range(300)}
    assert starts == set(range(6))


def test_clips_share_out_each_segment():
    clips = [frame_indices(320, 8, clip=clip, clips=4) for clip in range(4)]
    assert [clip[:2].tolist() for clip in clips] == [[5, 45], [15, 55], [25, 65], [35, 75]]
    assert np.array_equal(np.sort(np.concatenate(clips)), frame_indices(320, 32))
    assert frame_indices(320, 8, clip=0, clips=1).tolist() == frame_indices(320, 8).tolist()


def test_dense_clips_are_evenly_spread():
    starts = [int(frame_indices(88, 8, "dense", clip=clip, clips=4)[0]) for clip in range(4)]
    assert starts == [10, 30, 50, 70]
    assert [frame_indices(9, 8, "dense", clip=clip, clips=2).tolist()[0] for clip in range(2)] == [0, 0]
    for clip in range(3):
        assert np.diff(frame_indices(100, 8, "dense", stride=4, clip=clip, clips=3)).tolist() == [4] * 7


@pytest.mark.parametrize("sampling", ["sparse", "dense"])
def test_clips_of_any_video_lie_in_range_and_in_order(sampling):
    for total in (1, 2, 3, 7, 30, 300):
        for frames in (1, 2, 8, 16):
            for clips in (2, 3, 10):
                found = [frame_indices(total, frames, sampling, clip=clip, clips=clips) for clip in range(clips)]
                assert all(view.dtype == np.int64 and view.shape == (frames,) for view in found)
                assert all(0 <= view.min() <= view.max() < total and (np.diff(view) >= 0).all() for view in found)
                assert all((one <= other).all() for one, other in pairwise(found))
                middle = found[clips // 2]  # an odd number of clips has the one-clip view in its middle
                assert clips % 2 == 0 or np.array_equal(middle, frame_indices(total, frames, sampling))


def test_epoch_order():
    order = epoch_order(1000, 3, 2, True)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, epoch_order(1000, 3, 2, True))
    others = [epoch_order(1000, seed, epoch, True) for seed, epoch in ((3, 1), (2, 2), (4, 2), (3, 3), (2**64 - 1, 2))]
    assert all(0 <= np.mean(order == other) < 0.02 for other in others)
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
    assert epoch_order(5, 3, 2, False).tolist() == [0, 1, 2, 3, 4]
    assert epoch_order(0, 3, 2, True).tolist() == []
    assert epoch_order(8, 7, 1, True).tolist() == [2, 0, 4, 1, 5, 3, 7, 6]  # must never change: runs are resumed by it
    first = np.bincount([int(epoch_order(4, seed, 0, True)[0]) for seed in range(2000)], minlength=4)
    assert (abs(first - 500) < 100).all()


@pytest.mark.parametrize("samples", [0, 1, 15, 16, 17, 64, 101])
def test_every_world_sees_the_same_batches(samples):
    order = epoch_order(samples, 0, 0, True)
    plans = {}
    for world, batch_size in ((1, 16), (2, 8), (4, 4), (8, 2), (16, 1)):
        ranks = [epoch_batches(order, batch_size, rank, world) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1  # or a rank would wait for ever for another
        assert all(len(batch) <= batch_size for batches in ranks for batch in batches)
        assert all(len(batch) == batch_size for batches in ranks for batch in batches[:-1])
        plans[world] = [sorted(np.concatenate(parts).tolist()) for parts in zip(*ranks, strict=True)]
        sizes = [[len(batch) for batch in parts] for parts in zip(*ranks, strict=True)]
        assert all(max(size) - min(size) <= 1 for size in sizes)
    assert all(plan == plans[1] for plan in plans.values())
    seen = [sample for batch in plans[1] for sample in batch]
    assert len(seen) == samples
    assert len(set(seen)) == len(seen)
    assert [set(batch) for batch in plans[1]] == [set(order[at : at + 16].tolist()) for at in range(0, len(seen), 16)]


def test_randomness_is_stateless_and_keyed():
    def draw(*key):
        return tuple(sample_rng(*key).integers(2**62, size=4).tolist())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(s, e, n) for s in (0, 1, 2**40) for e in range(4) for n in (0, 1, 2, 2**33)]
    assert len({draw(*key) for key in keys}) == len(keys)
    first = frame_indices(300, 8, rng=sample_rng(0, 0, 5))
    assert not np.array_equal(first, frame_indices(300, 8, rng=sample_rng(0, 1, 5)))
    assert np.array_equal(first, frame_indices(300, 8, rng=sample_rng(0, 0, 5)))


def test_bad_arguments():
    with pytest.raises(ValueError, match="sampling is 'middle'; it must be one of sparse, dense"):
        frame_indices(10, 8, "middle")
    for arguments in [(0, 8), (10, 0), (-1, 8)]:
        with pytest.raises(ValueError, match="must be at least 1"):
            frame_indices(*arguments)
    with pytest.raises(ValueError, match="stride is 0"):
        frame_indices(10, 8, "dense", stride=0)
    with pytest.raises(ValueError, match="epoch is -1"):
        sample_rng(0, -1, 0)
    with pytest.raises(ValueError, match="clips is 0"):
        frame_indices(10, 8, clips=0)
    for clip in (-1, 3):
        with pytest.raises(ValueError, match="with 3 clips it must lie from 0 to 2"):
            frame_indices(10, 8, clip=clip, clips=3)
    with pytest.raises(ValueError, match="2 clips with random frames"):
        frame_indices(10, 8, clip=0, clips=2, rng=sample_rng(0, 0, 0))
    for arguments in ((5, -1, 0), (5, 0, -1)):
        with pytest.raises(ValueError, match="is -1"):
            epoch_order(*arguments, True)
