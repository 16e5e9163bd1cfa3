"""On a GPU: the whole model with its kernels, repeated runs, CUDA graphs, training, compute-sanitizer."""

import copy
import dataclasses
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import rough
from torch import Tensor
from xclip_fast.kernels import cuda_library

from xclip_fast import VARIANTS, XCLIP, FastCCTBlock, VideoFeatures, backend, tokenize

pytestmark = pytest.mark.gpu
LABELS = ["riding a bike", "swimming", "playing the accordion while walking", "yoga"]
SANITIZER_REFUSES = ("Device not supported", "Unable to find injection library", "Failed to initialize the debugger")


def shallow(name: str, **changes: object) -> XCLIP:
    """A variant with two layers a tower, its other sizes real, and weights that matter."""
    config = VARIANTS[name]
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **{"layers": 2, **changes}),
        text=dataclasses.replace(config.text, layers=2),
    )
    return rough(XCLIP(config).cuda().eval())


def frames(model: XCLIP, batch: int) -> Tensor:
    size = model.config.vision.image_size
    return torch.randint(0, 256, (batch, model.config.num_frames, size, size, 3), dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("name", ["B/32-8f", "B/16-8f", "L/14-8f", "L/14@336-16f"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_with_kernels_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    model, tokens = shallow(name), tokenize(LABELS).cuda()
    video = frames(model, 2)
    with torch.no_grad(), backend("reference"):
        exact = model.double()(video, tokens)
        baseline = (model.to(dtype)(video, tokens).double() - exact).abs().max()
    with torch.no_grad():
        got = (model(video, tokens).double() - exact).abs().max()
    assert got <= 2 * baseline + 0.02, (got, baseline)


@pytest.mark.parametrize("length", [50, 197, 257, 577])
def test_block_gradients_at_real_sizes(length: int) -> None:
    block = FastCCTBlock(768, 12, 8, batch_first=True).cuda().bfloat16()
    x = torch.randn(32, length, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cotangent = torch.randn_like(x)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        twin = FastCCTBlock(768, 12, 8, batch_first=True).cuda().to(dtype)
        twin.load_state_dict(block.state_dict())
        inputs = [x.detach().to(dtype).requires_grad_(), *twin.parameters()]
        return list(torch.autograd.grad(twin(inputs[0]), inputs, cotangent.to(dtype)))

    with backend("reference"):
        exact, baseline = gradients(torch.float32), gradients(torch.bfloat16)
    for got, torchs, right in zip(gradients(torch.bfloat16), baseline, exact, strict=True):
        limit = 2 * (torchs.float() - right).norm() + 2e-3 * right.norm()
        assert (got.float() - right).norm() <= limit


@pytest.mark.parametrize(("name", "videos"), [("B/16-8f", 8), ("B/16-8f", 1), ("B/32-8f", 32), ("L/14-8f", 5)])
def test_tower_gradients_under_autocast(name: str, videos: int) -> None:
    """Many rows, which the CUDA library's products take, and few; blocks that hand their gradient's copy on."""
    model = shallow(name, layers=3).train()
    video = frames(model, videos)
    cotangents = [torch.randn_like(feature).double() for feature in model.encode_video(video)]

    def gradients(of: XCLIP, backend_name: str, autocast: bool) -> dict[str, Tensor]:
        of.zero_grad()
        with backend(backend_name), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            features = of.encode_video(video)
        sum((got.double() * to).sum() for got, to in zip(features, cotangents, strict=True)).backward()
        return {name: each.grad.clone() for name, each in of.named_parameters() if each.grad is not None}

    exact = gradients(copy.deepcopy(model).double(), "reference", False)
    baseline, got = gradients(model, "reference", True), gradients(model, "auto", True)
    for name, right in exact.items():
        parts = 3 if name.endswith("in_proj_bias") else 1  # the gradient of the keys' bias is 0
        limit = 2 * (baseline[name] - right).norm() + 8e-3 * right.norm()
        for mine, part in zip(got[name].chunk(parts), right.chunk(parts), strict=True):
            assert (mine - part).norm() <= limit, name


def test_repeated_runs_are_the_same_to_the_last_bit() -> None:
    """A race between programs shows as a difference between runs."""
    model, tokens = shallow("B/16-8f").bfloat16(), tokenize(LABELS).cuda()
    video = frames(model, 8)

    def step() -> list[Tensor]:
        model.zero_grad()
        loss = F.cross_entropy(model(video, tokens), torch.arange(8, device="cuda") % 4)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.visual.parameters())]

    first = step()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


def same(got: VideoFeatures, wanted: VideoFeatures) -> None:
    """To the last bit: a graph replays the kernels that the eager call launches."""
    torch.testing.assert_close(got.video, wanted.video, rtol=0, atol=0)
    torch.testing.assert_close(got.patches, wanted.patches, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "autocast"),  # the CUDA library's products take no float32 residual stream, as autocast has
    [("auto", False), ("reference", False), ("cuda", False), ("auto", True), ("reference", True)],
)
def test_graphed_tower_is_the_eager_one(name: str, autocast: bool) -> None:
    refused = cuda_library.refuse_device("cuda", None) if name == "cuda" else None
    if refused:
        pytest.skip(refused)
    model = shallow("B/16-8f")
    model = model if autocast else model.bfloat16()
    graphed = model.graphed(batch=2)
    with torch.inference_mode(), backend(name), torch.autocast("cuda", torch.bfloat16, autocast):
        for _ in range(20):  # a race shows now and then
            video = frames(model, 2)
            same(graphed(video), model.encode_video(video))


def test_graphed_buckets_alternate_and_results_stay() -> None:
    model = shallow("B/32-8f").bfloat16()
    buckets = [model.graphed(1), model.graphed(3), model.graphed(1, frames=5)]
    with torch.inference_mode():
        kept = []
        for _ in range(5):
            for graphed in buckets:
                size = model.config.vision.image_size
                shape = (graphed.batch, graphed.frames, size, size, 3)
                video = torch.randint(256, shape, dtype=torch.uint8, device="cuda")
                kept.append((graphed(video), model.encode_video(video)))
        pixels = torch.randn(1, 8, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
        kept.append((buckets[0](pixels), model.encode_video(pixels)))
        for got, wanted in kept:
            same(got, wanted)
        few = model.graphed(3)(frames(model, 2))
        assert few.video.shape[0] == few.patches.shape[0] == 2


def test_graphed_tower_follows_its_weights() -> None:
    model, other = shallow("B/32-8f").bfloat16(), shallow("B/32-8f").bfloat16()
    graphed, video = model.graphed(), frames(model, 1)
    changes = [
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.visual.proj.mul_(1.5),
        lambda: model.load_state_dict({k: v.clone() for k, v in shallow("B/32-8f").state_dict().items()}, assign=True),
        lambda: model.to(torch.float16),
        lambda: model.cpu().cuda(),
        model.clear_graphs,
    ]
    with torch.no_grad():
        before = graphed(video)
        for index, change in enumerate(changes):
            change()
            torch.cuda.empty_cache()  # memory that a replay must not read any more is gone
            got = graphed(video)
            same(got, model.encode_video(video))
            assert index > 2 or not torch.equal(got.video.float(), before.video.float())
            before = got


def test_graphed_tower_from_two_streams() -> None:
    model = shallow("B/32-8f").bfloat16()
    graphed, streams = model.graphed(), [torch.cuda.Stream() for _ in range(2)]
    with torch.inference_mode():
        videos = [frames(model, 1) for _ in range(20)]
        wanted = [model.encode_video(video) for video in videos]
        graphed(videos[0])
        torch.cuda.synchronize()
        got = []
        for index, video in enumerate(videos):
            with torch.cuda.stream(streams[index % 2]):
                got.append(graphed(video))
        torch.cuda.synchronize()
        for a, b in zip(got, wanted, strict=True):
            same(a, b)


def test_capture_while_another_thread_pins_memory() -> None:
    model, stop = shallow("B/32-8f").bfloat16(), threading.Event()

    def pin() -> None:
        size = 1
        while not stop.is_set():
            torch.empty(size := size % 4000 + 1, 1000).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        with torch.inference_mode():
            for batch in range(1, 6):
                video = frames(model, batch)
                same(model.graphed(batch)(video), model.encode_video(video))
    finally:
        stop.set()
        thread.join()


def test_compiled_model_gives_the_same_numbers() -> None:
    model, tokens = shallow("B/16-8f").bfloat16(), tokenize(LABELS).cuda()
    video = frames(model, 2)
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True)(video, tokens)
        torch.testing.assert_close(compiled, model(video, tokens), rtol=0.02, atol=0.05)


def test_a_training_step_does_not_wait_for_the_gpu() -> None:
    model, tokens = shallow("B/32-8f").train(), tokenize(LABELS).cuda()
    video, truth = frames(model, 4), torch.arange(4, device="cuda")
    text = model.encode_text(tokens).detach()
    for mode in (0, "error"):  # the first step compiles and makes what is kept
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                logits = model.similarity(model.encode_video(video), text)
            F.cross_entropy(logits, truth).backward()
        finally:
            torch.cuda.set_sync_debug_mode(0)


def losses(name: str, steps: int) -> list[float]:
    """Losses of a short training of two layers on fixed random videos."""
    torch.manual_seed(0)
    model = shallow("B/32-8f", drop_path=0.0).train()
    video, tokens = frames(model, 16), tokenize([f"label number {index}" for index in range(16)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    found = []
    with backend(name):
        for _ in range(steps):
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(video, tokens), torch.arange(16, device="cuda"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    return [float(value) for value in found]


def test_training_follows_the_reference() -> None:
    ours, reference = losses("auto", 200), losses("reference", 200)
    assert reference[-1] < 0.5 * reference[0]
    for start in range(0, 200, 20):  # means over 20 steps: single ones differ by rounding
        a, b = sum(ours[start : start + 20]) / 20, sum(reference[start : start + 20]) / 20
        assert abs(a - b) <= 0.05 * b + 0.02, (start, a, b)


def sanitizer_refusal(said: str) -> str | None:
    """The line in which compute-sanitizer says that it cannot work on this machine, if there is one.

    Some virtual machines refuse it the device. An error that it found is in its summary, and is no refusal.
    """
    if re.search(r"ERROR SUMMARY: [1-9]", said) and "Invalid __" in said:
        return None
    lines = (line.lstrip("= ").strip() for line in said.splitlines())
    return next((line for line in lines if any(word in line for word in SANITIZER_REFUSES)), None)


def test_compute_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)")
    code = (
        "import torch; from xclip_fast import FastCCTBlock\n"
        "block = FastCCTBlock(128, 2, 3, batch_first=True).cuda().bfloat16()\n"
        "x = torch.randn(6, 50, 128, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "block(x).sum().backward(); torch.cuda.synchronize()\n"
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    said = done.stdout + done.stderr
    if done.returncode != 0 and (reason := sanitizer_refusal(said)):
        pytest.skip(f"compute-sanitizer does not run on this machine: {reason}")
    assert done.returncode == 0, said[-3000:]
