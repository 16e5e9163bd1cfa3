import numpy as np
import pytest

from xclip_fast.data.sampling import frame_indices, sample_rng


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


def test_dense_is_one_centred_window():
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
