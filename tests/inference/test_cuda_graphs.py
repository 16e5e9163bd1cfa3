"""``model.graphed``: buckets, buffers, what it notices and what it refuses.

CUDA's graphs are played by a tape: it records the operations of a capture and runs them again on the same memory. The
real ones are in test_gpu.py.
"""

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xclip_fast import XCLIP, XCLIPConfig, backend
from xclip_fast.inference import cuda_graphs as graphs
from xclip_fast.model import VideoFeatures

aten = torch.ops.aten
# a constant from the CPU, a number or a count to it
WAITING = {aten.lift_fresh.default, aten._local_scalar_dense.default, aten.nonzero.default}


class Tape(TorchDispatchMode):
    """Plays ``torch.cuda.CUDAGraph``: what was computed inside, to be computed again into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITING, f"{func} waits for the GPU, which a capture refuses"
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class Gpu:
    """Plays ``torch.cuda`` for graphs.py on the CPU, and keeps what was asked of it."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.modes: list[str] = []
        self.log: list[str] = []
        self.capturing = False

    def CUDAGraph(self) -> Tape:
        self.tapes.append(Tape())
        return self.tapes[-1]

    @contextlib.contextmanager
    def graph(self, tape: Tape, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_cache_enabled()
        self.modes.append(capture_error_mode)
        self.log.append("capture")
        with tape:
            yield

    def Event(self) -> Any:
        return SimpleNamespace(record=lambda stream: self.log.append("record"))

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: self.log.append("wait"))

    current_stream = Stream

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()

    def synchronize(self, device: Any) -> None:
        self.log.append("synchronize")

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    played = Gpu()
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: played.log.append("clear"), raising=False)
    for name in [name for name in dir(Gpu) if not name.startswith("_")]:
        monkeypatch.setattr(torch.cuda, name, getattr(played, name))
    monkeypatch.setattr(graphs, "_cuda_device", lambda model: model.visual.proj.device)
    monkeypatch.setattr(graphs, "_ended", {})
    return played


def frames(model: XCLIP, batch: int, count: int | None = None) -> Tensor:
    size = model.config.vision.image_size
    return torch.randint(256, (batch, count or model.config.num_frames, size, size, 3), dtype=torch.uint8)


def same(got: VideoFeatures, wanted: VideoFeatures) -> bool:
    """Up to rounding: the played graph records torch's calls, and outside of it a CPU has passes of its own."""
    assert isinstance(got, VideoFeatures)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_replay_is_encode_video(gpu: Gpu, tiny_model: XCLIP, mode: Callable[[], Any]) -> None:
    graphed = tiny_model.graphed(batch=2)
    with mode():
        for _ in range(3):
            video = frames(tiny_model, 2)
            assert same(graphed(video), tiny_model.encode_video(video))
    assert gpu.log.count("capture") == 1
    assert gpu.tapes[0].replays == 3
    assert gpu.modes == ["thread_local"]  # a loader's thread may pin memory meanwhile


def test_logits_are_similarity_in_the_graph(gpu: Gpu, tiny_model: XCLIP) -> None:
    """One graph for each number of labels; the prompts and the temperature may change in place."""
    graphed, texts = tiny_model.graphed(batch=2), {3: ["run", "swim", "jump"], 1: ["run"]}
    with torch.inference_mode():
        features = {count: tiny_model.encode_text(labels) for count, labels in texts.items()}
        for count, videos in ((3, 2), (1, 2), (3, 1)):
            video = frames(tiny_model, videos)
            wanted = tiny_model.similarity(tiny_model.encode_video(video), features[count])
            torch.testing.assert_close(graphed.logits(video, features[count]), wanted, rtol=1e-4, atol=1e-4)
        before = graphed.logits(video, features[3])
        tiny_model.logit_scale.sub_(1.0)
        torch.testing.assert_close(graphed.logits(video, features[3]), before / torch.e, rtol=1e-4, atol=1e-4)
    assert gpu.log.count("capture") == 2
    with pytest.raises(ValueError, match="text features of shape"), torch.inference_mode():
        graphed.logits(video, features[3][0])


def test_other_layouts_and_no_prompt(gpu: Gpu, tiny_config: XCLIPConfig) -> None:
    """Normalised floats; strided videos; a model whose patch features are empty; one that starts from a plain ViT."""
    bare = dataclasses.replace(tiny_config, prompt="none", mit_layers=0)
    vit = dataclasses.replace(tiny_config, vision=dataclasses.replace(tiny_config.vision, pre_norm=False))
    for model in (XCLIP(bare).eval(), XCLIP(vit).eval()):
        gpu.tapes.clear()
        with torch.inference_mode():
            for video in (torch.randn(1, 3, 3, 32, 32), torch.randn(1, 3, 32, 32, 3).movedim(-1, 2), frames(model, 1)):
                assert same(model.graphed()(video), model.encode_video(video))
        assert len(gpu.tapes) == 2  # a strided video is copied into the same buffer


def test_results_belong_to_the_caller(gpu: Gpu, tiny_model: XCLIP) -> None:
    graphed = tiny_model.graphed()
    with torch.inference_mode():
        first = graphed(frames(tiny_model, 1))
        kept = copy.deepcopy(first)
        assert not same(graphed(frames(tiny_model, 1)), kept)
        assert same(first, kept)
        first.video.zero_()  # what a user writes into a result is not read by the next call
        video = frames(tiny_model, 1)
        assert same(graphed(video), tiny_model.encode_video(video))


def test_fewer_videos_than_the_bucket_holds(gpu: Gpu, tiny_model: XCLIP) -> None:
    graphed = tiny_model.graphed(batch=3)
    with torch.inference_mode():
        graphed(frames(tiny_model, 3))
        video = frames(tiny_model, 2)
        got, wanted = graphed(video), tiny_model.encode_video(video)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
        assert graphed(video[:0]).patches.shape == (0, *wanted.patches.shape[1:])
    assert len(gpu.tapes) == 1


def test_buckets(gpu: Gpu, tiny_model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for each size, dtype, backend and autocast dtype; they alternate."""
    one, two = tiny_model.graphed(1), tiny_model.graphed(1, frames=2)
    assert one is tiny_model.graphed(batch=1, frames=3)
    assert one is not two
    with torch.inference_mode():
        for _ in range(2):
            for graphed, count in ((one, 3), (two, 2)):
                video = frames(tiny_model, 1, count)
                assert same(graphed(video), tiny_model.encode_video(video))
        assert len(gpu.tapes) == 2
        with backend("reference"):
            one(frames(tiny_model, 1))
        one(torch.randn(1, 3, 3, 32, 32))
        one(torch.randn(1, 3, 3, 32, 32).half())
        assert len(gpu.tapes) == 5
        monkeypatch.setattr(graphs, "autocast_dtype", lambda device_type: torch.bfloat16)
        with pytest.warns(UserWarning, match="CUDA is not available"):  # torch.autocast here; it does nothing
            one(frames(tiny_model, 1))
        assert len(gpu.tapes) == 6
        one(frames(tiny_model, 1))
    assert len(gpu.tapes) == 6


# ---- weights


def test_weights_changed_in_place_are_seen(gpu: Gpu, tiny_model: XCLIP) -> None:
    graphed, video = tiny_model.graphed(), frames(tiny_model, 1)
    with torch.inference_mode():
        before = graphed(video)
    other = XCLIP(tiny_model.config).eval()
    tiny_model.load_state_dict(other.state_dict())
    with torch.no_grad():
        tiny_model.visual.conv1.weight.add_(0.01)
        after = graphed(video)
        assert not same(after, before)
        assert same(after, tiny_model.encode_video(video))
    assert len(gpu.tapes) == 1


CHANGES: dict[str, Callable[[XCLIP], Any]] = {
    "assigned": lambda model: model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True
    ),
    "cast": lambda model: model.double(),
    "new parameter": lambda model: setattr(model.visual, "proj", torch.nn.Parameter(model.visual.proj + 1)),
    "new data": lambda model: setattr(model.visual.proj, "data", model.visual.proj.data + 1),
    "another stride": lambda model: setattr(
        model.visual.transformer.resblocks[0].message_fc.weight,
        "data",
        model.visual.transformer.resblocks[0].message_fc.weight.data.T,
    ),
    "new prompt projection": lambda model: setattr(
        model, "prompts_visual_proj", torch.nn.Parameter(model.prompts_visual_proj + 1)
    ),
    "new block": lambda model: model.visual.transformer.resblocks.__setitem__(
        1, copy.deepcopy(model.visual.transformer.resblocks[0])
    ),
    "new MIT": lambda model: setattr(model, "mit", copy.deepcopy(model.mit).requires_grad_(False)),
    "no MIT": lambda model: setattr(model, "mit", None),
    "no bias": lambda model: setattr(model.mit.resblocks[0].mlp.c_fc, "bias", None),
    "pruned": lambda model: prune.identity(model.mit.resblocks[0].mlp.c_fc, "weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_replaced_is_noticed(gpu: Gpu, tiny_model: XCLIP, change: str, caplog: Any) -> None:
    graphed, video = tiny_model.graphed(), frames(tiny_model, 1)
    with torch.no_grad(), caplog.at_level("INFO", "xclip_fast"):
        graphed(video)
        CHANGES[change](tiny_model)
        assert same(graphed(video), tiny_model.encode_video(video))
        assert same(graphed(video), tiny_model.encode_video(video))
    assert len(gpu.tapes) == 2
    assert "captured again" in caplog.text
    assert gpu.log.index("synchronize") > gpu.log.index("record")  # no memory is given back under a running replay


def test_a_buffer_that_was_replaced_is_noticed(gpu: Gpu, tiny_model: XCLIP) -> None:
    tiny_model.visual.register_buffer("scale", torch.ones(1))
    graphed, video = tiny_model.graphed(), frames(tiny_model, 1)
    with torch.no_grad():
        graphed(video)
        tiny_model.visual.scale = torch.ones(1)
        graphed(video)
    assert len(gpu.tapes) == 2


def test_the_text_tower_does_not_matter(gpu: Gpu, tiny_model: XCLIP) -> None:
    graphed, video = tiny_model.graphed(), frames(tiny_model, 1)
    with torch.no_grad():
        graphed(video)
        assert tiny_model.text is not None
        tiny_model.text.double().train()
        graphed(video)
    assert len(gpu.tapes) == 1


def test_weights_made_in_inference_mode(gpu: Gpu, tiny_config: XCLIPConfig) -> None:
    with torch.inference_mode():
        model = XCLIP(tiny_config).eval()
        video = frames(model, 1)
        assert same(model.graphed()(video), model.encode_video(video))


def test_clear(gpu: Gpu, tiny_model: XCLIP) -> None:
    graphed, other, video = tiny_model.graphed(), tiny_model.graphed(2), frames(tiny_model, 1)
    with torch.no_grad():
        graphed(video)
        other(video)
        graphed.clear()
        other(video)
        assert len(gpu.tapes) == 2
        graphed(video)
        assert len(gpu.tapes) == 3
        tiny_model.clear_graphs()
        graphed(video)
        other(video)
    assert len(gpu.tapes) == 5
    assert gpu.log.count("synchronize") == 3


def test_copies_have_graphs_of_their_own(gpu: Gpu, tiny_model: XCLIP) -> None:
    graphed, video = tiny_model.graphed(), frames(tiny_model, 1)
    with torch.no_grad():
        graphed(video)
        twin = copy.deepcopy(tiny_model)
        assert pickle.loads(pickle.dumps(tiny_model))._graphed == {}
        twin.visual.proj.mul_(2)
        assert same(twin.graphed()(video), twin.encode_video(video))
        assert same(graphed(video), tiny_model.encode_video(video))
        again = copy.deepcopy(graphed)
        assert again.model is not tiny_model
        assert again is again.model.graphed()
    assert set(tiny_model.state_dict()) == set(twin.state_dict())


def test_replays_take_turns(gpu: Gpu, tiny_model: XCLIP) -> None:
    """Each waits for the one before, which may have run on another stream."""
    with torch.no_grad():
        for graphed in (tiny_model.graphed(), tiny_model.graphed(2), tiny_model.graphed()):
            graphed(frames(tiny_model, 1))
    captured = ["clear", "capture", "clear"]  # cuBLAS's workspace is the graph's own
    assert gpu.log == [*captured, "wait", "record", *captured, "wait", "record", "wait", "record"]


# ---- refusals


def test_training_mode_is_refused(gpu: Gpu, tiny_model: XCLIP) -> None:
    graphed, video = tiny_model.graphed(), frames(tiny_model, 1)
    with torch.no_grad():
        graphed(video)
        tiny_model.visual.transformer.resblocks[1].train()
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            graphed(video)
        tiny_model.eval()
        graphed(video)
    assert len(gpu.tapes) == 1


def test_wanted_gradients_are_refused(gpu: Gpu, tiny_model: XCLIP) -> None:
    graphed, video = tiny_model.graphed(), torch.randn(1, 3, 3, 32, 32)
    with pytest.raises(RuntimeError, match="inference_mode"):
        graphed(video)
    tiny_model.requires_grad_(False)
    assert same(graphed(video), tiny_model.encode_video(video))  # nobody can want one
    with pytest.raises(RuntimeError, match="inference_mode"):
        graphed(video.requires_grad_())
    assert not next(iter(graphed._captured.values())).video.requires_grad  # the buffer holds no graph of the caller's
    tiny_model.prompts_visual_proj.requires_grad_()
    with pytest.raises(RuntimeError, match="inference_mode"):
        graphed(video.detach())
    assert len(gpu.tapes) == 1


def test_a_capture_under_way_is_refused(gpu: Gpu, tiny_model: XCLIP) -> None:
    gpu.capturing = True
    with torch.no_grad(), pytest.raises(RuntimeError, match="call encode_video there"):
        tiny_model.graphed()(frames(tiny_model, 1))


@pytest.mark.parametrize(
    ("shape", "said"),
    [((3, 3, 32, 32, 3), "3 videos of 3 frames"), ((2, 4, 32, 32, 3), "2 videos of 4"), ((2, 3, 32, 30, 3), "H = W")],
)
def test_other_videos_are_refused(gpu: Gpu, tiny_model: XCLIP, shape: tuple[int, ...], said: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        tiny_model.graphed(batch=2)(torch.zeros(shape, dtype=torch.uint8))
    assert not gpu.tapes


@pytest.mark.parametrize("sizes", [(0, 3), (1, 0), (1.0, 3), ("1", 3)])
def test_wrong_sizes_are_refused(gpu: Gpu, tiny_model: XCLIP, sizes: Any) -> None:
    with pytest.raises(ValueError, match="at least 1 wanted"):
        tiny_model.graphed(*sizes)
    assert tiny_model._graphed == {}


def test_a_cpu_is_refused(tiny_model: XCLIP) -> None:
    with pytest.raises(ValueError, match=r"on the device cpu; .* model\.to\('cuda'\)"):
        tiny_model.graphed()


def test_a_failed_capture_leaves_nothing(gpu: Gpu, tiny_model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, video = tiny_model.graphed(), frames(tiny_model, 1)

    def fails() -> Any:
        raise RuntimeError("out of memory")

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "CUDAGraph", fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                graphed(video)
        assert same(graphed(video), tiny_model.encode_video(video))  # the lock is free, nothing half-made is kept
