"""What throughput.py, training.py and the GPU checks measure: our model, and Hugging Face's with the same weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import cpu_engines
import torch
import torch.nn.functional as F
from torch import Tensor

import xclip_fast
from xclip_fast import flops
from xclip_fast.config import VARIANTS, VisionConfig, XCLIPConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # between outputs of the same random weights
OURS, GRAPHED = "xclip-fast", "xclip-fast graph"
DECODING, COMPUTING = "decoding alone", "model alone"  # of "from mp4 files", in which both run at once
EAGER, COMPILED = "Hugging Face", "HF compiled"
HF_INSTALLED = importlib.util.find_spec("transformers") is not None
BATCHES_A_CALL = 4  # of "from mp4 files": a single batch could not be decoded ahead
CLIP_FRAMES, CLIP_SIZE = 96, (256, 340)  # of the generated mp4 files


def has_peer(variant: str) -> bool:
    """Whether Hugging Face has this model: not X-Florence, whose tower has windows."""
    return isinstance(VARIANTS[variant].vision, VisionConfig)


def huggingface(model: xclip_fast.XCLIP) -> torch.nn.Module:
    """Hugging Face's model with the same weights, in evaluation mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, layout="huggingface")
        hf = transformers.XCLIPModel.from_pretrained(folder).eval()
        for parameter in hf.parameters():
            parameter.data = parameter.data.clone()  # into memory: the first timed call would read a mapped file
    return hf


def normalized(video: Tensor, config: XCLIPConfig) -> Tensor:
    """uint8 videos (B, T, H, W, 3) as Hugging Face's model takes them: float32 (B, T, 3, H, W)."""
    mean, deviation = (torch.tensor(values, device=video.device) for values in (config.image_mean, config.image_std))
    return ((video / 255 - mean) / deviation).permute(0, 1, 4, 2, 3).contiguous()


def hf_video(hf: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """The video half of ``XCLIPModel.forward``: ``get_video_features`` and the patch features for the prompts."""
    batch, frames = video.shape[:2]
    tokens = hf.vision_model(pixel_values=video.flatten(0, 1))
    features = hf.mit(hf.visual_projection(tokens[1]).unflatten(0, (batch, frames)))[1]
    patches = hf.prompts_visual_layernorm(tokens[0][:, 1:]) @ hf.prompts_visual_projection
    return features, patches.unflatten(0, (batch, frames)).mean(1)


def hf_cached(hf: Any, video: Tensor, text_KE: Tensor) -> Tensor:
    """``XCLIPModel.forward`` from the features of the labels on."""
    features, patches = hf_video(hf, video)
    text = text_KE.expand(len(features), -1, -1)
    text = text + hf.prompts_generator(text, patches)
    return hf.logit_scale.exp() * torch.einsum("be,bke->bk", F.normalize(features, dim=-1), F.normalize(text, dim=-1))


def contenders_of(
    work: str,
    batch: int,
    model: xclip_fast.XCLIP,
    hf: Any,
    labels: list[str],
    files: Sequence[Path] = (),
    *,
    graphed: bool = False,
    compiled: bool = False,
    engines: Sequence[str] = (),
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of each contender for one of ``throughput.WORKS`` on one random batch, without the absent ones."""
    config, device, dtype = model.config, model.logit_scale.device, model.logit_scale.dtype
    frames, size, length = config.num_frames, config.vision.image_size, config.text.context_length
    tokens = xclip_fast.tokenize(labels, length)
    video = torch.randint(256, (batch, frames, size, size, 3), dtype=torch.uint8, device=device)
    text_KE = model.encode_text(tokens) if work in ("cached", "files") else None
    if work == "files":
        # files are repeated to fill the batches; each counts as one video
        paths = list(itertools.islice(itertools.cycle(files), BATCHES_A_CALL * batch))
        videos = decoded(paths, frames, size)
        yield OURS, lambda: from_files(model, paths, tokens, batch)
        yield DECODING, lambda: decoded(paths, frames, size)
        yield COMPUTING, lambda: torch.cat([model(part.to(device), tokens).cpu() for part in videos.split(batch)])
        return

    def encoded() -> Tensor:
        model.text.forget()  # labels seen before would not be encoded again
        return model(video, tokens)

    ours: dict[str, Callable[[], Any]] = {
        "tower": lambda: model.encode_video(video),
        "cached": lambda: model(video, tokens),
        "encoded": encoded,
    }
    yield OURS, ours[work]
    if graphed:
        graph = model.graphed(batch, frames)
        yield GRAPHED, (lambda: graph(video)) if text_KE is None else (lambda: graph.logits(video, text_KE))
    if hf is None:
        return
    pixels, padded = normalized(video, config).to(dtype), xclip_fast.tokenize(labels, length, pad=True).to(device)
    theirs: dict[str, Callable[[], Any]] = {
        "tower": lambda: hf_video(hf, pixels),
        # features from our encoder, because theirs takes long; the "encoded" row checks that they are equal
        "cached": lambda: hf_cached(hf, pixels, text_KE),
        "encoded": lambda: hf(input_ids=padded, pixel_values=pixels).logits_per_video,
    }
    yield EAGER, theirs[work]
    if compiled:
        torch._dynamo.reset()
        peer = torch.compile(theirs[work], mode="max-autotune" if device.type == "cuda" else "default")
        with contextlib.suppress(Exception):  # compiled now, not in a timed call; an error comes again and is noted
            peer()
        yield COMPILED, peer
    for name in engines if work == "tower" else ():
        if cpu_engines.missing(name) is None:
            try:
                with torch.inference_mode(False):  # its tensors cannot be traced
                    engine = cpu_engines.build(name, Tower(hf), pixels.float().clone(), dtype)
            except Exception as error:  # noted in its row, as a failed call
                engine = functools.partial(reraise, error)
            yield name, engine


def products_of(work: str, config: XCLIPConfig, lengths: list[int], batch: int) -> list[flops.Product]:
    """The matrix products of our forward; ``lengths``: the tokens of each label."""
    products = flops.products(config, labels=lengths, batch=batch, counting="actual")
    left_out = {"encoded": (), "tower": ("text", "prompts", "similarity")}.get(work, ("text",))
    return [product for product in products if product.part not in left_out]


class Tower(torch.nn.Module):
    """The video half of Hugging Face's model as a module of its own, in float32."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = copy.deepcopy(hf).float()

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return hf_video(self.hf, video)


def reraise(error: Exception) -> NoReturn:
    raise error


def from_files(model: xclip_fast.XCLIP, paths: list[Path], tokens: Tensor, batch: int) -> Tensor:
    """Logits of video files, decoded ahead of the model as ``xclip-fast classify`` does."""
    from xclip_fast.inference.batches import Answer, Reading, answers

    text_KE = model.encode_text(tokens)
    reading = Reading(model.config.num_frames, model.config.vision.image_size)
    found = answers(
        model, [str(path) for path in paths], reading, lambda v: (model.similarity(v, text_KE),), batch_size=batch
    )
    return torch.stack([item.values[0] for item in found if isinstance(item, Answer)])


def decoded(paths: list[Path], frames: int, size: int) -> Tensor:
    from xclip_fast.data.decode.ahead import decode_ahead
    from xclip_fast.inference.batches import Reading

    found: Any = decode_ahead([str(path) for path in paths], Reading(frames, size).windows, None)
    return torch.stack([window.frames for _, window in found if window is not None])


def write_clips(folder: Path) -> list[Path]:
    from xclip_fast.data.motion import CLASSES, render, write_clip

    paths = [folder / f"{number}.mp4" for number in range(4)]
    for path, label in zip(paths, CLASSES[::2], strict=False):
        write_clip(path, render(label, 0, frames=CLIP_FRAMES, size=CLIP_SIZE))
    return paths
